"""Shapes from headers alone: what is read, and that every fault is named."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import CheckpointError
from edgepress.checkpoints.families import shape_from_config
from edgepress.checkpoints.headers import INDEX, block_prefix, read_config, read_header, shape_from_folder, weight_files
from edgepress.checkpoints.shape import ModelShape, Pattern
from tests.models import FAMILIES, tiny_config

pytestmark = pytest.mark.unit

TinyModel = Callable[..., Path]


def names_and_shapes(shape: ModelShape) -> set[tuple[str, tuple[int, ...], str]]:
    tensors = [*shape.outer, *(t for index in range(len(shape.blocks)) for t in shape.block_tensors(index))]
    return {(t.name, t.shape, t.dtype) for t in tensors}


def shard(folder: Path) -> Path:
    """Save the model again in several files."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="200KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_single_file(tiny_model: TinyModel, family: str) -> None:
    folder = tiny_model(family)
    shape = shape_from_folder(folder)
    assert names_and_shapes(shape) == names_and_shapes(shape_from_config(tiny_config(family)))
    assert [set(block.linears) for block in shape.blocks] == [
        set(block.linears) for block in shape_from_config(tiny_config(family)).blocks
    ]
    assert (shape.family, shape.block_prefix, len(shape.blocks)) == (family, "model.layers", 6)
    assert shape.grid is None
    assert shape.pattern is None
    tensors = load_file(folder / "model.safetensors")
    assert shape.parameters_total == sum(t.numel() for t in tensors.values())


def test_sharded(own_model: TinyModel, tiny_model: TinyModel) -> None:
    folder = shard(own_model(attention_bias=True))
    assert shape_from_folder(folder) == shape_from_folder(tiny_model(attention_bias=True))
    files = weight_files(folder)
    assert len(set(files.values())) > 3
    for name, path in files.items():
        assert name in read_header(path)


def test_pattern_of_the_manifest(own_model: TinyModel, finish: Callable[..., Checkpoint]) -> None:
    folder = own_model()
    checkpoint = finish(folder, sparsity={"pattern": "1:8"})
    assert checkpoint.shape.pattern == Pattern(1, 8)
    dense = shape_from_config(tiny_config("llama"))
    weights = sum(x.weights for block in dense.blocks for x in block.linears)
    assert checkpoint.shape.parameters_nonzero == dense.parameters_total - weights // 8


# ------------------------------------------------------------------ faults


def refused(folder: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as raised:
        shape_from_folder(folder)
    assert str(folder) in str(raised.value)


@pytest.mark.parametrize("change", [-4096, -1, 1])
def test_cut_or_padded_file(own_model: TinyModel, change: int) -> None:
    folder = own_model()
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes((whole + b"x")[: len(whole) + change])
    refused(folder, rf"model\.safetensors has {len(whole) + change} bytes where its header announces {len(whole)}")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0\0",
        struct.pack("<Q", 10) + b"{",
        struct.pack("<Q", 2**40) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 4) + b"\xff\xfe\xfd\xfc",
        struct.pack("<Q", 7) + b'{"a":1}',
        struct.pack("<Q", 14) + b'{"a":{"x":[]}}',
    ],
)
def test_file_that_is_no_safetensors(own_model: TinyModel, content: bytes) -> None:
    folder = own_model()
    (folder / "model.safetensors").write_bytes(content)
    refused(folder, r"model\.safetensors is not a readable safetensors file")


@pytest.mark.parametrize(
    ("dtype", "said"),
    [
        (torch.complex64, "stored as C64 without saying what its codes stand for"),
        (torch.float8_e4m3fn, "stored as F8_E4M3 without saying what its codes stand for"),
        (torch.float64, "stored in float64, which is not read; save the model in float32"),
    ],
)
def test_numbers_of_another_kind_are_named(own_model: TinyModel, dtype: torch.dtype, said: str) -> None:
    folder = own_model()
    tensors = load_file(folder / "model.safetensors")
    for name in ("model.norm.weight", "model.layers.1.mlp.up_proj.weight", "model.layers.3.input_layernorm.weight"):
        save_file(tensors | {name: tensors[name].to(dtype)}, folder / "model.safetensors")
        refused(folder, said)


def test_a_type_that_safetensors_may_gain_is_named(own_model: TinyModel) -> None:
    folder = own_model()
    data = (folder / "model.safetensors").read_bytes().replace(b'"F32"', b'"F99"', 1)
    (folder / "model.safetensors").write_bytes(data)
    refused(folder, "is not a readable safetensors file: 'F99'")


def test_index_names_a_missing_file(own_model: TinyModel) -> None:
    folder = shard(own_model())
    gone = sorted(folder.glob("model-*.safetensors"))[1]
    gone.unlink()
    refused(folder, f"lacks {gone.name}, which its index names")


def test_index_names_a_missing_tensor(own_model: TinyModel) -> None:
    folder = shard(own_model())
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.layers.0.mlp.extra.weight"] = sorted(index["weight_map"].values())[0]
    (folder / INDEX).write_text(json.dumps(index))
    refused(folder, r"its index names model\.layers\.0\.mlp\.extra\.weight, which no file holds")


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"weight_map": 3}', b"\xff\xfe"])
def test_damaged_index(own_model: TinyModel, content: bytes) -> None:
    folder = shard(own_model())
    (folder / INDEX).write_bytes(content)
    refused(folder, r"index\.json is damaged")


def test_pickled_weights_are_not_opened(own_model: TinyModel) -> None:
    folder = own_model()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, r"holds no safetensors weights .*pytorch_model\.bin is pickled and is never opened; save the model")
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match="holds no safetensors weights") as raised:
        shape_from_folder(folder)
    assert str(raised.value).endswith("model.safetensors).")


def test_no_config(own_model: TinyModel, tmp_path: Path) -> None:
    folder = own_model()
    (folder / "config.json").unlink()
    refused(folder, r"is not a model folder: it has no config\.json \(it holds .*model\.safetensors")
    refused(tmp_path / "nowhere", r"has no config\.json$")


@pytest.mark.parametrize(
    ("content", "message"), [(b"{", "is not JSON"), (b"\xff", "is not JSON"), (b"[]", "not hold a")]
)
def test_damaged_config(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"config\.json .*{message}"):
        read_config(tmp_path)


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("count", [5, 7])
def test_config_and_files_disagree_on_blocks(own_model: TinyModel, count: int) -> None:
    folder = own_model()
    edit_config(folder, num_hidden_layers=count)
    refused(folder, rf"states {count} blocks \(num_hidden_layers\), and its files hold 6, model\.layers\.0 to")


def test_config_without_a_block_count(own_model: TinyModel) -> None:
    folder = own_model()
    edit_config(folder, num_hidden_layers=None)
    refused(folder, r"config\.json states no num_hidden_layers")


def test_other_quantisers(own_model: TinyModel) -> None:
    folder = own_model()
    edit_config(folder, quantization_config={"quant_method": "awq", "bits": 4, "group_size": 128})
    with pytest.raises(CheckpointError, match="quantised by 'awq'; only GPTQ's format"):
        shape_from_folder(folder)


def test_block_prefix_is_the_group_that_has_all_numbers(tmp_path: Path) -> None:
    names = [f"a.h.{i}.x.{j}.w" for i in range(3) for j in range(2)] + ["a.side.0.w", "head.w"]
    assert block_prefix(names, 3, tmp_path) == "a.h"
    assert block_prefix(names, 1, tmp_path) == "a.side"
    with pytest.raises(CheckpointError, match=r"its 2 blocks; numbered groups found: a\.h \(3\), a\.side \(1\)"):
        block_prefix(names, 2, tmp_path)
    with pytest.raises(CheckpointError, match="numbered groups found: none"):
        block_prefix(["head.w"], 2, tmp_path)

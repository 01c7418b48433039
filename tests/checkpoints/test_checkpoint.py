"""Opening a folder, its identity, and blocks as effective weights: codes dequantised, adapter added."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from edgepress.checkpoints.checkpoint import Checkpoint, foreign_fingerprint
from edgepress.checkpoints.errors import CheckpointError, NumericsError
from edgepress.checkpoints.forms import Grid
from edgepress.checkpoints.image import pack_checkpoint
from edgepress.checkpoints.manifest import WORK
from edgepress.checkpoints.packing import pack_linear
from edgepress.checkpoints.writer import CheckpointWriter

pytestmark = pytest.mark.unit

TinyModel = Callable[..., Path]
Finish = Callable[..., Checkpoint]

RANK, ALPHA, GROUP = 4, 6, 32


# ------------------------------------------------------------------ opening


def test_unfinished_folder(own_model: TinyModel, finish: Finish, tmp_path: Path) -> None:
    folder = own_model()
    (folder / WORK).mkdir()
    with pytest.raises(CheckpointError, match=rf"{folder} is a checkpoint still being written; run its command again"):
        Checkpoint.open(folder)
    assert finish(folder).folder == folder  # a manifest makes it finished, whatever else lies there
    with pytest.raises(CheckpointError, match="nowhere is not a folder"):
        Checkpoint.open(tmp_path / "nowhere")


def test_a_folder_without_manifest_is_a_foreign_model(tiny_model: TinyModel) -> None:
    checkpoint = Checkpoint.open(tiny_model())
    assert checkpoint.manifest is None
    assert list(checkpoint.ancestors()) == [checkpoint]
    assert checkpoint.stored_dtype == torch.float32
    assert Checkpoint.open(tiny_model(dtype="bfloat16")).stored_dtype == torch.bfloat16
    with pytest.raises(CheckpointError, match="was not made from another checkpoint"):
        checkpoint.parent()


# ------------------------------------------------------------------ identity


@pytest.mark.parametrize("place", [-1, -4000, 0.3, 0.9])
def test_fingerprint_changes_with_any_weight_byte(own_model: TinyModel, place: float) -> None:
    folder = own_model()
    before = foreign_fingerprint(folder)
    assert foreign_fingerprint(folder) == before == Checkpoint.open(folder).fingerprint
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    at = int(place) if place < 0 else start + int(place * (len(data) - start))
    data[at] ^= 1
    path.write_bytes(data)
    assert foreign_fingerprint(folder) != before


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_fingerprint_changes_with_configuration_and_tokenizer(own_model: TinyModel, name: str) -> None:
    folder = own_model()
    before = foreign_fingerprint(folder)
    (folder / name).write_text((folder / name).read_text() + " ")
    assert foreign_fingerprint(folder) != before


def test_fingerprint_does_not_depend_on_the_place(own_model: TinyModel, tiny_model: TinyModel) -> None:
    assert foreign_fingerprint(own_model()) == foreign_fingerprint(tiny_model())


def test_ancestors_and_a_parent_that_changed(own_model: TinyModel, finish: Finish, tmp_path: Path) -> None:
    first = finish(own_model(), fingerprint="1" * 64)
    link = {"path": f"../{first.folder.name}", "fingerprint": "1" * 64}
    second = finish(Path(shutil.copytree(first.folder, tmp_path / "second")), parent=link, fingerprint="2" * 64)
    assert second.fingerprint == "2" * 64
    assert [checkpoint.folder for checkpoint in second.ancestors()] == [second.folder, first.folder]
    finish(first.folder, fingerprint="3" * 64)
    with pytest.raises(
        CheckpointError, match=rf"{first.folder} is not the checkpoint that {second.folder} was made fr"
    ):
        second.parent()
    shutil.rmtree(first.folder)
    with pytest.raises(CheckpointError, match=rf"{first.folder} is not a folder"):
        second.parent()


# ------------------------------------------------------------------ blocks


def test_blocks_are_the_files_tensors(tiny_model: TinyModel) -> None:
    checkpoint = Checkpoint.open(tiny_model("qwen3"))
    tensors = load_file(checkpoint.folder / "model.safetensors")
    read = checkpoint.outer()
    for index in range(6):
        block = checkpoint.block(index)
        assert block.keys() == checkpoint.stored_block(index).keys()
        read |= {f"model.layers.{index}.{name}": tensor for name, tensor in block.items()}
        for linear in checkpoint.shape.blocks[index].linears:
            assert torch.equal(checkpoint.base_weight(index, linear), block[f"{linear.name}.weight"])
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_named(own_model: TinyModel, bad: float) -> None:
    folder = own_model()
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    tensors["model.layers.3.mlp.up_proj.weight"][1, 2] = bad
    tensors["model.norm.weight"][5] = bad
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint.open(folder)
    checkpoint.block(2)
    with pytest.raises(NumericsError, match=r"llama: model\.layers\.3\.mlp\.up_proj\.weight holds 1 values"):
        checkpoint.block(3)
    with pytest.raises(NumericsError, match=r"llama: model\.norm\.weight holds 1 values"):
        checkpoint.outer()


def test_counts_are_the_files(own_model: TinyModel, tmp_path: Path) -> None:
    folder = own_model()
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    tensors["model.layers.3.mlp.up_proj.weight"][:, ::8] = 0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / WORK).mkdir()
    (folder / WORK / "part.safetensors").write_bytes(b"not counted")
    total = sum(tensor.numel() for tensor in tensors.values())
    facts = Checkpoint(folder, None).facts()
    assert facts == {
        "parameters_total": total,
        "parameters_nonzero": total - 128 * 64 // 8,
        "file_bytes": (folder / "model.safetensors").stat().st_size,
        "packed_bytes": pack_checkpoint(Checkpoint(folder, None), tmp_path / "model.bin").path.stat().st_size,
    }


def test_tokenizer(own_model: TinyModel) -> None:
    folder = own_model()
    tokenizer = Checkpoint.open(folder).tokenizer()
    text = "The for statement is used to iterate \u2014 \u65e5\u672c."
    ids = tokenizer(text)["input_ids"]
    assert max(ids) < 512
    assert len(ids) < len(text.encode())
    assert tokenizer.decode(ids) == text
    for path in folder.glob("*token*"):
        path.unlink()
    with pytest.raises(CheckpointError, match="holds no tokenizer that transformers can read"):
        Checkpoint.open(folder).tokenizer()


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("rms_norm_eps", "x", 'rms_norm_eps = "x": .*expected float, got str'),
        ("layer_types", ["bad"], r'layer_types = \["bad"\]: '),
        ("dtype", "float7", 'dtype = "float7"'),
        ("id2label", 3, "id2label = 3"),
    ],
)
def test_a_field_that_transformers_refuses_is_named_and_not_the_tokenizer(
    own_model: TinyModel, field: str, value: Any, words: str
) -> None:
    folder = own_model()
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    checkpoint = Checkpoint.open(folder)
    for read in (checkpoint.tokenizer, checkpoint.hf_config):
        with pytest.raises(CheckpointError, match=f"config.json states {words}"):
            read()


def test_a_tokenizer_that_cannot_be_relied_on(own_model: TinyModel) -> None:
    folder = own_model()
    path = folder / "tokenizer.json"
    told = json.loads(path.read_text())
    told["model"]["dropout"] = 0.1
    path.write_text(json.dumps(told))
    with pytest.raises(CheckpointError, match="states dropout"):
        Checkpoint.open(folder).tokenizer()
    told["model"] = {"type": "WordPiece", "unk_token": "?", "vocab": {"words": 0}, "continuing_subword_prefix": "#",
                     "max_input_chars_per_word": 9}  # fmt: skip
    path.write_text(json.dumps(told | {"added_tokens": []}))
    with pytest.raises(CheckpointError, match="holds no tokenizer that transformers can read"):
        Checkpoint.open(folder).tokenizer()


# ------------------------------------------------------------------ quantised, with an adapter


@pytest.fixture
def quantised(tiny_model: TinyModel, tmp_path: Path) -> tuple[Checkpoint, dict[str, Tensor], dict[str, Tensor]]:
    """A checkpoint of the last stage, the dense weights its codes mean, and the adapter's products."""
    source = Checkpoint.open(tiny_model("llama", dtype="bfloat16"))
    writer = CheckpointWriter(tmp_path / "quantised")
    generator = torch.Generator().manual_seed(5)
    dense, products = {}, {}
    for index, block in enumerate(source.shape.blocks):
        stored = source.block(index)
        part: dict[str, Tensor] = {}
        for linear in block.linears:
            del stored[f"{linear.name}.weight"]
            groups = linear.in_features // GROUP
            codes = torch.randint(16, (linear.out_features, linear.in_features), generator=generator)
            scales = (torch.rand(linear.out_features, groups, generator=generator) * 0.02).half().float()
            zeros = torch.randint(1, 16, (linear.out_features, groups), generator=generator)
            for kind, tensor in pack_linear(codes, scales, zeros, GROUP, 4).items():
                stored[f"{linear.name}.{kind}"] = tensor
            wide = torch.arange(linear.in_features) // GROUP
            dense[f"{index}.{linear.name}"] = scales[:, wide] * (codes - zeros[:, wide])
            a = torch.randn(RANK, linear.in_features, generator=generator).bfloat16()
            b = torch.randn(linear.out_features, RANK, generator=generator).bfloat16()
            part |= {f"{linear.name}.lora_A.weight": a, f"{linear.name}.lora_B.weight": b}
            products[f"{index}.{linear.name}"] = ALPHA / RANK * (b.float() @ a.float())
        writer.write_block(index, stored)
        writer.write_adapter_part(index, part)
    writer.copy_outer(source)
    writer.join_adapter({"r": RANK, "lora_alpha": ALPHA})
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": False}
    writer.finish(source.config | {"quantization_config": quantization}, source)
    writer.work.remove()
    return Checkpoint.open(writer.folder), dense, products


def test_effective_weights(quantised: tuple[Checkpoint, dict[str, Tensor], dict[str, Tensor]]) -> None:
    checkpoint, dense, products = quantised
    assert checkpoint.shape.grid == Grid(4, GROUP)
    assert checkpoint.stored_dtype == torch.bfloat16
    for index, block in enumerate(checkpoint.shape.blocks):
        weights = checkpoint.block(index)
        assert {name for name in weights if "layernorm" not in name} == {f"{x.name}.weight" for x in block.linears}
        for linear in block.linears:
            key = f"{index}.{linear.name}"
            assert (linear.grid, linear.adapter_rank, linear.dtype) == (Grid(4, GROUP), RANK, "BF16")
            assert torch.equal(checkpoint.base_weight(index, linear), dense[key])
            expected = (dense[key].bfloat16().float() + products[key]).bfloat16()
            assert torch.equal(weights[f"{linear.name}.weight"], expected)


def test_shape_of_the_files_is_the_planned_shape(
    quantised: tuple[Checkpoint, dict[str, Tensor], dict[str, Tensor]],
) -> None:
    checkpoint, dense, products = quantised
    facts = checkpoint.facts()
    assert facts["file_bytes"] == checkpoint.shape.file_bytes
    adapters = sum(RANK * sum(product.shape) for product in products.values())
    dense_total = sum(t.numel() for t in dense.values()) + 2 * 512 * 64 + 64 + 6 * 2 * 64
    assert facts["parameters_total"] == dense_total + adapters
    assert facts["parameters_nonzero"] == facts["parameters_total"] - sum(int((t == 0).sum()) for t in dense.values())


def test_model_runs_on_effective_weights(
    quantised: tuple[Checkpoint, dict[str, Tensor], dict[str, Tensor]],
) -> None:
    checkpoint, _, _ = quantised
    model: Any = checkpoint.model()
    assert "quantization_config" not in json.loads(model.config.to_json_string())
    weights = checkpoint.block(4)
    for name, parameter in model.model.layers[4].named_parameters():
        assert torch.equal(parameter, weights[name])

"""Checkpoints with codebooks: back bit for bit from the packed image, and read from folders of other makers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from edgepress.checkpoints import headers
from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import CheckpointError, NumericsError
from edgepress.checkpoints.forms import CODEBOOKS, Codebook
from edgepress.checkpoints.headers import shape_from_folder
from edgepress.checkpoints.image import decode_linear, encode_linear, pack_checkpoint, unpack_checkpoint
from edgepress.checkpoints.manifest import sealed
from edgepress.checkpoints.packed_sizes import block_records, packed_sizes, place
from edgepress.checkpoints.packing import decode, state_of
from edgepress.checkpoints.shape import BlockShape, LinearShape, parse_sparsity
from edgepress.checkpoints.writer import verify
from tests.random_checkpoint import DTYPES, Wanted

pytestmark = pytest.mark.unit

NF4 = CODEBOOKS["nf4"]


@st.composite
def wanted(draw: st.DrawFn) -> Wanted:
    of = draw(st.integers(2, 16))
    return Wanted(
        seed=draw(st.integers(0, 10**6)),
        dtype=draw(st.sampled_from(list(DTYPES))),
        pattern=draw(st.sampled_from([None, f"{draw(st.integers(1, of - 1))}:{of}", "0.5", "0.05", "0.9"])),
        codebook=draw(st.sampled_from(list(CODEBOOKS))),
        rank=draw(st.sampled_from([0, 3])),
        adapter_bits=draw(st.sampled_from([8, 16])),
        edge_bits=draw(st.sampled_from([None, 8])),
        bias=draw(st.booleans()),
        zeros=draw(st.sampled_from([0.0, 0.3, 1.0])),
        rows=draw(st.integers(1, 40)),
        unit=of * draw(st.integers(1, 9)),
    )


@given(wanted=wanted())
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_a_layer_comes_back_as_it_was_and_takes_the_bytes_that_its_shape_says(wanted: Wanted) -> None:
    wanted.g = torch.Generator().manual_seed(wanted.seed)
    assert wanted.codebook is not None
    stored = wanted.layer(wanted.rows, wanted.unit)
    pattern = parse_sparsity(wanted.pattern) if wanted.pattern else None
    book = CODEBOOKS[wanted.codebook]
    x = LinearShape("q_proj", wanted.rows, wanted.unit, wanted.dtype, pattern=pattern, grid=book)
    (entry,), _ = place(block_records(BlockShape((x,), ())))
    parts = encode_linear(entry, stored)
    assert {n: p.size for n, p in parts.items() if p.size} == {n: size for n, (_, size) in entry["parts"].items()}
    sides = sum(part.size for name, part in parts.items() if name not in ("values", "index"))
    assert 8 * sides == book.side_bits(wanted.rows, wanted.unit)
    back = decode_linear(json.loads(json.dumps(entry)), parts)
    assert back.keys() == stored.keys()
    for name, tensor in stored.items():
        assert back[name].dtype == tensor.dtype and back[name].shape == tensor.shape, name
        assert torch.equal(back[name].view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


@given(wanted=wanted())
@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_a_folder_is_verified_packed_and_restored_byte_for_byte(wanted: Wanted) -> None:
    with TemporaryDirectory() as where:
        folder = Path(where)
        checkpoint = wanted.make(folder / "it")
        assert checkpoint.manifest is not None
        assert checkpoint.shape.file_bytes == checkpoint.manifest.file_bytes
        assert verify(checkpoint)
        image = pack_checkpoint(checkpoint, folder / "model.bin")
        assert image.nbytes == (folder / "model.bin").stat().st_size == packed_sizes(checkpoint.shape).total
        restored = unpack_checkpoint(folder / "model.bin", folder / "back")
        assert restored.shape == checkpoint.shape
        for path in (folder / "it").rglob("*.safetensors"):
            assert (folder / "back" / path.relative_to(folder / "it")).read_bytes() == path.read_bytes(), path


# --- reading -------------------------------------------------------------------------------------------------------


@pytest.fixture(params=list(CODEBOOKS))
def made(request: pytest.FixtureRequest, tmp_path: Path) -> Checkpoint:
    return Wanted(codebook=request.param, pattern="1:4", rank=3, bias=True, unit=60, rows=20).make(tmp_path / "it")


def test_the_shape_is_read_from_notes_of_a_few_bytes(made: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the shards only the beginning of each file and the notes."""
    read, real = [], headers._read_bytes

    def counting(path: Path, names: list[str]) -> dict[str, bytes]:
        found = real(path, names)
        read.extend(map(len, found.values()))
        return found

    monkeypatch.setattr(headers, "_read_bytes", counting)
    assert shape_from_folder(made.folder) == made.shape
    assert read == [Codebook.state_bytes] * sum(len(block.linears) for block in made.shape.blocks)
    for block in made.shape.blocks:
        q, down = block.linears[1], block.linears[0]
        assert (q.name, q.out_features, q.in_features) == ("self_attn.q_proj", 20, 60)
        assert (down.name, down.out_features, down.in_features) == ("mlp.down_proj", 40, 120)
        assert all(x.grid in CODEBOOKS.values() and x.bias and x.dtype == "BF16" for x in (q, down))
        assert [t.name for t in block.others] == ["input_layernorm.weight"]


def test_a_block_is_what_its_codes_and_its_adapter_stand_for(made: Checkpoint) -> None:
    dense, stored = made.block(1), made.stored_block(1)
    for x in made.shape.blocks[1].linears:
        assert x.grid is not None and x.grid in CODEBOOKS.values()
        own = {k.removeprefix(f"{x.name}."): t for k, t in stored.items() if k.startswith(f"{x.name}.")}
        base = decode(own, CODEBOOKS[x.grid.describe()], x.out_features, x.in_features)
        assert torch.equal(made.base_weight(1, x), base)
        part = made.adapter_part(1)
        product = part[f"{x.name}.lora_B.weight"].float() @ part[f"{x.name}.lora_A.weight"].float()
        expected = (base.bfloat16().float() + 2.0 * product).bfloat16()
        assert torch.equal(dense[f"{x.name}.weight"], expected)
    assert set(dense) == {
        "input_layernorm.weight", *(f"{x.name}.{k}" for x in made.shape.blocks[1].linears for k in ("weight", "bias"))
    }  # fmt: skip


def edited(made: Checkpoint, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """The folder with one shard's tensors changed, without its manifest."""
    folder = made.folder.with_name("edited")
    shutil.copytree(made.folder, folder)
    (folder / "manifest.json").unlink()
    shard = folder / "block-00000.safetensors"
    tensors = load_file(shard)
    change(tensors)
    save_file(tensors, shard, metadata={"format": "pt"})
    return folder


def test_a_note_without_our_spaces_is_read_alike(made: Checkpoint) -> None:
    """As bitsandbytes writes it: as long as its text."""

    def trim(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if "quant_state" in name]:
            text = bytes(tensors[name].tolist()).rstrip()
            tensors[name] = torch.tensor(list(text), dtype=torch.uint8)

    folder = edited(made, trim)
    assert [b.linears[0].grid for b in Checkpoint.open(folder).shape.blocks] == [made.shape.grid] * 2
    assert torch.equal(Checkpoint.open(folder).block(0)["mlp.down_proj.weight"], made.block(0)["mlp.down_proj.weight"])


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [("quant_type", "fp4", "KeyError.'fp4'"), ("shape", [3], "not enough values"), ("dtype", "int8", "'int8'")],
)
def test_a_note_that_makes_no_sense_is_named(made: Checkpoint, field: str, value: object, words: str) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        name = next(name for name in tensors if "q_proj.weight.quant_state" in name)
        note = state_of({name.partition("q_proj.")[2]: tensors[name]}) | {field: value}
        tensors[name] = torch.tensor(list(json.dumps(note).encode()), dtype=torch.uint8)

    with pytest.raises(CheckpointError, match=rf"block-00000.*q_proj.*does not say how the layer is stored.*{words}"):
        shape_from_folder(edited(made, spoil))


def test_a_part_that_is_missing_is_named(made: Checkpoint) -> None:
    index = made.folder / "model.safetensors.index.json"
    names = json.loads(index.read_text())
    lost = "model.layers.0.mlp.down_proj.weight.absmax"
    folder = edited(made, lambda tensors: tensors.pop(lost))
    names["weight_map"].pop(lost)
    (folder / index.name).write_text(json.dumps(names))
    with pytest.raises(CheckpointError, match=r"stored as nf4.* lacks mlp\.down_proj\.weight\.absmax"):
        shape_from_folder(folder)


def test_codes_without_a_note_are_no_weights(made: Checkpoint) -> None:
    index = made.folder / "model.safetensors.index.json"
    names = json.loads(index.read_text())
    lost = [name for name in names["weight_map"] if "layers.0.mlp.down_proj.weight.quant_state" in name]
    folder = edited(made, lambda tensors: [tensors.pop(name) for name in lost])
    for name in lost:
        names["weight_map"].pop(name)
    (folder / index.name).write_text(json.dumps(names))
    with pytest.raises(CheckpointError, match=r"mlp\.down_proj\.weight is stored as U8 without saying"):
        shape_from_folder(folder)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("weight.absmax", lambda x: x[:1]),  # would be spread over all blocks
        ("weight", lambda x: x.flatten().view(torch.bfloat16)),  # bnb_4bit_quant_storage
    ],
)
def test_a_part_of_another_shape_is_named(made: Checkpoint, kind: str, change: Callable[[Tensor], Tensor]) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        name = f"model.layers.0.mlp.down_proj.{kind}"
        tensors[name] = change(tensors[name]).clone()

    with pytest.raises(CheckpointError, match=rf"mlp\.down_proj\.{kind} is .* is wanted; save the model again"):
        shape_from_folder(edited(made, spoil))


def test_scales_that_are_no_number_are_named(made: Checkpoint) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        nested = made.shape.grid is not None and "weight.nested_absmax" in made.shape.grid.kinds
        tensors[f"model.layers.0.mlp.down_proj.weight.{'nested_absmax' if nested else 'absmax'}"][0] = torch.nan

    with pytest.raises(NumericsError, match=r"mlp\.down_proj\.weight holds"):
        Checkpoint.open(edited(made, spoil)).block(0)


@pytest.mark.parametrize(
    "quantised",
    [
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {"quant_method": "bitsandbytes", "load_in_8bit": True, "bnb_4bit_quant_type": "nf4"},
        {"quant_method": "edgepress-codebook", "codebook": "nf5"},
        {"quant_method": "awq"},
    ],
)
def test_what_cannot_be_read_back_is_refused(made: Checkpoint, quantised: dict[str, object]) -> None:
    config = made.config | {"quantization_config": quantised}
    (made.folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"quantised by '{quantised['quant_method']}'.*before quantisation"):
        shape_from_folder(made.folder)


def test_a_mask_that_is_not_there_cannot_be_packed(tmp_path: Path) -> None:
    made = Wanted(codebook="nf4", pattern=None, unit=64).make(tmp_path / "it")
    manifest = json.loads((made.folder / "manifest.json").read_text())
    (made.folder / "manifest.json").write_text(json.dumps(sealed(manifest | {"sparsity": {"pattern": "2:4"}})))
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.down_proj is said to hold 2:4, but"):
        pack_checkpoint(Checkpoint.open(made.folder), tmp_path / "model.bin")


def test_bitsandbytes_own_folder_is_read(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    """Saved by transformers with bitsandbytes: one file, notes of any length, no double quantisation."""
    why = "bitsandbytes is not installed: pip install bitsandbytes"
    bnb = pytest.importorskip("bitsandbytes.functional", reason=why)
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tiny_model(), quantization_config=how, dtype=torch.float32)
    model.save_pretrained(tmp_path / "theirs")
    found = Checkpoint.open(tmp_path / "theirs")
    assert found.shape.grid is not None and found.shape.grid.about() == NF4.about() | {"nested": 0}
    for index, block in enumerate(found.shape.blocks):
        for linear in block.linears:
            module = model.get_submodule(f"model.layers.{index}.{linear.name}")
            theirs = bnb.dequantize_4bit(module.weight, module.weight.quant_state)
            assert torch.equal(found.base_weight(index, linear), theirs)
    pack_checkpoint(found, tmp_path / "model.bin")
    back = unpack_checkpoint(tmp_path / "model.bin", tmp_path / "back")
    assert torch.equal(back.block(2)["mlp.up_proj.weight"], found.block(2)["mlp.up_proj.weight"])

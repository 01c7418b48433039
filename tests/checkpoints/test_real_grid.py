"""Codes with real zero points: what a layer stores, the packed image, bytes on a chip, and reading a folder back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from edgepress.checkpoints.bits import unpack_bits
from edgepress.checkpoints.errors import CheckpointError
from edgepress.checkpoints.families import PRESETS, shape_from_config
from edgepress.checkpoints.forms import Grid, RealGrid
from edgepress.checkpoints.image import decode_linear, encode_linear
from edgepress.checkpoints.packed_sizes import block_records, packed_sizes, place
from edgepress.checkpoints.packing import pack_real, unpack_real
from edgepress.checkpoints.shape import BlockShape, LinearShape, Pattern, safetensors_bytes, with_form
from edgepress.hardware.check import check
from edgepress.hardware.operators import forward, linear_weights
from edgepress.hardware.placement import PACKED, tensor_table, weight_bytes
from edgepress.hardware.soc import load_soc, shipped_socs
from edgepress.hardware.tiling import CORES, engine_of

pytestmark = pytest.mark.unit

TORCH = {"I32": torch.int32, "F16": torch.float16, "BF16": torch.bfloat16}


def drawn(seed: int, grid: RealGrid, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (out, in), scales and zeros (out, groups); zero points also below 0 and beyond the last code."""
    g = torch.Generator().manual_seed(seed)
    groups = grid.groups(columns)
    codes = torch.randint(2**grid.bits, (rows, columns), generator=g)
    scales = (torch.rand(rows, groups, generator=g) + 0.01).half().float()
    zeros = (20 * torch.randn(rows, groups, generator=g)).half().float()
    return codes, scales, zeros


CASES = st.tuples(
    st.integers(0, 10**6),
    st.sampled_from([2, 3, 4, 8]),
    st.sampled_from([32, 64, -1]),
    st.integers(1, 3),
    st.booleans(),
)


@given(case=CASES)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_a_layer_comes_back_as_it_was_and_takes_the_bytes_that_its_shape_says(
    case: tuple[int, int, int, int, bool],
) -> None:
    seed, bits, group, size, bias = case
    grid, rows, columns = RealGrid(bits, group), 32 * size, 64 * (4 - size)
    codes, scales, zeros = drawn(seed, grid, rows, columns)
    stored = pack_real(codes, scales, zeros, bits)
    for found, given_ in zip(unpack_real(stored, bits), (codes, scales, zeros), strict=True):
        assert torch.equal(found, given_.to(found.dtype))
    x = LinearShape("q_proj", rows, columns, "BF16", bias, grid=grid)
    tensors = {f"q_proj.{kind}": tensor for kind, tensor in stored.items()}
    tensors |= {"q_proj.bias": torch.zeros(rows, dtype=torch.bfloat16)} if bias else {}
    assert {t.name: (t.shape, TORCH[t.dtype]) for t in x.stored()} == {
        name: (tuple(t.shape), t.dtype) for name, t in tensors.items()
    }
    assert set(stored) == set(grid.kinds)

    width = columns if group == -1 else group
    expected = scales.numpy().repeat(width, 1) * (codes.numpy() - zeros.numpy().repeat(width, 1))
    np.testing.assert_allclose(grid.read(stored, rows, columns).numpy(), expected, rtol=1e-6)

    listed, _ = place(block_records(BlockShape((x,), ())))
    entry = next(json.loads(json.dumps(e)) for e in listed if e["kind"] == "linear")
    parts = encode_linear(entry, stored)
    assert {n: p.size for n, p in parts.items()} == {n: length for n, (_, length) in entry["parts"].items()}
    assert np.array_equal(unpack_bits(parts["values"], bits, rows * columns).reshape(rows, columns), codes.numpy())
    assert 8 * (parts["scales"].size + parts["zeros"].size) == grid.side_bits(rows, columns)
    back = decode_linear(entry, parts)
    for name, tensor in stored.items():
        assert (back[name].dtype, back[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(back[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_the_file_has_the_bytes_that_the_shape_says(tmp_path: Path) -> None:
    grid = RealGrid(4, 32)
    x = LinearShape("mlp.down_proj", 64, 96, "BF16", grid=grid)
    stored = pack_real(*drawn(0, grid, 64, 96), 4)
    save_file({f"{x.name}.{k}": t for k, t in stored.items()}, tmp_path / "x.safetensors", metadata={"format": "pt"})
    assert safetensors_bytes(list(x.stored())) == (tmp_path / "x.safetensors").stat().st_size


def test_a_pattern_has_no_place_in_it() -> None:
    grid = RealGrid(4, 32)
    x = LinearShape("q_proj", 32, 32, "BF16", pattern=Pattern(2, 4), grid=grid)
    (entry,), _ = place(block_records(BlockShape((x,), ())))
    with pytest.raises(CheckpointError, match=r"q_proj is said to hold 2:4, but with real zero points no weight"):
        encode_linear(entry, pack_real(*drawn(1, grid, 32, 32), 4))


def test_it_is_put_where_gptqs_codes_are() -> None:
    tiny, smollm = (shape_from_config(PRESETS[name]) for name in ("stories260k", "smollm2-135m"))
    real, whole = with_form(tiny, RealGrid(4, 128), 8), with_form(tiny, Grid(4, 128), 8)
    assert [x.grid is None for x in real.blocks[0].linears] == [x.grid is None for x in whole.blocks[0].linears]
    assert any(x.grid is None for x in real.blocks[0].linears) and real.embedding_bits == 8
    assert with_form(smollm, RealGrid(2, 128), 0).grid == RealGrid(2, 64)
    assert with_form(smollm, RealGrid(2, -1), 0).grid == RealGrid(2, -1)


def test_it_says_what_it_is() -> None:
    grid = RealGrid(2, 64)
    assert grid.describe() == "2 bits with real zero points"
    assert grid.about() == {"bits": 2, "group": 64, "zero_dtype": "F16"}
    assert (grid.loaders, grid.unknown, grid.integer) == ((), "real zero points", False)


# --- on a chip -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["stories260k", "smollm2-135m"])
@pytest.mark.parametrize("bits", [4, 2])
def test_every_way_of_counting_comes_to_the_same(preset: str, bits: int) -> None:
    shape = with_form(shape_from_config(PRESETS[preset]), RealGrid(bits, 64), 0)
    sizes, found = packed_sizes(shape), weight_bytes(shape, PACKED)
    assert found.scales_and_zeros == sizes.scales + sizes.zero_points
    assert found.block_codes == sizes.codes
    coded = [x for block in shape.blocks for x in block.linears if x.grid]
    assert found.scales_and_zeros == sum(4 * x.weights // 64 for x in coded)
    assert found.block_codes == sum(x.weights * bits // 8 for x in coded)
    for x in (x for x in shape.blocks[0].linears if x.grid):
        row = next(t for t in tensor_table(shape) if t.name.endswith(f"layers.0.{x.name}"))
        assert linear_weights("", x).nbytes == row.codes + row.scales
        assert row.file_bytes == sum(t.nbytes for t in x.stored())


@pytest.mark.parametrize("chip", shipped_socs())
def test_the_cores_compute_what_has_no_whole_offset(chip: str) -> None:
    soc = load_soc(chip)
    shape = with_form(shape_from_config(PRESETS["smollm2-135m"]), RealGrid(4, 64), 8)
    layers = [x for x in forward(shape, context=16) if x.weights is not None and "proj" in x.name]
    assert {engine_of(x, soc) for x in layers} == {CORES}
    assert weight_bytes(shape, soc.layout).block_codes == weight_bytes(shape).block_codes  # in no slots
    verdict = check(shape, soc, context=64, timing=True)
    said = [note for note in verdict.notes if note.startswith("Real zero points: ")]
    assert len(said) == 1 and "--quant gptq4" in said[0]
    assert (f"so {soc.accelerator.name} cannot use them" in said[0]) if soc.accelerator else "cannot" not in said[0]
    assert not any("codebook" in note for note in verdict.notes)

"""Packed embeddings: how far a weight can move, and what lies where in the bytes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from edgepress.stages import edge

pytestmark = pytest.mark.unit


def matrix(seed: int, rows: int = 9, columns: int = 32) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@given(
    seed=st.integers(0, 10**6),
    bits=st.sampled_from([4, 8]),
    size=st.sampled_from([1e-6, 1e-3, 0.05, 1.0, 100.0]),
    shift=st.sampled_from([-4.0, 0.0, 4.0]),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_no_weight_moves_further_than_half_a_step(seed: int, bits: int, size: float, shift: float) -> None:
    weight = (matrix(seed) + shift) * size
    codes, scales, minimum = edge.quantise_rows(weight, bits)
    top = 2**bits - 1
    assert codes.dtype == torch.uint8
    assert int(codes.max()) <= top
    for stored in (scales, minimum):
        assert torch.equal(stored, stored.half().float())
    moved = ((codes * scales + minimum) - weight).abs()
    # Half a step; at the two ends also what float16 loses of the minimum and, over all steps, of the scale.
    span = weight.amax(1, keepdim=True) - minimum
    low, high = (minimum - weight.amin(1, keepdim=True)).clamp(min=0), (span - top * scales).clamp(min=0)
    limit = torch.maximum(scales / 2, torch.maximum(low, high))
    assert bool((moved <= limit * 1.001 + 1e-6 * weight.abs().max()).all())
    assert bool((scales <= torch.maximum(span / top * (1 + 2**-10), torch.tensor(6.3e-5))).all())


def test_rows_that_are_constant_or_zero() -> None:
    weight = torch.tensor([[0.0] * 4, [0.5] * 4, [-2.0] * 4])
    for bits in (4, 8):
        codes, scales, minimum = edge.quantise_rows(weight, bits)
        assert torch.equal(codes * scales + minimum, weight)


@pytest.mark.parametrize("bits", [4, 8])
def test_eight_bits_are_finer_than_four(bits: int) -> None:
    weight = matrix(1, 64, 64)
    codes, scales, minimum = edge.quantise_rows(weight, bits)
    found = float(((codes * scales + minimum) - weight).std())
    step = float((weight.amax(1) - weight.amin(1)).mean()) / (2**bits - 1)
    assert found == pytest.approx(step / 12**0.5, rel=0.1)  # a uniform error over one step


def test_four_bit_codes_lie_two_a_byte_the_lower_column_in_the_lower_half() -> None:
    codes = torch.tensor([[1, 2, 15, 0], [0, 15, 9, 8]], dtype=torch.uint8)
    packed = edge.pack_bytes(codes, 4)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [[0x21, 0x0F], [0xF0, 0x89]]
    assert torch.equal(edge.pack_bytes(codes, 8), codes)


@given(seed=st.integers(0, 10**6), rows=st.integers(1, 5), pairs=st.integers(1, 9))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_unpacking_gives_the_codes_back(seed: int, rows: int, pairs: int) -> None:
    codes = torch.randint(0, 16, (rows, 2 * pairs), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = edge.pack_bytes(codes, 4)
    assert packed.shape == (rows, pairs)
    unpacked = torch.empty_like(codes)
    for row in range(rows):
        for column in range(2 * pairs):
            unpacked[row, column] = (int(packed[row, column // 2]) >> (4 * (column % 2))) & 15
    assert torch.equal(unpacked, codes)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_models_tensors_become_what_the_codes_stand_for(bits: int, dtype: torch.dtype) -> None:
    outer = {"embed.weight": matrix(2).to(dtype), "norm.weight": torch.rand(32).to(dtype)}
    rounded, packed = edge.quantise_outer(outer, bits)
    assert rounded.keys() == outer.keys()
    assert torch.equal(rounded["norm.weight"], outer["norm.weight"])
    assert packed.keys() == {"embed.codes", "embed.scales", "embed.minimum"}
    assert packed["embed.codes"].shape == (9, 32 * bits // 8)
    codes = packed["embed.codes"]
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1)
    expected = codes * packed["embed.scales"].float() + packed["embed.minimum"].float()
    assert rounded["embed.weight"].dtype == dtype
    assert torch.equal(rounded["embed.weight"], expected.to(dtype))
    again, _ = edge.quantise_outer(rounded, bits)
    torch.testing.assert_close(again["embed.weight"], rounded["embed.weight"], atol=1e-2, rtol=1e-2)

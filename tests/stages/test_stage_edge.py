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


@pytest.fixture(scope="module")
def multiplied() -> tuple[Tensor, Tensor]:
    """A tied embedding (tokens, d) and the Hessian of correlated head inputs, both with unequal columns."""
    generator = torch.Generator().manual_seed(0)
    columns = (0.7 * torch.randn(48, generator=generator)).exp()
    mix = torch.eye(48) + torch.randn(48, 48, generator=generator) / 48**0.5
    inputs = torch.randn(1024, 48, generator=generator) @ mix * (0.8 * torch.randn(48, generator=generator)).exp()
    return torch.randn(700, 48, generator=generator) * columns, inputs.T @ inputs


def output_errors(weight: Tensor, rounded: Tensor, hessian: Tensor) -> Tensor:
    """The squared error of each token's logits, (rows,)."""
    delta = (rounded - weight).double()
    return ((delta @ hessian.double()) * delta).sum(dim=1)


def test_the_heads_inputs_decide_codes_and_grid(multiplied: tuple[Tensor, Tensor]) -> None:
    weight, hessian = multiplied
    outer = {"model.embed_tokens.weight": weight, "model.norm.weight": torch.ones(48)}
    nearest, solved = (edge.quantise_outer(outer, 4, h)[0]["model.embed_tokens.weight"] for h in (None, hessian))
    before, after = (output_errors(weight, x, hessian).sum() for x in (nearest, solved))
    assert after < 0.5 * before
    scales, minimum = edge.fit_rows(weight, 4, hessian.diagonal())
    fitted = torch.round((weight - minimum) / scales).clamp(0, 15) * scales + minimum
    assert after < 0.8 * output_errors(weight, fitted, hessian).sum(), "codes are compensated, not only the grid found"


def test_a_rows_grid_is_no_worse_than_its_range_and_near_the_best_of_all(multiplied: tuple[Tensor, Tensor]) -> None:
    weight, importance = multiplied[0][:40], multiplied[1].diagonal()

    def errors(scales: Tensor, minimum: Tensor) -> Tensor:
        rounded = torch.round((weight - minimum) / scales).clamp(0, 15) * scales + minimum
        return (rounded - weight).square() @ importance

    found = edge.fit_rows(weight, 4, importance)
    assert all(torch.equal(x, x.half().float()) for x in found)
    _, *plain = edge.quantise_rows(weight, 4)
    assert bool((errors(*found) <= errors(*plain) * (1 + 1e-6)).all())
    low, high = weight.amin(dim=1, keepdim=True), weight.amax(dim=1, keepdim=True)
    ends = torch.linspace(0.3, 1.0, 36)
    best = torch.stack([errors((high * b - low * a) / 15, low * a) for a in ends for b in ends]).amin(dim=0)
    assert float(errors(*found).sum()) < 1.15 * float(best.sum())


def test_a_head_beside_the_embedding_is_what_the_hessian_is_for(multiplied: tuple[Tensor, Tensor]) -> None:
    weight, hessian = multiplied
    outer = {"model.embed_tokens.weight": weight.flip(0), "lm_head.weight": weight}
    rounded, packed = edge.quantise_outer(outer, 4, hessian)
    plain, plainly = edge.quantise_outer(outer, 4)
    assert torch.equal(rounded["model.embed_tokens.weight"], plain["model.embed_tokens.weight"])
    assert not torch.equal(packed["lm_head.codes"], plainly["lm_head.codes"])
    after, before = (output_errors(weight, x["lm_head.weight"], hessian).sum() for x in (rounded, plain))
    assert after < 0.5 * before


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

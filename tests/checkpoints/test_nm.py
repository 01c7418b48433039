"""N:M counts against plain loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from edgepress.checkpoints.errors import NumericsError, PlanError
from edgepress.checkpoints.masks import MaskProof, group_zeros, holds, require_finite
from edgepress.checkpoints.shape import Pattern, Sparsity, Unstructured, Within

pytestmark = pytest.mark.unit


def sparse(rows: int, columns: int, density: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    return weight * (torch.rand(rows, columns, generator=generator) < density)


def count(weight: Tensor, removed: int, of: int) -> tuple[int, int]:
    """Zeros asked for and there, never more in a group than asked."""
    expected = kept = 0
    for row in weight.tolist():
        for start in range(0, len(row), of):
            expected += removed
            kept += min(removed, row[start : start + of].count(0.0))
    return expected, kept


@given(
    st.integers(1, 6), st.integers(1, 5), st.sampled_from(["1:8", "2:4", "1:2", "3:4"]), st.floats(0, 1), st.integers(0)
)
@settings(max_examples=80, deadline=None)
def test_proof_counts_what_a_loop_counts(rows: int, groups: int, text: str, density: float, seed: int) -> None:
    pattern = Pattern.parse(text)
    seed %= 2**32
    weights = [sparse(rows, groups * pattern.of, density, seed), sparse(2, 2 * pattern.of, density, seed + 1)]
    mask = torch.rand(weights[0].shape, generator=torch.Generator().manual_seed(seed + 2)) < 0.5
    proof = MaskProof(pattern)
    proof.add(weights[0], mask)
    proof.add(weights[1])
    counted = [count(weight, pattern.removed, pattern.of) for weight in weights]
    refilled = sum(
        1
        for row, allowed in zip(weights[0].tolist(), mask.tolist(), strict=True)
        for w, a in zip(row, allowed, strict=True)
        if w != 0 and not a
    )
    assert (proof.expected, proof.kept) == tuple(map(sum, zip(*counted, strict=True)))
    assert proof.refilled == refilled
    assert proof.holds == (proof.expected == proof.kept and refilled == 0)
    assert holds(weights[0], pattern) == (counted[0][0] == counted[0][1])
    assert proof.facts() == {
        "pattern": text,
        "expected_zeros": proof.expected,
        "kept_zeros": proof.kept,
        "refilled_zeros": refilled,
        "holds": proof.holds,
    }


@pytest.mark.parametrize(("pattern", "of"), [(Unstructured(0.25), 12), (Pattern(1, 4), 4)])
def test_fraction_counts_over_the_whole_row(pattern: Sparsity, of: int) -> None:
    weight = torch.ones(2, 12)
    weight[:, :3] = 0  # three of twelve, all in one place
    proof = MaskProof(pattern)
    proof.add(weight)
    assert (proof.expected, proof.kept) == count(weight, 3 if of == 12 else 1, of)
    assert proof.holds == holds(weight, pattern) == (of == 12)


def test_a_fraction_within_layers_counts_over_the_whole_layer() -> None:
    weight = torch.ones(4, 6)
    weight[:2] = 0  # two whole rows: half of the layer, nothing of the other rows
    pattern = Within(Unstructured(0.5), "gate_proj")
    proof = MaskProof(pattern)
    proof.add(weight, weight != 0)
    assert (proof.expected, proof.kept, proof.holds) == (12, 12, True)
    assert holds(weight, pattern)
    assert not holds(weight, Unstructured(0.5))
    weight[0, 0] = 1
    assert not holds(weight, pattern)
    assert not holds(weight, Within(Pattern(1, 2), "gate_proj"))


def test_one_refilled_weight_is_seen() -> None:
    """The pattern alone still holds where a zero moved within its group; the mask tells."""
    weight = torch.tensor([[0.0, 1.0, 1.0, 1.0]])
    mask = weight != 0
    proof = MaskProof(Pattern(1, 4))
    proof.add(torch.tensor([[1.0, 0.0, 1.0, 1.0]]), mask)
    assert (proof.kept, proof.refilled, proof.holds) == (1, 1, False)


def test_groups_lie_within_rows() -> None:
    weight = torch.tensor([[0.0, 1.0, 0.0, 0.0], [1.0, 1.0, 0.0, 1.0]])
    assert group_zeros(weight, 2).tolist() == [[1, 2], [0, 1]]
    assert group_zeros(weight, 4).tolist() == [[3], [1]]
    with pytest.raises(PlanError, match="width of 4 is not divisible by 3"):
        group_zeros(weight, 3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_named(bad: float) -> None:
    tensor = torch.zeros(3, 3)
    require_finite("fine", tensor)
    require_finite("codes", torch.ones(3, dtype=torch.int32))
    tensor[0, 1] = tensor[2, 2] = bad
    with pytest.raises(NumericsError, match=r"block 3 q_proj holds 2 values that are NaN or infinite"):
        require_finite("block 3 q_proj", tensor)

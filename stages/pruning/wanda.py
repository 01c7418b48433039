"""Lowest abs(weight) x norm of its input first (WANDA, Sun et al., arXiv 2306.11695)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from edgepress.checkpoints.shape import Amount, Pattern, Sparsity
from edgepress.stages.pruning import NORMS
from edgepress.stages.pruning.select import keep_best, kept, lost_share, set_zeros

if TYPE_CHECKING:
    from torch import Tensor

    from edgepress.checkpoints.walk import BlockVisit

NEEDS = NORMS


def sparsity(amount: Amount) -> Sparsity:
    return amount


def prune(block: BlockVisit, groups: Mapping[str, Pattern]) -> dict[str, Any]:
    norms = input_norms(block)
    lost = {}
    for name, nm in groups.items():
        weight = block.linears[name].weight
        scores = score(weight, norms[name])
        mask = kept(scores, nm, weight)
        lost[name] = lost_share(scores, mask)
        set_zeros(weight, mask)
    return {"lost_score_share": lost}


def input_norms(block: BlockVisit) -> dict[str, Tensor]:
    """L2 norm of each input feature over all calibration tokens, float32, by layer: (in,)."""
    squares: dict[tuple[str, ...], Tensor] = {}

    def add(names: tuple[str, ...], x: Tensor) -> None:
        total = x.float().square().sum(dim=0)
        squares[names] = squares[names] + total if names in squares else total

    block.observe(add)
    return {name: total.sqrt() for names, total in squares.items() for name in names}


def score(weight: Tensor, input_norm: Tensor) -> Tensor:
    """abs(W_ij) * norm2(X_j), equation 1: (out, in) float32. weight (out, in), input_norm (in,)."""
    return (weight.float() * input_norm).abs_()


def prune_n_of_m(weight: Tensor, input_norm: Tensor, n: int, m: int) -> Tensor:
    """The mask (out, in) that keeps the M - N best of every M consecutive weights of a row: True where a weight stays.

    weight (out, in); input_norm (in,) is the L2 norm of each input feature over the calibration tokens.
    Of equal scores the lower column goes.
    """
    return keep_best(score(weight, input_norm), n, m)

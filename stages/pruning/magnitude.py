"""Smallest abs(weight) first (Han et al., arXiv 1510.00149): no calibration, and the yardstick of the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from edgepress.checkpoints.shape import Amount, Pattern, Sparsity
from edgepress.stages.pruning import NOTHING
from edgepress.stages.pruning.select import kept, lost_share, set_zeros

if TYPE_CHECKING:
    from edgepress.checkpoints.walk import BlockVisit

NEEDS = NOTHING


def sparsity(amount: Amount) -> Sparsity:
    return amount


def prune(block: BlockVisit, groups: Mapping[str, Pattern]) -> dict[str, Any]:
    lost = {}
    for name, nm in groups.items():
        weight = block.linears[name].weight
        score = weight.float().abs()
        mask = kept(score, nm, weight)
        lost[name] = lost_share(score, mask)
        set_zeros(weight, mask)
    return {"lost_score_share": lost}

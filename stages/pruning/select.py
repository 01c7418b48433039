"""Choose the N lowest of every M scores, however many groups there are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.lazy import torch
from edgepress.checkpoints.shape import Capped, Pattern

if TYPE_CHECKING:
    from torch import Tensor

_FEW = 32  # groups up to this size are selected by comparing lanes, wider ones by sorting


def kept(score: Tensor, nm: Pattern, weight: Tensor) -> Tensor:
    """The mask of the scores (out, in) worth keeping: N of every M go; of a Capped pattern, within its cap.

    Then weights (out, in) that are zero already go first, so that they count in the cap of their group.
    """
    if not isinstance(nm, Capped):
        return keep_best(score, nm.removed, nm.of)
    score = score.masked_fill(weight == 0, -1)
    may_go = ~keep_best(score, nm.within.removed, nm.within.of)
    return keep_best(score.masked_fill(~may_go, float("inf")), nm.removed, nm.of)


def keep_best(score: Tensor, n: int, m: int) -> Tensor:
    """The mask that keeps the M - N highest of every M consecutive scores of a row: True where a weight stays.

    score (out, in); M may also be out * in, the whole layer as one group. Of equal scores the lower place goes.
    """
    rows, columns = score.shape
    if columns % m and m != rows * columns:
        raise PlanError(f"{n}:{m} needs an input width divisible by {m}; this layer has {columns}")
    if n == 0:
        return torch.ones_like(score, dtype=torch.bool)
    score = score.reshape(-1, m)  # (groups, m)
    if m > _FEW:
        dropped = score.argsort(dim=-1, stable=True)[:, :n]  # (groups, n)
        return torch.ones_like(score, dtype=torch.bool).scatter_(-1, dropped, False).view(rows, columns)
    # m lanes of (groups,): whole lanes, stacked and unstacked, take a fraction of the time of short rows
    lanes = torch.stack(score.unbind(dim=1))
    threshold = nth_smallest(lanes, n)
    kept = [lane > threshold for lane in lanes]
    keep = torch.stack(kept, dim=1)
    # Where several weights have the threshold's score, too many went: give back all but the first columns.
    count = torch.zeros_like(threshold, dtype=torch.uint8)
    for lane in kept:
        count += lane
    if bool((count != m - n).any()):
        uneven = (count != m - n).nonzero().squeeze(-1)
        dropped = score[uneven].argsort(dim=-1, stable=True)[:, :n]
        keep[uneven] = torch.ones_like(keep[uneven]).scatter_(-1, dropped, False)
    return keep.view(rows, columns)


def nth_smallest(score: Tensor, n: int) -> Tensor:
    """The n-th smallest of each column of score (m, groups): (groups,).

    A few rounds of elementwise minimum and maximum over whole lanes instead of a sort of each short column
    (benchmarks/wanda.py). Counted from the nearer end.
    """
    lanes = list(score)  # m tensors of (groups,)
    if n <= len(lanes) // 2:
        rounds, first, second = n, torch.maximum, torch.minimum
    else:
        rounds, first, second = len(lanes) - n + 1, torch.minimum, torch.maximum
    for done in range(rounds):  # each round carries the least (or greatest) of what is left to the end
        for i in range(len(lanes) - 1 - done):
            carried = second(lanes[i], lanes[i + 1])
            if done + 1 < rounds:  # the last round's rest is of no use
                lanes[i] = first(lanes[i], lanes[i + 1])
            lanes[i + 1] = carried
    chosen: Tensor = lanes[len(lanes) - rounds]
    return chosen


def set_zeros(weight: Tensor, mask: Tensor) -> None:
    """Zero `weight` (out, in) in place where the mask is False; a product could leave -0.0, a sign nothing keeps."""
    weight.masked_fill_(~mask, 0)


def lost_share(score: Tensor, mask: Tensor) -> float:
    """Share of a layer's total score (out, in) that pruning removes; 0 for nothing of value lost."""
    return float((score * ~mask).sum() / score.sum().clamp_min(1e-30))

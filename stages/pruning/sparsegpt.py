"""Zeros chosen column by column, and the weights that stay moved to make up for them.

SparseGPT (Frantar and Alistarh, arXiv 2301.00774, algorithm 1): the error of a zero is spread over the later columns
of its row by the inverse Hessian, and the next zeros are chosen from the weights as they then are. A fraction is
met in every row, part by part, where the paper lets rows of a part differ, as `WholeLayer` does: so a packed row
has a known length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgepress.checkpoints.errors import NumericsError
from edgepress.checkpoints.lazy import torch
from edgepress.checkpoints.shape import EVERY, Amount, Capped, Pattern, Sparsity, Unstructured, Within
from edgepress.stages.hessian import hessians, inverse_factor, live_diagonal, output_error
from edgepress.stages.pruning import HESSIANS
from edgepress.stages.pruning.select import keep_best, kept

if TYPE_CHECKING:
    from torch import Tensor

    from edgepress.checkpoints.walk import BlockVisit

NEEDS = HESSIANS
COLUMNS = 128  # solved before their errors reach the rest; of a wider group, those whose zeros are chosen at once
DAMPING = 0.01  # share of the mean diagonal added to the Hessian, the paper's


def sparsity(amount: Amount) -> Sparsity:
    return amount


def prune(block: BlockVisit, groups: Mapping[str, Pattern]) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for names, hessian in hessians(block).items():
        for name in (n for n in names if n in groups):
            weight = block.linears[name].weight
            try:
                solved = solve(weight.float(), hessian, groups[name])
            except NumericsError as error:
                raise NumericsError(f"block {block.index}, {name}: {error}") from None
            weight.copy_(solved.weight)
            facts[name] = {"error": solved.error, "damping": solved.damping, "float64": solved.float64}
    return facts


class WholeLayer:
    """`--prune sparsegpt-layer`: of each block of columns the lowest costs go, whatever rows they are in.

    The paper's own count of a fraction. Rows that matter less lose more, so the layer's error is smaller, and a packed
    row has no known length. N:M is the same for both.
    """

    NEEDS = HESSIANS
    prune = staticmethod(prune)

    @staticmethod
    def sparsity(amount: Amount) -> Sparsity:
        return Within(amount, EVERY) if isinstance(amount, Unstructured) else amount


@dataclass
class Solution:
    weight: Tensor  # (out, in) float32, zeros in place
    error: float  # tr(dW H dW^T) / tr(W H W^T): relative squared error of the layer's output
    damping: float  # share of the mean diagonal that the factorisation needed
    float64: bool


def solve(weight: Tensor, hessian: Tensor, nm: Pattern) -> Solution:
    """The pruned and compensated layer. weight (out, in) float32; hessian (in, in) = X^T X.

    U is the upper Cholesky factor of the inverse Hessian. Zeroing w_j costs w_j^2 / U_jj^2 (equation 4 with the
    columns before j frozen) and moves the later columns by -w_j / U_jj U_j,: (equation 3). Zeros of an earlier mask
    stay and go first; then features that calibration never used, whose other weights stay as they are. A pattern wider
    than a row counts over the whole layer, in each span's columns over all rows.
    """
    W, columns = weight.clone(), weight.shape[1]
    H, unused = live_diagonal(hessian)
    U, damping, float64 = inverse_factor(H, DAMPING)
    d = U.diagonal()
    live = W != 0
    keep = torch.ones_like(live)
    for spans in whole_layer(columns, nm.removed) if nm.of > columns else blocks(columns, nm):
        start, end = spans[0].start, spans[-1].end
        E = torch.zeros_like(W[:, start:end])
        for span in spans:
            here = slice(span.start, span.end)
            score = (W[:, here] / d[here]).square_()
            score.masked_fill_(unused[here], 0).masked_fill_(~live[:, here], -1)
            if nm.of > columns:
                keep[:, here] = keep_best(score, span.removed, score.numel()) & live[:, here]
            else:
                keep[:, here] = kept(score, span.within(nm), live[:, here]) & live[:, here]
            for j in range(span.start, span.end):
                e = W[:, j].masked_fill(keep[:, j], 0) / d[j]
                W[:, j + 1 : end] -= torch.outer(e, U[j, j + 1 : end])
                E[:, j - start] = e
        W[:, end:] -= E @ U[start:end, end:]
    W.masked_fill_(~keep, 0)
    return Solution(W, output_error(weight, W, hessian), damping, float64)


@dataclass(frozen=True)
class Span:
    """Columns whose zeros are chosen at once: `removed` of them in every row, or of all rows together."""

    start: int
    end: int
    removed: int

    def within(self, nm: Pattern) -> Pattern:
        """The span as a group of its own, with the cap that the whole pattern has."""
        width = self.end - self.start
        return Capped(self.removed, width, nm.within) if isinstance(nm, Capped) else Pattern(self.removed, width)


def whole_layer(columns: int, removed: int) -> list[list[Span]]:
    """Blocks of COLUMNS columns that share the layer's zeros by their width."""
    ends = [(at, min(at + COLUMNS, columns)) for at in range(0, columns, COLUMNS)]
    return [[Span(at, to, removed * to // columns - removed * at // columns)] for at, to in ends]


def blocks(columns: int, nm: Pattern) -> list[list[Span]]:
    """The row in blocks of at most COLUMNS columns: several groups each, or a part of a wider group.

    The parts of a wider group share its zeros by their width, to the last one. No part cuts a group of a cap.
    """
    n, m = nm.removed, nm.of
    whole = nm.within.of if isinstance(nm, Capped) else 1
    width = max(whole, COLUMNS // whole * whole)
    spans = []
    for group in range(0, columns, m):
        for at in range(0, m, width):
            to = min(at + width, m)
            spans.append(Span(group + at, group + to, n * to // m - n * at // m))
    together = max(1, COLUMNS // m)
    return [spans[i : i + together] for i in range(0, len(spans), together)]

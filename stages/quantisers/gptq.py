"""Columns quantised one after the other, each one's error compensated by those after it.

GPTQ (Frantar et al., arXiv 2210.17323), with a fixed mask as in SparseGPT (arXiv 2301.00774): a masked
position gets the zero point's code, exactly zero, and its error flows on like any other. The solver is our
own because no public one keeps a mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from edgepress.checkpoints.errors import NumericsError
from edgepress.checkpoints.forms import Grid
from edgepress.checkpoints.lazy import torch
from edgepress.stages.hessian import hessians, inverse_factor, live_diagonal, output_error
from edgepress.stages.options import Gptq as Options
from edgepress.stages.quantisers import HESSIANS
from edgepress.stages.quantisers.codes import Coded, fit_grid

if TYPE_CHECKING:
    from torch import Tensor

    from edgepress.checkpoints.walk import BlockVisit
    from edgepress.stages.refine import TunedLinear

NEEDS = HESSIANS
TUNES = True
COLUMNS = 64  # columns solved before their errors are applied to the rest: GPTQ's lazy batch


def form(options: Options, masked: bool, bits: int, group: int | None = None) -> Grid:
    """A group of -1 is one scale for each output channel (N-EUREKA's)."""
    return Grid(bits, options.group if group is None else group, options.symmetric)


def quantise(
    block: BlockVisit, masks: Mapping[str, Tensor | None], forms: Mapping[str, Grid], options: Options
) -> dict[str, Solution]:
    solved: dict[str, Solution] = {}
    for names, hessian in hessians(block).items():
        for name in (n for n in names if n in masks):
            try:
                solved[name] = solve(block.linears[name].weight.float(), hessian, masks[name], forms[name], options)
            except NumericsError as error:
                raise NumericsError(f"{block.name}.{name}: {error}") from None
    return solved


@dataclass
class Solution(Coded):
    position: Tensor | None  # (out, in) float32: the compensated weight in codes, at most half a one away; high effort
    error: float  # tr(dW H dW^T) / tr(W H W^T): relative squared error of the layer's output; as H weighs the tokens
    damping: float  # share of the mean diagonal that the factorisation needed
    float64: bool

    def facts(self) -> dict[str, Any]:
        return {"error": self.error, "damping": self.damping, "float64": self.float64}

    def tuned(self, mask: Tensor | None) -> TunedLinear:
        from edgepress.stages.refine import TunedLinear

        assert self.position is not None
        return TunedLinear.start(self.position, self.scales, self.zeros, mask, self.grid)

    def settled(self, tuned: TunedLinear) -> Solution:
        return replace(self, codes=tuned.codes().to(torch.uint8), scales=tuned.rounded_scales(), position=None)


def solve(weight: Tensor, hessian: Tensor, mask: Tensor | None, grid: Grid, options: Options) -> Solution:
    """Codes that keep the layer's output W X close, column by column.

    weight (out, in) float32; hessian (in, in) = X^T X; mask (out, in) is True where a weight may live.
    GPTQ algorithm 1 with static groups: scales are fixed from the uncompensated weights in storage order, so
    columns can be taken by falling diagonal ("activation order") while groups stay contiguous in the file.
    """
    columns = weight.shape[1]
    group = columns if grid.group == -1 else grid.group
    # A feature that calibration never used is rounded on its own, and counts in its group like an average one.
    H, _ = live_diagonal(hessian)
    importance = H.diagonal().clone()
    scales, zeros = fit_grid(weight, importance, grid, options.scale_search)

    order = importance.argsort(descending=True, stable=True) if options.activation_order else torch.arange(columns)
    inverse = order.argsort()
    U, damping, float64 = inverse_factor(H[order][:, order], options.damping, options.shrinkage)
    keep = mask[:, order] if mask is not None else None
    group_of = (torch.arange(columns, device=weight.device) // group)[order]
    S, Z = scales[:, group_of], zeros[:, group_of].float()  # (out, in) in solving order
    Q, P = in_turn(weight[:, order], U, S, Z, 2**grid.bits - 1, keep)
    codes, position = Q[:, inverse].to(torch.uint8), P[:, inverse] if options.effort == "high" else None
    solution = Solution(codes, scales, zeros, grid, position, 0.0, damping, float64)
    solution.error = output_error(weight, solution.weight, hessian)
    return solution


def in_turn(W: Tensor, U: Tensor, S: Tensor, Z: Tensor, top: int, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes of W (out, in), one column after the other, each one's error compensated by those after it.

    U (in, in) is the upper Cholesky factor of the inverse Hessian. A weight is S (q - Z) with codes q of 0 to `top`,
    and 0 where `keep` is False; S, Z and keep are (out, in). Returns the codes as whole numbers in float32, Z where not
    kept; and where between the codes each compensated weight lay, at most half a code away.
    """
    # All on its side, so that a column lies in one piece: three times as fast on a processor.
    W, S, Z = (x.T.clone(memory_format=torch.contiguous_format) for x in (W, S, Z))
    kept = None if keep is None else keep.T.contiguous()
    columns, pivots = len(W), U.diagonal().tolist()
    Q, P = torch.empty_like(W), torch.empty_like(W)
    for start in range(0, columns, COLUMNS):
        end = min(start + COLUMNS, columns)
        E = torch.empty_like(W[start:end])
        for c in range(start, end):
            p = W[c] / S[c] + Z[c]
            q = p.round().clamp_(0, top)
            if kept is not None:
                q = torch.where(kept[c], q, Z[c])
            Q[c], P[c] = q, p.clamp(q - 0.5, q + 0.5)
            e = (W[c] - S[c] * (q - Z[c])) / pivots[c]
            W[c + 1 : end].addr_(U[c, c + 1 : end], e, alpha=-1)
            E[c - start] = e
        W[end:] -= U[start:end, end:].T @ E
    return Q.T.contiguous(), P.T.contiguous()

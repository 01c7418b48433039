"""Round to nearest where the inputs that matter have been given a finer grid.

AWQ (Lin et al., arXiv 2306.00978): the columns of inputs with large activations are multiplied with
s = mean(abs(X))^alpha before rounding, and what precedes the layer is divided by it (equation 4), which costs
nothing at inference. alpha is searched for the least error of the outputs over the calibration tokens; then each
group's range, as in GPTQ's scale search. A zero times s is a zero, so a mask stays. Where nothing precedes that could
be divided, s is 1. The factors are kept beside the shards for whoever compares with the dense weights, as eora does.

Departures: the error is that of the layers themselves, tr(dW H dW^T), not that of the attention they feed; queries'
and keys' ranges are searched too; and where heads share keys and values, inputs made by one row share their s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edgepress.checkpoints.forms import Grid
from edgepress.checkpoints.walk import BlockVisit
from edgepress.stages.hessian import output_error
from edgepress.stages.options import Gptq as Options
from edgepress.stages.quantisers import HESSIANS
from edgepress.stages.quantisers.codes import Coded, fit_grid, nearest
from edgepress.stages.quantisers.folding import Folding

NEEDS = HESSIANS
TUNES = False
POINTS = 20  # values of alpha that are tried, from 0 up


def form(options: Options, masked: bool, bits: int) -> Grid:
    return Grid(bits, options.group, options.symmetric)


@dataclass
class Scaled(Coded):
    error: float  # tr(dW H dW^T) / tr(W H W^T): relative squared error of the layer's output
    alpha: float
    folded: str | None  # the norm or layer that was divided
    factors: dict[str, Tensor]  # rows (out,) and columns (in,) that the dense weight was multiplied with

    def scaling(self) -> dict[str, Tensor]:
        return {side: factor.cpu() for side, factor in self.factors.items()}

    def facts(self) -> dict[str, Any]:
        return {"error": self.error, "alpha": self.alpha, "folded_into": self.folded}


@dataclass
class Inputs:
    """What calibration showed of an input that layers share."""

    hessian: Tensor  # (in, in): X^T X
    size: Tensor  # (in,): sum of abs(X)


def quantise(block: BlockVisit, masks: Mapping[str, Tensor | None], form: Grid, options: Options) -> dict[str, Scaled]:
    folding = Folding(block)
    chosen: dict[str, tuple[Tensor, float, str | None]] = {}
    for names, inputs in observed(block).items():
        hessian, alpha, before = inputs.hessian, 0.0, folding.before(names)
        coded = [name for name in names if name in masks]
        if before is not None and coded:
            weights = [folding.weights[name] for name in coded]
            alpha, s = search(weights, hessian, folding.shared(names, inputs.size), form)
            found = folding.fold(names, before, s) if alpha else None
            if found is None:
                alpha, before = 0.0, None
            else:
                hessian = hessian / (found.unsqueeze(1) * found)
        chosen |= dict.fromkeys(coded, (hessian, alpha, before))
    # Only now: a later fold may have scaled the rows of a layer whose columns were scaled before.
    for name in block.linears.keys() - masks.keys():
        block.linears[name].weight.copy_(folding.weights[name])
    return {
        name: solve(folding.weights[name], *found, folding.scaling[name], form, options)
        for name, found in chosen.items()
    }


def observed(block: BlockVisit) -> dict[tuple[str, ...], Inputs]:
    """Statistics of each distinct input over all calibration tokens."""
    found: dict[tuple[str, ...], Inputs] = {}

    def add(names: tuple[str, ...], x: Tensor) -> None:
        x = x.float()
        if names not in found:
            found[names] = Inputs(x.new_zeros(x.shape[1], x.shape[1]), x.new_zeros(x.shape[1]))
        found[names].hessian.addmm_(x.T, x)
        found[names].size += x.abs().sum(dim=0)

    block.observe(add)
    return found


def search(weights: list[Tensor], hessian: Tensor, size: Tensor, grid: Grid) -> tuple[float, Tensor]:
    """alpha and s (in,) with the least error of the outputs of `weights`, (out, in) each, rounded to nearest.

    size (in,): mean(abs(X)) up to a factor, which does not matter: s is brought to a geometric middle of 1.
    """
    best_alpha, best_s, least = 0.0, torch.ones_like(size), float("inf")
    for alpha in (point / POINTS for point in range(POINTS)):
        s = (size / size.mean().clamp_min(1e-30)).clamp_min(1e-3) ** alpha
        s = s / (s.max() * s.min()).sqrt()
        error = 0.0
        for weight in weights:
            W = weight * s
            off = nearest(W, *fit_grid(W, s, grid, search=False), grid).weight / s - weight
            error += float(((off @ hessian) * off).sum())
        if error < least:
            best_alpha, best_s, least = alpha, s, error
    return best_alpha, best_s


def solve(
    weight: Tensor,
    hessian: Tensor,
    alpha: float,
    before: str | None,
    factors: dict[str, Tensor],
    grid: Grid,
    options: Options,
) -> Scaled:
    """weight (out, in) float32 and hessian (in, in), both scaled already."""
    scales, zeros = fit_grid(weight, hessian.diagonal(), grid, options.scale_search)
    coded = nearest(weight, scales, zeros, grid)
    error = output_error(weight, coded.weight, hessian)
    return Scaled(coded.codes, scales, zeros, grid, error, alpha, before, factors)

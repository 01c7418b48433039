"""4-bit weights for engines that multiply them with 8-bit inputs, as QQQ (Zhang et al., arXiv 2406.09904) has them.

Symmetric codes, one scale a group or a row (`--group -1`), errors compensated by GPTQ's solver; the inputs rounded
token by token to 8 bits, simulated in every measurement (checkpoints/checkpoint.py).

`--smooth` adds QQQ's adaptive smoothing of the inputs before that. A token's scale is that of its largest number, so a
few channels with outliers leave the others few levels. Channels whose largest number exceeds a threshold t are divided
by s = max(abs(X)) / t, all others are left alone (s = 1), and the layers' columns are multiplied with s; t is searched
for the least squared error of the layers' outputs with inputs and weights both rounded. What precedes the layers is
divided by s as awq.py does it, so the model stays the same but for the rounding, and a zero times s is a zero.

As the authors' code has it, which takes the search of Outlier Suppression+ (Wei et al., arXiv 2304.09145), but: the
thresholds fall in steps of a factor, where theirs fall in equal ones and so never get near the ordinary channels of a
far outlier; the error is that of the layers themselves, not that of attention or gated products that they feed; and
the largest numbers are those of all calibration tokens, the error that of the first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from edgepress.checkpoints.errors import NumericsError
from edgepress.checkpoints.forms import Grid
from edgepress.checkpoints.lazy import torch
from edgepress.stages.options import Gptq as Options
from edgepress.stages.quantisers import gptq
from edgepress.stages.quantisers.awq import Folding
from edgepress.stages.quantisers.codes import fit_grid, nearest
from edgepress.stages.quantisers.gptq import NEEDS, TUNES, Solution

if TYPE_CHECKING:
    from torch import Tensor

    from edgepress.checkpoints.walk import BlockVisit

__all__ = ["NEEDS", "TUNES", "form", "quantise"]

BITS = 8  # of the inputs
THRESHOLDS = 20  # that are tried below the largest number, each the one before over the square root of 2
SEARCHED_TOKENS = 512  # whose outputs are compared


def form(options: Options, masked: bool) -> Grid:
    return Grid(4, options.group, symmetric=True)


def quantise(
    block: BlockVisit, masks: Mapping[str, Tensor | None], forms: Mapping[str, Grid], options: Options
) -> Mapping[str, Solution]:
    if not options.smooth:
        return gptq.quantise(block, masks, forms, options)
    layers, solved = smooth(block, forms), {}
    for name, layer in layers.items():
        try:
            found = gptq.solve(layer.weight, layer.hessian, masks[name], forms[name], options)
        except NumericsError as error:
            raise NumericsError(f"{block.name}.{name}: {error}") from None
        solved[name] = SmoothedSolution(**vars(found), inputs=layer)
    return solved


class Smoothed(NamedTuple):
    """A layer whose inputs are smoothed, ready to be rounded."""

    weight: Tensor  # (out, in) float32, columns and rows scaled
    hessian: Tensor  # (in, in): X^T X of the smoothed inputs
    threshold: float  # no input is larger; 0 where none was divided
    channels: int  # of its inputs, how many were divided
    folded: str | None  # the norm or layer that was divided
    factors: dict[str, Tensor]  # rows (out,) and columns (in,) that the dense weight was multiplied with


@dataclass
class SmoothedSolution(Solution):
    inputs: Smoothed = field(repr=False)

    def scaling(self) -> dict[str, Tensor]:
        return {side: factor.cpu() for side, factor in self.inputs.factors.items()}

    def facts(self) -> dict[str, Any]:
        own = {"threshold": self.inputs.threshold, "smoothed_channels": self.inputs.channels}
        return super().facts() | own | {"folded_into": self.inputs.folded}


def smooth(block: BlockVisit, forms: Mapping[str, Grid]) -> dict[str, Smoothed]:
    """Divide the outlying inputs of the block's layers, in the block itself; those of `forms`, with their Hessians."""
    folding, found = Folding(block), {}
    for names, (hessian, peaks) in observed(block).items():
        coded = [name for name in names if name in forms]
        before, threshold, channels = folding.before(names) if coded else None, 0.0, 0
        if before is not None:
            peaks = folding.shared(names, peaks, largest=True)
            x = folding.trace.inputs[names[0]].flatten(0, -2)[:SEARCHED_TOKENS].float()
            threshold, s = search([(folding.weights[name], forms[name]) for name in coded], x, peaks)
            folded = folding.fold(names, before, s) if threshold else None
            if folded is None:
                before, threshold = None, 0.0
            else:
                hessian, channels = hessian / (folded.unsqueeze(1) * folded), int((s > 1).sum())
        for name in coded:
            found[name] = (hessian, threshold, channels, before)
    # Only now: a later fold may have scaled the rows of a layer whose columns were scaled before.
    for name, linear in block.linears.items():
        linear.weight.copy_(folding.weights[name])
    return {name: Smoothed(folding.weights[name], *facts, folding.scaling[name]) for name, facts in found.items()}


def observed(block: BlockVisit) -> dict[tuple[str, ...], tuple[Tensor, Tensor]]:
    """X^T X (in, in) and max(abs(X)) (in,) over all calibration tokens for each distinct input."""
    found: dict[tuple[str, ...], tuple[Tensor, Tensor]] = {}

    def add(names: tuple[str, ...], x: Tensor) -> None:
        x = x.float()
        hessian, peaks = found.setdefault(names, (x.new_zeros(x.shape[1], x.shape[1]), x.new_zeros(x.shape[1])))
        hessian.addmm_(x.T, x)
        torch.maximum(peaks, x.abs().amax(dim=0), out=peaks)

    block.observe(add)
    return found


def search(layers: Sequence[tuple[Tensor, Grid]], x: Tensor, peaks: Tensor) -> tuple[float, Tensor]:
    """t and s (in,) with the least error of the layers' outputs, all rounded; t is 0 where no s is better than 1.

    layers: weight (out, in) float32 and its grid; x (tokens, in) float32: their input; peaks (in,): its largest
    numbers, of these and other tokens.
    """
    from edgepress.checkpoints.checkpoint import round_tokens

    exact = [x @ weight.T for weight, _ in layers]
    best_t, best_s, least = 0.0, torch.ones_like(peaks), float("inf")
    for step in range(THRESHOLDS + 1):
        t = float(peaks.max()) * 2 ** (-step / 2)
        s = (peaks / t).clamp_min(1) if step else torch.ones_like(peaks)
        if not bool(s.isfinite().all()) or bool((s > 1).all()):
            break  # nothing comes in; or one factor for all channels, which rounding does not notice, from here on
        rounded, error = round_tokens(x / s, BITS), 0.0
        for (weight, grid), wanted in zip(layers, exact, strict=True):
            W = weight * s
            scales, zeros = fit_grid(W, s, grid, search=False)
            error += float((rounded @ nearest(W, scales, zeros, grid).weight.T - wanted).square().sum())
        if error < least:
            best_t, best_s, least = t if step else 0.0, s, error
    return best_t, best_s

"""Half-quadratic quantisation: a range that a few outliers do not pull about; no calibration.

HQQ (Badri and Shaji, 2023) seeks the least sum of abs(W - s (q - z))^p over a group, p = 0.7, which forgives large
errors of few weights. The problem is split: an error e = shrink(W - W_q) that takes up the outliers, then the
zero point z as the mean of q - (W - e) / s, by turns, while the scale s stays what the group's range gives.

As the authors do it, z is a real number and s is not solved for (`solve_real`). This is what a model without an N:M
pattern gets; no library loads it. With a pattern a removed weight must stay exactly zero, so z has to be a code, and
whole zero points go into GPTQ's storage (`solve_whole`). Rounded, z is nearly always where plain rounding has it. So of
the integers beside it the scale is solved for, by the same turns, and each group gets the best pair by the sum above.
Masked weights have no say in it, and no error. This is not the published method, and a smaller sum is not yet a better
model: of SmolLM2-135M without a pattern, at 4 bits in groups of 64, the perplexity was 41.7 with the published loop,
45.7 with plain rounding and 48.2 so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.forms import Grid, RealGrid
from edgepress.checkpoints.lazy import torch
from edgepress.stages.options import Gptq as Options
from edgepress.stages.quantisers import NOTHING
from edgepress.stages.quantisers.codes import Coded, fit_grid, float16_scales, nearest

if TYPE_CHECKING:
    from torch import Tensor

    from edgepress.checkpoints.walk import BlockVisit

NEEDS = NOTHING
TUNES = False
P, BETA, GROWTH, TURNS = 0.7, 10.0, 1.01, 20  # the authors' settings: of the norm, and of the penalty on the split
ROUNDED_START = 4  # bits at which their zero points begin rounded
LARGEST_ZERO = 2.0**15


def form(options: Options, masked: bool, bits: int, group: int | None = None) -> Grid | RealGrid:
    """group: the most, unless whole rows are asked for. Raises PlanError for --symmetric."""
    if options.symmetric:
        raise PlanError(
            f"{options.quant} seeks zero points, and --symmetric fixes them; leave it out, or give int4 or int8, which "
            "are symmetric and as quick"
        )
    group = options.group if group is None or options.group == -1 else min(group, options.group)
    return Grid(bits, group) if masked else RealGrid(bits, group)


def quantise(
    block: BlockVisit, masks: Mapping[str, Tensor | None], forms: Mapping[str, Grid | RealGrid], options: Options
) -> Mapping[str, Coded | RealCoded]:
    solved: dict[str, Coded | RealCoded] = {}
    for name, mask in masks.items():
        weight, form = block.linears[name].weight.float(), forms[name]
        solved[name] = solve_whole(weight, mask, form) if isinstance(form, Grid) else solve_real(weight, form)
    return solved


# --- real zero points ------------------------------------------------------------------------------------------------


@dataclass
class RealCoded:
    """One layer with real zero points."""

    codes: Tensor  # (out, in) uint8
    scales: Tensor  # (out, groups) float32 holding float16 values, as the next
    zeros: Tensor
    grid: RealGrid

    @property
    def weight(self) -> Tensor:
        from edgepress.checkpoints.packing import dequantise_real

        return dequantise_real(self.codes, self.scales, self.zeros)

    def stored(self) -> dict[str, Tensor]:
        return self.grid.write(self.codes.cpu(), self.scales.cpu(), self.zeros.cpu())

    def scaling(self) -> dict[str, Tensor]:
        return {}

    def facts(self) -> dict[str, Any]:
        return {}


def solve_real(weight: Tensor, grid: RealGrid) -> RealCoded:
    """weight (out, in) float32. The scale is that of each group's range, which need not reach to zero."""
    out, columns = weight.shape
    top = 2**grid.bits - 1
    groups = Groups.of(weight, None, top, out, grid.groups(columns))
    low, high = groups.w.amin(dim=-1, keepdim=True), groups.w.amax(dim=-1, keepdim=True)
    # Weights far out and close together would have a zero point beyond float16's largest number.
    s = float16_scales(torch.maximum((high - low) / top, torch.maximum(-low, high) / LARGEST_ZERO))
    z = -low / s
    if grid.bits == ROUNDED_START:
        z = z.round()
    z = groups.half_quadratic_zeros(s, z).to(torch.float16).float()
    codes = (groups.w / s + z).round_().clamp_(0, top)
    return RealCoded(codes.view(weight.shape).to(torch.uint8), s.squeeze(-1), z.squeeze(-1), grid)


# --- whole zero points -----------------------------------------------------------------------------------------------


def solve_whole(weight: Tensor, mask: Tensor | None, grid: Grid) -> Coded:
    """weight (out, in) float32; mask (out, in) is True where a weight may live."""
    if mask is not None:
        weight = weight * mask
    scales, zeros = fit_grid(weight, weight.new_ones(weight.shape[1]), grid, search=False)
    groups = Groups.of(weight, mask, 2**grid.bits - 1, *scales.shape)
    s, z = groups.best(scales.unsqueeze(-1), zeros.unsqueeze(-1).float())
    return nearest(weight, s.squeeze(-1), z.squeeze(-1).int(), grid)


# --- the turns -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Groups:
    """Weights that share a scale and a zero point; both are (out, groups, 1) here."""

    w: Tensor  # (out, groups, group)
    kept: Tensor  # the same, 1 where a weight counts and else 0
    top: int  # the highest code

    @classmethod
    def of(cls, weight: Tensor, mask: Tensor | None, top: int, out: int, groups: int) -> Groups:
        w = weight.view(out, groups, -1)
        return cls(w, torch.ones_like(w) if mask is None else mask.view(w.shape).to(w), top)

    def levels(self, s: Tensor, z: Tensor) -> Tensor:
        """q - z of each weight."""
        return (self.w / s + z).round_().clamp_(0, self.top).sub_(z)

    def cost(self, s: Tensor, z: Tensor) -> Tensor:
        """Sum of abs(w - s (q - z))^p over each group: (out, groups, 1)."""
        return ((self.w - s * self.levels(s, z)).abs_().pow_(P) * self.kept).sum(dim=-1, keepdim=True)

    def best(self, s: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and whole zero points of the least cost; s, z those of plain rounding."""
        real = self.half_quadratic_zeros(s, z)
        best_s, best_z, least = s, z, self.cost(s, z)
        for candidate in (z, real.floor().clamp(1, self.top), real.ceil().clamp(1, self.top)):
            scale = float16_scales(self.half_quadratic_scales(s, candidate))
            cost = self.cost(scale, candidate)
            better = cost < least
            best_s, best_z = torch.where(better, scale, best_s), torch.where(better, candidate, best_z)
            least = torch.where(better, cost, least)
        return best_s, best_z

    def half_quadratic_zeros(self, s: Tensor, z: Tensor) -> Tensor:
        """Real zero points after the published turns, the scales fixed: z = mean(q - (w - e) / s)."""
        count = self.kept.sum(dim=-1, keepdim=True).clamp_min(1)

        def following(levels: Tensor, wanted: Tensor, z: Tensor) -> Tensor:
            return z + ((levels - wanted / s) * self.kept).sum(dim=-1, keepdim=True) / count

        return self._turns(lambda z: (s, z), following, z)

    def half_quadratic_scales(self, s: Tensor, z: Tensor) -> Tensor:
        """Scales after the same turns, the zero points fixed: s = sum((w - e) (q - z)) / sum((q - z)^2)."""

        def following(levels: Tensor, wanted: Tensor, s: Tensor) -> Tensor:
            energy = levels.square().sum(dim=-1, keepdim=True)
            found = (wanted * levels).sum(dim=-1, keepdim=True) / energy.clamp_min(1)
            return torch.where(found > 0, found, s)  # a group of nothing but zeros keeps its scale

        return self._turns(lambda s: (s, z), following, s)

    def _turns(
        self,
        parameters: Callable[[Tensor], tuple[Tensor, Tensor]],
        following: Callable[[Tensor, Tensor, Tensor], Tensor],
        x: Tensor,
    ) -> Tensor:
        """The variable x after all turns: at most TURNS, or until the tensor's mean error no longer falls."""
        beta, least = BETA, float("inf")
        for _ in range(TURNS):
            s, z = parameters(x)
            levels = self.levels(s, z)
            error = (self.w - s * levels) * self.kept
            x = following(levels, self.w - shrink(error, beta), x)
            size = float(error.abs().mean())
            if size >= least:
                break
            least, beta = size, beta * GROWTH
        return x


def shrink(x: Tensor, beta: float) -> Tensor:
    """The generalised soft threshold sign(x) max(abs(x) - abs(x)^(p - 1) / beta, 0): what counts as an outlier's."""
    size = x.abs()
    return x.sign() * (size - size.clamp_min(1e-30) ** (P - 1) / beta).clamp_min_(0)

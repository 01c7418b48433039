"""Half-quadratic quantisation: a range that a few outliers do not pull about; no calibration.

HQQ (Badri and Shaji, 2023) seeks the least sum of abs(W - s (q - z))^p over a group, p = 0.7, which forgives large
errors of few weights. The problem is split: an error e = shrink(W - W_q) that takes up the outliers, then the
zero point z as the mean of q - (W - e) / s, by turns, while the scale s stays what the group's range gives.

GPTQ's storage, and a zero that stays exactly zero, need z to be one of 1 … 2^b - 1, where the authors keep it real:
rounded, it is nearly always where plain rounding has it. So of the integers beside it the scale is solved for, by the
same turns, and each group gets the best pair by the sum above. On Gaussian weights in groups of 64 that leaves 0.126
of their energy as error at 2 bits, where plain rounding leaves 0.209 and a real z alone 0.191. Masked weights have no
say in it, and no error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from checkpoints.errors import PlanError
from checkpoints.shape import Grid
from checkpoints.walk import BlockVisit
from stages.options import Gptq as Options
from stages.quantisers import NOTHING
from stages.quantisers.codes import Coded, fit_grid, float16_scales, nearest

NEEDS = NOTHING
TUNES = False
P, BETA, GROWTH, TURNS = 0.7, 10.0, 1.01, 20  # the authors' settings: of the norm, and of the penalty on the split


def form(options: Options, bits: int, group: int | None = None) -> Grid:
    """group: the most, unless whole rows are asked for. Raises PlanError for --symmetric."""
    if options.symmetric:
        raise PlanError(
            f"{options.quant} seeks zero points, and --symmetric fixes them; leave it out, or give int4 or int8, which "
            "are symmetric and as quick"
        )
    return Grid(bits, options.group if group is None or options.group == -1 else min(group, options.group))


def quantise(block: BlockVisit, masks: Mapping[str, Tensor | None], form: Grid, options: Options) -> dict[str, Coded]:
    return {name: solve(block.linears[name].weight.float(), mask, form) for name, mask in masks.items()}


def solve(weight: Tensor, mask: Tensor | None, grid: Grid) -> Coded:
    """weight (out, in) float32; mask (out, in) is True where a weight may live."""
    if mask is not None:
        weight = weight * mask
    scales, zeros = fit_grid(weight, weight.new_ones(weight.shape[1]), grid, search=False)
    groups = Groups.of(weight, mask, 2**grid.bits - 1, *scales.shape)
    s, z = groups.best(scales.unsqueeze(-1), zeros.unsqueeze(-1).float())
    return nearest(weight, s.squeeze(-1), z.squeeze(-1).int(), grid)


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

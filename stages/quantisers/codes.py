"""Round weights to codes of a grid, and fit a grid to a range of weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgepress.checkpoints.forms import Grid
from edgepress.checkpoints.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST_SCALE = 6.2e-5  # float16 keeps its full precision from here up; smaller scales would be rounded away
_IN_CACHE = 2**17  # weights whose search stays in a processor's cache, which makes it five times as fast


@dataclass
class Coded:
    """One layer in GPTQ's storage."""

    codes: Tensor  # (out, in) uint8
    scales: Tensor  # (out, groups) float32 holding float16 values
    zeros: Tensor  # (out, groups) int32, 1 … 2^bits - 1
    grid: Grid

    @property
    def weight(self) -> Tensor:
        """(out, in) float32: scales * (codes - zeros)."""
        levels = self.codes.view(*self.scales.shape, -1) - self.zeros.unsqueeze(-1)
        return (self.scales.unsqueeze(-1) * levels).view(self.codes.shape)

    def stored(self) -> dict[str, Tensor]:
        return self.grid.write(self.codes.cpu(), self.scales.cpu(), self.zeros.cpu())

    def scaling(self) -> dict[str, Tensor]:
        return {}

    def facts(self) -> dict[str, Any]:
        return {}


def nearest(weight: Tensor, scales: Tensor, zeros: Tensor, grid: Grid) -> Coded:
    """Each weight (out, in) as the code next to it. A weight of 0 gets its zero point's, so it stays 0."""
    w = weight.view(*scales.shape, -1)
    codes = (torch.round(w / scales.unsqueeze(-1)) + zeros.unsqueeze(-1)).clamp_(0, 2**grid.bits - 1)
    return Coded(codes.view(weight.shape).to(torch.uint8), scales, zeros, grid)


def float16_scales(scales: Tensor) -> Tensor:
    """As the file will hold them: float32 with float16 values."""
    return scales.clamp(min=SMALLEST_SCALE).to(torch.float16).float()


def rows_at_once(weight: Tensor) -> int:
    """Rows of weight (out, in) to search scales for in one turn; all of them on a GPU."""
    return len(weight) if weight.device.type != "cpu" else max(1, _IN_CACHE // weight.shape[1])


def fit_grid(weight: Tensor, importance: Tensor, grid: Grid, search: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each group: (out, groups) float32 holding float16 values, and int32.

    weight (out, in); importance (in,) is the Hessian's diagonal. The search shrinks the range in 2.5 % steps
    and keeps, for each group, the one with the least squared error weighted by the diagonal.
    """
    out, columns = weight.shape
    if (rows := rows_at_once(weight)) < out:  # a row's scales depend on no other row
        some = [fit_grid(weight[start : start + rows], importance, grid, search) for start in range(0, out, rows)]
        return torch.cat([scales for scales, _ in some]), torch.cat([zeros for _, zeros in some])
    group = columns if grid.group == -1 else grid.group
    w = weight.view(out, -1, group)
    h = importance.view(1, -1, group)
    top = 2**grid.bits - 1
    low, high = w.amin(dim=-1).clamp(max=0), w.amax(dim=-1).clamp(min=0)
    if grid.symmetric:
        high = torch.maximum(-low, high)
        low = -high
    best_scale, best_zero, best = None, None, None
    for shrink in (1 - 0.025 * step for step in range(25 if search else 1)):
        scale = float16_scales((high - low) * shrink / top)
        if grid.symmetric:
            zero = torch.full_like(scale, (top + 1) // 2)
        else:
            zero = torch.round(-low * shrink / scale).clamp(1, top)
        if not search:
            return scale, zero.to(torch.int32)
        s, z = scale.unsqueeze(-1), zero.unsqueeze(-1)
        error = ((s * ((torch.round(w / s) + z).clamp_(0, top) - z) - w).square_() * h).sum(dim=-1)
        if best is None or best_scale is None or best_zero is None:
            best_scale, best_zero, best = scale, zero, error
        else:
            better = error < best
            best_scale = torch.where(better, scale, best_scale)
            best_zero = torch.where(better, zero, best_zero)
            best = torch.where(better, error, best)
    assert best_scale is not None and best_zero is not None
    return best_scale, best_zero.to(torch.int32)

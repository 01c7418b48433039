"""Round a weight to the nearest codes of a form that is given, without calibration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgepress.checkpoints.forms import Form, Grid, RealGrid
from edgepress.checkpoints.lazy import torch
from edgepress.checkpoints.super_blocks import SuperBlocks
from edgepress.stages.quantisers import Solved

if TYPE_CHECKING:
    from torch import Tensor


def rounded(weight: Tensor, mask: Tensor | None, form: Form, dtype: torch.dtype) -> Solved:
    """weight (out, in) float32, in `form`; 0 where mask (out, in) is False. dtype: of the weights, for the file.

    Scales are those of the least squared error, which is what every weight counting alike makes of GPTQ's.
    """
    if mask is not None:
        weight = weight * mask
    if isinstance(form, Grid):
        from edgepress.stages.quantisers.codes import fit_grid, nearest

        alike = weight.new_ones(weight.shape[1])
        return nearest(weight, *fit_grid(weight, alike, form, search=True), form)
    if isinstance(form, RealGrid):
        from edgepress.stages.quantisers.hqq import solve_real

        return solve_real(weight, form)
    if isinstance(form, SuperBlocks):
        from edgepress.stages.options import Gptq
        from edgepress.stages.quantisers.super_blocks import solve

        return solve(weight, torch.eye(weight.shape[1], device=weight.device), mask, form, Gptq(), dtype)
    from edgepress.stages.quantisers.nf4 import Coded

    writes: Any = form  # a codebook, and whatever else takes the weights themselves
    return Coded.nearest(weight, writes, dtype)

"""Round to nearest with one scale a row, symmetric about zero: no calibration, and the yardstick of the others.

q = clip(round(W / s), -qmax, qmax) with s = max(abs(W)) / qmax over each output row and qmax = 2^(b-1) - 1 (Jacob et
al., arXiv 1712.05877). The lowest code of the b bits is not used. A zero is stored as 2^(b-1), so a mask stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from edgepress.checkpoints.forms import Grid
from edgepress.stages.options import Gptq as Options
from edgepress.stages.quantisers import NOTHING
from edgepress.stages.quantisers.codes import Coded, float16_scales, nearest

if TYPE_CHECKING:
    from torch import Tensor

    from edgepress.checkpoints.walk import BlockVisit

NEEDS = NOTHING
TUNES = False


def form(options: Options, masked: bool, bits: int) -> Grid:
    return Grid(bits, -1, symmetric=True)


def quantise(
    block: BlockVisit, masks: Mapping[str, Tensor | None], forms: Mapping[str, Grid], options: Options
) -> dict[str, Coded]:
    return {name: by_largest(block.linears[name].weight.float(), forms[name]) for name in masks}


def by_largest(weight: Tensor, grid: Grid) -> Coded:
    """weight (out, in) float32: its largest value in a row gets the highest code or, below zero, its mirror image."""
    middle = 2 ** (grid.bits - 1)
    scales = float16_scales(weight.abs().amax(dim=1, keepdim=True) / (middle - 1))  # (out, 1)
    zeros = scales.new_full(scales.shape, middle).int()
    solved = nearest(weight, scales, zeros, grid)
    solved.codes.clamp_(min=1)  # float16 may round a scale down, and the largest value then lies past the last code
    return solved

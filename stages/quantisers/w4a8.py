"""4-bit weights for engines that multiply them with 8-bit inputs.

As QQQ (Zhang et al., arXiv 2406.09904) stores them: symmetric codes, one scale a group or a row (`--group -1`), errors
compensated by GPTQ's solver; the inputs rounded token by token to 8 bits, simulated in every measurement
(checkpoints/checkpoint.py). QQQ's smoothing of inputs before that is left out: its search needs the inputs
themselves, block by block, twice; `awq4 --activation-bits 8` has scales folded into what precedes.
"""

from __future__ import annotations

from edgepress.checkpoints.forms import Grid
from edgepress.stages.options import Gptq as Options
from edgepress.stages.quantisers.gptq import NEEDS, TUNES, quantise

__all__ = ["NEEDS", "TUNES", "form", "quantise"]


def form(options: Options, masked: bool) -> Grid:
    return Grid(4, options.group, symmetric=True)

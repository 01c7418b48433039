"""What a stage looks at besides the weights, by its settings: the forecasts count it."""

from __future__ import annotations

from edgepress.stages import pruning, quantisers
from edgepress.stages.options import Eora, Gptq, Options, Wanda
from edgepress.stages.pruning import HESSIANS, NORMS, NOTHING

__all__ = ["HESSIANS", "NORMS", "NOTHING", "needs"]


def needs(options: Options) -> str:
    """NOTHING for a stage that runs no calibration token, HESSIANS for one that holds a block's; NORMS for others."""
    if isinstance(options, Wanda):
        return pruning.method(options.method).NEEDS
    if isinstance(options, Gptq):
        return quantisers.method(options.quant).NEEDS
    return HESSIANS if isinstance(options, Eora) else NORMS

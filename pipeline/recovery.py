"""What a recipe's lora stage trains, adds and takes, told before it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.memory import size_text
from edgepress.checkpoints.shape import ModelShape
from edgepress.pipeline.forecast import measured_speed
from edgepress.pipeline.plan import StagePlan
from edgepress.pipeline.recipe import Recipe
from edgepress.stages.options import Lora
from edgepress.stages.recovery.shapes import adapters


@dataclass(frozen=True)
class RecoveryForecast:
    method: str
    trainable_parameters: int
    trainable_share: float  # of the model's parameters without adapters
    adapter_bytes: int  # of the trained numbers as they would be stored
    added_bytes: int  # beside the weights: nothing where the adapter is merged
    peak_memory_bytes: int
    seconds: float | None  # None where the device is not here

    def to_dict(self) -> dict[str, Any]:
        from dataclasses import asdict

        return asdict(self)

    def in_words(self) -> str:
        where = f"{self.added_bytes:,} bytes beside them" if self.added_bytes else "merged into them, no byte added"
        return (
            f"lora ({self.method}): trains {self.trainable_parameters:,} parameters, "
            f"{100 * self.trainable_share:.3g} % of the weights; {where}; "
            f"peak memory about {size_text(self.peak_memory_bytes, 'MiB', 0)}"
            + ("" if self.seconds is None else f"; about {_duration(self.seconds)} here")
        )


def forecast_recovery(recipe: Recipe, source: ModelShape, plans: Sequence[StagePlan]) -> list[RecoveryForecast]:
    """One for the lora stage, if there is one. Measures how fast this machine multiplies, for half a second."""
    found, before = [], source
    for step in plans:
        options = step.options
        if isinstance(options, Lora):
            trained = adapters(before, options)
            count = sum(x.adapter_parameters for x in trained)
            size = sum(x.adapter_bytes for x in trained)
            found.append(
                RecoveryForecast(
                    options.method,
                    count,
                    count / before.parameters_total,
                    size,
                    size if options.recovery.quantised else 0,
                    step.cost.peak_memory_bytes,
                    _seconds(recipe, step),
                )
            )
        before = step.shape
    return found


def _seconds(recipe: Recipe, step: StagePlan) -> float | None:
    try:
        speed = measured_speed(recipe.device, recipe.dtype)
    except PlanError:  # a plan may be made for another machine
        return None
    return step.cost.seconds(speed)


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 600
        else f"{seconds / 60:.0f} min"
        if seconds < 36000
        else f"{seconds / 3600:.0f} h"
    )

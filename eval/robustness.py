"""How much worse a model gets when its arithmetic or its memory is inexact.

A quantity (perplexity, a task's score) is measured undisturbed, and at each strength of each kind of disturbance
once for every seed; mean, spread and extremes over the seeds are reported. The protocol is that of the second
thesis, sections 2.4, 2.5, 3.3.4 and 3.3.5: noise on the MLP gates' inputs only, masks without rescaling.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from checkpoints.checkpoint import Checkpoint
from checkpoints.errors import PlanError
from checkpoints.runtime import Runtime
from eval.disturb import KINDS, Disturbance
from eval.perplexity import Protocol, measure
from eval.text import Text

Quantity = Callable[[Disturbance | None], float]  # None: undisturbed


@dataclass(frozen=True)
class Plan:
    """What is tried. Strengths: standard deviation of the noise, probability of the mask."""

    noise: tuple[float, ...] = (0.01, 0.05, 0.1)
    mask: tuple[float, ...] = (0.01, 0.05, 0.1)
    seeds: tuple[int, ...] = (0, 1, 2)
    rescale: bool = False

    def __post_init__(self) -> None:
        if not self.noise and not self.mask:
            raise PlanError("robustness needs at least one strength of noise or of masking")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise PlanError(f"robustness needs different seeds, at least one; given {list(self.seeds)}")
        self.disturbances(self.seeds[0])  # raises for a strength that cannot be

    def disturbances(self, seed: int) -> list[Disturbance]:
        strengths = dict(zip(KINDS, (self.noise, self.mask), strict=True))
        return [Disturbance(k, s, seed, self.rescale) for k, values in strengths.items() for s in values]


@dataclass(frozen=True)
class Level:
    """The quantity at one strength. spread: the sample standard deviation over seeds; None for a single seed."""

    kind: str
    strength: float
    mean: float
    spread: float | None
    lowest: float
    highest: float
    values: tuple[float, ...]  # one a seed, in the plan's order


@dataclass(frozen=True)
class Robustness:
    quantity: str
    protocol: str
    undisturbed: float
    levels: tuple[Level, ...]
    seeds: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_robustness(name: str, protocol: str, quantity: Quantity, plan: Plan) -> Robustness:
    """Measure `quantity` undisturbed and at every level of the plan."""
    found: dict[tuple[str, float], list[float]] = {}
    undisturbed = quantity(None)
    for seed in plan.seeds:
        for disturbance in plan.disturbances(seed):
            found.setdefault((disturbance.kind, disturbance.strength), []).append(quantity(disturbance))
    levels = tuple(_level(kind, strength, tuple(values)) for (kind, strength), values in found.items())
    how = f"{protocol}; masks {'rescaled' if plan.rescale else 'not rescaled'}; {len(plan.seeds)} seeds"
    return Robustness(name, how, undisturbed, levels, plan.seeds)


def perplexity_under(checkpoint: Checkpoint, text: Text, protocol: Protocol, runtime: Runtime) -> Quantity:
    """Perplexity by the walk, one block in memory; infinite where the disturbance overflows the exponent."""

    def quantity(disturbance: Disturbance | None) -> float:
        try:
            return measure(checkpoint, text, protocol, runtime, disturbance).perplexity
        except OverflowError:
            return math.inf

    return quantity


def _level(kind: str, strength: float, values: Sequence[float]) -> Level:
    spread = statistics.stdev(values) if len(values) > 1 else None
    return Level(kind, strength, statistics.fmean(values), spread, min(values), max(values), tuple(values))

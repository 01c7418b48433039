"""Measure how much worse a model gets when its arithmetic or its memory is inexact.

A quantity (perplexity, a task's score) is measured undisturbed, and at each strength of each kind of disturbance
once for every seed; mean, spread and extremes over the seeds are reported. The protocol is that of the second
thesis, sections 2.4, 2.5, 3.3.4 and 3.3.5: noise on the MLP gates' inputs only, masks without rescaling.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.disturb import KINDS, Disturbance
from edgepress.checkpoints.errors import NumericsError, PlanError
from edgepress.checkpoints.runtime import Runtime, Silent
from edgepress.eval.perplexity import Protocol, in_words, measure, protocol_of, text_of
from edgepress.eval.results import Result, Score
from edgepress.eval.subject import Subject
from edgepress.eval.tasks import Settings, Task, find_tasks, numbers
from edgepress.eval.text import Text, starts_with_bos

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
    """Perplexity by the walk, one block in memory. Raises NumericsError where a disturbance leaves no finite number."""

    def quantity(disturbance: Disturbance | None) -> float:
        try:
            return measure(checkpoint, text, protocol, runtime, disturbance).perplexity
        except OverflowError:
            what = f"{disturbance.kind} {disturbance.strength:g}" if disturbance else "no disturbance"
            raise NumericsError(f"perplexity under {what} is too large for a number; give less") from None

    return quantity


# --- the task -------------------------------------------------------------------------------------------------------

_UNSUITABLE = ("wikitext2", "speed", "robustness")  # walked block by block, timed elsewhere, itself


def check(name: str, settings: Settings) -> None:
    _plan(settings, 0)
    _inner(settings).check(settings)


def run(name: str, subject: Subject, settings: Settings) -> Result:
    """The task `robustness`: perplexity of --text, or the main score of --robust-task, under each disturbance."""
    began = time.perf_counter()
    plan = _plan(settings, subject.runtime.seed)
    seeds = plan.seeds
    progress = subject.runtime.progress
    progress.start(name, 1 + len(seeds) * len(plan.disturbances(seeds[0])))
    quiet = Subject(subject.checkpoint, replace(subject.runtime, progress=Silent()), subject.label)
    last: list[Score] = []
    by_task = _perplexity if settings.robust_task == "perplexity" else _main_score

    def quantity(disturbance: Disturbance | None) -> float:
        last[:] = [by_task(quiet, settings, disturbance)]
        progress.step(**{settings.robust_task: f"{last[0].value:.4g}"})
        return last[0].value

    result = measure_robustness(settings.robust_task, "", quantity, plan)
    result = replace(result, protocol=f"{last[0].protocol}; {len(seeds)} seeds; masks not rescaled")
    better = last[0].higher_is_better
    unit = last[0].unit
    return Result(name, _scores(result, better, unit), time.perf_counter() - began, result.to_dict())


def _plan(settings: Settings, seed: int) -> Plan:
    seeds = tuple(range(seed, seed + settings.seeds))
    return Plan(numbers("--noise", settings.noise), numbers("--mask", settings.mask), seeds)


def _inner(settings: Settings) -> Task:
    """The task whose score is followed. Raises PlanError for one that does not run the disturbed model."""
    if settings.robust_task in _UNSUITABLE:
        raise PlanError(
            f"--robust-task {settings.robust_task}: robustness follows perplexity (of --text) or a task of answers"
        )
    return find_tasks([settings.robust_task])[0]


def _scores(result: Robustness, better: bool, unit: str) -> tuple[Score, ...]:
    still = result.undisturbed
    first = Score(f"{result.quantity}, undisturbed", still, math.nan, math.nan, 1, "", result.protocol, better, unit)
    others = [
        Score(
            f"{result.quantity}, {level.kind} {level.strength:g}",
            level.mean,
            level.lowest,
            level.highest,
            len(level.values),
            "" if level.spread is None else f"least and most of {len(level.values)} seeds",
            result.protocol,
            better,
            unit,
            ids=tuple(f"seed {seed}" for seed in result.seeds),
            values=level.values,
            weights=(1.0,) * len(level.values),
        )
        for level in result.levels
    ]
    return (first, *others)


def _perplexity(subject: Subject, settings: Settings, disturbance: Disturbance | None) -> Score:
    protocol = protocol_of(settings, settings.protocol)
    text = text_of("perplexity", settings)
    value = perplexity_under(subject.checkpoint, text, protocol, subject.runtime)(disturbance)
    how = f"{in_words(protocol, starts_with_bos(subject.tokenizer))}; {text.name}; {subject.dtype}"
    return Score("perplexity", value, math.nan, math.nan, 1, "", how, higher_is_better=False)


def _main_score(subject: Subject, settings: Settings, disturbance: Disturbance | None) -> Score:
    """The first score of a task that uses the whole model; its answers are not kept, since noise made them."""
    task = _inner(settings)
    inner = replace(settings, answers="")
    if disturbance is None:
        return task.load()(task.name, subject, inner).scores[0]
    passes: list[None] = []
    block = subject.model.get_submodule(f"{subject.checkpoint.shape.block_prefix}.0")
    counter = block.register_forward_pre_hook(lambda *_: passes.append(None))
    try:
        with disturbance.on_model(subject.model, subject.checkpoint.shape):
            score = task.load()(task.name, subject, inner).scores[0]
    finally:
        counter.remove()
    if not passes:
        raise PlanError(f"--robust-task {task.name} does not run the model that noise was added to")
    return score


def _level(kind: str, strength: float, values: Sequence[float]) -> Level:
    spread = statistics.stdev(values) if len(values) > 1 else None
    return Level(kind, strength, statistics.fmean(values), spread, min(values), max(values), tuple(values))

"""The stage runs of a sweep as a tree with shared beginnings, and the time that stage runs take."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edgepress.checkpoints.errors import EdgepressError, PlanError, RecipeError
from edgepress.checkpoints.lazy import torch
from edgepress.checkpoints.runtime import choose_device, choose_dtype, require_device
from edgepress.checkpoints.shape import ModelShape
from edgepress.pipeline.plan import StagePlan, examined
from edgepress.pipeline.recipe import PLAIN_KEYS, Draft, Recipe
from edgepress.pipeline.sweep_recipe import Configuration


@dataclass
class Node:
    """One stage run, or at position 0 the uncompressed model, which is only measured."""

    key: str
    fingerprint: str
    parent: str | None  # the key of the node it starts from
    position: int
    step: StagePlan | None
    before: ModelShape  # what the stage reads
    recipe: Recipe  # of the first configuration that asks for it; its plain keys count
    configurations: list[str] = field(default_factory=list)

    @property
    def stage(self) -> str:
        return self.step.stage if self.step else "source"

    @property
    def label(self) -> str:
        return self.step.options.label if self.step else "source"


@dataclass(frozen=True)
class Tree:
    nodes: dict[str, Node]  # parents before children
    paths: dict[str, tuple[str, ...]]  # configuration -> the keys of its nodes, the source first

    @property
    def asked(self) -> int:
        """Stage runs that the configurations would take one by one."""
        return sum(len(path) - 1 for path in self.paths.values())

    @property
    def distinct(self) -> int:
        """Stage runs with different results: what has to be computed."""
        return len(self.stage_runs())

    @property
    def shared(self) -> int:
        return self.asked - self.distinct

    def stage_runs(self) -> dict[str, Node]:
        """By fingerprint. Configurations that differ only in how they are measured have nodes of their own, and
        the store's one stage run between them."""
        return {node.fingerprint: node for node in reversed(self.nodes.values()) if node.step is not None}

    def ends(self, key: str) -> list[str]:
        """The configurations that this node is the result of."""
        return [name for name, path in self.paths.items() if path[-1] == key]


Fingerprints = Callable[[Recipe, list[StagePlan]], list[str]]  # the source's first


def grow(
    configurations: Iterable[Configuration],
    shape: Callable[[Recipe], ModelShape],
    fingerprints: Fingerprints,
    texts: bool = False,
) -> Tree:
    """The tree of all configurations. Raises RecipeError with the faults of all of them at once.

    texts: look at the recipes' texts too, which a forecast from shapes alone does without.
    """
    nodes: dict[str, Node] = {}
    paths: dict[str, tuple[str, ...]] = {}
    faults: dict[str, list[str]] = {}
    for name, recipe in ((c.name, c.recipe) for c in configurations):
        try:
            source, steps = examined(Draft(recipe), shape, texts)
            keys = fingerprints(recipe, steps)
        except EdgepressError as error:
            for fault in error.faults if isinstance(error, RecipeError) else (str(error),):
                faults.setdefault(fault, []).append(name)
            continue
        path: list[str] = []
        before = source
        for position, (key, step) in enumerate(zip(keys, [None, *steps], strict=True)):
            full = f"{key}:{_measured_like(recipe)}"
            if full not in nodes:
                nodes[full] = Node(full, key, path[-1] if path else None, position, step, before, recipe)
            nodes[full].configurations.append(name)
            path.append(full)
            before = step.shape if step else source
        paths[name] = tuple(path)
    if faults:
        raise RecipeError([f"'{names[0]}'{_more(names)}: {fault}" for fault, names in faults.items()])
    if not paths:
        raise PlanError("no configuration is left; nothing to do")
    return Tree(nodes, paths)


def spec_fingerprints(recipe: Recipe, steps: list[StagePlan]) -> list[str]:
    """What tells stage runs apart where there are no weights and no texts: everything that names them."""
    start = [recipe.model, recipe.calibration_text, recipe.seed, recipe.dtype, recipe.device]
    keys = [_digest(start)]
    for step in steps:
        keys.append(_digest([keys[-1], step.stage, repr(step.options)]))
    return keys


def conditions_of(recipe: Recipe) -> Recipe:
    """The recipe without its stages and rounds: equal for all whose runs can share a source and its texts.

    A trimmed vocabulary changes the tokens of every text for the stages behind it, so there the stages count too.
    """
    trims = any(stage == "vocabulary" for stage, _ in recipe.stages)
    return replace(recipe, stages=recipe.stages if trims else (), homotopic=0, notes=())


def _measured_like(recipe: Recipe) -> str:
    return _digest([getattr(recipe, key) for key in PLAIN_KEYS if key != "homotopic"])[:8]


def _digest(facts: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps(list(facts)).encode()).hexdigest()


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


# --- time -------------------------------------------------------------------------------------------------------------
# How long stage runs will take on this machine: their arithmetic, over the speed it multiplies at.
#
# A rough forecast to decide by: each stage's multiply-adds are counted from shapes, and one factor a stage, fitted to
# a measured run on a processor, says how much slower than a large matrix product its own work is.


_MEASURING_SLOWDOWN = 4.0  # as stages.cost.Cost.slowdown
_DISK_BYTES_PER_SECOND = 400e6  # a stage's files are written, hashed, and read again by its check
_TRIAL_SECONDS = 0.1  # several products
# Products in bfloat16 over those in float32, without and with instructions for them. Without: 0.5e9 against 45e9
# multiply-adds a second of one thread, torch 2.14 on an EPYC. With: the lower end of what `choose_dtype` says.
_GAIN = (0.01, 2.0)
_SOON = 1e10  # multiply-adds
_ROWS_TEXT_TOKENS = 290_000  # WikiText-2's test split, which `tokens: 0` measures whole


@dataclass(frozen=True)
class Forecast:
    asked: int
    distinct: int
    shared: int
    configurations: int
    seconds: float  # one after the other
    disk_bytes: int
    peak_memory_bytes: int
    machine: str

    def to_dict(self) -> dict[str, Any]:
        from dataclasses import asdict

        return asdict(self)


def forecast(tree: Tree) -> Forecast:
    """Of all distinct stage runs and the measurements after them; nothing in the store is counted as done."""
    speeds = {key: measured_speed(*key) for key in {(n.recipe.device, n.recipe.dtype) for n in tree.nodes.values()}}
    runs = tree.stage_runs().values()
    sources = [node for node in tree.nodes.values() if node.step is None]
    return Forecast(
        tree.asked,
        tree.distinct,
        tree.shared,
        len(tree.paths),
        sum(node_seconds(n, speeds[n.recipe.device, n.recipe.dtype]) for n in (*sources, *runs)),
        sum(n.step.written_bytes for n in runs if n.step),
        max((n.step.cost.peak_memory_bytes for n in runs if n.step), default=0),
        _machine(),
    )


def node_seconds(node: Node, speed: float) -> float:
    """speed: multiply-adds per second, from measured_speed."""
    shape = node.step.shape if node.step else node.before
    seconds = measuring_operations(node.recipe.tokens, shape) / speed * _MEASURING_SLOWDOWN
    if node.step is None:
        return seconds
    return seconds + node.step.cost.seconds(speed) + shape.file_bytes / _DISK_BYTES_PER_SECOND


def measuring_operations(tokens: int, shape: ModelShape) -> float:
    """Multiply-adds of one measurement of perplexity on so many tokens; 0: of all of a text like WikiText-2's."""
    weights = sum(sum(x.weights for x in b.linears) for b in shape.blocks) + shape.vocabulary * shape.hidden_size
    return float((tokens or _ROWS_TEXT_TOKENS) * weights)


def measuring_seconds(tokens: int, shapes: Iterable[ModelShape], device: str, dtype: str) -> float:
    """How long perplexities on so many tokens take here. Raises PlanError for a device that is not here."""
    operations = sum(measuring_operations(tokens, shape) for shape in shapes)
    if operations < _SOON:  # seconds on any processor: no need to measure this one
        return 0.0
    return operations / measured_speed(device, dtype) * _MEASURING_SLOWDOWN


def duration_text(seconds: float) -> str:
    if seconds < 600:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 36000 else f"{seconds / 3600:.0f} h"


def measured_speed(device: str, dtype: str) -> float:
    """Multiply-adds per second of one large matrix product here, in the precision the recipe would run in.

    Of a processor without torch, which takes longer to import than a plan may: numpy multiplies in float32, as quickly
    as torch; bfloat16 is a factor by whether the processor has it. Raises PlanError for a device that is not here.
    """
    require_device(device)
    if device == "cuda" or (device == "auto" and any(Path("/dev").glob("nvidia[0-9]"))):
        return _speed_with_torch(device, dtype)
    import numpy as np

    a = np.ones((1024, 1024), np.float32)
    # The processor's time of all threads: so what others run beside us does not count, nor how many numpy takes.
    best = _shortest(lambda: a @ a, time.process_time)
    gain = {"float32": 1.0, "bfloat16": _GAIN[_has_bfloat16()]}.get(dtype, max(1.0, _GAIN[_has_bfloat16()]))
    return threads() * a.shape[0] ** 3 / best * gain


def _speed_with_torch(device: str, dtype: str) -> float:
    where = choose_device(device)
    size = 4096 if where.type == "cuda" else 1024
    a = torch.ones(size, size, dtype=choose_dtype(dtype, where, "BF16"), device=where)
    return size**3 / _shortest(lambda: float((a @ a)[0, 0]), time.perf_counter)  # a number waits for the device


def _shortest(work: Callable[[], object], clock: Callable[[], float]) -> float:
    """Seconds of the quickest of several trials."""
    best, until = float("inf"), time.perf_counter() + _TRIAL_SECONDS
    while time.perf_counter() < until:
        began = clock()
        work()
        best = min(best, clock() - began)
    return best


def threads() -> int:
    """That torch will take on this processor."""
    import psutil

    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return int(wanted) if wanted.isdigit() and int(wanted) else psutil.cpu_count(logical=False) or 1


def _has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 natively, by what Linux says of it; as torch is asked in `runtime`."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


def _machine() -> str:
    if any(Path("/dev").glob("nvidia[0-9]")) and torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    count = threads()
    return f"{count} thread{'s' if count > 1 else ''} of this processor"

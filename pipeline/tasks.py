"""One node of a sweep's tree as work that can be sent to any process that sees the store."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepress.checkpoints.manifest import Manifest
from edgepress.checkpoints.packed_sizes import packed_sizes
from edgepress.pipeline.plan import StagePlan
from edgepress.pipeline.recipe import Recipe
from edgepress.pipeline.tree import conditions_of

if TYPE_CHECKING:
    from edgepress.pipeline.run import Conditions


@dataclass(frozen=True)
class Task:
    key: str
    fingerprint: str
    position: int
    step: StagePlan | None  # None: measure the uncompressed model
    parent: str | None  # the parent's folder name in the store; None: the uncompressed model
    recipe: Recipe  # its plain keys
    out: Path
    parent_fingerprint: str = ""  # of the folder `parent`
    store_url: str = ""  # fsspec URL that finished stages are fetched from and sent to; empty: `out` is shared


@dataclass(frozen=True)
class Outcome:
    """What the sweep needs to know of a finished node, wherever its files are."""

    key: str
    reused: bool
    seconds: float  # of this visit: computing, proving and measuring, or just finding it
    folder: str  # name in the store; the path of the uncompressed model
    measured: dict[str, Any]  # perplexity and how it was measured
    record: Manifest  # as it lies in the folder; of the uncompressed model one of its counts, with no peak (0)


_prepared: dict[tuple[Recipe, Path], Conditions] = {}


class _Relay:
    """The progress of whatever this process works on, for whoever listens at the moment."""

    def __init__(self) -> None:
        self.tell: Callable[[str], None] = lambda text: None
        self._task, self._steps, self._done = "", 0, 0

    def start(self, task: str, steps: int) -> None:
        self._task, self._steps, self._done = task, steps, 0
        self.tell(f"{task} 0/{steps}")

    def step(self, **numbers: float | str) -> None:
        self._done += 1
        words = "  ".join(f"{key} {value}" for key, value in numbers.items())
        self.tell(f"{self._task} {self._done}/{self._steps}  {words}")

    def note(self, message: str) -> None:
        self.tell(f"! {message}")

    def say(self, message: str) -> None:
        self.tell(message)


_relay = _Relay()


def conditions(recipe: Recipe, out: Path, checked: Recipe | None = None) -> Conditions:
    """Source, texts and runtime for a recipe's plain keys, prepared once a process.

    checked: a recipe with the stages whose training texts are held against the text to measure on.
    """
    from edgepress.pipeline.run import Conditions

    key = (conditions_of(recipe), out)
    if key not in _prepared:
        _prepared[key] = Conditions.prepare(checked or key[0], out, _relay)
    return _prepared[key]


def perform(task: Task, tell: Callable[[str], None]) -> Outcome:
    """Compute one stage run or find it in the store, and measure it. Raises what the stage raises."""
    from edgepress.checkpoints.checkpoint import Checkpoint
    from edgepress.checkpoints.errors import CheckpointError
    from edgepress.pipeline.remote import Mirror
    from edgepress.pipeline.run import run_stage

    _relay.tell = tell
    began = time.monotonic()
    at = conditions(task.recipe, task.out)
    mirror = Mirror(task.store_url, task.out) if task.store_url else None
    if task.step is None:
        known = at.measured(at.source)
        elapsed = time.monotonic() - began
        return Outcome(task.key, False, elapsed, str(at.source.folder), known, _source_record(at))
    parent = at.source
    if task.parent is not None:
        if mirror:
            mirror.fetch_line(task.parent, task.parent_fingerprint)
        parent = Checkpoint.open(task.out / task.parent)
        if parent.fingerprint != task.parent_fingerprint:
            raise CheckpointError(f"{parent.folder} belongs to another run; move it away and run the same sweep again")
    folder = at.store.stage_folder(task.position, task.step.options.label, task.fingerprint)
    if mirror:
        mirror.fetch(folder.name, task.fingerprint)
    result = run_stage(task.step, task.position, task.fingerprint, parent, at, at.measured(parent))
    if mirror:
        mirror.send(folder.name)
    elapsed = time.monotonic() - began
    return Outcome(task.key, result.reused, elapsed, folder.name, result.after, result.manifest)


def _source_record(at: Conditions) -> Manifest:
    source, shape = at.source, at.source.shape
    return Manifest(
        "source", 0, {}, source.fingerprint, None, at.recipe.seed, shape.dense_dtype, "", None, shape.parameters_total,
        shape.parameters_nonzero, {"pattern": str(shape.pattern)} if shape.pattern else None, shape.file_bytes,
        packed_sizes(shape).total, seconds=0.0, peak_memory_bytes=0, versions={}, files={},
    )  # fmt: skip


def with_stages(recipe: Recipe, others: list[Recipe]) -> Recipe:
    """The recipe with the stages of all others, for the checks that look at every stage's texts."""
    return replace(recipe, stages=tuple(stage for other in others for stage in other.stages), notes=())

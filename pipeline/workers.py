"""Carry out a sweep's stage runs in this process or in several of its children."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from edgepress.checkpoints import interrupts
from edgepress.checkpoints.errors import EdgepressError
from edgepress.checkpoints.manifest import Manifest
from edgepress.checkpoints.packed_sizes import packed_sizes
from edgepress.pipeline.plan import StagePlan
from edgepress.pipeline.recipe import Recipe
from edgepress.pipeline.tree import conditions_of

if TYPE_CHECKING:
    from edgepress.pipeline.run import Conditions


Tell = Callable[[str, str], None]  # a node's key, and what it is doing now
_TELL_EVERY = 0.3  # seconds
_PATIENCE = 3.0  # seconds a child has to remove what it has half written


@dataclass(frozen=True)
class Event:
    """How a task ended."""

    key: str
    outcome: Outcome | None = None
    failure: str = ""  # what went wrong, in one message
    trace: str = ""  # of an error that is not the user's
    died: bool = False  # the process is gone, perhaps killed; the task may be tried again


class Workers(Protocol):
    def free(self, task: Task) -> bool:
        """Whether a task would start now."""

    def submit(self, task: Task) -> None: ...

    def wait(self) -> list[Event]:
        """Tasks that ended; empty after a moment in which none did."""

    def close(self) -> None:
        """Stop at once. What a stage has made durable stays."""


def carried_out(task: Task, tell: Callable[[str], None]) -> Event:
    """Perform a task; an error becomes an event, so that it does not stop the others."""
    try:
        return Event(task.key, perform(task, tell))
    except EdgepressError as error:
        return Event(task.key, failure=str(error))
    except Exception as error:
        return Event(task.key, failure=f"{type(error).__name__}: {error}", trace=traceback.format_exc())


class Here:
    """One task at a time in this process, which has everything imported and prepared already."""

    def __init__(self, tell: Tell) -> None:
        self._tell, self._queue = tell, deque[Task]()

    def free(self, task: Task) -> bool:
        return not self._queue

    def submit(self, task: Task) -> None:
        self._queue.append(task)

    def wait(self) -> list[Event]:
        task = self._queue.popleft()
        return [carried_out(task, lambda text: self._tell(task.key, text))]

    def close(self) -> None:
        self._queue.clear()


class Processes:
    """Children of this process, started fresh (spawn), each with its share of the cores.

    once: a child carries out one task alone, so that the peak memory of a task does not depend on those before it.
    """

    def __init__(self, count: int, tell: Tell, once: bool = False) -> None:
        self._count, self._tell, self._once = count, tell, once
        self._threads = threads_each(count)
        self._idle: list[_Child] = []
        self._busy: dict[Any, _Child] = {}  # by what its end of the pipe is called

    def free(self, task: Task) -> bool:
        return len(self._busy) < self._count

    def submit(self, task: Task) -> None:
        child = self._idle.pop() if self._idle else _Child(self._threads)
        child.give(task)
        self._busy[child.pipe] = child

    def wait(self) -> list[Event]:
        events = []
        for pipe in wait(list(self._busy), timeout=0.5):
            child = self._busy[pipe]
            event = child.heard(self._tell)
            if event is None:
                continue
            events.append(event)
            del self._busy[pipe]
            if event.died or self._once:
                child.stop()
            else:
                self._idle.append(child)
        return events

    def close(self) -> None:
        children = (*self._idle, *self._busy.values())
        for child in children:
            child.ask_to_stop()
        for child in children:
            child.stop()
        self._idle, self._busy = [], {}


class _Child:
    def __init__(self, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, threads), daemon=True)
        with interrupts.spawning():
            self._process.start()
        theirs.close()
        self._task: Task | None = None

    def give(self, task: Task) -> None:
        self._task = task
        with contextlib.suppress(BrokenPipeError):  # it died while idle; `heard` will say so
            self.pipe.send(task)

    def heard(self, tell: Tell) -> Event | None:
        assert self._task is not None
        try:
            message = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            code = self._process.exitcode or 0
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            return Event(self._task.key, failure=f"its process ended with {how}", died=True)
        if isinstance(message, Event):
            return message
        tell(self._task.key, message)
        return None

    def ask_to_stop(self) -> None:
        """It removes what it has half written; `stop` waits for that."""
        self._process.terminate()

    def stop(self) -> None:
        self.ask_to_stop()
        self._process.join(_PATIENCE)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self.pipe.close()


def threads_each(count: int) -> int:
    """Cores for each of several processes, and no more than the environment allows."""
    allowed = int(os.environ.get("OMP_NUM_THREADS") or 0) or os.cpu_count() or 1
    return max(1, min(allowed, (os.cpu_count() or 1) // count))


def _serve(pipe: Connection, threads: int) -> None:
    """A child's life: take a task, carry it out, say how it ended."""
    interrupts.heed(_stop)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["OMP_NUM_THREADS"] = str(threads)
    from edgepress.checkpoints.quiet import quiet_libraries

    quiet_libraries()
    import torch

    torch.set_num_threads(threads)
    spoken = 0.0

    def tell(text: str) -> None:
        nonlocal spoken
        if time.monotonic() - spoken > _TELL_EVERY:
            spoken = time.monotonic()
            pipe.send(text)

    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        pipe.send(carried_out(task, tell))


def _stop(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is asked twice, and is to clean up undisturbed
    sys.unraisablehook = lambda lost: None  # in a destructor Python would print and drop it; `_Child.stop` then kills
    raise SystemExit(128 + signal.SIGTERM)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # nobody would hear of the result; what is durable stays for the next sweep


# --- one stage run as a task ------------------------------------------------------------------------------------------
# One node of a sweep's tree as work that can be sent to any process that sees the store.


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
    from edgepress.pipeline.run import run_stage
    from edgepress.pipeline.store import Mirror

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

"""Who carries out the stage runs of a sweep: this process, or several of its children."""

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
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

from edgepress.checkpoints.errors import EdgepressError
from edgepress.pipeline.tasks import Outcome, Task, perform

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
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the parent hears it too, and decides
    signal.signal(signal.SIGTERM, _stop)
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
    sys.unraisablehook = lambda lost: None  # in a destructor Python would print and drop it; `_Child.stop` then kills
    raise SystemExit(128 + signal.SIGTERM)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # nobody would hear of the result; what is durable stays for the next sweep

"""Show progress: bars on a terminal, plain lines elsewhere, and a log file always."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.manifest import is_special
from edgepress.checkpoints.memory import resident_bytes, size_text
from edgepress.checkpoints.quiet import verbosity

_PLAIN_EVERY = 15.0  # seconds between lines where no bar can be drawn


def open_log(path: Path) -> TextIO:
    """A log file to add to. Raises PlanError for a pipe, which would wait for a reader, or another special file."""
    if is_special(path):
        raise PlanError(f"{path} is a device, pipe or socket, where the run's log would be written; move it away")
    return path.open("a")


class Reporter:
    """edgepress.checkpoints.runtime.Progress, on a console and in a log file."""

    def __init__(self, console: Console, log: Path | None = None, quiet: bool = False) -> None:
        self.console, self.quiet, self._brief = console, quiet, verbosity() < 0
        self._every = 0.0 if verbosity() > 0 else _PLAIN_EVERY
        self._log = open_log(log) if log else None
        self._bars: Progress | None = None
        self._task: TaskID | None = None
        self._name, self._steps, self._done, self._spoken, self._began = "", 0, 0, 0.0, 0.0
        self._interrupted = False

    def __enter__(self) -> Reporter:
        # A notebook counts as a terminal, and would get a new bar for each change of it.
        if self.console.is_terminal and not self.console.is_jupyter and not self.quiet and verbosity() == 0:
            self._bars = Progress(
                TextColumn("  {task.description:<16}"),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TimeRemainingColumn(compact=True),
                TextColumn("{task.fields[numbers]}"),
                console=self.console,
                transient=True,
            )
            self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        if self._bars:
            self._bars.stop()
        if self._log:
            self._log.close()

    def interrupt(self) -> None:
        """Stop at the next step."""
        self._interrupted = True

    def start(self, task: str, steps: int) -> None:
        self._name, self._steps, self._done = task, steps, 0
        self._began = self._spoken = time.monotonic()
        if self._bars:
            if self._task is not None:
                self._bars.remove_task(self._task)
            self._task = self._bars.add_task(task, total=steps, numbers="")

    def step(self, **numbers: float | str) -> None:
        if self._interrupted:
            raise KeyboardInterrupt
        self._done += 1
        words = "  ".join(f"{key} {value}" for key, value in numbers.items())
        words += f"  {size_text(resident_bytes(), 'GiB', 1)}"
        if self._bars and self._task is not None:
            self._bars.update(self._task, advance=1, numbers=words)
        now = time.monotonic()
        if not self._bars and not self.quiet and not self._brief and now - self._spoken > self._every:
            self._spoken = now
            left = (now - self._began) / self._done * (self._steps - self._done)
            line = f"  {self._name} {self._done}/{self._steps}  {words}  {left:.0f} s left"
            self.console.print(line, highlight=False)

    def note(self, message: str) -> None:
        """A warning, which --quiet leaves in place."""
        self.say(f"  ! {message}", style="yellow", warning=True)

    def say(self, message: str, style: str | None = None, warning: bool = False) -> None:
        """A line for the person and the log."""
        if not self.quiet and (warning or not self._brief):
            self.console.print(message, style=style, highlight=False, markup=False, soft_wrap=True)
        if self._log:
            self._log.write(f"{datetime.now():%Y-%m-%d %H:%M:%S}  {message}\n")
            self._log.flush()

"""What a sweep shows while it runs: a live table on a terminal, a line an event elsewhere, and a log file always."""

from __future__ import annotations

import time
from collections import deque
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from edgepress.pipeline.progress import open_log

if TYPE_CHECKING:
    from edgepress.pipeline.sweep import SweepResult
    from edgepress.pipeline.tasks import Outcome
    from edgepress.pipeline.tree import Node

_LAST = 6  # finished stage runs that stay in sight


class SweepView:
    def __init__(self, console: Console, log: Path, quiet: bool = False) -> None:
        self.console, self.quiet = console, quiet
        self.result: SweepResult | None = None
        self._log = open_log(log)
        self._running: dict[str, tuple[Node, float, str]] = {}  # since when, and what it does
        self._last: deque[str] = deque(maxlen=_LAST)
        self._failed: list[str] = []
        self._began = time.monotonic()
        self._interrupted = False
        self._live: Live | None = None

    def __enter__(self) -> SweepView:
        if self.console.is_terminal and not self.quiet:
            self._live = Live(get_renderable=self._render, console=self.console, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            self._live.stop()
        self._log.close()

    # --- what happens -----------------------------------------------------------------------------------------------

    def started(self, node: Node) -> None:
        self._running[node.key] = (node, time.monotonic(), "")
        self._write(f"started {_where(node)}")

    def step(self, key: str, doing: str) -> None:
        """What a node does now. Raises KeyboardInterrupt once asked to stop."""
        if key in self._running:
            node, since, _ = self._running[key]
            self._running[key] = (node, since, doing)
        if doing.startswith("!"):
            self.note(doing.removeprefix("! "))
        self.stop_if_asked()

    def done(self, node: Node, outcome: Outcome) -> None:
        self._running.pop(node.key, None)
        how = "from the store" if outcome.reused else f"{outcome.seconds:.1f} s"
        line = f"{_where(node)}: {how}, perplexity {outcome.measured['perplexity']:.2f}"
        self._last.append(line)
        self._say(f"{self._progress()} done {line}")

    def failed(self, node: Node, message: str, trace: str) -> None:
        self._running.pop(node.key, None)
        line = f"{_where(node)}: {message}"
        self._failed.append(line)
        self._say(f"{self._progress()} failed {line}", style="red")
        if trace:
            self._write(trace)

    def note(self, message: str) -> None:
        self._say(f"  ! {message}", style="yellow")

    def say(self, message: str) -> None:
        """A line for the person, terminal or not, and the log."""
        self._write(message)
        if not self.quiet:
            self.console.print(message, highlight=False, markup=False, soft_wrap=True)

    def interrupt(self) -> None:
        """Stop at the next step."""
        self._interrupted = True

    def stop_if_asked(self) -> None:
        if self._interrupted:
            raise KeyboardInterrupt

    # --- how it looks -----------------------------------------------------------------------------------------------

    def _say(self, line: str, style: str | None = None) -> None:
        self._write(line)
        if not self.quiet and not self._live:
            self.console.print(line, style=style, highlight=False, markup=False, soft_wrap=True)

    def _write(self, line: str) -> None:
        self._log.write(f"{datetime.now():%Y-%m-%d %H:%M:%S}  {line}\n")
        self._log.flush()

    def _progress(self) -> str:
        return f"[{len(self.result.outcomes)}/{len(self.result.tree.nodes)}]" if self.result else ""

    def _render(self) -> Group:
        now = time.monotonic()
        head = f"{self._progress()} {_clock(now - self._began)}"
        if self.result:
            waiting = len(self.result.tree.nodes) - len(self.result.outcomes) - len(self.result.failures)
            head += f"   {len(self._running)} running, {waiting - len(self._running)} waiting"
            head += f", {len(self.result.failures)} failed"
        # Text and not markup: lines printed without markup redraw this table in their own way.
        table = Table(box=None, pad_edge=False, show_header=False)
        for _ in range(3):
            table.add_column(no_wrap=True, overflow="ellipsis")
        for line in self._last:
            table.add_row(Text("done", style="green"), Text(line), "")
        for node, since, doing in list(self._running.values()):
            table.add_row(Text("runs", style="bold"), Text(f"{_where(node)}  {_clock(now - since)}"), Text(doing))
        for line in self._failed[-_LAST:]:
            table.add_row(Text("failed", style="red"), Text(line), "")
        return Group(Text(head, style="bold"), table)


def _where(node: Node) -> str:
    more = f" and {len(node.configurations) - 1} more" if len(node.configurations) > 1 else ""
    return f"{node.label} of '{node.configurations[0]}'{more}"


def _clock(seconds: float) -> str:
    return f"{int(seconds // 60)}:{int(seconds % 60):02d}"

"""Run a sweep, every stage run of its tree once, and show it."""

from __future__ import annotations

import shutil
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.manifest import MANIFEST, sealed, sha256_file, write_json
from edgepress.checkpoints.memory import available_bytes, size_text
from edgepress.checkpoints.quiet import verbosity
from edgepress.checkpoints.runtime import machine
from edgepress.checkpoints.shape import ModelShape
from edgepress.pipeline.plan import StagePlan
from edgepress.pipeline.progress import open_log
from edgepress.pipeline.recipe import Recipe
from edgepress.pipeline.store import Store
from edgepress.pipeline.sweep_recipe import Sweep
from edgepress.pipeline.tree import Node, Tree, conditions_of, grow
from edgepress.pipeline.workers import Outcome, Task, Workers, conditions, with_stages

if TYPE_CHECKING:
    from edgepress.pipeline.tree import Node
    from edgepress.pipeline.workers import Outcome


_TRIES = 3  # of a task whose process dies


@dataclass
class SweepResult:
    tree: Tree
    outcomes: dict[str, Outcome] = field(default_factory=dict)  # by node
    failures: dict[str, str] = field(default_factory=dict)  # by node, with the reason

    def failed_configurations(self) -> dict[str, str]:
        """Configurations without a result, and what stopped each."""
        failed = {}
        for name, path in self.tree.paths.items():
            for key in path:
                if key in self.failures:
                    failed[name] = f"{self.tree.nodes[key].label}: {self.failures[key]}"
                    break
        return failed

    @property
    def computed(self) -> int:
        """Stage runs that were not in the store before."""
        return len({o.record.fingerprint for k, o in self.outcomes.items() if not o.reused and self.tree.nodes[k].step})

    @property
    def done(self) -> int:
        return len({o.record.fingerprint for k, o in self.outcomes.items() if self.tree.nodes[k].step})

    def counts(self) -> str:
        tree = self.tree
        return (
            f"{tree.asked} stage runs asked for: {self.done} of {tree.distinct} done ({self.computed} computed now, "
            f"{self.done - self.computed} from the store), {tree.shared} shared"
        )


def prepare(sweep: Sweep, out: Path) -> Tree:
    """The tree by fingerprints. Every model and text is opened; raises RecipeError with all faults at once."""
    groups: dict[Recipe, list[Recipe]] = defaultdict(list)
    for configuration in sweep.configurations:
        groups[conditions_of(configuration.recipe)].append(configuration.recipe)

    def shape(recipe: Recipe) -> ModelShape:
        alike = groups[conditions_of(recipe)]
        return conditions(recipe, out, checked=with_stages(alike[0], alike)).source.shape

    def fingerprints(recipe: Recipe, steps: list[StagePlan]) -> list[str]:
        at = conditions(recipe, out)
        return [at.source.fingerprint, *at.fingerprints(steps)]

    return grow(sweep.configurations, shape, fingerprints, texts=True)


def require_room(out: Path, tree: Tree) -> None:
    """Raise PlanError if disk or memory will not do, by the forecast of what is not in the store yet."""
    todo = [n for n in tree.stage_runs().values() if not (out / folder_name(n) / MANIFEST).is_file()]
    disk, free = sum(n.step.written_bytes for n in todo if n.step), shutil.disk_usage(out).free
    faults = []
    if disk > free:
        wanted, there = size_text(disk, "GiB", 1), size_text(free, "GiB", 1)
        faults.append(f"{len(todo)} stage runs will write {wanted} to {out}, where {there} are free")
    peaks = {n.stage: _peak(n) for n in sorted(todo, key=_peak)}  # the highest of each stage
    for stage, peak in peaks.items():
        if peak > available_bytes():
            wanted, there = size_text(peak, "GiB", 1), size_text(available_bytes(), "GiB", 1)
            faults.append(f"{stage} will need {wanted} of memory; {there} are available")
    if faults:
        raise PlanError("; ".join(faults) + ". `compress plan --recipe` shows the forecast of the sweep")


def carry_out(
    tree: Tree, out: Path, workers: Workers, view: SweepView, finished: Callable[[str], None], store_url: str = "",
    room: float | None = None,
) -> SweepResult:  # fmt: skip
    """Every node, parents first, as many at once as the workers and the memory allow.

    A node that fails takes those below it with it and no other. finished: called with the name of each
    configuration whose last node is done. room: bytes that the running nodes may need together by their forecasts;
    default: the memory available here. Raises KeyboardInterrupt once the view was told to stop.
    """
    result = view.result = SweepResult(tree)
    waiting, running, tries = dict(tree.nodes), dict[str, Node](), Counter[str]()
    room = available_bytes() if room is None else room
    try:
        while waiting or running:
            for key, node in list(waiting.items()):
                if node.parent in result.failures:
                    result.failures[key] = result.failures[str(node.parent)]
                    del waiting[key]
                    continue
                if not _may_start(node, result, running, room):
                    continue
                task = _task(tree, node, out, store_url)
                if not workers.free(task):
                    break
                running[key] = waiting.pop(key)
                view.started(node)
                workers.submit(task)
            if not running:
                continue  # only what hangs on a failed node is left, and falls in the next round
            for event in workers.wait():
                node = running.pop(event.key)
                tries[event.key] += event.died
                if event.outcome is not None:
                    result.outcomes[event.key] = event.outcome
                    view.done(node, event.outcome)
                    for name in tree.ends(event.key):
                        finished(name)
                elif event.died and tries[event.key] < _TRIES:
                    waiting = {event.key: node} | waiting
                    view.note(f"{node.label}: {event.failure}; it is tried again from its last durable step")
                else:
                    result.failures[event.key] = event.failure
                    view.failed(node, event.failure, event.trace)
            view.stop_if_asked()
    finally:
        workers.close()
    return result


def _may_start(node: Node, result: SweepResult, running: dict[str, Node], room: float) -> bool:
    if node.parent is not None and node.parent not in result.outcomes:
        return False
    if any(other.fingerprint == node.fingerprint for other in running.values()):
        return False  # the same files; once they are there, this node only measures them
    return not running or sum(map(_peak, running.values())) + _peak(node) <= room


def _task(tree: Tree, node: Node, out: Path, store_url: str) -> Task:
    parent = tree.nodes[node.parent] if node.parent else None
    above = folder_name(parent) if parent is not None and parent.step is not None else None
    plain = conditions_of(node.recipe)
    start = parent.fingerprint if parent else ""
    return Task(node.key, node.fingerprint, node.position, node.step, above, plain, out, start, store_url)


def all_tasks(tree: Tree, out: Path, store_url: str = "") -> list[Task]:
    return [_task(tree, node, out, store_url) for node in tree.nodes.values()]


def folder_name(node: Node) -> str:
    return Store(Path()).stage_folder(node.position, node.label, node.fingerprint).name


def write_state(out: Path, sweep: Sweep, result: SweepResult) -> None:
    """`sweep.json`: the configurations, the stage runs of each in order, and what failed."""
    failed = result.failed_configurations()
    tree = result.tree
    configurations = []
    for name, recipe in ((c.name, c.recipe) for c in sweep.configurations):
        path = [tree.nodes[key] for key in tree.paths[name]]
        configurations.append(
            {
                "name": name,
                "recipe": recipe.to_dict(),
                "folders": [folder_name(node) for node in path if node.step],
                "fingerprints": [node.fingerprint for node in path],
                "status": _status(name, failed, all(node.key in result.outcomes for node in path)),
                "failure": failed.get(name, ""),
            }
        )
    counts: dict[str, Any] = {"asked": tree.asked, "distinct": tree.distinct, "shared": tree.shared}
    counts |= {"done": result.done, "computed": result.computed}
    about = {"name": sweep.name, "about": sweep.about, "notes": list(sweep.notes), "machine": machine()}
    tables = {p.name: sha256_file(p) for p in sorted(out.glob("results.*")) if p.suffix in (".csv", ".parquet")}
    state = about | {"stage_runs": counts, "configurations": configurations, "tables": tables}
    write_json(out / "sweep.json", sealed(state))


def _status(name: str, failed: dict[str, str], complete: bool) -> str:
    return "failed" if name in failed else "done" if complete else "unfinished"


def _peak(node: Node) -> int:
    return node.step.cost.peak_memory_bytes if node.step else 0


# --- the view ---------------------------------------------------------------------------------------------------------
# What a sweep shows while it runs: a live table on a terminal, a line an event elsewhere, and a log file always.


_LAST = 6  # finished stage runs that stay in sight


class SweepView:
    def __init__(self, console: Console, log: Path, quiet: bool = False) -> None:
        self.console, self.quiet = console, quiet or verbosity() < 0
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

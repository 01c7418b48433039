"""A sweep carried out: every stage run of the tree once, whatever happens to the others."""

from __future__ import annotations

import shutil
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.manifest import MANIFEST, sealed, sha256_file, write_json
from edgepress.checkpoints.memory import available_bytes, size_text
from edgepress.checkpoints.runtime import machine
from edgepress.checkpoints.shape import ModelShape
from edgepress.pipeline.plan import StagePlan
from edgepress.pipeline.recipe import Recipe
from edgepress.pipeline.store import Store
from edgepress.pipeline.sweep_recipe import Sweep
from edgepress.pipeline.sweep_view import SweepView
from edgepress.pipeline.tasks import Outcome, Task, conditions, with_stages
from edgepress.pipeline.tree import Node, Tree, conditions_of, grow
from edgepress.pipeline.workers import Workers

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

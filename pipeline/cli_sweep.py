"""The commands sweep and ablate, and the plan of a sweep."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from edgepress.checkpoints import interrupts
from edgepress.checkpoints.errors import PlanError, RecipeError, require_package
from edgepress.checkpoints.memory import size_text
from edgepress.checkpoints.quiet import quiet_libraries
from edgepress.pipeline.flags import Out, RecipeFile, Skip, recipe_flags, with_model_argument
from edgepress.pipeline.recipe import build
from edgepress.pipeline.sweep_recipe import MAX_RUNS, Sweep, draft_sweep

if TYPE_CHECKING:
    from edgepress.pipeline.sweep import SweepResult
    from edgepress.pipeline.tree import Forecast, Tree

EXIT_FAILED = 1
_PANEL = "Sweep"

Jobs = Annotated[int, typer.Option("--jobs", help="Stage runs at once, on each machine.", rich_help_panel=_PANEL)]
Ray = Annotated[
    str, typer.Option("--ray", help="Ray cluster: auto, local, HOST:PORT or ray://HOST:PORT.", rich_help_panel=_PANEL)
]
StoreUrl = Annotated[
    str, typer.Option("--store", help="With --ray: fsspec URL of a store for all machines.", rich_help_panel=_PANEL)
]
Track = Annotated[str, typer.Option("--track", help="Log to mlflow:URI or tensorboard:DIR.", rich_help_panel=_PANEL)]
MaxRuns = Annotated[int, typer.Option("--max-runs", help="Most configurations.", rich_help_panel=_PANEL)]
Only = Annotated[
    list[str] | None, typer.Option("--only", help="Only configurations of this name (* and ?).", rich_help_panel=_PANEL)
]
LeaveOut = Annotated[
    list[str] | None, typer.Option("--leave-out", help="Not configurations of this name.", rich_help_panel=_PANEL)
]


@recipe_flags
def sweep(
    recipe: Annotated[str, typer.Argument(help="Sweep recipe: a YAML file or a shipped name.")],
    flags: dict[str, Any],
    out: Out = Path("out"),
    jobs: Jobs = 1,
    max_runs: MaxRuns = MAX_RUNS,
    only: Only = None,
    leave_out: LeaveOut = None,
    ray: Ray = "",
    store: StoreUrl = "",
    track: Track = "",
) -> None:
    """Run every configuration of a sweep, what they share once.

    Flags go over the recipe's base. The same command again goes on where it stopped. Exit code 1: some
    configurations failed; the others are done.
    """
    wanted = _wanted(draft_sweep(recipe, flags, max_runs, only or (), leave_out or ()))
    run_command(wanted, out, jobs, ray, store, track)


@with_model_argument
@recipe_flags
def ablate(
    flags: dict[str, Any],
    recipe: RecipeFile = "",
    skip: Skip = "",
    out: Out = Path("out"),
    jobs: Jobs = 1,
    ray: Ray = "",
    store: StoreUrl = "",
    track: Track = "",
) -> None:
    """Show what each stage is worth.

    Runs all stages, each left out, each alone, and none.
    """
    from edgepress.pipeline.sweep_recipe import ablation

    run_command(ablation(build(recipe or None, flags, skip)), out, jobs, ray, store, track)


def plan_sweep(file: str, flags: dict[str, Any], skip: str, as_json: bool) -> None:
    """Forecast a sweep from shapes alone: stage runs, disk, time, memory."""
    drafted, faults = draft_sweep(file, flags, max_runs=2**20)
    if skip:
        faults.append("--skip belongs to a recipe of one run; a sweep's configurations say which stages they have")
    wanted = _wanted((drafted, faults))
    quiet_libraries()
    from edgepress.pipeline.shapes import model_shape
    from edgepress.pipeline.tree import forecast, grow, spec_fingerprints

    tree = grow(wanted.configurations, lambda recipe: model_shape(recipe.model), spec_fingerprints, texts=True)
    expected = forecast(tree)
    if as_json:
        typer.echo(json.dumps({"sweep": wanted.name, "notes": list(wanted.notes)} | expected.to_dict(), indent=2))
    else:
        _print_plan(Console(), wanted, tree, expected)


def _wanted(drafted: tuple[Sweep, list[str]]) -> Sweep:
    """The sweep if nothing is wrong with it. Raises RecipeError with what its plan knows besides."""
    wanted, faults = drafted
    if faults and wanted.configurations:
        quiet_libraries()
        from edgepress.pipeline.shapes import model_shape
        from edgepress.pipeline.tree import grow, spec_fingerprints

        try:
            grow(wanted.configurations, lambda recipe: model_shape(recipe.model), spec_fingerprints, texts=True)
        except RecipeError as error:
            faults += error.faults
    if faults:
        raise RecipeError(faults)
    return wanted


def run_command(wanted: Sweep, out: Path, jobs: int, ray: str, store_url: str, track: str) -> None:
    if jobs < 1:
        raise PlanError(f"--jobs {jobs}: at least one")
    if store_url and not ray:
        raise PlanError("--store goes with --ray; without it -o names the store")
    for package in ("pandas", "pyarrow"):  # before hours of work, after which nothing could be written
        require_package(package, "a sweep's results.csv and results.parquet")
    quiet_libraries()
    from edgepress.pipeline import sweep as sweeps
    from edgepress.pipeline.results import open_tracker, write_results
    from edgepress.pipeline.store import Store, require_apart
    from edgepress.pipeline.sweep import SweepView
    from edgepress.pipeline.workers import Here, Processes, Workers

    tracker = open_tracker(track, wanted.name) if track else None
    console = Console()
    out = out.absolute()
    for configuration in wanted.configurations:
        require_apart(configuration.recipe.model, out)
    with Store(out).opened():
        tree = sweeps.prepare(wanted, out)
        with SweepView(console, out / "sweep.log") as view:
            workers: Workers
            if ray:
                workers, room = _ray_workers(ray, jobs, store_url, view.step, tree, out), float("inf")
            else:
                sweeps.require_room(out, tree)
                workers, room = Processes(jobs, view.step) if jobs > 1 else Here(view.step), None
            _announce(wanted, tree, view.say)
            recipes = {c.name: c.recipe for c in wanted.configurations}

            def finished(name: str) -> None:
                if tracker and view.result:
                    done = view.result.outcomes
                    tracker.log(name, recipes[name], [done[key] for key in tree.paths[name]])

            interrupted = False
            try:
                with interrupts.gently(view.interrupt):
                    sweeps.carry_out(tree, out, workers, view, finished, store_url, room)
            except KeyboardInterrupt:
                interrupts.caught()
                interrupts.end_children()  # before what they leave half written is removed
                interrupted = True
                if view.result is None:
                    raise
            assert view.result is not None
            write_results(out, wanted.name, view.result)
            sweeps.write_state(out, wanted, view.result)
            if tracker:
                tracker.close()
            view.say(view.result.counts())
    if interrupted:
        interrupts.caught(typer.echo)
        raise KeyboardInterrupt
    _print_result(console, wanted, view.result, out)
    if view.result.failures:
        raise typer.Exit(EXIT_FAILED)


def _ray_workers(
    address: str, jobs: int, store_url: str, tell: Callable[[str, str], None], tree: Tree, out: Path
) -> Any:
    from edgepress.pipeline.ray_workers import RayWorkers
    from edgepress.pipeline.store import Mirror
    from edgepress.pipeline.sweep import all_tasks, require_room

    if store_url:
        Mirror(store_url, out).check()
    else:
        require_room(out, tree)
    workers = RayWorkers(address, jobs, tell)
    workers.require_memory(all_tasks(tree, out, store_url))
    return workers


def _announce(wanted: Sweep, tree: Tree, say: Callable[[str], None]) -> None:
    say(
        f"{wanted.name}: {len(tree.paths)} configurations, {tree.asked} stage runs asked for, "
        f"{tree.distinct} distinct, {tree.shared} shared"
    )
    for note in wanted.notes:
        say(f"  ! {note}")


def _print_plan(console: Console, wanted: Sweep, tree: Tree, expected: Forecast) -> None:
    from rich import box
    from rich.table import Table

    console.print(f"Plan for the sweep {wanted.name}: {expected.configurations} configurations", highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("stage", "asked", "distinct", "shared", "GiB", "peak GiB"):
        table.add_column(column, justify="left" if column == "stage" else "right", no_wrap=True)
    runs = tree.stage_runs().values()
    for stage in dict.fromkeys(node.stage for node in runs):
        of_stage = [node.step for node in runs if node.stage == stage and node.step]
        asked = sum(tree.nodes[key].stage == stage for path in tree.paths.values() for key in path)
        table.add_row(
            stage,
            str(asked),
            str(len(of_stage)),
            str(asked - len(of_stage)),
            f"{sum(step.written_bytes for step in of_stage) / 2**30:.1f}",
            f"{max(step.cost.peak_memory_bytes for step in of_stage) / 2**30:.1f}",
        )
    console.print(table)
    for note in wanted.notes:
        console.print(f"  ! {note}", style="yellow", highlight=False, markup=False)
    console.print(
        f"Stage runs: {expected.asked} asked for, {expected.distinct} distinct, {expected.shared} shared.\n"
        f"Disk: {size_text(expected.disk_bytes, 'GiB', 1)} at most; shards that stages share count once.\n"
        f"Peak memory: {size_text(expected.peak_memory_bytes, 'GiB', 1)} for one stage run at a time.\n"
        f"Time: about {duration(expected.seconds)} one after the other on {expected.machine}; rough, from shapes and "
        "the speed of a matrix product here.",
        highlight=False,
        soft_wrap=True,
    )


def _print_result(console: Console, wanted: Sweep, result: SweepResult, out: Path) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    failed = result.failed_configurations()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("configuration", "stages", "ppl", "nonzero M", "MiB"):
        table.add_column(column, justify="left" if column in ("configuration", "stages") else "right")
    for name, path in result.tree.paths.items():
        stages = " ".join(result.tree.nodes[key].stage for key in path[1:])
        if name in failed:
            table.add_row(Text(name), stages, "failed", "", "", style="red")
            continue
        end = result.outcomes[path[-1]]
        counts = (f"{end.record.parameters_nonzero / 1e6:.2f}", f"{end.record.file_bytes / 2**20:.1f}")
        table.add_row(Text(name), stages, f"{end.measured['perplexity']:.2f}", *counts)
    console.print(table)
    console.print(f"Results: {out / 'results.csv'}, {out / 'results.parquet'}", highlight=False, soft_wrap=True)
    for name, reason in failed.items():
        console.print(f"failed: '{name}': {reason}", style="red", highlight=False, markup=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """To two figures, as such a forecast deserves."""
    for unit, size in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * size:
            return f"{float(f'{seconds / size:.2g}'):g} {unit}"
    return f"{seconds:.0f} seconds"

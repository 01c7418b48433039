"""A sweep of a tiny LLaMA: shared beginnings, killed and gone on with, one failure among many, the table."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.manifest import MANIFEST
from edgepress.pipeline.cli_sweep import run_command
from edgepress.pipeline.ray_workers import RayWorkers
from edgepress.pipeline.results import COLUMNS, open_tracker, write_results
from edgepress.pipeline.store import Store
from edgepress.pipeline.sweep import SweepResult, SweepView, carry_out, folder_name, prepare, require_room, write_state
from edgepress.pipeline.sweep_recipe import Sweep, load_sweep
from edgepress.pipeline.workers import Here

pytestmark = pytest.mark.pipeline

Command = Callable[..., Any]

RECIPE = """
name: tiny
data: embedded
window: 64
tokens: 512
stages:
  - depth: {remove: 1, protect_first: 1, protect_last: 1, samples: 4, length: 32}
  - wanda: {samples: 4, length: 64}
  - lora: {samples: 16, length: 64, steps: 4, batch: 4, rank: 4, save_steps: 1}
sweep:
  configurations:
    - {name: baseline, stages: []}
    - {name: depth, stages: [depth]}
    - name: width {wanda.pattern}
      stages: [depth, wanda]
      grid: {wanda.pattern: ["1:8", "2:4"]}
    - {name: early, stages: [depth, lora, wanda], wanda.pattern: "2:4"}
"""
ASKED, DISTINCT = 8, 5

# Runs the command in a process that kills itself at the n-th thing its view is told.
KILLER = """
import os, signal, sys
import edgepress.pipeline.sweep
moment, count, step = int(sys.argv[1]), 0, edgepress.pipeline.sweep.SweepView.step
def counted(self, *arguments):
    global count
    count += 1
    if count == moment:
        os.kill(os.getpid(), signal.SIGKILL)
    step(self, *arguments)
edgepress.pipeline.sweep.SweepView.step = counted
from edgepress.pipeline import cli
sys.argv = ["compress", *sys.argv[2:]]
cli.main()
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(RECIPE)
    return path


def run_here(sweep: Sweep, out: Path, stop_after: str = "") -> SweepResult:
    """stop_after: Ctrl-C once the configuration of this name is done."""
    with Store(out).opened(), SweepView(Console(), out / "sweep.log", quiet=True) as view:

        def finished(name: str) -> None:
            if name == stop_after:
                view.interrupt()

        tree = prepare(sweep, out)
        with contextlib.suppress(KeyboardInterrupt):
            carry_out(tree, out, Here(view.step), view, finished)
        assert view.result is not None
        write_results(out, sweep.name, view.result)
        write_state(out, sweep, view.result)
    return view.result


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, recipe: Path, tiny_llama: Path) -> tuple[Path, SweepResult]:
    """An undisturbed sweep; tests must not change it."""
    out = tmp_path_factory.mktemp("swept") / "out"
    return out, run_here(load_sweep(str(recipe), {"model": str(tiny_llama)}), out)


def manifests(out: Path) -> dict[str, int]:
    """When each finished stage folder was finished."""
    return {p.parent.name: p.stat().st_mtime_ns for p in out.glob(f"[0-9]-*/{MANIFEST}")}


def test_shared_beginnings_are_computed_once(swept: tuple[Path, SweepResult]) -> None:
    out, result = swept
    assert not result.failures
    assert (result.tree.asked, result.done, result.computed) == (ASKED, DISTINCT, DISTINCT)
    assert len(manifests(out)) == DISTINCT == len([p for p in out.iterdir() if p.name[0].isdigit()])
    assert result.counts().startswith(
        "8 stage runs asked for: 5 of 5 done (5 computed now, 0 from the store), 3 shared"
    )


def test_a_configuration_alone_gives_the_same_fingerprints_and_numbers(
    swept: tuple[Path, SweepResult], recipe: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    from edgepress.pipeline.progress import Reporter
    from edgepress.pipeline.run import run

    out, result = swept
    sweep = load_sweep(str(recipe), {"model": str(tiny_llama)}, only=["width 2:4"])
    with Store(tmp_path).opened(), Reporter(Console(), quiet=True) as reporter:
        alone = run(sweep.configurations[0].recipe, tmp_path, reporter)
    path = [result.outcomes[key] for key in result.tree.paths["width 2:4"]]
    assert [s["fingerprint"] for s in alone.report["stages"]] == [o.record.fingerprint for o in path[1:]]
    assert [s["perplexity"]["after"] for s in alone.report["stages"]] == [o.measured["perplexity"] for o in path[1:]]
    assert all((out / Path(s["path"]).name / MANIFEST).is_file() for s in alone.report["stages"])


def test_the_table_is_tidy(swept: tuple[Path, SweepResult]) -> None:
    out, _ = swept
    csv, parquet = pd.read_csv(out / "results.csv"), pd.read_parquet(out / "results.parquet")
    assert list(csv.columns) == list(parquet.columns) == list(COLUMNS)
    assert len(csv) == len(parquet) == 2 * (1 + DISTINCT)  # perplexity and bits per byte; the source counts as one
    assert not csv.duplicated(["fingerprint", "metric"]).any()
    assert (csv["value"] - parquet["value"]).abs().max() < 1e-9
    source = csv[csv["position"] == 0].iloc[0]
    assert json.loads(source["result_of"]) == ["baseline"] and len(json.loads(source["configurations"])) == 5
    depth = csv[(csv["stage"] == "depth") & (csv["metric"] == "perplexity")].iloc[0]
    assert json.loads(depth["configurations"]) == ["depth", "width 1:8", "width 2:4", "early"]
    assert depth["parent"] == source["fingerprint"] and json.loads(depth["options"])["remove"] == 1
    assert depth["file_bytes"] == sum(p.stat().st_size for p in (out / depth["folder"]).rglob("*.safetensors"))
    early = csv[csv["result_of"].map(json.loads).map(lambda names: "early" in names)].iloc[0]
    assert (early["stage"], early["position"], early["pattern"]) == ("wanda", 3, "2:4")
    state = json.loads((out / "sweep.json").read_text())
    assert state["stage_runs"] == {"asked": 8, "distinct": 5, "shared": 3, "done": 5, "computed": 5}
    assert [c["status"] for c in state["configurations"]] == ["done"] * 5


def test_killed_in_the_middle_nothing_is_lost_nor_computed_twice(
    swept: tuple[Path, SweepResult],
    recipe: Path,
    tiny_llama: Path,
    tmp_path: Path,
    weight_hashes: Callable[[Path], dict[str, str]],
) -> None:
    out = tmp_path / "out"
    arguments = ["sweep", str(recipe), "--model", str(tiny_llama), "-o", str(out)]
    killed = subprocess.run([sys.executable, "-c", KILLER, "36", *arguments], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    finished = manifests(out)
    assert 0 < len(finished) < DISTINCT
    result = run_here(load_sweep(str(recipe), {"model": str(tiny_llama)}), out)
    assert (result.done, result.computed) == (DISTINCT, DISTINCT - len(finished))
    now = manifests(out)
    assert {name: now[name] for name in finished} == finished
    assert weight_hashes(out) == weight_hashes(swept[0])


def test_a_worker_killed_in_the_middle_is_replaced(recipe: Path, tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "edgepress", "sweep", str(recipe), "--model", str(tiny_llama)]
    with subprocess.Popen(
        [*command, "-o", str(out), "--jobs", "2"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        before, victim = kill_a_worker(out, process)
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert f"({DISTINCT} computed now, 0 from the store)" in output
    assert "SIGKILL; it is tried again" in output
    after = manifests(out)
    assert len(after) == DISTINCT and victim in after
    assert {name: after[name] for name in before} == before


def kill_a_worker(out: Path, process: subprocess.Popen[str]) -> tuple[dict[str, int], str]:
    """SIGKILL to whoever computes a stage that has durable progress; what was finished then, and the stage."""
    while process.poll() is None:
        for journal in out.glob("[0-9]-*/.work/journal.jsonl"):
            folder = journal.parent.parent
            before = manifests(out)
            holder = out / ".locks" / folder.name
            if before and folder.name not in before and holder.is_file() and (pid := holder.read_text()).isdigit():
                os.kill(int(pid), signal.SIGKILL)
                return before, folder.name
        time.sleep(0.005)
    raise AssertionError("the sweep ended before a worker could be killed")


def test_one_failure_leaves_the_others_alone(recipe: Path, tiny_llama: Path, tmp_path: Path, compress: Command) -> None:
    out = tmp_path / "out"
    sweep = load_sweep(str(recipe), {"model": str(tiny_llama)}, leave_out=["early"])
    tree = prepare(sweep, out)
    damaged = out / folder_name(tree.nodes[tree.paths["width 1:8"][-1]])
    damaged.mkdir(parents=True)
    (damaged / "stray.txt").touch()
    (out / ".edgepress").touch()
    done = compress("sweep", recipe, "--model", tiny_llama, "-o", out, "--leave-out", "early")
    assert done.returncode == 1
    assert "failed: 'width 1:8': wanda-1of8" in done.stdout and damaged.name in done.stdout.replace("\n", "")
    assert "Traceback" not in done.stdout + done.stderr
    states = {c["name"]: c["status"] for c in json.loads((out / "sweep.json").read_text())["configurations"]}
    assert states == {"baseline": "done", "depth": "done", "width 1:8": "failed", "width 2:4": "done"}
    damaged.rename(tmp_path / "away")
    again = run_here(sweep, out)
    assert not again.failures and (again.done, again.computed) == (3, 1)


def test_a_failed_stage_takes_those_below_it_along(
    recipe: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import edgepress.stages.depth

    def broken(*arguments: Any) -> None:
        raise RuntimeError("the disk caught fire")

    monkeypatch.setattr(edgepress.stages.depth, "run", broken)
    result = run_here(load_sweep(str(recipe), {"model": str(tiny_llama)}), tmp_path)
    assert set(result.failed_configurations()) == {"depth", "width 1:8", "width 2:4", "early"}
    assert set(result.failed_configurations().values()) == {"depth-1: RuntimeError: the disk caught fire"}
    assert "Traceback" in (tmp_path / "sweep.log").read_text()
    assert len(pd.read_csv(tmp_path / "results.csv")) == 2  # the baseline's


def test_a_disk_too_small_by_the_forecast_is_refused_before_anything_starts(
    swept: tuple[Path, SweepResult], recipe: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import edgepress.pipeline.sweep

    out, result = swept
    tree = result.tree
    usage = type("Usage", (), {"free": 1000})()
    monkeypatch.setattr(edgepress.pipeline.sweep.shutil, "disk_usage", lambda path: usage)
    require_room(out, tree)  # everything is there already
    with pytest.raises(PlanError, match=r"5 stage runs will write .* where .* are free"):
        require_room(tmp_path, tree)


def test_interrupted_it_keeps_what_is_done_and_goes_on(recipe: Path, tiny_llama: Path, tmp_path: Path) -> None:
    sweep = load_sweep(str(recipe), {"model": str(tiny_llama)}, leave_out=["early"])
    first = run_here(sweep, tmp_path, stop_after="depth")
    assert first.done == 1 and not first.failures
    states = {c["name"]: c["status"] for c in json.loads((tmp_path / "sweep.json").read_text())["configurations"]}
    assert states == {"baseline": "done", "depth": "done", "width 1:8": "unfinished", "width 2:4": "unfinished"}
    assert len(pd.read_csv(tmp_path / "results.csv")) == 4
    second = run_here(sweep, tmp_path)
    assert (second.done, second.computed) == (3, 2)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"jobs": 0}, "at least one"),
        ({"store_url": "memory://x"}, "--store goes with --ray"),
        ({"track": "wandb:x"}, "give mlflow:URI or tensorboard:DIR"),
        ({"ray": "nonsense"}, "give auto, local, HOST:PORT"),
        ({"ray": "127.0.0.1:1"}, "no Ray cluster answers at '127.0.0.1:1'"),
        ({"ray": "ray://127.0.0.1:1", "store_url": "nosuch://x"}, "--store nosuch://x"),
    ],
)
def test_mistakes_get_one_message(
    recipe: Path, tiny_llama: Path, tmp_path: Path, more: dict[str, Any], words: str
) -> None:
    sweep = load_sweep(str(recipe), {"model": str(tiny_llama)})
    with pytest.raises(PlanError) as caught:
        run_command(sweep, tmp_path / "out", **({"jobs": 1, "ray": "", "store_url": "", "track": ""} | more))
    assert words in str(caught.value)


def test_an_absent_library_gets_its_install_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for library in ("ray", "mlflow.tracking", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(PlanError, match=r"pip install 'edgepress\[ray\]'"):
        RayWorkers("local", 1, lambda key, text: None)
    for kind in ("mlflow", "tensorboard"):
        with pytest.raises(PlanError, match=r"pip install 'edgepress\[tracking\]'"):
            open_tracker(f"{kind}:{tmp_path}", "x")

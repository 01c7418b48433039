"""A sweep on a local Ray with two workers and a store at a URL; one worker is killed in the middle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.manifest import MANIFEST, Manifest
from edgepress.pipeline.store import Mirror
from edgepress.pipeline.sweep import all_tasks, prepare
from edgepress.pipeline.sweep_recipe import load_sweep
from edgepress.pipeline.workers import perform

pytestmark = pytest.mark.pipeline

RECIPE = """
name: tiny-ray
data: embedded
window: 64
tokens: 512
stages:
  - depth: {remove: 1, protect_first: 1, protect_last: 1, samples: 4, length: 32}
  - wanda: {samples: 4, length: 64}
sweep:
  configurations:
    - name: width {wanda.pattern}
      grid: {wanda.pattern: ["1:8", "2:4", "4:8"]}
"""
DISTINCT = 4


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(RECIPE)
    return path


def finished(out: Path) -> dict[str, int]:
    return {p.parent.name: p.stat().st_mtime_ns for p in out.glob(f"[0-9]-*/{MANIFEST}")}


def test_a_killed_ray_worker_costs_nothing_but_its_unfinished_step(
    recipe: Path, tiny_llama: Path, tmp_path: Path, weight_hashes: Callable[[Path], dict[str, str]]
) -> None:
    out, store = tmp_path / "out", tmp_path / "store"
    command = [
        sys.executable,
        "-m",
        "edgepress.pipeline.cli",
        "sweep",
        str(recipe),
        "--model",
        str(tiny_llama),
        "-o",
        str(out),
    ]
    command += ["--ray", "local", "--jobs", "2", "--store", store.as_uri()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        before, victim, shards = kill_a_worker(out, process)
        output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert "its Ray worker is gone" in output and "it is tried again" in output
    assert f"({DISTINCT} computed now, 0 from the store)" in output
    after = finished(out)
    assert len(after) == DISTINCT and victim in after
    assert {name: after[name] for name in before} == before
    # blocks that were durable when the worker died were not computed again
    assert {p: p.stat().st_mtime_ns for p in shards} == shards
    # what lies at the URL is whole, and of the same bytes
    assert set(finished(store)) == set(after)
    for name in after:
        Checkpoint.open(store / name, hashes=True)
    assert weight_hashes(store) == weight_hashes(out)

    elsewhere = tmp_path / "elsewhere"
    tree = prepare(load_sweep(str(recipe), {"model": str(tiny_llama)}), elsewhere)
    outcomes = [perform(task, lambda text: None) for task in all_tasks(tree, elsewhere, store.as_uri())]
    assert all(outcome.reused for outcome in outcomes[1:])
    assert [o.measured for o in outcomes[1:]] == [
        json.loads((elsewhere / o.folder / MANIFEST).read_text())["quality"]["after"] for o in outcomes[1:]
    ]


def kill_a_worker(out: Path, process: subprocess.Popen[str]) -> tuple[dict[str, int], str, dict[Path, int]]:
    """SIGKILL to the worker of a stage with durable blocks; what was finished, the stage, and its durable shards."""
    while process.poll() is None:
        for journal in out.glob("2-*/.work/journal.jsonl"):
            folder = journal.parent.parent
            done = [json.loads(line) for line in journal.read_text().splitlines() if line.endswith("}")]
            holder = out / ".locks" / folder.name
            if done and not (folder / MANIFEST).is_file() and (pid := holder.read_text()).isdigit():
                shards = {p: p.stat().st_mtime_ns for p in sorted(folder.glob("block-*.safetensors"))[: len(done)]}
                before = finished(out)
                os.kill(int(pid), signal.SIGKILL)
                return before, folder.name, shards
        time.sleep(0.002)
    raise AssertionError(f"the sweep ended before a worker could be killed: {process.communicate()[0]}")


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_a_store_at_a_url_gives_back_whole_stages_and_their_line(scheme: str, chain: Path, tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}" if scheme == "memory" else (tmp_path / "far").as_uri()
    near = Mirror(url, chain)
    near.check()
    names = sorted(p.name for p in chain.iterdir() if p.name[0].isdigit())
    for name in names:
        assert not near.has(name)
        near.send(name)
        assert near.has(name)
    other = Mirror(url, tmp_path / "other")
    assert not other.fetch("1-depth-9-00000000", "0" * 64)
    (tmp_path / "other" / names[2]).mkdir()  # an attempt that died here
    (tmp_path / "other" / names[2] / "block-00000.safetensors").write_text("half")
    other.fetch_line(names[3], Manifest.read(chain / names[3]).fingerprint)
    assert sorted(p.name for p in (tmp_path / "other").glob("[0-9]-*")) == names[:4]
    last = Checkpoint.open(tmp_path / "other" / names[3], hashes=True)
    assert len([c for c in last.ancestors() if c.manifest]) == 4
    assert len(list((tmp_path / "other" / "measurements").iterdir())) == len(
        list((chain / "measurements").glob("*.json"))
    )

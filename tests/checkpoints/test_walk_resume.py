"""A walk that was stopped goes on where it was, with the same bits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import CheckpointError
from edgepress.checkpoints.manifest import sealed
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.walk import Walk, Work

pytestmark = pytest.mark.unit

TinyModel = Callable[..., Path]


class KilledError(Exception):
    pass


def batches() -> list[Tensor]:
    """Sequences longer than the window, in batches of three shapes."""
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(3, 512, shape, generator=generator) for shape in [(2, 24), (1, 24), (2, 13)]]


def stage(source: Checkpoint, work: Work, stop_at: int | None = None, order: list[int] | None = None) -> Walk:
    """A stage that looks, changes weights, measures and goes on; stops in the middle of block `stop_at`."""
    walk = Walk(source, batches(), Runtime(), work, last_outputs=True)
    for visit in walk:
        norms: dict[str, float] = {}

        def square(names: tuple[str, ...], x: Tensor, norms: dict[str, float] = norms) -> None:
            norms[names[0]] = norms.get(names[0], 0.0) + float(x.square().sum())

        visit.observe(square)
        weight = visit.linears["mlp.down_proj"].weight
        weight.data.mul_(1 / (1 + norms["mlp.down_proj"]) ** 0.1)
        if visit.index == stop_at:
            raise KilledError
        if order is not None:
            order.append(visit.index)
        visit.done({"norms": norms})
    return walk


@pytest.fixture(scope="module")
def source(tiny_model: TinyModel) -> Checkpoint:
    return Checkpoint.open(tiny_model("gemma3_text"))


@pytest.fixture(scope="module")
def unbroken(source: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Walk:
    return stage(source, Work(tmp_path_factory.mktemp("unbroken") / "work"))


def assert_as(unbroken: Walk, walk: Walk) -> None:
    assert walk.facts == unbroken.facts
    assert [entry["block"] for entry in walk.work.entries] == list(range(6))  # type: ignore[union-attr]
    for ours, theirs in zip(walk.states.chunks, unbroken.states.chunks, strict=True):
        assert torch.equal(ours, theirs)


def test_work_in_files_is_work_in_memory(source: Checkpoint, unbroken: Walk) -> None:
    walk = Walk(source, batches(), Runtime(), last_outputs=True)
    for visit in walk:
        weight = visit.linears["mlp.down_proj"].weight
        weight.data.mul_(1 / (1 + unbroken.facts[visit.index]["norms"]["mlp.down_proj"]) ** 0.1)
        visit.done()
    assert walk.facts == []
    for ours, theirs in zip(walk.states.chunks, unbroken.states.chunks, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("stop_at", range(6))
def test_the_rest_is_bit_identical(source: Checkpoint, unbroken: Walk, tmp_path: Path, stop_at: int) -> None:
    with pytest.raises(KilledError):
        stage(source, Work(tmp_path / "work"), stop_at)
    order: list[int] = []
    walk = stage(source, Work(tmp_path / "work"), order=order)
    assert order == list(range(stop_at, 6))
    assert_as(unbroken, walk)


def test_stopped_again_and_again(source: Checkpoint, unbroken: Walk, tmp_path: Path) -> None:
    for stop_at in (0, 1, 1, 4, 5):
        with pytest.raises(KilledError):
            stage(source, Work(tmp_path / "work"), stop_at)
    assert_as(unbroken, stage(source, Work(tmp_path / "work")))


def test_killed_between_states_and_journal(
    source: Checkpoint, unbroken: Walk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The outputs of block 2 lie on disk, its line does not: it is done again from inputs still there."""
    append = Work.append

    def fail(self: Work, entry: dict[str, Any]) -> None:
        if entry["block"] == 2:
            raise KilledError
        append(self, entry)

    monkeypatch.setattr(Work, "append", fail)
    with pytest.raises(KilledError):
        stage(source, Work(tmp_path / "work"))
    monkeypatch.undo()
    order: list[int] = []
    assert_as(unbroken, stage(source, Work(tmp_path / "work"), order=order))
    assert order == [2, 3, 4, 5]


@pytest.mark.parametrize("kept", [0, 1, 30, -1])
def test_a_line_cut_short_is_done_again(source: Checkpoint, unbroken: Walk, tmp_path: Path, kept: int) -> None:
    work = Work(tmp_path / "work")
    with pytest.raises(KilledError):
        stage(source, work, stop_at=4)
    journal = work.folder / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    assert len(lines) == 4
    journal.write_text("".join(lines[:3]) + lines[3].rstrip()[:kept])
    again = Work(tmp_path / "work")
    assert len(again.entries) == 3
    order: list[int] = []
    assert_as(unbroken, stage(source, again, order=order))
    assert order == [3, 4, 5]
    assert len([json.loads(line) for line in journal.read_text().splitlines()]) == 6


@pytest.mark.parametrize("fault", ["gone", "short"])
def test_lost_states_are_an_error(source: Checkpoint, tmp_path: Path, fault: str) -> None:
    with pytest.raises(KilledError):
        stage(source, Work(tmp_path / "work"), stop_at=3)
    states = tmp_path / "work" / "states-1.bin"
    if fault == "gone":
        states.unlink()
    else:
        states.write_bytes(states.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"has lost the hidden states of block 3; move it away") as raised:
        stage(source, Work(tmp_path / "work"))
    assert str(tmp_path / "work") in str(raised.value)


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_finished_walk_opens_again(tiny_model: TinyModel, tmp_path: Path, blocks: int) -> None:
    """A kill between the last block and the manifest: nothing is left to walk, the facts are all there."""
    source = Checkpoint.open(tiny_model("llama", num_hidden_layers=blocks))
    for _ in range(2):
        walk = Walk(source, batches(), Runtime(), Work(tmp_path / "work"))
        for visit in walk:
            visit.done({"index": visit.index})
        assert walk.facts == [{"index": i} for i in range(blocks)]


def test_time_of_earlier_runs_counts(tmp_path: Path) -> None:
    work = Work(tmp_path / "work")
    work.append({"block": 0})
    line = json.loads((work.folder / "journal.jsonl").read_text())
    (work.folder / "journal.jsonl").write_text(json.dumps(sealed(line | {"seconds": 1000.0})) + "\n")
    assert 1000 <= Work(tmp_path / "work").seconds < 1060
    shutil.rmtree(work.folder)
    assert Work(tmp_path / "work").seconds < 60


def test_removed_work_leaves_nothing(tmp_path: Path) -> None:
    work = Work(tmp_path / "work")
    work.append({"value": 0.1 + 0.2})
    assert Work(tmp_path / "work").entries[0]["value"] == 0.1 + 0.2
    work.remove()
    assert not (tmp_path / "work").exists()

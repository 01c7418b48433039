"""LoRA's teacher: the divergence it trains on, and that streaming it changes nothing but memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.families import PRESETS, shape_from_config
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.writer import CheckpointWriter
from edgepress.stages import lora, training
from edgepress.stages.options import Lora
from edgepress.stages.recovery import shapes
from tests.stages.lora_help import Watcher, options, text, weights

pytestmark = pytest.mark.unit

RUNTIME = Runtime()


def test_token_divergence_is_the_textbook_sum() -> None:
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(2, 3, 5, generator=generator), torch.randn(2, 3, 5, generator=generator)
    for b in range(2):
        for t in range(3):
            p, q = teacher[b, t].double().softmax(0), student[b, t].double().softmax(0)
            expected = sum(float(p[i]) * float(torch.log(p[i] / q[i])) for i in range(5))
            assert float(training.token_divergence(student, teacher)[b, t]) == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def divergence_from_root(checkpoint: Checkpoint, ids: Tensor) -> float:
    *_, root = checkpoint.ancestors()
    p = root.model()(input_ids=ids).logits[:, :-1].double().log_softmax(-1)
    q = checkpoint.model()(input_ids=ids).logits[:, :-1].double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_distillation_trains_on_the_divergence_from_the_uncompressed_model(
    masked: Checkpoint, writer: CheckpointWriter, seal: Callable[..., Checkpoint]
) -> None:
    before = divergence_from_root(masked, text().ids)
    assert before > 0.1, "the fixture's parent must be another model"
    chosen = options(distill=1.0, dropout=0.0, held_out=0, learning_rate=2e-2, steps=16)
    pure = lora.run(masked, writer, text(), chosen, RUNTIME)
    assert pure["losses"][0] == pytest.approx(divergence_from_root(masked, text().ids[:4]), rel=1e-3)
    assert divergence_from_root(seal(writer, masked, pattern="2:4"), text().ids) < 0.8 * before
    mixed, plain = (
        lora.run(
            masked,
            CheckpointWriter(writer.folder.with_name(f"share-{share}")),
            text(),
            options(distill=share, dropout=0.0, held_out=0, steps=1),
            RUNTIME,
        )["losses"][0]
        for share in (0.25, 0.0)
    )
    assert mixed == pytest.approx(0.75 * plain + 0.25 * pure["losses"][0], rel=1e-3)


@torch.no_grad()
def test_a_streamed_teacher_gives_the_held_ones_logits(masked: Checkpoint, writer: CheckpointWriter) -> None:
    ids, runtime = text().ids, Runtime(chunk_tokens=48)
    logits = {}
    for kind in ("held", "streamed"):
        chosen = options(distill=1.0, teacher=kind)
        with training.teacher(masked, ids, chosen, runtime, writer.work) as teacher:
            assert teacher is not None
            picked = torch.tensor([9, 0, 15])  # training windows out of order, and the last one held out
            logits[kind] = teacher(ids[picked], picked)
    torch.testing.assert_close(logits["streamed"], logits["held"], rtol=1e-4, atol=1e-4)
    *_, root = masked.ancestors()
    torch.testing.assert_close(logits["held"], root.model()(input_ids=ids[picked]).logits)


def test_only_windows_that_are_read_are_streamed() -> None:
    assert training.visited(16, options(steps=2)) == [*range(8), *range(12, 16)]
    assert training.visited(16, options(steps=60)) == [*range(16)]
    assert training.visited(16, options(steps=3, held_out=0)) == [*range(12)]


def test_without_distillation_there_is_no_teacher(masked: Checkpoint, writer: CheckpointWriter) -> None:
    with training.teacher(masked, text().ids, options(), RUNTIME, writer.work) as teacher:
        assert teacher is None
    assert not (writer.work.folder / "teacher").exists()


class Dies(Watcher):
    """Raises at a step of a task, counted from one."""

    def __init__(self, task: str, step: int) -> None:
        super().__init__()
        self.task, self.left = task, step

    def step(self, **numbers: float | str) -> None:
        if self.planned[-1][0] == self.task:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt


@pytest.fixture(scope="module")
def streamed(masked: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    target = CheckpointWriter(tmp_path_factory.mktemp("streamed"))
    return target.folder, lora.run(masked, target, text(), options(distill=0.5, teacher="streamed"), RUNTIME)


def test_streamed_and_held_train_alike(
    masked: Checkpoint, streamed: tuple[Path, dict[str, Any]], writer: CheckpointWriter
) -> None:
    held = lora.run(masked, writer, text(), options(distill=0.5, teacher="held"), RUNTIME)
    assert streamed[1]["losses"] == pytest.approx(held["losses"], rel=1e-3)
    assert streamed[1]["held_out_losses"] == pytest.approx(held["held_out_losses"], rel=1e-3)


@pytest.mark.parametrize(("task", "step"), [("teacher", 2), ("lora", 1), ("lora", 5)])
def test_an_interrupted_streamed_run_goes_on_to_the_same_bytes(
    task: str, step: int, masked: Checkpoint, streamed: tuple[Path, dict[str, Any]], writer: CheckpointWriter
) -> None:
    chosen = options(distill=0.5, teacher="streamed")
    with pytest.raises(KeyboardInterrupt):
        lora.run(masked, writer, text(), chosen, Runtime(progress=Dies(task, step)))
    watcher = Watcher()
    facts = lora.run(masked, CheckpointWriter(writer.folder), text(), chosen, Runtime(progress=watcher))
    assert watcher.planned[0] == ("teacher", 3 - step if task == "teacher" else 0)
    assert facts["losses"] == streamed[1]["losses"]
    assert weights(writer.folder) == weights(streamed[0])


def test_the_students_memory_holds_no_second_model(
    masked: Checkpoint, writer: CheckpointWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, real = [], Checkpoint.model
    monkeypatch.setattr(Checkpoint, "model", lambda self, *a, **b: loaded.append(self.folder) or real(self, *a, **b))
    lora.run(masked, writer, text(), options(distill=0.5, steps=1, teacher="streamed"), RUNTIME)
    assert loaded == [masked.folder]
    (kept,) = (writer.work.folder / "teacher").glob("states-*.bin")
    assert kept.stat().st_size == (4 + 4) * 16 * 64 * 4  # one step's windows and the held-out ones, float32


def test_auto_streams_what_a_disk_can_take() -> None:
    small = shape_from_config(PRESETS["smollm2-135m"])
    large = shape_from_config(PRESETS["llama-3.1-8b"])
    assert shapes.teacher_kind(small, Lora(distill=0.5)) == "streamed"
    assert shapes.teacher_kind(small, Lora()) == "none"
    assert shapes.teacher_kind(small, Lora(distill=0.5, teacher="held")) == "held"
    assert shapes.teacher_kind(large, Lora(distill=0.5, samples=8192)) == "held"
    assert shapes.teacher_disk_bytes(small, Lora(distill=0.5)) == 2 * 80 * 512 * 576 * 2


def test_the_memory_forecast_follows_the_teacher() -> None:
    shape = shape_from_config(PRESETS["llama-3.2-1b"])
    plain, held, streamed = (
        lora.cost(shape, Lora(distill=share, teacher=kind)).peak_memory_bytes
        for share, kind in ((0, "auto"), (0.5, "held"), (0.5, "streamed"))
    )
    model, outer = shape.parameters_total * 2, sum(t.nbytes for t in shape.outer)
    assert held - plain == pytest.approx(model, rel=0.01)
    assert streamed - plain == outer < model / 3

"""LoRA's teacher: the divergence it trains on, and that streaming it changes nothing but memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import CheckpointError, PlanError
from edgepress.checkpoints.families import PRESETS, shape_from_config
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.writer import CheckpointWriter
from edgepress.stages import depth, lora, training
from edgepress.stages.options import Depth, Lora, decisive
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
            logits[kind], states = teacher(ids[picked], picked)
            assert not states
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
    assert shapes.teacher_disk_bytes(small, Lora(distill=0.5)) == 2 * 148 * 512 * 576 * 2


def test_the_memory_forecast_follows_the_teacher() -> None:
    shape = shape_from_config(PRESETS["llama-3.2-1b"])
    plain, held, streamed = (
        lora.cost(shape, Lora(distill=share, teacher=kind)).peak_memory_bytes
        for share, kind in ((0, "auto"), (0.5, "held"), (0.5, "streamed"))
    )
    model, outer = shape.parameters_total * 2, sum(t.nbytes for t in shape.outer)
    assert held - plain == pytest.approx(model, rel=0.01)
    assert streamed - plain == outer < model / 3


# --- hidden states ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cut(build: Any, seal: Any, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Blocks 1 and 4 of six are gone."""
    source, kept = build("llama"), [0, 2, 3, 5]
    target = CheckpointWriter(tmp_path_factory.mktemp("cut"))
    depth.run(source, target, text(), Depth(layers=",".join(map(str, kept))), RUNTIME)
    made: Checkpoint = seal(target, source, blocks=kept)
    return made


def test_hidden_errors_are_relative_to_each_token() -> None:
    generator = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(3, 2, 4, 8, generator=generator) for _ in range(2))
    teacher[:, :, 0] *= 1000  # as of a first token
    found = training.hidden_errors(list(student), list(teacher))
    for b in range(2):
        for t in range(4):
            expected = 0.0
            for k in range(3):
                difference = [float(student[k, b, t, i]) - float(teacher[k, b, t, i]) for i in range(8)]
                expected += sum(x * x for x in difference) / sum(float(y) ** 2 for y in teacher[k, b, t]) / 3
            assert float(found[b, t]) == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def hidden_by_hand(checkpoint: Checkpoint, ids: Tensor, numbers: list[int]) -> float:
    """By transformers' own hidden states, of which the last one is that after the norm: the blocks' inputs, therefore,
    and of the last block what the norm got."""

    def outputs(model: Any) -> list[Tensor]:
        last: list[Tensor] = []
        model.model.norm.register_forward_pre_hook(lambda _, x: last.append(x[0]))
        return [*model(input_ids=ids, output_hidden_states=True).hidden_states[1:-1], *last]

    *_, root = checkpoint.ancestors()
    found, wanted = outputs(checkpoint.model()), outputs(root.model())
    total = 0.0
    for s, number in zip(found, numbers, strict=True):
        t = wanted[number][:, :-1].double()
        total += float(((s[:, :-1].double() - t).square().sum(-1) / t.square().sum(-1)).mean())
    return total / len(numbers)


@pytest.mark.parametrize("kind", ["held", "streamed"])
def test_the_hidden_states_of_the_blocks_that_are_left_join_the_loss(
    kind: str, cut: Checkpoint, writer: CheckpointWriter, tmp_path: Path
) -> None:
    numbers, ids = [0, 2, 3, 5], text().ids[:4]
    expected = hidden_by_hand(cut, ids, numbers)
    assert expected > 0.05
    first = {}
    for weight in (0.0, 2.0):
        chosen = options(distill=1.0, distill_hidden=weight, teacher=kind, dropout=0.0, held_out=0, steps=1)
        target = CheckpointWriter(tmp_path / f"{weight:g}")
        first[weight] = lora.run(cut, target, text(), chosen, RUNTIME)["losses"][0]
    assert first[2.0] - first[0.0] == pytest.approx(2 * expected, rel=1e-3)


def test_training_brings_the_hidden_states_nearer(
    cut: Checkpoint, writer: CheckpointWriter, seal: Callable[..., Checkpoint]
) -> None:
    numbers, ids = [0, 2, 3, 5], text().ids
    after = {}
    for weight in (0.0, 5.0):
        target = CheckpointWriter(writer.folder.with_name(f"weight-{weight:g}"))
        chosen = options(distill=1.0, distill_hidden=weight, dropout=0.0, held_out=0, learning_rate=1e-2, steps=16)
        lora.run(cut, target, text(), chosen, RUNTIME)
        after[weight] = hidden_by_hand(seal(target, cut, blocks=numbers), ids, numbers)
    assert after[5.0] < 0.9 * after[0.0]
    assert after[5.0] < 0.9 * hidden_by_hand(cut, ids, numbers)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_recomputed_activations_train_alike(method: str, cut: Checkpoint, tmp_path: Path) -> None:
    """The states that the loss sees are those that the gradient goes through."""
    losses = []
    for recomputed in (False, True):
        chosen = options(distill=0.5, distill_hidden=3.0, checkpointing=recomputed, method=method, dropout=0.0, steps=4)
        losses.append(lora.run(cut, CheckpointWriter(tmp_path / str(recomputed)), text(), chosen, RUNTIME)["losses"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.parametrize(("task", "step"), [("teacher", 3), ("teacher", 6), ("lora", 2)])
def test_interrupted_with_hidden_states_it_ends_with_the_same_bytes(
    task: str, step: int, cut: Checkpoint, tmp_path: Path
) -> None:
    chosen = options(distill=0.5, distill_hidden=1.0, teacher="streamed", steps=4)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    facts = lora.run(cut, CheckpointWriter(whole), text(), chosen, RUNTIME)
    with pytest.raises(KeyboardInterrupt):
        lora.run(cut, CheckpointWriter(broken), text(), chosen, Runtime(progress=Dies(task, step)))
    assert lora.run(cut, CheckpointWriter(broken), text(), chosen, RUNTIME)["losses"] == facts["losses"]
    assert weights(broken) == weights(whole)


def test_a_changed_file_of_hidden_states_is_found(cut: Checkpoint, tmp_path: Path) -> None:
    chosen = options(distill=0.5, distill_hidden=1.0, teacher="streamed", steps=4)
    with pytest.raises(KeyboardInterrupt):
        lora.run(cut, CheckpointWriter(tmp_path / "out"), text(), chosen, Runtime(progress=Dies("lora", 2)))
    files = sorted((tmp_path / "out").rglob("after-*.bin"))
    assert [path.name for path in files] == ["after-00000.bin", "after-00002.bin", "after-00003.bin"]
    files[1].write_bytes(files[1].read_bytes()[:-4] + b"oops")
    with pytest.raises(CheckpointError, match=r"after-00002\.bin is not as it was written"):
        lora.run(cut, CheckpointWriter(tmp_path / "out"), text(), chosen, RUNTIME)


def test_hidden_states_are_refused_where_there_is_nothing_to_compare_with(
    cut: Checkpoint, build: Callable[..., Checkpoint], seal: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    asked = Lora(distill=0.5, distill_hidden=1.0)
    with pytest.raises(PlanError, match=r"without --distill there is no teacher; give --distill 0.5"):
        lora.plan(cut.shape, Lora(distill_hidden=1.0))
    with pytest.raises(PlanError, match="a block runs several times here"):
        lora.plan(depth.plan(build("llama").shape, Depth(layers="0-5,4-5")), asked)
    for weight in (-1.0, float("nan"), float("inf")):
        with pytest.raises(PlanError, match=r"--distill-hidden .*: must be 0 or more, and finite"):
            Lora(distill=0.5, distill_hidden=weight)
    source, chosen = build("llama"), options(distill=0.5, distill_hidden=1.0, steps=1)
    for name, blocks, said in (
        ("turned", [0, 3, 2, 5], "the blocks of .* are 0, 3, 2, 5 of .*, not in its order"),
        ("unknown", None, "it is not recorded which blocks"),
    ):
        target = CheckpointWriter(tmp_path / name)
        depth.run(source, target, text(), Depth(layers=",".join(map(str, blocks or [0, 2, 3, 5]))), RUNTIME)
        made = seal(target, source, blocks=blocks)
        with pytest.raises(CheckpointError, match=said):
            lora.run(made, CheckpointWriter(tmp_path / f"{name}-lora"), text(), chosen, RUNTIME)


def test_hidden_states_are_forecast_and_old_stores_stay() -> None:
    shape = shape_from_config(PRESETS["smollm2-135m"])
    plain, asked = Lora(distill=0.5), Lora(distill=0.5, distill_hidden=1.0)
    assert shapes.teacher_disk_bytes(shape, asked) == 16 * shapes.teacher_disk_bytes(shape, plain)
    more = lora.cost(shape, asked).peak_memory_bytes - lora.cost(shape, plain).peak_memory_bytes
    assert more == 2 * 512 * 30 * 576 * 6
    assert "distill_hidden" not in decisive(plain) and decisive(asked)["distill_hidden"] == 1.0

"""Training as its sources do it: loss on answers, rows of their own, schedules, and noise or masks while training."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.families import shape_from_config
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.tokens import IGNORED, TokenBatches, by_length, sample_rows, sample_windows
from edgepress.checkpoints.writer import CheckpointWriter
from edgepress.stages import gptq, lora
from edgepress.stages.options import Gptq, Lora, decisive
from edgepress.stages.recovery.shapes import trainable_parameters
from tests.models import tiny_config
from tests.stages.lora_help import Watcher, options, text, weights

pytestmark = pytest.mark.unit

RUNTIME = Runtime()


def padded_rows() -> TokenBatches:
    """Sixteen rows of 5 to 12 tokens in 16, of which the last three are learnt."""
    whole = text()
    labels = torch.full_like(whole.ids, IGNORED)
    for row in range(16):
        end = 5 + row % 8
        labels[row, end - 3 : end] = whole.ids[row, end - 3 : end]
    return replace(whole, labels=labels)


@torch.no_grad()
def loss_of(checkpoint: Checkpoint, ids: Tensor, labels: Tensor) -> float:
    """One row at a time, one token at a time."""
    model, losses = checkpoint.model(), []
    for row, wanted in zip(ids, labels, strict=True):
        logits = model(input_ids=row[None]).logits[0].log_softmax(-1)
        losses += [-float(logits[t - 1, wanted[t]]) for t in range(1, len(row)) if wanted[t] != IGNORED]
    return sum(losses) / len(losses)


def test_only_labelled_tokens_count_in_loss_and_held_out_checks(masked: Checkpoint, writer: CheckpointWriter) -> None:
    data = padded_rows()
    assert data.labels is not None
    facts = lora.run(masked, writer, data, options(steps=1, save_steps=1, dropout=0.0), RUNTIME)
    expected = loss_of(masked, data.ids[:4], data.labels[:4])
    assert facts["losses"][0] == pytest.approx(expected, rel=1e-4)
    assert facts["losses"][0] != pytest.approx(loss_of(masked, data.ids[:4], data.ids[:4]), rel=3e-4)
    assert facts["tokens"] == sum(5 + row % 8 for row in range(4))


def test_what_follows_the_last_learnt_token_changes_nothing(masked: Checkpoint, tmp_path: Path) -> None:
    data = padded_rows()
    assert data.labels is not None
    ids = data.ids.clone()
    for row, end in enumerate(data.lengths()):
        ids[row, end:] = 7
    runs = {}
    for name, batches in {"one": data, "other": replace(data, ids=ids)}.items():
        writer = CheckpointWriter(tmp_path / name)
        lora.run(masked, writer, batches, options(steps=3), RUNTIME)
        runs[name] = weights(writer.folder)
    assert runs["one"] == runs["other"]


def test_the_teacher_is_asked_about_learnt_tokens_alone(masked: Checkpoint, writer: CheckpointWriter) -> None:
    data = padded_rows()
    assert data.labels is not None
    facts = lora.run(masked, writer, data, options(steps=1, dropout=0.0, distill=1.0), RUNTIME)
    *_, root = masked.ancestors()
    with torch.no_grad():
        p = root.model()(input_ids=data.ids[:4]).logits[:, :-1].double().log_softmax(-1)
        q = masked.model()(input_ids=data.ids[:4]).logits[:, :-1].double().log_softmax(-1)
    divergence = (p.exp() * (p - q)).sum(-1)[data.labels[:4, 1:] != IGNORED].mean()
    assert facts["losses"][0] == pytest.approx(float(divergence), rel=1e-3)


@pytest.mark.parametrize(
    ("asked", "rates"),
    [
        ({"schedule": "constant", "warmup": 0.0}, [5e-3] * 8),
        ({"schedule": "constant", "warmup": 0.5}, [0, 1.25e-3, 2.5e-3, 3.75e-3, 5e-3, 5e-3, 5e-3, 5e-3]),
        ({"schedule": "linear", "warmup": 0.0}, [5e-3 * (8 - step) / 8 for step in range(8)]),
    ],
)
def test_schedule_and_weight_decay(
    asked: dict[str, Any], rates: list[float], masked: Checkpoint, writer: CheckpointWriter
) -> None:
    lora.run(masked, writer, text(), options(**asked, weight_decay=0.25, held_out=0), RUNTIME)
    saved = writer.work.folder / "checkpoint-8"
    history = json.loads((saved / "trainer_state.json").read_text())["log_history"]
    assert [entry["learning_rate"] for entry in history if "loss" in entry] == pytest.approx(rates)
    groups = torch.load(saved / "optimizer.pt", weights_only=True)["param_groups"]
    assert {group["weight_decay"] for group in groups if group["params"]} == {0.25}


def test_a_mask_of_everything_trains_a_model_without_attention(masked: Checkpoint, writer: CheckpointWriter) -> None:
    facts = lora.run(masked, writer, text(), options(steps=1, dropout=0.0, mask=1 - 1e-9), RUNTIME)
    model = masked.model()
    for name, parameter in model.named_parameters():
        if "o_proj" in name:
            parameter.data.zero_()
    ids = text().ids[:4]
    with torch.no_grad():
        expected = F.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert facts["losses"][0] == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("asked", [{"noise": 0.5}, {"mask": 0.3}, {"noise": 0.5, "mask": 0.3, "checkpointing": True}])
def test_disturbed_training_resumes_to_the_same_bytes(
    asked: dict[str, Any], masked: Checkpoint, tmp_path: Path
) -> None:
    whole, cut = CheckpointWriter(tmp_path / "whole"), CheckpointWriter(tmp_path / "cut")
    facts = lora.run(masked, whole, text(), options(**asked, targets="all"), RUNTIME)
    plain = lora.run(masked, CheckpointWriter(tmp_path / "plain"), text(), options(targets="all"), RUNTIME)
    assert facts["losses"][0] != pytest.approx(plain["losses"][0], rel=1e-4)
    with pytest.raises(KeyboardInterrupt):
        lora.run(masked, cut, text(), options(**asked, targets="all"), Runtime(progress=Watcher(5)))
    again = lora.run(masked, CheckpointWriter(cut.folder), text(), options(**asked, targets="all"), RUNTIME)
    assert again["losses"] == facts["losses"]
    assert weights(cut.folder) == weights(whole.folder)


def test_noise_that_an_adapter_would_not_see_is_refused() -> None:
    shape = shape_from_config(tiny_config("phi3"))
    with pytest.raises(PlanError, match="gate_up_proj"):
        lora.plan(shape, Lora(noise=0.1))
    assert lora.plan(shape, Lora(noise=0.1, targets="qkv_proj,down_proj")) == shape


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"loss": "answer"}, "--lora-loss answer"),
        ({"packing": "row"}, "--lora-packing row"),
        ({"schedule": "constnat"}, "constant"),
        ({"warmup": 1.0}, "--lora-warmup"),
        ({"weight_decay": -1.0}, "--lora-weight-decay"),
        ({"noise": float("inf")}, "--train-noise"),
        ({"mask": 1.0}, "--train-mask"),
        ({"method": "loftq", "loftq_steps": -1}, "--loftq-steps -1: cannot be negative"),
        ({"method": "qlora", "loftq_steps": 2}, "--loftq-steps 2: --recover qlora takes no such turns"),
    ],
)
def test_values_that_cannot_be(asked: dict[str, Any], says: str) -> None:
    with pytest.raises(PlanError, match=says):
        Lora(**asked)


def test_defaults_are_no_part_of_a_fingerprint() -> None:
    later = {"loss", "packing", "schedule", "warmup", "weight_decay", "noise", "mask"}
    assert not later & decisive(Lora()).keys()
    changed = Lora(loss="answers", packing="rows", schedule="linear", warmup=0.0, weight_decay=0.1, noise=0.1, mask=0.1)
    assert later <= decisive(changed).keys()
    # One turn is what loftq did before it had more; without loftq there are none.
    assert not any("loftq_steps" in decisive(Lora(method=m, loftq_steps=n)) for m, n in (("loftq", 1), ("qlora", 0)))
    assert decisive(Lora(method="loftq"))["loftq_steps"] == 5 == Lora(method="rslora+loftq").loftq_steps


# --- all weights ------------------------------------------------------------------------------------------------------


def plain_steps(checkpoint: Checkpoint, ids: Tensor, steps: int) -> dict[str, Tensor]:
    """AdamW by torch alone in float32 with a constant rate, gradients clipped at 1 and zeros put back."""
    model = checkpoint.model(dtype=torch.float32).requires_grad_(True)
    zeros = {n: p == 0 for n, p in model.named_parameters() if "proj" in n}
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    for step in range(steps):
        batch = ids[4 * step : 4 * step + 4]
        logits = model(input_ids=batch).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()).backward()
        for name, parameter in model.named_parameters():
            if name in zeros:
                parameter.grad.masked_fill_(zeros[name], 0)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


FULL: dict[str, Any] = {
    **{"method": "full", "targets": "all", "micro_batch": 4, "held_out": 0},
    **{"learning_rate": 1e-3, "schedule": "constant", "warmup": 0.0},
}


def test_all_weights_take_the_optimisers_steps_and_zeros_stay(
    masked: Checkpoint, writer: CheckpointWriter, seal: Callable[..., Checkpoint]
) -> None:
    facts = lora.run(masked, writer, text(), options(**FULL, steps=2), RUNTIME)
    expected = plain_steps(masked, text().ids, 2)
    assert (
        facts["trainable_parameters"]
        == masked.shape.parameters_total
        == trainable_parameters(masked.shape, options(**FULL))
    )
    found = seal(writer, masked, pattern="2:4")
    outer = found.outer()
    compared = 0
    for name, wanted in expected.items():
        if name in outer:
            got, before = outer[name], masked.outer()[name]
        else:
            index, _, own = name.removeprefix("model.layers.").partition(".")
            got, before = found.block(int(index))[own], masked.block(int(index))[own]
        torch.testing.assert_close(got.float(), wanted.to(got.dtype).float(), rtol=1e-3, atol=2e-5)
        assert not torch.equal(got, before), name
        if "proj" in name:
            assert bool((got[before == 0] == 0).all())
        compared += got.numel()
    assert compared == masked.shape.parameters_total


@pytest.mark.parametrize("die_at", [5, 8])
def test_training_of_all_weights_resumes_to_the_same_bytes(die_at: int, masked: Checkpoint, tmp_path: Path) -> None:
    chosen = options(method="full", targets="all", learning_rate=1e-3, weight_decay=0.1)
    whole, cut = CheckpointWriter(tmp_path / "whole"), CheckpointWriter(tmp_path / "cut")
    facts = lora.run(masked, whole, text(), chosen, RUNTIME)
    assert facts["losses"][-1] < facts["losses"][0]
    with pytest.raises(KeyboardInterrupt):
        lora.run(masked, cut, text(), chosen, Runtime(progress=Watcher(die_at)))
    again = lora.run(masked, CheckpointWriter(cut.folder), text(), chosen, RUNTIME)
    assert again["losses"] == facts["losses"]
    assert weights(cut.folder) == weights(whole.folder)


def test_all_weights_killed_before_they_are_written(
    masked: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = options(method="full", targets="all", learning_rate=1e-3)
    whole, cut = CheckpointWriter(tmp_path / "whole"), CheckpointWriter(tmp_path / "cut")
    lora.run(masked, whole, text(), chosen, RUNTIME)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "write_block", killed)
        with pytest.raises(KeyboardInterrupt):
            lora.run(masked, cut, text(), chosen, RUNTIME)
    watcher = Watcher()
    lora.run(masked, CheckpointWriter(cut.folder), text(), chosen, Runtime(progress=watcher))
    assert watcher.steps == []
    assert weights(cut.folder) == weights(whole.folder)


def test_what_full_fine_tuning_cannot_do_is_refused() -> None:
    with pytest.raises(PlanError, match="every parameter; leave out --lora-targets q_proj"):
        lora.plan(shape_from_config(tiny_config("llama")), Lora(method="full", targets="q_proj"))
    with pytest.raises(PlanError, match="it goes with no setting"):
        Lora(method="full+qlora")
    quantised = gptq.plan(shape_from_config(tiny_config("llama")), Gptq(group=32))
    with pytest.raises(PlanError, match="--recover qlora"):
        lora.plan(quantised, Lora(method="full"))


# --- rows and windows -------------------------------------------------------------------------------------------------


def test_rows_are_cut_padded_and_drawn_only_where_something_is_learnt() -> None:
    rows = [([n] * n, n // 2) for n in range(2, 40)]
    drawn = sample_rows("rows", rows, 100, 16, torch.Generator().manual_seed(0))
    assert drawn.labels is not None
    assert sorted(drawn.ids[:, 0].tolist()) == list(range(2, 32))  # from 32 on the first 16 are what was asked
    for ids, labels, length in zip(drawn.ids, drawn.labels, drawn.lengths(), strict=True):
        n = int(ids[0])
        assert length == min(n, 16)
        assert ids.tolist() == [n] * length + [0] * (16 - length)
        start = max(1, n // 2)
        assert labels.tolist() == [IGNORED] * start + [n] * (length - start) + [IGNORED] * (16 - length)


def test_windows_have_something_to_learn() -> None:
    ids = torch.arange(200)
    labels = torch.where(ids % 50 < 5, ids, IGNORED)
    drawn = sample_windows("windows", ids, 20, 8, torch.Generator().manual_seed(0), labels)
    assert drawn.labels is not None and 4 <= len(drawn.ids) < 20
    for window, wanted in zip(drawn.ids, drawn.labels, strict=True):
        assert wanted.tolist() == [int(x) if x % 50 < 5 else IGNORED for x in window]
        assert bool((wanted[1:] != IGNORED).any())


def test_rows_of_like_length_are_in_one_batch() -> None:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 500, (64,), generator=generator).tolist()
    order = by_length(lengths, 4, generator).tolist()
    assert sorted(order) == list(range(64))
    assert lengths[order[0]] == max(lengths)

    def spread(rows: list[int]) -> int:
        batches = [[lengths[row] for row in rows[i : i + 4]] for i in range(0, 64, 4)]
        return sum(max(batch) - min(batch) for batch in batches)

    assert spread(order) < spread(list(range(64))) / 2
    assert order != sorted(range(64), key=lambda row: -lengths[row])  # some of the shuffling is left

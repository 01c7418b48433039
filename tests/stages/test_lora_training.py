"""LoRA's training: it resumes to the same bytes, stops in time, and says what went wrong."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from checkpoints.checkpoint import Checkpoint
from checkpoints.errors import NumericsError, TextError
from checkpoints.runtime import Runtime
from checkpoints.tokens import TokenBatches
from checkpoints.writer import CheckpointWriter
from stages import lora, training
from tests.stages.lora_help import Watcher, mean_loss, options, text, weights

pytestmark = pytest.mark.unit

RUNTIME = Runtime()


def test_same_inputs_same_bytes_and_another_seed_others(
    masked: Checkpoint, finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, facts = finished
    torch.manual_seed(99)  # whatever the caller's state is
    again = CheckpointWriter(tmp_path / "again")
    assert lora.run(masked, again, text(), options(), RUNTIME)["losses"] == facts["losses"]
    assert weights(again.folder) == weights(folder)
    other = CheckpointWriter(tmp_path / "other")
    assert lora.run(masked, other, text(), options(), Runtime(seed=1))["losses"] != facts["losses"]
    assert weights(other.folder) != weights(folder)


def test_the_callers_random_states_stay_as_they_were(masked: Checkpoint, tmp_path: Path) -> None:
    torch.manual_seed(11), random.seed(12), np.random.seed(13)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()
    lora.run(masked, CheckpointWriter(tmp_path / "whole"), text(), options(steps=3), RUNTIME)
    runtime = Runtime(progress=Watcher(die_at=2))
    with pytest.raises(KeyboardInterrupt):
        lora.run(masked, CheckpointWriter(tmp_path / "cut"), text(), options(steps=3), runtime)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    for now, then in zip(np.random.get_state(), before[2], strict=True):
        assert np.array_equal(now, then)


@pytest.mark.parametrize("die_at", [2, 5, 7, 8])
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    die_at: int, masked: Checkpoint, finished: tuple[Path, dict[str, Any]], writer: CheckpointWriter
) -> None:
    """Steps are saved at 3, 6 and the last, 8; with dropout, the random state has to come back as well."""
    with pytest.raises(KeyboardInterrupt):
        lora.run(masked, writer, text(), options(), Runtime(progress=Watcher(die_at)))
    assert not list(writer.folder.glob("*.safetensors"))
    watcher = Watcher()
    facts = lora.run(masked, CheckpointWriter(writer.folder), text(), options(), Runtime(progress=watcher))
    saved = (die_at - 1) // 3 * 3
    assert watcher.planned == [("lora", 8 - saved)]
    assert [numbers["step"] for numbers in watcher.steps] == [f"{step}/8" for step in range(saved + 1, 9)]
    assert facts["losses"] == finished[1]["losses"]
    assert weights(writer.folder) == weights(finished[0])


def test_killed_after_the_last_saved_step_only_the_merge_is_left(
    masked: Checkpoint,
    finished: tuple[Path, dict[str, Any]],
    writer: CheckpointWriter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "write_block", killed)
        with pytest.raises(KeyboardInterrupt):
            lora.run(masked, writer, text(), options(), RUNTIME)
    watcher = Watcher()
    facts = lora.run(masked, CheckpointWriter(writer.folder), text(), options(), Runtime(progress=watcher))
    assert watcher.planned == [("lora", 0)]
    assert watcher.steps == []
    assert facts["losses"] == finished[1]["losses"]
    assert weights(writer.folder) == weights(finished[0])


def test_a_half_written_step_is_ignored(
    masked: Checkpoint, finished: tuple[Path, dict[str, Any]], writer: CheckpointWriter
) -> None:
    with pytest.raises(KeyboardInterrupt):
        lora.run(masked, writer, text(), options(), Runtime(progress=Watcher(7)))
    work = writer.work.folder
    assert sorted(p.name for p in work.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]
    (work / "checkpoint-6" / "complete").unlink()
    (work / "checkpoint-6" / "adapter_model.safetensors").write_bytes(b"cut short")
    watcher = Watcher()
    lora.run(masked, CheckpointWriter(writer.folder), text(), options(), Runtime(progress=watcher))
    assert watcher.planned == [("lora", 5)]
    assert weights(writer.folder) == weights(finished[0])


def test_last_whole_step_compares_numbers_and_removes_halves(tmp_path: Path) -> None:
    assert training.last_whole_step(tmp_path) is None
    for step in (8, 12, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for step in (8, 12):
        (tmp_path / f"checkpoint-{step}" / "complete").touch()
    assert training.last_whole_step(tmp_path) == tmp_path / "checkpoint-12"
    assert not (tmp_path / "checkpoint-100").exists()


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite_stops_and_names_the_step(
    what: str, masked: Checkpoint, writer: CheckpointWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    real, calls = LlamaForCausalLM.forward, []

    def spoilt(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = real(self, *args, **kwargs)
        calls.append(0)
        if len(calls) == 2 * 5 + 1:  # two micro-batches a step: the sixth step, which would be saved
            if what == "loss":
                output["loss"] = output["loss"] * float("nan")
            else:
                output["loss"].register_hook(lambda gradient: gradient * float("nan"))
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", spoilt)
    with pytest.raises(NumericsError, match=f"training {what} became nan at step 6; the last saved step is kept"):
        lora.run(masked, writer, text(), options(held_out=0), RUNTIME)
    saved = training.last_whole_step(writer.work.folder)
    assert saved is not None
    assert saved.name == "checkpoint-3"


def test_it_stops_when_the_held_out_loss_rises_and_merges_the_best_step(
    masked: Checkpoint, writer: CheckpointWriter, seal: Callable[..., Checkpoint]
) -> None:
    # Twelve windows to learn by heart, four of noise that learning them cannot help.
    noise = torch.randint(3, 500, (4, 16), generator=torch.Generator().manual_seed(8))
    windows = TokenBatches("mixed", torch.cat([text(12).ids, noise]))
    chosen = options(steps=60, learning_rate=3e-2, save_steps=2, held_out=4, patience=2, dropout=0.0)
    facts = lora.run(masked, writer, windows, chosen, RUNTIME)
    checks = {int(step): loss for step, loss in facts["held_out_losses"].items()}
    assert facts["steps"] < 60
    assert facts["kept_step"] == min(checks, key=lambda step: checks[step])
    assert [step for step in checks if step > facts["kept_step"]] == [facts["steps"] - 2, facts["steps"]]
    merged = seal(writer, masked, pattern="2:4")
    assert mean_loss(merged, noise) == pytest.approx(checks[facts["kept_step"]], rel=1e-4)


def test_killed_after_it_stopped_early_the_best_step_is_merged_all_the_same(
    masked: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = torch.randint(3, 500, (4, 16), generator=torch.Generator().manual_seed(8))
    windows = TokenBatches("mixed", torch.cat([text(12).ids, noise]))
    chosen = options(steps=60, learning_rate=3e-2, save_steps=2, held_out=4, patience=2)
    whole = CheckpointWriter(tmp_path / "whole")
    facts = lora.run(masked, whole, windows, chosen, RUNTIME)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    broken = CheckpointWriter(tmp_path / "broken")
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "write_block", killed)
        with pytest.raises(KeyboardInterrupt):
            lora.run(masked, broken, windows, chosen, RUNTIME)
    again = lora.run(masked, CheckpointWriter(broken.folder), windows, chosen, RUNTIME)
    assert again["kept_step"] == facts["kept_step"] and again["steps"] == facts["steps"]
    assert weights(broken.folder) == weights(whole.folder)

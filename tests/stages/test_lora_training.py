"""LoRA's training: it resumes to the same bytes, stops in time, and says what went wrong."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import CheckpointError, NumericsError, TextError
from edgepress.checkpoints.manifest import describe_files
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.tokens import TokenBatches
from edgepress.checkpoints.walk import Work
from edgepress.checkpoints.writer import CheckpointWriter
from edgepress.stages import lora, training
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
    work = Work(tmp_path / "work")
    assert training.last_whole_step(work) is None
    for step in (8, 12, 100, 120):
        (work.folder / f"checkpoint-{step}").mkdir()
    for step in (8, 12, 100):
        work.append({"step": step, "saved": {}})
    for step in (8, 12, 120):
        (work.folder / f"checkpoint-{step}" / "complete").touch()
    assert training.last_whole_step(work) == work.folder / "checkpoint-12"
    assert not (work.folder / "checkpoint-100").exists()  # not complete
    assert not (work.folder / "checkpoint-120").exists()  # the journal knows nothing of it


@pytest.mark.parametrize("fault", ["flipped", "gone", "more"])
def test_a_saved_step_that_was_changed_is_refused_by_name(tmp_path: Path, fault: str) -> None:
    work = Work(tmp_path / "work")
    for step in (8, 12):
        folder = work.folder / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "adapter.safetensors").write_bytes(b"weights")
        work.append({"step": step, "saved": training._hashes(folder)})
        (folder / "complete").touch()
    assert training.last_whole_step(Work(work.folder)) == work.folder / "checkpoint-12"
    # The older step too: its adapter may be the best one, which is read at the end.
    file = work.folder / "checkpoint-8" / "adapter.safetensors"
    if fault == "flipped":
        file.write_bytes(b"weightz")
    elif fault == "gone":
        file.unlink()
    else:
        file.with_name("optimizer.pt").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"checkpoint-8/\S+ is not as it was saved; move \S+ away"):
        training.last_whole_step(Work(work.folder))


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
    with pytest.raises(NumericsError) as caught:
        lora.run(masked, writer, text(), options(held_out=0), RUNTIME)
    saved = training.last_whole_step(writer.work)
    assert saved == writer.work.folder / "checkpoint-3"
    assert str(caught.value) == (
        f"the training {what} became nan at step 6; the adapter of step 3, the last good one, is kept in {saved}. "
        "Lower --lora-lr"
    )
    assert bool(load_file(saved / "adapter_model.safetensors"))
    assert not list(writer.folder.glob("*.safetensors"))


def test_a_loss_that_is_not_finite_before_any_saved_step(
    masked: Checkpoint, writer: CheckpointWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "token_divergence", lambda q, p: (q * float("nan")).sum(-1))
    with pytest.raises(NumericsError, match="training loss became nan at step 1; no step was saved before it"):
        lora.run(masked, writer, text(), options(distill=0.5), RUNTIME)


def test_a_held_out_loss_that_is_not_finite_stops_as_well(
    masked: Checkpoint, writer: CheckpointWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    real, checks = LlamaForCausalLM.forward, []

    def spoilt(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = real(self, *args, **kwargs)
        if not self.training:
            checks.append(0)
            if len(checks) > 2:  # two micro-batches of the first check were fine
                output["loss"] = output["loss"] * float("inf")
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", spoilt)
    with pytest.raises(
        NumericsError, match=r"held-out loss became inf at step 6; the adapter of step 3, the last good"
    ):
        lora.run(masked, writer, text(), options(), RUNTIME)


@pytest.mark.parametrize(("windows", "held_out"), [(7, 4), (3, 0)])
def test_windows_that_yield_no_batch(windows: int, held_out: int, masked: Checkpoint, writer: CheckpointWriter) -> None:
    with pytest.raises(TextError) as caught:
        lora.run(masked, writer, text(windows), options(held_out=held_out), RUNTIME)
    assert f"'counting' yields no batch: it has {windows} windows of 16 tokens" in str(caught.value)
    assert f"--lora-batch 4 with {held_out} held out needs {4 + held_out}" in str(caught.value)
    training.require_a_batch("just enough", 8, options(held_out=4))


@pytest.mark.parametrize("windows", [8, 9, 12, 13])
def test_fewer_windows_than_asked_for_make_fewer_steps_and_an_exact_count_of_tokens(
    windows: int, masked: Checkpoint, writer: CheckpointWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    real, seen = LlamaForCausalLM.forward, []

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.training:
            seen.append(kwargs["input_ids"].numel())
        return real(self, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", counted)
    chosen = options(steps=0, epochs=2, samples=100, held_out=4)
    facts = lora.run(masked, writer, text(windows), chosen, RUNTIME)
    assert facts["steps"] == 2 * ((windows - 4) // 4)
    assert facts["tokens"] == sum(seen)
    assert facts["tokens_per_second"] == pytest.approx(facts["tokens"] / facts["training_seconds"])
    assert 0 < facts["training_seconds"] < 60


def test_the_curve_is_said_and_kept_beside_the_weights(masked: Checkpoint, tmp_path: Path) -> None:
    from PIL import Image

    watcher, target = Watcher(), CheckpointWriter(tmp_path / "a")
    facts = lora.run(masked, target, text(), options(), Runtime(progress=watcher))
    kept = json.loads((target.folder / "loss.json").read_text())
    assert kept["training"] == facts["losses"]
    assert kept["held_out"] == facts["held_out_losses"]
    assert kept["kept_step"] == facts["kept_step"]
    with Image.open(target.folder / "loss.png") as image:
        assert image.size == (960, 540)
    assert {"loss.json", "loss.png"} <= describe_files(target.folder).keys()
    summary, counts = watcher.said[-2:]
    assert f"{facts['tokens']} tokens, {facts['tokens_per_second']:.0f} tokens/s" in summary
    assert "held-out loss" in watcher.said[-3] and f"{facts['trainable_parameters']:,} parameters trained" in counts
    assert f"step {facts['kept_step']} is kept" in watcher.said[-2]
    again = CheckpointWriter(tmp_path / "b")
    lora.run(masked, again, text(), options(), RUNTIME)
    for name in ("loss.json", "loss.png"):
        assert (again.folder / name).read_bytes() == (target.folder / name).read_bytes()


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

"""LoRA through the mask: the formula, its gradients, the merge, and training that resumes to the same bytes."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from checkpoints.checkpoint import Checkpoint
from checkpoints.errors import NumericsError, PlanError
from checkpoints.families import PRESETS, shape_from_config
from checkpoints.nm import holds
from checkpoints.quiet import quiet_import
from checkpoints.runtime import Runtime, Silent
from checkpoints.shape import Pattern
from checkpoints.tokens import TokenBatches
from checkpoints.writer import CheckpointWriter
from stages import gptq, lora
from stages.options import Gptq, Lora

pytestmark = pytest.mark.unit

RUNTIME = Runtime()


class Watcher(Silent):
    """Remembers every number, and raises when a step is reported that a test wants to be the last."""

    def __init__(self, die_at: int = 0) -> None:
        self.die_at, self.steps, self.planned = die_at, [], []

    def start(self, task: str, steps: int) -> None:
        self.planned.append((task, steps))

    def step(self, **numbers: float | str) -> None:
        self.steps.append(numbers)
        if numbers.get("step", "").split("/")[0] == str(self.die_at):
            raise KeyboardInterrupt


# --- one layer ------------------------------------------------------------------------------------------------------


def peft_layer(dropout: float = 0.0, bias: bool = True) -> Any:
    """peft's own layer around a small linear layer with zeros in it, A and B random, masked by our code."""
    with quiet_import():
        from peft import LoraConfig, get_peft_model
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential()
    model.add_module("it", torch.nn.Linear(16, 12, bias=bias))
    weight = torch.randn(12, 16, generator=generator)
    weight[torch.rand(12, 16, generator=generator) < 0.5] = 0
    model.it.weight.data = weight
    config = LoraConfig(r=3, lora_alpha=12, lora_dropout=dropout, target_modules=["it"])
    with quiet_import():
        model = get_peft_model(model, config)
    (layer,) = lora.adapted_layers(model).values()
    layer.lora_A["default"].weight.data = torch.randn(3, 16, generator=generator)
    layer.lora_B["default"].weight.data = torch.randn(12, 3, generator=generator)
    lora.train_through_mask(layer)
    return layer


def by_hand(layer: Any) -> tuple[Tensor, Tensor]:
    """W and the masked s B A, entry by entry; s = alpha / r = 4."""
    W = layer.base_layer.weight.detach()
    A, B = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
    delta = torch.zeros_like(W)
    for i in range(W.shape[0]):
        for j in range(W.shape[1]):
            if W[i, j] != 0:
                delta[i, j] = 4 * sum(B[i, k] * A[k, j] for k in range(3))
    return W, delta


def test_delta_is_the_masked_product() -> None:
    layer = peft_layer()
    W, delta = by_hand(layer)
    torch.testing.assert_close(lora.masked_delta(layer).detach(), delta)
    assert bool((lora.masked_delta(layer)[W == 0] == 0).all())
    del layer.nm_mask
    plain = 4 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    assert torch.equal(lora.masked_delta(layer), plain)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dropout", "training"), [(0.0, True), (0.0, False), (0.5, False)])
def test_forward_computes_with_the_effective_weight(dropout: float, training: bool, bias: bool) -> None:
    layer = peft_layer(dropout, bias).train(training)
    W, delta = by_hand(layer)
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(layer(x).detach(), F.linear(x, W + delta, layer.base_layer.bias).detach())


def test_dropout_acts_on_the_input_of_the_adapter_alone() -> None:
    layer = peft_layer(dropout=0.5).train()
    W, delta = by_hand(layer)
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        y = layer(x).detach()
        torch.manual_seed(7)
        dropped = F.dropout(x, 0.5)
    expected = F.linear(x, W, layer.base_layer.bias) + F.linear(dropped, delta)
    torch.testing.assert_close(y, expected.detach())
    assert not torch.allclose(y, F.linear(x, W + delta, layer.base_layer.bias))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradients_equal_autograd_of_the_explicit_effective_weight(dropout: float) -> None:
    layer = peft_layer(dropout).train()
    x = torch.randn(7, 16, generator=torch.Generator().manual_seed(1))
    goal = torch.randn(7, 12, generator=torch.Generator().manual_seed(2))
    W = layer.base_layer.weight.detach()
    A = layer.lora_A["default"].weight.detach().clone().requires_grad_()
    B = layer.lora_B["default"].weight.detach().clone().requires_grad_()
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        ((layer(mine) - goal) ** 2).sum().backward()
        torch.manual_seed(3)
        kept = F.dropout(torch.ones_like(x), dropout) if dropout else torch.ones_like(x)
    mask = (W != 0).float()
    y = theirs @ W.T + (theirs * kept) @ ((4 * (B @ A)) * mask).T + layer.base_layer.bias.detach()
    ((y - goal) ** 2).sum().backward()
    torch.testing.assert_close(layer.lora_A["default"].weight.grad, A.grad, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(layer.lora_B["default"].weight.grad, B.grad, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-3)
    assert layer.base_layer.weight.grad is None


# --- the stage ------------------------------------------------------------------------------------------------------


def text(samples: int = 16, length: int = 16) -> TokenBatches:
    """Counting by one: something to learn."""
    starts = torch.arange(samples) * 13 % 40 + 3
    return TokenBatches("counting", starts[:, None] + torch.arange(length))


def options(**changes: Any) -> Lora:
    fields = {"rank": 4, "alpha": 8, "steps": 8, "samples": 16, "length": 16, "batch": 4, "micro_batch": 2}
    return Lora(**(fields | {"dropout": 0.1, "learning_rate": 5e-3, "save_steps": 3} | changes))


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


@pytest.fixture(scope="module")
def finished(masked: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """An undisturbed run."""
    target = CheckpointWriter(tmp_path_factory.mktemp("finished"))
    return target.folder, lora.run(masked, target, text(), options(), RUNTIME)


def mean_loss(checkpoint: Checkpoint, ids: Tensor) -> float:
    with torch.no_grad():
        logits = checkpoint.model()(input_ids=ids).logits
    return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))


def test_it_lowers_the_loss_of_the_merged_model_and_keeps_the_mask_bit_for_bit(
    masked: Checkpoint, writer: CheckpointWriter, seal: Callable[..., Checkpoint]
) -> None:
    facts = lora.run(masked, writer, text(), options(learning_rate=2e-2), RUNTIME)
    merged = seal(writer, masked, pattern="2:4")
    assert len(facts["losses"]) == facts["steps"] == 8
    assert facts["tokens"] == 8 * 4 * 16
    before, after = mean_loss(masked, text().ids), mean_loss(merged, text().ids)
    assert after < 0.9 * before
    changed = 0
    for index, block in enumerate(masked.shape.blocks):
        old, new = masked.block(index), merged.block(index)
        for linear in block.linears:
            key = f"{linear.name}.weight"
            assert torch.equal(new[key] == 0, old[key] == 0)
            assert holds(new[key], Pattern(2, 4))
            changed += not torch.equal(new[key], old[key])
        for key in old.keys() - {f"{x.name}.weight" for x in block.linears}:
            assert torch.equal(new[key], old[key])
    assert changed == 4 * 3  # q, k, v, o of three blocks, and nothing else
    widths = {"q_proj": (64, 64), "k_proj": (32, 64), "v_proj": (32, 64), "o_proj": (64, 64)}
    assert facts["trainable_parameters"] == 3 * sum(4 * (o + i) for o, i in widths.values())


def test_the_first_loss_is_that_of_the_model_as_it_came(masked: Checkpoint, writer: CheckpointWriter) -> None:
    # B starts at zero, windows come in order, and the loss of a step is the mean over its accumulated batches.
    facts = lora.run(masked, writer, text(), options(steps=2, learning_rate=1e-9), RUNTIME)
    ids = text().ids
    assert facts["losses"] == pytest.approx([mean_loss(masked, ids[:4]), mean_loss(masked, ids[4:8])], rel=1e-4)


def test_the_last_loss_is_that_of_the_merged_model(
    masked: Checkpoint, writer: CheckpointWriter, seal: Callable[..., Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is merged is what was trained: the model in training and the merged one give the same logits."""
    seen: dict[str, Tensor] = {}
    real = lora.train

    def spy(model: Any, *rest: Any) -> list[float]:
        losses = real(model, *rest)
        with torch.no_grad():
            seen["logits"] = model.eval()(input_ids=text().ids).logits
        return losses

    monkeypatch.setattr(lora, "train", spy)
    lora.run(masked, writer, text(), options(), RUNTIME)
    merged = seal(writer, masked, pattern="2:4")
    with torch.no_grad():
        logits = merged.model()(input_ids=text().ids).logits
        start = masked.model()(input_ids=text().ids).logits
    torch.testing.assert_close(logits, seen["logits"], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits, start, atol=0.1)


def test_without_a_mask_every_weight_of_the_targets_may_change(
    build: Callable[..., Checkpoint], writer: CheckpointWriter, seal: Callable[..., Checkpoint]
) -> None:
    source = build("llama", blocks=3)
    lora.run(source, writer, text(), options(targets="all", steps=3), RUNTIME)
    merged = seal(writer, source)
    for index, block in enumerate(source.shape.blocks):
        old, new = source.block(index), merged.block(index)
        for linear in block.linears:
            delta = new[f"{linear.name}.weight"] - old[f"{linear.name}.weight"]
            assert bool(delta.any())
            singular = torch.linalg.svdvals(delta.double())
            assert float(singular[4]) < 1e-4 * float(singular[0])  # rank 4
    assert mean_loss(merged, text().ids) < mean_loss(source, text().ids)


def test_activation_checkpointing_changes_nothing_but_memory(masked: Checkpoint, tmp_path: Path) -> None:
    losses = {}
    for on in (False, True):
        target, chosen = CheckpointWriter(tmp_path / str(on)), options(dropout=0, checkpointing=on)
        losses[on] = lora.run(masked, target, text(), chosen, RUNTIME)["losses"]
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)


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
    assert lora.last_whole_step(tmp_path) is None
    for step in (8, 12, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for step in (8, 12):
        (tmp_path / f"checkpoint-{step}" / "complete").touch()
    assert lora.last_whole_step(tmp_path) == tmp_path / "checkpoint-12"
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
    saved = lora.last_whole_step(writer.work.folder)
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


def test_token_divergence_is_the_textbook_sum() -> None:
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(2, 3, 5, generator=generator), torch.randn(2, 3, 5, generator=generator)
    for b in range(2):
        for t in range(3):
            p, q = teacher[b, t].double().softmax(0), student[b, t].double().softmax(0)
            expected = sum(float(p[i]) * float(torch.log(p[i] / q[i])) for i in range(5))
            assert float(lora.token_divergence(student, teacher)[b, t]) == pytest.approx(expected, rel=1e-5)


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


# --- plans ----------------------------------------------------------------------------------------------------------


def test_targets() -> None:
    shape = shape_from_config(PRESETS["smollm2-135m"])
    assert lora.target_names(shape, Lora()) == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert lora.target_names(shape, Lora(targets="up_proj, down_proj")) == ["up_proj", "down_proj"]
    every = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert lora.target_names(shape, Lora(targets="all")) == every
    with pytest.raises(PlanError) as caught:
        lora.plan(shape, Lora(targets="q_proj,qkv,wo"))
    assert str(caught.value) == (
        "--lora-targets qkv,wo: this model's blocks have down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    )
    fused = shape_from_config(PRESETS["smollm2-135m"] | {"model_type": "phi3"})
    assert lora.target_names(fused, Lora()) == ["qkv_proj", "o_proj"]
    with pytest.raises(PlanError, match="--lora-targets q_proj: this model's blocks have down_proj, gate_up_proj"):
        lora.target_names(fused, Lora(targets="q_proj"))


def test_plan_keeps_the_shape_and_refuses_quantised_weights() -> None:
    shape = shape_from_config(PRESETS["smollm2-135m"])
    assert lora.plan(shape, Lora()) == shape
    with pytest.raises(PlanError, match="Put lora before gptq"):
        lora.plan(gptq.plan(shape, Gptq()), Lora())

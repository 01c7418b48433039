"""LoRA through the mask: the formula, its gradients, the merge, and what planning refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.families import PRESETS, shape_from_config
from edgepress.checkpoints.masks import holds
from edgepress.checkpoints.quiet import quiet_import
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.shape import Pattern
from edgepress.checkpoints.writer import CheckpointWriter
from edgepress.stages import gptq, lora, training
from edgepress.stages.options import Gptq, Lora
from edgepress.stages.recovery import lora as low_rank
from tests.stages.lora_help import mean_loss, options, text

pytestmark = pytest.mark.unit

RUNTIME = Runtime()


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
    low_rank.start(layer, layer.base_layer.weight != 0)
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
    torch.testing.assert_close(low_rank.masked_delta(layer).detach(), delta)
    assert bool((low_rank.masked_delta(layer)[W == 0] == 0).all())
    del layer.nm_mask
    plain = 4 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    assert torch.equal(low_rank.masked_delta(layer), plain)


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
    linears = [x for block in masked.shape.blocks for x in block.linears]
    assert changed == len(linears) == 7 * 3  # all of three blocks, and nothing else
    assert facts["trainable_parameters"] == sum(4 * (x.out_features + x.in_features) for x in linears)


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
    real = training.train

    def spy(model: Any, *rest: Any) -> list[float]:
        losses = real(model, *rest)
        with torch.no_grad():
            seen["logits"] = model.eval()(input_ids=text().ids).logits
        return losses

    monkeypatch.setattr(training, "train", spy)
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


# --- plans ----------------------------------------------------------------------------------------------------------


def test_targets() -> None:
    shape = shape_from_config(PRESETS["smollm2-135m"])
    assert lora.target_names(shape, Lora(targets="up_proj, down_proj")) == ["up_proj", "down_proj"]
    every = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert lora.target_names(shape, Lora()) == every
    with pytest.raises(PlanError) as caught:
        lora.plan(shape, Lora(targets="q_proj,qkv,wo"))
    assert str(caught.value) == (
        "--lora-targets qkv,wo: this model's blocks have down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    )
    fused = shape_from_config(PRESETS["smollm2-135m"] | {"model_type": "phi3"})
    thesis = Lora(targets="q_proj,k_proj,v_proj,o_proj")
    assert lora.target_names(fused, thesis) == ["qkv_proj", "o_proj"]
    words = r"--lora-targets q_proj \(near: qkv_proj, .*\): this model's blocks have down_proj, gate_up_proj"
    with pytest.raises(PlanError, match=words):
        lora.target_names(fused, Lora(targets="q_proj"))


def test_plan_keeps_the_shape_and_refuses_quantised_weights() -> None:
    shape = shape_from_config(PRESETS["smollm2-135m"])
    assert lora.plan(shape, Lora()) == shape
    assert not list(lora.remarks(shape, Lora(samples=8192, batch=8)))
    (remark,) = lora.remarks(shape, Lora(samples=8192, batch=8, steps=18))
    assert remark.startswith("lora: 18 steps of 8 see only 144 of 8188 training windows; --lora-steps 0")
    with pytest.raises(PlanError, match="Put lora before gptq"):
        lora.plan(gptq.plan(shape, Gptq()), Lora())

"""8-bit inputs of quantised layers: the formula, and every way in which a checkpoint is measured."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from edgepress.checkpoints.checkpoint import Checkpoint, round_tokens, rounded_inputs
from edgepress.checkpoints.forms import Grid
from edgepress.checkpoints.image import pack_checkpoint, unpack_checkpoint
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.tokens import TokenBatches
from edgepress.checkpoints.walk import Walk
from edgepress.checkpoints.writer import CheckpointWriter
from edgepress.stages import eora, gptq
from edgepress.stages.hessian import hessians
from edgepress.stages.options import Eora, Gptq, decisive

pytestmark = pytest.mark.unit

RUNTIME = Runtime(chunk_tokens=48)
IDS = torch.arange(3, 51).view(2, 24)


def by_hand(x: Tensor, bits: int = 8) -> Tensor:
    """Token by token in numpy."""
    rows = x.numpy().reshape(-1, x.shape[-1]).astype(np.float32)
    most = np.float32(2 ** (bits - 1) - 1)
    for row in rows:
        scale = np.abs(row).max() / most
        row[:] = np.rint(row / scale) * scale if scale else 0
    return torch.from_numpy(rows).view(x.shape)


@pytest.mark.parametrize("bits", [8, 4])
def test_tokens_are_rounded_by_the_formula(bits: int) -> None:
    x = torch.randn(2, 5, 40, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 5).view(1, 5, 1)
    x[0, 0] = 0
    rounded = round_tokens(x, bits)
    assert torch.equal(rounded, by_hand(x, bits))
    assert len(rounded[1, 2].unique()) <= 2**bits - 1
    coarse = round_tokens(x.bfloat16(), bits)
    assert torch.equal(coarse, by_hand(x.bfloat16().float(), bits).bfloat16())


def test_the_gradient_passes_through() -> None:
    x = torch.randn(3, 8).requires_grad_()
    rounded = round_tokens(x, 8)
    assert torch.equal(rounded.detach(), by_hand(x.detach()))
    rounded.sum().backward()  # type: ignore[no-untyped-call]
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.fixture
def rounded(
    masked: Checkpoint, tokens: Callable[..., TokenBatches], seal: Callable[..., Checkpoint], tmp_path: Path
) -> Checkpoint:
    options, target = Gptq(quant="int4", activation_bits=8), CheckpointWriter(tmp_path / "rounded")
    gptq.run(masked, target, tokens(5), options, RUNTIME)
    made = seal(target, masked, pattern="2:4")
    assert made.shape.activation_bits == gptq.plan(masked.shape, options).activation_bits == 8
    return made


def logits_by_hand(checkpoint: Checkpoint, left: str = "") -> Tensor:
    """transformers' model of the effective weights, each projection replaced by one that rounds its input."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(checkpoint.hf_config(), dtype=torch.float32).eval()
    weights = dict(checkpoint.outer())
    for index in range(len(checkpoint.shape.blocks)):
        weights |= {f"model.layers.{index}.{n}": t for n, t in checkpoint.block(index).items()}
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    for name, linear in model.named_modules():
        if name.endswith("_proj") and name != left:
            linear.forward = lambda x, w=linear.weight: torch.nn.functional.linear(by_hand(x), w)
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


def walked(checkpoint: Checkpoint) -> Tensor:
    """As perplexity is measured."""
    walk = Walk(checkpoint, [IDS], RUNTIME, last_outputs=True)
    for block in walk:
        block.done()
    with walk.skeleton.head() as head, torch.no_grad():
        found: Tensor = head(walk.states.chunks[0])
    return found


def test_walks_and_whole_models_round_every_quantised_layer(rounded: Checkpoint) -> None:
    expected = logits_by_hand(rounded)
    with torch.no_grad():
        whole = rounded.model()(input_ids=IDS).logits
    # A value on a rounding border may fall either way: far less than one layer that does not round.
    missed = float((logits_by_hand(rounded, "model.layers.2.mlp.down_proj") - expected).norm())
    for found in (whole, walked(rounded)):
        assert float((found - expected).norm()) < 0.2 * missed


def test_transformers_still_knows_the_folder_and_others_round_nothing(rounded: Checkpoint) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(rounded.folder)
    assert config.edgepress == {"activation_bits": 8}
    assert config.model_type == "llama" and config.quantization_config["bits"] == 4
    plain = json.loads((rounded.folder / "config.json").read_text())
    del plain["edgepress"]
    (rounded.folder / "config.json").write_text(json.dumps(plain))
    with torch.no_grad():
        whole = Checkpoint(rounded.folder, rounded.manifest).model()(input_ids=IDS).logits
    assert float((whole - logits_by_hand(rounded)).norm()) > 0


def test_eora_carries_it_on_and_answers_the_rounded_inputs(
    rounded: Checkpoint,
    tokens: Callable[..., TokenBatches],
    writer: CheckpointWriter,
    seal: Callable[..., Checkpoint],
    tmp_path: Path,
) -> None:
    for block in Walk(rounded, tokens(2).chunks(48), RUNTIME):
        found = hessians(block)
        assert [len(names) for names in found] == [3, 1, 2, 1]  # still told as one input
        inputs: dict[str, Tensor] = {}
        for name, linear in block.linears.items():
            linear.register_forward_pre_hook(
                lambda _, x, n=name, i=inputs: i.update({n: x[0].flatten(0, 1)}), prepend=True
            )
        block.forward(block.inputs[0], {})
        for names, hessian in found.items():
            x = by_hand(inputs[names[0]])
            torch.testing.assert_close(hessian, x.T @ x, rtol=1e-3, atol=1e-3 * float(hessian.abs().max()))
        block.done()
    eora.run(rounded, writer, tokens(5), Eora(rank=4), RUNTIME)
    adapted = seal(writer, rounded, pattern="2:4")
    assert adapted.shape.activation_bits == 8
    with torch.no_grad():
        whole = adapted.model()(input_ids=IDS).logits
    missed = float((logits_by_hand(adapted, "model.layers.2.mlp.down_proj") - logits_by_hand(adapted)).norm())
    assert float((whole - logits_by_hand(adapted)).norm()) < 0.2 * missed
    pack_checkpoint(adapted, tmp_path / "image")
    assert unpack_checkpoint(tmp_path / "image", tmp_path / "back").shape.activation_bits == 8


def test_the_hook_keeps_no_states_alive(rounded: Checkpoint) -> None:
    block = rounded.model().model.layers[0]
    kept: list[Any] = []
    with rounded_inputs(block, rounded.shape.blocks[0], 8), torch.no_grad():
        x = torch.randn(1, 3, 64)
        block.mlp(x)
        import weakref

        kept.append(weakref.ref(x))
        del x
        gc.collect()
        assert kept[0]() is None


def test_w4a8_is_gptqs_symmetric_codes_with_rounded_inputs(
    masked: Checkpoint, tokens: Callable[..., TokenBatches], seal: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    made = {}
    for options in (Gptq(quant="w4a8", group=32), Gptq(quant="gptq4", symmetric=True, group=32, activation_bits=8)):
        target = CheckpointWriter(tmp_path / options.label)
        gptq.run(masked, target, tokens(5), options, RUNTIME)
        made[options.label] = seal(target, masked, pattern="2:4")
    assert list(made) == ["w4a8", "gptq4-a8"]
    one, other = made.values()
    assert one.shape.grid == Grid(4, 32, symmetric=True)
    assert one.shape.activation_bits == 8
    for index in range(3):
        mine, theirs = one.stored_block(index), other.stored_block(index)
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    remark = gptq.remarks(masked.shape, Gptq(quant="w4a8", group=32))
    assert any("rounded to 8 bits in all measurements" in said for said in remark)


def test_stores_from_before_the_option_stay_valid() -> None:
    assert "activation_bits" not in decisive(Gptq())
    named = decisive(Gptq(activation_bits=8, shrinkage=0.0))  # as it was then
    later = {"layers", "smooth", "embedding_codes", "shrinkage", "guidance"}
    assert {key for key in asdict(Gptq()) if key not in named} == later
    assert named["activation_bits"] == 8

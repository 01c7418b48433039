"""The loss without copies is transformers' own, to the last bit of bfloat16, and so is its gradient."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers.loss.loss_utils import ForCausalLMLoss

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.tokens import IGNORED
from edgepress.checkpoints.writer import CheckpointWriter
from edgepress.stages import lora, token_loss
from edgepress.stages.options import Lora
from tests.stages.lora_help import options, text

pytestmark = pytest.mark.unit

VOCABULARY = 100


@pytest.fixture(autouse=True)
def a_few_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_loss, "LOGITS_AT_ONCE", 7 * VOCABULARY)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize("count", [None, torch.tensor(11)])
def test_loss_and_gradient_are_transformers(dtype: torch.dtype, capped: bool, count: Tensor | None) -> None:
    """capped: what follows the product needs the logits for its own gradient, so they must not be written over."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, 9, 16, generator=generator).to(dtype).requires_grad_()
    head = torch.randn(VOCABULARY, 16, generator=generator).to(dtype)
    labels = torch.randint(VOCABULARY, (2, 9), generator=generator)
    labels[0, :4] = IGNORED
    losses, gradients = [], []
    for loss_of in (ForCausalLMLoss, token_loss.token_loss):
        logits = states @ head.T
        logits = torch.tanh(logits / 5) * 5 if capped else logits
        loss = loss_of(logits, labels, vocab_size=VOCABULARY, num_items_in_batch=count)
        losses.append(loss.detach())
        gradients.append(torch.autograd.grad(loss * 0.5, states)[0])
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)
    assert torch.equal(gradients[1], gradients[0]) or dtype == torch.float32
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-7)


def test_without_a_gradient_the_logits_stay() -> None:
    logits = torch.randn(1, 5, VOCABULARY)
    before = logits.clone()
    with torch.no_grad():
        token_loss.token_loss(logits, torch.arange(5)[None])
    assert torch.equal(logits, before)


def test_it_is_used_where_memory_is_to_be_saved(
    masked: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    real: Callable[..., Tensor] = token_loss.token_loss

    def counted(*arguments: object, **words: object) -> Tensor:
        seen.append("lean")
        return real(*arguments, **words)

    monkeypatch.setattr(token_loss, "token_loss", counted)
    losses = {}
    for on in (False, True):
        chosen = options(dropout=0, checkpointing=on, steps=2, held_out=4)
        facts = lora.run(masked, CheckpointWriter(tmp_path / str(on)), text(), chosen, Runtime())
        losses[on] = [*facts["losses"], *facts["held_out_losses"].values()]
        assert bool(seen) == on
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)
    assert Lora(packed=True, method="qlora").lean_loss and not Lora(checkpointing=True, distill=0.5).lean_loss

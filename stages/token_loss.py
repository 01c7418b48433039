"""The loss of a model's logits without float32 copies of them, for training in little memory.

A vocabulary of 128,000 words takes 250 MiB for 1,024 tokens in 16 bits. The usual way has copies in 32 bits besides, of
the logits and of their gradient. Here both are made for some tokens at a time, and the gradient takes the place of the
logits, in their precision, to which autograd would round it as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, autograd, nn

from edgepress.checkpoints.tokens import IGNORED
from edgepress.stages.requirements import LOGITS_AT_ONCE

# What made the logits, where that keeps nothing of them for its own gradient: a plain product.
_UNUSED_AFTERWARDS = ("UnsafeViewBackward0", "MmBackward0", "ViewBackward0")


@contextmanager
def without_copies(model: nn.Module) -> Iterator[None]:
    """Have the model, a causal language model of transformers, compute its loss so until the context ends."""
    of_peft: Any = getattr(model, "get_base_model", None)
    inner: Any = model if of_peft is None else of_peft()
    inner.loss_function = token_loss
    try:
        yield
    finally:
        del inner._loss_function


def token_loss(logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None, **unused: Any) -> Tensor:
    """Cross-entropy of logits (b, L, vocabulary) for the labels (b, L) one place on, as transformers' own.

    Its mean over labels that are not IGNORED, or their sum over num_items_in_batch.
    """
    wanted = F.pad(labels, (0, 1), value=IGNORED)[:, 1:].to(logits.device)
    count = (wanted != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    loss: Tensor = _TokenLoss.apply(logits, wanted, float(count))
    return loss


class _TokenLoss(autograd.Function):
    @staticmethod
    def forward(context: Any, logits: Tensor, wanted: Tensor, count: float) -> Tensor:
        learns = context.needs_input_grad[0]
        rows, vocabulary = logits.detach().flatten(0, 1), logits.shape[-1]
        spent = type(logits.grad_fn).__name__ in _UNUSED_AFTERWARDS
        gradient = (rows if spent else torch.empty_like(rows)) if learns else None
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        for at in range(0, len(rows), step := max(1, LOGITS_AT_ONCE // vocabulary)):
            part, own = rows[at : at + step].float(), wanted.flatten()[at : at + step]
            learnt = own != IGNORED
            place = own.clamp_min(0).unsqueeze(1)
            logarithms = part.log_softmax(dim=-1)
            total -= (logarithms.gather(1, place).squeeze(1) * learnt).sum()
            if gradient is not None:
                p = logarithms.exp_()
                p.scatter_add_(1, place, p.new_full((), -1.0).expand(place.shape))
                gradient[at : at + step] = p.mul_((learnt / count).unsqueeze(1))
        context.gradient = None if gradient is None else gradient.view(logits.shape)
        return total / count

    @staticmethod
    def backward(context: Any, outer: Tensor) -> tuple[Tensor, None, None]:
        gradient, context.gradient = context.gradient, None
        return gradient.mul_(outer.to(gradient)), None, None

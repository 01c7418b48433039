"""The gradient of a text's loss in a model's weights, one block in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from edgepress.checkpoints.errors import NumericsError
from edgepress.checkpoints.lazy import F, torch
from edgepress.checkpoints.runtime import Runtime

if TYPE_CHECKING:
    from torch import Tensor, nn

    from edgepress.checkpoints.checkpoint import Skeleton
    from edgepress.checkpoints.walk import States

Linears = dict[str, "nn.Linear"]


def backwards(
    skeleton: Skeleton,
    order: Sequence[int],
    chunks: list[Tensor],
    runtime: Runtime,
    each: Callable[[int, Linears], None] | None = None,
) -> Iterator[tuple[int, Linears]]:
    """Run the blocks of `order`, then yield them from the last to the first with their linear layers' gradients.

    The loss is the mean over the tokens of chunks, ids (b, L) each. Its gradient is carried backwards one block at a
    time from the stored inputs of each block, so memory stays at one block with its gradient plus the hidden states.
    each: called with a block's number and linear layers after every chunk; what it leaves in their `weight.grad`, the
    next chunk's gradient is added to.
    """
    from edgepress.checkpoints.walk import Scratch

    shapes = [(*ids.shape, skeleton.checkpoint.shape.hidden_size) for ids in chunks]
    with Scratch(runtime.spill_bytes) as scratch:
        inputs = [scratch.states(shapes, runtime.dtype)]
        for number, states in enumerate(skeleton.embed(chunks)):
            inputs[0].write(number, states)
        for i in order:
            inputs.append(scratch.states(shapes, runtime.dtype, like=inputs[-1]))
            with skeleton.block(i) as block:
                advance(skeleton, block, i, inputs[-1])
        total = sum(ids.shape[0] * (ids.shape[1] - 1) for ids in chunks)
        gradients = []
        with skeleton.head() as head:
            for states, ids in zip(inputs.pop().chunks, chunks, strict=True):
                leaf = states.to(skeleton.device).requires_grad_()
                for row, targets in zip(torch.split(leaf, 1), torch.split(ids, 1), strict=True):
                    torch.autograd.backward(nll(head(row), targets) / total)
                assert leaf.grad is not None
                gradients.append(leaf.grad)
        for i in reversed(order):
            with skeleton.block(i) as block:
                linears = skeleton.linears(i)
                for linear in linears.values():
                    linear.weight.requires_grad_()
                backward = []
                for states, gradient in zip(inputs.pop().chunks, gradients, strict=True):
                    leaf = states.to(skeleton.device).requires_grad_()
                    torch.autograd.backward(skeleton.call(block, skeleton.arguments(i, states), leaf), gradient)
                    assert leaf.grad is not None
                    backward.append(leaf.grad)
                    if each is not None:
                        each(i, linears)
                gradients = backward
                yield i, linears


def advance(skeleton: Skeleton, block: nn.Module, index: int, states: States) -> None:
    """Carry states through a block, in place. Raises NumericsError naming a block whose output is not finite."""
    for number, before in enumerate(states.chunks):
        after = skeleton.run(block, index, before)
        if not bool(torch.isfinite(after).all()):
            raise NumericsError(f"the hidden states after block {index} are not finite")
        states.write(number, after)


def nll(logits: Tensor, ids: Tensor) -> Tensor:
    """Summed negative log-likelihood in nats. logits (b, L, vocabulary), ids (b, L)."""
    targets = ids[:, 1:].to(logits.device)
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets.flatten(), reduction="sum")

"""The gradient of a text's loss in a model's weights or its layers' outputs, one block in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from edgepress.checkpoints.errors import NumericsError
from edgepress.checkpoints.lazy import F, torch
from edgepress.checkpoints.runtime import Runtime

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle

    from edgepress.checkpoints.checkpoint import Skeleton
    from edgepress.checkpoints.walk import States

Linears = dict[str, "nn.Linear"]


def backwards(
    skeleton: Skeleton,
    order: Sequence[int],
    chunks: list[Tensor],
    runtime: Runtime,
    each: Callable[[int, Linears], None] | None = None,
    watch: Callable[[int, Linears], list[RemovableHandle]] | None = None,
) -> Iterator[tuple[int, Linears]]:
    """Run the blocks of `order`, then yield them from the last to the first with their linear layers' gradients.

    The loss is the mean over the tokens of chunks, ids (b, L) each. Its gradient is carried backwards one block at a
    time from the stored inputs of each block, so memory stays at one block with its gradient plus the hidden states.
    each: called with a block's number and linear layers after every chunk; what it leaves in their `weight.grad`, the
    next chunk's gradient is added to. watch: called before them all; its hooks see the gradients of outputs, and the
    weights then get none.
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
                hooks = watch(i, linears) if watch is not None else []
                for linear in linears.values() if watch is None else ():
                    linear.weight.requires_grad_()
                backward = []
                for states, gradient in zip(inputs.pop().chunks, gradients, strict=True):
                    leaf = states.to(skeleton.device).requires_grad_()
                    torch.autograd.backward(skeleton.call(block, skeleton.arguments(i, states), leaf), gradient)
                    assert leaf.grad is not None
                    backward.append(leaf.grad)
                    if each is not None:
                        each(i, linears)
                for hook in hooks:
                    hook.remove()
                gradients = backward
                yield i, linears


def token_squares(skeleton: Skeleton, chunks: list[Tensor], runtime: Runtime) -> dict[int, dict[str, Tensor]]:
    """By block and linear layer: the loss's gradient in its outputs, squared, their mean of each token (tokens,).

    float32, in host memory, in the order of chunks, ids (b, L) each.
    """
    found: dict[int, dict[str, list[Tensor]]] = {}

    def watch(index: int, linears: Linears) -> list[RemovableHandle]:
        def watched(name: str) -> Callable[..., None]:
            kept = found.setdefault(index, {}).setdefault(name, [])

            def hook(_module: Any, _inputs: Any, output: Tensor) -> None:
                tensor: Any = output  # whose register_hook has no types
                tensor.register_hook(lambda g: kept.append(g.detach().flatten(0, -2).float().square().mean(1).cpu()))

            return hook

        return [linear.register_forward_hook(watched(name)) for name, linear in linears.items()]

    count = len(skeleton.blocks)
    runtime.progress.start("gradients", count)
    for index, _ in backwards(skeleton, range(count), chunks, runtime, watch=watch):
        runtime.progress.step(block=f"{count - index}/{count}")
    return {index: {name: torch.cat(kept) for name, kept in own.items()} for index, own in found.items()}


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

"""8-bit inputs of quantised layers, simulated: what integer engines multiply, in the precision of the forward pass.

Dynamic, one scale a token, symmetric: q = round(x / s) with s = max(abs(x)) / 127 over the token's features (the
activations of SmoothQuant, arXiv 2211.10438, and QQQ, arXiv 2406.09904; thesis 001, section 3.3.1). A checkpoint states
it in its configuration (`ModelShape.activation_bits`), and every forward pass over its weights here is made so.
Other libraries do not know the key and leave the inputs as they are.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from edgepress.checkpoints.shape import BlockShape


def round_tokens(x: Tensor, bits: int) -> Tensor:
    """x (..., features) as codes of `bits` bits and a scale for each token stand for it, in x's precision.

    The gradient passes through the rounding.
    """
    wide = x.float()
    scale = wide.abs().amax(dim=-1, keepdim=True) / (2 ** (bits - 1) - 1)
    rounded: Tensor = (wide / scale.clamp_min(torch.finfo(torch.float32).tiny)).round().mul(scale).to(x.dtype)
    return rounded.detach() + (x - x.detach()) if x.requires_grad else rounded


@contextmanager
def rounded_inputs(block: nn.Module, shape: BlockShape, bits: int) -> Iterator[None]:
    """Round what enters the block's quantised layers until the context ends; nothing at 16 bits."""
    handles = round_inputs(block, shape, bits)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def round_inputs(block: nn.Module, shape: BlockShape, bits: int) -> list[RemovableHandle]:
    """The same for as long as the block lives, or until the handles are removed."""
    if bits >= 16:
        return []
    hook = _rounding(bits)
    names = [x.name for x in shape.linears if x.grid is not None]
    return [block.get_submodule(name).register_forward_pre_hook(hook) for name in names]


def _rounding(bits: int) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    """One hook for a block's layers: those that share an input share the rounded one, which observers tell them by."""
    last: tuple[weakref.ref[Tensor], weakref.ref[Tensor]] | None = None  # weak: the hook holds no memory

    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal last
        x = inputs[0]
        rounded = last[1]() if last and last[0]() is x else None
        if rounded is None:
            rounded = round_tokens(x, bits)
            last = (weakref.ref(x), weakref.ref(rounded))
        return (rounded, *inputs[1:])

    return hook

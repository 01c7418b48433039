"""A linear layer whose weights stay packed: dequantised when it computes, forwards and backwards, and let go of again.

QLoRA (Dettmers et al., arXiv 2305.14314) trains adapters beside such weights. Autograd would keep the dense weight from
the forward pass for the backward one; here it is read from the codes a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, autograd, nn

_kept: dict[PackedLinear, Tensor] | None = None  # within last_kept, the weight of the layer that was asked last


@contextmanager
def last_kept() -> Iterator[None]:
    """Keep the weight that was asked for last: peft asks each layer's a dozen times for its sides while it wraps it."""
    global _kept
    _kept = {}
    try:
        yield
    finally:
        _kept = None


class PackedLinear(nn.Linear):
    """x W^T + b with W (out, in) from `read`, which dequantises it anew each time."""

    def __init__(self, out_features: int, in_features: int, bias: nn.Parameter | None, read: Callable[[], Tensor]):
        nn.Module.__init__(self)
        self.out_features, self.in_features, self.read = out_features, in_features, read
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        if _kept is None:
            return self.read()
        if self not in _kept:
            _kept.clear()
            _kept[self] = self.read()
        return _kept[self]

    def forward(self, input: Tensor) -> Tensor:
        product: Tensor = _Product.apply(input, self)
        return product if self.bias is None else product + self.bias


class _Product(autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, layer: PackedLinear) -> Tensor:
        context.layer = layer
        return F.linear(x, layer.read())

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, None]:
        return (gradient @ context.layer.read() if context.needs_input_grad[0] else None), None

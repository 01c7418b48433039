"""Make peft's layers compute with the weight that will be stored, mask and all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


def compute_with(layer: Any, change: Callable[[Any], Tensor]) -> None:
    """Make the layer compute with W + change(layer), which is (out, in) and differentiable.

    Without dropout that is one product. With dropout, which acts on the adapter's input alone, W and the change are
    applied one after the other.
    """

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        delta = change(layer).to(x.dtype)
        dropout = layer.lora_dropout["default"]
        if not layer.training or isinstance(dropout, nn.Identity):
            return F.linear(x, layer.base_layer.weight + delta, layer.base_layer.bias)
        y: Tensor = layer.base_layer(x)
        return y + F.linear(dropout(x), delta)

    layer.forward = forward

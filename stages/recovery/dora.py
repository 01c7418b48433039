"""Magnitude and direction apart, W' = m (W + s B A) / norm(W + s B A), the norm taken of each row, m learned.

DoRA (Liu et al., arXiv 2402.09353), equation 5, with the norm held constant in the gradient (its section 4.3). Under an
N:M mask the direction is (W + s B A) * mask, norm included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgepress.checkpoints.shape import LinearShape
from edgepress.stages.recovery import lora

if TYPE_CHECKING:
    from torch import Tensor

    from edgepress.stages.options import Lora

TAKES = lora.TAKES
RANKED = True


def beside(linear: LinearShape, options: Lora) -> LinearShape:
    return replace(lora.beside(linear, options), adapter_vector="magnitude")


def config(names: Sequence[str], options: Lora, arguments: Mapping[str, Any]) -> Any:
    return lora.config(names, options, {**arguments, "use_dora": True})


def kept_bytes(masked: bool) -> int:
    """As masked LoRA, and the direction in 32 bits."""
    return 7 if masked else 6


def start(layer: Any, mask: Tensor | None) -> None:
    """m is the norm of each row as it is now, in float32: peft's own is rounded to the model's precision.

    peft's forward pass is replaced with and without a mask: it multiplies A and B with a whole identity matrix, and
    divides by zero where all of a row is zero, as `--pad-ffn` leaves them.
    """
    from edgepress.stages.recovery.effective import compute_with

    if mask is not None:
        layer.nm_mask = mask
    layer.lora_magnitude_vector["default"].weight.data = direction(layer).detach().norm(dim=1)
    compute_with(layer, weight_change)


def change(layer: Any) -> dict[str, Tensor]:
    return {"weight": weight_change(layer)}


def tensors(layer: Any) -> dict[str, Tensor]:
    return lora.tensors(layer) | {"lora_magnitude_vector": layer.lora_magnitude_vector["default"].weight}


def direction(layer: Any) -> Tensor:
    """W + s B A of one layer (out, in) float32, masked."""
    W: Tensor = layer.base_layer.weight.float()
    return W + lora.masked_delta(layer)


def weight_change(layer: Any) -> Tensor:
    """W' - W (out, in) float32."""
    from edgepress.checkpoints.checkpoint import dora_factor

    V = direction(layer)
    # Both factors of the quotient are differentiable; the norm is not to be.
    factor = layer.lora_magnitude_vector["default"].weight.unsqueeze(1) * dora_factor(V.detach(), V.new_ones(len(V)))
    W: Tensor = layer.base_layer.weight.float()
    change: Tensor = factor * V - W
    return change

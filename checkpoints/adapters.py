"""What an adapter in PEFT's format makes of a layer's weights: LoRA, DoRA and IA3."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from edgepress.checkpoints.errors import CheckpointError


def adapter_scale(config: Mapping[str, Any]) -> float:
    """What adapter_config.json multiplies B A with: alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv 2312.03732)."""
    if "lora_alpha" not in config:
        return 1.0
    try:
        rank, alpha = float(config["r"]), float(config["lora_alpha"])
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    except (KeyError, TypeError, ValueError, ArithmeticError):
        scale = math.nan
    if not math.isfinite(scale):
        raise CheckpointError(
            f"adapter_config.json states r = {config.get('r')!r} and lora_alpha = {config['lora_alpha']!r}; a rank "
            "above 0 and a number are wanted"
        )
    return scale


def applied(base: Mapping[str, Tensor], adapter: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """A layer's effective weight, and its bias where the adapter acts on it too, in their own precision.

    base: weight (out, in) and perhaps bias (out,). adapter: PEFT's tensors, named relative to the layer.
    """
    weight = base["weight"]
    W = weight.float()
    if "ia3_l" in adapter:
        factor = adapter["ia3_l"].float()  # (out, 1) or (1, in)
        found = {"weight": (W * factor).to(weight.dtype)}
        if "bias" in base and factor.shape[1] == 1:  # what scales a layer's output scales its bias
            found["bias"] = (base["bias"].float() * factor.flatten()).to(base["bias"].dtype)
        return found
    W = W + scale * (adapter["lora_B.weight"].float() @ adapter["lora_A.weight"].float())
    if "lora_magnitude_vector" in adapter:
        W = W * dora_factor(W, adapter["lora_magnitude_vector"].float())
    return {"weight": W.to(weight.dtype)}


def dora_factor(direction: Tensor, magnitude: Tensor) -> Tensor:
    """m / norm(V) of each row (out, 1), for V (out, in) and m (out,): DoRA (arXiv 2402.09353), equation 5.

    A row of zeros has no direction: its factor is finite, and the row stays zero.
    """
    factor: Tensor = magnitude / direction.norm(dim=1).clamp_min(1e-12)
    return factor.unsqueeze(1)

"""A low-rank adapter, W + s B A with s = alpha / r (LoRA, Hu et al., arXiv 2106.09685)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgepress.checkpoints.quiet import quiet_import
from edgepress.checkpoints.shape import LinearShape

if TYPE_CHECKING:
    from torch import Tensor

    from edgepress.stages.options import Lora

TAKES = frozenset({"qlora", "rslora", "loftq"})
RANKED = True


def beside(linear: LinearShape, options: Lora) -> LinearShape:
    return replace(linear, adapter_rank=options.rank, adapter_dtype=linear.dtype)


def config(names: Sequence[str], options: Lora, arguments: Mapping[str, Any]) -> Any:
    with quiet_import():  # peft asks GPTQModel, which greets
        from peft import LoraConfig

    return LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=list(names),
        task_type="CAUSAL_LM",
        **arguments,
    )


def kept_bytes(masked: bool) -> int:
    """The mask, and W + s B A in 16 bits."""
    return 3 if masked else 0


def start(layer: Any, mask: Tensor | None) -> None:
    """Without a mask peft's own forward pass is the right one."""
    if mask is not None:
        from edgepress.stages.recovery.effective import compute_with

        layer.nm_mask = mask
        compute_with(layer, masked_delta)


def change(layer: Any) -> dict[str, Tensor]:
    return {"weight": masked_delta(layer)}


def tensors(layer: Any) -> dict[str, Tensor]:
    return {f"{side}.weight": getattr(layer, side)["default"].weight for side in ("lora_A", "lora_B")}


def masked_delta(layer: Any) -> Tensor:
    """s B A of one layer (out, in) float32, zero wherever the mask is; differentiable."""
    delta: Tensor = layer.scaling["default"] * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight)
    mask = getattr(layer, "nm_mask", None)
    return delta if mask is None else delta * mask

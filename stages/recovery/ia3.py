"""One learned factor for each output of a layer, or for each input of a feed-forward layer's last product.

IA3 (Liu et al., arXiv 2205.05638), here on all linear layers and not only keys, values and the feed-forward, as where
it was compared with LoRA on quantised models. A zero times a factor stays zero, so an N:M mask needs no care.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgepress.checkpoints.quiet import quiet_import
from edgepress.checkpoints.shape import LinearShape

if TYPE_CHECKING:
    from torch import Tensor

    from edgepress.stages.options import Lora

TAKES = frozenset({"qlora"})
RANKED = False
FEEDFORWARD = ("down_proj",)  # last parts of the names of layers whose inputs are scaled


def beside(linear: LinearShape, options: Lora) -> LinearShape:
    return replace(linear, adapter_vector="columns" if linear.name.endswith(FEEDFORWARD) else "rows")


def config(names: Sequence[str], options: Lora, arguments: Mapping[str, Any]) -> Any:
    with quiet_import():
        from peft import IA3Config

    feedforward = [name for name in names if name.endswith(FEEDFORWARD)]
    return IA3Config(target_modules=list(names), feedforward_modules=feedforward, task_type="CAUSAL_LM", **arguments)


def kept_bytes(masked: bool) -> int:
    """Nothing: products of activations alone."""
    return 0


def start(layer: Any, mask: Tensor | None) -> None:
    """peft's own forward pass is the right one; in bfloat16 a factor could not learn by less than 0.4 %."""
    factor = layer.ia3_l["default"]
    factor.data = factor.data.float()


def change(layer: Any) -> dict[str, Tensor]:
    more: Tensor = layer.ia3_l["default"] - 1  # (out, 1) or (1, in)
    base = layer.base_layer
    found = {"weight": base.weight.float() * more}
    if base.bias is not None and not layer.is_feedforward:
        found["bias"] = base.bias.float() * more.flatten()
    return found


def tensors(layer: Any) -> dict[str, Tensor]:
    return {"ia3_l": layer.ia3_l["default"]}

"""Every parameter of the model trained, in 32 bits: what adapters are compared with.

Nothing lies beside the weights. Under an N:M mask the gradient of a zero is zero, and so are Adam's step and the decay
of it: the zeros stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from edgepress.checkpoints.shape import LinearShape

if TYPE_CHECKING:
    from torch import Tensor

    from edgepress.checkpoints.checkpoint import Checkpoint
    from edgepress.checkpoints.runtime import Runtime
    from edgepress.checkpoints.writer import CheckpointWriter
    from edgepress.stages.options import Lora

TAKES: frozenset[str] = frozenset()
RANKED = False


def beside(linear: LinearShape, options: Lora) -> LinearShape:
    return linear


def kept_bytes(masked: bool) -> int:
    """Counted by `shapes.training_bytes` for all parameters at once."""
    return 0


def whole(source: Checkpoint, runtime: Runtime) -> Any:
    """The model in memory in float32, every parameter to be trained, the zeros of its mask left out."""
    import torch

    model = source.model(runtime.device, torch.float32)
    model.requires_grad_(True)
    if source.shape.pattern is not None:
        for index, block in enumerate(source.shape.blocks):
            for linear in block.linears:
                weight: Any = model.get_parameter(f"{source.shape.block_prefix}.{index}.{linear.name}.weight")
                weight.register_hook(_through((weight != 0).detach()))
    return model


def _through(mask: Tensor) -> Any:
    return lambda gradient: gradient * mask


def write(source: Checkpoint, target: CheckpointWriter, model: Any) -> None:
    """All parameters in their stored precision."""
    trained = dict(model.named_parameters())
    prefix = source.shape.block_prefix

    def taken(tensors: Mapping[str, Tensor], within: str) -> dict[str, Tensor]:
        return {
            name: trained[within + name].detach().cpu().to(tensor.dtype) if within + name in trained else tensor
            for name, tensor in tensors.items()
        }

    for index in range(len(source.shape.blocks)):
        target.write_block(index, taken(source.stored_block(index), f"{prefix}.{index}."))
    target.write_outer(taken(source.outer(), ""))
    target.finish(source.config, source)


# --- of adapters alone ------------------------------------------------------------------------------------------------


def config(names: Sequence[str], options: Lora, arguments: Mapping[str, Any]) -> NoReturn:
    raise NotImplementedError("full fine-tuning has no adapter")


def start(layer: Any, mask: Tensor | None) -> NoReturn:
    raise NotImplementedError("full fine-tuning has no adapter")


def change(layer: Any) -> NoReturn:
    raise NotImplementedError("full fine-tuning has no adapter")


def tensors(layer: Any) -> NoReturn:
    raise NotImplementedError("full fine-tuning has no adapter")

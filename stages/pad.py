"""Stage pad: widen the feed-forward layers with zeros to a multiple that file formats and chips take.

The new rows of gate and up are zero, and so are the columns of down that meet them: act(0) * 0 times 0 adds nothing,
and the model computes what it did before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgepress.checkpoints.lazy import F, torch
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.shape import BlockShape, ModelShape, with_wider_ffn
from edgepress.checkpoints.tokens import TokenBatches
from edgepress.stages.options import Pad as Options
from edgepress.stages.requirements import BASE_BYTES, Cost, linked_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from edgepress.checkpoints.checkpoint import Checkpoint
    from edgepress.checkpoints.writer import CheckpointWriter

VERSION = 1


def plan(shape: ModelShape, options: Options) -> ModelShape:
    """The shape with the feed-forward width a multiple of `multiple`. Raises PlanError."""
    return with_wider_ffn(shape, options.multiple)


def cost(before: ModelShape, options: Options) -> Cost:
    """What the stage takes on a model of this shape."""
    block = max(sum(t.nbytes for t in b.stored()) for b in before.blocks)
    return Cost(BASE_BYTES + 4 * block, linked_bytes(before))


def remarks(shape: ModelShape, options: Options) -> list[str]:
    before, after = shape.number("intermediate_size"), plan(shape, options).number("intermediate_size")
    if before == after:
        return [f"pad: the feed-forward width of {before} is a multiple of {options.multiple} already"]
    return [f"pad: the feed-forward width grows from {before} to {after} by channels of zeros"]


def run(
    source: Checkpoint, target: CheckpointWriter, calibration: TokenBatches, options: Options, runtime: Runtime
) -> dict[str, Any]:
    after = plan(source.shape, options)
    count = len(source.shape.blocks)
    runtime.progress.start("writing blocks", count)
    for index in range(count):
        target.write_block(index, widened(source.stored_block(index), after.blocks[index]))
        runtime.progress.step(block=f"{index + 1}/{count}")
    target.copy_outer(source)
    target.finish(dict(source.config) | {"intermediate_size": after.config["intermediate_size"]}, source)
    return {"width_before": source.shape.number("intermediate_size"), "width": after.config["intermediate_size"]}


def widened(tensors: dict[str, Tensor], after: BlockShape) -> dict[str, Tensor]:
    """A block's tensors in the shapes of `after`, zeros where there was nothing."""
    wanted = {t.name: t.shape for t in after.stored()}
    return {name: _padded(tensor, wanted[name], "gate_up" in name) for name, tensor in tensors.items()}


def _padded(tensor: Tensor, wanted: tuple[int, ...], two_halves: bool) -> Tensor:
    if tensor.shape == wanted:
        return tensor
    halves = tensor.chunk(2) if two_halves else (tensor,)  # gate above up, where a family fuses them
    rows = wanted[0] // len(halves)
    columns = (0, wanted[1] - tensor.shape[1]) if tensor.dim() == 2 else ()
    padded = [F.pad(half, (*columns, 0, rows - half.shape[0])) for half in halves]
    return torch.cat(padded)

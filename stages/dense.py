"""What a stage says to a checkpoint that it cannot work on."""

from __future__ import annotations

from checkpoints.errors import PlanError
from checkpoints.shape import ModelShape


def require_dense(shape: ModelShape, stage: str) -> None:
    """Raise PlanError where weights are quantised, or an adapter lies beside them, naming what to give instead."""
    if shape.grid is not None:
        raise PlanError(
            f"{stage} needs dense weights; this checkpoint is already quantised ({shape.grid.describe()}). "
            + ("Give" if stage == "gptq" else f"Put {stage} before gptq, or give")
            + " the checkpoint from before quantisation"
        )
    rank = max(x.adapter_rank for block in shape.blocks for x in block.linears)
    if rank:
        raise PlanError(
            f"{stage} needs dense weights; this checkpoint carries an adapter of rank {rank} in adapter/. "
            "Merge the adapter, or give the checkpoint without it"
        )

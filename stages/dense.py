"""What a stage says to a checkpoint that it cannot work on."""

from __future__ import annotations

from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.shape import ModelShape


def require_dense(shape: ModelShape, stage: str, beside: str = "") -> None:
    """Raise PlanError where weights are quantised, or an adapter lies beside them, naming what to give instead.

    beside: the option that lets the stage work beside quantised weights, where there is one.
    """
    adapted = [x for block in shape.blocks for x in block.linears if x.adapted]
    if shape.grid is not None:
        also = f". {beside} trains beside quantised weights and merges nothing" if beside and not adapted else ""
        raise PlanError(
            f"{stage} needs dense weights; this checkpoint is already quantised ({shape.grid.describe()}). "
            + ("Give" if stage == "gptq" else f"Put {stage} before gptq, or give")
            + " the checkpoint from before quantisation"
            + also
        )
    if adapted:
        rank = max(x.adapter_rank for x in adapted)
        raise PlanError(
            f"{stage} needs dense weights; this checkpoint carries an adapter{f' of rank {rank}' if rank else ''} in "
            "adapter/. Merge the adapter, or give the checkpoint without it"
        )


def require_quantised(shape: ModelShape, what: str, instead: str) -> None:
    """Raise PlanError where no weight is quantised, or an adapter lies beside them already.

    what: the option that asks for it; instead: the one for dense weights.
    """
    if shape.grid is None:
        raise PlanError(
            f"{what} trains on quantised weights, and no quantiser comes before lora. Put gptq before it "
            f"(--quant gptq4), or merge into dense weights with {instead}"
        )
    if any(x.adapted for block in shape.blocks for x in block.linears):
        raise PlanError(
            f"{what}: an adapter lies beside these weights already, and a layer has room for one; give the quantised "
            "checkpoint without it, or leave eora out: --eora 0"
        )

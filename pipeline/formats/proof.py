"""What a written file is held to: that the program which loads it gives the model's own logits."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import NumericsError
from edgepress.checkpoints.shape import ModelShape

TOKENS = 24  # more than the first few positions, and some of them with keys and values from before


def some_tokens(shape: ModelShape) -> Tensor:
    """Token ids (1, 24), the same ones for every model of this vocabulary."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(shape.vocabulary, (1, min(TOKENS, shape.positions)), generator=generator)


@torch.no_grad()
def exact_model(source: Checkpoint) -> Any:
    """The model in float32 with the numbers that its codes stand for; `Checkpoint.block` rounds them as it was before.

    Of adapters it takes A and B alone: whoever writes codes refuses the others.
    """
    model: Any = source.model(dtype=torch.float32)
    for index, block in enumerate(source.shape.blocks):
        adapter = source.adapter_part(index)
        for x in (x for x in block.linears if x.grid is not None):
            weight = source.base_weight(index, x).float()
            if x.adapted:
                a, b = (adapter[f"{x.name}.lora_{side}.weight"].float() for side in ("A", "B"))
                weight = weight + source.adapter_scale * (b @ a)
            model.get_submodule(f"{source.shape.block_prefix}.{index}.{x.name}").weight.copy_(weight)
    return model


@torch.no_grad()
def logits_of(model: Any, ids: Tensor) -> Tensor:
    """(1, tokens, vocabulary) in float32, of the whole sequence at once."""
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.float()


def require_same(
    what: str, reader: str, wanted: Tensor, read: Callable[[], dict[str, Tensor]], part: float = 1e-3
) -> float:
    """The largest difference between the model's logits and those that the reader gives, in several ways.

    wanted: logits (1, tokens, vocabulary). reader: its package. read: a way of calling it -> logits. part: of the
    logits' range, what arithmetic in another order may make of it. Raises NumericsError where it is more, or where the
    reader cannot run the file at all.
    """
    range_ = float(wanted.max() - wanted.min())
    try:
        found = read()
    except Exception as error:  # of whatever kind: the reader is another program
        lines = str(error).strip().splitlines()
        why = lines[0] if lines else type(error).__name__
        raise NumericsError(
            f"{what}: {reader} {version(reader)} cannot run the file: {why}; nothing is written"
        ) from None
    worst = 0.0
    for how, logits in found.items():
        difference = float((logits.float() - wanted).abs().max()) if logits.shape == wanted.shape else float("inf")
        if not difference <= part * range_:
            raise NumericsError(
                f"{what}: {reader} {version(reader)} gives logits that differ by {difference:.3g} ({how}; they range "
                f"over {range_:.3g}), so the file does not hold this model; nothing is written"
            )
        worst = max(worst, difference)
    return worst

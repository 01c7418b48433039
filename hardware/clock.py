"""Time and energy of a placed model, where the chip's file states what an estimate needs."""

from __future__ import annotations

from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.shape import ModelShape
from edgepress.hardware.needs import Request
from edgepress.hardware.passes import Timing
from edgepress.hardware.placement import HOMELESS, Placement
from edgepress.hardware.rates import missing_constants
from edgepress.hardware.soc import Soc
from edgepress.hardware.timing import time_model


def timed(shape: ModelShape, soc: Soc, request: Request, placement: Placement) -> Timing | str:
    """The estimate for the placement, or why there is none."""
    missing = missing_constants(soc)
    if missing:
        return f"No time is estimated: the chip's file states no {', '.join(missing)}."
    off_chip = soc.with_role("off_chip")
    if not off_chip and placement.homeless_bytes:
        return "No time is estimated: what does not fit on the chip has nowhere to stream from."
    try:
        return time_model(
            shape,
            soc,
            _where(placement, off_chip[0].name if off_chip else ""),
            context=request.context,
            prefill_chunk=request.prefill_chunk,
            kv_bits=request.kv_bits,
            activation_bits=request.activation_bits,
        )
    except PlanError as error:
        return f"No time is estimated: {error}."


def _where(placement: Placement, off_chip: str) -> dict[str, dict[str, float]]:
    """Bytes of each tensor by memory; what has no place is timed as if off-chip memory were large enough."""
    found: dict[str, dict[str, float]] = {}
    for t in placement.tensors:
        if not t.nbytes:
            continue
        memory = off_chip if t.state == HOMELESS else t.memory
        shares = found.setdefault(t.name, {})
        shares[memory] = shares.get(memory, 0) + t.nbytes
    return found

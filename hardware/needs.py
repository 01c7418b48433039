"""What a model needs of each kind of memory, quick enough for a search over many shapes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.shape import ModelShape
from edgepress.hardware.activations import Pass, Peak, activation_pass
from edgepress.hardware.operators import Operator
from edgepress.hardware.placement import WeightBytes, kv_cache_bytes, weight_bytes
from edgepress.hardware.soc import Soc
from edgepress.hardware.tiling import Tiling, tile


@dataclass(frozen=True)
class Request:
    """How the model is to run: tokens in the KV cache, widths in bits, prompt tokens that pass at once."""

    context: int = 256
    kv_bits: int = 8
    activation_bits: int = 8
    prefill_chunk: int | None = None  # None: the whole context

    @property
    def chunk(self) -> int:
        return self.context if self.prefill_chunk is None else min(self.prefill_chunk, self.context)

    def require(self, shape: ModelShape, soc: Soc) -> None:
        """Raise PlanError with everything that cannot be."""
        faults = []
        if self.context < 1:
            faults.append(f"a context of {self.context} tokens holds nothing; it must be at least 1")
        elif self.context > shape.positions:
            faults.append(
                f"a context of {self.context} tokens is beyond the model's {shape.positions} positions "
                f"(max_position_embeddings); ask for {shape.positions} or fewer"
            )
        for what, bits in (("KV cache", self.kv_bits), ("activation", self.activation_bits)):
            if not 1 <= bits <= 32:
                faults.append(f"a {what} width of {bits} bit is not between 1 and 32")
        if self.context >= 1 and self.prefill_chunk is not None and not 1 <= self.prefill_chunk <= self.context:
            faults.append(
                f"a prefill chunk of {self.prefill_chunk} tokens is not between 1 and the context of {self.context}"
            )
        if not faults:
            run = activation_pass(shape, 1, self.context, self.activation_bits, self.kv_bits)
            kinds = dict.fromkeys(x.kind for x in run.operators)
            if missing := [kind for kind in kinds if not soc.runs(kind)]:
                has = sorted({operator for engine in soc.engines for operator in engine.operators})
                faults.append(
                    f"{soc.name} has no engine for {', '.join(missing)}, which this {shape.family} model computes; its "
                    f"engines run {', '.join(has)}. Add the operators to an engine of its file if it can run them"
                )
        if faults:
            raise PlanError("\n".join(faults))


@dataclass(frozen=True)
class Needs:
    """Bytes by part, and the tiles of every distinct operator of both passes."""

    weights: WeightBytes
    kv_cache: int  # all copies
    decode: Pass
    prefill: Pass
    tilings: tuple[Tiling, ...]

    @property
    def arena(self) -> int:
        """Bytes of the addresses that hold the activations of either pass."""
        return max(self.decode.peak.arena_bytes, self.prefill.peak.arena_bytes)

    @property
    def peak(self) -> Peak:
        """Of the pass whose activations need more."""
        return max(self.prefill.peak, self.decode.peak, key=lambda peak: peak.arena_bytes)

    @property
    def hardest(self) -> Tiling:
        """The operator whose smallest tile needs the most working memory."""
        return max(self.tilings, key=lambda tiling: tiling.smallest_bytes)

    def by_role(self) -> dict[str, int]:
        """Bytes that must be found in the memories of each role."""
        return {
            "weights": self.weights.total,
            "tiles": self.kv_cache + self.arena,
            "working": self.hardest.smallest_bytes,
        }

    def short(self, soc: Soc) -> dict[str, int]:
        """Bytes that are missing, by role; empty if the model fits."""
        over = {role: need - room_for(soc, role) for role, need in self.by_role().items()}
        return {role: missing for role, missing in over.items() if missing > 0}


def needs(shape: ModelShape, soc: Soc, request: Request) -> Needs:
    """Needs of a model on a chip. Raises PlanError for a shape whose order of computing is not known."""
    context, bits = request.context, request.activation_bits
    copies = soc.count("kv_cache_copies") or 1
    decode = activation_pass(shape, 1, context, bits, request.kv_bits)
    prefill = activation_pass(shape, request.chunk, context, bits, request.kv_bits)
    tilings: dict[str, Tiling] = {}
    direct = reads_directly(soc)
    for operator in (*decode.operators, *prefill.operators):
        found = _tile(operator, _Chip(soc), direct)
        known = tilings.get(found.operator)
        if known is None or found.smallest_bytes > known.smallest_bytes:
            tilings[found.operator] = found
    cache = copies * kv_cache_bytes(shape, context, request.kv_bits)
    return Needs(weight_bytes(shape, soc.layout), cache, decode, prefill, tuple(tilings.values()))


def operator_name(tiling: Tiling) -> str:
    """Without the number of the block, which stands for all that are alike."""
    return re.sub(r"^\d+\.", "", tiling.operator)


def room_for(soc: Soc, role: str) -> int:
    """Bytes for tensors in the memories of a role."""
    return sum(memory.capacity_bytes - memory.reserved_bytes for memory in soc.with_role(role))


def reads_directly(soc: Soc) -> bool:
    """Whether the accelerator fetches its weights where they lie, so that they take no working memory.

    So it is with its own layout over its own link; weights in another layout are unpacked on their way.
    """
    weights = soc.with_role("weights")
    return soc.layout.slot_bits is not None and all(memory.link == "weight_link" for memory in weights)


class _Chip:
    """A chip that a cache compares by identity: it is not worth hashing for every operator."""

    def __init__(self, soc: Soc) -> None:
        self.soc = soc

    def __hash__(self) -> int:
        return id(self.soc)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Chip) and self.soc is other.soc


@lru_cache(maxsize=4096)
def _tile(operator: Operator, chip: _Chip, direct: bool) -> Tiling:
    room = chip.soc.working
    working = None if room is None else room.capacity_bytes - room.reserved_bytes
    return tile(operator, chip.soc, working_bytes=working, weights_in_l1=not direct)

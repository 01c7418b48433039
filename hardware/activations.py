"""Find the most activations alive at once, and addresses for them, for decoding and for prefill.

Blocks that are alike need the same bytes, so a pass through one of each kind stands for all: the peak and the
addresses are those of the whole pass, since of a block's buffers only the residual stream outlives it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

from edgepress.checkpoints.shape import ModelShape
from edgepress.hardware.operators import Operator, forward
from edgepress.hardware.orders import has_rope, own_window, window_of
from edgepress.hardware.placement import shared_blocks


@dataclass(frozen=True)
class Peak:
    """Activations of one pass: the most bytes alive, where, what, and the arena that holds them all."""

    nbytes: int
    operator: str
    alive: tuple[str, ...]
    arena_bytes: int  # what the addresses take; at least nbytes


@dataclass(frozen=True)
class Pass:
    """A pass through one block of each kind, with the addresses of its activations."""

    operators: tuple[Operator, ...]
    plan: AddressPlan
    peak: Peak
    stands_for: tuple[int, ...]  # how many blocks each block of the pass stands for


def activation_peak(shape: ModelShape, tokens: int, context: int, activation_bits: int) -> Peak:
    """Peak while `tokens` new tokens pass through with `context` tokens in view.

    tokens 1 is a step of decoding, tokens = context prefill in one go, anything between a prefill in chunks.
    """
    return activation_pass(shape, tokens, context, activation_bits).peak


def activation_pass(shape: ModelShape, tokens: int, context: int, activation_bits: int, kv_bits: int = 8) -> Pass:
    """The operators and addresses of a pass. kv_bits changes no address, but the tiles of what reads the KV cache."""
    reduced, counts = one_of_each_kind(shape)
    return _Key(reduced, _key(reduced)).run(tokens, context, activation_bits, kv_bits, counts)


def one_of_each_kind(shape: ModelShape) -> tuple[ModelShape, tuple[int, ...]]:
    """The shape with only the first of the blocks that compute alike, and how many each stands for."""
    kinds: dict[tuple[int, int | None, bool], list[int]] = {}
    for index, block in enumerate(shared_blocks(shape).blocks):
        kinds.setdefault((id(block), window_of(shape, index), has_rope(shape, index)), []).append(index)
    firsts = [indexes[0] for indexes in kinds.values()]
    config = dict(shape.config) | {
        "layer_types": ["full_attention" if own_window(shape, i) is None else "sliding_attention" for i in firsts],
        "no_rope_layers": [int(has_rope(shape, i)) for i in firsts],
    }
    reduced = replace(shape, blocks=tuple(shape.blocks[i] for i in firsts), config=config)
    return reduced, tuple(len(indexes) for indexes in kinds.values())


class _Key:
    """A shape that a cache can compare: ModelShape leaves its configuration out of its hash, not out of ==."""

    def __init__(self, shape: ModelShape, key: str) -> None:
        self.shape, self.key = shape, key

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.key == other.key

    def run(self, tokens: int, context: int, activation_bits: int, kv_bits: int, counts: tuple[int, ...]) -> Pass:
        return _run(self, tokens, context, activation_bits, kv_bits, counts)


def _key(shape: ModelShape) -> str:
    """All that a pass depends on, weights' widths included: its operators say how wide what they read is."""
    config = sorted(shape.config.items(), key=lambda item: item[0])
    return repr((shape.family, config, shape.blocks, shape.outer, shape.embedding_bits))


@lru_cache(maxsize=512)
def _run(keyed: _Key, tokens: int, context: int, activation_bits: int, kv_bits: int, counts: tuple[int, ...]) -> Pass:
    widths = {"activation_bits": activation_bits, "kv_bits": kv_bits}
    operators = forward(keyed.shape, tokens=tokens, context=context, **widths)
    plan = address_plan(operators)
    alive = alive_bytes(operators)
    step = max(range(len(alive)), key=alive.__getitem__)
    there = [x for x in lifetimes(operators) if x.first <= step <= x.last and x.nbytes]
    names = tuple(x.name.partition(".")[2] or x.name for x in sorted(there, key=lambda x: (-x.nbytes, x.name)))
    return Pass(tuple(operators), plan, Peak(alive[step], operators[step].name, names, plan.arena_bytes), counts)


# --- what is alive when -----------------------------------------------------------------------------------------------
# Which activations are alive when, how many bytes that takes, and at which addresses they can lie.
#
# Works on the operators of a pass (`operators.forward`), whose steps are their places in that list.


@dataclass(frozen=True)
class Lifetime:
    """A buffer, with the first and the last step at which it holds something needed (both included)."""

    name: str
    nbytes: int
    first: int
    last: int

    def meets(self, other: Lifetime) -> bool:
        """Whether both are alive at some step."""
        return self.first <= other.last and other.first <= self.last


@dataclass(frozen=True)
class Placed:
    """A buffer at its address: bytes [offset, offset + nbytes) during steps [first, last]."""

    name: str
    nbytes: int
    first: int
    last: int
    offset: int


@dataclass(frozen=True)
class AddressPlan:
    """One address for every buffer of a pass; `peak_bytes` is what any plan needs, `arena_bytes` what this one does."""

    buffers: tuple[Placed, ...]
    arena_bytes: int
    peak_bytes: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def lifetimes(operators: Sequence[Operator]) -> list[Lifetime]:
    """Every activation buffer, in the order in which they come to life.

    What an operator reads and writes is alive while it computes. A buffer that nothing reads any more dies; the
    last operator's results live to the end. One that is read but never written (the input of a model without
    embedding) is alive from the start.
    """
    sizes: dict[str, int] = {}
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for step, operator in enumerate(operators):
        for buffer in (*operator.reads, *operator.writes):
            born = 0 if buffer in operator.reads and buffer.name not in first else step
            first.setdefault(buffer.name, born)
            last[buffer.name] = step
            sizes[buffer.name] = buffer.nbytes
    return [Lifetime(name, sizes[name], first[name], last[name]) for name in sorted(first, key=lambda n: first[n])]


def alive_bytes(operators: Sequence[Operator]) -> list[int]:
    """Bytes of activations alive at each step; their maximum is the peak."""
    change = [0] * (len(operators) + 1)
    for life in lifetimes(operators):
        change[life.first] += life.nbytes
        change[life.last + 1] -= life.nbytes
    alive, total = [], 0
    for step in range(len(operators)):
        total += change[step]
        alive.append(total)
    return alive


def assign_addresses(lives: Sequence[Lifetime], alignment: int = 4) -> AddressPlan:
    """A static address for every buffer: largest first, each into the tightest gap that it fits.

    No two buffers that are alive at the same step overlap. Greedy by size is the usual heuristic of static
    memory planners (Pisarchyk and Lee, arXiv 2001.03288); it may need more than the peak, never less.
    """
    placed: list[Placed] = []
    for life in sorted(lives, key=lambda x: (-x.nbytes, x.first, x.name)):
        taken = sorted((p.offset, p.offset + p.nbytes) for p in placed if p.first <= life.last and life.first <= p.last)
        best, slack, free = None, 0, 0  # free: the first address above all that was looked at
        for start, end in taken:
            gap = start - free
            if gap >= life.nbytes and (best is None or gap < slack):
                best, slack = free, gap
            free = max(free, -(-end // alignment) * alignment)
        placed.append(Placed(life.name, life.nbytes, life.first, life.last, free if best is None else best))
    arena = max((p.offset + p.nbytes for p in placed), default=0)
    peak = max(
        (sum(x.nbytes for x in lives if x.first <= step <= x.last) for step in {life.first for life in lives}),
        default=0,
    )
    return AddressPlan(tuple(sorted(placed, key=lambda p: (p.first, p.offset))), arena, peak)


def address_plan(operators: Sequence[Operator], alignment: int = 4) -> AddressPlan:
    """The address plan of a pass's activations: what an address x time picture draws."""
    return assign_addresses(lifetimes(operators), alignment)

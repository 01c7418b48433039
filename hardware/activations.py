"""The most activations alive at once, and addresses for them, for decoding and for prefill.

Blocks that are alike need the same bytes, so a pass through one of each kind stands for all: the peak and the
addresses are those of the whole pass, since of a block's buffers only the residual stream outlives it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from edgepress.checkpoints.shape import ModelShape
from edgepress.hardware.attention import has_rope, own_window, window_of
from edgepress.hardware.footprint import shared_blocks
from edgepress.hardware.liveness import AddressPlan, address_plan, alive_bytes, lifetimes
from edgepress.hardware.operators import Operator, forward


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

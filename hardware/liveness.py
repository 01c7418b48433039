"""Which activations are alive when, how many bytes that takes, and at which addresses they can lie.

Works on the operators of a pass (`operators.forward`), whose steps are their places in that list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from edgepress.hardware.operators import Operator


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

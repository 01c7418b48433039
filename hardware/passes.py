"""The results of a time estimate: per operator, per pass, against context. Seconds, joules, bytes, cycles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from edgepress.hardware.rates import CORNERS, Range


@dataclass(frozen=True)
class OperatorTime:
    """A row of the table. Cycles of the default corner add up to the pass's estimate."""

    name: str
    kind: str
    engine: str
    macs: int
    element_operations: int
    tiles: int
    bytes: Mapping[str, int]  # by memory
    cycles: Range
    bound_cycles: Range
    bounded_by: str

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name, "kind": self.kind, "engine": self.engine, "macs": self.macs,
            "element_operations": self.element_operations, "tiles": self.tiles, "bytes": dict(self.bytes),
            "cycles": self.cycles.to_dict(), "bound_cycles": self.bound_cycles.to_dict(), "bounded_by": self.bounded_by,
        }  # fmt: skip


@dataclass(frozen=True)
class PassTime:
    """One forward pass, or prefill's passes together."""

    mode: str  # decode or prefill
    tokens: int
    context: int
    macs: int
    bound_seconds: Range
    bound_by: str  # the resource that sets the bound
    seconds: Range  # the estimate
    cycles: Range  # the estimate
    bound_joules: Range | None  # None where the chip's file lacks what it takes
    joules: Range | None
    bytes: Mapping[str, int]  # by memory
    streamed_bytes: int  # from off-chip
    page_seconds: Range  # what streaming them takes; part of the estimate, not on top of it
    operators: tuple[OperatorTime, ...]
    notes: tuple[str, ...]

    @property
    def tokens_per_second(self) -> float:
        """At the estimate's default."""
        return self.tokens / self.seconds.default

    def to_dict(self) -> dict[str, Any]:
        ranges = ("bound_seconds", "seconds", "cycles", "page_seconds", "bound_joules", "joules")
        found = {name: getattr(self, name) for name in ranges}
        return {
            "mode": self.mode, "tokens": self.tokens, "context": self.context, "macs": self.macs,
            "bound_by": self.bound_by, "tokens_per_second": self.tokens_per_second, "bytes": dict(self.bytes),
            "streamed_bytes": self.streamed_bytes, **{k: None if v is None else v.to_dict() for k, v in found.items()},
            "operators": [x.to_dict() for x in self.operators], "notes": list(self.notes),
        }  # fmt: skip


@dataclass(frozen=True)
class Point:
    """Decoding one token with so many in view."""

    context: int
    bound_seconds: Range
    seconds: Range
    joules: Range | None

    def to_dict(self) -> dict[str, Any]:
        joules = None if self.joules is None else self.joules.to_dict()
        return {
            "context": self.context, "bound_seconds": self.bound_seconds.to_dict(),
            "seconds": self.seconds.to_dict(), "joules": joules,
        }  # fmt: skip


@dataclass(frozen=True)
class Timing:
    """Decoding one token at the full context, prefill of the whole context, and decoding against context."""

    decode: PassTime
    prefill: PassTime
    curve: tuple[Point, ...]
    fitted: Mapping[str, str]  # constant -> what it rests on

    def to_dict(self) -> dict[str, Any]:
        return {
            "decode": self.decode.to_dict(), "prefill": self.prefill.to_dict(),
            "curve": [x.to_dict() for x in self.curve], "fitted": dict(self.fitted),
        }  # fmt: skip


def add_up(mode: str, passes: Sequence[tuple[PassTime, int]]) -> PassTime:
    """Several passes, each counted so many times, as one; rows are added by their place in the pass."""
    first, last = passes[0][0], passes[-1][0]
    rows = [_add_rows([(x.operators[i], n) for x, n in passes]) for i in range(len(first.operators))]

    def total(name: str) -> Range:
        return _add([(getattr(x, name), n) for x, n in passes])

    def total_known(name: str) -> Range | None:
        return total(name) if all(getattr(x, name) is not None for x, _ in passes) else None

    return PassTime(
        mode=mode, tokens=sum(x.tokens * n for x, n in passes), context=last.context,
        macs=sum(x.macs * n for x, n in passes), bound_seconds=total("bound_seconds"), bound_by=last.bound_by,
        seconds=total("seconds"), cycles=total("cycles"), bound_joules=total_known("bound_joules"),
        joules=total_known("joules"), bytes=_add_bytes([(x.bytes, n) for x, n in passes]),
        streamed_bytes=sum(x.streamed_bytes * n for x, n in passes), page_seconds=total("page_seconds"),
        operators=tuple(rows), notes=tuple(dict.fromkeys(note for x, _ in passes for note in x.notes)),
    )  # fmt: skip


def _add(ranges: Sequence[tuple[Range, int]]) -> Range:
    return Range(*(sum(x.at(corner) * n for x, n in ranges) for corner in CORNERS))


def _add_bytes(found: Sequence[tuple[Mapping[str, int], int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for by_memory, n in found:
        for memory, nbytes in by_memory.items():
            total[memory] = total.get(memory, 0) + nbytes * n
    return total


def _add_rows(rows: Sequence[tuple[OperatorTime, int]]) -> OperatorTime:
    return replace(
        rows[-1][0],
        macs=sum(x.macs * n for x, n in rows),
        element_operations=sum(x.element_operations * n for x, n in rows),
        tiles=sum(x.tiles * n for x, n in rows),
        bytes=_add_bytes([(x.bytes, n) for x, n in rows]),
        cycles=_add([(x.cycles, n) for x, n in rows]),
        bound_cycles=_add([(x.bound_cycles, n) for x, n in rows]),
    )

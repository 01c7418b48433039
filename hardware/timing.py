"""Estimate time and energy per token, for decoding and for prefill.

The bound is a roofline: no resource can be busy for less than its work over its peak, and all may overlap. The
estimate adds up operators in their order, with launches and transfers as measured on Deeploy's runs; the chip's file
says what was fitted on what. Both come with low, default and high. Times are seconds, energies joules.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.shape import ModelShape
from edgepress.hardware.needs import Request
from edgepress.hardware.operators import Operator, forward, weights_read
from edgepress.hardware.placement import HOMELESS, Placement
from edgepress.hardware.rates import (
    ACTIVATIONS,
    CORNERS,
    DEFAULT,
    KV_CACHE,
    Places,
    Range,
    Rates,
    Share,
    Work,
    grounds,
    kv_cache_of,
    missing_constants,
    outside_bytes,
    rates,
    streamed_bytes,
    work_of,
)
from edgepress.hardware.soc import Memory, Soc

# Where each tensor lies: a memory's name, or several with the bytes (any common unit) in each.
TimedPlacement = Mapping[str, str | Mapping[str, float]]


def time_model(
    shape: ModelShape,
    soc: Soc,
    placement: TimedPlacement,
    *,
    context: int = 256,
    prefill_chunk: int | None = None,
    kv_bits: int = 8,
    activation_bits: int = 8,
) -> Timing:
    """Time and energy of decoding and prefill on a chip.

    `placement` says in which memory each constant lies, or how it is spread over several (names as
    `operators.weights_read` lists them, with or without `.weight`); what it does not name streams from off-chip in
    every pass. "KV cache" (or "KV cache 3", a block's own) and "activations" may be placed too; they lie in the first
    memory with the role tiles otherwise. Raises PlanError, all faults at once, for names and memories that do not
    exist, for off-chip streams without such a memory, and for a chip whose file lacks a constant that time needs.
    """
    chunk = context if prefill_chunk is None else min(prefill_chunk, context)
    if chunk < 1:
        raise PlanError(f"a context of {context} in chunks of {chunk} tokens: both must be at least 1")
    timer = _Timer(shape, soc, resolve(shape, soc, placement), kv_bits, activation_bits)
    prefill = add_up("prefill", [(timer.run(tokens, end), times) for tokens, end, times in chunks(context, chunk)])
    curve = [timer.run(1, seen) for seen in _contexts(context)]
    points = tuple(Point(x.context, x.bound_seconds, x.seconds, x.joules) for x in curve)
    basis = soc.basis or "constants of its file are assumed"
    return Timing(curve[-1], prefill, points, grounds(soc), basis)


def resolve(shape: ModelShape, soc: Soc, placement: TimedPlacement) -> dict[str, tuple[Share, ...]]:
    """The memories of every constant, every KV cache and the activations. Raises PlanError for what cannot be."""
    memories, needed = {memory.name: memory for memory in soc.memories}, weights_read(shape)
    off_chip, tiles = soc.with_role("off_chip")[:1], soc.with_role("tiles")[:1]
    caches = [kv_cache_of(i) for i in range(len(shape.blocks))]
    home = (*caches, ACTIVATIONS)
    given = {name.removesuffix(".weight"): place for name, place in placement.items()}
    everywhere = given.pop(KV_CACHE, None)
    if everywhere is not None:
        given = {**dict.fromkeys(caches, everywhere), **given}
    faults = []
    unknown = sorted(set(given) - set(needed) - set(home))
    if unknown:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        faults.append(f"the placement names what the model does not read: {', '.join(unknown[:5])}{more}")
    used = {name for place in given.values() for name in ([place] if isinstance(place, str) else place)}
    if used - set(memories):
        strange = ", ".join(sorted(used - set(memories)))
        faults.append(f"{soc.name} has no memory {strange}; it has {', '.join(memories)}")
    empty = sorted(name for name, place in given.items() if not isinstance(place, str) and sum(place.values()) <= 0)
    if empty:
        faults.append(f"the shares of {', '.join(empty[:5])} add up to nothing")
    missing = [name for name in needed if name not in given]
    if missing and not off_chip:
        faults.append(f"{len(missing)} matrices have no place and {soc.name} no off-chip memory to stream them from")
    if faults:
        raise PlanError("; ".join(faults))
    default = {**dict.fromkeys(needed, off_chip), **dict.fromkeys(home, tiles)}
    return {
        name: _shares(given[name], memories) if name in given else tuple(Share(m, 1.0) for m in memory)
        for name, memory in default.items()
    }


def _shares(place: str | Mapping[str, float], memories: Mapping[str, Memory]) -> tuple[Share, ...]:
    if isinstance(place, str):
        return (Share(memories[place], 1.0),)
    total = sum(place.values())
    return tuple(Share(memories[name], part / total) for name, part in place.items() if part)


def chunks(context: int, chunk: int) -> list[tuple[int, int, int]]:
    """Passes of prefill as (tokens, context after it, how often it counts).

    Beyond 64 full chunks, 32 to 63 runs of equally many neighbours (and what is left over one by one) stand for all,
    each run by its middle, since costs grow with context nearly linearly.
    """
    full, rest = divmod(context, chunk)
    run = full // 32 if full > 64 else 1
    grouped = full // run
    found = [(chunk, (i * run + (run + 1) // 2) * chunk, run) for i in range(grouped)]
    found += [(chunk, (i + 1) * chunk, 1) for i in range(grouped * run, full)]
    return [*found, (rest, context, 1)] if rest else found


def _contexts(context: int) -> list[int]:
    """Powers of two below the context, and the context."""
    return [1 << i for i in range(context.bit_length()) if 1 << i < context] + [context]


@dataclass
class _Timer:
    """One model on one chip. Equal operators of different blocks are placed, tiled and timed once."""

    shape: ModelShape
    soc: Soc
    where: Places
    kv_bits: int
    activation_bits: int
    known: dict[tuple[Any, ...], tuple[Work, OperatorTime]] = field(default_factory=dict)
    corners: list[Rates] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.corners = [rates(self.soc, corner) for corner in CORNERS]

    def run(self, tokens: int, context: int) -> PassTime:
        """One forward pass."""
        widths = {"kv_bits": self.kv_bits, "activation_bits": self.activation_bits}
        operators = forward(self.shape, tokens=tokens, context=context, **widths)
        done = [self._operator(x) for x in operators]
        works, rows = [work for work, _ in done], tuple(row for _, row in done)
        per_corner = [sum(row.cycles.at(r.corner) for row in rows) for r in self.corners]
        seconds = [cycles / r.clock for cycles, r in zip(per_corner, self.corners, strict=True)]
        floors = [self._floor(works, r) for r in self.corners]
        bounds = [max(floor.values()) / r.clock for floor, r in zip(floors, self.corners, strict=True)]
        moved: Counter[str] = Counter()
        for row in rows:
            moved.update(row.bytes)
        moves = [[work.moved_at(r) for work in works] for r in self.corners]
        streamed = [sum(streamed_bytes(x, self.soc) for x in at) for at in moves]
        outside = [sum(outside_bytes(x) for x in at) for at in moves]
        least = sum(outside_bytes(work.floor) for work in works)
        needed = sum(x.needed_macs for x in operators)
        mode = "decode" if tokens == 1 else "prefill"
        return PassTime(
            mode=mode, tokens=tokens, context=context, macs=sum(x.macs for x in operators),
            bound_seconds=Range.of(bounds), bound_by=max(floors[1], key=lambda name: floors[1][name]),
            seconds=Range.of(seconds), cycles=Range.of(per_corner),
            bound_joules=_joules([_peak_joules(r, needed) for r in self.corners], [least] * 3, self.corners),
            joules=_joules(
                [None if r.power is None else r.power * t for r, t in zip(self.corners, seconds, strict=True)],
                outside, self.corners,
            ),
            bytes=dict(moved), streamed_bytes=streamed[1],
            page_seconds=Range.of([n / (r.off_chip * r.clock) if r.off_chip else 0.0
                                   for n, r in zip(streamed, self.corners, strict=True)]),
            operators=rows, notes=tuple(self._notes(works, mode)),
        )  # fmt: skip

    def _operator(self, x: Operator) -> tuple[Work, OperatorTime]:
        home = None if x.weights is None else self.where[x.weights.name]
        cache = None if x.block is None else self.where[kv_cache_of(x.block)]
        weights = None if x.weights is None else replace(x.weights, name="")
        sizes = tuple(b.nbytes for b in x.reads), tuple(b.nbytes for b in x.writes)
        size = (x.rows, x.columns, x.depth, x.repeats, *sizes, x.kv_read, x.kv_held, x.needed, x.kv_form)
        key = (x.name, size, weights, home, cache)
        if key not in self.known:
            work = work_of(x, self.soc, self.where)
            self.known[key] = work, _row(work, self.corners)
        work, row = self.known[key]
        return work, replace(row, name=x.label)

    def _floor(self, works: Sequence[Work], r: Rates) -> dict[str, float]:
        """Cycles that each resource is busy at least in the whole pass."""
        total: dict[str, float] = {}
        for work in works:
            for resource, cycles in work.floor_cycles(r).items():
                total[resource] = total.get(resource, 0) + cycles
        return total

    def _notes(self, works: Sequence[Work], mode: str) -> Iterator[str]:
        if mode == "prefill" and self.soc.prefill_note:
            yield self.soc.prefill_note
        homeless = sorted({w.operator.name for w in works if not w.tiling.fits})
        if homeless:
            yield f"No tile of {', '.join(homeless)} fits L1; timed as if one did."
        slow = [w for w in works if w.operator.engine != w.engine]
        wide = sorted({w.operator.name for w in slow if w.operator.weights is None or w.operator.weights.integer})
        looked_up = sorted({w.operator.name for w in works if w.operator.weights and not w.operator.weights.integer})
        if looked_up:
            yield (
                f"Codes that stand for no integers are turned into weights by the cores: {', '.join(looked_up)} are "
                "timed at their 8 bit speed, without that."
            )
        if wide and self.soc.accelerator is not None:
            yield (
                f"Weights too wide for {self.soc.accelerator.name}: {', '.join(wide)} run on the cores, timed at their "
                "8 bit speed, since none is known for wider weights."
            )
        corrected = sorted({w.operator.name for w in works if w.corrections})
        if corrected and self.soc.accelerator is not None:
            yield (
                f"{self.soc.accelerator.name} has one scale per output channel and one offset per layer: "
                f"{', '.join(corrected)} take a job for each group and a correction on the cores."
            )


def _row(work: Work, corners: Sequence[Rates]) -> OperatorTime:
    x, default = work.operator, corners[CORNERS.index(DEFAULT)]
    parts = work.parts(default)
    moved: Counter[str] = Counter()
    for traffic in work.moved_at(default):
        moved[traffic.memory] += traffic.nbytes
    return OperatorTime(
        name=x.label, kind=x.kind, engine=work.engine, macs=x.macs, element_operations=x.element_operations,
        tiles=max(work.tiling.tiles, 1), bytes=dict(moved), cycles=Range.of([work.cycles(r) for r in corners]),
        bound_cycles=Range.of([max(work.floor_cycles(r).values()) for r in corners]),
        bounded_by=max(parts, key=lambda name: parts[name]),
    )  # fmt: skip


def _peak_joules(r: Rates, macs: int) -> float | None:
    return None if r.efficiency is None else 2 * macs / r.efficiency


def _joules(on_chip: Sequence[float | None], outside: Sequence[int], corners: Sequence[Rates]) -> Range | None:
    """Energy on the chip and of what crosses its border; None where the chip's file lacks a constant for it."""
    found = []
    for joules, nbytes, r in zip(on_chip, outside, corners, strict=True):
        if joules is None or (nbytes and r.off_chip_energy is None):
            return None
        found.append(joules + nbytes * (r.off_chip_energy or 0))
    return Range.of(found)


# --- results ----------------------------------------------------------------------------------------------------------
# The results of a time estimate: per operator, per pass, against context. Seconds, joules, bytes, cycles.


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

    def to_dict(self, operators: bool = True) -> dict[str, Any]:
        ranges = ("bound_seconds", "seconds", "cycles", "page_seconds", "bound_joules", "joules")
        found = {name: getattr(self, name) for name in ranges}
        rows = {"operators": [x.to_dict() for x in self.operators]} if operators else {}
        return {
            "mode": self.mode, "tokens": self.tokens, "context": self.context, "macs": self.macs,
            "bound_by": self.bound_by, "tokens_per_second": self.tokens_per_second, "bytes": dict(self.bytes),
            "streamed_bytes": self.streamed_bytes, **{k: None if v is None else v.to_dict() for k, v in found.items()},
            **rows, "notes": list(self.notes),
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
    basis: str  # what the estimate rests on, in one clause

    def to_dict(self, operators: bool = True) -> dict[str, Any]:
        """For JSON. operators: with a row for each of them in both passes."""
        return {
            "decode": self.decode.to_dict(operators), "prefill": self.prefill.to_dict(operators),
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


# --- timing a placed model --------------------------------------------------------------------------------------------
# Time and energy of a placed model, where the chip's file states what an estimate needs.


def timed(shape: ModelShape, soc: Soc, request: Request, placement: Placement) -> Timing | str:
    """The estimate for the placement, or why there is none."""
    missing = missing_constants(soc)
    if missing:
        why = f"{soc.no_time}; " if soc.no_time else ""
        return f"No time is estimated: {why}the chip's file states no {', '.join(missing)}."
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

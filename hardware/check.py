"""Decide whether a model fits a chip: what lies in which memory, what is missing, and what the numbers leave out.

Weights go to the memories with the role weights, KV cache and activations to those with the role tiles, one
operator's tile to the working memory. All must hold what is put there; off-chip memory only says where an excess
would go, and what streaming it costs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.kv_format import FULL_BITS, GROUP, KVFormat
from edgepress.checkpoints.memory import size_text
from edgepress.checkpoints.packed_sizes import packed_sizes
from edgepress.checkpoints.shape import LinearShape, ModelShape
from edgepress.hardware.levers import Levers, find_levers
from edgepress.hardware.needs import Needs, Request, needs, operator_name
from edgepress.hardware.orders import CacheRule, cache_rule, own_window, with_cache
from edgepress.hardware.placement import (
    PACKED,
    PLAIN,
    RESIDENT,
    Placed,
    Placement,
    TensorBytes,
    WeightBytes,
    place,
    shared_blocks,
    tensor_table,
    weight_bytes,
)
from edgepress.hardware.soc import Engine, Memory, Soc
from edgepress.hardware.tiling import Tiling
from edgepress.hardware.timing import OperatorTime, Timing, timed
from edgepress.hardware.units import times_text


def check(
    shape: ModelShape,
    soc: Soc,
    *,
    context: int = 256,
    kv_bits: int = 8,
    kv_window: int = 0,
    kv_sinks: int = 4,
    kv_groups: bool = False,
    activation_bits: int = 8,
    prefill_chunk: int | None = None,
    name: str | None = None,
    file_bytes: int | None = None,
    levers: bool = False,
    timing: bool = False,
) -> Verdict:
    """Judge whether a model fits a chip with `context` tokens in its KV cache.

    `prefill_chunk` is how many prompt tokens pass at once (all of the context by default); `name` is what to call
    the model; `file_bytes` is what its files take on the disk, where there are any. The widths default to 8 bit,
    N-EUREKA's. `kv_window` and `kv_sinks` evict tokens from the cache, `kv_groups` counts its scales, zero points and
    tokens in full (checkpoints/kv_format.py). `levers` asks what would make a model fit that does not, `timing` for
    time and energy per token; a search over shapes needs neither. Raises PlanError for a context the model
    has no positions for, for widths that are none, and for operators that no engine runs, all in one message.
    """
    shape = shared_blocks(shape)
    if kv_groups and kv_bits >= FULL_BITS:
        raise PlanError(
            f"--kv-groups counts scales and zero points, and a cache of {kv_bits} bit has none; give --kv-bits 8 or 4"
        )
    form = KVFormat(kv_bits if kv_groups else FULL_BITS, kv_window, kv_sinks)
    if kv_window or kv_groups:
        shape = with_cache(shape, CacheRule(form, kv_groups))
    request = Request(context, kv_bits, activation_bits, prefill_chunk)
    request.require(shape, soc)
    found = needs(shape, soc, request)
    tensors = tensor_table(shape, soc.layout)
    copies = soc.count("kv_cache_copies") or 1
    placement = place(shape, tensors, soc, context, kv_bits, copies, found.arena)
    uses = _uses(soc, found, placement)
    model = name or str(shape.config.get("_name_or_path") or shape.family)
    verdict = Verdict(
        model=model,
        family=shape.family,
        parameters=shape.parameters_total,
        soc=soc.label,
        request=request,
        cache=cache_rule(shape),
        memories=uses,
        footprint=Footprint(
            file_bytes=shape.file_bytes if file_bytes is None else file_bytes,
            file_measured=file_bytes is not None,
            packed_bytes=packed_sizes(shape).total,
            chip=found.weights,
            layout=soc.layout.name,
            tensors=tuple(tensors),
        ),
        needs=found,
        placement=placement,
        summary=_summary(model, soc, found, uses),
        notes=tuple(notes(shape, soc, found)),
    )
    if levers and not verdict.fits:
        verdict = replace(verdict, levers=find_levers(shape, soc, request))
    return replace(verdict, timing=timed(shape, soc, request, placement)) if timing else verdict


# --- what each memory is asked to hold ---------------------------------------------------------------------------


def _uses(soc: Soc, found: Needs, placement: Placement) -> tuple[MemoryUse, ...]:
    """As placed; what found no room counts in the last memory of its role as well, where it is missing."""
    last = {role: soc.with_role(role)[-1].name for role in ("weights", "tiles")}
    held: dict[str, dict[str, int]] = {memory.name: {} for memory in soc.memories}
    for memory in soc.memories:
        if memory.reserved_bytes:
            held[memory.name]["code and stacks"] = memory.reserved_bytes
    for t in placement.tensors:
        role = "tiles" if t.part in ("KV cache", "activations") else "weights"
        if t.memory:
            held[t.memory][t.part] = held[t.memory].get(t.part, 0) + t.nbytes
        if t.state != RESIDENT:
            held[last[role]][t.part] = held[last[role]].get(t.part, 0) + t.nbytes
    tile = (f"tile of {operator_name(found.hardest)}", found.hardest.smallest_bytes)
    return tuple(_use(memory, held[memory.name], tile) for memory in soc.memories)


def _use(memory: Memory, parts: Mapping[str, int], tile: tuple[str, int]) -> MemoryUse:
    steady = tuple((part, size) for part, size in parts.items() if size and part != "activations")
    fleeting = tuple((part, size) for part, size in parts.items() if size and part == "activations")
    if memory.role == "working":
        fleeting = (tile,)  # its smallest: any larger one is a choice
    return MemoryUse(memory.name, memory.role, memory.capacity_bytes, steady, fleeting)


# --- words -----------------------------------------------------------------------------------------------------


def _summary(model: str, soc: Soc, found: Needs, uses: tuple[MemoryUse, ...]) -> str:
    """One sentence: what fits with how much room, or what does not and by how much."""
    words = {
        "weights": "weights need",
        "tiles": "KV cache and activations need",
        "working": f"the smallest tile of {operator_name(found.hardest)} needs",
        "staging": "code and stacks need",
    }
    fit, over = [], []
    for role, what in words.items():
        at = [use for use in uses if use.role == role]
        if not at:
            continue  # a chip that stages nothing, or whose engines read every memory themselves
        # Where code lies in the same memory as tensors, it takes from the room rather than adding to the need.
        taken = 0 if role == "staging" else sum(memory.reserved_bytes for memory in soc.with_role(role))
        need, room = sum(use.peak_bytes for use in at) - taken, sum(use.capacity_bytes for use in at) - taken
        held = f"the {size_text(room)} of {' + '.join(use.name for use in at)}"
        if need > room:
            # Below a tenth over, the factor says less than the difference.
            much = need > 1.1 * room and room > 0
            by = f"{times_text(need, room)} {held}" if much else f"{size_text(need - room)} more than {held}"
            over.append(f"{what} {size_text(need)}, {by}")
        elif role != "staging":
            fit.append(f"{what} {size_text(need)} of {held}")
    if over:
        return f"{model} does not fit {soc.label}: {'; '.join(over)}."
    return f"{model} fits {soc.label}: {'; '.join(fit)}."


# --- the verdict ------------------------------------------------------------------------------------------------------
# What `check` finds out: which memory holds what, what is left or missing, and what would make the model fit.


@dataclass(frozen=True)
class MemoryUse:
    """What one memory is asked to hold, in bytes, by part."""

    name: str
    role: str
    capacity_bytes: int
    parts: tuple[tuple[str, int], ...]  # what lies there throughout
    transient: tuple[tuple[str, int], ...] = ()  # what is there at its fullest on top: activations, a tile

    @property
    def used_bytes(self) -> int:
        """What lies there throughout; more than the capacity if it does not fit."""
        return sum(size for _, size in self.parts)

    @property
    def peak_bytes(self) -> int:
        """The most that lies there at once."""
        return self.used_bytes + sum(size for _, size in self.transient)

    @property
    def headroom_bytes(self) -> int:
        """What is left at the peak; negative by as much as does not fit."""
        return self.capacity_bytes - self.peak_bytes

    @property
    def fits(self) -> bool:
        """Whether the memory holds all of it."""
        return self.headroom_bytes >= 0


@dataclass(frozen=True)
class Footprint:
    """The model's bytes in its three forms, and each tensor's."""

    file_bytes: int  # all safetensors files, headers included
    file_measured: bool  # counted on the disk rather than predicted
    packed_bytes: int  # the image of `compress pack`, without tokenizer
    chip: WeightBytes  # in the chip's layout
    layout: str
    tensors: tuple[TensorBytes, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "file_bytes": self.file_bytes,
            "file_measured": self.file_measured,
            "packed_bytes": self.packed_bytes,
            "chip_bytes": self.chip.total,
            "chip_parts": asdict(self.chip),
            "layout": self.layout,
        }


@dataclass(frozen=True)
class Verdict:
    """Whether and by how much a model fits a chip, and what the numbers do not say."""

    model: str
    family: str
    parameters: int
    soc: str
    request: Request
    cache: CacheRule | None  # what is asked of the KV cache beyond its width
    memories: tuple[MemoryUse, ...]
    footprint: Footprint
    needs: Needs
    placement: Placement
    summary: str
    notes: tuple[str, ...]
    levers: Levers | None = None  # asked for apart, as is the next: a search may judge hundreds of shapes
    timing: Timing | str | None = None  # a text says why there is none

    def __str__(self) -> str:
        return self.summary

    @property
    def fits(self) -> bool:
        """Whether every memory on the chip holds its share; off-chip memory does not count."""
        return all(use.fits for use in self.memories if use.role != "off_chip")

    @property
    def weights(self) -> WeightBytes:
        return self.footprint.chip

    @property
    def line(self) -> str:
        """The verdict in one line of the run's log."""
        words = []
        for role, name in (("weights", "weights"), ("tiles", "KV cache and activations"), ("working", "hardest tile")):
            at = [use for use in self.memories if use.role == role]
            if not at:
                continue
            need, room = sum(use.peak_bytes for use in at), sum(use.capacity_bytes for use in at)
            over = f" ({times_text(need, room)})" if need > room else ""
            words.append(f"{name} {size_text(need)} of {size_text(room)}{over}")
        return f"{'fits' if self.fits else 'does not fit'} {self.soc}: {', '.join(words)}"

    def to_dict(self, tensors: bool = False) -> dict[str, Any]:
        """The verdict for JSON: sizes in bytes, headroom negative where over.

        tensors: with a row for each tensor, and for each operator of both passes.
        """
        placement, timing = self.placement.to_dict(), self.timing
        if not tensors:
            del placement["tensors"]
        return {
            "model": self.model,
            "family": self.family,
            "parameters": self.parameters,
            "soc": self.soc,
            "context": self.request.context,
            "kv_bits": self.request.kv_bits,
            "kv_window": self.cache.form.window if self.cache else 0,
            "kv_sinks": self.cache.form.sinks if self.cache else 0,
            "kv_groups": self.cache is not None and self.cache.groups,
            "activation_bits": self.request.activation_bits,
            "prefill_chunk": self.request.chunk,
            "fits": self.fits,
            "summary": self.summary,
            "memories": [_memory_dict(use) for use in self.memories],
            "footprint": self.footprint.to_dict(),
            "weight_bytes": self.weights.total,
            "kv_cache_bytes": self.needs.kv_cache,
            "activations": {
                mode: asdict(peak)
                for mode, peak in (("decode", self.needs.decode.peak), ("prefill", self.needs.prefill.peak))
            },
            "tiling": {
                "hardest": self.needs.hardest.to_dict(),
                "without_a_tile": [x.to_dict() for x in self.needs.tilings if not x.fits],
            },
            "placement": placement,
            "timing": timing if timing is None or isinstance(timing, str) else timing.to_dict(operators=tensors),
            "levers": None if self.levers is None else self.levers.to_dict(),
            "notes": list(self.notes),
        }

    def rows(self) -> list[dict[str, Any]]:
        """One row for each tensor and memory it lies in: what --csv writes."""
        sizes = {t.name: t for t in self.footprint.tensors}
        return [_row(place, sizes.get(place.name)) for place in self.placement.tensors]

    def operator_rows(self) -> list[dict[str, Any]]:
        """One row for each operator of both passes: engine, MACs, tiles, bytes by memory, cycles, what bounds it.

        Where the chip's file states too little for times, the tiles alone.
        """
        if self.timing is None or isinstance(self.timing, str):
            return [_tiling_row(tiling) for tiling in self.needs.tilings]
        passes = (self.timing.decode, self.timing.prefill)
        return [_operator_row(run.mode, x) for run in passes for x in run.operators]


def _operator_row(mode: str, x: OperatorTime) -> dict[str, Any]:
    return {
        "mode": mode,
        "name": x.name,
        "kind": x.kind,
        "engine": x.engine,
        "macs": x.macs,
        "tiles": x.tiles,
        "bytes": " ".join(f"{memory}:{size}" for memory, size in x.bytes.items()),
        "cycles_low": round(x.cycles.low),
        "cycles": round(x.cycles.default),
        "cycles_high": round(x.cycles.high),
        "bound_cycles": round(x.bound_cycles.default),
        "bounded_by": x.bounded_by,
    }


def _tiling_row(tiling: Tiling) -> dict[str, Any]:
    return {
        "name": tiling.operator,
        "engine": tiling.engine,
        "rows": tiling.rows,
        "columns": tiling.columns,
        "tiles": tiling.tiles,
        "tile_bytes": tiling.tile_bytes,
        "smallest_bytes": tiling.smallest_bytes,
        "reason": tiling.reason,
    }


def _memory_dict(use: MemoryUse) -> dict[str, Any]:
    return {
        "name": use.name,
        "role": use.role,
        "capacity_bytes": use.capacity_bytes,
        "used_bytes": use.used_bytes,
        "peak_bytes": use.peak_bytes,
        "headroom_bytes": use.headroom_bytes,
        "fits": use.fits,
        "parts": dict((*use.parts, *use.transient)),
    }


def _row(place: Placed, tensor: TensorBytes | None) -> dict[str, Any]:
    shape: Sequence[int] = () if tensor is None else tensor.shape
    return {
        "name": place.name,
        "part": place.part,
        "block": "" if place.block is None else place.block,
        "shape": "x".join(map(str, shape)),
        "bits": "" if tensor is None else tensor.bits,
        "file_bytes": "" if tensor is None else tensor.file_bytes,
        "packed_bytes": "" if tensor is None else tensor.packed_bytes,
        "chip_bytes": place.nbytes if tensor is None else tensor.chip_bytes,
        "memory": place.memory,
        "state": place.state,
        "offset": place.offset,
        "placed_bytes": place.nbytes,
        "read_per_token": place.read_per_token,
        "written_per_token": place.written_per_token,
    }


# --- notes ------------------------------------------------------------------------------------------------------------
# What the verdict's numbers do not say: what an engine asks of a model beyond fitting, and where sources disagree.


def notes(shape: ModelShape, soc: Soc, found: Needs) -> Iterator[str]:
    """Each a sentence or two."""
    linears = [x for block in shape.blocks for x in block.linears]
    yield from _patterns(shape, linears, soc, found)
    yield from _no_integers(linears, soc, found)
    if soc.accelerator is not None:
        yield from _accelerator(shape, linears, soc, soc.accelerator, found)
    if (soc.count("kv_cache_copies") or 1) == 1 and any(s.name == "kv_copies" for s in soc.settings):
        yield (
            "One KV cache is counted, updated in place. A graph that takes it in and gives it out grown, as Deeploy's "
            "do, holds two: --set kv_copies=2."
        )
    yield from _cache(shape)
    if any(own_window(shape, index) for index in range(len(shape.blocks))):
        yield "Blocks with a sliding window keep no more of the KV cache than the window."
    for memory in soc.memories:
        if memory.note:
            yield memory.note


def _cache(shape: ModelShape) -> Iterator[str]:
    rule = cache_rule(shape)
    if rule is None:
        return
    form = rule.form
    if form.window:
        yield (
            f"The KV cache keeps the first {form.sinks} and the newest {form.window} tokens, at their places in the "
            "text; blocks with a sliding window of their own keep no more tokens than that, and no first ones."
        )
    if rule.groups:
        yield (
            f"The KV cache is counted with float16 scales and zero points, of keys by channel over {GROUP} tokens and "
            f"of values by token over at most {GROUP} channels, and with {form.sinks} sinks and one open group of "
            f"{GROUP} tokens at {FULL_BITS} bit. A token is written in full, and again as codes with its group."
        )


def _patterns(shape: ModelShape, linears: list[LinearShape], soc: Soc, found: Needs) -> Iterator[str]:
    patterns = ", ".join(sorted({str(x.pattern) for x in linears if x.pattern is not None}))
    if not patterns:
        return
    if soc.layout.patterns:
        in_full = weight_bytes(shape, replace(soc.layout, patterns=False)).total
        saved = in_full - found.weights.total
        engine = soc.accelerator
        how = f", to be unpacked by the cores since {engine.name} has no use of them" if engine else ""
        if saved:
            yield (
                f"The {patterns} layers lie as kept values and their index{how}: {size_text(saved)} less than with "
                "their zeros."
            )
        else:
            yield f"The {patterns} layers lie with their zeros: kept values and their index would take no less."
        return
    plain, packed = weight_bytes(shape, PLAIN).total, weight_bytes(shape, PACKED).total
    yield (
        f"The {soc.layout.name} layout has no use of the {patterns} pattern: its zeros take the room and time of any "
        f"weight. Packed as kept values with their index, all weights would take {size_text(packed)} instead of "
        f"{size_text(plain)}, to be unpacked in software."
    )


def _no_integers(linears: list[LinearShape], soc: Soc, found: Needs) -> Iterator[str]:
    names: dict[str, set[str]] = {}
    for name, words in (x.grid.on_cores for x in linears if x.grid is not None and not x.grid.integer):
        names.setdefault(words, set()).add(name)
    size = size_text(found.weights.block_codes + found.weights.scales_and_zeros)
    instead = f", so {soc.accelerator.name} cannot use them" if soc.accelerator else ""
    for words, of in names.items():
        yield (
            f"{' and '.join(sorted(of))}: {size} of codes stand for {words.format(instead=instead)}. "
            "Quantise with --quant gptq4 to have integers."
        )


def _accelerator(
    shape: ModelShape, linears: list[LinearShape], soc: Soc, engine: Engine, found: Needs
) -> Iterator[str]:
    grids = [(x.grid, x.in_features) for x in linears if x.grid is not None and x.grid.integer]
    if not engine.group_scales:
        groups = sorted({grid.group for grid, width in grids if grid.groups(width) > 1})
        if groups:
            counted = ". One scale per channel is counted here" if soc.layout.scale_per == "channel" else ""
            yield (
                f"{engine.name} has one scale per output channel: groups of {', '.join(map(str, groups))} need one job "
                f"per group and a rescale on the cores. Quantise with --quant gptq4-channel to avoid that{counted}."
            )
        if any(not grid.symmetric for grid, _ in grids):
            yield (
                f"{engine.name} has one weight offset per layer: zero points per row or group are corrected on the "
                "cores. Quantise with --symmetric to avoid that."
            )
    slot, block = soc.count("weight_slot"), soc.count("weight_input_block")
    if slot and block and soc.layout.slot_bits is None:
        own = replace(soc.layout, slot_bits=slot, input_block=block, patterns=False)
        full = weight_bytes(shape, own).total
        if full > found.weights.total:
            room = sum(memory.capacity_bytes - memory.reserved_bytes for memory in soc.with_role("weights"))
            fate = ", which does not fit" if found.weights.total <= room < full else ""
            yield (
                f"{engine.name} reads weights in slots of {slot} bit, inputs padded to {block}. Stored so, all weights "
                f"would take {size_text(full)} instead of {size_text(found.weights.total)}{fate}; as counted here the "
                "cores unpack them tile by tile, which the times leave out."
            )
    widest = soc.constants.get("weight_bits")
    head = 0 if shape.embedding_bits else found.weights.head or found.weights.embedding
    adapters = sum(t.nbytes for x in linears if not x.adapter_packed for t in x.adapter() if t.name.endswith(".weight"))
    unquantised = found.weights.dense_linears + adapters + head
    if widest and unquantised:
        yield (
            f"{engine.name} takes integer weights of at most {widest.high or widest.value:g} bit: "
            f"{size_text(unquantised)} of matrices (unquantised linear layers, adapters, head) cannot run on it."
        )

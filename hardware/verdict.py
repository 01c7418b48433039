"""What `check` finds out: which memory holds what, what is left or missing, and what would make the model fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from edgepress.checkpoints.memory import size_text
from edgepress.hardware.attention import CacheRule
from edgepress.hardware.footprint import TensorBytes, WeightBytes
from edgepress.hardware.levers import Levers
from edgepress.hardware.needs import Needs, Request
from edgepress.hardware.passes import OperatorTime, Timing
from edgepress.hardware.placement import Placed, Placement
from edgepress.hardware.tiling import Tiling
from edgepress.hardware.units import times_text


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
            need, room = sum(use.peak_bytes for use in at), sum(use.capacity_bytes for use in at)
            over = f" ({times_text(need, room)})" if need > room else ""
            words.append(f"{name} {size_text(need)} of {size_text(room)}{over}")
        return f"{'fits' if self.fits else 'does not fit'} {self.soc}: {', '.join(words)}"

    def to_dict(self, tensors: bool = False) -> dict[str, Any]:
        """The verdict for JSON: sizes in bytes, headroom negative where over."""
        placement = self.placement.to_dict()
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
            "timing": self.timing if self.timing is None or isinstance(self.timing, str) else self.timing.to_dict(),
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

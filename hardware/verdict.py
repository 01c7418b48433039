"""What `check` finds out: which memory holds what, what is left or missing, and how that reads on a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from hardware.footprint import Peak, WeightBytes

COLUMNS = 100


@dataclass(frozen=True)
class MemoryUse:
    """What one memory is asked to hold, in bytes, by part."""

    name: str
    role: str
    capacity_bytes: int
    parts: tuple[tuple[str, int], ...]

    @property
    def used_bytes(self) -> int:
        """All parts together; more than the capacity if they do not fit."""
        return sum(size for _, size in self.parts)

    @property
    def headroom_bytes(self) -> int:
        """What is left; negative by as much as does not fit."""
        return self.capacity_bytes - self.used_bytes

    @property
    def fits(self) -> bool:
        """Whether the memory holds all of it."""
        return self.headroom_bytes >= 0


@dataclass(frozen=True)
class LayerFit:
    """How one matrix product tiles into the working memory."""

    name: str
    repeats: int  # in how many blocks
    working_set_bytes: int  # with the smallest tile: the smallest working memory that would do
    largest_tile: int  # output channels; 0 if not even the smallest tile fits

    def __str__(self) -> str:
        """The layer's name, and in how many blocks it lies."""
        return f"{self.name} ({self.repeats} blocks)" if self.repeats > 1 else self.name


@dataclass(frozen=True)
class Verdict:
    """Whether and by how much a model fits a chip, and what the numbers do not say."""

    model: str
    family: str
    parameters: int
    soc: str
    context: int
    kv_bits: int
    activation_bits: int
    prefill_chunk: int  # prompt tokens that pass at once
    memories: tuple[MemoryUse, ...]
    weights: WeightBytes
    packed_weights: WeightBytes | None  # N:M layers as kept values and index; None without a pattern
    decode: Peak
    prefill: Peak
    largest_layer: LayerFit
    layers_too_large: tuple[LayerFit, ...]
    summary: str
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether every memory on the chip holds its share; off-chip memory does not count."""
        return all(use.fits for use in self.memories if use.role != "off_chip")

    def to_dict(self) -> dict[str, Any]:
        """The verdict for JSON: sizes in bytes, headroom negative where over."""
        return {
            "model": self.model,
            "family": self.family,
            "parameters": self.parameters,
            "soc": self.soc,
            "context": self.context,
            "kv_bits": self.kv_bits,
            "activation_bits": self.activation_bits,
            "prefill_chunk": self.prefill_chunk,
            "fits": self.fits,
            "summary": self.summary,
            "memories": [
                {
                    "name": use.name,
                    "role": use.role,
                    "capacity_bytes": use.capacity_bytes,
                    "used_bytes": use.used_bytes,
                    "headroom_bytes": use.headroom_bytes,
                    "fits": use.fits,
                    "parts": dict(use.parts),
                }
                for use in self.memories
            ],
            "weight_bytes": self.weights.total,
            "packed_weight_bytes": self.packed_weights.total if self.packed_weights else None,
            "activations": {
                mode: {"bytes": peak.nbytes, "operator": peak.operator, "alive": list(peak.alive)}
                for mode, peak in (("decode", self.decode), ("prefill", self.prefill))
            },
            "largest_layer": asdict(self.largest_layer),
            "layers_too_large": [asdict(layer) for layer in self.layers_too_large],
            "notes": list(self.notes),
        }

    def render(self) -> str:
        """The verdict as plain text of at most 100 columns."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield from textwrap.wrap(
            f"{self.model} ({self.family}, {_count(self.parameters)} parameters) on {self.soc}: context "
            f"{self.context}, KV cache {self.kv_bits} bit, activations {self.activation_bits} bit",
            COLUMNS,
        )
        yield ""
        yield from self._table()
        yield ""
        yield from textwrap.wrap(self.summary, COLUMNS)
        yield ""
        for line in self._details():
            yield from textwrap.wrap(line, COLUMNS, subsequent_indent="  ")
        if self.notes:
            yield ""
            yield "Notes"
        for note in self.notes:
            yield from textwrap.wrap(note, COLUMNS, initial_indent="  - ", subsequent_indent="    ")

    def _details(self) -> Iterator[str]:
        yield (
            f"Activations: {size_text(self.prefill.nbytes)} to prefill {self.prefill_chunk} at once (at "
            f"{self.prefill.operator}), {size_text(self.decode.nbytes)} to decode (at {self.decode.operator})"
        )
        if self.layers_too_large:
            yield "Layers whose smallest tile does not fit, and the working memory that would do:"
            yield from (f"- {layer}: {size_text(layer.working_set_bytes)}" for layer in self.layers_too_large)
        else:
            yield f"Largest layer: {self.largest_layer}, up to {self.largest_layer.largest_tile} output channels a tile"

    def _table(self) -> Iterator[str]:
        names = [name for use in self.memories for name in (use.name, *(f"  {part}" for part, _ in use.parts))]
        width = max(map(len, (*names, "memory")))
        header = f"{'memory':<{width}}  {'role':<8}  {'capacity':>9}  {'used':>9}  {'headroom':>9}"
        yield header
        yield "-" * len(header)
        for use in self.memories:
            if use.role == "off_chip" and not use.used_bytes:
                continue
            sizes = "  ".join(f"{size_text(x):>9}" for x in (use.capacity_bytes, use.used_bytes, use.headroom_bytes))
            over = "" if use.fits else f"  over, {times_text(use.used_bytes, use.capacity_bytes)}"
            yield f"{use.name:<{width}}  {use.role:<8}  {sizes}{over}"
            for part, size in use.parts:
                yield f"{'  ' + part:<{width}}  {'':<8}  {'':>9}  {size_text(size):>9}"


def size_text(size: int) -> str:
    """Bytes for people, three digits: 68.4 MiB, 256 KiB, -1.5 KiB, 12 B."""
    if abs(size) < 1024:
        return f"{size} B"
    value, units = size / 1024, ["KiB", "MiB", "GiB", "TiB"]
    while abs(value) >= 999.5 and len(units) > 1:  # 1,023 KiB would need a fourth digit
        value /= 1024
        units.pop(0)
    return f"{value:.3g} {units[0]}"


def times_text(need: int, room: int) -> str:
    """How often the room would be needed, three digits or all of them: 17.1 x, 3,826 x."""
    times = need / room
    return f"{times:,.0f} x" if times >= 999.5 else f"{times:.3g} x"


def _count(number: int) -> str:
    return f"{number / 1e9:.4g} billion" if number >= 1e9 else f"{number / 1e6:.4g} million"

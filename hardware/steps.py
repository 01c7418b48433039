"""One operator on one chip: what it moves over which path, and the cycles that takes.

Paths: `weight link` (weights from their own memory straight to the accelerator), `DMA` (between the on-chip memories
and L1), `off-chip`. Formulas: Deeploy's tile traces and GVSoC's model of N-EUREKA, see `rates`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hardware.matrices import bytes_of
from hardware.operators import ACCELERATOR, Operator
from hardware.rates import DEFAULT, LOW, Rates
from hardware.soc import Memory, Soc
from hardware.tiling import Tiling, engine_of, stored_bytes, tile

KV_CACHE, ACTIVATIONS = "KV cache", "activations"  # as a placement names them
LINK, DMA, OFF_CHIP = "weight link", "DMA", "off-chip"
LAUNCH, ARITHMETIC = "launches", "arithmetic"


@dataclass(frozen=True)
class Traffic:
    """Bytes between a memory and an engine over a path."""

    memory: str
    path: str  # LINK, DMA, OFF_CHIP, or empty for L1 itself
    nbytes: int


@dataclass(frozen=True)
class Work:
    """An operator placed on an engine, tiled, with what it must move at least and what it does move."""

    operator: Operator
    engine: str
    tiling: Tiling
    floor: tuple[Traffic, ...]  # packed weights once, KV cache once; activations may stay in L1
    moved: tuple[Traffic, ...]  # in the engine's layout, again for every tile that needs it, activations too
    copied: tuple[Traffic, ...]  # the KV cache, where appending copies it whole
    jobs: int  # launches of the accelerator
    corrections: int  # products on the cores for scales or offsets that the accelerator lacks

    def moved_at(self, r: Rates) -> tuple[Traffic, ...]:
        return self.moved + self.copied if r.cache_copied else self.moved

    def floor_cycles(self, r: Rates) -> dict[str, float]:
        """The least cycles each resource is busy."""
        peak = r.linear_peak if self.engine == ACCELERATOR else r.core_peak
        return {self.engine: self.operator.needed_macs / peak, **_path_cycles(self.floor, r)}

    def cycles(self, r: Rates) -> float:
        """The estimate at one corner.

        low: transfers hide behind computing (double buffers). default: DMA in and out around computing, streams from
        the weight link or off-chip hidden behind it. high: streams from off-chip not hidden either.
        """
        parts = self.parts(r)
        busy = parts[LAUNCH] + parts[ARITHMETIC]
        if r.corner == LOW:
            return max(busy, parts[LINK], parts[DMA], parts[OFF_CHIP])
        if r.corner == DEFAULT:
            if self.engine == ACCELERATOR:
                return parts[DMA] + max(busy, parts[LINK], parts[OFF_CHIP])
            # The fitted cost of a kernel holds its DMA's launches; its bytes hide behind its arithmetic.
            return parts[LAUNCH] + max(parts[ARITHMETIC], parts[DMA], parts[OFF_CHIP])
        return parts[DMA] + parts[OFF_CHIP] + max(busy, parts[LINK])

    def parts(self, r: Rates) -> dict[str, float]:
        """Cycles by what they go to, before any of it is hidden."""
        x, tiles = self.operator, max(self.tiling.tiles, 1)
        paths = _path_cycles(self.moved_at(r), r)
        if self.engine == ACCELERATOR:
            assert x.weights is not None
            groups = max(self.jobs // tiles, 1)
            arithmetic = groups * r.linear_cycles(x.rows, -(-x.depth // groups), x.columns)
            if self.corrections:
                arithmetic += r.core_cycles(self.corrections, 1)
            launch, dma_launches = r.launch * self.jobs, tiles
        else:
            total = r.core_cycles(x.macs + x.element_operations, x.kernels)
            launch = min(total, min(each for each, _ in r.core_fits) * x.kernels)
            arithmetic, dma_launches = total - launch, tiles - 1
        paths[DMA] += r.dma_launch * dma_launches
        return {LAUNCH: launch, ARITHMETIC: arithmetic, **paths}


def work_of(operator: Operator, soc: Soc, where: Mapping[str, Memory]) -> Work:
    """Place and tile one operator. `where` has a memory for each constant, the KV cache and the activations."""
    engine, x = engine_of(operator, soc), operator
    home = None if x.weights is None else where[x.weights.name]
    path = "" if home is None else _path(home, soc, engine)
    tiling = tile(x, soc, weights_in_l1=path != LINK)
    cache, activations = where[KV_CACHE], where[ACTIVATIONS]
    cache_path, activation_path = _path(cache, soc, ""), _path(activations, soc, "")
    kv = Traffic(cache.name, cache_path, x.kv_read + x.kv_write)
    floor, moved = [kv], [kv]
    taken, given = _activation_bytes(x)
    row_tiles, column_tiles = max(tiling.row_tiles, 1), max(tiling.column_tiles, 1)
    if home is not None:
        floor.append(Traffic(home.name, path, x.weight_bytes))
        weights = stored_bytes(x, soc)
        if x.kind == "linear" and path in (DMA, OFF_CHIP) and row_tiles > 1 and column_tiles > 1:
            # Either the weights come again for every tile of rows, or the inputs for every tile of columns.
            again = weights * (row_tiles - 1), taken * (column_tiles - 1)
            speed = _relative_speed(soc) if path == OFF_CHIP else 1.0
            weights, taken = (
                (weights + again[0], taken) if again[0] / speed <= again[1] else (weights, taken + again[1])
            )
        elif x.kind == "linear":
            weights *= row_tiles
        moved.append(Traffic(home.name, path, weights))
    # Scales and biases count with the weights: the 125 cycles of DMA that Deeploy's trace has before a job of 256
    # outputs have no room for 2 KiB of them.
    moved.append(Traffic(activations.name, activation_path, taken + given))
    copied = (Traffic(cache.name, cache_path, 2 * x.kv_held),) if x.kv_held else ()
    jobs = corrections = 0
    if engine == ACCELERATOR and x.weights is not None and soc.accelerator is not None:
        groups = 1 if soc.accelerator.group_scales else x.weights.groups
        jobs = max(tiling.tiles, 1) * groups
        if groups > 1 or (x.weights.offsets and not soc.accelerator.group_scales):
            corrections = x.rows * x.columns * groups
    return Work(x, engine, tiling, _filled(floor), _filled(moved), copied, jobs, corrections)


def _activation_bytes(x: Operator) -> tuple[int, int]:
    taken, given = sum(b.nbytes for b in x.reads), sum(b.nbytes for b in x.writes)
    if x.kind == "norm":  # the last one reads a single token's row of the residual
        taken = min(taken, bytes_of(x.rows * x.columns * x.activation_bits))
    return taken, given


def _path(memory: Memory, soc: Soc, engine: str) -> str:
    if memory.role == "off_chip":
        return OFF_CHIP
    if memory.role == "working":
        return ""
    linked = memory.role == "weights" and engine == ACCELERATOR and "weight_link" in soc.constants
    return LINK if linked else DMA


def _relative_speed(soc: Soc) -> float:
    """Off-chip bandwidth as a fraction of the DMA's."""
    constants = soc.constants
    return constants["off_chip_bandwidth"].value / constants["clock"].value / constants["dma"].value


def _path_cycles(traffic: tuple[Traffic, ...], r: Rates) -> dict[str, float]:
    speeds = {LINK: r.link, DMA: r.dma, OFF_CHIP: r.off_chip}
    found = dict.fromkeys(speeds, 0.0)
    for x in traffic:
        speed = speeds.get(x.path)
        if speed is not None:
            found[x.path] += x.nbytes / speed
    return found


def _filled(traffic: list[Traffic]) -> tuple[Traffic, ...]:
    return tuple(x for x in traffic if x.nbytes)


def bytes_on(path: str, traffic: tuple[Traffic, ...]) -> int:
    """Bytes that go over one path."""
    return sum(x.nbytes for x in traffic if x.path == path)

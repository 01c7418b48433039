"""One operator on one chip: what it moves over which path, and the cycles that takes.

Paths: `weight link` (weights from their own memory straight to the accelerator), `DMA` (between the on-chip memories
and L1), `off-chip`. Formulas: Deeploy's tile traces and GVSoC's model of N-EUREKA, see `rates`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgepress.checkpoints.forms import bytes_of
from edgepress.hardware.operators import ACCELERATOR, Operator
from edgepress.hardware.rates import DEFAULT, LOW, Rates
from edgepress.hardware.soc import Memory, Soc
from edgepress.hardware.tiling import Tiling, engine_of, stored_bytes, tile

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


@dataclass(frozen=True)
class Share:
    """The part of a tensor that lies in one memory; a tensor's shares add up to 1."""

    memory: Memory
    fraction: float


Places = Mapping[str, tuple[Share, ...]]  # by the names of `operators.weights_read`, `kv_cache_of` and ACTIVATIONS


def kv_cache_of(block: int) -> str:
    """The name of one block's KV cache in a placement."""
    return f"{KV_CACHE} {block}"


def work_of(operator: Operator, soc: Soc, where: Places) -> Work:
    """Place and tile one operator. `where` has a place for each constant, each KV cache and the activations."""
    engine, x = engine_of(operator, soc), operator
    home = () if x.weights is None else where[x.weights.name]
    paths = {_path(share.memory, soc, engine) for share in home}
    tiling = tile(x, soc, weights_in_l1=paths != {LINK})
    floor, moved, copied = [], [], []
    if x.kv_read or x.kv_write:
        assert x.block is not None
        cache = where[kv_cache_of(x.block)]
        floor = moved = _spread(x.kv_read + x.kv_write, cache, soc, "")
        copied = _spread(2 * x.kv_held, cache, soc, "")
    weights, again = stored_bytes(x, soc) if x.weights is not None else 0, 0
    if x.kind == "linear":
        weights, again = _read_again(x, soc, tiling, weights, OFF_CHIP in paths)
    floor = [*floor, *_spread(x.weight_bytes, home, soc, engine)]
    moved = [*moved, *_spread(weights, home, soc, engine)]
    moved += _spread(_activation_bytes(x) + again, where[ACTIVATIONS], soc, "")
    jobs = corrections = 0
    if engine == ACCELERATOR and x.weights is not None and soc.accelerator is not None:
        groups = 1 if soc.accelerator.group_scales else x.weights.groups
        jobs = max(tiling.tiles, 1) * groups
        if groups > 1 or (x.weights.offsets and not soc.accelerator.group_scales):
            corrections = x.rows * x.columns * groups
    return Work(x, engine, tiling, tuple(floor), tuple(moved), tuple(copied), jobs, corrections)


def _read_again(x: Operator, soc: Soc, tiling: Tiling, weights: int, off_chip: bool) -> tuple[int, int]:
    """Bytes of weights moved in all, and of inputs moved more than once.

    With several tiles both ways, either the weights come again for every tile of rows, or the inputs for every tile
    of columns, whichever takes less time.
    """
    more_weights = weights * (max(tiling.row_tiles, 1) - 1)
    inputs = sum(b.nbytes for b in x.reads) * (max(tiling.column_tiles, 1) - 1)
    constants = soc.constants
    speed = constants["dma"].value * constants["clock"].value
    weight_speed = constants["off_chip_bandwidth"].value if off_chip else speed
    return (weights + more_weights, 0) if more_weights / weight_speed <= inputs / speed else (weights, inputs)


def _spread(nbytes: int, shares: tuple[Share, ...], soc: Soc, engine: str) -> list[Traffic]:
    """Bytes by memory; the last share takes what rounding leaves, so that nothing is lost."""
    found, left = [], nbytes
    for i, share in enumerate(shares):
        size = left if i == len(shares) - 1 else min(left, round(nbytes * share.fraction))
        left -= size
        if size:
            found.append(Traffic(share.memory.name, _path(share.memory, soc, engine), size))
    return found


def _activation_bytes(x: Operator) -> int:
    taken, given = sum(b.nbytes for b in x.reads), sum(b.nbytes for b in x.writes)
    if x.kind == "norm":  # the last one reads a single token's row of the residual
        taken = min(taken, bytes_of(x.rows * x.columns * x.activation_bits))
    return taken + given


def _path(memory: Memory, soc: Soc, engine: str) -> str:
    if memory.role == "off_chip":
        return OFF_CHIP
    if memory.role == "working":
        return ""
    linked = memory.role == "weights" and engine == ACCELERATOR and "weight_link" in soc.constants
    return LINK if linked else DMA


def _path_cycles(traffic: tuple[Traffic, ...], r: Rates) -> dict[str, float]:
    speeds = {LINK: r.link, DMA: r.dma, OFF_CHIP: r.off_chip}
    found = dict.fromkeys(speeds, 0.0)
    for x in traffic:
        speed = speeds.get(x.path)
        if speed is not None:
            found[x.path] += x.nbytes / speed
    return found


def bytes_on(path: str, traffic: tuple[Traffic, ...]) -> int:
    """Bytes that go over one path."""
    return sum(x.nbytes for x in traffic if x.path == path)

"""A chip's speeds and costs, and the cycles that one operator takes with them.

low: everything as fast as its source allows, transfers hidden behind computing. default: the stated or
fitted values, as today's compiler runs it. high: everything slow, nothing hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.forms import bytes_of
from edgepress.hardware.operators import ACCELERATOR, Operator
from edgepress.hardware.soc import UNKNOWN, Constant, Memory, Soc
from edgepress.hardware.tiling import Tiling, engine_of, stored_bytes, tile

LOW, DEFAULT, HIGH = "low", "default", "high"
CORNERS = (LOW, DEFAULT, HIGH)

_NEEDED = ("clock", "dma", "dma_launch_cycles", "cluster_macs", "cluster_efficiency", "cluster_operator_cycles")
_DMA = {"dma", "dma_launch_cycles"}  # needed only where tiles are moved to a working memory
_ACCELERATOR = ("linear_macs", "linear_pixels", "linear_block_cycles", "linear_fixed_cycles", "linear_launch_cycles")
_LAYOUT = ("tile_output_channels", "weight_input_block")
_COSTS = ("off_chip_bandwidth", "off_chip_energy", "active_power")


def grounds(soc: Soc) -> dict[str, str]:
    """What the constants of an estimate rest on, as far as it is no source's plain statement."""
    needed = [x for x in soc.constants if x in (*_NEEDED, *_ACCELERATOR, *_COSTS)]
    found = {name: soc.constants[name].fitted or _assumed(soc.constants[name]) for name in needed}
    buses = {f"{m.name} bandwidth": m.bandwidth for m in soc.memories if m.bandwidth is not None}
    found |= {name: bandwidth.fitted or _assumed(bandwidth) for name, bandwidth in buses.items()}
    return {name: words for name, words in found.items() if words}


def _assumed(constant: Constant) -> str:
    return f"assumed: {constant.source}." if constant.kind == "assumed" else ""


@dataclass(frozen=True)
class Range:
    """A number with how far it may be off."""

    low: float
    default: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Range:
        """From the values at the three corners, in their order."""
        low, default, high = values
        return cls(low, default, high)

    def at(self, corner: str) -> float:
        """The value at one of CORNERS."""
        return {LOW: self.low, DEFAULT: self.default, HIGH: self.high}[corner]

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class Rates:
    """One corner. Cycles unless said otherwise; bandwidths in B/cycle."""

    corner: str
    clock: float  # Hz
    speeds: Mapping[str, float]  # by path; operands on a path without a speed cost nothing beyond the arithmetic
    off_chip: float | None  # of the memory from which an excess streams
    dma_launch: float
    core_peaks: tuple[tuple[int, float], ...]  # (bits of the widest operand, MAC/cycle), narrow first
    core_fits: tuple[tuple[float, float], ...]  # (cycles a kernel, share of the peak): each explains the measured run
    linear_peak: float  # MAC/cycle
    pixels: int
    output_block: int
    input_block: int
    block_cycles: float
    fixed_cycles: float
    launch: float
    cache_copied: bool  # appending copies the whole KV cache, as a graph with caches in and out does
    power: float | None  # W
    off_chip_energy: float | None  # J/B
    efficiency: float | None  # Op/J

    def linear_cycles(self, tokens: int, in_features: int, out_features: int) -> float:
        """Cycles of the accelerator for one product, launch excluded.

        ceil(P / 36) * ceil(Kout / 32) * (ceil(Kin / 32) * c_blk + 56 + px), px <= 36 the tokens of a tile; summed over
        tiles of which the last may be smaller. GVSoC's model of N-EUREKA in 1x1 mode.
        """
        full, rest = divmod(tokens, self.pixels)
        blocks = -(-in_features // self.input_block) * self.block_cycles + self.fixed_cycles
        per_output = full * (blocks + self.pixels) + (blocks + rest if rest else 0)
        return -(-out_features // self.output_block) * per_output

    def core_peak(self, bits: int) -> float:
        """MAC/cycle of the cores for operands of so many bits: of the narrowest width known that holds them."""
        return next((peak for width, peak in self.core_peaks if width >= bits), self.core_peaks[-1][1])

    def core_cycles(self, work: float, kernels: int, bits: int = 8) -> float:
        """Cycles of the cores for so many MACs or element operations in so many kernels: the slowest fit."""
        peak = self.core_peak(bits)
        return max(kernels * each + work / (peak * share) for each, share in self.core_fits)


def missing_constants(soc: Soc) -> list[str]:
    """Constants without which no time can be estimated for this chip, and memories of unknown speed."""
    needed = [name for name in _NEEDED if soc.working is not None or name not in _DMA]
    needed += (*_ACCELERATOR, *_LAYOUT) if soc.accelerator else ()
    if any(memory.role == "off_chip" and memory.bandwidth is None for memory in soc.memories):
        needed.append("off_chip_bandwidth")
    missing = [name for name in needed if name not in soc.constants]
    unknown = [m.name for m in soc.memories if m.link == UNKNOWN and m.bandwidth is None and m.role != "staging"]
    return missing + [f"speed of {name}" for name in unknown]


def rates(soc: Soc, corner: str) -> Rates:
    """The chip's constants at one corner. Raises PlanError naming every constant that its file lacks."""
    missing = missing_constants(soc)
    if missing:
        raise PlanError(
            f"no time can be estimated for {soc.name}: its file states no {', '.join(missing)}. "
            "Add them under [constants], each with value, unit, kind and source."
        )

    def cost(name: str) -> float:
        return _at(soc, name, {LOW: "low", HIGH: "high"}.get(corner, ""))

    def speed(name: str) -> float:
        return _at(soc, name, {LOW: "high", HIGH: "low"}.get(corner, ""))

    def maybe(name: str) -> float | None:
        return cost(name) if name in soc.constants else None

    clock, fastest = speed("clock"), {LOW: "high", HIGH: "low"}.get(corner, "")
    peaks = {8: speed("cluster_macs")}
    for bits, peak in ({} if soc.cores is None else soc.cores.throughput).items():
        peaks.setdefault(bits, at_end(peak, fastest))
    speeds = {LINK: "weight_link", DMA: "dma", OFF_CHIP: "off_chip_bandwidth"}
    known = {path: speed(name) for path, name in speeds.items() if name in soc.constants}
    if OFF_CHIP in known:
        known[OFF_CHIP] /= clock
    buses = {bus(m): at_end(m.bandwidth, fastest) / clock for m in soc.memories if m.bandwidth is not None}
    outside = soc.with_role("off_chip")[:1]
    energy = maybe("off_chip_energy")
    accelerated = soc.accelerator is not None
    return Rates(
        corner=corner,
        clock=clock,
        speeds={**known, **buses},
        off_chip=next(((known | buses).get(_path(memory, soc, "")) for memory in outside), None),
        dma_launch=cost("dma_launch_cycles") if "dma_launch_cycles" in soc.constants else 0,
        core_peaks=tuple(sorted(peaks.items())),
        core_fits=_core_fits(soc, corner),
        linear_peak=speed("linear_macs") if accelerated else peaks[8],
        pixels=soc.count("linear_pixels") or 1,
        output_block=soc.count("tile_output_channels") or 1,
        input_block=soc.count("weight_input_block") or 1,
        block_cycles=cost("linear_block_cycles") if accelerated else 0,
        fixed_cycles=cost("linear_fixed_cycles") if accelerated else 0,
        launch=cost("linear_launch_cycles") if accelerated else 0,
        cache_copied=corner == HIGH and "kv_cache_copies" in soc.constants and _at(soc, "kv_cache_copies", "high") > 1,
        power=maybe("active_power"),
        off_chip_energy=None if energy is None else energy * 1e-12,
        efficiency=speed("linear_efficiency") if "linear_efficiency" in soc.constants else None,
    )


def _core_fits(soc: Soc, corner: str) -> tuple[tuple[float, float], ...]:
    """Pairs of launch cost and share of the peak.

    The same measured cycles may be many dear launches or slow arithmetic. So the high corner takes the slower of
    (high, default) and (low, low), never both bad ends at once: that would count the measured cycles twice.
    """

    def pair(each: str, efficiency: str) -> tuple[float, float]:
        return _at(soc, "cluster_operator_cycles", each), _at(soc, "cluster_efficiency", efficiency)

    if corner == LOW:
        return (pair("low", "high"),)
    if corner == DEFAULT:
        return (pair("", ""),)
    return pair("high", ""), pair("low", "low")


def _at(soc: Soc, name: str, end: str) -> float:
    return at_end(soc.constants[name], end)


def at_end(constant: Constant, end: str) -> float:
    """A constant's `low` or `high`, its value where it has none or `end` is empty."""
    stated = {"low": constant.low, "high": constant.high}.get(end)
    return constant.value if stated is None else stated


# --- one operator on one chip -----------------------------------------------------------------------------------------
# One operator on one chip: what it moves over which path, and the cycles that takes.
#
# Paths: `weight link` (weights from their own memory straight to the accelerator), `DMA` (between the on-chip
# memories and L1), `off-chip`, and a memory's own bus. Formulas: Deeploy's tile traces and GVSoC's model of N-EUREKA,
# see `rates`.


KV_CACHE, ACTIVATIONS = "KV cache", "activations"  # as a placement names them
LINK, DMA, OFF_CHIP = "weight link", "DMA", "off-chip"
LAUNCH, ARITHMETIC = "launches", "arithmetic"


@dataclass(frozen=True)
class Traffic:
    """Bytes between a memory and an engine over a path."""

    memory: str
    path: str  # LINK, DMA, OFF_CHIP, a memory's bus, or empty for what is read as fast as it is computed with
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
        peak = r.linear_peak if self.engine == ACCELERATOR else r.core_peak(self.bits)
        return {self.engine: self.operator.needed_macs / peak, **_path_cycles(self.floor, r)}

    @property
    def bits(self) -> int:
        """Of the widest operand that is multiplied."""
        x = self.operator
        weights = x.weights.bits if x.weights is not None and x.kind == "linear" else 0
        return max(x.activation_bits, weights, x.kv_bits if x.kv_read else 0)

    def cycles(self, r: Rates) -> float:
        """The estimate at one corner.

        low: transfers hide behind computing (double buffers). default: DMA in and out around computing, streams from
        the weight link or off-chip hidden behind it. high: streams from off-chip not hidden either.
        """
        parts = self.parts(r)
        busy = parts[LAUNCH] + parts[ARITHMETIC]
        outside = [cycles for path, cycles in parts.items() if path not in (LAUNCH, ARITHMETIC, LINK, DMA)]
        if r.corner == LOW:
            return max(busy, parts[LINK], parts[DMA], *outside)
        if r.corner == DEFAULT:
            if self.engine == ACCELERATOR:
                return parts[DMA] + max(busy, parts[LINK], sum(outside))
            # The fitted cost of a kernel holds its DMA's launches; its bytes hide behind its arithmetic.
            return parts[LAUNCH] + max(parts[ARITHMETIC], parts[DMA], sum(outside))
        return parts[DMA] + sum(outside) + max(busy, parts[LINK])

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
            total = r.core_cycles(x.macs + x.element_operations, x.kernels, self.bits)
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
        weights, again = _read_again(x, soc, tiling, weights, home)
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


def _read_again(x: Operator, soc: Soc, tiling: Tiling, weights: int, home: tuple[Share, ...]) -> tuple[int, int]:
    """Bytes of weights moved in all, and of inputs moved more than once.

    With several tiles both ways, either the weights come again for every tile of rows, or the inputs for every tile
    of columns, whichever takes less time.
    """
    more_weights = weights * (max(tiling.row_tiles, 1) - 1)
    inputs = sum(b.nbytes for b in x.reads) * (max(tiling.column_tiles, 1) - 1)
    if not more_weights or not inputs:
        return weights, 0
    constants = soc.constants
    speed = constants["dma"].value * constants["clock"].value
    slow = [share.memory.bandwidth or constants["off_chip_bandwidth"] for share in home if _outside(share.memory)]
    weight_speed = min((bandwidth.value for bandwidth in slow), default=speed)
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


def bus(memory: Memory) -> str:
    """The path to a memory that states its own bandwidth."""
    return f"{memory.name} bus"


def _outside(memory: Memory) -> bool:
    """Whether it lies beyond the chip's own memories: B/s say how fast it is read, not B/cycle."""
    return memory.bandwidth is not None or memory.role == "off_chip" or memory.link == "off_chip_bandwidth"


def _path(memory: Memory, soc: Soc, engine: str) -> str:
    if _outside(memory):
        return OFF_CHIP if memory.bandwidth is None else bus(memory)
    if memory.role == "working" or (soc.working is None and memory.link == "working_link"):
        return ""
    linked = memory.role == "weights" and engine == ACCELERATOR and "weight_link" in soc.constants
    return LINK if linked else DMA


def _path_cycles(traffic: tuple[Traffic, ...], r: Rates) -> dict[str, float]:
    found = dict.fromkeys((LINK, DMA, OFF_CHIP, *r.speeds), 0.0)
    for x in traffic:
        speed = r.speeds.get(x.path)
        if speed is not None:
            found[x.path] += x.nbytes / speed
    return found


def streamed_bytes(traffic: tuple[Traffic, ...], soc: Soc) -> int:
    """Bytes to and from the memories that only take what does not fit."""
    off_chip = {memory.name for memory in soc.with_role("off_chip")}
    return sum(x.nbytes for x in traffic if x.memory in off_chip)


def outside_bytes(traffic: tuple[Traffic, ...]) -> int:
    """Bytes that cross the chip's border."""
    return sum(x.nbytes for x in traffic if x.path not in ("", LINK, DMA))

"""The constants of a chip as the speeds and costs that a time estimate works with, at three corners.

low: everything as fast as its source allows, transfers hidden behind computing. default: the stated or
fitted values, as today's compiler runs it. high: everything slow, nothing hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from edgepress.checkpoints.errors import PlanError
from edgepress.hardware.soc import Soc

LOW, DEFAULT, HIGH = "low", "default", "high"
CORNERS = (LOW, DEFAULT, HIGH)

_NEEDED = ("clock", "dma", "dma_launch_cycles", "cluster_macs", "cluster_efficiency", "cluster_operator_cycles")
_ACCELERATOR = ("linear_macs", "linear_pixels", "linear_block_cycles", "linear_fixed_cycles", "linear_launch_cycles")
_LAYOUT = ("tile_output_channels", "weight_input_block")

# Which constants were fitted, on what, and what that leaves unproven. Shown with every estimate.
FITS = {
    "cluster_operator_cycles": (
        "fitted: what 712 k cycles of Deeploy's microLlama64 (decode, GVSoC) leave after 56 accelerator jobs, over "
        "201 kernels on the cores. Agreement with that run is no test of the model."
    ),
    "linear_launch_cycles": "fitted on one job: 64 to 256 channels, 2595 cycles in Deeploy's trace, 1896 modelled.",
    "linear_block_cycles": "counted in GVSoC's source, not fitted; default without activation prefetch.",
    "cluster_efficiency": (
        "default assumed. low fitted, with cluster_operator_cycles at its low: the two give 28.3 M cycles for "
        "microLlama64_parallel (prefill of 64 tokens, heads of 4)."
    ),
    "active_power": "from 490 uJ at 340 token/s (arXiv 2408.04413); clock and context of that run were not seen.",
    "off_chip_energy": "assumed: the ends are recollections, the default lies between.",
    "off_chip_bandwidth": "HyperBus by its data rate; a property of the board.",
}


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
    dma: float
    link: float | None  # weights from their own memory to the accelerator, if there is such a path
    off_chip: float | None
    dma_launch: float
    core_peak: float  # MAC/cycle
    core_fits: tuple[tuple[float, float], ...]  # (cycles a kernel, MAC/cycle): each explains the measured run
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

    def core_cycles(self, work: float, kernels: int) -> float:
        """Cycles of the cores for so many MACs or element operations in so many kernels: the slowest fit."""
        return max(kernels * each + work / speed for each, speed in self.core_fits)


def missing_constants(soc: Soc) -> list[str]:
    """Constants without which no time can be estimated for this chip."""
    needed = [*_NEEDED, *((*_ACCELERATOR, *_LAYOUT) if soc.accelerator else ())]
    if soc.with_role("off_chip"):
        needed.append("off_chip_bandwidth")
    return [name for name in needed if name not in soc.constants]


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

    clock, core_peak = speed("clock"), speed("cluster_macs")
    energy = maybe("off_chip_energy")
    accelerated = soc.accelerator is not None
    return Rates(
        corner=corner,
        clock=clock,
        dma=speed("dma"),
        link=speed("weight_link") if "weight_link" in soc.constants else None,
        off_chip=speed("off_chip_bandwidth") / clock if "off_chip_bandwidth" in soc.constants else None,
        dma_launch=cost("dma_launch_cycles"),
        core_peak=core_peak,
        core_fits=_core_fits(soc, corner, core_peak),
        linear_peak=speed("linear_macs") if accelerated else core_peak,
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


def _core_fits(soc: Soc, corner: str, peak: float) -> tuple[tuple[float, float], ...]:
    """Pairs of launch cost and speed. The same measured cycles may be many dear launches or slow arithmetic.

    So the high corner takes the slower of (high, default) and (low, low), never both bad ends at once: that would
    count the measured cycles twice.
    """

    def pair(each: str, efficiency: str) -> tuple[float, float]:
        return _at(soc, "cluster_operator_cycles", each), peak * _at(soc, "cluster_efficiency", efficiency)

    if corner == LOW:
        return (pair("low", "high"),)
    if corner == DEFAULT:
        return (pair("", ""),)
    return pair("high", ""), pair("low", "low")


def _at(soc: Soc, name: str, end: str) -> float:
    constant = soc.constants[name]
    stated = {"low": constant.low, "high": constant.high}.get(end)
    return constant.value if stated is None else stated

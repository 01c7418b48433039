"""Chips as data: memories, engines, layout and constants of a System-on-Chip, every number with unit and source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

ROLES = ("weights", "tiles", "working", "staging", "off_chip")
KINDS = ("stated", "derived", "assumed")
CAPACITY_UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
ENGINE_KINDS = ("accelerator", "cores")

# What a LLaMA-like model computes: the kinds of `edgepress.hardware.operators`, by which an engine lists what it runs.
OPERATORS = (
    "embedding",  # the row of a token
    "linear",  # a product with weights
    "scores",  # queries with the cached keys
    "softmax",
    "softcap",  # scores or logits capped by a tanh (Gemma 2)
    "values",  # softmax with the cached values
    "norm",
    "rope",
    "append",  # keys and values to the cache
    "activation",
    "multiply",
    "add",
)

# Every constant a file may state, with the one unit it is read in. The first two shape the tiles of every
# layer, so no chip can be judged without them.
REQUIRED_CONSTANTS = {"tile_output_channels": "channels", "tile_buffers": "buffers"}
CONSTANT_UNITS = {
    **REQUIRED_CONSTANTS,
    "weight_slot": "bit",
    "weight_input_block": "channels",
    "weight_bits": "bit",
    "kv_cache_copies": "copies",
    "clock": "Hz",
    "weight_link": "B/cycle",
    "working_link": "B/cycle",
    "dma": "B/cycle",
    "off_chip_bandwidth": "B/s",
    "linear_block_cycles": "cycles",
    "linear_launch_cycles": "cycles",
    "dma_launch_cycles": "cycles",
    "cluster_operator_cycles": "cycles",
    "active_power": "W",
    "linear_macs": "MAC/cycle",
    "linear_pixels": "tokens",
    "linear_fixed_cycles": "cycles",
    "linear_efficiency": "Op/J",
    "cluster_macs": "MAC/cycle",
    "cluster_efficiency": "fraction",
    "off_chip_energy": "pJ/B",
}
LINKS = ("weight_link", "working_link", "dma", "off_chip_bandwidth")
COUNTED_UNITS = {"channels", "buffers", "copies", "bit", "B"}  # units in which a fraction makes no sense


@dataclass(frozen=True)
class Constant:
    """A number with its unit, where it comes from, and how far it may be off (None: exact by its source)."""

    value: float  # the default, between low and high
    unit: str
    kind: str  # one of KINDS
    source: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Memory:
    """One memory; `role` (one of ROLES) says what lies in it."""

    name: str
    role: str
    capacity: Constant
    note: str = ""
    reserved: Constant | None = None  # code, stacks and vectors: no tensor lies there
    link: str = ""  # the constant that says how fast it is read, one of LINKS
    latency: Constant | None = None  # cycles to the first byte

    @property
    def capacity_bytes(self) -> int:
        """Capacity in bytes, whatever unit the file states."""
        return _whole_bytes(self.capacity)

    @property
    def reserved_bytes(self) -> int:
        return 0 if self.reserved is None else _whole_bytes(self.reserved)


@dataclass(frozen=True)
class Engine:
    """Something that computes: the operators it runs, how fast, and what it cannot use."""

    name: str
    kind: str  # one of ENGINE_KINDS
    operators: tuple[str, ...]
    skips_zeros: bool  # False: a zero weight costs the bytes and cycles of any other
    group_scales: bool  # False: one scale an output channel, none for groups along the input
    source: str
    throughput: Mapping[int, Constant] = field(default_factory=dict, hash=False)  # weight bits -> peak MAC/cycle


@dataclass(frozen=True)
class Layout:
    """How the weights of a linear layer lie in the weight memory."""

    name: str
    source: str
    slot_bits: int | None  # every weight up to this width takes so many bits; None: its own width, no gaps
    input_block: int  # the input width is padded to a multiple of it
    output_block: int
    scale_bits: int  # width of one scale
    scale_per: str  # group: as many as the checkpoint has; channel: one a row, whatever the checkpoint has
    zero_points: bool  # stored with the scales where a grid has them
    patterns: bool  # an N:M layer may lie as kept values and their index, where that is smaller


@dataclass(frozen=True)
class Setting:
    """A choice or a number of the file that the user may change: `--set name=value`."""

    name: str
    about: str
    value: str  # as it stands after the user's choice
    choices: tuple[str, ...]  # empty: a number with a unit
    default: str

    def __str__(self) -> str:
        allowed = "|".join(self.choices) if self.choices else "a number, with a unit where it has one"
        return f"{self.name} ({allowed}; {self.default}): {self.about}"


@dataclass(frozen=True)
class Soc:
    """A System-on-Chip: memories and engines in the file's order, constants by name."""

    name: str
    description: str
    memories: tuple[Memory, ...]
    constants: Mapping[str, Constant] = field(hash=False)
    engines: tuple[Engine, ...]
    layout: Layout
    settings: tuple[Setting, ...] = ()

    @property
    def accelerator(self) -> Engine | None:
        """The engine that multiplies matrices beside the cores, if there is one."""
        return next((engine for engine in self.engines if engine.kind == "accelerator"), None)

    def with_role(self, role: str) -> tuple[Memory, ...]:
        """The memories of one role, in the file's order."""
        return tuple(memory for memory in self.memories if memory.role == role)

    def count(self, constant: str) -> int | None:
        """A constant counted in whole units (channels, copies, bits, bytes); None where the file has none."""
        found = self.constants.get(constant)
        return None if found is None else int(found.value)

    def runs(self, operator: str) -> bool:
        """Whether any engine has this operator."""
        return any(operator in engine.operators for engine in self.engines)

    @property
    def label(self) -> str:
        """The name with the settings that differ from the file's own."""
        changed = [f"{s.name}={s.value}" for s in self.settings if s.value != s.default]
        return f"{self.name} ({', '.join(changed)})" if changed else self.name


def _whole_bytes(constant: Constant) -> int:
    return int(constant.value * CAPACITY_UNITS[constant.unit])

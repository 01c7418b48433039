"""Chips as data: memories, roles and constants from a TOML file, every number with its unit and source.

The shipped files in `socs/` are examples to copy; `load_soc` takes a shipped name or a path. A bad file is
told all of its faults at once.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoints.errors import PlanError

SHIPPED = Path(__file__).parent / "socs"
ROLES = ("weights", "tiles", "working", "staging", "off_chip")
KINDS = ("stated", "derived", "assumed")
CAPACITY_UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}

# Every constant a file may state, with the one unit it is read in. The first two shape the tiles of every
# layer, so no chip can be judged without them.
REQUIRED_CONSTANTS = {"tile_output_channels": "channels", "tile_buffers": "buffers"}
CONSTANT_UNITS = {
    **REQUIRED_CONSTANTS,
    "weight_slot": "bit",
    "weight_input_block": "channels",
    "weight_bits": "bit",
    "staging_reserved": "B",
    "kv_cache_copies": "copies",
    "clock": "Hz",
    "weight_link": "B/cycle",
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
_COUNTS = {"channels", "buffers", "copies", "bit", "B"}  # units in which a fraction makes no sense


@dataclass(frozen=True)
class Constant:
    """A number with its unit, where it comes from, and how far it may be off (None: not known)."""

    value: float
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

    @property
    def capacity_bytes(self) -> int:
        """Capacity in bytes, whatever unit the file states."""
        return int(self.capacity.value * CAPACITY_UNITS[self.capacity.unit])


@dataclass(frozen=True)
class Accelerator:
    """The engine that multiplies matrices, and what it cannot use."""

    name: str
    skips_zeros: bool  # False: a zero weight costs the bytes and cycles of any other
    group_scales: bool  # False: one scale an output channel, none for groups along the input
    source: str


@dataclass(frozen=True)
class Soc:
    """A System-on-Chip: memories in the file's order, constants by name, the accelerator if there is one."""

    name: str
    description: str
    memories: tuple[Memory, ...]
    constants: Mapping[str, Constant] = field(hash=False)
    accelerator: Accelerator | None = None

    def with_role(self, role: str) -> tuple[Memory, ...]:
        """The memories of one role, in the file's order."""
        return tuple(memory for memory in self.memories if memory.role == role)

    def count(self, constant: str) -> int | None:
        """A constant counted in whole units (channels, copies, bits, bytes); None where the file has none."""
        found = self.constants.get(constant)
        return None if found is None else int(found.value)


def shipped_socs() -> list[str]:
    """Names that `load_soc` takes without a file."""
    return sorted(path.stem for path in SHIPPED.glob("*.toml"))


def load_soc(name_or_path: str) -> Soc:
    """Read a shipped chip by name (any case) or a user's `.toml` by path.

    Raises PlanError for an unknown name, an unreadable file, and for a file with faults, listing them all.
    """
    if name_or_path.lower() in shipped_socs():
        path = SHIPPED / f"{name_or_path.lower()}.toml"
    else:
        path = Path(name_or_path)
        if path.suffix != ".toml" or not path.is_file():
            what = "no such file" if path.suffix == ".toml" else "not a chip known here"
            raise PlanError(
                f"'{name_or_path}': {what}; shipped are {', '.join(shipped_socs())}. "
                "Give one of these or the path of a .toml file with your chip's memories."
            )
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise PlanError(f"{path} cannot be read as TOML: {error}") from None
    faults: list[str] = []
    soc = _soc(data, faults)
    if faults:
        head = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise PlanError("\n".join([f"{head} in {path}:", *(f"  - {fault}" for fault in faults)]))
    return soc


# --- reading, one table at a time: each reader notes its faults and goes on ------------------------------------


def _soc(data: dict[str, Any], faults: list[str]) -> Soc:
    _keys(data, "the file", {"name", "memories", "constants"}, {"description", "accelerator"}, faults)
    memories = tuple(_memory(name, entry, faults) for name, entry in _table(data, "memories", faults).items())
    for role, least in (("weights", 1), ("tiles", 1), ("working", 1)):
        found = sum(memory.role == role for memory in memories)
        if found < least:
            faults.append(f"no memory has the role '{role}'; one must")
    if sum(memory.role == "working" for memory in memories) > 1:
        faults.append("more than one memory has the role 'working'; a layer's tile is computed in one")

    constants = {}
    stated = _table(data, "constants", faults)
    for name, entry in stated.items():
        if name not in CONSTANT_UNITS:
            faults.append(f"constants: unknown key '{name}'; known are {', '.join(sorted(CONSTANT_UNITS))}")
            continue
        constants[name] = _constant(f"constants.{name}", entry, {CONSTANT_UNITS[name]}, faults)
    for name in REQUIRED_CONSTANTS:
        if "constants" in data and name not in stated:
            faults.append(f"constants: '{name}' is missing")

    accelerator = None
    if "accelerator" in data:
        entry = _table(data, "accelerator", faults)
        _keys(entry, "accelerator", {"name", "skips_zeros", "group_scales", "source"}, set(), faults)
        accelerator = Accelerator(
            _text(entry, "accelerator", "name", faults),
            _flag(entry, "accelerator", "skips_zeros", faults),
            _flag(entry, "accelerator", "group_scales", faults),
            _text(entry, "accelerator", "source", faults),
        )
    name, description = _text(data, "the file", "name", faults), _text(data, "the file", "description", faults)
    return Soc(name, description, memories, constants, accelerator)


def _memory(name: str, entry: Any, faults: list[str]) -> Memory:
    where = f"memories.{name}"
    if not isinstance(entry, dict):
        faults.append(f"{where} must be a table with role and capacity")
        entry = {}
    else:
        _keys(entry, where, {"role", "capacity"}, {"note"}, faults)
    role = _text(entry, where, "role", faults)
    if role and role not in ROLES:
        faults.append(f"{where}: unknown role '{role}'; roles are {', '.join(ROLES)}")
    capacity = Constant(0, "B", "assumed", "")
    if "capacity" in entry:
        capacity = _constant(f"{where}.capacity", entry["capacity"], set(CAPACITY_UNITS), faults, positive=True)
    return Memory(name, role, capacity, _text(entry, where, "note", faults))


def _constant(where: str, entry: Any, units: set[str], faults: list[str], positive: bool = False) -> Constant:
    if not isinstance(entry, dict):
        faults.append(f"{where} must be a table: value, unit, kind and source")
        return Constant(0, "B", "assumed", "")
    _keys(entry, where, {"value", "unit", "kind", "source"}, {"low", "high"}, faults)
    unit, kind = _text(entry, where, "unit", faults), _text(entry, where, "kind", faults)
    if unit and unit not in units:
        faults.append(f"{where}: unit '{unit}' is not {' or '.join(sorted(units))}")
    if kind and kind not in KINDS:
        faults.append(f"{where}: kind '{kind}' is not {', '.join(KINDS)}")
    numbers = {key: _number(entry, where, key, faults) for key in ("value", "low", "high")}
    value, low, high = numbers["value"] or 0, numbers["low"], numbers["high"]
    if numbers["value"] is not None:
        said = f"{value:g} {unit}".strip()
        if value < 0 or (value == 0 and (positive or unit in _COUNTS)):
            faults.append(f"{where}: {said} must be above 0")
        if unit in _COUNTS and value != int(value):
            faults.append(f"{where}: {said} must be a whole number")
        if (low is not None and low > value) or (high is not None and high < value):
            faults.append(f"{where}: value {value:g} lies outside low and high")
    return Constant(value, unit, kind, _text(entry, where, "source", faults), low, high)


def _keys(entry: Mapping[str, Any], where: str, needed: set[str], optional: set[str], faults: list[str]) -> None:
    known = needed | optional
    faults += [f"{where}: unknown key '{k}'; known are {', '.join(sorted(known))}" for k in entry if k not in known]
    faults += [f"{where}: '{key}' is missing" for key in sorted(needed) if key not in entry]


def _table(data: Mapping[str, Any], key: str, faults: list[str]) -> dict[str, Any]:
    entry = data.get(key, {})
    if isinstance(entry, dict):
        return entry
    faults.append(f"'{key}' must be a table")
    return {}


def _text(entry: Mapping[str, Any], where: str, key: str, faults: list[str]) -> str:
    text = entry.get(key, "")
    if key in entry and (not isinstance(text, str) or not text.strip()):
        faults.append(f"{where}: '{key}' must be a text that is not empty")
        return ""
    return str(text)


def _flag(entry: Mapping[str, Any], where: str, key: str, faults: list[str]) -> bool:
    if key in entry and not isinstance(entry[key], bool):
        faults.append(f"{where}: '{key}' must be true or false")
    return bool(entry.get(key, False))


def _number(entry: Mapping[str, Any], where: str, key: str, faults: list[str]) -> float | None:
    value = entry.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        faults.append(f"{where}: '{key}' must be a finite number")
        return None
    return value

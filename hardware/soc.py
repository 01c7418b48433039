"""Read and check a chip's TOML file: memories, engines, layout and constants, every number with unit and source."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from edgepress.checkpoints.documents import RECIPE_BYTES, parse_toml, read_small
from edgepress.checkpoints.errors import PlanError, near

ROLES = ("weights", "tiles", "working", "staging", "off_chip")
KINDS = ("stated", "derived", "assumed")
CAPACITY_UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
ENGINE_KINDS = ("accelerator", "cores")
ACCESSES = ("rx", "rw", "rwx")  # what the cores may do to a memory: read, write, execute

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
# layer, so no chip with a working memory can be judged without them.
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
UNKNOWN = "unknown"  # in place of a link: no source says how fast the memory is, so nothing can be timed
_MOST_COUNTED = 1 << 53  # beyond it a float does not hold every whole number
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
    fitted: str = ""  # what the value was fitted on or rests on, and what that leaves open; said with each estimate


@dataclass(frozen=True)
class Memory:
    """One memory; `role` (one of ROLES) says what lies in it."""

    name: str
    role: str
    capacity: Constant
    note: str = ""
    reserved: Constant | None = None  # code, stacks and vectors: no tensor lies there
    link: str = ""  # the constant that says how fast it is read, one of LINKS, or UNKNOWN
    bandwidth: Constant | None = None  # B/s of its own bus, in place of a link
    latency: Constant | None = None  # cycles to the first byte
    address: Constant | None = None  # of the first byte; None where no program can be placed there
    access: str = ""  # one of ACCESSES; empty without an address

    @property
    def first_address(self) -> int | None:
        """Address of the first byte as the cores see it, None where the file states none."""
        return None if self.address is None else int(self.address.value)

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
    basis: str = ""  # what an estimate of time rests on, in one clause
    prefill_note: str = ""  # said with each estimate of prefill
    no_time: str = ""  # why no time can be estimated, where no source gives what it takes
    no_rv32: str = ""  # why no program for RV32 cores can be made for it, where that is known

    @property
    def accelerator(self) -> Engine | None:
        """The engine that multiplies matrices beside the cores, if there is one."""
        return next((engine for engine in self.engines if engine.kind == "accelerator"), None)

    @property
    def cores(self) -> Engine | None:
        """The programmable engine, if the file has one."""
        return next((engine for engine in self.engines if engine.kind == "cores"), None)

    @property
    def working(self) -> Memory | None:
        """Where tiles are computed; None where the engines read every memory themselves, so that nothing is cut."""
        return next((memory for memory in self.memories if memory.role == "working"), None)

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


# --- reading a chip's file --------------------------------------------------------------------------------------------
# Reading a chip's file: the settings are laid over it, then every table is checked; all faults come at once.
#
# `load_soc` takes a shipped name (the files in `socs/`, whose format `socs/SCHEMA.md` documents) or the path of one's
# own. Each reader notes its faults and goes on with something harmless, so that one run names everything to mend.


SHIPPED = Path(__file__).parent / "socs"
_PEAKS = {"accelerator": "linear_macs", "cores": "cluster_macs"}


def shipped_socs() -> list[str]:
    """Names that `load_soc` takes without a file."""
    return sorted(path.stem for path in SHIPPED.glob("*.toml"))


def load_soc(name_or_path: str, settings: Iterable[str] = ()) -> Soc:
    """Read a shipped chip by name (any case) or a user's `.toml` by path.

    settings: `name=value` each; `siracusa:sram_role=weights,hyperram=16MiB` says the same in one text. Raises
    PlanError for an unknown name, an unreadable file, and for a file or settings with faults, listing them all.
    """
    base, _, inline = name_or_path.partition(":")
    wanted = [*filter(None, inline.split(",")), *settings]
    path = _find(base)
    soc, faults = _parsed(_read(path), wanted)
    if faults:
        head = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise PlanError("\n".join([f"{head} in {path}:", *(f"  - {fault}" for fault in faults)]))
    return soc


def _read(path: Path) -> dict[str, Any]:
    """The file's tables, laid over those of the shipped file that it is `based_on`; layouts are never mixed."""
    data = parse_toml(read_small(path, RECIPE_BYTES, PlanError), str(path), PlanError)
    base = data.pop("based_on", None)
    if base is None:
        return data
    if not isinstance(base, str) or base.lower() not in shipped_socs() or base.lower() == path.stem:
        close = near(base, shipped_socs())
        raise PlanError(
            f"{path}: based_on {base!r} is not a chip known here{close}; shipped are {', '.join(shipped_socs())}"
        )
    return _overlay(_read(_find(base)), data)


def _overlay(base: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in data.items():
        both_tables = isinstance(value, dict) and isinstance(base.get(key), dict)
        # A number or a layout is replaced as a whole, or a bound of the old one would stay behind.
        whole = key == "layout" or (both_tables and "value" in base[key])
        merged[key] = _overlay(base[key], value) if both_tables and not whole else value
    return merged


def _find(name_or_path: str) -> Path:
    if name_or_path.lower() in shipped_socs():
        return SHIPPED / f"{name_or_path.lower()}.toml"
    path = Path(name_or_path)
    if path.suffix != ".toml" or not path.is_file():
        what = "no such file" if path.suffix == ".toml" else "not a chip known here"
        shipped = shipped_socs()
        raise PlanError(
            f"'{name_or_path}': {what}{near(name_or_path.lower(), shipped)}; shipped are {', '.join(shipped)}. "
            "Give one of these or the path of a .toml file with your chip's memories."
        )
    return path


def _parsed(data: dict[str, Any], wanted: Iterable[str]) -> tuple[Soc, list[str]]:
    """The chip that a file's tables describe with the wanted settings, and everything wrong with either."""
    faults: list[str] = []
    data = copy.deepcopy(data)
    settings = _settings(data, wanted, faults)
    optional = {"description", "settings", "estimate", "no_rv32"}
    check_keys(data, "the file", {"name", "memories", "engines", "layout", "constants"}, optional, faults)
    constants = _constants(data, faults)
    memories = tuple(_memory(name, entry, faults) for name, entry in table(data, "memories", faults).items())
    if "memories" in data:
        _check_roles(memories, faults)
        _check_apart(memories, faults)
    for memory in memories:
        if memory.link in LINKS and memory.link not in constants and memory.bandwidth is None:
            faults.append(f"memories.{memory.name}: its link '{memory.link}' is not among the constants")
    engines = tuple(_engine(name, entry, faults) for name, entry in table(data, "engines", faults).items())
    if "engines" in data and not any("linear" in engine.operators for engine in engines):
        faults.append("no engine lists the operator 'linear'; one must")
    name, about, no_rv32 = (text(data, "the file", key, faults) for key in ("name", "description", "no_rv32"))
    estimate = table(data, "estimate", faults)
    check_keys(estimate, "estimate", set(), {"basis", "prefill", "none"}, faults)
    basis, prefill, none = (text(estimate, "estimate", key, faults) for key in ("basis", "prefill", "none"))
    layout = _layout(table(data, "layout", faults), "layout" in data, faults)
    for engine in engines:  # the peaks at 8 bit under the names that a time estimate reads
        if 8 in engine.throughput and engine.kind in _PEAKS:
            constants.setdefault(_PEAKS[engine.kind], engine.throughput[8])
    return Soc(name, about, memories, constants, engines, layout, settings, basis, prefill, none, no_rv32), faults


# --- settings --------------------------------------------------------------------------------------------------


def _settings(data: dict[str, Any], wanted: Iterable[str], faults: list[str]) -> tuple[Setting, ...]:
    """Lay the chosen values over the data, which changes; the settings as they stand then."""
    asked: dict[str, str] = {}
    for given in wanted:
        name, equals, value = (part.strip() for part in given.partition("="))
        if not (name and equals and value):
            faults.append(f"setting '{given}': write name=value, e.g. sram_role=weights")
        else:
            asked[name] = value
    declared = table(data, "settings", faults)
    found = []
    for name, entry in declared.items():
        setting = _setting(name, entry, asked.get(name), data, faults)
        if setting is not None:
            found.append(setting)
    for name in asked:
        if name not in declared:
            there = "; ".join(map(str, found)) or "this file has none"
            faults.append(f"there is no setting '{name}'{near(name, declared)}. Settings: {there}")
    return tuple(found)


def _setting(name: str, entry: Any, asked: str | None, data: dict[str, Any], faults: list[str]) -> Setting | None:
    where = f"settings.{name}"
    if not isinstance(entry, dict):
        faults.append(f"{where} must be a table: about, and choices with default, or sets")
        return None
    about = text(entry, where, "about", faults)
    if "sets" in entry:
        check_keys(entry, where, {"about", "sets"}, set(), faults)
        target = _follow(data, str(entry["sets"]))
        if not isinstance(target, dict) or "value" not in target:
            faults.append(f"{where}: 'sets' names {entry['sets']!r}, which is no number of this file")
            return None
        before = f"{target['value']} {target.get('unit', '')}".strip()
        if asked is not None:
            _set_number(where, target, asked, faults)
        return Setting(name, about, before if asked is None else asked, (), before)
    check_keys(entry, where, {"about", "choices", "default"}, set(), faults)
    choices, default = table(entry, "choices", faults), text(entry, where, "default", faults)
    if default not in choices:
        faults.append(f"{where}: the default '{default}' is not among its choices {', '.join(choices)}")
        return None
    chosen = default if asked is None else asked
    if chosen not in choices:
        faults.append(f"{where}: there is no '{chosen}'{near(chosen, choices)}; choose {' or '.join(choices)}")
        chosen = default
    for path, value in choices[chosen].items() if isinstance(choices[chosen], dict) else ():
        parent, _, key = path.rpartition(".")
        target = _follow(data, parent)
        if isinstance(target, dict):
            target[key] = value
        else:
            faults.append(f"{where}.choices.{chosen}: '{path}' names nothing in this file")
    return Setting(name, about, chosen, tuple(choices), default)


def _set_number(where: str, target: dict[str, Any], given: str, faults: list[str]) -> None:
    match = re.fullmatch(r"([-+]?[0-9.]+(?:e[-+]?[0-9]+)?)\s*([A-Za-z/]*)", given, re.IGNORECASE)
    try:
        value = float(match[1]) if match else math.nan
    except ValueError:
        value = math.nan
    if match is None or math.isnan(value):
        faults.append(f"{where}: '{given}' is not a number, with or without a unit")
        return
    target["value"] = int(value) if value.is_integer() else value
    target["unit"] = match[2] or target.get("unit", "")
    target |= {"kind": "stated", "source": "given by the user"}
    for of_the_old in ("low", "high", "fitted"):
        target.pop(of_the_old, None)


def _follow(data: Any, path: str) -> Any:
    for key in path.split("."):
        data = data.get(key) if isinstance(data, dict) else None
    return data


# --- tables ----------------------------------------------------------------------------------------------------


def _constants(data: Mapping[str, Any], faults: list[str]) -> dict[str, Constant]:
    stated, constants = table(data, "constants", faults), {}
    for name, entry in stated.items():
        if name not in CONSTANT_UNITS:
            there = f"known are {', '.join(sorted(CONSTANT_UNITS))}"
            faults.append(f"constants: unknown key '{name}'{near(name, CONSTANT_UNITS)}; {there}")
            continue
        constants[name] = constant(f"constants.{name}", entry, {CONSTANT_UNITS[name]}, faults)
    memories = table(data, "memories", []).values()
    tiled = any(isinstance(entry, dict) and entry.get("role") == "working" for entry in memories)
    for name in REQUIRED_CONSTANTS if tiled else ():
        if "constants" in data and name not in stated:
            faults.append(f"constants: '{name}' is missing")
    return constants


_MAY_HAVE = {"note", "reserved", "latency", "address", "access", "bandwidth"}


def _memory(name: str, entry: Any, faults: list[str]) -> Memory:
    where = f"memories.{name}"
    if not isinstance(entry, dict):
        faults.append(f"{where} must be a table with role, capacity and link")
        entry = {}
    else:
        needed = {"role", "capacity"} if "bandwidth" in entry else {"role", "capacity", "link"}
        check_keys(entry, where, needed, {*_MAY_HAVE, "link"}, faults)
    role, link = text(entry, where, "role", faults), text(entry, where, "link", faults)
    if role and role not in ROLES:
        faults.append(f"{where}: unknown role '{role}'{near(role, ROLES)}; roles are {', '.join(ROLES)}")
    if link and link not in (*LINKS, UNKNOWN):
        there = f"links are {', '.join(LINKS)}, or {UNKNOWN}"
        faults.append(f"{where}: unknown link '{link}'{near(link, LINKS)}; {there}")
    capacity, reserved, latency, bandwidth = NOTHING, None, None, None
    if "capacity" in entry:
        capacity = constant(f"{where}.capacity", entry["capacity"], set(CAPACITY_UNITS), faults, positive=True)
    if "reserved" in entry:
        reserved = constant(f"{where}.reserved", entry["reserved"], set(CAPACITY_UNITS), faults, positive=True)
    if "latency" in entry:
        latency = constant(f"{where}.latency", entry["latency"], {"cycles"}, faults)
    if "bandwidth" in entry:
        bandwidth = constant(f"{where}.bandwidth", entry["bandwidth"], {"B/s"}, faults, positive=True)
    address, access = _address(where, entry, faults), text(entry, where, "access", faults)
    note = text(entry, where, "note", faults)
    return Memory(name, role, capacity, note, reserved, link, bandwidth, latency, address, access)


def _address(where: str, entry: Mapping[str, Any], faults: list[str]) -> Constant | None:
    if ("address" in entry) != ("access" in entry):
        faults.append(f"{where}: 'address' and 'access' go together")
    if "access" in entry and entry["access"] not in ACCESSES:
        faults.append(f"{where}: access {entry['access']!r} is not {' or '.join(ACCESSES)}")
    if "address" not in entry:
        return None
    address = constant(f"{where}.address", entry["address"], {"address"}, faults)
    if address.value % 4 or not 0 <= address.value < 2**32:
        faults.append(f"{where}.address: {address.value:g} is not a multiple of 4 below 2^32")
    return address


def _check_apart(memories: Sequence[Memory], faults: list[str]) -> None:
    """No two memories have one name but for its case, or addresses in common."""
    for one, other in combinations(memories, 2):
        both = f"memories.{one.name} and memories.{other.name}"
        if one.name.lower() == other.name.lower():
            faults.append(
                f"{both} differ in the case of their letters alone; a key that changes one is written the same"
            )
        if one.first_address is not None and other.first_address is not None:
            first, then = sorted([(m.first_address or 0, m.capacity_bytes) for m in (one, other)])
            if first[0] + first[1] > then[0]:
                faults.append(f"{both} have addresses in common")


def _check_roles(memories: tuple[Memory, ...], faults: list[str]) -> None:
    for role in ("weights", "tiles"):
        if not any(memory.role == role for memory in memories):
            faults.append(f"no memory has the role '{role}'; one must")
    if sum(memory.role == "working" for memory in memories) > 1:
        faults.append("more than one memory has the role 'working'; a layer's tile is computed in one")


def _engine(name: str, entry: Any, faults: list[str]) -> Engine:
    where = f"engines.{name}"
    if not isinstance(entry, dict):
        faults.append(f"{where} must be a table with kind, operators, skips_zeros, group_scales, throughput, source")
        entry = {}
    else:
        needed = {"kind", "operators", "skips_zeros", "group_scales", "throughput", "source"}
        check_keys(entry, where, needed, set(), faults)
    kind = text(entry, where, "kind", faults)
    if kind and kind not in ENGINE_KINDS:
        faults.append(f"{where}: unknown kind '{kind}'{near(kind, ENGINE_KINDS)}; kinds are {', '.join(ENGINE_KINDS)}")
    operators = entry.get("operators", [])
    if not isinstance(operators, list) or not all(isinstance(o, str) for o in operators):
        faults.append(f"{where}: 'operators' must be a list of texts")
        operators = []
    for operator in operators:
        if operator not in OPERATORS:
            faults.append(
                f"{where}: unknown operator '{operator}'{near(operator, OPERATORS)}; known are {', '.join(OPERATORS)}"
            )
    throughput = {}
    for bits, peak in table(entry, "throughput", faults).items():
        if not bits.isdigit() or not 1 <= int(bits) <= 32:
            faults.append(f"{where}.throughput: '{bits}' is no weight width from 1 to 32 bits")
        else:
            at = f"{where}.throughput.{bits}"
            throughput[int(bits)] = constant(at, peak, {"MAC/cycle"}, faults, positive=True)
    skips, groups = (flag(entry, where, key, faults) for key in ("skips_zeros", "group_scales"))
    return Engine(name, kind, tuple(operators), skips, groups, text(entry, where, "source", faults), throughput)


def _layout(entry: Mapping[str, Any], present: bool, faults: list[str]) -> Layout:
    counts = {"slot": "bit", "input_block": "channels", "output_block": "channels", "scale": "bit"}
    if present:
        needed = {"name", "source", "scale", "scale_per", "zero_points", "patterns"}
        check_keys(entry, "layout", needed, {"slot", "input_block", "output_block"}, faults)
    numbers = {
        key: int(constant(f"layout.{key}", entry[key], {unit}, faults).value)
        for key, unit in counts.items()
        if key in entry
    }
    scale_per = text(entry, "layout", "scale_per", faults)
    if scale_per and scale_per not in ("group", "channel"):
        faults.append(f"layout: scale_per '{scale_per}' is not group or channel")
    return Layout(
        name=text(entry, "layout", "name", faults),
        source=text(entry, "layout", "source", faults),
        slot_bits=numbers.get("slot"),
        input_block=numbers.get("input_block", 1),
        output_block=numbers.get("output_block", 1),
        scale_bits=numbers.get("scale", 0),
        scale_per=scale_per,
        zero_points=flag(entry, "layout", "zero_points", faults),
        patterns=flag(entry, "layout", "patterns", faults),
    )


# --- values of a chip -------------------------------------------------------------------------------------------------
# Values of a chip's file: each reader notes its faults and goes on with something harmless.


NOTHING = Constant(0, "B", "assumed", "")


def constant(where: str, entry: Any, units: set[str], faults: list[str], positive: bool = False) -> Constant:
    if not isinstance(entry, dict):
        faults.append(f"{where} must be a table: value, unit, kind and source")
        return NOTHING
    check_keys(entry, where, {"value", "unit", "kind", "source"}, {"low", "high", "fitted"}, faults)
    unit, kind = text(entry, where, "unit", faults), text(entry, where, "kind", faults)
    if unit and unit not in units:
        faults.append(f"{where}: unit '{unit}' is not {' or '.join(sorted(units))}")
        unit = min(units)
    if kind and kind not in KINDS:
        faults.append(f"{where}: kind '{kind}' is not {', '.join(KINDS)}")
    if kind == "assumed" and not {"low", "high"} <= set(entry):
        faults.append(f"{where}: what is assumed needs 'low' and 'high'")
    numbers = {key: number(entry, where, key, faults) for key in ("value", "low", "high")}
    value, low, high = numbers["value"] or 0, numbers["low"], numbers["high"]
    if numbers["value"] is not None:
        said = f"{value:g} {unit}".strip()
        if value < 0 or (value == 0 and (positive or unit in COUNTED_UNITS)):
            faults.append(f"{where}: {said} must be above 0")
        whole = value * CAPACITY_UNITS[unit] if unit in CAPACITY_UNITS else value
        if (unit in COUNTED_UNITS or unit in CAPACITY_UNITS) and whole != int(whole):
            faults.append(f"{where}: {said} must be a whole number" + (" of bytes" if unit in CAPACITY_UNITS else ""))
        elif (unit in COUNTED_UNITS or unit in CAPACITY_UNITS) and whole > _MOST_COUNTED:
            faults.append(f"{where}: {said} is more than any chip has")
        if (low is not None and low > value) or (high is not None and high < value):
            faults.append(f"{where}: value {value:g} lies outside low and high")
    source, fitted = text(entry, where, "source", faults), text(entry, where, "fitted", faults)
    return Constant(value, unit or min(units), kind, source, low, high, fitted)


def check_keys(entry: Mapping[str, Any], where: str, needed: set[str], optional: set[str], faults: list[str]) -> None:
    known = needed | optional
    there = f"known are {', '.join(sorted(known))}"
    faults += [f"{where}: unknown key '{k}'{near(k, known)}; {there}" for k in entry if k not in known]
    faults += [f"{where}: '{key}' is missing" for key in sorted(needed) if key not in entry]


def table(data: Mapping[str, Any], key: str, faults: list[str]) -> dict[str, Any]:
    entry = data.get(key, {})
    if isinstance(entry, dict):
        return entry
    faults.append(f"'{key}' must be a table")
    return {}


def text(entry: Mapping[str, Any], where: str, key: str, faults: list[str]) -> str:
    text = entry.get(key, "")
    if key in entry and (not isinstance(text, str) or not text.strip()):
        faults.append(f"{where}: '{key}' must be a text that is not empty")
        return ""
    return str(text)


def flag(entry: Mapping[str, Any], where: str, key: str, faults: list[str]) -> bool:
    if key in entry and not isinstance(entry[key], bool):
        faults.append(f"{where}: '{key}' must be true or false")
    return bool(entry.get(key, False))


def number(entry: Mapping[str, Any], where: str, key: str, faults: list[str]) -> float | None:
    value = entry.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        faults.append(f"{where}: '{key}' must be a finite number")
        return None
    return value

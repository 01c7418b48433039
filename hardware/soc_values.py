"""Values of a chip's file: each reader notes its faults and goes on with something harmless."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from edgepress.hardware.soc import CAPACITY_UNITS, COUNTED_UNITS, KINDS, Constant

NOTHING = Constant(0, "B", "assumed", "")


def constant(where: str, entry: Any, units: set[str], faults: list[str], positive: bool = False) -> Constant:
    if not isinstance(entry, dict):
        faults.append(f"{where} must be a table: value, unit, kind and source")
        return NOTHING
    check_keys(entry, where, {"value", "unit", "kind", "source"}, {"low", "high"}, faults)
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
        if (low is not None and low > value) or (high is not None and high < value):
            faults.append(f"{where}: value {value:g} lies outside low and high")
    return Constant(value, unit or min(units), kind, text(entry, where, "source", faults), low, high)


def check_keys(entry: Mapping[str, Any], where: str, needed: set[str], optional: set[str], faults: list[str]) -> None:
    known = needed | optional
    faults += [f"{where}: unknown key '{k}'; known are {', '.join(sorted(known))}" for k in entry if k not in known]
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

"""Sizes and ratios in words."""

from __future__ import annotations


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


def count_text(number: int) -> str:
    return f"{number / 1e9:.4g} billion" if number >= 1e9 else f"{number / 1e6:.4g} million"

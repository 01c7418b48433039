"""Write ratios, counts and quantities in words."""

from __future__ import annotations


def times_text(need: int, room: int) -> str:
    """How often the room would be needed, three digits or all of them: 17.1 x, 3,826 x."""
    times = need / room
    return f"{times:,.0f} x" if times >= 999.5 else f"{times:.3g} x"


def count_text(number: int) -> str:
    return f"{number / 1e9:.4g} billion" if number >= 1e9 else f"{number / 1e6:.4g} million"


def quantity_text(value: float, unit: str) -> str:
    """Seconds, joules and the like, three digits: 2.78 ms, 490 uJ, 1.2 s."""
    prefixes = (("", 1.0), ("m", 1e-3), ("u", 1e-6))
    prefix, factor = next((pair for pair in prefixes if abs(value) >= pair[1]), ("n", 1e-9))
    return f"{value / factor:.3g} {prefix}{unit}"

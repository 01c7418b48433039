"""Figures as pictures: each drawn for a wide and for a narrow screen as SVG, and once as PNG.

Text stays text in the SVGs and takes the reader's own font; matplotlib measures it with a wider one, so it fits.
"""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart by colour-blind readers too.
BLUE, SKY, GREEN, ORANGE, RED, PINK, YELLOW = (
    *("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7"),
    "#F0E442",
)
INK, MUTED, FAINT = "#1B1F24", "#57606A", "#D0D7DE"
SERIES = (BLUE, RED, GREEN, PINK, ORANGE, SKY)
NARROW = 4.0  # inches, shown about 370 pixels wide
FULL, HALF = 10.0, 5.0
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', Arial, sans-serif"

_STYLE: dict[Any, Any] = {  # its keys are literals to the type checker
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.labelsize": 9,
    "axes.titlesize": 10,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#E6EAEE",
    "grid.linewidth": 0.8,
    "text.color": INK,
    "text.parse_math": False,  # a name may hold a dollar sign
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "edgepress",
}

Plot = Callable[[Figure, bool], None]  # draws on an empty figure; whether it is the narrow one


@dataclass(frozen=True)
class Picture:
    """A figure with its words; `key` names its file."""

    key: str
    title: str
    alt: str
    wide: str  # data URIs
    narrow: str
    png: bytes
    full: bool
    caption: str = ""


def picture(
    key: str, title: str, alt: str, plot: Plot, heights: tuple[float, float], full: bool = True, caption: str = ""
) -> Picture:
    """heights: inches of the wide and of the narrow drawing."""
    wide = _drawn(plot, FULL if full else HALF, heights[0], narrow=False)
    narrow = _drawn(plot, NARROW, heights[1], narrow=True)
    return Picture(key, title, alt, _svg(wide), _svg(narrow), _png(wide), full, caption)


def _drawn(plot: Plot, width: float, height: float, narrow: bool) -> Figure:
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        plot(figure, narrow)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # laid out once; each file would do it again
        return figure


def _svg(figure: Figure) -> str:
    file = io.BytesIO()
    with mpl.rc_context(_STYLE):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = file.getvalue().decode().replace("'DejaVu Sans'", FONT.replace('"', ""))
    return "data:image/svg+xml;base64," + b64encode(text.encode()).decode()


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    with mpl.rc_context(_STYLE):
        figure.savefig(file, format="png", dpi=160, metadata={"Software": None}, facecolor="white")
    return file.getvalue()


def number(value: float) -> str:
    """Three digits, or all before the point: 4.83, 17.9, 1,234."""
    if abs(value) >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 9.995 else f"{value:.2f}"


def short(text: str, most: int) -> str:
    """The text, its middle left out where it is too long for a label."""
    if len(text) <= most:
        return text
    head = (most - 1) * 2 // 3
    return f"{text[:head]}…{text[len(text) - (most - 1 - head) :]}"


def plain_ticks(axes: Axes, which: str) -> None:
    """Numbers rather than powers of ten on a logarithmic axis, a few of them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = sorted(axes.get_xlim() if which == "x" else axes.get_ylim())
    subs = (1.0, 2.0, 5.0) if high < 200 * low else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_formatter(NullFormatter())

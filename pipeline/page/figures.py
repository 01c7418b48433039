"""Draw the figures of the page, as SVG for wide and narrow screens and as PNG."""

from __future__ import annotations

import io
import itertools
import math
from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from edgepress.checkpoints.memory import size_text
from edgepress.hardware.units import times_text
from edgepress.pipeline.page.facts import Effect, Importance, LayerErrors, Losses, Memory, Step
from edgepress.pipeline.page.read import Choice, Study
from edgepress.pipeline.page.recommend import Taken

# --- pictures ---------------------------------------------------------------------------------------------------------
# Figures as pictures: each drawn for a wide and for a narrow screen as SVG, and once as PNG.
#
# Text stays text in the SVGs and takes the reader's own font; matplotlib measures it with a wider one, so it fits.


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

_DARK = {
    INK: "#E6EDF3", MUTED: "#9DA7B3", FAINT: "#3D444D", "#E6EAEE": "#262C36", "#F1F3F5": "#1C2128",
    "#FFFFFF": "#0D1117", BLUE: "#4A9FE0", RED: "#F0783C",
    "#A33B00": "#FF9A66", "#00694C": "#3FD6A3", "#666666": "#8A8A8A",
}  # fmt: skip
# A picture in an <img> follows the reader's setting too; matplotlib writes colours into style attributes.
_AT_NIGHT = "@media (prefers-color-scheme: dark) {" + "".join(
    f'[style*="{what}: {light.lower()}"]{{{what}:{dark}!important}}'
    for light, dark in _DARK.items() for what in ("fill", "stroke")
) + "}"  # fmt: skip

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
    head, _, rest = text.partition("<defs>")
    text = f"{head}<style>{_AT_NIGHT}</style><defs>{rest}"
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
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = sorted(axes.get_xlim() if which == "x" else axes.get_ylim())
    if high < 4 * low:  # too narrow for three ticks at 1, 2 and 5
        axis.set_major_locator(MaxNLocator(5))
        axis.set_minor_locator(NullLocator())
    else:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 200 * low else (1.0,), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_formatter(NullFormatter())


# --- figures ----------------------------------------------------------------------------------------------------------


_MIB = 2**20
_PARTS = {
    "block codes": BLUE, "dense linears": SKY, "scales and zeros": PINK, "adapters": RED, "embedding": ORANGE,
    "head": YELLOW, "norms": "#999999", "biases": "#666666", "KV cache": GREEN, "activations": "#A6761D",
    "code and stacks": "#A9B7C6",
}  # fmt: skip
_OTHER_PARTS = ("#8C6BB1", "#66A61E", "#5B8DB8", "#7A3E3E")


def waterfall_figure(key: str, title: str, steps: list[Step], start: str, unit: str, divisor: float) -> Picture:
    """Steps from the first value to the last; blue falls, red rises, so that less is better in both figures."""
    values = [steps[0].before / divisor, *(step.after / divisor for step in steps)]
    logarithmic = max(values) > 12 * min(values) > 0
    floor = min(values) / 1.8 if logarithmic else 0.0

    def plot(figure: Figure, narrow: bool) -> None:
        axes = figure.add_subplot()
        names = [start, *(step.name for step in steps), "result"]
        axes.bar(0, values[0] - floor, bottom=floor, color=MUTED, width=0.62)
        axes.bar(len(names) - 1, values[-1] - floor, bottom=floor, color=INK, width=0.62)
        _bar_text(axes, 0, values[0], number(values[0]), INK)
        _bar_text(axes, len(names) - 1, values[-1], number(values[-1]), INK)
        for place, (before, after) in enumerate(itertools.pairwise(values), 1):
            colour = RED if after > before else BLUE
            axes.bar(place, abs(after - before), bottom=min(before, after), color=colour, width=0.62)
            axes.plot([place - 0.69, place - 0.31], [before, before], color=MUTED, linewidth=0.8)
            axes.plot(
                [place + (0.31 if after != before else -0.31), place + 0.69], [after, after], color=MUTED, linewidth=0.8
            )
            _bar_text(axes, place, max(before, after), signed(after - before), INK if after != before else MUTED)
        if logarithmic:
            axes.set_yscale("log")
            axes.set_ylim(floor, max(values) * 1.5)
            plain_ticks(axes, "y")
        else:
            axes.set_ylim(0, max(values) * 1.13)
        crowded = len(names) > (6 if narrow else 8) or max(map(len, names)) > (60 if narrow else 72) / len(names)
        slant: dict[str, Any] = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
        axes.set_xticks(range(len(names)), [short(n, 16) for n in names], **slant)
        axes.tick_params(axis="x", length=0, labelcolor=INK)
        axes.grid(True, axis="y")
        axes.set_ylabel(unit + (" (logarithmic)" if logarithmic else ""))

    words = "; ".join(f"{s.name} {number(s.before / divisor)} to {number(s.after / divisor)}" for s in steps)
    return picture(key, title, f"Waterfall of {unit} over the stages: {words}.", plot, (3.3, 3.3), full=False)


def _bar_text(axes: Axes, x: float, y: float, words: str, colour: str) -> None:
    axes.annotate(
        words, (x, y), xytext=(0, 3), textcoords="offset points", ha="center", va="bottom", fontsize=8.5, color=colour
    )


def signed(value: float) -> str:
    size = f"{abs(value):.2g}" if abs(value) < 0.095 else number(abs(value))
    return "±0" if value == 0 else f"{'+' if value > 0 else '−'}{size}"


def effects_figure(by_stage: dict[str, list[Effect]]) -> Picture:
    """One point for every stage run of a sweep: its perplexity over its parent's."""

    def plot(figure: Figure, narrow: bool) -> None:
        axes = figure.add_subplot()
        for row, found in enumerate(by_stage.values()):
            ratios = sorted(effect.perplexity for effect in found)
            middle = ratios[len(ratios) // 2] if len(ratios) % 2 else sum(ratios[len(ratios) // 2 - 1 :][:2]) / 2
            colour = RED if middle > 1 else BLUE
            axes.plot([ratios[0], ratios[-1]], [row, row], color=FAINT, linewidth=5, solid_capstyle="round", zorder=1)
            axes.scatter(ratios, [row] * len(ratios), s=30, color=colour, alpha=0.55, linewidth=0, zorder=2)
            axes.scatter([middle], [row], s=170, marker="|", color=INK, linewidth=2.2, zorder=3)
            axes.annotate(
                f"×{middle:.3g}", (middle, row), xytext=(0, 10), textcoords="offset points", ha="center", fontsize=8.5
            )
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        axes.set_xlim(min(low, 0.93), max(high, 1.08))
        plain_ticks(axes, "x")
        if high < 1.8 and low > 0.5:
            from matplotlib.ticker import FuncFormatter, MaxNLocator

            axes.xaxis.set_major_locator(MaxNLocator(5 if narrow else 9))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"×{value:.3g}"))
            axes.xaxis.set_minor_locator(MaxNLocator(1))
        axes.axvline(1, color=INK, linewidth=1)
        axes.set_yticks(range(len(by_stage)), [f"{stage} ({len(f)})" for stage, f in by_stage.items()])
        axes.set_ylim(len(by_stage) - 0.4, -0.7)
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.grid(True, axis="x")
        axes.set_xlabel("perplexity after / before")

    words = "; ".join(
        f"{stage}: {min(e.perplexity for e in f):.3g} to {max(e.perplexity for e in f):.3g} in {len(f)} places"
        for stage, f in by_stage.items()
    )
    height = 1.1 + 0.5 * len(by_stage)
    return picture(
        "stage-effects",
        "What each stage did, wherever it ran",
        f"Perplexity of every stage run over its parent's. {words}.",
        plot,
        (height, height),
        caption="Each point is one stage run against the checkpoint it started from; the upright mark is the median. "
        "Left of 1 the stage improved the model.",
    )


def memory_figure(memories: list[Memory], soc: str, name: str) -> Picture:
    """A bar a memory, on a scale of its own; what does not fit hangs over the capacity."""
    colours: dict[str, str] = {}
    for part in dict.fromkeys(part for memory in memories for part, _ in memory.parts):
        spare = _OTHER_PARTS[len([p for p in colours if p not in _PARTS]) % len(_OTHER_PARTS)]
        colours[part] = _PARTS.get(part, spare)

    def plot(figure: Figure, narrow: bool) -> None:
        axes = figure.add_subplot()
        for row, memory in enumerate(memories):
            scale = max(memory.capacity, memory.used)
            axes.barh(row, memory.capacity / scale, height=0.5, color="#F1F3F5", edgecolor=FAINT, linewidth=0.8)
            left = 0.0
            for part, size in memory.parts:
                axes.barh(row, size / scale, left=left, height=0.5, color=colours[part], linewidth=0)
                left += size / scale
            at = memory.capacity / scale
            axes.plot([at, at], [row - 0.34, row + 0.34], color=INK, linewidth=2.2, solid_capstyle="butt")
            axes.annotate(
                f"{memory.name}: {_use(memory)}",
                (0, row - 0.33),
                va="bottom",
                fontsize=9,
                color=INK if memory.fits else "#A33B00",
                fontweight="normal" if memory.fits else "bold",
            )
        axes.set_xlim(-0.005, 1.02)
        axes.set_ylim(len(memories) - 0.6, -0.72)
        axes.set_axis_off()
        handles = [axes.barh(0, 0, color=colour, label=part) for part, colour in colours.items()]
        figure.legend(handles=handles, ncols=2 if narrow else 6, loc="outside lower left", fontsize=8.5)

    words = "; ".join(f"{m.name} ({m.role.replace('_', '-')}) {_use(m)}" for m in memories)
    rows = len(memories)
    lines = math.ceil(len(colours) / 2)
    return picture(
        "memory-map",
        f"Memory map on {soc}",
        f"What {name} would put into each memory of {soc}: {words}.",
        plot,
        (0.55 + 0.78 * rows, 0.5 + 0.78 * rows + 0.2 * lines),
        caption="Each bar has its own scale; the upright mark is the memory's capacity.",
    )


def _use(memory: Memory) -> str:
    words = f"{size_text(memory.used)} of {size_text(memory.capacity)}"
    return words if memory.fits else f"{words} ({times_text(memory.used, memory.capacity)})"


# --- quality against size ---------------------------------------------------------------------------------------------
# Quality against size, with the chip's capacity drawn in.


_FAR = 4  # times the room: from here on the capacity gets a panel of its own, and the points keep theirs
_ROW = 10.5  # points between two labels
_OFFSETS = [(side, rise) for rise in (0, 11, -11, 22, -22, 33, -33, 44, 55) for side in (1, -1)]


def pareto_figure(study: Study, soc: str, room: int, taken: Taken | None) -> Picture:
    """room: bytes of the memories for weights of the chip `soc`; taken: the checkpoint to take, which gets a ring."""
    points, front = study.comparable, study.front
    numbers = {id(c.run): i for i, c in enumerate(study.candidates)}
    sizes = [study.size(c.run) / _MIB for c in points]
    far = min(sizes) > _FAR * room / _MIB

    def plot(figure: Figure, narrow: bool) -> None:
        if far:
            grid = figure.add_gridspec(1, 2, width_ratios=[1, 4 if narrow else 7], wspace=0.03)
            left = figure.add_subplot(grid[0])
            axes = figure.add_subplot(grid[1], sharey=left)
        else:
            left = axes = figure.add_subplot()
        _draw_points(axes, study, points, front)
        if taken is not None:
            at = (study.size(taken.run) / _MIB, study.quality(taken.run))
            axes.scatter(*at, s=190, facecolor="none", edgecolor=INK, linewidth=1.6, zorder=5)
        if not far:
            axes.set_xlim(min(*sizes, room / _MIB) / 1.4, max(*sizes, room / _MIB) * 1.4)
        _draw_room(left, soc, room, far)
        left.set_ylabel(study.quality_name + (" (logarithmic)" if left.get_yscale() == "log" else ""))
        axes.grid(True)
        axes.set_xlabel(f"{study.size_name}, MiB" + (" (logarithmic)" if axes.get_xscale() == "log" else ""))
        if far:
            _break(left, axes)
        figure.draw_without_rendering()
        _name_points(axes, points if len(points) <= 12 else front, study, numbers, narrow)

    unbeaten = ", ".join(
        f"{c.name} ({size_text(study.size(c.run))}, {study.quality_name} {number(study.quality(c.run))})" for c in front
    )
    fitting = [c for c in points if study.size(c.run) <= room]
    alt = (
        f"Scatter plot of {study.quality_name} against {study.size_name} for {len(points)} checkpoints. Not beaten "
        f"in both: {unbeaten}. {len(fitting)} of {len(points)} lie within the {size_text(room)} of {soc} for weights."
    )
    caption = (
        "Lower and further left is better. Filled points are not beaten in both by any other; the ring is the one to "
        f"take; numbers are those of the table. The green part is what the memory for weights of {soc} holds"
        + ("; the axis is broken between it and the points." if far else ".")
        + " The chip's own layout can need other bytes than the packed file: the memory map counts those."
    )
    return picture("pareto", "Quality against size", alt, plot, (4.3, 3.9), caption=caption)


def _draw_points(axes: Axes, study: Study, points: list[Choice], front: list[Choice]) -> None:
    if study.kind == "run":
        way = [(study.size(c.run) / _MIB, study.quality(c.run)) for c in points]
        axes.plot(*zip(*way, strict=True), color=FAINT, linewidth=1.2, zorder=1)
    line = [(study.size(c.run) / _MIB, study.quality(c.run)) for c in front]
    axes.plot(*zip(*line, strict=True), color=BLUE, linewidth=1.6, drawstyle="steps-post", alpha=0.5, zorder=2)
    for choice in points:
        unbeaten = any(choice.run is other.run for other in front)
        style: dict[str, Any] = (
            {"color": BLUE, "s": 52} if unbeaten else {"facecolor": "white", "edgecolor": MUTED, "s": 34}
        )
        at = (study.size(choice.run) / _MIB, study.quality(choice.run))
        axes.scatter(*at, zorder=4 if unbeaten else 3, linewidth=1.2, **style)
    axes.margins(x=0.1, y=0.14)
    sizes = [x for x, _ in line] + [study.size(c.run) / _MIB for c in points]
    worst, least = (f(study.quality(c.run) for c in points) for f in (max, min))
    if max(sizes) > 5 * min(sizes):
        axes.set_xscale("log")
        plain_ticks(axes, "x")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6))
    if worst > 4 * least:
        axes.set_yscale("log")
        plain_ticks(axes, "y")


def _draw_room(axes: Axes, soc: str, room: int, far: bool) -> None:
    """The green band, in the points' axes or in a panel of its own to the left of them."""
    at = room / _MIB
    if far:
        axes.set_xlim(0, 1.9 * at)
        axes.set_xticks([0, at], ["0", f"{at:.3g}"])
    elif axes.get_xscale() != "log":
        axes.set_xscale("log")
        plain_ticks(axes, "x")
    axes.axvspan(axes.get_xlim()[0], at, color=GREEN, alpha=0.12, linewidth=0, zorder=0)
    axes.axvline(at, color=GREEN, linewidth=1.6, zorder=1)
    axes.annotate(
        f"{soc}: {size_text(room)}", (at, 0.5), xycoords=("data", "axes fraction"), xytext=(-5, 0),
        textcoords="offset points", ha="right", va="center", rotation=90, color="#00694C", fontsize=8.5,
        fontweight="bold", zorder=5,
    )  # fmt: skip


def _break(left: Axes, right: Axes) -> None:
    """Two strokes where the axis jumps."""
    right.spines["left"].set_visible(False)
    right.tick_params(axis="y", length=0, labelleft=False, which="both")
    left.set_zorder(right.get_zorder() + 1)
    left.patch.set_visible(False)
    left.grid(True, axis="y")
    for axes, x in ((left, 1), (right, 0)):
        axes.plot(
            [x], [0], transform=axes.transAxes, marker=[(-0.5, -1), (0.5, 1)], markersize=9, color=MUTED,
            linestyle="none", clip_on=False, markeredgewidth=1,
        )  # fmt: skip


def _name_points(axes: Axes, points: list[Choice], study: Study, numbers: dict[int, int], narrow: bool) -> None:
    """Number and, where there is room, name; each label where it covers neither another nor a point."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    scale = figure.dpi / 72
    box = axes.get_window_extent()
    spots = [axes.transData.transform((study.size(c.run) / _MIB, study.quality(c.run))) for c in study.comparable]
    taken = [(x - 5 * scale, x + 5 * scale, y) for x, y in spots]
    for choice in sorted(points, key=lambda c: study.quality(c.run)):
        at = (study.size(choice.run) / _MIB, study.quality(choice.run))
        words = str(numbers[id(choice.run)]) + ("" if narrow else f"  {short(choice.name, 28)}")
        x, y = axes.transData.transform(at)
        width = (5.4 * len(words) + 4) * scale

        def span(side: int, x: float = x, width: float = width) -> tuple[float, float]:
            return (x + 9 * scale, x + 9 * scale + width) if side > 0 else (x - 9 * scale - width, x - 9 * scale)

        def free(side: int, rise: int, y: float = y) -> bool:
            low, high = span(side)
            height = y + rise * scale
            inside = box.x0 <= low and high <= box.x1 and box.y0 <= height <= box.y1
            clear = not any(low < b and a < high and abs(height - h) < _ROW * scale for a, b, h in taken)
            return inside and clear

        side, rise = next((place for place in _OFFSETS if free(*place)), (1, 0))
        taken.append((*span(side), y + rise * scale))
        axes.annotate(
            words, at, xytext=(10 * side, rise), textcoords="offset points", ha="left" if side > 0 else "right",
            va="center", fontsize=8.5, color=INK, zorder=6,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.8},
            arrowprops={"arrowstyle": "-", "color": FAINT, "linewidth": 0.8} if abs(rise) > 15 else None,
        )  # fmt: skip


# --- single stages ----------------------------------------------------------------------------------------------------
# The figures of single stages: block importance, LoRA's losses, GPTQ's errors.


_MEANING = {
    "perplexity": "perplexity without the block",
    "taylor": "sum of abs(W · dL/dW)",
    "magnitude": "sum of abs(W)",
    "influence": "1 − cosine of the block's input and output",
}


def importance_figure(key: str, found: Importance) -> Picture:
    scores = found.scores
    low, high = min(scores.values()), max(scores.values())
    logarithmic = low > 0  # scores of one ranking often differ a thousandfold
    meaning = _MEANING.get(found.metric, found.metric)

    def plot(figure: Figure, narrow: bool) -> None:
        axes = figure.add_subplot()
        base = low / (high / low) ** 0.12 / 1.02 if logarithmic else min(low, 0.0)
        for block, score in scores.items():
            gone = block in found.removed
            colour = RED if gone else BLUE
            # A stem and a dot: a bar's length would say nothing above a base that is no zero.
            axes.plot([block, block], [base, score], color=colour, linewidth=2, alpha=0.45, solid_capstyle="butt")
            axes.scatter([block], [score], color=colour, s=30, zorder=3, linewidth=0)
            if gone:
                order = f"{found.removed.index(block) + 1}."
                axes.annotate(order, (block, score), xytext=(0, 5), textcoords="offset points", ha="center", fontsize=8)
        if logarithmic:
            axes.set_yscale("log")
            axes.set_ylim(base, high * (high / low) ** 0.12 * 1.02)
            plain_ticks(axes, "y")
        axes.xaxis.set_major_locator(MaxNLocator(8 if narrow else 18, integer=True))
        axes.grid(True, axis="y")
        axes.set_xlabel("block")
        axes.set_ylabel(meaning + (" (logarithmic)" if logarithmic else ""))

    order = sorted(scores, key=lambda block: (scores[block], block))
    alt = (
        f"Chart of {meaning} for blocks {min(scores)} to {max(scores)}. Least important: blocks "
        f"{', '.join(map(str, order[:3]))}; most important: {', '.join(map(str, order[-3:][::-1]))}. "
        f"Removed: {', '.join(map(str, found.removed)) or 'none'}."
    )
    caption = (
        "A low dot is a block that the model hardly needs. Orange blocks were removed, in the order of their numbers."
    )
    if found.rounds > 1:
        caption += f" The ranking was made anew after each removal; this is the first of {found.rounds}."
    return picture(key, f"Block importance by {found.metric}", alt, plot, (3.0, 3.1), caption=caption)


def losses_figure(runs: list[tuple[str, Losses]]) -> Picture:
    """All trainings in one picture; with one alone the training loss is drawn strongly too."""
    alone = len(runs) == 1

    def plot(figure: Figure, narrow: bool) -> None:
        axes = figure.add_subplot()
        for place, (name, found) in enumerate(runs):
            colour = SERIES[place % len(SERIES)]
            steps = range(1, len(found.training) + 1)
            few = len(found.training) < 40
            label = "training" if alone else short(name, 20 if narrow else 40)
            faint = found.held_out and not alone
            axes.plot(
                steps, found.training, color=colour, linewidth=1.4, alpha=0.4 if faint else 0.95,
                marker="." if few else "", label="" if faint else label,
            )  # fmt: skip
            if found.held_out:
                colour = RED if alone else colour
                label = "held out" if alone else label
                checks, values = list(found.held_out), list(found.held_out.values())
                axes.plot(checks, values, color=colour, linewidth=2, marker="o", markersize=4, label=label)
                if found.kept_step in found.held_out:
                    kept = found.held_out[found.kept_step]
                    axes.scatter([found.kept_step], [kept], s=110, facecolor="none", edgecolor=colour, zorder=4)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.margins(y=0.12)
        axes.grid(True)
        axes.set_xlabel("optimiser step")
        axes.set_ylabel("loss, nats a token")
        handles, labels = axes.get_legend_handles_labels()
        if narrow or not alone:
            figure.legend(handles, labels, loc="outside lower left", ncols=1 if narrow and not alone else 2)
        else:
            axes.legend(loc="upper right")

    ends = "; ".join(_in_words(name, found) for name, found in runs)
    caption = "The ring marks the step whose adapter was kept." if any(f.held_out for _, f in runs) else ""
    extra = 0.0 if alone else 0.2 * len(runs)
    title = "LoRA training"
    return picture("lora-loss", title, f"Loss curves. {ends}.", plot, (3.2, 3.2 + extra), caption=caption)


def _in_words(name: str, found: Losses) -> str:
    words = f"{name}: training loss {found.training[0]:.3f} to {found.training[-1]:.3f} in {len(found.training)} steps"
    if found.held_out:
        values = list(found.held_out.values())
        words += f", held out {values[0]:.3f} to {min(values):.3f}"
    return words


def errors_figure(key: str, name: str, found: LayerErrors, highest: float) -> Picture:
    """A heat map of relative output errors in percent; `highest` ends the colours, shared by all maps of a page."""
    colours = LinearSegmentedColormap.from_list("errors", ["#F4F7FB", "#9CC4E4", "#3B82BD", "#0B4F8A", "#062A4D"])

    def plot(figure: Figure, narrow: bool) -> None:
        axes = figure.add_subplot()
        cells = [[100 * error for error in row] for row in found.errors]  # (blocks, layers)
        layers = [layer.rpartition(".")[2] for layer in found.layers]
        numbers = [str(block) for block in found.blocks]
        if not narrow:
            cells = [list(column) for column in zip(*cells, strict=True)]
        image = axes.imshow(cells, cmap=colours, vmin=0, vmax=100 * highest, aspect="auto", interpolation="nearest")
        every = max(1, math.ceil(len(numbers) / 32))
        ticks = range(0, len(numbers), every)
        if narrow:
            axes.set_yticks(ticks, numbers[::every])
            axes.set_xticks(range(len(layers)), layers, rotation=40, ha="right", rotation_mode="anchor")
            axes.set_ylabel("block")
        else:
            axes.set_xticks(ticks, numbers[::every])
            axes.set_yticks(range(len(layers)), layers)
            axes.set_xlabel("block")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        _separate(axes, len(cells[0]), len(cells))
        bar = figure.colorbar(
            image, ax=axes, location="top" if narrow else "right", pad=0.02, aspect=30 if narrow else 16
        )
        bar.set_label("relative squared output error, %")
        bar.outline.set_edgecolor(FAINT)

    worst = ", ".join(f"block {block} {layer} {error:.2%}" for block, layer, error in found.worst[:3])
    heights = (1.0 + 0.26 * len(found.layers), 1.6 + 0.17 * len(found.blocks))
    size = f"{len(found.blocks)} blocks and {len(found.layers)} layers"
    alt = f"Heat map of GPTQ's output error for {size}. Largest: {worst}."
    return picture(key, f"GPTQ error per layer: {name}", alt, plot, heights, caption=f"Largest: {worst}.")


def _separate(axes: Axes, columns: int, rows: int) -> None:
    """White lines between the cells."""
    axes.set_xticks([x - 0.5 for x in range(1, columns)], minor=True)
    axes.set_yticks([y - 0.5 for y in range(1, rows)], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.2)
    axes.tick_params(which="minor", length=0)

"""Quality against size, with the chip's capacity drawn in."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from edgepress.checkpoints.memory import size_text
from edgepress.pipeline.page.draw import BLUE, FAINT, GREEN, INK, MUTED, Picture, number, picture, plain_ticks, short
from edgepress.pipeline.page.study import Choice, Study

_MIB = 2**20
_FAR = 4  # times the room: from here on the capacity gets a panel of its own, and the points keep theirs
_ROW = 10.5  # points between two labels
_OFFSETS = [(side, rise) for rise in (0, 11, -11, 22, -22, 33, -33, 44, 55) for side in (1, -1)]


def pareto_figure(study: Study, soc: str, room: int) -> Picture:
    """room: bytes of the memories for weights of the chip `soc`."""
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
        if not far:
            axes.set_xlim(min(*sizes, room / _MIB) / 1.4, max(*sizes, room / _MIB) * 1.4)
        _draw_room(left, soc, room, far)
        left.set_ylabel("perplexity" + (" (logarithmic)" if left.get_yscale() == "log" else ""))
        axes.grid(True)
        axes.set_xlabel(f"{study.size_name}, MiB" + (" (logarithmic)" if axes.get_xscale() == "log" else ""))
        if far:
            _break(left, axes)
        figure.draw_without_rendering()
        _name_points(axes, points if len(points) <= 12 else front, study, numbers, narrow)

    best = ", ".join(f"{c.name} ({size_text(study.size(c.run))}, perplexity {number(c.run.perplexity)})" for c in front)
    fitting = [c for c in points if study.size(c.run) <= room]
    alt = (
        f"Scatter plot of perplexity against {study.size_name} for {len(points)} checkpoints. Not beaten in both: "
        f"{best}. {len(fitting)} of {len(points)} lie within the {size_text(room)} of {soc} for weights."
    )
    caption = (
        "Lower and further left is better. Filled points are beaten by no other in both; numbers are those of the "
        f"table. The green part is what the memory for weights of {soc} holds"
        + ("; the axis is broken between it and the points." if far else ".")
        + " The chip's own layout can need other bytes than the packed file: the memory map counts those."
    )
    return picture("pareto", "Quality against size", alt, plot, (4.3, 3.9), caption=caption)


def _draw_points(axes: Axes, study: Study, points: list[Choice], front: list[Choice]) -> None:
    if study.kind == "run":
        way = [(study.size(c.run) / _MIB, c.run.perplexity) for c in points]
        axes.plot(*zip(*way, strict=True), color=FAINT, linewidth=1.2, zorder=1)
    line = [(study.size(c.run) / _MIB, c.run.perplexity) for c in front]
    axes.plot(*zip(*line, strict=True), color=BLUE, linewidth=1.6, drawstyle="steps-post", alpha=0.5, zorder=2)
    for choice in points:
        best = any(choice.run is other.run for other in front)
        style: dict[str, Any] = (
            {"color": BLUE, "s": 52} if best else {"facecolor": "white", "edgecolor": MUTED, "s": 34}
        )
        axes.scatter(
            [study.size(choice.run) / _MIB], [choice.run.perplexity], zorder=4 if best else 3, linewidth=1.2, **style
        )
    axes.margins(x=0.1, y=0.14)
    sizes = [x for x, _ in line] + [study.size(c.run) / _MIB for c in points]
    worst, least = (f(c.run.perplexity for c in points) for f in (max, min))
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
    spots = [axes.transData.transform((study.size(c.run) / _MIB, c.run.perplexity)) for c in study.comparable]
    taken = [(x - 5 * scale, x + 5 * scale, y) for x, y in spots]
    for choice in sorted(points, key=lambda c: c.run.perplexity):
        at = (study.size(choice.run) / _MIB, choice.run.perplexity)
        words = str(numbers[id(choice.run)]) + ("" if narrow else f"  {short(choice.name, 28)}")
        x, y = axes.transData.transform(at)
        width = (5.4 * len(words) + 4) * scale

        def span(side: int, x: float = x, width: float = width) -> tuple[float, float]:
            return (x + 6 * scale, x + 6 * scale + width) if side > 0 else (x - 6 * scale - width, x - 6 * scale)

        def free(side: int, rise: int, y: float = y) -> bool:
            low, high = span(side)
            height = y + rise * scale
            inside = box.x0 <= low and high <= box.x1 and box.y0 <= height <= box.y1
            clear = not any(low < b and a < high and abs(height - h) < _ROW * scale for a, b, h in taken)
            return inside and clear

        side, rise = next((place for place in _OFFSETS if free(*place)), (1, 0))
        taken.append((*span(side), y + rise * scale))
        axes.annotate(
            words, at, xytext=(7 * side, rise), textcoords="offset points", ha="left" if side > 0 else "right",
            va="center", fontsize=8.5, color=INK, zorder=6,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.8},
            arrowprops={"arrowstyle": "-", "color": FAINT, "linewidth": 0.8} if abs(rise) > 15 else None,
        )  # fmt: skip

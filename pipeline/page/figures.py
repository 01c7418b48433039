"""The figures of results: waterfalls, what stages did across a sweep, the memory map."""

from __future__ import annotations

import itertools
import math
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from edgepress.checkpoints.memory import size_text
from edgepress.hardware.units import times_text
from edgepress.pipeline.page.draw import (
    BLUE,
    FAINT,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PINK,
    RED,
    SKY,
    YELLOW,
    Picture,
    number,
    picture,
    plain_ticks,
    short,
)
from edgepress.pipeline.page.facts import Effect, Memory, Step

_MIB = 2**20
_PARTS = {
    "block codes": BLUE, "dense linears": SKY, "scales and zeros": PINK, "adapters": RED, "embedding": ORANGE,
    "head": YELLOW, "norms": "#999999", "biases": "#666666", "KV cache": GREEN, "activations": "#B07AA1",
    "code and stacks": "#BBBBBB",
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
            _bar_text(axes, place, max(before, after), _signed(after - before), INK if after != before else MUTED)
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


def _signed(value: float) -> str:
    return "±0" if value == 0 else f"{'+' if value > 0 else '−'}{number(abs(value))}"


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

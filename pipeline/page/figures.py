"""The figures of results: quality against size, waterfalls, what stages did across a sweep, the memory map."""

from __future__ import annotations

import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hardware.verdict import size_text, times_text
from pipeline.page.draw import BLUE, FAINT, GREEN, INK, MUTED, ORANGE, PINK, RED, SKY, YELLOW, Picture, number
from pipeline.page.draw import picture, plain_ticks, short
from pipeline.page.facts import Effect, Memory, Step
from pipeline.page.study import Choice, Study

_MIB = 2**20
_PARTS = {
    "block codes": BLUE, "dense linears": SKY, "scales and zeros": PINK, "adapters": RED, "embedding": ORANGE,
    "head": YELLOW, "norms": "#999999", "biases": "#666666", "KV cache": GREEN, "activations": "#B07AA1",
}  # fmt: skip
_OTHER_PARTS = ("#8C6BB1", "#A6761D", "#66A61E", "#1B9E77", "#7570B3")


def pareto_figure(study: Study, room: int) -> Picture:
    """room: bytes of the chip's memories for weights."""
    points, front = study.comparable, study.front
    numbers = {id(c.run): i for i, c in enumerate(study.candidates)}
    spread = max(c.run.perplexity for c in points) > 8 * min(c.run.perplexity for c in points)

    def plot(figure: Figure, narrow: bool) -> None:
        axes = figure.add_subplot()
        line = [(study.size(c.run) / _MIB, c.run.perplexity) for c in front]
        if study.kind == "run":
            way = [(study.size(c.run) / _MIB, c.run.perplexity) for c in points]
            axes.plot(*zip(*way, strict=True), color=FAINT, linewidth=1.2, zorder=1)
        axes.plot(*zip(*line, strict=True), color=BLUE, linewidth=1.6, drawstyle="steps-post", alpha=0.55, zorder=2)
        for choice in points:
            best = choice in front
            x, y = study.size(choice.run) / _MIB, choice.run.perplexity
            style = {"color": BLUE, "s": 52} if best else {"facecolor": "white", "edgecolor": MUTED, "s": 34}
            axes.scatter([x], [y], zorder=3, linewidth=1.2, **style)
        axes.set_xscale("log")
        sizes = [study.size(c.run) / _MIB for c in points]
        axes.set_xlim(min(*sizes, room / _MIB) / 1.35, max(*sizes, room / _MIB) * (1.6 if narrow else 1.35))
        if spread:
            axes.set_yscale("log")
        axes.margins(y=0.14)
        axes.autoscale_view(scalex=False)
        _room_line(axes, study.soc, room)
        _name_points(axes, points if len(points) <= 9 else front, study, numbers, narrow)
        plain_ticks(axes, "x")
        if spread:
            plain_ticks(axes, "y")
        axes.grid(True)
        axes.set_xlabel(f"{study.size_name}, MiB (logarithmic)")
        axes.set_ylabel("perplexity" + (" (logarithmic)" if spread else ""))

    best = ", ".join(f"{c.name} ({size_text(study.size(c.run))}, perplexity {number(c.run.perplexity)})" for c in front)
    fitting = [c for c in points if study.size(c.run) <= room]
    alt = (
        f"Scatter plot of perplexity against {study.size_name} for {len(points)} checkpoints. Not beaten in both: "
        f"{best}. {len(fitting)} of {len(points)} lie within the chip's {size_text(room)} for weights."
    )
    caption = (
        "Lower and further left is better. Filled points are beaten by no other in both; numbers are those of the "
        f"table. The shaded part is what {study.soc}'s memory for weights holds."
    )
    return picture("pareto", "Quality against size", alt, plot, (4.3, 3.9), caption=caption)


def _room_line(axes: Axes, soc: str, room: int) -> None:
    axes.axvspan(axes.get_xlim()[0], room / _MIB, color=GREEN, alpha=0.09, linewidth=0, zorder=0)
    axes.axvline(room / _MIB, color=GREEN, linewidth=1.6, zorder=1)
    axes.annotate(
        f"{soc}: {size_text(room)}",
        (room / _MIB, 1),
        xycoords=("data", "axes fraction"),
        xytext=(5, -4),
        textcoords="offset points",
        va="top",
        color="#00694C",
        fontsize=8.5,
        fontweight="bold",
    )


def _name_points(
    axes: Axes, points: list[Choice], study: Study, numbers: dict[int, int], narrow: bool
) -> None:
    """Number and, where there is room, name; a label that would lie on one before it moves up or down."""
    placed: list[tuple[float, float, float]] = []  # left, right, height in pixels
    axes.figure.canvas.draw()
    scale = axes.figure.dpi / 72
    for choice in sorted(points, key=lambda c: c.run.perplexity):
        at = (study.size(choice.run) / _MIB, choice.run.perplexity)
        words = str(numbers[id(choice.run)])
        if not narrow:
            words += f"  {short(choice.name, 26)}"
        x, y = axes.transData.transform(at)
        width = (6 * len(words) + 8) * scale
        left = x + 7 * scale + width > axes.get_window_extent().x1
        offset = 0.0
        low, high = (x - 7 * scale - width, x) if left else (x, x + 7 * scale + width)
        for step in (0, 11, -11, 22, -22, 33, 44, 55):
            offset = step
            height = y + step * scale
            if not any(low < b and a < high and abs(height - h) < 10.5 * scale for a, b, h in placed):
                break
        placed.append((low, high, y + offset * scale))
        axes.annotate(
            words,
            at,
            xytext=(-7 if left else 7, offset),
            textcoords="offset points",
            ha="right" if left else "left",
            va="center",
            fontsize=8.5,
            color=INK,
            arrowprops={"arrowstyle": "-", "color": FAINT, "linewidth": 0.8} if abs(offset) > 15 else None,
        )


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
        for place, (before, after) in enumerate(zip(values, values[1:], strict=False), 1):
            colour = RED if after > before else BLUE
            axes.bar(place, abs(after - before), bottom=min(before, after), color=colour, width=0.62)
            axes.plot([place - 1 + 0.31, place - 0.31], [before, before], color=MUTED, linewidth=0.8)
            axes.plot([place + 0.31, place + 1 - 0.31], [after, after], color=MUTED, linewidth=0.8)
            _bar_text(axes, place, max(before, after), _signed(after - before), INK if after != before else MUTED)
        if logarithmic:
            axes.set_yscale("log")
            axes.set_ylim(floor, max(values) * 1.5)
            plain_ticks(axes, "y")
        else:
            axes.set_ylim(0, max(values) * 1.13)
        crowded = len(names) > (6 if narrow else 8) or max(map(len, names)) > (60 if narrow else 72) / len(names)
        axes.set_xticks(range(len(names)), [short(n, 16) for n in names], rotation=35 if crowded else 0)
        if crowded:
            for label in axes.get_xticklabels():
                label.set_ha("right")
                label.set_rotation_mode("anchor")
        axes.tick_params(axis="x", length=0, labelcolor=INK)
        axes.grid(True, axis="y")
        axes.set_ylabel(unit + (" (logarithmic)" if logarithmic else ""))

    words = "; ".join(
        f"{s.name} {number(s.before / divisor)} to {number(s.after / divisor)}" for s in steps
    )
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
        axes.set_ylim(len(memories) - 0.5, -0.85)
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

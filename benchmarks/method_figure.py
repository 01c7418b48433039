"""The figure of benchmarks/methods.py."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

MARKERS = {"base": "*", "quantiser": "o", "recovery": "^"}
OFF_SCALE = 10  # a perplexity above so many times its base's stands at the upper edge, with its number
_LINE = 0.17  # inches between two names
_LEADER = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.5, "shrinkB": 3}


def draw(found: Iterable[dict[str, Any]], file: Path) -> None:
    """Perplexity against packed bytes: a panel for each base, a marker for each kind of method.

    Names stand in a column at either side, in the order of their points' perplexities, a thin line to each point.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure = figure_of(found)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def figure_of(found: Iterable[dict[str, Any]]) -> Any:
    from matplotlib import pyplot as plt

    shown = [row for row in found if "perplexity" in row]
    bases = list(dict.fromkeys(row["base"] for row in shown)) or ["nothing measured"]
    groups = [[row for row in shown if row["base"] == base] for base in bases]
    sides = [_sides(rows) for rows in groups]
    heights = [0.8 + _LINE * max(14, *map(len, pair)) for pair in sides]  # inches
    total = sum(heights) + 1.1
    figure, panels = plt.subplots(len(bases), figsize=(10, total), height_ratios=heights, squeeze=False)
    figure.subplots_adjust(left=0.29, right=0.71, top=1 - 0.7 / total, bottom=0.5 / total, hspace=0.25)
    for panel, base, rows, pair in zip(panels[:, 0], bases, groups, sides, strict=True):
        _panel(panel, base, rows, pair)
    panels[-1, 0].set_xlabel("packed image, MiB")
    if shown:
        figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="upper center", ncols=len(MARKERS), frameon=False)
    return figure


def _sides(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The rows in the left half of a panel, and the others."""
    sizes = [row["packed_bytes"] for row in rows] or [0]
    middle = (min(sizes) + max(sizes)) / 2
    return [[row for row in rows if (row["packed_bytes"] > middle) == right] for right in (False, True)]


def _panel(axes: Any, base: str, rows: list[dict[str, Any]], sides: list[list[dict[str, Any]]]) -> None:
    axes.set_title(f"{base}: perplexity, logarithmic", fontsize=10)
    axes.set_yscale("log")
    axes.grid(alpha=0.3, which="both")
    for axis_format in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis_format("{x:g}")
    plain = min((row["perplexity"] for row in rows), default=1.0)
    plain = next((row["perplexity"] for row in rows if row["kind"] == "base"), plain)
    top = max((row["perplexity"] for row in rows if row["perplexity"] <= OFF_SCALE * plain), default=plain) * 1.3
    for number, (kind, marker) in enumerate(MARKERS.items()):
        points = [row for row in rows if row["kind"] == kind]
        x = [row["packed_bytes"] / 2**20 for row in points]
        y = [min(row["perplexity"], top) for row in points]
        size = 120 if kind == "base" else 36
        axes.scatter(x, y, size, color=f"C{number}", marker=marker, label=kind, clip_on=False, zorder=3)
    if not rows:
        return
    axes.set_ylim(min(row["perplexity"] for row in rows) / 1.1, top)
    axes.margins(x=0.14)
    # The numbers of the axis stand inside: names take both sides.
    axes.tick_params(axis="y", which="both", left=False, pad=-4, labelsize=8, labelcolor="0.35")
    for label in (*axes.get_yticklabels(), *axes.get_yticklabels(minor=True)):
        label.set(horizontalalignment="left", zorder=4)
        label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})
    for right, group in enumerate(sides):
        _names(axes, group, bool(right), top)


def _names(axes: Any, rows: list[dict[str, Any]], right: bool, top: float) -> None:
    """One column of names with perplexity and MiB, as near to the height of each point as the lines above allow."""
    height = axes.get_position().height * axes.figure.get_figheight()  # inches
    low, high = (math.log(y) for y in axes.get_ylim())
    ordered = sorted(rows, key=lambda row: (min(row["perplexity"], top), row["packed_bytes"]))
    wanted = [(math.log(min(row["perplexity"], top)) - low) / (high - low) * height for row in ordered]
    for row, at in zip(ordered, spread(wanted, _LINE, height), strict=True):
        words = f"{row['method']}  {row['perplexity']:,.1f}  {row['packed_bytes'] / 2**20:.0f} MiB"
        if row["perplexity"] > top:
            words = f"{row['method']}  {row['perplexity']:,.0f}, off the scale"
        point = (row["packed_bytes"] / 2**20, min(row["perplexity"], top))
        axes.annotate(
            words, point, xycoords="data", xytext=(1.03 if right else -0.03, at / height), textcoords="axes fraction",
            ha="left" if right else "right", va="center", fontsize=8, annotation_clip=False,
            arrowprops=_LEADER | {"relpos": (0.0 if right else 1.0, 0.5)},
        )  # fmt: skip


def spread(wanted: Sequence[float], gap: float, room: float) -> list[float]:
    """Places in the same rising order, at least `gap` apart and within 0 to room if they can be, near those wanted."""
    blocks: list[list[float]] = []  # [sum of wanted first places, how many]: neighbours that touch move as one
    for place in wanted:
        blocks.append([place, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] + blocks[-2][1] * gap > blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1][0] += total - count * blocks[-1][1] * gap
            blocks[-1][1] += count
    found = [total / count + i * gap for total, count in blocks for i in range(int(count))]
    for i in reversed(range(len(found))):  # down from the top edge, then up from the bottom
        found[i] = min(found[i], room - (len(found) - 1 - i) * gap)
    for i in range(len(found)):
        found[i] = max(found[i], i * gap if i else 0.0, found[i - 1] + gap if i else 0.0)
    return found

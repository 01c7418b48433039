"""The figure of benchmarks/methods.py."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

MARKERS = {"base": "*", "quantiser": "o", "recovery": "^"}
OFF_SCALE = 10  # a perplexity above so many times its base's stands at the upper edge, with its number


def draw(found: Iterable[dict[str, Any]], file: Path) -> None:
    """Perplexity against packed bytes: a panel for each base, a marker for each kind of method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = [row for row in found if "perplexity" in row]
    bases = list(dict.fromkeys(row["base"] for row in shown)) or ["nothing measured"]
    figure, panels = plt.subplots(
        len(bases), figsize=(9, 5 * len(bases)), layout="constrained", squeeze=False, sharex=True
    )
    for panel, base in zip(panels[:, 0], bases, strict=True):
        _panel(panel, base, [row for row in shown if row["base"] == base])
    panels[-1, 0].set_xlabel("packed image, MiB")
    figure.savefig(file, dpi=130)
    plt.close(figure)


def _panel(axes: Any, base: str, rows: list[dict[str, Any]]) -> None:
    from adjustText import adjust_text

    axes.set_title(base)
    axes.set_yscale("log")
    axes.set_ylabel("perplexity, log scale")
    axes.grid(alpha=0.3, which="both")
    for axis_format in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis_format("{x:g}")
    plain = min((row["perplexity"] for row in rows), default=1.0)
    plain = next((row["perplexity"] for row in rows if row["kind"] == "base"), plain)
    top = max((row["perplexity"] for row in rows if row["perplexity"] <= OFF_SCALE * plain), default=plain) * 1.3
    labels = []
    for number, (kind, marker) in enumerate(MARKERS.items()):
        points = [row for row in rows if row["kind"] == kind]
        x = [row["packed_bytes"] / 2**20 for row in points]
        y = [min(row["perplexity"], top) for row in points]
        axes.scatter(x, y, 120 if kind == "base" else 36, color=f"C{number}", marker=marker, label=kind, clip_on=False)
        for row, across, up in zip(points, x, y, strict=True):
            beyond = f": {row['perplexity']:,.0f}, off the scale" if row["perplexity"] > top else ""
            labels.append(axes.text(across, up, row["method"] + beyond, fontsize=8))
    axes.set_ylim(top=top)
    if labels:
        axes.legend()
        line = {"arrowstyle": "-", "color": "0.5", "linewidth": 0.5}
        adjust_text(labels, ax=axes, expand=(1.3, 1.8), min_arrow_len=12, arrowprops=line)

"""Draw the verdict: memories as bars, and the tile memory as address against time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from edgepress.checkpoints.errors import PlanError, near
from edgepress.checkpoints.manifest import replacing
from edgepress.checkpoints.memory import size_text
from edgepress.hardware.activations import Pass
from edgepress.hardware.check import MemoryUse, Verdict
from edgepress.hardware.units import times_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette: told apart by colour-blind readers too.
_PART_COLOURS = {
    "block codes": "#0072B2", "dense linears": "#56B4E9", "scales and zeros": "#CC79A7", "adapters": "#D55E00",
    "embedding": "#E69F00", "head": "#F0E442", "norms": "#999999", "biases": "#666666", "KV cache": "#009E73",
    "activations": "#D0743C", "code and stacks": "#BBBBBB",
}  # fmt: skip
_TILE = "#8C6BB1"
_BUFFER_COLOURS = (
    "#E69F00", "#56B4E9", "#D55E00", "#F0E442", "#CC79A7", "#6BA3D6", "#A6D854", "#FC8D62", "#8DA0CB", "#C9A66B",
    "#B3B3B3", "#F4A6C0", "#9ADBC5", "#D9D36A", "#B497D6",
)  # fmt: skip


def draw_verdict(verdict: Verdict, path: Path) -> None:
    """Write the picture; the suffix says the format (png, svg, pdf)."""
    uses = [use for use in verdict.memories if use.peak_bytes or use.role != "off_chip"]
    figure = Figure(figsize=(12, 3.2 + 0.62 * len(uses) + 4.6), layout="constrained", dpi=110)
    grid = figure.add_gridspec(2, 2, height_ratios=[1.0 + 0.62 * len(uses), 5.2])
    fate = "fits" if verdict.fits else "does not fit"
    figure.suptitle(f"{verdict.model} {fate} {verdict.soc}, context {verdict.request.context}", fontsize=13)
    _draw_memories(figure.add_subplot(grid[0, :]), uses)
    decode, prefill = figure.add_subplot(grid[1, 0]), figure.add_subplot(grid[1, 1])
    colours = _draw_pass(decode, verdict, verdict.needs.decode, "decode, activations only", cache=False)
    title = f"prefill, {verdict.request.chunk} tokens at once"
    colours |= _draw_pass(prefill, verdict, verdict.needs.prefill, title, cache=True)
    handles = [Patch(color=colour, label=name) for name, colour in colours.items()]
    figure.legend(handles=handles, fontsize=8, ncols=len(handles), loc="outside lower center", frameon=False)
    known = figure.canvas.get_supported_filetypes()
    kind = path.suffix[1:].lower() or "png"
    if kind not in known:
        raise PlanError(
            f"{path}: no picture format is called '{kind}'{near(kind, known)}; there are {', '.join(sorted(known))}"
        )
    with replacing(path) as file:
        figure.savefig(file, format=kind)


def _draw_memories(axes: Axes, uses: list[MemoryUse]) -> None:
    """One bar a memory, as long as the larger of capacity and need; a line marks the capacity."""
    seen: dict[str, str] = {}
    for row, use in enumerate(uses):
        scale = max(use.capacity_bytes, use.peak_bytes)
        axes.barh(row, use.capacity_bytes / scale, height=0.62, color="#F2F2F2", edgecolor="#777777", linewidth=0.8)
        left = 0.0
        for part, size in (*use.parts, *use.transient):
            name = "tile" if part.startswith("tile of") else part
            colour = _PART_COLOURS.get(name, _TILE)
            seen[name] = colour
            width = size / scale
            axes.barh(row, width, left=left, height=0.62, color=colour, edgecolor="white", linewidth=0.4)
            left += width
        at = use.capacity_bytes / scale
        axes.plot([at, at], [row - 0.4, row + 0.4], color="black" if use.fits else "#C00000", linewidth=2)
        words = f"{size_text(use.peak_bytes)} of {size_text(use.capacity_bytes)}"
        words += f", {use.peak_bytes / use.capacity_bytes:.0%}" if use.fits else ""
        over = "" if use.fits else f", {times_text(use.peak_bytes, use.capacity_bytes)}"
        colour = "black" if use.fits else "#C00000"
        axes.text(1.015, row, words + over, va="center", fontsize=9.5, color=colour)
    axes.set_yticks(range(len(uses)), [f"{use.name}\n({use.role.replace('_', '-')})" for use in uses], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.3)
    axes.set_xticks([])
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    axes.set_title("What lies in each memory at its fullest; the upright line is the capacity", fontsize=10, loc="left")
    handles = [Patch(color=colour, label=name) for name, colour in seen.items()]
    axes.legend(
        handles=handles,
        ncols=min(6, len(handles)),
        loc="upper center",
        bbox_to_anchor=(0.45, -0.02),
        fontsize=8.5,
        frameon=False,
    )


def _draw_pass(axes: Axes, verdict: Verdict, run: Pass, title: str, cache: bool) -> dict[str, str]:
    """Address upwards, operators to the right: every buffer a rectangle, the KV cache a band above; the colours."""
    needs, operators = verdict.needs, run.operators
    top_bytes = needs.arena + needs.kv_cache if cache else run.peak.arena_bytes
    unit, factor = _unit(top_bytes)
    top = top_bytes / factor
    colours: dict[str, str] = {}
    for buffer in run.plan.buffers:
        name = buffer.name.rpartition(".")[2]
        colour = colours.setdefault(name, _BUFFER_COLOURS[len(colours) % len(_BUFFER_COLOURS)])
        width, height = buffer.last - buffer.first + 1, buffer.nbytes / factor
        corner = (buffer.first, buffer.offset / factor)
        axes.add_patch(Rectangle(corner, width, height, facecolor=colour, edgecolor="white", linewidth=0.5))
        if height > 0.035 * top and width > len(name) * len(operators) / 90:
            middle = (corner[0] + width / 2, corner[1] + height / 2)
            axes.text(*middle, name, ha="center", va="center", fontsize=7.5)
    if cache and needs.kv_cache:
        base, height = needs.arena / factor, needs.kv_cache / factor
        axes.add_patch(Rectangle((0, base), len(operators), height, facecolor="#009E73", alpha=0.75))
        if height > 0.05 * top:
            words = f"KV cache, {size_text(needs.kv_cache)}"
            axes.text(len(operators) / 2, base + height / 2, words, ha="center", va="center", fontsize=8.5)
    axes.set_xlim(0, len(operators))
    names = [operator.name for operator in operators]
    axes.set_xticks([x + 0.5 for x in range(len(names))], names, rotation=90, fontsize=7)
    axes.set_ylabel(f"address in the tile memory, {unit}", fontsize=9)
    stands = " + ".join(f"one block for {count}" for count in run.stands_for)
    axes.set_title(f"{title} ({stands}): peak {size_text(run.peak.nbytes)} at {run.peak.operator}", fontsize=9)
    _mark_capacity(axes, verdict, top, factor)
    return colours


def _mark_capacity(axes: Axes, verdict: Verdict, top: float, factor: float) -> None:
    tiles = [use for use in verdict.memories if use.role == "tiles"]
    taken = sum(size for use in tiles for part, size in use.parts if part.startswith("code"))
    room = (sum(use.capacity_bytes for use in tiles) - taken) / factor
    words = f"room for tensors in {' + '.join(use.name for use in tiles)}: {size_text(round(room * factor))}"
    if room <= 1.5 * top:
        axes.axhline(room, color="#C00000", linewidth=1.5)
        axes.set_ylim(0, 1.15 * max(room, top))
    else:
        axes.set_ylim(0, 1.15 * top)
        words += ", above this picture"
    axes.text(0.99, 0.985, words, ha="right", va="top", fontsize=8, color="#C00000", transform=axes.transAxes)


def _unit(size: int) -> tuple[str, float]:
    choices: list[tuple[str, float]] = [("MiB", 2.0**20), ("KiB", 2.0**10)]
    return next(((unit, factor) for unit, factor in choices if size >= 2 * factor), ("B", 1.0))

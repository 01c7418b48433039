"""The figures of single stages: block importance, LoRA's losses, GPTQ's errors."""

from __future__ import annotations

import math

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from edgepress.pipeline.page.draw import BLUE, FAINT, RED, SERIES, Picture, picture, plain_ticks, short
from edgepress.pipeline.page.facts import Importance, LayerErrors, Losses

_MEANING = {
    "perplexity": "perplexity without the block",
    "taylor": "sum of abs(W · dL/dW)",
    "magnitude": "sum of abs(W)",
    "influence": "1 − cosine of the block's input and output",
}


def importance_figure(key: str, found: Importance) -> Picture:
    scores = found.scores
    low, high = min(scores.values()), max(scores.values())
    logarithmic = low > 0 and high > 12 * low
    meaning = _MEANING.get(found.metric, found.metric)

    def plot(figure: Figure, narrow: bool) -> None:
        axes = figure.add_subplot()
        base = low - 0.12 * (high - low) if not logarithmic and high < 3 * low else 0.0
        base = low / 1.4 if logarithmic else base
        for block, score in scores.items():
            gone = block in found.removed
            axes.bar(block, score - base, bottom=base, color=RED if gone else BLUE, width=0.74)
            if gone:
                order = f"{found.removed.index(block) + 1}."
                axes.annotate(order, (block, score), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=8)
        if logarithmic:
            axes.set_yscale("log")
            plain_ticks(axes, "y")
        axes.xaxis.set_major_locator(MaxNLocator(8 if narrow else 18, integer=True))
        axes.grid(True, axis="y")
        axes.set_xlabel("block")
        axes.set_ylabel(meaning + (" (log.)" if logarithmic else ""))

    order = sorted(scores, key=lambda block: (scores[block], block))
    alt = (
        f"Bar chart of {meaning} for blocks {min(scores)} to {max(scores)}. Least important: blocks "
        f"{', '.join(map(str, order[:3]))}; most important: {', '.join(map(str, order[-3:][::-1]))}. "
        f"Removed: {', '.join(map(str, found.removed)) or 'none'}."
    )
    caption = (
        "A low bar is a block that the model hardly needs. Red blocks were removed, in the order of their numbers."
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

"""The work of `compress rank`: what each block, or each bit of a layer, is worth, as a table, a picture and JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.manifest import is_special, replacing, sealed, write_json
from edgepress.checkpoints.runtime import Runtime, choose_device, choose_dtype
from edgepress.checkpoints.sources import cache_folder
from edgepress.pipeline.allocate import Wanted, adapter_sizes, candidates, layer_sizes, removable
from edgepress.pipeline.budget import RANKS, sensitivities
from edgepress.pipeline.calibration import Calibration
from edgepress.pipeline.plan import plan
from edgepress.pipeline.progress import Reporter
from edgepress.pipeline.recipe import Recipe
from edgepress.pipeline.store import open_model
from edgepress.pipeline.tree import duration_text, measured_speed
from edgepress.stages.depth import choose
from edgepress.stages.options import Depth, Eora, Gptq

_MEANING = {
    "perplexity": "perplexity of the model without the block",
    "taylor": "sum of |W · dL/dW| over the block",
    "taylor-signed": "sum of -W · dL/dW over the block: the loss without it, to first order",
    "magnitude": "sum of |W| over the block",
    "influence": "1 − cosine of the block's input and output",
}


_FEW = 5  # blocks that the table of bits names


def rank_blocks(recipe: Recipe, reporter: Reporter) -> dict[str, Any]:
    """The ranking of the recipe's depth stage: scores by block, the order of removal, and how it was made."""
    options = next((o for _, o in recipe.stages if isinstance(o, Depth)), None)
    if options is None:
        raise PlanError("the recipe has no depth stage to rank for")
    source = open_model(recipe.model)
    (planned,) = plan(Recipe(model=recipe.model, stages=(("depth", options),)), source.shape)
    device = choose_device(recipe.device)
    dtype = choose_dtype(recipe.dtype, device, source.shape.dense_dtype)
    runtime = Runtime(device, dtype, recipe.seed, reporter, spill_bytes=recipe.spill_mib * 2**20)
    seconds = planned.cost.seconds(measured_speed(recipe.device, recipe.dtype))
    reporter.say(
        f"ranking {len(source.shape.blocks)} blocks of {source.name} by {options.metric} on {options.samples} windows "
        f"of {options.length} tokens: about {duration_text(seconds)} here"
    )
    # Text that the model writes itself is kept where a second ranking finds it, not where the user stands.
    windows = Calibration(recipe, source, cache_folder() / "rank", runtime).windows("depth", options)
    scores = {int(i): s for i, s in choose(source, windows, options, runtime)["ranking"][0].items()}
    return {
        "model": recipe.model or "smollm2-135m-instruct",
        "metric": options.metric,
        "meaning": _MEANING[options.metric],
        "calibration": windows.facts(),
        "dtype": str(dtype).removeprefix("torch."),
        "scores": {str(i): scores[i] for i in sorted(scores)},
        "order": sorted(scores, key=lambda i: (scores[i], i)),
    }


def print_ranking(console: Console, ranking: dict[str, Any], out: Path | None) -> None:
    """One line a block with a bar; the place in the order of removal beside it."""
    scores = ranking["scores"]
    heights = dict(zip(scores, map(math.log, scores.values()), strict=True)) if _skewed(scores) else scores
    low, high = min(heights.values()), max(heights.values())
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for column in ("block", "removed", ranking["metric"]):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("")
    for block, score in scores.items():
        place = ranking["order"].index(int(block)) + 1
        width = round(40 * (heights[block] - low) / (high - low)) if high > low else 0
        table.add_row(block, f"{place}.", f"{score:.5g}", "█" * max(width, 1))
    console.print(f"{ranking['model']}: {ranking['meaning']}; the lowest goes first", highlight=False)
    console.print(table)
    _say_where(console, out)


def _say_where(console: Console, out: Path | None) -> None:
    if out is not None:
        files = [out] if is_special(out) else [out.with_suffix(".png"), out.with_suffix(".json")]
        console.print(f"Written: {', '.join(map(str, files))}", highlight=False, soft_wrap=True)


@contextmanager
def _figure(ranking: dict[str, Any], out: Path, size: tuple[float, float]) -> Iterator[Any]:
    """Write OUT.json; the axes of what becomes OUT.png on leaving."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out.with_suffix(".json"), sealed(ranking))
    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    yield axes
    axes.spines[["top", "right"]].set_visible(False)
    with replacing(out.with_suffix(".png")) as file:
        figure.savefig(file, format="png", dpi=130)
    pyplot.close(figure)


def _skewed(scores: dict[str, float]) -> bool:
    """One block that the model cannot do without can be a thousand times the rest: draw logarithms."""
    return min(scores.values()) > 0 and max(scores.values()) > 20 * min(scores.values())


def rank_bits(recipe: Recipe, reporter: Reporter, limits: Depth) -> dict[str, Any]:
    """Bytes and predicted loss of every layer at each way of the quantiser's family, of the embedding's bits, of each
    block's absence and of EoRA's adapters.

    limits: which blocks may go. What was measured is kept in the cache folder by the model's fingerprint and all that
    decides it.
    """
    options = next(o for _, o in recipe.stages if isinstance(o, Gptq))
    source = open_model(recipe.model)
    ways = candidates(source.shape, options, options.quant)
    home = cache_folder() / "rank"
    home.mkdir(parents=True, exist_ok=True)
    every = {rank: adapter_sizes(source.shape, options, ways[0], Eora(rank=rank, bits=8)) for rank in RANKS}
    adapters = {rank: of_layers for rank, of_layers in every.items() if of_layers}
    wanted = Wanted(tuple(ways), (8, 4), removable(source.shape, limits), tuple(adapters))
    found = sensitivities(recipe, source, options, wanted, home, reporter)
    sizes = layer_sizes(source.shape, options, ways)
    rows = found.to_dict()
    own = [(row, sizes[row["block"], row["layer"]].get((row["quant"], row["group"]))) for row in rows["layers"]]
    rows["layers"] = [row | {"bytes": size} for row, size in own if size is not None]
    rows["eora"] = [
        row | {"bits": 8, "bytes": adapters[row["rank"]][row["block"], row["layer"]]} for row in rows["eora"]
    ]
    about = {"model": recipe.model or "smollm2-135m-instruct", "metric": "bits", "fingerprint": source.fingerprint}
    return about | {"meaning": "predicted rise of the loss, nats a token"} | rows


def print_bits(console: Console, ranking: dict[str, Any], out: Path | None) -> None:
    """One line for each kind of layer and way: what all blocks together take and cost, and the dearest block."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for column in ("layers", "way", "MiB", "loss", "worst block"):
        table.add_column(column, justify="left" if column in ("layers", "way") else "right", no_wrap=True)
    for (name, way), rows in _by_kind(ranking).items():
        worst = max(rows, key=lambda row: row["loss"])
        loss, size = (sum(row[what] for row in rows) for what in ("loss", "bytes"))
        table.add_row(name, way, f"{size / 2**20:.3f}", f"{loss:.3g}", f"{worst['block']} ({worst['loss']:.3g})")
    for bits, loss in ranking["embedding"].items():
        if bits != "0":
            table.add_row("embedding", f"{bits} bits", "", f"{loss:.3g}", "")
    for block, loss in sorted(ranking["blocks"].items(), key=lambda row: float(row[1]))[:_FEW]:
        table.add_row(f"block {block}", "removed", "0.000", f"{loss:.3g}", "")
    console.print(f"{ranking['model']}: {ranking['meaning']}", highlight=False)
    console.print(table)
    if (hidden := len(ranking["blocks"]) - _FEW) > 0:
        console.print(f"{hidden} more blocks cost more than these", highlight=False)
    for rank in sorted({row["rank"] for row in ranking["eora"]}):
        rows = [row for row in ranking["eora"] if row["rank"] == rank]
        left = [100 * row["left"] for row in rows]
        console.print(
            f"EoRA of rank {rank} at 8 bits, {sum(row['bytes'] for row in rows) / 2**20:.3f} MiB: {min(left):.0f} to "
            f"{max(left):.0f} % of a layer's loss are left, by prediction", highlight=False,
        )  # fmt: skip
    _say_where(console, out)


def _by_kind(ranking: dict[str, Any]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in ranking["layers"]:
        key = row["layer"].rpartition(".")[2], f"{row['quant']}/{row['group']}"
        found.setdefault(key, []).append(row)
    return dict(sorted(found.items()))


def write_bits(ranking: dict[str, Any], out: Path) -> None:
    """OUT.json and OUT.png, a line for each kind of layer over the blocks, at the way of the fewest bytes.

    To a device or pipe goes the JSON alone.
    """
    if is_special(out):
        write_json(out, sealed(ranking))
        return
    kinds = _by_kind(ranking)
    sizes: dict[str, int] = {}
    for (_, own), rows in kinds.items():
        sizes[own] = sizes.get(own, 0) + sum(row["bytes"] for row in rows)
    way = min(sizes, key=lambda own: sizes[own])
    with _figure(ranking, out, (8, 4)) as axes:
        for (name, own), rows in kinds.items():
            if own == way:
                axes.plot([r["block"] for r in rows], [max(r["loss"], 1e-12) for r in rows], marker=".", label=name)
        axes.set_yscale("log")
        axes.set_xlabel("block")
        axes.set_ylabel("predicted loss, nats a token")
        axes.set_title(f"{ranking['model']}: each layer alone at {way}", fontsize=10)
        axes.legend(fontsize=8, ncols=2)


def write_ranking(ranking: dict[str, Any], out: Path) -> None:
    """OUT.json and OUT.png, a bar for each block; the five that would go first stand out.

    To a device or pipe goes the JSON alone.
    """
    if is_special(out):
        write_json(out, sealed(ranking))
        return
    blocks = [int(block) for block in ranking["scores"]]
    scores = list(ranking["scores"].values())
    first = set(ranking["order"][:5])
    with _figure(ranking, out, (max(6, 0.28 * len(blocks)), 3.6)) as axes:
        axes.bar(blocks, scores, color=["#d1495b" if b in first else "#30638e" for b in blocks])
        if _skewed(ranking["scores"]):
            axes.set_yscale("log")
        axes.set_xticks(blocks, [str(b) for b in blocks], fontsize=8)
        axes.set_xlabel("block (red: the five that would be removed first)")
        axes.set_ylabel(ranking["metric"])
        axes.set_title(f"{ranking['model']}: {ranking['meaning']}", fontsize=10)

"""Every quantiser and every recovery method on SmolLM2-135M, dense and 2:4: one table and one figure.

32 x 512 calibration tokens and the training windows from one text, perplexity on the first 16,384 tokens of another
in windows of 512, as in the other benchmarks:

    .venv/bin/python -m benchmarks.methods wiki.valid.raw wiki.test.raw [-o OUT] [--only NAME,NAME] [--base dense,2:4]

Stages lie in OUT, so an interrupted run goes on; each finished row is a line of OUT/methods.jsonl, and `--show` prints
the table and draws OUT/methods.png from what is there. A row that plan refuses stands in the table with its reason.
"""

from __future__ import annotations

import argparse
import json
import signal
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.method_figure import draw
from benchmarks.method_rows import BASES, Row, rows
from edgepress.checkpoints.errors import EdgepressError, RecipeError
from edgepress.checkpoints.quiet import quiet_libraries
from edgepress.checkpoints.shape import ModelShape
from edgepress.pipeline.sweep_recipe import Configuration, Sweep

LINES, FIGURE = "methods.jsonl", "methods.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("training", help="text file that calibrates and trains")
    parser.add_argument("text", help="text file that is measured on")
    parser.add_argument("-o", "--out", type=Path, default=Path("methods"))
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--only", default="", help="methods, comma-separated; default: all")
    parser.add_argument("--base", default=",".join(BASES), help="what they start from: dense, 2:4 or another N:M")
    parser.add_argument("--recovery-steps", type=int, default=20, help="optimiser steps of a recovery method")
    parser.add_argument("--recovery-length", type=int, default=256, help="tokens of a training window")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows")
    parser.add_argument("--length", type=int, default=512, help="tokens of a calibration or measured window")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens that are measured")
    parser.add_argument("--jobs", type=int, default=1, help="rows at once, each with its share of the cores")
    parser.add_argument("--show", action="store_true", help="only print and draw what OUT holds")
    given = parser.parse_args()
    out = given.out.absolute()
    if not given.show:
        quiet_libraries()
        try:
            measure(given, out)
        except EdgepressError as error:
            parser.error(str(error))
        except KeyboardInterrupt:
            print("interrupted; the same command goes on from the last finished block or step")
    found = read_lines(out / LINES)
    print(table(found))
    draw(found, out / FIGURE)
    print(f"\n{out / LINES}, {out / FIGURE}")


def measure(given: argparse.Namespace, out: Path) -> None:
    """Every row that is asked for, through the store; a line in the file as soon as one is there."""
    from edgepress.pipeline import sweep as sweeps
    from edgepress.pipeline.store import Store
    from edgepress.pipeline.sweep import SweepView
    from edgepress.pipeline.workers import Processes

    wanted = rows(given)
    with Store(out).opened():
        possible = dict(_planned(wanted, given.model, out / LINES))
        sweep = Sweep("methods", tuple(Configuration(row.name, row.recipe) for row in possible.values()))
        tree = sweeps.prepare(sweep, out)
        sweeps.require_room(out, tree)
        with SweepView(Console(stderr=True), out / "sweep.log") as view:
            signal.signal(signal.SIGINT, view.interrupt)

            def finished(name: str) -> None:
                assert view.result is not None
                nodes = [view.result.outcomes[key] for key in tree.paths[name]]
                shape = tree.nodes[tree.paths[name][-1]]
                after = shape.step.shape if shape.step else shape.before
                append(out / LINES, line(possible[name], nodes, after))

            # A process for each stage run: what one leaves in memory would count in the peak of the next.
            sweeps.carry_out(tree, out, Processes(given.jobs, view.step, once=True), view, finished)
            assert view.result is not None
            for name, reason in view.result.failed_configurations().items():
                append(out / LINES, head(possible[name]) | {"failed": reason})


def _planned(wanted: Iterable[Row], model: str, file: Path) -> Iterable[tuple[str, Row]]:
    """The rows that plan lets through, by name. The reason why another cannot be goes into the file."""
    from edgepress.checkpoints.sources import open_source
    from edgepress.pipeline.plan import plan

    shape = open_source(model).shape
    for row in wanted:
        faults = list(row.faults)
        if not faults:
            try:
                plan(row.recipe, shape)
            except RecipeError as error:
                faults += error.faults
        if faults:
            append(file, head(row) | {"refused": "; ".join(faults)})
        else:
            yield row.name, row


# --- a row's numbers --------------------------------------------------------------------------------------------------


def head(row: Row) -> dict[str, Any]:
    return {"method": row.method, "base": row.base, "kind": row.kind}


def line(row: Row, outcomes: list[Any], shape: ModelShape) -> dict[str, Any]:
    """What the table shows: seconds and peak memory of the row's own stages, not of those that made its base."""
    end, own = outcomes[-1], outcomes[1 + row.shared :]
    records = [outcome.record for outcome in own]
    return head(row) | {
        "perplexity": end.measured["perplexity"],
        "bits_per_weight": bits_per_weight(shape),
        "seconds": sum(r.seconds for r in records),
        "peak_memory_bytes": max((r.peak_memory_bytes for r in records), default=None),
        "packed_bytes": end.record.packed_bytes,
        "file_bytes": end.record.file_bytes,
        "stages": [outcome.folder for outcome in outcomes[1:]],
    }


def bits_per_weight(shape: ModelShape) -> float:
    """Bits that the packed image spends on the blocks' linear layers, for each of their weights, zeros included.

    Codes or values, the index of the mask, scales, zero points, adapters; not the embedding, head, norms and header.
    """
    from edgepress.checkpoints.packed_sizes import packed_sizes

    sizes = packed_sizes(shape)
    around = sizes.embedding + sizes.head + sizes.norms + sizes.biases + sizes.header
    return 8 * (sizes.total - around) / sum(x.weights for block in shape.blocks for x in block.linears)


def append(file: Path, facts: Mapping[str, Any]) -> None:
    with file.open("a") as lines:
        lines.write(json.dumps(facts) + "\n")


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The newest line of each row, in the order in which rows first came."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for text in file.read_text().splitlines() if file.is_file() else []:
        facts = json.loads(text)
        found[facts["method"], facts["base"]] = facts
    return list(found.values())


# --- how it looks -----------------------------------------------------------------------------------------------------

COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "method": lambda row: row["method"],
    "base": lambda row: row["base"],
    "perplexity": lambda row: f"{row['perplexity']:.2f}",
    "bits a weight": lambda row: f"{row['bits_per_weight']:.2f}",
    "seconds": lambda row: f"{row['seconds']:.0f}",
    "peak GiB": lambda row: f"{row['peak_memory_bytes'] / 2**30:.2f}" if row["peak_memory_bytes"] else "",
    "packed bytes": lambda row: f"{row['packed_bytes']:,}",
}


def table(found: Iterable[dict[str, Any]]) -> str:
    """Markdown: the bases, then quantisers, then recovery methods."""
    kinds = ("base", "quantiser", "recovery")
    ordered = sorted(found, key=lambda row: kinds.index(row["kind"]))
    text = [f"| {' | '.join(COLUMNS)} |", "|---|---|" + "---:|" * (len(COLUMNS) - 2)]
    for row in ordered:
        reason = row.get("refused") or row.get("failed")
        if reason:
            what = "refused" if "refused" in row else "failed"
            text.append(f"| {row['method']} | {row['base']} | {what}: {reason} |" + " |" * (len(COLUMNS) - 3))
        else:
            text.append(f"| {' | '.join(cell(row) for cell in COLUMNS.values())} |")
    return "\n".join(text)


if __name__ == "__main__":
    main()

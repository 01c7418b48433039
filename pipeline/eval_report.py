"""What a person sees of an evaluation: a table, the protocols under it, a figure, and differences in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from edgepress.checkpoints.manifest import replacing
from edgepress.checkpoints.memory import size_text
from edgepress.eval.compare import Difference
from edgepress.eval.results import Result, Score
from edgepress.pipeline.evaluate import Measured
from edgepress.pipeline.tables import print_whole

_MIB = 2**20


def print_measured(console: Console, measured: Sequence[Measured]) -> None:
    """One checkpoint: a row for each number. Several: a row for each checkpoint, a column for each main number."""
    (_print_one if len(measured) == 1 else _print_several)(console, measured)
    # Scores of one task often share a protocol and differ in their interval's wording only by n, which is a column.
    lines = [
        f"{task}: {score.protocol}" for m in measured for task, result in m.results.items() for score in result.scores
    ]
    intervals = {score.interval.split(" over")[0] for m in measured for r in m.results.values() for score in r.scores}
    for line in dict.fromkeys([*lines, f"Intervals: {'; '.join(sorted(filter(None, intervals)))}"]):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _print_one(console: Console, measured: Sequence[Measured]) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("task", "metric", "value", "95 %", "n", "sec"):
        table.add_column(column, justify="left" if column in ("task", "metric") else "right", no_wrap=True)
    for task, result in measured[0].results.items():
        for place, score in enumerate(result.scores):
            seconds = f"{result.seconds:.0f}" if place == 0 else ""
            name = task if place == 0 else ""
            table.add_row(name, score.metric, number(score.value, score.unit), _interval(score), str(score.n), seconds)
    console.print(f"\n{measured[0].label}, {size_text(measured[0].file_bytes, 'MiB', 1)}", highlight=False)
    print_whole(console, table, labels=2)


def _print_several(console: Console, measured: Sequence[Measured]) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("checkpoint", no_wrap=True)
    table.add_column("MiB", justify="right", no_wrap=True)
    for task, score in _columns(measured):
        title = f"{task}\n{score.metric}{', %' if score.unit == '%' else ''}"
        table.add_column(title.replace(", ", "\n").replace("-", "-\n"), justify="right", no_wrap=True)
    for m in measured:
        cells = [_number_over_interval(score) for result in m.results.values() for score in main(result)]
        table.add_row(m.label, f"{m.file_bytes / _MIB:.1f}", *cells)
    console.print()
    print_whole(console, table)


def _number_over_interval(score: Score) -> str:
    """The unit is in the column's title."""
    value, low, high = (number(x, score.unit).removesuffix(" %") for x in (score.value, score.low, score.high))
    return f"{value}\n({low}–{high})"


def main(result: Result) -> list[Score]:
    """The numbers that stand for a result: its first score, and others of that name by another protocol."""
    first = result.scores[0].metric.split(",")[0]
    return [score for score in result.scores if score.metric.split(",")[0] == first]


def _columns(measured: Sequence[Measured]) -> list[tuple[str, Score]]:
    return [(task, score) for task, result in measured[0].results.items() for score in main(result)]


def number(value: float, unit: str) -> str:
    if math.isnan(value):
        return "–"
    return f"{100 * value:.1f} %" if unit == "%" else f"{value:.4g}{' ' + unit if unit else ''}"


def _interval(score: Score) -> str:
    if math.isnan(score.low):
        return "–"
    return f"{number(score.low, score.unit)} – {number(score.high, score.unit)}"


def draw(measured: Sequence[Measured], path: Path) -> None:
    """One panel for each column of the table: every checkpoint's value with its interval, the first one on top."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    columns = _columns(measured)
    height = 1.2 + 0.4 * len(measured)
    figure, axes = pyplot.subplots(
        1, len(columns), figsize=(2.4 + 3.2 * len(columns), height), sharey=True, squeeze=False
    )
    places = range(len(measured))
    for k, (task, shown) in enumerate(columns):
        scale = 100 if shown.unit == "%" else 1
        scores = [[score for r in m.results.values() for score in main(r)][k] for m in measured]
        values = [scale * score.value for score in scores]
        below = [v - scale * s.low if not math.isnan(s.low) else 0.0 for v, s in zip(values, scores, strict=True)]
        above = [scale * s.high - v if not math.isnan(s.high) else 0.0 for v, s in zip(values, scores, strict=True)]
        axis = axes[0][k]
        axis.errorbar(values, places, xerr=[below, above], fmt="o", capsize=3, color="#1f5fa8")
        axis.axvline(values[0], color="#999999", linewidth=0.8, linestyle=":")  # the first checkpoint, to compare with
        axis.set_title(task, fontsize=10)
        better = "right" if shown.higher_is_better else "left"
        axis.set_xlabel(f"{shown.metric}{', %' if shown.unit == '%' else ''} (better: {better})", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(axis="x", alpha=0.3)
    axes[0][0].set_yticks(list(places), [m.label for m in measured])
    axes[0][0].set_ylim(len(measured) - 0.5, -0.5)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=150)
    pyplot.close(figure)


def print_differences(console: Console, a: str, b: str, differences: Sequence[Difference]) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("task", "metric", "A", "B", "B − A", "95 %", "p", "n", ""):
        table.add_column(column, justify="left" if column in ("task", "metric", "") else "right", no_wrap=True)
    for d in differences:
        interval = f"{number(d.low, d.unit)} – {number(d.high, d.unit)}"
        p = "" if math.isnan(d.p) else f"{d.p:.2g}"
        cells = (number(d.a, d.unit), number(d.b, d.unit), number(d.difference, d.unit), interval, p, str(d.n))
        table.add_row(d.task, d.metric, *cells, verdict(d))
    console.print(f"\nA: {a}\nB: {b}", highlight=False, markup=False)
    print_whole(console, table, labels=2)
    for line in dict.fromkeys(f"{d.task}: {d.protocol}; {d.test}" for d in differences):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def verdict(d: Difference) -> str:
    """In words. Tiers and other parts of a score are compared like scores of their own."""
    if d.difference == 0:
        return "equal"
    return "within noise" if d.within_noise else f"B is {'better' if d.b_is_better else 'worse'}"

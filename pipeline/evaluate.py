"""Run tasks on checkpoints, and show, draw and write what they found."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text as Words

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import CheckpointError, EdgepressError, PlanError, near
from edgepress.checkpoints.manifest import check_files, is_special, replacing, seal_holds, sealed, write_json
from edgepress.checkpoints.memory import size_text
from edgepress.checkpoints.runtime import Progress, Runtime, choose_device, choose_dtype
from edgepress.checkpoints.sources import open_source
from edgepress.eval.generation import Continuation, Decoding, same_words
from edgepress.eval.perplexity import protocol_of, spec_of
from edgepress.eval.results import Difference, Result, Score, compare
from edgepress.eval.subject import Subject
from edgepress.eval.tasks import TASKS, Settings, Task
from edgepress.pipeline.store import finished_result, is_store
from edgepress.pipeline.tables import print_whole
from edgepress.pipeline.tree import duration_text, measuring_seconds


@dataclass(frozen=True)
class Measured:
    """One checkpoint's results, by task."""

    label: str
    folder: str
    fingerprint: str
    file_bytes: int
    parameters_total: int
    results: dict[str, Result]

    def score(self, task: str = "") -> Score:
        """The main score of a task, of the first where none is named. Raises PlanError for one not measured."""
        name = task or next(iter(self.results))
        if name not in self.results:
            raise PlanError(f"'{name}' was not measured{near(name, self.results)}; there are {', '.join(self.results)}")
        return self.results[name].scores[0]

    def __str__(self) -> str:
        console = Console(file=StringIO(), width=120, force_jupyter=False, force_terminal=False)
        print_measured(console, [self])
        assert isinstance(console.file, StringIO)
        return console.file.getvalue()

    def to_dict(self, items: bool) -> dict[str, Any]:
        facts = {name: getattr(self, name) for name in ("label", "folder", "fingerprint", "file_bytes")}
        facts["parameters_total"] = self.parameters_total
        return facts | {"results": {task: result.to_dict(items) for task, result in self.results.items()}}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Measured:
        results = {task: Result.from_dict(result) for task, result in data["results"].items()}
        return cls(**(data | {"results": results}))


def open_all(names: Sequence[str]) -> list[tuple[str, Checkpoint]]:
    """The checkpoints that a user names, each with a label of its own; an output folder means all its stages.

    Raises CheckpointError with everything that is wrong with any of them.
    """
    opened: list[Checkpoint] = []
    faults = []
    for name in names or [""]:
        try:
            folder = Path(name).expanduser()
            opened += _stages(folder) if name and is_store(folder) else [open_source(name or None)]
        except EdgepressError as error:
            faults.append(str(error))
    if faults:
        raise CheckpointError("\n".join(faults))
    folders = [checkpoint.folder.resolve() for checkpoint in opened]
    if twice := next((folder for folder in folders if folders.count(folder) > 1), None):
        raise PlanError(f"{twice} is named twice; name each checkpoint once")
    names_only = [checkpoint.name for checkpoint in opened]
    labels = [
        name if names_only.count(name) == 1 else "-".join(folder.parts[-2:])
        for name, folder in zip(names_only, folders, strict=True)
    ]
    if len(set(labels)) < len(labels):
        raise PlanError(f"two checkpoints would both be called {max(labels, key=labels.count)}; rename a folder")
    return list(zip(labels, opened, strict=True))


def _stages(store: Path) -> list[Checkpoint]:
    """The last run's checkpoints of an output folder, the uncompressed model first."""
    line = list(Checkpoint.open(finished_result(store)).ancestors())[::-1]
    for checkpoint in line:
        if checkpoint.manifest is not None:
            check_files(checkpoint.folder, checkpoint.manifest, hashes=True)
    return line


def check_request(tasks: Sequence[Task], settings: Settings) -> None:
    """Everything about tasks and their data that can be wrong, before any model is loaded; all faults at once."""
    names = {task.name for task in tasks}
    if "robustness" in names:
        names.add(settings.robust_task)
    faults = [
        f"--from {source}: '{source.partition('=')[0]}' is not among the tasks {', '.join(sorted(names))}"
        for source in settings.sources
        if "=" in source and source.partition("=")[0] not in names
    ]
    for task in tasks:
        try:
            settings.files_of(task.name)
            task.check(settings)
        except EdgepressError as error:
            faults.append(str(error))
    if faults:
        raise PlanError("\n".join(dict.fromkeys(faults)))


def measure_all(
    named: Sequence[tuple[str, Checkpoint]],
    tasks: Sequence[Task],
    settings: Settings,
    device: str,
    dtype: str,
    progress: Progress,
) -> list[Measured]:
    """Every task on every checkpoint, one model in memory at a time."""
    where = choose_device(device)
    precisions = _precisions(named, tasks, settings, dtype, where)
    measured = []
    for label, checkpoint in named:
        found: dict[str, Result] = {}
        for precision in dict.fromkeys(precisions.values()):
            subject = Subject(checkpoint, Runtime(where, precision, progress=progress), label)
            group = [task for task in tasks if precisions[task.name] == precision]
            found |= {task.name: task.load()(task.name, subject, settings) for task in group}
        results = {task.name: found[task.name] for task in tasks}
        shape = checkpoint.shape
        measured.append(
            Measured(
                label, str(checkpoint.folder), checkpoint.fingerprint, shape.file_bytes, shape.parameters_total, results
            )
        )
    return measured


def _precisions(
    named: Sequence[tuple[str, Checkpoint]], tasks: Sequence[Task], settings: Settings, dtype: str, where: torch.device
) -> dict[str, torch.dtype]:
    """Each task's precision: one for all checkpoints, or a difference between them could be that of the precisions.

    `auto` is float32 for greedy answers, and for robustness that follows them.
    """
    stored = {checkpoint.shape.dense_dtype for _, checkpoint in named}
    usual = choose_dtype(dtype, where, "F32" if "F32" in stored else "BF16")
    exact = usual if dtype != "auto" else torch.float32
    measured = {t.name: TASKS.get(settings.robust_task, t) if t.name == "robustness" else t for t in tasks}
    return {name: exact if task.answers else usual for name, task in measured.items()}


def intention(
    named: Sequence[tuple[str, Checkpoint]], tasks: Sequence[Task], settings: Settings, device: str, dtype: str
) -> str:
    """What is about to be measured, and how long it takes here where that can be told: of perplexity alone."""
    subjects = named[0][0] if len(named) == 1 else f"{len(named)} checkpoints"
    found = f"measuring {', '.join(task.name for task in tasks)} of {subjects}"
    if {task.name for task in tasks} != {"perplexity"}:
        return found
    count = protocol_of(settings, settings.protocol).tokens
    seconds = measuring_seconds(count, [checkpoint.shape for _, checkpoint in named], device, dtype)
    tokens = f"{count:,} tokens" if count else "all tokens"
    return f"{found} on {tokens} of {spec_of('perplexity', settings)}: about {duration_text(max(seconds, 1))} here"


def keeping_answers(settings: Settings, home: Path) -> Settings:
    """Settings with the folder for answers filled in: `answers` in `home` unless the user chose one, or none."""
    if settings.answers == "none":
        return replace(settings, answers="")
    return settings if settings.answers else replace(settings, answers=str(home / "answers"))


def write_report(path: Path, measured: Sequence[Measured], machine: str, changes: Sequence[Step] = ()) -> None:
    """Every result with the value of each item, so that two reports can be compared later."""
    if not is_special(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, sealed(report(measured, machine, changes, items=True)))


def report(
    measured: Sequence[Measured], machine: str, changes: Sequence[Step] = (), items: bool = False
) -> dict[str, Any]:
    """changes: of the stages of one run, in its order; empty for checkpoints named one by one."""
    found = {"format": 1, "machine": machine, "checkpoints": [m.to_dict(items) for m in measured]}
    return found | ({"changes": [step.to_dict() for step in changes]} if changes else {})


@dataclass(frozen=True)
class Step:
    """What one stage changed: the differences of the main numbers from the stage before, item by item."""

    before: str
    after: str
    differences: list[Difference]
    unpaired: str  # why some could not be paired; empty where all were

    def to_dict(self) -> dict[str, Any]:
        rows = [d.to_dict() | {"verdict": verdict(d)} for d in self.differences]
        return {"a": self.before, "b": self.after, "differences": rows, "unpaired": self.unpaired}


def steps(measured: Sequence[Measured]) -> list[Step]:
    """Every stage of a run against the one before it; a stage that changes the tokenizer has no items in common."""
    return [_step(a, b) for a, b in pairwise(measured)]


def _step(a: Measured, b: Measured) -> Step:
    found: list[Difference] = []
    reasons = []
    for task, one in a.results.items():
        two = b.results[task]
        shown = [s.metric for s in main(one) if not math.isnan(s.value)]
        try:
            found += [d for d in compare(one, two) if d.metric in shown]
        except PlanError as error:
            reasons.append(str(error))
    return Step(a.label, b.label, found, "; ".join(reasons))


def read_report(name: str) -> Measured:
    """One checkpoint's results from a report: FILE.json, or FILE.json:LABEL where it holds several."""
    file, _, label = name.partition(".json:")
    path = Path(file if not label else f"{file}.json").expanduser()
    try:
        data = json.loads(path.read_text())
        found = {m["label"]: Measured.from_dict(m) for m in data["checkpoints"]}
        if not seal_holds(data):
            raise PlanError(f"{path} is damaged or was edited: it does not have the sha256 that it was written with")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PlanError(f"{path} is not a report of `compress eval -o`: {error}") from None
    if label and label in found:
        return found[label]
    if label or len(found) != 1:
        raise PlanError(f"{path} holds {', '.join(found)}; name one as {path}:LABEL")
    return next(iter(found.values()))


# --- what a person sees -----------------------------------------------------------------------------------------------
# What a person sees of an evaluation: a table, the protocols under it, a figure, and differences in words.


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


def print_steps(console: Console, found: Sequence[Step]) -> None:
    """A row for each stage and number: how much it changed, and whether that is more than noise."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("stage", "metric", "change", "95 %", "n", ""):
        table.add_column(column, justify="left" if column in ("stage", "metric", "") else "right", no_wrap=True)
    for step in found:
        for place, d in enumerate(step.differences):
            interval = f"{number(d.low, d.unit)} – {number(d.high, d.unit)}"
            words = verdict(d).replace("B is ", "")
            label = step.after if place == 0 else ""
            metric = d.metric if d.metric == d.task else f"{d.task} {d.metric}"
            table.add_row(label, metric, number(d.difference, d.unit), interval, str(d.n), words)
    if table.rows:
        console.print("\neach stage against the one before it, paired", highlight=False)
        print_whole(console, table, labels=2)
    for step in found:
        if step.unpaired:
            _line(console, f"{step.after} against {step.before}: {step.unpaired}")


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


# --- answers side by side ---------------------------------------------------------------------------------------------
# What several checkpoints make of one prompt: a table, plain lines, or JSON.


Named = tuple[str, Checkpoint]


def as_dict(prompt: str, decoding: Decoding, entries: list[Named], found: list[Continuation]) -> dict[str, Any]:
    first = found[0].text
    return {
        "prompt": prompt,
        "decoding": asdict(decoding),
        "continuations": [
            {
                "checkpoint": label,
                "folder": str(checkpoint.folder),
                "fingerprint": checkpoint.fingerprint,
                "text": c.text,
                "tokens": c.tokens,
                "ended": c.ended,
                "seconds": c.seconds,
                "same_words_as_first": same_words(c.text, first),
            }
            for (label, checkpoint), c in zip(entries, found, strict=True)
        ],
    }


def print_plain(console: Console, entries: list[Named], found: list[Continuation]) -> None:
    """One heading and one text a checkpoint; nothing is wrapped, so that lines can be searched and compared."""
    for place, c in enumerate(found):
        agreement = "" if place == 0 else _agreement(entries[0][0], c, found[0])
        _line(console, f"[{entries[place][0]}]{agreement}")
        _line(console, c.text.strip("\n"))
        _line(console, "")


def print_table(
    console: Console, prompt: str, decoding: Decoding, entries: list[Named], found: list[Continuation]
) -> None:
    """One row a checkpoint; what all the texts begin with like the first is dim, so that the eye finds the change."""
    console.print(Words(prompt, style="bold"))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_lines=True)
    table.add_column("checkpoint", no_wrap=True)
    table.add_column("continuation", overflow="fold")
    for place, c in enumerate(found):
        words = Words(c.text.strip("\n"))
        if place > 0:
            words.stylize("dim", 0, _same_start(words.plain, found[0].text.strip("\n")))
        table.add_row(entries[place][0], words)
    console.print(table)
    console.print(f"{decoding}; dim: the same as {entries[0][0]}", highlight=False)


def _agreement(first: str, c: Continuation, other: Continuation) -> str:
    count = same_words(c.text, other.text)
    return f"  begins with {count} word{'s' * (count != 1)} of {first}"


def _same_start(text: str, other: str) -> int:
    """Characters that two texts share from their beginning."""
    pairs = enumerate(zip(text, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(text), len(other)))


def _line(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)

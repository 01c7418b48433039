"""The sections of the page: what to take, the table, the figures, what to do next, how to get the same again."""

from __future__ import annotations

import itertools
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.manifest import write_bytes
from edgepress.checkpoints.memory import size_text
from edgepress.eval.results import Difference, Result, Score, compare
from edgepress.hardware.units import times_text
from edgepress.pipeline.page import facts, figures
from edgepress.pipeline.page.figures import Picture, number, pareto_figure
from edgepress.pipeline.page.read import EVALUATION, Configuration, StageRun, Study, clean
from edgepress.pipeline.page.recommend import Taken, Worth, chain_of, take, worth

_MIB = 2**20
_MOST = 4  # heat maps and rankings on one page
_MOST_LOSSES = 6


@dataclass(frozen=True)
class Chip:
    """The chip that results are held against."""

    name: str
    room: int  # bytes of its memories for weights
    verdict: dict[str, Any] | None  # of the checkpoint to take
    subject: str = ""  # what the verdict judges
    why_not: str = ""  # there is no verdict
    fits: Mapping[str, bool] = field(default_factory=dict)  # by fingerprint, of all that could be judged
    soc: str = ""  # what `--soc` calls it

    def taken(self, study: Study) -> Taken | None:
        return take(study, self.room, self.fits)


@dataclass(frozen=True)
class Grid:
    """A small table: a cell is lines, the first the larger."""

    headings: list[str]
    rows: list[list[tuple[str, ...]]]
    name: str


@dataclass(frozen=True)
class Item:
    """Whether a stage's bytes paid."""

    name: str
    change: str
    verdict: str
    words: str
    tone: str = ""


@dataclass(frozen=True)
class Section:
    key: str
    title: str
    pictures: list[Picture] = field(default_factory=list)
    lead: str = ""
    notes: list[str] = field(default_factory=list)
    items: list[Item] = field(default_factory=list)
    grid: Grid | None = None
    after: list[str] = field(default_factory=list)  # sentences below the grid
    command: str = ""


def sections(study: Study, chip: Chip) -> tuple[list[Section], list[str]]:
    """The sections there is data for, and one sentence for each that is left out."""
    made = [
        _quality(study, chip),
        _changes(study, chip),
        _memory(study, chip),
        _evaluated(study),
        _importance(study),
        _training(study),
        _errors(study),
    ]
    return [s for s in made if isinstance(s, Section)], [s for s in made if isinstance(s, str)]


def _quality(study: Study, chip: Chip) -> Section | str:
    if not study.comparable:
        return "Quality against size: no perplexity is finite."
    left_out = len(study.candidates) - len(study.comparable)
    notes = [f"{left_out} not drawn: measured in another way, or not finite."] if left_out else []
    if not study.all_packed:
        notes.append("Some stage runs do not say their packed bytes, so the bytes of the files are compared.")
    picture = pareto_figure(study, chip.name, chip.room, chip.taken(study))
    return Section("quality", "Quality against size", [picture], notes=notes)


def _followed(study: Study, chip: Chip) -> Configuration:
    """The configuration that the figures of single stages follow: that of the checkpoint to take."""
    taken = chip.taken(study)
    found = chain_of(study, taken.choice) if taken else study.configurations[0]
    return found if len(found.runs) > 1 else max(study.configurations, key=lambda c: len(c.runs))


def _changes(study: Study, chip: Chip) -> Section | str:
    configuration = _followed(study, chip)
    runs = configuration.runs
    if len(runs) < 2:
        return "What each stage did: no stage ran."
    pictures = []
    if study.kind == "sweep" and (by_stage := facts.effects(study)):
        pictures.append(figures.effects_figure(by_stage))
    names = [run.stage for run in runs]
    of = "" if study.kind == "run" else f": {configuration.name}"
    quality = study.quality_name
    if all(math.isfinite(run.perplexity) for run in runs):
        steps = facts.waterfall(names, [study.quality(run) for run in runs])
        title = f"{quality.capitalize()}{of}"
        pictures.append(figures.waterfall_figure("waterfall-perplexity", title, steps, "source", quality, 1))
    steps = facts.waterfall(names, [study.size(run) for run in runs])
    unit = f"{study.size_name}, MiB"
    title = f"{study.size_name.capitalize()}{of}"
    pictures.append(figures.waterfall_figure("waterfall-bytes", title, steps, "source", unit, _MIB))
    found = [w for before, after in itertools.pairwise(runs) if (w := worth(study, before, after))]
    whole = worth(study, runs[0], runs[-1])
    price = whole.per_mib if whole and whole.nbytes < 0 else None
    items = [_item(study, w, price) for w in found]
    return Section("stages", "Did each stage’s bytes pay?", pictures, _lead(study, configuration, found),
                   _elsewhere(study, runs), items)  # fmt: skip


def _lead(study: Study, configuration: Configuration, found: list[Worth]) -> str:
    words = [] if study.kind == "run" else [f"Of {configuration.name}, stage by stage."]
    if any(w.outcome == "price" for w in found):
        words.append(
            f"Where this {study.kind} has nothing else at equal or fewer bytes, a stage has its price in place of a "
            "verdict."
        )
    if any(w.difference is None for w in found):
        words.append("Changes without an interval were measured once, on one text; `compress eval` gives intervals.")
    return " ".join(words)


_TONES = {"paid": "good", "cost nothing": "good", "did not pay": "bad"}


def _item(study: Study, w: Worth, whole: float | None) -> Item:
    """One stage in words: what it changed, and what else the study has at its bytes.

    whole: what the whole chain gave up for each MiB.
    """
    quality = study.quality_name
    mib, change = w.nbytes / _MIB, figures.signed(w.change)
    size = "no byte" if w.nbytes == 0 else f"{'+' if mib > 0 else '−'}{size_text(abs(w.nbytes))}"
    words, verdict = [], w.outcome if w.per_mib is None or w.outcome != "price" else f"{w.per_mib:.2g} a MiB"
    if (d := w.difference) is not None:
        noise = ", within noise" if d.within_noise else ""
        words.append(f"Window by window {signed_range(d)}{noise}.")
        if noise and w.outcome == "paid":
            verdict = "not shown"
    if w.per_mib is not None:
        deal = f"It {'bought' if w.nbytes > 0 else 'gave up'} {w.per_mib:.2g} of {quality} for each MiB"
        if whole is not None and w.outcome == "price":
            deal += f", {'more' if w.per_mib > whole else 'no more'} than the {whole:.2g} that the whole chain gave up"
        words.append(f"{deal}.")
    if w.outcome == "did not pay" and w.nbytes >= 0 and w.change >= 0:
        words.append("What it started from is no larger and no worse.")
    elif w.outcome == "cost nothing":
        words.append("It is no larger and no worse than what it started from.")
    elif w.rival is not None:
        there = f"{w.rival.name}, {number(study.quality(w.rival.run))} in {size_text(study.size(w.rival.run))}"
        if w.outcome == "did not pay":
            words.append(f"Better at equal or fewer bytes: {there}.")
        else:
            others = "The one other" if w.rivals == 1 else f"None of the {w.rivals} others"
            words.append(f"{others} at equal or fewer bytes is {'not ' * (w.rivals == 1)}better; nearest: {there}.")
    return Item(w.after.name, f"{size}, {change} {quality}", verdict, " ".join(words), _TONES.get(verdict, ""))


def signed_range(d: Difference) -> str:
    low, high = figures.signed(d.low), figures.signed(d.high)
    return f"{figures.signed(d.difference)} (95 %: {low} to {high}; {d.n} windows)"


def _elsewhere(study: Study, shown: Sequence[StageRun]) -> list[str]:
    """The stage runs of a sweep that the list leaves out, counted by stage and outcome."""
    known = {run.fingerprint for run in shown}
    found: dict[str, Worth] = {}
    for configuration in study.configurations:
        for before, after in itertools.pairwise(configuration.runs):
            if after.fingerprint not in known | set(found) and (w := worth(study, before, after)):
                found[after.fingerprint] = w
    by_stage: dict[str, list[str]] = {}
    for w in found.values():
        by_stage.setdefault(w.after.stage, []).append("without a rival" if w.outcome == "price" else w.outcome)
    return [
        f"{stage} elsewhere, {len(outcomes)} {'place' if len(outcomes) == 1 else 'places'}: "
        + ", ".join(f"{outcomes.count(o)} {o}" for o in dict.fromkeys(outcomes))
        for stage, outcomes in by_stage.items()
    ]


def _memory(study: Study, chip: Chip) -> Section | str:
    if chip.verdict is None or "memories" not in chip.verdict:
        return f"Memory map: {chip.why_not or (chip.verdict or {}).get('summary', 'there is no verdict')}"
    verdict = chip.verdict
    lead = " ".join(filter(None, (str(verdict["summary"]), _speed(verdict))))
    picture = figures.memory_figure(facts.memories(verdict), chip.name, chip.subject)
    notes = [str(note) for note in verdict.get("notes", ())]
    levers = verdict.get("levers")
    if verdict["fits"] or not levers:
        return Section("memory", f"On {chip.name}", [picture], lead, notes)
    rows: list[list[tuple[str, ...]]] = [
        [(x["lever"],), (x["now"],), (x["furthest"],), (size_text(x["saved_bytes"]),), (x["enough"] or "no",)]
        for x in levers["ranked"]
    ]
    grid = Grid(["lever", "now", "furthest", "saves at most", "enough alone"], rows, "What would have to give")
    after = [f"Options of stages are for {levers['options_for']}."] if levers["options_for"] else []
    if levers["smallest"]:
        steps = listed([f"`{step}`" for step in levers["smallest"]])
        after.append(f"Smallest change that fits: {steps}. What it costs in quality is not known.")
        if levers["spread"]:
            after.append(f"Or, spread over more of them: {listed([f'`{step}`' for step in levers['spread']])}.")
    else:
        missing = listed([f"{size_text(size)} of {role}" for role, size in levers["missing_then"].items()])
        after.append(f"Nothing here is enough: with every lever at its end {missing} are missing on {chip.name}.")
    taken, plan = chip.taken(study), ""
    if levers["options"] and not levers["options_for"] and taken and taken.run.folder:
        plan = f"compress plan --model {shlex.quote(path_of(study, taken.run))} {levers['options']}"
    return Section("memory", f"On {chip.name}", [picture], lead, notes, grid=grid, after=after, command=plan)


def path_of(study: Study, run: StageRun) -> str:
    result = study.out / "result"
    assert run.folder is not None
    return str(result if result.is_dir() and result.resolve() == run.folder.resolve() else run.folder)


def _speed(verdict: dict[str, Any]) -> str:
    timing = verdict.get("timing")
    if not isinstance(timing, dict):
        return ""
    run = timing["decode"]
    speeds = (run["tokens_per_second"], 1 / run["seconds"]["high"], 1 / run["seconds"]["low"])
    likely, low, high = (f"{float(f'{speed:.3g}'):,g}" for speed in speeds)
    return (
        f"Estimated and not measured, it would write {likely} tokens/s there at context {run['context']} "
        f"({low} to {high})."
    )


def _evaluated(study: Study) -> Section | str:
    """Answers, speed and intervals as `compress eval` found them, each with its difference from the first."""
    rows = {r.fingerprint: r for r in study.runs if r.fingerprint in study.evaluated}
    if not rows:
        return f"Answers, measured speed and intervals: there is no {EVALUATION} of these checkpoints here."
    first, *_ = rows
    tasks = list(dict.fromkeys(task for key in rows for task in study.evaluated[key]))
    columns = list(dict.fromkeys(
        (task, score.metric, score.unit)
        for key in rows for task in tasks if (found := study.evaluated[key].get(task)) for score in _main(found)
    ))  # fmt: skip
    names = _names(study)
    table = [
        [(names[key],), *(_measured(study, key, first, *column) for column in columns)] for key in rows
    ]  # fmt: skip
    headings = ["checkpoint", *(f"{clean(t)}: {clean(m)}{', %' if u == '%' else ''}" for t, m, u in columns)]
    scores = [s for key in rows for found in study.evaluated[key].values() for s in _main(found)]
    lead = (
        f"By `compress eval`, so not always on the text of the table above. Below each number its interval, and its "
        f"difference from {names[first]}, item by item."
    )
    notes = list(dict.fromkeys(f"{clean(s.metric)}: {clean(s.protocol)}; {clean(s.interval)}" for s in scores))
    grid = Grid(headings, table, "Answers, speed and intervals")
    return Section("measured", "Answers, speed and intervals", [], lead, notes, grid=grid)


def _main(result: Result) -> list[Score]:
    """The first score, and others of that name by another protocol or engine."""
    first = result.scores[0].metric.split(",")[0]
    return [score for score in result.scores if score.metric.split(",")[0] == first]


def _names(study: Study) -> dict[str, str]:
    """What the table calls a stage run, by fingerprint; its label where it is no row of it."""
    return {r.fingerprint: r.name for r in study.runs} | {c.run.fingerprint: c.name for c in study.candidates}


def _measured(study: Study, key: str, first: str, task: str, metric: str, unit: str) -> tuple[str, ...]:
    result = study.evaluated[key].get(task)
    score = next((s for s in _main(result) if s.metric == metric), None) if result else None
    if result is None or score is None or math.isnan(score.value):
        return ("–",)
    scale = 100 if unit == "%" else 1
    lines = [number(scale * score.value) + (f" {unit}" if unit not in ("", "%") else "")]
    if not math.isnan(score.low):
        lines.append(f"{number(scale * score.low)} to {number(scale * score.high)}")
    reference = study.evaluated[first].get(task)
    if key != first and reference is not None:
        try:
            found = next((d for d in compare(reference, result) if d.metric == metric), None)
        except PlanError:  # no value for each item, or other items
            found = None
        if found is not None:
            noise = "within noise" if found.within_noise else "better" if found.b_is_better else "worse"
            lines.append(f"{figures.signed(scale * found.difference)}: {noise}")
    return tuple(lines)


def _importance(study: Study) -> Section | str:
    runs = study.of_stage("depth")
    found = [(run, ranking) for run in runs if (ranking := facts.importance(run))]
    if not found:
        return f"Block importance: {_absent(study, 'depth', runs, 'its manifest holds no ranking')}"
    distinct: dict[Any, facts.Importance] = {}
    for _, ranking in found:  # runs that remove more by the same one-shot ranking say nothing new
        key = (ranking.metric, ranking.rounds if ranking.rounds > 1 else 1, tuple(ranking.scores.items()))
        if key not in distinct or len(ranking.removed) > len(distinct[key].removed):
            distinct[key] = ranking
    drawn = list(distinct.values())[:_MOST]
    pictures = [figures.importance_figure(f"importance-{i}", r) for i, r in enumerate(drawn, 1)]
    return Section("importance", "Which blocks matter", pictures, notes=_more(len(distinct), "rankings"))


def _training(study: Study) -> Section | str:
    runs = [*study.of_stage("lora"), *study.of_stage("tune")]
    found = [(_used_by(study, run), losses) for run in runs if (losses := facts.losses(run))]
    if not found:
        return f"LoRA's losses: {_absent(study, 'lora', runs, 'its manifest holds no losses')}"
    picture = figures.losses_figure(found[:_MOST_LOSSES])
    return Section(
        "training",
        "Recovery by training" if study.of_stage("tune") else "Recovery by LoRA",
        [picture],
        notes=_more(len(found), "trainings", _MOST_LOSSES),
    )


def _errors(study: Study) -> Section | str:
    runs = study.of_stage("gptq")
    found = [(_used_by(study, run), errors) for run in runs if (errors := facts.layer_errors(run))]
    if not found:
        return f"GPTQ's errors: {_absent(study, 'gptq', runs, 'its manifest holds no errors')}"
    highest = max(errors.worst[0][2] for _, errors in found)
    pictures = [
        figures.errors_figure(f"gptq-error-{i}", name, errors, highest)
        for i, (name, errors) in enumerate(found[:_MOST], 1)
    ]
    lead = "How far each layer's output is off after quantisation, over the calibration tokens."
    return Section("quantisation", "What quantisation costs, layer by layer", pictures, lead, _more(len(found), "runs"))


def _absent(study: Study, stage: str, runs: list[StageRun], otherwise: str) -> str:
    if not runs:
        return f"no {stage} stage in this {study.kind}."
    if all(run.manifest is None for run in runs):
        return f"the folder of {stage} is not in {study.out.name}, or its manifest cannot be read."
    return f"{otherwise}."


def _more(count: int, what: str, most: int = _MOST) -> list[str]:
    return [f"{count - most} more {what} are not drawn."] if count > most else []


def _used_by(study: Study, run: StageRun) -> str:
    """A stage run's name: its folder's label in a run, the first configuration that goes through it in a sweep."""
    users = study.users(run)
    more = f" and {len(users) - 1} more" if len(users) > 1 else ""
    return run.label if study.kind == "run" else f"{run.label}, of {users[0]}{more}"


# --- the head of the page ---------------------------------------------------------------------------------------------
# The head of the page: the summary in words, the tiles, and the table of all results.


@dataclass(frozen=True)
class Cell:
    text: str
    value: float | str | None = None  # what sorting goes by; None sorts last
    numeric: bool = True


@dataclass(frozen=True)
class Tile:
    label: str
    value: str
    detail: str
    tone: str = ""  # good or bad


def table(study: Study, chip: Chip) -> tuple[list[tuple[str, str]], list[list[Cell]]]:
    """Headings with what they mean, and a row for every candidate."""
    headings = [
        ("#", "number of the point in the figure"),
        ("stage" if study.kind == "run" else "configuration", "what was done to the model"),
        ("perplexity", "lower is better"),
        ("× source", "perplexity over that of the uncompressed model"),
        ("packed MiB", "image for the edge: N:M weights as values and index, codes and scales packed"),
        ("file MiB", "safetensors files"),
        ("nonzero M", "millions of parameters that are not zero"),
        ("N:M", "N of every M consecutive weights are zero, proven on the files"),
        ("seconds", "of the stage" if study.kind == "run" else "of all its stages"),
        ("peak MiB", "memory while it ran, the most of its stages"),
        ("not beaten", "no other is as small and as good, and smaller or better"),
    ]
    front = {id(choice.run) for choice in study.front}
    rows = []
    for place, choice in enumerate(study.candidates):
        run = choice.run
        chain = (run,) if study.kind == "run" else study.configurations[place].runs
        peak = max((r.peak_memory_bytes for r in chain if r.peak_memory_bytes), default=None)
        ratio = run.perplexity / choice.source.perplexity if run.measured == choice.source.measured else None
        unbeaten = id(run) in front
        rows.append(
            [
                Cell(str(place), place),
                Cell(choice.name, choice.name.lower(), numeric=False),
                _cell(run.perplexity, 2),
                _cell(ratio, 2),
                _cell(run.packed_bytes, 2, _MIB),
                _cell(run.file_bytes, 2, _MIB),
                _cell(run.parameters_nonzero, 2, 1e6),
                Cell(run.pattern, run.pattern or None, numeric=False),
                _cell(sum(r.seconds for r in chain) if run.position else None, 0),
                _cell(peak, 0, _MIB),
                Cell("●" if unbeaten else "", 0 if unbeaten else 1, numeric=False),
            ]
        )
    return headings, rows


def _cell(value: float | None, digits: int, divisor: float = 1) -> Cell:
    if value is None or math.isnan(value):
        return Cell("–")
    return Cell(f"{value / divisor:,.{digits}f}" if math.isfinite(value) else "∞", value)


def tiles(study: Study, chip: Chip) -> list[Tile]:
    """The four numbers a reader wants first, of the checkpoint to take."""
    taken = chip.taken(study)
    if taken is None:
        return []
    source, result = taken.choice.source, taken.run
    small, large = study.size(result), study.size(source)
    change = f"of {size_text(large)}, {large / small:.3g} × smaller" if small != large else "uncompressed"
    made = [Tile(study.size_name.capitalize(), size_text(small), change)]
    after, before = study.quality(result), study.quality(source)
    if result.measured == source.measured:
        detail = f"from {number(before)}, {percent(after / before - 1)}" if result is not source else "uncompressed"
    else:
        detail = "measured unlike the uncompressed model"
    made.append(Tile(study.quality_name.capitalize(), number(after), detail))
    if study.kind == "sweep":
        shared = study.counts.get("shared")
        runs = len({r.fingerprint for r in study.runs if r.position})
        detail = f"{runs} stage runs" + (f", {shared} shared" if shared is not None else "")
        made.append(Tile("Configurations", str(len(study.configurations)), detail))
    elif result.parameters_nonzero and result.parameters_total:
        zeros = 1 - result.parameters_nonzero / result.parameters_total
        made.append(Tile("Non-zero", f"{result.parameters_nonzero / 1e6:.4g} M", f"{zeros:.1%} of parameters are zero"))
    fits = (chip.verdict or {}).get("fits")
    if chip.verdict is not None and fits is not None:
        weights = [m for m in facts.memories(chip.verdict) if m.role == "weights"]
        need, room = sum(m.used for m in weights), sum(m.capacity for m in weights)
        detail = f"weights: {size_text(need)} of {size_text(room)}"
        made.append(Tile(chip.name, "fits" if fits else "does not fit", detail, "good" if fits else "bad"))
    return made


def chip_words(chip: Chip) -> str:
    if chip.verdict is None or chip.verdict.get("fits") is None:
        return ""
    if chip.verdict["fits"]:
        return f"It fits {chip.name}."
    over = [
        f"{times_text(m.used, m.capacity)} the {size_text(m.capacity)} of {m.name}"
        for m in facts.memories(chip.verdict)
        if not m.fits and m.role != "off_chip"
    ]
    return f"It does not fit {chip.name}: it needs {listed(over)}."


def listed(words: list[str] | tuple[str, ...]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def percent(share: float) -> str:
    return (
        f"{'+' if share >= 0 else '−'}{abs(share):.1%}"
        if math.isfinite(share) and abs(share) < 10
        else (f"{share + 1:,.0f} ×")
    )


# --- how to get the same again ----------------------------------------------------------------------------------------
# How to get the same result again: recipes as files and on the page, seeds, versions, machine.


FOLDER = "recipes"


@dataclass(frozen=True)
class Way:
    """A configuration's recipe and the command that carries it out again."""

    name: str
    file: str  # within OUT
    text: str
    command: str


def recipes(study: Study) -> list[Way]:
    """One for every configuration whose recipe is known."""
    ways = []
    for place, configuration in enumerate(study.configurations):
        if configuration.recipe is not None:
            alone = study.kind == "run"
            file = "recipe.yaml" if alone else f"{FOLDER}/{place:02d}-{slug(configuration.name)}.yaml"
            ways.append(Way(configuration.name, file, recipe_text(configuration), _command(study.out / file)))
    return ways


def write_recipes(out: Path, ways: list[Way]) -> None:
    for way in ways:
        path = out / way.file
        path.parent.mkdir(exist_ok=True)
        write_bytes(path, way.text.encode())


def recipe_text(configuration: Configuration) -> str:
    """YAML that `--recipe` reads; every option is written out, so later defaults change nothing."""
    recipe = {key: value for key, value in (configuration.recipe or {}).items() if value is not None}
    return str(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=100))


def slug(name: str) -> str:
    """A file name that no name can make dangerous."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:48] or "configuration"


def _command(path: Path) -> str:
    return f"compress --recipe {shlex.quote(str(path))} -o again"


def versions(study: Study) -> dict[str, str]:
    """As the manifests tell; several where stages ran under different ones."""
    found: dict[str, dict[str, None]] = {}
    for run in study.runs:
        for name, version in (run.manifest.versions if run.manifest else {}).items():
            found.setdefault(name, {})[version] = None
    return {name: ", ".join(known) for name, known in found.items()}


def conditions(study: Study) -> dict[str, str]:
    """Seeds, devices, precisions and texts of the stage runs."""
    manifests = [run.manifest for run in study.runs if run.manifest]
    seeds = sorted({m.seed for m in manifests} | {int(c.recipe["seed"]) for c in study.configurations if c.recipe})
    rows = {
        "Machine": study.machine,
        "Seed": ", ".join(map(str, seeds)),
        "Device": ", ".join(sorted({m.device for m in manifests})),
        "Precision": ", ".join(sorted({run.measured[2] for run in study.runs})),
        "Measured": "; ".join(sorted({f"{run.measured[0]}, on {run.measured[1]}" for run in study.runs})),
        "Calibration text": ", ".join(sorted({str(m.calibration["name"]) for m in manifests if m.calibration})),
    }
    return {name: words for name, words in rows.items() if words}

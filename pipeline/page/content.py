"""The sections of the page: the summary, the table, the figures, how to get the same again."""

from __future__ import annotations

import math
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from edgepress.checkpoints.manifest import write_bytes
from edgepress.checkpoints.memory import size_text
from edgepress.hardware.units import times_text
from edgepress.pipeline.page import facts, figures
from edgepress.pipeline.page.figures import Picture, number, pareto_figure
from edgepress.pipeline.page.read import Configuration, StageRun, Study

_MIB = 2**20
_MOST = 4  # heat maps and rankings on one page
_MOST_LOSSES = 6


@dataclass(frozen=True)
class Chip:
    """The chip that results are held against."""

    name: str
    room: int  # bytes of its memories for weights
    verdict: dict[str, Any] | None  # of the result, or of a sweep's smallest
    subject: str = ""  # what the verdict judges
    why_not: str = ""  # there is no verdict


@dataclass(frozen=True)
class Section:
    key: str
    title: str
    pictures: list[Picture] = field(default_factory=list)
    lead: str = ""
    notes: list[str] = field(default_factory=list)


def sections(study: Study, chip: Chip) -> tuple[list[Section], list[str]]:
    """The sections there is data for, and one sentence for each that is left out."""
    made = [
        _quality(study, chip),
        _changes(study),
        _memory(chip),
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
    return Section("quality", "Quality against size", [pareto_figure(study, chip.name, chip.room)], notes=notes)


def _changes(study: Study) -> Section | str:
    configuration = study.smallest
    runs = configuration.runs
    if len(runs) < 2 and study.kind == "sweep":
        configuration = max(study.configurations, key=lambda c: len(c.runs))
        runs = configuration.runs
    if len(runs) < 2:
        return "What each stage did: no stage ran."
    pictures = []
    if study.kind == "sweep" and (by_stage := facts.effects(study)):
        pictures.append(figures.effects_figure(by_stage))
    names = [run.stage for run in runs]
    of = "" if study.kind == "run" else f": {configuration.name}"
    if all(math.isfinite(run.perplexity) for run in runs):
        steps = facts.waterfall(names, [run.perplexity for run in runs])
        pictures.append(
            figures.waterfall_figure("waterfall-perplexity", f"Perplexity{of}", steps, "source", "perplexity", 1)
        )
    steps = facts.waterfall(names, [study.size(run) for run in runs])
    unit = f"{study.size_name}, MiB"
    title = f"{study.size_name.capitalize()}{of}"
    pictures.append(figures.waterfall_figure("waterfall-bytes", title, steps, "source", unit, _MIB))
    return Section("stages", "What each stage did", pictures)


def _memory(chip: Chip) -> Section | str:
    if chip.verdict is None or "memories" not in chip.verdict:
        return f"Memory map: {chip.why_not or (chip.verdict or {}).get('summary', 'there is no verdict')}"
    verdict = chip.verdict
    lead = str(verdict["summary"])
    picture = figures.memory_figure(facts.memories(verdict), chip.name, chip.subject)
    return Section("memory", f"On {chip.name}", [picture], lead, [str(note) for note in verdict.get("notes", ())])


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
    runs = study.of_stage("lora")
    found = [(_used_by(study, run), losses) for run in runs if (losses := facts.losses(run))]
    if not found:
        return f"LoRA's losses: {_absent(study, 'lora', runs, 'its manifest holds no losses')}"
    picture = figures.losses_figure(found[:_MOST_LOSSES])
    return Section("training", "Recovery by LoRA", [picture], notes=_more(len(found), "trainings", _MOST_LOSSES))


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
        ("best", "no other is both smaller and better"),
    ]
    front = {id(choice.run) for choice in study.front}
    rows = []
    for place, choice in enumerate(study.candidates):
        run = choice.run
        chain = (run,) if study.kind == "run" else study.configurations[place].runs
        peak = max((r.peak_memory_bytes for r in chain if r.peak_memory_bytes), default=None)
        ratio = run.perplexity / choice.source.perplexity if run.measured == choice.source.measured else None
        best = id(run) in front
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
                Cell("●" if best else "", 0 if best else 1, numeric=False),
            ]
        )
    return headings, rows


def _cell(value: float | None, digits: int, divisor: float = 1) -> Cell:
    if value is None or math.isnan(value):
        return Cell("–")
    return Cell(f"{value / divisor:,.{digits}f}" if math.isfinite(value) else "∞", value)


def tiles(study: Study, chip: Chip) -> list[Tile]:
    """The four numbers a reader wants first."""
    configuration = study.smallest
    source, result = configuration.source, configuration.result
    small, large = study.size(result), study.size(source)
    worse = result.perplexity / source.perplexity - 1
    made = [
        Tile(study.size_name.capitalize(), size_text(small), f"of {size_text(large)}, {large / small:.3g} × smaller"),
        Tile("Perplexity", number(result.perplexity), f"from {number(source.perplexity)}, {_percent(worse)}"),
    ]
    if study.kind == "sweep":
        shared = study.counts.get("shared")
        runs = len({r.fingerprint for r in study.runs if r.position})
        detail = f"{runs} stage runs" + (f", {shared} shared" if shared is not None else "")
        made.insert(0, Tile("Configurations", str(len(study.configurations)), detail))
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


def summary(study: Study, chip: Chip) -> str:
    """What happened, in a sentence or two."""
    configuration = study.smallest
    source, result = configuration.source, configuration.result
    small, large = study.size(result), study.size(source)
    change = (
        f"from {size_text(large)} to {size_text(small)} of {study.size_name} and from perplexity "
        f"{number(source.perplexity)} to {number(result.perplexity)} "
        f"({_percent(result.perplexity / source.perplexity - 1)})"
    )
    if study.kind == "run":
        if configuration.stages:
            words = f"Through {_listed(configuration.stages)}, {study.model} went {change}."
        else:
            quality = f"perplexity {number(source.perplexity)}"
            words = f"{study.model} was measured and not compressed: {size_text(large)}, {quality}."
    else:
        front = study.front
        words = f"Of {len(study.configurations)} configurations of {study.model}, "
        words += (
            f"{len(front)} {'is' if len(front) == 1 else 'are'} not beaten in both quality and size. The smallest of "
            f"them, {configuration.name}, goes {change}."
        )
    if study.failures:
        words += f" {len(study.failures)} failed."
    return f"{words} {_chip_words(chip)}".strip()


def _chip_words(chip: Chip) -> str:
    if chip.verdict is None or chip.verdict.get("fits") is None:
        return ""
    if chip.verdict["fits"]:
        return f"It fits {chip.name}."
    over = [
        f"{times_text(m.used, m.capacity)} the {size_text(m.capacity)} of {m.name}"
        for m in facts.memories(chip.verdict)
        if not m.fits and m.role != "off_chip"
    ]
    return f"It does not fit {chip.name}: it needs {_listed(over)}."


def _listed(words: list[str] | tuple[str, ...]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _percent(share: float) -> str:
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

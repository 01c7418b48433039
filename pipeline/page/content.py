"""What stands on the page, section by section; what a study has no data for is left out by name, with the reason."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from edgepress.pipeline.page import facts, figures, stage_figures
from edgepress.pipeline.page.draw import Picture
from edgepress.pipeline.page.pareto_figure import pareto_figure
from edgepress.pipeline.page.study import StageRun, Study

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
    pictures = [stage_figures.importance_figure(f"importance-{i}", r) for i, r in enumerate(drawn, 1)]
    return Section("importance", "Which blocks matter", pictures, notes=_more(len(distinct), "rankings"))


def _training(study: Study) -> Section | str:
    runs = study.of_stage("lora")
    found = [(_used_by(study, run), losses) for run in runs if (losses := facts.losses(run))]
    if not found:
        return f"LoRA's losses: {_absent(study, 'lora', runs, 'its manifest holds no losses')}"
    picture = stage_figures.losses_figure(found[:_MOST_LOSSES])
    return Section("training", "Recovery by LoRA", [picture], notes=_more(len(found), "trainings", _MOST_LOSSES))


def _errors(study: Study) -> Section | str:
    runs = study.of_stage("gptq")
    found = [(_used_by(study, run), errors) for run in runs if (errors := facts.layer_errors(run))]
    if not found:
        return f"GPTQ's errors: {_absent(study, 'gptq', runs, 'its manifest holds no errors')}"
    highest = max(errors.worst[0][2] for _, errors in found)
    pictures = [
        stage_figures.errors_figure(f"gptq-error-{i}", name, errors, highest)
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

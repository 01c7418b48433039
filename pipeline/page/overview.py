"""The head of the page: the summary in words, the tiles, and the table of all results."""

from __future__ import annotations

import math
from dataclasses import dataclass

from edgepress.checkpoints.memory import size_text
from edgepress.hardware.units import times_text
from edgepress.pipeline.page import facts
from edgepress.pipeline.page.content import Chip
from edgepress.pipeline.page.draw import number
from edgepress.pipeline.page.study import Study

_MIB = 2**20


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

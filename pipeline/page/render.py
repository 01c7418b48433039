"""Write OUT/report.html and the figures beside it, with samples of what the checkpoints write."""

from __future__ import annotations

import hashlib
import json
from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib import resources
from pathlib import Path

import jinja2
from markupsafe import Markup, escape

from edgepress.checkpoints.errors import CheckpointError, PlanError
from edgepress.checkpoints.manifest import SEAL, seal_holds, sealed, write_bytes, write_json
from edgepress.checkpoints.runtime import Progress
from edgepress.pipeline.page import advice, content
from edgepress.pipeline.page.content import Chip
from edgepress.pipeline.page.read import StageRun, Study, clean
from edgepress.pipeline.tree import duration_text

PAGE, FIGURES = "report.html", "figures"


@dataclass(frozen=True)
class Written:
    page: Path
    figures: list[Path]
    left_out: list[str]
    bytes: int


def write_report(study: Study, chip: Chip, samples: Samples | None, why_none: str, machine: str) -> Written:
    """samples: None with the reason in why_none. Pictures of an earlier report that this one lacks are removed."""
    sections, left_out = content.sections(study, chip)
    if samples is None or not samples.by_prompt:
        left_out.append(f"Generated text: {why_none}")
        samples = None
    ways = content.recipes(study)
    html = render(study, chip, sections, left_out, samples, ways, machine).encode()
    pictures = [picture for section in sections for picture in section.pictures]
    folder = study.out / FIGURES
    folder.mkdir(exist_ok=True)
    wanted = {folder / f"{picture.key}.png": picture.png for picture in pictures}
    for stale in set(folder.glob("*.png")) - set(wanted):
        stale.unlink()
    for path, png in wanted.items():
        write_bytes(path, png)
    content.write_recipes(study.out, ways)
    write_bytes(study.out / PAGE, html)
    return Written(study.out / PAGE, sorted(wanted), left_out, len(html))


def render(
    study: Study, chip: Chip, sections: list[content.Section], left_out: list[str], samples: Samples | None,
    ways: list[content.Way], machine: str,
) -> str:  # fmt: skip
    """The page. Everything but our own style and script is escaped; its policy lets it load and send nothing."""
    headings, rows = content.table(study, chip)
    script, style = _text("report.js"), _text("report.css")
    digest = b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["ticked"] = ticked
    return environment.from_string(_text("report.html.j2")).render(
        study=study,
        chip=chip,
        recommendation=advice.recommendation(study, chip),
        reasons=advice.reasons(study, chip),
        rule=advice.rule(study, chip),
        deeds=advice.deeds(study, chip),
        tiles=content.tiles(study, chip),
        headings=headings,
        rows=rows,
        sections=sections,
        left_out=left_out,
        samples=samples,
        ways=ways,
        versions=content.versions(study),
        conditions=content.conditions(study),
        machine=machine,
        written=datetime.now().astimezone().strftime("%d %B %Y, %H:%M"),
        style=Markup(style),  # files of this package, not input
        script=Markup(script),
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
    )


def ticked(words: str) -> Markup:
    """Escaped, what stands between backticks as code."""
    parts = [escape(part) for part in words.split("`")]
    return Markup("").join(Markup("<code>{}</code>").format(p) if i % 2 else p for i, p in enumerate(parts))


def _text(name: str) -> str:
    return (resources.files("edgepress.pipeline.page") / "templates" / name).read_text(encoding="utf-8")


# --- samples ----------------------------------------------------------------------------------------------------------
# What checkpoints make of the same prompts, greedily; kept in OUT, so that a second report costs nothing.


PROMPTS = ("The three most important things about a good bridge are", "A small computer in a sensor can")
FILE = "samples.json"
# For the forecast, measured on two cores: the page with its figures; a new token of a small model; parameters of a
# checkpoint that are opened, and that a new token reads, in a second.
_PAGE_SECONDS, _STEP_SECONDS, _OPENED_A_SECOND, _READ_A_SECOND = 6.0, 0.012, 5e7, 4e9


@dataclass(frozen=True)
class Sample:
    name: str  # of the checkpoint
    text: str  # the continuation
    perplexity: float


@dataclass(frozen=True)
class Samples:
    """For each prompt one sample a checkpoint, the uncompressed model first."""

    by_prompt: dict[str, list[Sample]]
    tokens: int


def chosen(study: Study, count: int) -> list[tuple[str, StageRun]]:
    """At most `count` checkpoints that are on this disk: the uncompressed model, then the most telling results.

    Of a run its last stages, of a sweep its Pareto front before the rest. In the order of the table.
    """
    candidates = [c for c in study.candidates if c.run.folder is not None]
    front = [c for c in study.front if c in candidates]
    last = candidates[::-1] if study.kind == "run" else [*front, *candidates]
    wanted = [c for c in candidates if c.run.position == 0][:1]
    if not wanted and study.source.folder is not None:  # a sweep need not have the uncompressed model among its results
        wanted = []
        kept = {study.source.fingerprint: ("uncompressed", study.source)}
    else:
        kept = {c.run.fingerprint: (c.name, c.run) for c in wanted}
    for choice in last:
        if len(kept) < count:
            kept.setdefault(choice.run.fingerprint, (choice.name, choice.run))
    place = {c.run.fingerprint: i for i, c in enumerate(study.candidates)}
    return sorted(list(kept.values())[:count], key=lambda named: place.get(named[1].fingerprint, -1))


def intention(study: Study, prompts: Sequence[str], count: int, tokens: int) -> str:
    """What the report is about to write, and roughly how long that takes; samples that are kept take nothing.

    Raises PlanError for an empty prompt, CheckpointError where the kept samples cannot be read.
    """
    if blank := [p for p in prompts if not p.strip()]:
        raise PlanError(f"--prompts {blank[0]!r}: a prompt needs at least one word")
    writers = chosen(study, count) if count else []
    known = _known(study.out / FILE, lambda words: None)
    seconds = _PAGE_SECONDS
    for _, run in writers:
        missing = sum(_key(run.fingerprint, prompt, tokens) not in known for prompt in prompts)
        weights = run.parameters_total or 0
        seconds += missing * (weights / _OPENED_A_SECOND + tokens * (_STEP_SECONDS + weights / _READ_A_SECOND))
    names = ", ".join(name for name, _ in writers)
    text = f" and {len(prompts)} samples of at most {tokens} tokens by each of {names}" if writers else ""
    return f"writing {study.out / PAGE} with its figures{text}: about {duration_text(seconds)} here"


def generate_samples(
    study: Study, prompts: Sequence[str], count: int, tokens: int, device: str, progress: Progress
) -> Samples:
    """A checkpoint that cannot be opened is told and left out."""
    known = _known(study.out / FILE, progress.note)
    wanted = dict(chosen(study, count))
    by_prompt: dict[str, list[Sample]] = {clean(prompt): [] for prompt in prompts}
    for name, run in wanted.items():
        keys = {prompt: _key(run.fingerprint, prompt, tokens) for prompt in prompts}
        if missing := [prompt for prompt, key in keys.items() if key not in known]:
            progress.say(f"generating with {name}")
            try:
                known |= _generated(run, {p: keys[p] for p in missing}, tokens, device)
            except CheckpointError as error:
                progress.note(f"no samples of {name}: {error}")
                continue
            write_json(study.out / FILE, sealed(known))
        for prompt, key in keys.items():
            by_prompt[clean(prompt)].append(Sample(name, clean(known[key], 4000), run.perplexity))
    return Samples({prompt: found for prompt, found in by_prompt.items() if found}, tokens)


def _generated(run: StageRun, prompts: dict[str, str], tokens: int, device: str) -> dict[str, str]:
    """Prompt -> key in, key -> continuation out."""
    from edgepress.checkpoints.checkpoint import Checkpoint
    from edgepress.checkpoints.memory import release
    from edgepress.checkpoints.runtime import choose_device
    from edgepress.eval.generation import Decoding, continue_prompt

    assert run.folder is not None
    checkpoint, where = Checkpoint.open(run.folder), choose_device(device)
    found = {}
    for prompt, key in prompts.items():
        found[key] = continue_prompt(checkpoint, prompt, Decoding(tokens), where).text
        release()  # one model at a time in memory
    return found


def _key(fingerprint: str, prompt: str, tokens: int) -> str:
    return hashlib.sha256(json.dumps([fingerprint, prompt, tokens]).encode()).hexdigest()


def _known(path: Path, tell: Callable[[str], None]) -> dict[str, str]:
    try:
        data = json.loads(path.read_text()) if path.is_file() else {}
        if data and not seal_holds(data):
            tell(f"{path} was edited or damaged; the samples are generated again")
            data = {}
    except (ValueError, TypeError, RecursionError):
        raise CheckpointError(f"{path} is damaged; remove it, and the samples are generated again") from None
    return {key: text for key, text in dict(data).items() if key != SEAL}

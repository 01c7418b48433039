"""OUT/report.html, one file that needs no other, and the figures beside it as PNG."""

from __future__ import annotations

import hashlib
from base64 import b64encode
from dataclasses import dataclass
from datetime import datetime
from importlib import resources
from pathlib import Path

import jinja2
from markupsafe import Markup

from edgepress.checkpoints.manifest import write_bytes
from edgepress.pipeline.page import content, overview, reproduce
from edgepress.pipeline.page.content import Chip
from edgepress.pipeline.page.samples import Samples
from edgepress.pipeline.page.study import Study

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
    ways = reproduce.recipes(study)
    html = render(study, chip, sections, left_out, samples, ways, machine).encode()
    pictures = [picture for section in sections for picture in section.pictures]
    folder = study.out / FIGURES
    folder.mkdir(exist_ok=True)
    wanted = {folder / f"{picture.key}.png": picture.png for picture in pictures}
    for stale in set(folder.glob("*.png")) - set(wanted):
        stale.unlink()
    for path, png in wanted.items():
        write_bytes(path, png)
    reproduce.write_recipes(study.out, ways)
    write_bytes(study.out / PAGE, html)
    return Written(study.out / PAGE, sorted(wanted), left_out, len(html))


def render(
    study: Study, chip: Chip, sections: list[content.Section], left_out: list[str], samples: Samples | None,
    ways: list[reproduce.Way], machine: str,
) -> str:  # fmt: skip
    """The page. Everything but our own style and script is escaped; its policy lets it load and send nothing."""
    headings, rows = overview.table(study, chip)
    script, style = _text("report.js"), _text("report.css")
    digest = b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_text("report.html.j2")).render(
        study=study,
        chip=chip,
        summary=overview.summary(study, chip),
        tiles=overview.tiles(study, chip),
        headings=headings,
        rows=rows,
        sections=sections,
        left_out=left_out,
        samples=samples,
        ways=ways,
        versions=reproduce.versions(study),
        conditions=reproduce.conditions(study),
        machine=machine,
        written=datetime.now().astimezone().strftime("%d %B %Y, %H:%M"),
        style=Markup(style),  # files of this package, not input
        script=Markup(script),
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
    )


def _text(name: str) -> str:
    return (resources.files("edgepress.pipeline.page") / "templates" / name).read_text(encoding="utf-8")

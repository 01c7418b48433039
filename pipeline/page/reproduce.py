"""How to get the same result again: recipes as files and on the page, seeds, versions, machine."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import yaml

from edgepress.checkpoints.manifest import write_bytes
from edgepress.pipeline.page.study import Configuration, Study

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

"""The theses' tables at reduced size on the packaged model.

The recipes are the shipped ones; their texts become the prose that every Python carries, TriviaQA and instruction
sets local files (--trivia, --instructions) or the same prose, and samples, lengths, steps, tokens and ranks shrink. A
sequence of blocks, which is for a model of 32, keeps its places in a model of fewer. The numbers are therefore not the
theses'; the order of stages, the methods, the patterns and the sharing are.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from edgepress.pipeline.sweep_recipe import Configuration, load_sweep
from edgepress.stages.options import Depth

TABLES = {
    **{name: f"table-{name}" for name in ("a1", "a2", "b1")},
    "franken": "franken",
    "franken-25": "franken-25",
    **{f"approx-{number}": f"approx-table-{number}" for number in ("4-1", "4-3", "4-5")},
    **{f"peft-{number}": f"peft-table-{number}" for number in ("4-1", "4-3", "4-5", "4-6", "4-7")},
}
_BUDGET_KEYS = ("batch", "steps", "length", "samples")  # of lora, which a configuration may set
_THEIR_BLOCKS = 32  # of Llama-2-7B, whose blocks Franken-LLaMA names


@dataclass(frozen=True)
class Size:
    """What the recipes shrink to."""

    samples: int = 8  # calibration windows of a stage
    length: int = 256  # tokens of a window
    tokens: int = 4096  # that are measured
    steps: int = 4  # LoRA's optimiser steps, each of 4 windows
    trivia: str = "embedded"  # file of questions and answers for the TriviaQA rows
    instructions: str = "embedded"  # file of instructions, for the rows that train on them
    blocks: int = 30  # of the model
    divisor: int = 1  # of ranks and alphas
    most_rank: int = 192  # the rows of the packaged model's narrowest layer
    group: int = 128  # weights that share a scale

    def text(self, name: str) -> str:
        """The text that takes the place of the one of this name."""
        return {"wikitext2": "embedded", "c4": "embedded", "triviaqa.jsonl": self.trivia}.get(name, self.instructions)


def reduced(table: str, size: Size) -> dict[str, Any]:
    """A shipped recipe with small budgets and texts that are on every disk."""
    recipe: dict[str, Any] = yaml.safe_load(
        (resources.files("edgepress.recipes") / f"{TABLES[table]}.yaml").read_text()
    )
    # One model, measured on the part of its text that does not calibrate.
    recipe["data"] = size.text(recipe.get("data", "c4"))
    recipe |= {"protocol": "windows", "window": size.length, "tokens": size.tokens}
    for key in ("model", "text"):
        recipe.pop(key, None)
    recipe["stages"] = [_shrunk_entry(entry, size, whole=True) for entry in recipe["stages"]]
    configurations = recipe.setdefault("sweep", {"configurations": [{"name": table}]})["configurations"]
    for configuration in configurations:
        for key in ("model", "window", *(f"lora.{key}" for key in _BUDGET_KEYS)):
            configuration.pop(key, None)
        grid = configuration.get("grid", {})
        if "model" in grid:  # the same model under each of their names
            grid["seed"] = {label: number for number, label in enumerate(grid.pop("model"))}
            configuration["name"] = configuration["name"].replace("{model}", "{seed}")
        for key, value in configuration.items():
            if key != "grid":
                configuration[key] = _shrunk(key, value, size)
        for key, values in grid.items():
            if isinstance(values, dict):
                grid[key] = {label: _shrunk(key, value, size) for label, value in values.items()}
            else:
                grid[key] = [_shrunk(key, value, size) for value in values]
    return recipe


def _shrunk(key: str, value: Any, size: Size) -> Any:
    """One setting of a configuration, by its plain key, `stage.option`, or `stages`."""
    name = key.rpartition(".")[2]
    if name == "data":
        return size.text(value)
    if name in ("rank", "alpha"):
        shrunk = max(1, value // size.divisor)
        return min(shrunk, size.most_rank) if name == "rank" else shrunk
    if name == "layers":
        return ",".join(str(block * size.blocks // _THEIR_BLOCKS) for block in Depth(layers=value).sequence)
    if name == "stages":
        return [_shrunk_entry(entry, size) for entry in value]
    return value


def _shrunk_entry(entry: Any, size: Size, whole: bool = False) -> Any:
    """An entry of a list of stages; whole: with the budgets."""
    if isinstance(entry, str):
        return entry
    (stage, options), *_ = entry.items()
    shrunk = {name: _shrunk(f"{stage}.{name}", value, size) for name, value in options.items()}
    return {stage: shrunk | (_budgets(size)[stage] if whole else {})}


def _budgets(size: Size) -> dict[str, dict[str, Any]]:
    windows = {"samples": size.samples, "length": size.length}
    return {
        "depth": {"samples": min(size.samples, 10), "length": min(size.length, 128)},
        "wanda": windows,
        "lora": {
            "samples": 4 * size.steps + 4, "length": size.length, "batch": 4, "micro_batch": 2, "steps": size.steps,
            "save_steps": max(1, size.steps // 2), "held_out": 4,
        },
        "gptq": windows | {"group": size.group},
        "eora": windows | {"rank": 32 // size.divisor},
    }  # fmt: skip


def kinds(configurations: Sequence[Configuration]) -> list[str]:
    """Names of the first configuration of each kind: those of one kind differ in numbers alone."""
    found: dict[Any, str] = {}
    for configuration in configurations:
        found.setdefault(_kind(configuration), configuration.name)
    return list(found.values())


def _kind(configuration: Configuration) -> tuple[Any, ...]:
    kind: list[Any] = [configuration.recipe.data]
    for stage, options in configuration.recipe.stages:
        words = {f.name: value for f in fields(options) if isinstance(value := getattr(options, f.name), (str, bool))}
        if "pattern" in words:
            words["pattern"] = ":" in words["pattern"]
        if isinstance(options, Depth):  # whether there is a sequence, and whether it repeats
            words["layers"] = len(options.sequence) > len(set(options.sequence)) if options.layers else None
        disturbed = (bool(getattr(options, "noise", 0)), bool(getattr(options, "mask", 0)))
        kind += [stage, disturbed, *sorted(words.items(), key=lambda pair: pair[0])]
    return tuple(map(str, kind))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="*", default=list(TABLES), help=f"of {', '.join(TABLES)}")
    parser.add_argument("-o", "--out", type=Path, default=Path("thesis-tables"))
    parser.add_argument("--model", default="", help="default: the packaged model")
    helps = {
        "samples": "calibration windows of a stage",
        "length": "tokens of a window",
        "tokens": "tokens that are measured",
        "steps": "LoRA's optimiser steps, each of 4 windows",
        "trivia": "file of questions and answers for the TriviaQA rows",
        "instructions": "file of instructions, for the rows that train on them",
        "blocks": "of the model",
        "divisor": "of ranks and alphas",
        "most_rank": "rows of the model's narrowest layer, which larger ranks shrink to",
        "group": "weights that share a scale",
    }
    for f in fields(Size):
        parser.add_argument(
            f"--{f.name.replace('_', '-')}", type=type(f.default), default=f.default, help=helps[f.name]
        )
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", action="append", default=[], help="as for compress sweep, for one table; repeatable")
    parser.add_argument("--kinds", action="store_true", help="one configuration of those that differ in numbers alone")
    parser.add_argument("--plan", action="store_true", help="print the forecast, compute nothing")
    given = parser.parse_args()
    if unknown := sorted(set(given.tables) - set(TABLES)):
        parser.error(f"no table {', '.join(unknown)}; there are {', '.join(TABLES)}")
    given.out.mkdir(parents=True, exist_ok=True)
    codes = []
    for table in given.tables:
        recipe = reduced(table, Size(**{f.name: getattr(given, f.name) for f in fields(Size)}))
        if table == "a1":  # the model that was not instructed is another one, which is not packaged
            configurations = recipe["sweep"]["configurations"]
            recipe["sweep"]["configurations"] = [c for c in configurations if c["name"] != "baseline"]
        file = given.out / f"{TABLES[table]}-reduced.yaml"
        file.write_text(yaml.safe_dump(recipe, sort_keys=False))
        command = [sys.executable, "-m", "edgepress"]
        model = ["--model", given.model] if given.model else []
        if given.plan:
            command += ["plan", "--recipe", str(file), *model]
        else:
            patterns = kinds(load_sweep(str(file), {}).configurations) if given.kinds else given.only
            only = [word for pattern in patterns for word in ("--only", pattern)]
            # One store for each table: they share no configuration, and each has a table of results.
            command += ["sweep", str(file), *model, "-o", str(given.out / table), "--jobs", str(given.jobs), *only]
        print(f"== {TABLES[table]}", flush=True)
        codes.append(subprocess.run(command, check=False).returncode)
    sys.exit(max(codes))


if __name__ == "__main__":
    main()

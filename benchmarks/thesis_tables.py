"""The theses' tables at reduced size on the packaged model.

The recipes are the shipped ones; their texts become the prose that every Python carries, TriviaQA and instruction
sets local files (--trivia, --instructions) or the same prose, and samples, lengths, steps and tokens shrink. Ranks that
the packaged model has no room for go. The numbers are therefore not the theses'; the order of stages, the methods,
the patterns and the sharing are.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

TABLES = {
    **{name: f"table-{name}" for name in ("a1", "a2", "b1")},
    **{f"approx-{number}": f"approx-table-{number}" for number in ("4-1", "4-3", "4-5")},
    **{f"peft-{number}": f"peft-table-{number}" for number in ("4-3", "4-5", "4-6")},
}
MOST_RANK = 192  # the rows of the packaged model's smallest layer
_BUDGET_KEYS = ("batch", "steps", "length", "samples")  # of lora, which a configuration may set


def reduced(
    table: str, samples: int, length: int, tokens: int, steps: int, trivia: str, instructions: str
) -> dict[str, Any]:
    """A shipped recipe with small budgets and texts that are on every disk."""
    recipe: dict[str, Any] = yaml.safe_load(
        (resources.files("edgepress.recipes") / f"{TABLES[table]}.yaml").read_text()
    )
    texts = {"wikitext2": "embedded", "c4": "embedded", "triviaqa.jsonl": trivia}

    def on_disk(text: str) -> str:
        return texts.get(text, instructions)

    # The packaged model, measured on the part of its text that does not calibrate.
    recipe |= {"data": on_disk(recipe.get("data", "c4")), "protocol": "windows", "window": length, "tokens": tokens}
    for key in ("model", "text"):
        recipe.pop(key, None)
    budget: dict[str, dict[str, Any]] = {
        "depth": {"samples": min(samples, 10), "length": min(length, 128)},
        "wanda": {"samples": samples, "length": length},
        "lora": {
            "samples": 4 * steps + 4, "length": length, "batch": 4, "micro_batch": 2, "steps": steps,
            "save_steps": max(1, steps // 2), "held_out": 4,
        },
        "gptq": {"samples": samples, "length": length},
        "eora": {"samples": samples, "length": length},
    }  # fmt: skip
    for entry in recipe["stages"]:
        for stage, options in entry.items():
            options |= budget[stage]
            if "data" in options:
                options["data"] = on_disk(options["data"])
    for configuration in recipe["sweep"]["configurations"]:
        for key in _BUDGET_KEYS:
            configuration.pop(f"lora.{key}", None)
        for place in (configuration, configuration.get("grid", {})):
            for key in {"data", "lora.data"} & set(place):
                text = place[key]
                each = isinstance(text, dict)
                place[key] = {label: on_disk(t) for label, t in text.items()} if each else on_disk(text)
        _leave_out_wide(configuration.get("grid", {}))
    return recipe


def _leave_out_wide(grid: dict[str, Any]) -> None:
    """Take the values whose adapters are wider than a layer out of a grid."""
    if "lora.rank" in grid:
        grid["lora.rank"] = [rank for rank in grid["lora.rank"] if rank <= MOST_RANK]
    if isinstance(orders := grid.get("stages"), dict):
        grid["stages"] = {label: order for label, order in orders.items() if _widest(order) <= MOST_RANK}


def _widest(order: list[Any]) -> int:
    return max((o.get("rank", 0) for entry in order if isinstance(entry, dict) for o in entry.values()), default=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="*", default=list(TABLES), help=f"of {', '.join(TABLES)}")
    parser.add_argument("-o", "--out", type=Path, default=Path("thesis-tables"))
    parser.add_argument("--model", default="", help="default: the packaged model")
    parser.add_argument("--samples", type=int, default=8, help="calibration windows of a stage")
    parser.add_argument("--length", type=int, default=256, help="tokens of a window")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens that are measured")
    parser.add_argument("--steps", type=int, default=4, help="LoRA's optimiser steps, each of 4 windows")
    parser.add_argument("--trivia", default="embedded", help="file of questions and answers for the TriviaQA rows")
    parser.add_argument(
        "--instructions", default="embedded", help="file of instructions, for the rows that train on them"
    )
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", action="append", default=[], help="as for compress sweep, for one table; repeatable")
    parser.add_argument("--plan", action="store_true", help="print the forecast, compute nothing")
    given = parser.parse_args()
    if unknown := sorted(set(given.tables) - set(TABLES)):
        parser.error(f"no table {', '.join(unknown)}; there are {', '.join(TABLES)}")
    given.out.mkdir(parents=True, exist_ok=True)
    codes = []
    for table in given.tables:
        recipe = reduced(
            table, given.samples, given.length, given.tokens, given.steps, given.trivia, given.instructions
        )
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
            only = [word for pattern in given.only for word in ("--only", pattern)]
            # One store for each table: they share no configuration, and each has a table of results.
            command += ["sweep", str(file), *model, "-o", str(given.out / table), "--jobs", str(given.jobs), *only]
        print(f"== {TABLES[table]}", flush=True)
        codes.append(subprocess.run(command, check=False).returncode)
    sys.exit(max(codes))


if __name__ == "__main__":
    main()

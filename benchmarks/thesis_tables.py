"""The thesis's tables A.1, A.2 and B.1 at reduced size on the packaged model.

The recipes are the shipped ones; their texts become the prose that every Python carries, TriviaQA a local file of
questions (--trivia) or the same prose, and samples, lengths and tokens shrink. The numbers are therefore not the
thesis's; the order of stages, the patterns and the sharing are.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

TABLES = ("a1", "a2", "b1")


def reduced(table: str, samples: int, length: int, tokens: int, steps: int, trivia: str) -> dict[str, Any]:
    """A shipped recipe with small budgets and texts that are on every disk."""
    recipe: dict[str, Any] = yaml.safe_load((resources.files("recipes") / f"table-{table}.yaml").read_text())
    recipe |= {"data": "embedded", "protocol": "windows", "window": length, "tokens": tokens}
    del recipe["model"], recipe["text"]  # the packaged model, measured on the half that does not calibrate
    budget: dict[str, dict[str, Any]] = {
        "depth": {"samples": min(samples, 10), "length": min(length, 128)},
        "wanda": {"samples": samples, "length": length},
        "lora": {"samples": 4 * steps + 4, "length": length, "batch": 4, "micro_batch": 2, "steps": steps},
        "gptq": {"samples": samples, "length": length},
        "eora": {"samples": samples, "length": length},
    }
    for entry in recipe["stages"]:
        for stage, options in entry.items():
            options |= budget[stage]
            if stage == "lora":
                options |= {"data": "embedded", "save_steps": max(1, steps // 2)}
    texts = {"wikitext2": "embedded", "triviaqa.jsonl": trivia}
    for configuration in recipe["sweep"]["configurations"]:
        for place in (configuration, configuration.get("grid", {})):
            if isinstance(data := place.get("lora.data"), str):
                place["lora.data"] = texts[data]
            elif data:
                place["lora.data"] = {label: texts[text] for label, text in data.items()}
    return recipe


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
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", action="append", default=[], help="as for compress sweep, for one table; repeatable")
    parser.add_argument("--plan", action="store_true", help="print the forecast, compute nothing")
    given = parser.parse_args()
    if unknown := sorted(set(given.tables) - set(TABLES)):
        parser.error(f"no table {', '.join(unknown)}; there are {', '.join(TABLES)}")
    given.out.mkdir(parents=True, exist_ok=True)
    codes = []
    for table in given.tables:
        recipe = reduced(table, given.samples, given.length, given.tokens, given.steps, given.trivia)
        if table == "a1":  # the model that was not instructed is another one, which is not packaged
            configurations = recipe["sweep"]["configurations"]
            recipe["sweep"]["configurations"] = [c for c in configurations if c["name"] != "baseline"]
        file = given.out / f"table-{table}-reduced.yaml"
        file.write_text(yaml.safe_dump(recipe, sort_keys=False))
        command = [sys.executable, "-m", "pipeline.cli"]
        model = ["--model", given.model] if given.model else []
        if given.plan:
            command += ["plan", "--recipe", str(file), *model]
        else:
            only = [word for pattern in given.only for word in ("--only", pattern)]
            # One store for each table: they share no configuration, and each has a table of results.
            command += ["sweep", str(file), *model, "-o", str(given.out / table), "--jobs", str(given.jobs), *only]
        print(f"== table {table.upper()}", flush=True)
        codes.append(subprocess.run(command, check=False).returncode)
    sys.exit(max(codes))


if __name__ == "__main__":
    main()

"""The rows of benchmarks/methods.py: which stages each method runs, with which settings."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from checkpoints.errors import PlanError, RecipeError
from pipeline.recipe import Recipe, assemble
from stages.options import QUANTS

BASES = ("dense", "2:4")

# Merging is free, so every linear layer is adapted; one rank and one learning rate for all, but for what follows.
RECOVERY: dict[str, Any] = {
    "targets": "all",
    "rank": 16,
    "alpha": 32,
    "dropout": 0.0,
    "batch": 8,
    "micro_batch": 8,  # the masked sum of weight and adapter is made once for each
    "held_out": 8,
    "learning_rate": 1e-3,
}


@dataclass(frozen=True)
class Row:
    method: str
    base: str
    kind: str  # base, quantiser or recovery
    recipe: Recipe
    shared: int  # stages at its beginning that made the base, whose time is not the row's

    @property
    def name(self) -> str:
        return f"{self.base} {self.method}"


Stages = dict[str, dict[str, Any]]


def rows(given: argparse.Namespace) -> list[Row]:
    """Every base and method asked for. Raises PlanError for names there are not."""
    windows = {"samples": given.samples, "length": given.length}
    plain = {
        "model": given.model,
        "data": given.training,
        "text": given.text,
        "window": given.length,
        "tokens": given.tokens,
    }
    found = []
    for base in given.base.split(","):
        start: Stages = {} if base == "dense" else {"wanda": {"pattern": base, **windows}}
        for method, kind, stages in methods(windows, given.recovery_steps, given.recovery_length):
            found.append(Row(method, base, kind, _recipe(plain, start | stages), len(start)))
            if kind == "base":  # the time of a base is its own
                found[-1] = Row(method, base, kind, found[-1].recipe, 0)
    only = [name for name in given.only.split(",") if name]
    if unknown := sorted(set(only) - {row.method for row in found}):
        there = ", ".join(dict.fromkeys(row.method for row in found))
        raise PlanError(f"no method {', '.join(unknown)}; there are {there}")
    return [row for row in found if not only or row.method in only]


def methods(windows: Mapping[str, int], steps: int, length: int) -> Iterator[tuple[str, str, Stages]]:
    """Name, kind and the stages behind the base. Quantisers and recovery methods are those of the registries."""
    yield "none", "base", {}
    for name in QUANTS:
        if name != "none":
            yield name, "quantiser", {"gptq": {"quant": name, **windows}}
    budget = RECOVERY | {
        "length": length,
        "steps": steps,
        "samples": steps * RECOVERY["batch"] + RECOVERY["held_out"],  # no window is seen twice
        "save_steps": max(1, steps // 2),
    }
    yield "lora", "recovery", {"lora": budget}
    yield "gptq4 + eora", "recovery", {"gptq": {"quant": "gptq4", **windows}, "eora": {"rank": 32, **windows}}


def _recipe(plain: Mapping[str, Any], stages: Mapping[str, Mapping[str, Any]]) -> Recipe:
    faults: list[str] = []
    recipe = assemble(plain, stages, set(), "eora" in stages, faults)
    if faults:
        raise RecipeError(faults)
    return recipe

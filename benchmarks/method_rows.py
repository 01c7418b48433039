"""The rows of benchmarks/methods.py: which stages each method runs, with which settings."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from edgepress.checkpoints.errors import PlanError
from edgepress.pipeline.recipe import DISTILL, Recipe, assemble
from edgepress.stages.options import QUANTS, Gptq
from edgepress.stages.quantisers import form
from edgepress.stages.recovery import ADAPTERS, SETTINGS, parse

BASES = ("dense", "2:4")

# Every linear layer is adapted; one rank, one learning rate and one number of steps for all methods.
BUDGET: dict[str, Any] = {
    "targets": "all",
    "rank": 16,
    "alpha": 32,
    "dropout": 0.0,
    "batch": 8,
    "micro_batch": 8,  # the masked sum of weight and adapter is made once for each
    "held_out": 8,
    "learning_rate": 1e-3,
}
UNDER = "nf4"  # QLoRA's quantiser, below adapters that stay beside quantised weights
ROUNDS = 4


@dataclass(frozen=True)
class Row:
    method: str
    base: str
    kind: str  # base, quantiser or recovery
    recipe: Recipe
    faults: tuple[str, ...]  # why it cannot be, if a recipe alone says so
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
    budget = _budget(given.recovery_steps, given.recovery_length)
    found = []
    for base in given.base.split(","):
        start: Stages = {} if base == "dense" else {"wanda": {"pattern": base, **windows}}
        for method, kind, stages in methods(windows, budget, masked=bool(start)):
            # The time of a base is its own.
            found.append(Row(method, base, kind, *_recipe(plain, start | stages), len(start) if stages else 0))
        if start:
            distilled = start | {"lora": budget | {"distill": DISTILL}}
            found.append(Row("lora+distill", base, "recovery", *_recipe(plain, distilled), len(start)))
            in_rounds = _recipe(plain | {"homotopic": ROUNDS}, distilled)
            found.append(Row(f"homotopic-{ROUNDS}", base, "recovery", *in_rounds, 0))  # it makes its base itself
    only = [name for name in given.only.split(",") if name]
    if unknown := sorted(set(only) - {row.method for row in found}):
        there = ", ".join(dict.fromkeys(row.method for row in found))
        raise PlanError(f"no method {', '.join(unknown)}; there are {there}")
    return [row for row in found if not only or row.method in only]


def keeps_masks(name: str) -> bool:
    """Whether a quantiser can hold an N:M pattern: GGUF's types with a minimum cannot."""
    try:
        form(Gptq(quant=name), masked=True)
    except PlanError:
        return False
    return True


def methods(windows: Mapping[str, int], budget: Mapping[str, Any], masked: bool) -> Iterator[tuple[str, str, Stages]]:
    """Name, kind and the stages behind the base. Quantisers and recovery methods are those of the registries."""
    yield "none", "base", {}
    for name in QUANTS:
        if name != "none" and (not masked or keeps_masks(name)):
            yield name, "quantiser", {"gptq": {"quant": name, **windows}}
    quantised = [name for name in SETTINGS if parse(name).quantised]
    for name in (*ADAPTERS, *(name for name in SETTINGS if name not in quantised)):
        yield name, "recovery", {"lora": {**budget, "method": name}}
    beside = [name for name in ADAPTERS if "qlora" in parse(name).adapter.TAKES]
    for name in dict.fromkeys(str(parse(f"qlora+{adapter}")) for adapter in beside) | dict.fromkeys(quantised):
        below = {"gptq": {"quant": UNDER, **windows}}
        yield f"{UNDER}+{name}", "recovery", below | {"lora": {**budget, "method": name}}
    yield "gptq4+eora", "recovery", {"gptq": {"quant": "gptq4", **windows}, "eora": {"rank": 32, **windows}}


def _budget(steps: int, length: int) -> dict[str, Any]:
    """The lora stage's settings for so many steps; no window is seen twice."""
    samples = steps * BUDGET["batch"] + BUDGET["held_out"]
    return BUDGET | {"length": length, "steps": steps, "samples": samples, "save_steps": max(1, steps // 2)}


def _recipe(plain: Mapping[str, Any], stages: Mapping[str, Mapping[str, Any]]) -> tuple[Recipe, tuple[str, ...]]:
    faults: list[str] = []
    drafted = assemble(plain, stages, set(), "eora" in stages, faults, listed=True)
    return drafted.recipe, drafted.faults

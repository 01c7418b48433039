"""What a recipe will make, before any weight is touched: shapes, bytes, memory; all faults at once."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Any

from edgepress.checkpoints.errors import EdgepressError, PlanError, RecipeError, TextError
from edgepress.checkpoints.families import PRESETS, shape_from_config
from edgepress.checkpoints.packed_sizes import packed_sizes
from edgepress.checkpoints.shape import ModelShape
from edgepress.checkpoints.tokens import beyond_positions
from edgepress.pipeline.homotopic import unrolled
from edgepress.pipeline.plan_texts import text_faults
from edgepress.pipeline.recipe import Draft, Recipe
from edgepress.pipeline.vocabulary import counted
from edgepress.stages.cost import Cost
from edgepress.stages.options import Eora, Lora, Options, Vocabulary, flag_of


@dataclass(frozen=True)
class StagePlan:
    stage: str
    options: Options
    shape: ModelShape  # what comes out
    cost: Cost
    remarks: tuple[str, ...] = ()
    turn: int = 0  # how often the stage came before in the same recipe
    written_bytes: int = 0  # of its files, those that it does not share with the stage before by hard links

    def to_dict(self) -> dict[str, Any]:
        pattern = self.shape.pattern
        return {
            "stage": self.stage,
            "parameters_total": self.shape.parameters_total,
            "parameters_nonzero": self.shape.parameters_nonzero,
            "file_bytes": self.shape.file_bytes,
            "packed_bytes": packed_sizes(self.shape).total,
            "model_mib": self.shape.model_mib,
            "blocks": len(self.shape.blocks),
            "pattern": str(pattern) if pattern else None,
            "bits": self.shape.grid.bits if self.shape.grid else None,
            "peak_memory_bytes": self.cost.peak_memory_bytes,
            "scratch_bytes": self.cost.scratch_bytes,
            "written_bytes": self.written_bytes,
            "remarks": list(self.remarks),
        }


def examined(
    drafted: Draft, shape_of: Callable[[Recipe], ModelShape], texts: bool = True
) -> tuple[ModelShape, list[StagePlan]]:
    """The model's shape and every stage's outcome. Raises RecipeError with all that is wrong, of every kind, at once:
    options, measuring, device, chip, model, stages, and unless told not to look, texts."""
    recipe, faults = drafted.recipe, [*drafted.faults]
    faults += condition_faults(recipe)
    shape, plans = None, list[StagePlan]()
    try:
        shape = shape_of(recipe)
    except EdgepressError as error:
        faults += [] if set(str(error).split("\n")) <= {*faults} else [str(error)]  # it may ask the same as above
        if (preset := (recipe.model or "").lower()) in PRESETS:  # no weights to run with, but a shape to plan with
            shape = shape_from_config(PRESETS[preset])
    try:
        if shape is not None and recipe.protocol == "windows":
            beyond_positions(shape, recipe.window, "--window")
    except TextError as error:
        faults.append(str(error))
    try:
        plans = plan(recipe, shape, drafted.refused) if shape is not None else []
    except RecipeError as error:
        faults += error.faults
    if texts:
        faults += text_faults(recipe, [(p.stage, p.options) for p in plans] or recipe.stages)
    if faults:
        raise RecipeError(dict.fromkeys(faults))
    assert shape is not None
    return shape, plans


def condition_faults(recipe: Recipe) -> list[str]:
    """What cannot be in how a recipe is measured and where it runs."""
    from edgepress.checkpoints.runtime import choose_device, choose_dtype
    from edgepress.eval.perplexity import Protocol
    from edgepress.hardware.soc_file import load_soc

    checks: tuple[Callable[[], object], ...] = (
        lambda: Protocol(recipe.protocol, recipe.window, recipe.tokens),
        lambda: choose_device(recipe.device),
        lambda: choose_dtype(recipe.dtype, choose_device("cpu"), "F32"),
        lambda: load_soc(recipe.soc),
    )
    faults: list[str] = []
    for check in checks:
        try:
            check()
        except EdgepressError as error:
            faults += str(error).split("\n")
    return faults


def plan(recipe: Recipe, shape: ModelShape, refused: Set[str] = frozenset()) -> list[StagePlan]:
    """Every stage's outcome, in order. Raises RecipeError with the faults of all stages at once.

    refused: stages that somebody wants and that are not in the recipe, since their options cannot be.
    """
    plans: list[StagePlan] = []
    faults: list[str] = []
    unquantised = "gptq" in refused  # though a quantiser is there: it was refused
    for name, options in unrolled(recipe):
        if unquantised and _works_on_codes(options):
            continue  # it would complain of dense weights, which is not the recipe's fault
        module = importlib.import_module(f"edgepress.stages.{name}")
        try:
            if isinstance(options, Vocabulary):
                options = counted(recipe, options)
            after = module.plan(shape, options)
            remarks = tuple(module.remarks(shape, options)) if hasattr(module, "remarks") else ()
            if length := getattr(options, "length", 0):
                remarks += tuple(filter(None, [beyond_positions(shape, length, flag_of(options, "length"))]))
            cost = module.cost(shape, options)
            turn = sum(earlier.stage == name for earlier in plans)
            # The model may lie in one file, or on another disk: of its shards the first stage may share none.
            written = after.file_bytes - (cost.linked_bytes if plans else 0)
            plans.append(StagePlan(name, options, after, cost, remarks, turn, written))
            shape = after
        except EdgepressError as error:
            faults.append(str(error) if isinstance(error, PlanError) else f"{name}: {error}")
            unquantised |= name == "gptq"
    if faults:
        raise RecipeError(list(dict.fromkeys(faults)))  # each round of --homotopic would say the same
    return plans


def _works_on_codes(options: Options) -> bool:
    """Whether a stage needs quantised weights before it."""
    return isinstance(options, Eora) or (isinstance(options, Lora) and options.recovery.quantised)

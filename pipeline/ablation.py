"""What each stage of a recipe is worth: all of them, each left out, each alone, and none."""

from __future__ import annotations

from dataclasses import replace

from edgepress.checkpoints.errors import PlanError
from edgepress.pipeline.recipe import Recipe
from edgepress.pipeline.sweep_recipe import Configuration, Sweep
from edgepress.stages.options import Lora


def ablation(recipe: Recipe) -> Sweep:
    """The recipe taken apart as a sweep. Raises PlanError where there is nothing to take apart."""
    names = [stage for stage, _ in recipe.stages]
    if not names:
        raise PlanError("every stage is left out; there is nothing to take apart")
    wanted = [("all stages", names)]
    wanted += [(f"without {name}", [other for other in names if other != name]) for name in names]
    wanted += [(f"only {name}", [name]) for name in names]
    configurations, notes = [Configuration("no stage", replace(recipe, stages=()))], list(recipe.notes)
    # What cannot be without quantisation, and what it would lack.
    needing = {"eora": "no quantisation error to answer"}
    if any(isinstance(options, Lora) and options.recovery.quantised for _, options in recipe.stages):
        needing["lora"] = "no quantised weights to train on"
    seen: list[list[str]] = [[]]
    for label, stages in wanted:
        for bound in (name for name in stages if name in needing and "gptq" not in stages):
            if stages == [bound]:
                label, stages = f"only gptq and {bound}", [n for n in names if n in ("gptq", bound)]
                notes.append(f"{bound} alone has {needing[bound]}: it is shown with gptq")
            else:
                label, stages = f"{label} and {bound}", [name for name in stages if name != bound]
        if stages in seen:
            continue
        seen.append(stages)
        chosen = tuple(entry for entry in recipe.stages if entry[0] in stages)
        configurations.append(Configuration(label, replace(recipe, stages=chosen, notes=())))
    return Sweep("ablation", tuple(configurations), "What each stage is worth.", tuple(notes))

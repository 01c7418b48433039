"""Read sweeps and ablations: a base recipe, and the configurations that differ from it.

    stages: [...]                     # the base: plain keys and stages as in any recipe
    sweep:
      grid: {wanda.pattern: ["1:8", "2:4"], seed: [0, 1]}
      configurations:
        - {name: early, stages: [depth, lora, wanda], wanda.pattern: "2:4"}
        - name: "depth {depth.remove}, {stages}"
          grid: {depth.remove: [2, 4], stages: {plain: [depth], recovered: [depth, lora]}}

A configuration sets plain keys, options as `stage.option`, and `stages`: which run, in which order. A grid is the
product of its values; a mapping gives each value the label that takes its place in the name. The top grid and each
entry of the list make configurations of their own.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from edgepress.checkpoints.errors import PlanError, RecipeError, near
from edgepress.pipeline.recipe import Recipe, assemble, from_mapping, load_yaml, stage_values
from edgepress.stages.options import STAGES, Lora

MAX_RUNS = 256


@dataclass(frozen=True)
class Configuration:
    name: str
    recipe: Recipe


@dataclass(frozen=True)
class Sweep:
    name: str
    configurations: tuple[Configuration, ...]
    about: str = ""
    notes: tuple[str, ...] = ()


@dataclass
class _Draft:
    """A configuration before the base is laid under it."""

    name: str
    own: dict[str, Any]  # plain keys and `stage.option`
    stages: dict[str, dict[str, Any]] | None  # None: those of the base
    faults: list[str] = field(default_factory=list)


def is_sweep(file: str) -> bool:
    """Whether a recipe holds a sweep. What is wrong with the file is said by whoever loads it."""
    return bool(file) and "sweep" in load_yaml(file, [])


def load_sweep(
    file: str,
    flags: Mapping[str, Any],
    max_runs: int = MAX_RUNS,
    only: Sequence[str] = (),
    leave_out: Sequence[str] = (),
) -> Sweep:
    """The configurations of a sweep recipe (a path or a shipped name); flags go over its base.

    only, leave_out: patterns of configurations' names. Raises RecipeError with every fault at once.
    """
    sweep, faults = draft_sweep(file, flags, max_runs, only, leave_out)
    if faults:
        raise RecipeError(faults)
    return sweep


def draft_sweep(
    file: str,
    flags: Mapping[str, Any],
    max_runs: int = MAX_RUNS,
    only: Sequence[str] = (),
    leave_out: Sequence[str] = (),
) -> tuple[Sweep, list[str]]:
    """The configurations that can be made, and the faults, for whoever knows of more. Raises RecipeError for a file
    that is no sweep."""
    faults: list[str] = []
    given = load_yaml(file, faults)
    if faults:
        raise RecipeError(faults)
    spec = given.pop("sweep", None)
    if spec is None:
        raise RecipeError(
            [f"{file} holds no sweep; `compress --recipe {file}` runs it, `compress ablate` takes it apart"]
        )
    plain, stages = from_mapping(given, faults)
    drafts = _drafts(spec, max_runs, faults)
    _refuse_repeated_names(drafts, faults)
    given_flags = {key: value for key, value in flags.items() if value is not None}
    _refuse_flags_without_effect(given_flags, drafts, stages, faults)
    built, wrong = [], defaultdict(list)
    for draft in drafts:
        recipe = _laid_over(draft, plain, stages, given_flags, "stages" in given or draft.stages is not None)
        for fault in draft.faults:
            wrong[fault].append(draft.name)
        if recipe is not None:
            built.append(Configuration(draft.name, recipe))
    faults += [f"{_some(names)}: {fault}" for fault, names in wrong.items()]
    chosen = choose(built, only, leave_out, faults)
    sweep = Sweep(str(given.get("name") or file), tuple(chosen), str(given.get("about") or "").strip(), _notes(chosen))
    return sweep, faults


def choose(
    configurations: Sequence[Configuration], only: Sequence[str], leave_out: Sequence[str], faults: list[str]
) -> list[Configuration]:
    """Those whose names match a pattern of `only`, if there are any, and none of `leave_out`."""
    for pattern in (*only, *leave_out):
        if configurations and not any(fnmatchcase(c.name, pattern) for c in configurations):
            names = [c.name for c in configurations]
            faults.append(f"no configuration is named '{pattern}'{near(pattern, names)}; there are {_some(names)}")
    return [
        c
        for c in configurations
        if (not only or any(fnmatchcase(c.name, p) for p in only))
        and not any(fnmatchcase(c.name, p) for p in leave_out)
    ]


def _drafts(spec: Any, max_runs: int, faults: list[str]) -> list[_Draft]:
    if not isinstance(spec, dict) or not spec:
        faults.append("sweep must hold a grid, a list of configurations, or both")
        return []
    for key in sorted(set(spec) - {"grid", "configurations"}, key=str):
        faults.append(
            f"sweep has no key '{key}'{near(key, ('grid', 'configurations'))}; there are grid and configurations"
        )
    listed = spec.get("configurations") or []
    if not isinstance(listed, list):
        faults.append("sweep.configurations must be a list")
        listed = []
    entries: list[Any] = ([{"grid": spec["grid"]}] if "grid" in spec else []) + listed
    first = 0 if "grid" in spec else 1
    parsed = [entry for number, e in enumerate(entries, first) if (entry := _entry(e, number, faults)) is not None]
    count = sum(math.prod(len(values) for values in grid.values()) for _, _, grid in parsed)
    if count > max_runs:
        # Refused before it is multiplied out: a slip in a grid can mean millions.
        products = [" x ".join(f"{len(v)} {k}" for k, v in grid.items()) for _, _, grid in parsed if grid]
        faults.append(
            f"the sweep makes {count} configurations, more than --max-runs {max_runs} ({'; '.join(products[:3])}); "
            "shorten a grid or raise --max-runs"
        )
        return []
    return [draft for name, own, grid in parsed for draft in _multiplied(name, own, grid)]


_Grid = dict[str, list[tuple[str, Any]]]  # key -> (label, value)


def _entry(entry: Any, number: int, faults: list[str]) -> tuple[str, dict[str, Any], _Grid] | None:
    """Name, own keys and grid of one entry, every value checked once."""
    if not isinstance(entry, dict):
        faults.append(f"configuration {number} must hold keys and values, not {entry!r}")
        return None
    name, grid = entry.get("name", ""), entry.get("grid", {})
    where = f"configuration '{name}'" if name else ("the grid" if set(entry) == {"grid"} else f"configuration {number}")
    found: list[str] = []
    if not isinstance(name, str):
        found.append(f"its name {name!r} is not text; quote it")
        name = str(name)
    if not name and not grid:
        found.append("it needs a name")
    own = {key: _checked(key, value, found) for key, value in entry.items() if key not in ("name", "about", "grid")}
    axes: _Grid = {}
    if not isinstance(grid, dict):
        found.append("its grid must hold keys and lists of values")
        grid = {}
    for key, values in grid.items():
        if not isinstance(values, list | dict) or not values:
            found.append(f"grid key {key}: {values!r} is not a list of values")
            continue
        labelled = values.items() if isinstance(values, dict) else [(_label(key, value), value) for value in values]
        if not all(isinstance(label, str) for label, _ in labelled):
            found.append(f"grid key {key}: a label is not text; quote it (bare yes and no are truth values in YAML)")
        if key in own:
            found.append(f"{key} is set beside the grid and in it")
        axes[key] = [(str(label), _checked(key, value, found)) for label, value in labelled]
    for placeholder in sorted(set(re.findall(r"\{([^{}]*)\}", name)) - set(axes)):
        found.append(f"its name speaks of {{{placeholder}}}, which its grid does not have")
    faults += [f"{where}: {fault}" for fault in dict.fromkeys(found)]
    return name, own, axes


def _checked(key: Any, value: Any, faults: list[str]) -> Any:
    """A value as from_mapping makes it of a recipe's; anything wrong is added to the faults."""
    stage, dot, option = str(key).partition(".")
    if key == "stages":
        return from_mapping({"stages": value}, faults)[1]
    if dot and stage in STAGES:
        return stage_values(stage, {option: value}, faults).get(option)
    if dot:
        faults.append(f"unknown stage '{stage}' in {key}{near(stage, STAGES)}; there are {', '.join(STAGES)}")
        return None
    if key in ("skip", "name", "about"):
        faults.append(f"{key} cannot be set here; `stages` says which stages run")
        return None
    return from_mapping({key: value}, faults)[0].get(str(key))


def _label(key: str, value: Any) -> str:
    if key == "stages" and isinstance(value, list):
        return "+".join(next(iter(v)) if isinstance(v, dict) and v else str(v) for v in value) or "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _multiplied(name: str, own: dict[str, Any], grid: _Grid) -> Iterator[_Draft]:
    for point in itertools.product(*grid.values()):
        labels = {key: label for key, (label, _) in zip(grid, point, strict=True)}
        values = own | {key: value for key, (_, value) in zip(grid, point, strict=True)}
        # A value with a fault is None, and must not reach the options; `model: null` is the packaged model.
        values = {key: value for key, value in values.items() if value is not None or key == "model"}
        full = name
        for key, label in labels.items():
            full = full.replace(f"{{{key}}}", label)
        rest = [f"{key}={label}" for key, label in labels.items() if f"{{{key}}}" not in name]
        yield _Draft(" ".join([full, *rest]).strip(), values, values.pop("stages", None))


def _laid_over(
    draft: _Draft, plain: Mapping[str, Any], base: Mapping[str, Mapping[str, Any]], flags: Mapping[str, Any],
    listed: bool,
) -> Recipe | None:  # fmt: skip
    order = draft.stages if draft.stages is not None else {name: {} for name in base}
    stages = {
        name: {**base.get(name, {}), **_of_stage(flags, name), **inline, **_of_stage(draft.own, name)}
        for name, inline in order.items()
    }
    plain = {**plain, **{k: v for layer in (flags, draft.own) for k, v in layer.items() if "." not in k}}
    for key in draft.own:
        stage = key.partition(".")[0]
        if stage in STAGES and stage not in order:
            draft.faults.append(f"{key} is set, but the stage {stage} is left out")
    asked = any(key.startswith("eora.") for key in draft.own) or "eora" in (draft.stages or {})
    recipe = assemble(plain, stages, set(), asked and _quantises(stages), draft.faults, listed).recipe
    if "eora" in (draft.stages or {}) and "gptq" not in (draft.stages or {}):
        draft.faults.append("eora needs gptq before it: without it there is no quantisation error to compensate")
    return None if draft.faults else recipe


def _quantises(stages: Mapping[str, Mapping[str, Any]]) -> bool:
    # A grid over gptq.quant may hold none: there eora goes with it, as it does for `compress --quant none`.
    return "gptq" in stages and stages["gptq"].get("quant") != "none"


def _of_stage(values: Mapping[str, Any], stage: str) -> dict[str, Any]:
    return {key.partition(".")[2]: value for key, value in values.items() if key.startswith(f"{stage}.")}


def _refuse_repeated_names(drafts: list[_Draft], faults: list[str]) -> None:
    for name, count in Counter(draft.name for draft in drafts).items():
        if count > 1:
            faults.append(f"{count} configurations have the name '{name}'; give each its own")


def _refuse_flags_without_effect(
    flags: Mapping[str, Any], drafts: list[_Draft], base: Mapping[str, Any], faults: list[str]
) -> None:
    for key in flags:
        stage = key.partition(".")[0] if "." in key else ""
        having = [d for d in drafts if not stage or stage in (d.stages if d.stages is not None else base)]
        if drafts and not having:
            faults.append(f"{key} is given, but every configuration leaves the stage {stage} out")
        elif having and all(key in d.own or _inline(d, key) for d in having):
            faults.append(f"{key} is given, but every configuration sets it itself; change the recipe instead")


def _inline(draft: _Draft, key: str) -> bool:
    stage, _, option = key.partition(".")
    return draft.stages is not None and option in draft.stages.get(stage, {})


def _notes(configurations: Sequence[Configuration]) -> tuple[str, ...]:
    notes: dict[str, list[str]] = defaultdict(list)
    same: dict[Recipe, list[str]] = defaultdict(list)
    for configuration in configurations:
        same[configuration.recipe].append(configuration.name)
        for note in configuration.recipe.notes:
            notes[note].append(configuration.name)
    lines = [f"{_some(names)}: {note}" for note, names in notes.items()]
    groups = [names for names in same.values() if len(names) > 1]
    if groups:
        more = f", and so are {len(groups) - 1} more groups" if len(groups) > 1 else ""
        lines.append(f"{_some(groups[0])} are the same{more}")
    return tuple(lines)


def _some(names: Sequence[str], most: int = 4) -> str:
    quoted = ", ".join(f"'{name}'" for name in names[:most])
    return quoted + (f" and {len(names) - most} more" if len(names) > most else "")


# --- ablations --------------------------------------------------------------------------------------------------------
# What each stage of a recipe is worth: all of them, each left out, each alone, and none.


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
    needing = {"eora": "no quantisation error to answer", "tune": "no scales to train"}
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

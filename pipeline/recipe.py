"""A recipe: what to compress, with which stages in which order, from flags or YAML through one validation.

No torch here. Flags are generated from the stages' option fields, so a flag, a recipe key and a field of a
dataclass are the same thing under three names.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any, get_type_hints

from edgepress.checkpoints.documents import RECIPE_BYTES, parse_yaml, read_small
from edgepress.checkpoints.errors import PlanError, RecipeError
from edgepress.pipeline.homotopic import in_rounds
from edgepress.pipeline.order import in_working_order
from edgepress.stages.options import STAGES, Eora, Options

PLAIN_KEYS: dict[str, type] = {
    "model": str,
    "data": str,
    "text": str,
    "protocol": str,
    "window": int,
    "tokens": int,
    "seed": int,
    "device": str,
    "dtype": str,
    "soc": str,
    "spill_mib": int,
    "homotopic": int,
}


@dataclass(frozen=True)
class Recipe:
    model: str | None = None  # None is the packaged model
    data: str = ""  # calibration text; empty: embedded for the packaged model, else wikitext2
    text: str = ""  # text to measure on; empty: the held-out part of the calibration text
    protocol: str = "windows"
    window: int = 512
    tokens: int = 16384
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    soc: str = "siracusa"
    spill_mib: int = 64  # calibration states beyond this lie in a temporary file
    homotopic: int = 0  # rounds of depth, wanda and lora with a part of their amounts each; 0: once, in full
    stages: tuple[tuple[str, Options], ...] = tuple(
        (name, options()) for name, options in STAGES.items() if not options().skipped
    )
    notes: tuple[str, ...] = ()  # what was left out and why

    @property
    def calibration_text(self) -> str:
        return self.data or ("embedded" if self.model is None else "wikitext2")

    @property
    def evaluation_text(self) -> str:
        return self.text or self.calibration_text

    def to_dict(self) -> dict[str, Any]:
        """The recipe as it could be written to YAML."""
        plain = {key: getattr(self, key) for key in PLAIN_KEYS}
        return plain | {"stages": [{name: asdict(options)} for name, options in self.stages]}


@dataclass(frozen=True)
class Draft:
    """A recipe with what is wrong with it as far as no model is needed to see it. Stages in `refused` are left out."""

    recipe: Recipe
    faults: tuple[str, ...] = ()
    refused: frozenset[str] = frozenset()


def build(file: str | None, flags: Mapping[str, Any], skip: str = "") -> Recipe:
    """The recipe of a YAML file (a path or the name of a shipped one) with flags laid over it.

    flags: plain keys (`model`, `seed` …) and stage options by `stage.field`; None means not given. Raises
    RecipeError with every fault at once.
    """
    drafted = draft(file, flags, skip)
    if drafted.faults:
        raise RecipeError(drafted.faults)
    return drafted.recipe


def draft(file: str | None, flags: Mapping[str, Any], skip: str = "") -> Draft:
    """The same with its faults beside it, for whoever knows of more."""
    faults: list[str] = []
    given = load_yaml(file, faults) if file else {}
    plain, stages = from_mapping(given, faults)
    for key, value in flags.items():
        if value is None:
            continue
        stage, _, name = key.partition(".")
        if not name:
            plain[key] = value
        elif stage in stages:
            stages[stage][name] = value
        elif stage in ("vocabulary", "pad"):  # they come before everything, unless a recipe says otherwise
            stages = {stage: {name: value}, **stages}
        else:
            flag = next(f.metadata["flag"] for f in fields(STAGES[stage]) if f.name == name)
            faults.append(f"{flag} belongs to the stage {stage}, which {file} leaves out")
    left_out = _skipped(skip or str(given.get("skip") or ""), faults)
    asked = any(k.startswith("eora.") and v is not None for k, v in flags.items())
    return assemble(plain, stages, left_out, asked, faults, listed="stages" in given)


def assemble(
    plain: Mapping[str, Any],
    stages: Mapping[str, Mapping[str, Any]],
    left_out: Set[str],
    eora_asked: bool,
    faults: list[str],
    listed: bool = False,
) -> Draft:
    """A recipe of checked plain keys and options. Values that can never work are added to the faults found so far.

    listed: somebody listed the stages, so their order is wanted as it is.
    """
    built, refused = [], set()
    for stage, values in stages.items():
        try:
            options = STAGES[stage](**values)
        except (PlanError, TypeError) as error:
            faults += str(error).split("\n")
            refused.add(stage)
            continue
        if stage not in left_out and not options.skipped:
            built.append((stage, options))
    if any(s == "pad" for s, _ in built) and any(isinstance(o, Eora) and o.against == "dense" for _, o in built):
        faults.append("--eora-against dense needs the uncompressed model's widths, which --pad-ffn changes; use parent")
    notes = []
    names = [stage for stage, _ in built]
    if "eora" in names and not {"gptq"} & {*names, *refused} and not eora_asked:
        # Left out rather than refused: `--quant none` says that nothing is to be compensated.
        built = [entry for entry in built if entry[0] != "eora"]
        notes.append("eora is left out: without gptq there is no quantisation error to compensate")
    if not listed:
        built = in_working_order(built, eora_asked, notes)
    recipe = Recipe(stages=tuple(built), notes=tuple(notes), **plain)
    if recipe.spill_mib < 0:
        faults.append(f"--spill-mib {recipe.spill_mib}: cannot be negative")
    if recipe.homotopic:
        speaking_against: list[str] = []
        in_full = replace(recipe, homotopic=0)  # what rounds are made of can still be looked at
        recipe = in_full if refused else in_rounds(recipe, speaking_against)
        recipe = in_full if speaking_against else recipe
        faults += speaking_against
    return Draft(recipe, tuple(faults), frozenset(refused - left_out))


def load_yaml(name: str, faults: list[str]) -> dict[str, Any]:
    """A recipe file, or a shipped recipe by its name."""
    path = Path(name)
    if not path.is_file():
        shipped = resources.files("edgepress.recipes")
        candidate = shipped / f"{Path(name).stem}.yaml"
        if Path(name).name in (Path(name).stem, f"{Path(name).stem}.yaml") and candidate.is_file():
            text = candidate.read_bytes()
        else:
            names = sorted(p.name.removesuffix(".yaml") for p in shipped.iterdir() if p.name.endswith(".yaml"))
            faults.append(f"there is no recipe '{name}': no such file; shipped are {', '.join(names)}")
            return {}
    else:
        text = b""
    try:
        text = text or read_small(path, RECIPE_BYTES, PlanError)
        data = parse_yaml(text, name, PlanError) or {}
    except PlanError as error:
        faults.append(str(error))
        return {}
    if not isinstance(data, dict):
        faults.append(f"{name} must hold keys and values")
        return {}
    return data


def from_mapping(data: Mapping[str, Any], faults: list[str]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    plain: dict[str, Any] = {}
    for key, value in data.items():
        if key in PLAIN_KEYS:
            if key == "model" and value is None:
                continue
            if not isinstance(value, PLAIN_KEYS[key]) or isinstance(value, bool):
                faults.append(f"{key}: {value!r} is not {_words(PLAIN_KEYS[key])}")
            else:
                plain[key] = value
        elif key == "sweep":
            faults.append("this recipe is a sweep of several configurations: compress sweep RECIPE")
        elif key not in ("stages", "skip", "name", "about"):
            known = sorted([*PLAIN_KEYS, "stages", "skip", "name", "about"])
            faults.append(f"unknown key '{key}'; there are {', '.join(known)}")
    if "stages" not in data:
        return plain, {name: {} for name in STAGES}
    stages: dict[str, dict[str, Any]] = {}
    listed = data["stages"]
    if not isinstance(listed, list):
        faults.append("stages must be a list, in the order they run")
        return plain, stages
    for entry in listed:
        name, values = next(iter(entry.items())) if isinstance(entry, dict) and len(entry) == 1 else (entry, {})
        if name not in STAGES:
            faults.append(f"unknown stage '{name}'; there are {', '.join(STAGES)}")
        elif name in stages:
            faults.append(f"the stage {name} is listed twice")
        else:
            stages[name] = stage_values(name, values or {}, faults)
    return plain, stages


def stage_values(stage: str, values: Any, faults: list[str]) -> dict[str, Any]:
    types = get_type_hints(STAGES[stage])
    if not isinstance(values, dict):
        faults.append(f"{stage}: options must be keys and values")
        return {}
    good = {}
    for key, value in values.items():
        if key not in types:
            faults.append(f"{stage} has no option '{key}'; there are {', '.join(types)}")
        elif not _fits(value, types[key]):
            faults.append(f"{stage}.{key}: {value!r} is not {_words(types[key])}")
        else:
            good[key] = float(value) if types[key] is float else value
    return good


def _fits(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


def _words(kind: type) -> str:
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[kind]


def _skipped(skip: str, faults: list[str]) -> set[str]:
    names = {name.strip() for name in skip.split(",") if name.strip()}
    for name in sorted(names - set(STAGES)):
        faults.append(f"--skip {name}: there is no such stage; there are {', '.join(STAGES)}")
    return names & set(STAGES)

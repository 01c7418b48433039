"""Recipes: what to compress, with which stages in which order, from flags or YAML through one validation.

No torch here. Flags are generated from the stages' option fields, so a flag, a recipe key and a field of a
dataclass are the same thing under three names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from edgepress.checkpoints.documents import RECIPE_BYTES, parse_yaml, read_small
from edgepress.checkpoints.errors import PlanError, RecipeError, near
from edgepress.checkpoints.shape import Part, Unstructured, parse_amount
from edgepress.stages.options import STAGES, Depth, Eora, Lora, Options, Wanda

SELF = "self"  # text that the uncompressed model writes itself

if TYPE_CHECKING:
    from pydantic import TypeAdapter

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


_ABOUT = ("sweep", "stages", "skip", "name", "about")  # keys of a recipe file besides the plain ones
_WORDS: dict[type, str] = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


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
        """--data; else wikitext2, and for the packaged model two kinds of text that need no network."""
        return self.data or (f"embedded+{SELF}" if self.model is None else "wikitext2")

    @property
    def evaluation_text(self) -> str:
        """--text, or what is held back of the first text that calibrates; "self" where the model writes all of it."""
        return self.text or next((text for text in texts_of(self.calibration_text) if text != SELF), SELF)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as it could be written to YAML."""
        plain = {key: getattr(self, key) for key in PLAIN_KEYS}
        return plain | {"stages": [{name: asdict(options)} for name, options in self.stages]}


def texts_of(spec: str) -> list[str]:
    """The texts of --data or --lora-data: one, or several joined with +. A file may have a plus in its name."""
    return [spec] if "+" not in spec or Path(spec).expanduser().is_file() else list(dict.fromkeys(spec.split("+")))


def shares_of(spec: str, windows: int) -> dict[str, int]:
    """How many of so many windows come from each text of a mixture: equal shares, the first texts one more."""
    texts = texts_of(spec)
    shares = {text: (windows + len(texts) - 1 - place) // len(texts) for place, text in enumerate(texts)}
    return {text: share for text, share in shares.items() if share} or {texts[0]: 0}


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
        elif stage == "tune" and "gptq" in stages:  # right after it
            place = list(stages).index("gptq") + 1
            entries = list(stages.items())
            stages = dict([*entries[:place], (stage, {name: value}), *entries[place:]])
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
            faults.append(
                f"there is no recipe '{name}'{near(name, names)}: no such file; shipped are {', '.join(names)}"
            )
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
    """The plain keys and the stages' options of a recipe file that are as they should be; the rest are faults."""
    if "sweep" in data:
        faults.append("this recipe is a sweep of several configurations: compress sweep RECIPE")
    own = {key: value for key, value in data.items() if key not in _ABOUT and (key, value) != ("model", None)}
    plain, wrong = validated("", PLAIN_KEYS, own)
    for key, fault in wrong:
        there = f"there are {', '.join(sorted([*PLAIN_KEYS, *_ABOUT[1:]]))}"
        faults.append(fault or f"unknown key '{key}'{near(key, (*PLAIN_KEYS, *_ABOUT[1:]))}; {there}")
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
            faults.append(f"unknown stage '{name}'{near(name, STAGES)}; there are {', '.join(STAGES)}")
        elif name in stages:
            faults.append(f"the stage {name} is listed twice")
        else:
            stages[name] = stage_values(name, values or {}, faults)
    return plain, stages


def stage_values(stage: str, values: Any, faults: list[str]) -> dict[str, Any]:
    """The options of one stage that are as they should be; the rest are faults."""
    if not isinstance(values, dict):
        faults.append(f"{stage}: options must be keys and values")
        return {}
    types = get_type_hints(STAGES[stage])
    if stage == "gptq" and isinstance(rules := values.get("layers"), dict):  # as a flag says it
        values = {**values, "layers": "; ".join(f"{name}={how}" for name, how in rules.items())}
    good, wrong = validated(f"{stage}.", types, values)
    for key, fault in wrong:
        faults.append(fault or f"{stage} has no option '{key}'{near(key, types)}; there are {', '.join(types)}")
    return good


def validated(
    where: str, types: Mapping[str, type], values: Mapping[Any, Any]
) -> tuple[dict[str, Any], list[tuple[Any, str]]]:
    """The values that have their key's type, numbers for float as float; each other key with its fault, or with
    nothing where there is no such key."""
    if not values:
        return {}, []  # pydantic takes a fifth of a second to import
    from pydantic import ValidationError

    try:
        return dict(_keys(tuple(types.items())).validate_python(dict(values))), []
    except ValidationError as error:
        wrong: dict[Any, str] = {}
        for fault in error.errors(include_url=False):
            key = fault["loc"][0]
            known = key in types
            wrong[key] = f"{where}{key}: {fault['input']!r} is not {_WORDS[types[str(key)]]}" if known else ""
    kept = {key: value for key, value in values.items() if key not in wrong and str(key) not in wrong}
    return validated(where, types, kept)[0], list(wrong.items())


@cache
def _keys(types: tuple[tuple[str, type], ...]) -> TypeAdapter[Any]:
    """Of keys that may be left out; no other key, and no value of another type that would have to be converted."""
    from pydantic import ConfigDict, TypeAdapter, with_config
    from typing_extensions import TypedDict

    keys: Any = TypedDict("keys", dict(types), total=False)  # type: ignore[misc]
    return TypeAdapter(with_config(ConfigDict(extra="forbid", strict=True))(keys))


def _skipped(skip: str, faults: list[str]) -> set[str]:
    names = {name.strip() for name in skip.split(",") if name.strip()}
    for name in sorted(names - set(STAGES)):
        faults.append(f"--skip {name}: there is no such stage{near(name, STAGES)}; there are {', '.join(STAGES)}")
    return names & set(STAGES)


# --- --homotopic ------------------------------------------------------------------------------------------------------
# `--homotopic K`: a little pruning, then a short distillation, K times, in place of depth, wanda and lora in full.
#
# HomoDistil (Liang et al., arXiv 2302.09632) starts from the teacher and removes the least important parts a few at a
# time, distilling in between, so that the student never falls far behind. Here a round is the stages themselves with
# a part of their amounts, so every round has its checkpoint, its measurement and its place in the store. Other than
# in the paper, what is removed are blocks and N:M zeros by the stages' own rankings, and the teacher's logits alone
# are matched unless --distill-hidden adds its hidden states.
#
# The rounds together take the optimiser steps, the training windows and the removals of one run in full. Each round
# is a training of its own, with its own warm-up and cosine, on windows of its own. Calibration of a ranking is not
# divided: a statistic needs its samples.


DISTILL = 0.5  # share of the loss that is the teacher's where the recipe gives none
_PARTS = ("depth", "wanda", "lora")


def in_rounds(recipe: Recipe, faults: list[str]) -> Recipe:
    """The recipe ready to be unrolled: distilling. What speaks against rounds is added to the faults."""
    faults += _against(recipe)
    stages: list[tuple[str, Options]] = []
    notes = list(recipe.notes)
    for name, options in recipe.stages:
        if isinstance(options, Lora) and options.distill == 0:
            options = replace(options, distill=DISTILL)
            notes.append(
                f"--homotopic distils: {DISTILL:g} of the loss is the uncompressed model's; --distill changes that"
            )
        stages.append((name, options))
    notes.append(f"--homotopic: each of the {recipe.homotopic} rounds is a run with its own warm-up and cosine")
    return replace(recipe, stages=tuple(stages), notes=tuple(notes))


def _against(recipe: Recipe) -> Iterator[str]:
    """Why a recipe cannot go in rounds; nothing if it can."""
    rounds, names = recipe.homotopic, [name for name, _ in recipe.stages]
    by_name = dict(recipe.stages)
    depth, lora = by_name.get("depth"), by_name.get("lora")
    here = [name for name in names if name in _PARTS]
    if rounds < 2:
        yield f"--homotopic {rounds}: it takes at least 2 rounds; leave it out for one of each stage"
    if isinstance(lora, Lora) and 2 * rounds > lora.total_steps:
        most = f"at most {lora.total_steps // 2} rounds, or " if lora.total_steps >= 4 else ""
        yield (
            f"--homotopic {rounds}: lora has {lora.total_steps} optimiser steps in all, and a round needs two, since "
            f"its first only warms up; give {most}more with --lora-steps"
        )
    if isinstance(lora, Lora) and lora.recovery.quantised:
        yield (
            f"--homotopic prunes after each training, and --recover {lora.recovery} trains beside weights that are "
            f"quantised by then; give --recover {lora.recovery.on_dense()}, or leave --homotopic out"
        )
        return
    if lora is None:
        yield "--homotopic distils after each pruning, and the stage lora, which does so, is left out"
    elif here[-1] != "lora":
        yield f"--homotopic ends each round with lora; here {here[-1]} comes after it"
    if here in ([], ["lora"]):
        yield "--homotopic has nothing to remove: give --depth, --wanda or both"
    if isinstance(depth, Depth) and depth.layers:
        yield "--homotopic cannot divide --layers, which says where to end and not in which order; give --depth"
    elif isinstance(depth, Depth) and "wanda" not in names and depth.remove < rounds:
        yield f"--homotopic {rounds}: only {depth.remove} blocks go, so at most {depth.remove} rounds prune"
    if here:
        between = names[names.index(here[0]) : names.index(here[-1]) + 1]
        for name in (name for name in between if name not in _PARTS):
            yield f"--homotopic repeats {', '.join(here)}, and {name} stands between them; put it before or after"


def unrolled(recipe: Recipe) -> Iterator[tuple[str, Options]]:
    """The stages in the order in which they run, those of the rounds once for each."""
    if not recipe.homotopic:
        yield from recipe.stages
        return
    repeated = [stage for stage in recipe.stages if stage[0] in _PARTS]
    for stage in recipe.stages:
        if stage[0] not in _PARTS:
            yield stage
        elif stage == repeated[0]:
            for number in range(recipe.homotopic):
                for name, options in repeated:
                    if (part := _part(options, number, recipe.homotopic)) is not None:
                        yield name, part


def _part(options: Options, number: int, rounds: int) -> Options | None:
    """What round `number`, from 0, does of a stage; None for nothing."""
    if isinstance(options, Depth):
        remove = share(options.remove, number, rounds)
        return replace(options, remove=remove) if remove else None
    if isinstance(options, Wanda):
        return replace(options, pattern=amount_after(options.pattern, number + 1, rounds))
    assert isinstance(options, Lora)
    steps = share(options.total_steps, number, rounds)
    # A round must fill a batch, however few windows there are to divide.
    windows = max(options.batch, share(options.samples - options.held_out, number, rounds))
    return replace(
        options,
        steps=steps,
        samples=windows + options.held_out,
        save_steps=min(options.save_steps, steps),  # or a short round would never look at what it held out
    )


def share(total: int, number: int, rounds: int) -> int:
    """How many of `total` fall to round `number`, from 0: spread evenly, the larger ones first (2 of 4: 1, 0, 1, 0)."""

    def until(count: int) -> int:
        return -(-total * count // rounds)

    return until(number + 1) - until(number)


def amount_after(pattern: str, done: int, rounds: int) -> str:
    """The zeros that are there after `done` of the rounds: in the end exactly the pattern, on the way a part of it.

    A part of N:M counts in the whole row and never takes more than N of an M, so the zeros can only grow into N:M.
    """
    amount = parse_amount(pattern)
    if done == rounds:
        return pattern
    if isinstance(amount, Unstructured):
        return str(Unstructured(amount.fraction * done / rounds))
    if isinstance(amount, Part):
        return str(Part(amount.part * done, amount.parts * rounds, amount.whole))
    return str(Part(done, rounds, amount))


# --- the order of stages ----------------------------------------------------------------------------------------------
# The order of the stages where no recipe lists them: the usual one, but for adapters trained on quantised weights.


Stages = list[tuple[str, Options]]


def in_working_order(stages: Stages, eora_asked: bool, notes: list[str]) -> Stages:
    """The stages as they can run; what was moved or left out is added to the notes.

    eora_asked: somebody set one of its options, so it is not left out, and the plan says why it cannot run.
    """
    names = [name for name, _ in stages]
    method = next((o.method for _, o in stages if isinstance(o, Lora) and o.recovery.quantised), None)
    if method is None or "gptq" not in names:
        return stages
    place, lora = names.index("tune" if "tune" in names else "gptq"), stages[names.index("lora")]
    moved = [*stages[: place + 1], lora, *stages[place + 1 :]]
    moved.remove(lora)  # the first of the two
    notes.append(f"lora comes after {names[place]}: --recover {method} trains on the quantised weights")
    if "eora" in names and not eora_asked:
        moved = [entry for entry in moved if entry[0] != "eora"]
        notes.append("eora is left out: a layer has room for one adapter, and lora's lies there")
    return moved

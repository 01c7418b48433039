"""Plan a recipe before any weight is touched: shapes, bytes, memory, texts, the chip's verdict; all faults at once."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepress.checkpoints.errors import EdgepressError, PlanError, RecipeError, TextError
from edgepress.checkpoints.families import PRESETS, shape_from_config
from edgepress.checkpoints.memory import size_text
from edgepress.checkpoints.packed_sizes import packed_sizes
from edgepress.checkpoints.runtime import require_device, require_dtype
from edgepress.checkpoints.shape import ModelShape
from edgepress.checkpoints.tokens import beyond_positions
from edgepress.eval.protocol import Protocol
from edgepress.hardware.check import Verdict, check
from edgepress.hardware.soc import Soc, load_soc
from edgepress.pipeline.calibration import counted
from edgepress.pipeline.progress import Reporter
from edgepress.pipeline.recipe import SELF, Draft, Recipe, shares_of, texts_of, unrolled
from edgepress.stages.options import Eora, Lora, Options, Pad, Training, Tune, Vocabulary, flag_of
from edgepress.stages.requirements import Cost

if TYPE_CHECKING:
    from edgepress.eval.text import Text, Use


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
    checks: tuple[Callable[[], object], ...] = (
        lambda: Protocol(recipe.protocol, recipe.window, recipe.tokens),
        lambda: require_device(recipe.device),
        lambda: require_dtype(recipe.dtype),
        lambda: load_soc(recipe.soc),
    )
    faults: list[str] = []
    for examine in checks:
        try:
            examine()
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
    return isinstance(options, Eora | Tune) or (isinstance(options, Lora) and options.recovery.quantised)


# --- texts ------------------------------------------------------------------------------------------------------------
# Texts of a recipe, before a run: whether they are there, can be read, and are long enough.


_LARGEST_READ = 64 * 2**20  # bytes of a file that a plan reads; of a larger one it only sees that it is there
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


def text_faults(recipe: Recipe, stages: Iterable[tuple[str, Options]]) -> list[str]:
    """What is wrong with the texts to calibrate, train and measure on. What lies on the hub is not asked for, nor are
    files of texts that are not there where the model is a name without weights: it can be planned, and not run."""
    faults: list[str] = []
    tokenizer = _tokenizer(recipe.model)
    for (spec, use), wanted in _wanted(recipe, stages, faults).items():
        if (recipe.model or "").lower() in PRESETS and _still_to_come(Path(spec)):
            continue
        try:
            text = _loaded(spec, use)
        except EdgepressError as error:
            faults.append(str(error))
            continue
        if text is None:
            continue
        for what, tokens in dict.fromkeys(wanted):
            if fault := _too_short(text, tokens, tokenizer):
                faults.append(f"{what}: {fault}")
    return list(dict.fromkeys(faults))


def _still_to_come(path: Path) -> bool:
    """Whether this is named as a file of text, without a folder that would have to be there, and is none."""
    return (
        path.suffix in (".txt", ".raw", ".jsonl", ".json", ".parquet") and path.name == str(path) and not path.exists()
    )


def _wanted(
    recipe: Recipe, stages: Iterable[tuple[str, Options]], faults: list[str]
) -> dict[tuple[str, Use], list[tuple[str, int]]]:
    """Tokens that each part of a text must have, and for what."""
    wanted: dict[tuple[str, Use], list[tuple[str, int]]] = {
        (text, "calibrate"): [] for text in texts_of(recipe.calibration_text)
    }
    for name, options in stages:
        if isinstance(options, Vocabulary | Pad):
            continue
        spec = (options.data if isinstance(options, Training) else "") or recipe.calibration_text
        windows = options.batch + options.held_out if isinstance(options, Training) else options.samples
        for text, share in shares_of(spec, windows).items():
            wanted.setdefault((text, "calibrate"), []).append((name, share * options.length))
    from edgepress.eval.text import held_out_of

    trained = [text for text, use in wanted if use == "calibrate"]
    spec = recipe.evaluation_text
    own = bool(recipe.text) and not held_out_of(spec, trained)
    use: Use = "whole" if own and Path(spec).is_file() else "evaluate"
    if spec == SELF:
        faults.append("--data self leaves no text to measure on; name one with --text, e.g. --text wikitext2")
    elif recipe.protocol == "windows":
        wanted.setdefault((spec, use), []).append(("measuring", recipe.tokens or recipe.window))
    else:
        wanted.setdefault((spec, use), [])
    return {key: needs for key, needs in wanted.items() if key[0] != SELF}


def _loaded(spec: str, use: Use) -> Text | None:
    """The part of a text, None where it takes long to get."""
    from edgepress.eval.text import NAMED, load_text

    if spec == "embedded":
        return _read(spec, use, 0, 0)
    path = Path(spec).expanduser()
    if spec in NAMED:
        return None
    if not path.is_file():
        return load_text(spec, use)
    found = path.stat()
    return None if found.st_size > _LARGEST_READ else _read(spec, use, found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=16)
def _read(spec: str, use: Use, size: int, changed: int) -> Text:
    """A file's text, once for all configurations of a sweep. size, changed: or it is another file's."""
    from edgepress.eval.text import load_text

    return load_text(spec, use)


def _tokenizer(model: str | None) -> tuple[Path, int] | None:
    """A model's folder with one, and when it was written; None where it takes a conversion or a download to know."""
    folder = Path(model or "").expanduser()
    files = [folder / name for name in _TOKENIZERS if (folder / name).is_file()]
    return (folder, files[0].stat().st_mtime_ns) if model and files else None


@lru_cache(maxsize=4)
def _opened(folder: Path, changed: int) -> Any:
    from edgepress.checkpoints.vocabulary import load_tokenizer

    try:
        return load_tokenizer(folder)
    except EdgepressError:
        return None  # the run says what is wrong with it; a plan needs none


@lru_cache(maxsize=256)
def _too_short(text: Text, tokens: int, tokenizer: tuple[Path, int] | None) -> str:
    """Why a text has not so many tokens, empty if it may have them."""
    size = sum(len(document.encode()) + 2 for document in text.documents)  # no token is less than a byte, but
    if size < tokens:  # for those that begin and end a document
        return f"the text '{text.name}' has at most {size} tokens; {tokens} are asked for"
    try:
        known = tokenizer is None or tokens <= 0 or _surely_has(text, tokens, tokenizer[0])
        if tokenizer is not None and not known and (opened := _opened(*tokenizer)) is not None:
            text.token_ids(opened, tokens)
    except TextError as error:
        return str(error)
    return ""


def _surely_has(text: Text, tokens: int, folder: Path) -> bool:
    """Whether so many tokens are there without those that transformers may set about a document.

    By the library under transformers' tokenizers, which takes no second to import. False where it cannot tell.
    """
    from tokenizers import Tokenizer

    if text.chats or not (folder / "tokenizer.json").is_file():
        return False
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        left = tokens
        for document in text.documents:
            left -= len(tokenizer.encode(document, add_special_tokens=False).ids)
            if left <= 0:
                return True
    except Exception:  # the library has one error for all that can be wrong with a file
        pass
    return False


# --- the chip's verdict -----------------------------------------------------------------------------------------------
# The chip's verdict in a run: by plan before it starts, measured after each stage.


CONTEXT = 256  # as `compress check`


def judge(
    shape: ModelShape, soc: Soc, name: str, file_bytes: int | None = None, timing: bool = False, levers: bool = False
) -> Verdict | str:
    """The verdict, or why there is none: a model that no chip's file can judge is compressed all the same."""
    try:
        context = min(CONTEXT, shape.positions)
        return check(shape, soc, context=context, name=name, file_bytes=file_bytes, timing=timing, levers=levers)
    except PlanError as error:
        return f"no verdict: {str(error).removeprefix('no verdict: ')}"
    except Exception as error:  # whatever it is: hours of compression must not be lost to a forecast
        return _failed(error)


def _failed(error: Exception) -> str:
    return (
        f"no verdict: the memory-map check failed on this model with {type(error).__name__}: {error}. This is a bug of "
        "the check, please report it; nothing else depends on it"
    )


def say_planned(reporter: Reporter, planned: ModelShape, soc: Soc, name: str) -> None:
    """One line before the run starts."""
    verdict = judge(planned, soc, name)
    reporter.say(f"by plan the result {verdict.line}" if isinstance(verdict, Verdict) else verdict)


def say_measured(reporter: Reporter, planned: ModelShape, found: ModelShape, soc: Soc, name: str) -> None:
    """One line after a stage, and a warning where the files need other bytes on the chip than the plan said."""
    verdict, forecast = judge(found, soc, name), judge(planned, soc, name)
    if isinstance(verdict, str) or isinstance(forecast, str):
        reporter.note(verdict if isinstance(verdict, str) else str(forecast))
        return
    reporter.say(f"  {verdict.line}")
    for use, said in zip(verdict.memories, forecast.memories, strict=True):
        if use.peak_bytes != said.peak_bytes:
            reporter.note(
                f"{use.name} must hold {size_text(use.peak_bytes)} ({use.peak_bytes} bytes), the plan said "
                f"{said.peak_bytes}; the forecast is wrong for this model, please report it"
            )


def to_dict(verdict: Verdict | str) -> dict[str, Any]:
    """For report.json."""
    if not isinstance(verdict, str):
        try:
            return verdict.to_dict()
        except Exception as error:  # as in `judge`
            verdict = _failed(error)
    return {"fits": None, "summary": verdict}

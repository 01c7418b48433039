"""Texts of a recipe, before a run: whether they are there, can be read, and are long enough."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepress.checkpoints.errors import EdgepressError, TextError
from edgepress.pipeline.recipe import Recipe
from edgepress.stages.options import Lora, Options, Pad, Vocabulary

if TYPE_CHECKING:
    from edgepress.eval.text import Text, Use

_LARGEST_READ = 64 * 2**20  # bytes of a file that a plan reads; of a larger one it only sees that it is there
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


def text_faults(recipe: Recipe, stages: Iterable[tuple[str, Options]]) -> list[str]:
    """What is wrong with the texts to calibrate, train and measure on. What lies on the hub is not asked for."""
    faults: list[str] = []
    tokenizer = _tokenizer(recipe.model)
    for (spec, use), wanted in _wanted(recipe, stages, faults).items():
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


def _wanted(
    recipe: Recipe, stages: Iterable[tuple[str, Options]], faults: list[str]
) -> dict[tuple[str, Use], list[tuple[str, int]]]:
    """Tokens that each part of a text must have, and for what."""
    wanted: dict[tuple[str, Use], list[tuple[str, int]]] = {(recipe.calibration_text, "calibrate"): []}
    for name, options in stages:
        if isinstance(options, Vocabulary | Pad):
            continue
        spec = (options.data if isinstance(options, Lora) else "") or recipe.calibration_text
        windows = options.batch + options.held_out if isinstance(options, Lora) else options.samples
        wanted.setdefault((spec, "calibrate"), []).append((name, windows * options.length))
    from edgepress.eval.text import held_out_of

    trained = [recipe.calibration_text, *(o.data for _, o in stages if isinstance(o, Lora) and o.data)]
    spec = recipe.evaluation_text
    own = bool(recipe.text) and not held_out_of(spec, trained)
    use: Use = "whole" if own and Path(spec).is_file() else "evaluate"
    if spec == "self":
        faults.append("--data self leaves no text to measure on; name one with --text, e.g. --text wikitext2")
    elif recipe.protocol == "windows":
        wanted.setdefault((spec, use), []).append(("measuring", recipe.tokens or recipe.window))
    else:
        wanted.setdefault((spec, use), [])
    return {key: needs for key, needs in wanted.items() if key[0] != "self"}


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


def _tokenizer(model: str | None) -> Any:
    """Of a model's folder, where it has one; None where it takes a conversion or a download to know."""
    folder = Path(model or "").expanduser()
    files = [folder / name for name in _TOKENIZERS if (folder / name).is_file()]
    return _opened(folder, files[0].stat().st_mtime_ns) if model and files else None


@lru_cache(maxsize=4)
def _opened(folder: Path, changed: int) -> Any:
    from edgepress.checkpoints.vocabulary import load_tokenizer

    try:
        return load_tokenizer(folder)
    except EdgepressError:
        return None  # the run says what is wrong with it; a plan needs none


@lru_cache(maxsize=256)
def _too_short(text: Text, tokens: int, tokenizer: Any) -> str:
    """Why a text has not so many tokens, empty if it may have them."""
    size = sum(len(document.encode()) + 2 for document in text.documents)  # no token is less than a byte, but
    if size < tokens:  # for those that begin and end a document
        return f"the text '{text.name}' has at most {size} tokens; {tokens} are asked for"
    try:
        if tokenizer is not None and tokens > 0:
            text.token_ids(tokenizer, tokens)
    except TextError as error:
        return str(error)
    return ""

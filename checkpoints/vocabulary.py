"""Load tokenizers, and cut one down to the tokens that a text uses.

Works on the definition that the `tokenizers` library writes (tokenizer.json). A BPE piece is made from smaller ones,
so those it passes through stay as well, and merges whose parts are gone go with them; what is left of the merges
keeps its order. Every single byte stays, so that any other text can still be written. No torch here.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepress.checkpoints.config import hf_config
from edgepress.checkpoints.errors import CheckpointError, PlanError
from edgepress.checkpoints.manifest import require_name, require_own_links, write_bytes, write_json
from edgepress.checkpoints.quiet import readable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE = "▁"  # SentencePiece's space: decoders turn the piece, not its bytes, back into a space
# What the definition says already, or says by the old numbers.
_SETTLED = ("added_tokens_decoder", "auto_map", "add_bos_token", "add_eos_token", "tokenizer_file", "vocab_file")
_TOKEN_LISTS = ("suppress_tokens", "begin_suppress_tokens")
_TOKEN_PHRASES = ("bad_words_ids", "force_words_ids")


@dataclass(frozen=True)
class Trimmed:
    """What is left of a tokenizer: a token's new id is the place of its old one in `kept`."""

    kept: tuple[int, ...]
    definition: dict[str, Any]  # tokenizer.json
    settings: dict[str, Any]  # tokenizer_config.json
    whole: bool  # every token that the text uses was kept
    template: str | None = None  # for conversations

    @property
    def new_ids(self) -> dict[int, int]:
        return {old: new for new, old in enumerate(self.kept)}

    def write(self, folder: Path) -> None:
        """The files from which transformers reads the tokenizer."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "tokenizer.json", self.definition)
        write_json(folder / "tokenizer_config.json", self.settings)
        if self.template is not None:
            write_bytes(folder / "chat_template.jinja", self.template.encode())


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder. Raises CheckpointError if the folder holds none."""
    from transformers import AutoTokenizer

    require_own_links(folder)
    _require_own_files(folder)
    try:
        with readable(f"{folder} holds no tokenizer that transformers can read"):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            tokenizer("a")  # some that can be built cannot write a letter
    except CheckpointError:
        if (folder / "config.json").is_file():
            hf_config(folder)  # transformers reads it for the tokenizer too, and it may be to blame
        raise
    if getattr(getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None), "dropout", None):
        raise CheckpointError(
            f"{folder}: its tokenizer.json states dropout, so the same text would be other tokens each time; set it to "
            "null there"
        )
    return tokenizer


def _require_own_files(folder: Path) -> None:
    """Raise CheckpointError where the tokenizer's settings name a file elsewhere, which transformers would read."""
    path = folder / "tokenizer_config.json"
    try:
        settings = json.loads(path.read_text()) if path.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return  # transformers says what is wrong with it
    for key, name in settings.items() if isinstance(settings, dict) else ():
        if key.endswith("_file") and isinstance(name, str) and (Path(name).is_absolute() or ".." in Path(name).parts):
            require_name(name, f"{path} ({key})")


def trim(
    folder: Path, tokenizer: PreTrainedTokenizerBase, used: Mapping[int, int], rows: int, limit: int = 0
) -> Trimmed:
    """Keep the tokens in `used` (id -> how often) and all that are needed to write any text.

    folder: where the tokenizer's and the model's configurations lie; the ids they name stay. rows: of the embedding;
    tokens beyond it cannot be used and go. limit: at most so many tokens, the most used ones; 0 keeps all.
    Raises PlanError for a tokenizer that cannot be cut, or a limit below what is always needed.
    """
    definition = _definition(tokenizer)
    pieces = _MODELS[definition["model"]["type"]](definition["model"])
    added = {entry["content"]: entry for entry in definition["added_tokens"]}
    names = {id: piece for piece, id in pieces.ids.items()} | {e["id"]: name for name, e in added.items()}

    said = (*_named_ids(folder), *_processor_ids(definition.get("post_processor")), *template_ids(tokenizer))
    needed = {id for id in said if id in names}
    needed |= {entry["id"] for entry in added.values() if entry["special"]} | set(pieces.always())
    needed |= {id for token in tokenizer.all_special_tokens if (id := _id_of(tokenizer, token)) is not None}
    kept: set[int] = set()

    def with_parts(id: int) -> set[int]:
        return {i for i in ({id} if names[id] in added else {id, *pieces.parts(names[id])}) if i < rows}

    for id in needed:
        kept |= with_parts(id)
    if limit and len(kept) > limit:
        raise PlanError(
            f"--vocabulary-size {limit}: special tokens, single bytes and the chat template alone are {len(kept)}"
        )
    whole = True
    for id in sorted((id for id in used if id not in kept), key=lambda id: (-used[id], id)):
        more = with_parts(id) - kept
        if limit and len(kept) + len(more) > limit:
            whole = False
        else:
            kept |= more

    order = tuple(sorted(kept))
    new = {old: place for place, old in enumerate(order)}
    definition["model"] = pieces.cut(new)
    definition["added_tokens"] = [e | {"id": new[e["id"]]} for e in definition["added_tokens"] if e["id"] in new]
    _renumber_processor(definition.get("post_processor"), new)
    if definition.get("padding"):
        definition["padding"]["pad_id"] = new.get(definition["padding"]["pad_id"], 0)
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None
    trimmed = Trimmed(order, definition, _settings(folder, tokenizer), whole, template)
    _prove_ids(trimmed, names)
    return trimmed


def count_ids(rows: Iterable[Iterable[int]]) -> dict[int, int]:
    """How often each id occurs."""
    counts: Counter[int] = Counter()
    for ids in rows:
        counts.update(ids)
    return dict(counts)


def renumber_config(config: Mapping[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    """A configuration whose token ids (bos_token_id and the like) are the new ones; ids that are gone become null."""

    def one(id: Any) -> Any:
        return new.get(id) if isinstance(id, int) and id >= 0 else id

    changed = dict(config)
    for key, value in config.items():
        if key.endswith("_token_id"):
            changed[key] = [i for i in map(one, value) if i is not None] if isinstance(value, list) else one(value)
        elif key in _TOKEN_LISTS and value:
            changed[key] = [new[i] for i in value if i in new]
        elif key in _TOKEN_PHRASES and value:
            changed[key] = [[new[i] for i in phrase] for phrase in value if all(i in new for i in phrase)]
    return changed


def template_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that the chat template itself writes around a conversation."""
    if not tokenizer.chat_template:
        return set()
    from jinja2 import TemplateError

    talk = [{"role": role, "content": ""} for role in ("user", "assistant", "user")]
    try:
        text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    except (TemplateError, ValueError, TypeError):
        return set()  # a template for other roles; its special tokens stay in any case
    return set(tokenizer(str(text), add_special_tokens=False)["input_ids"])


# --- the models of the tokenizers library ---------------------------------------------------------------------------


class _Bpe:
    """Pieces built by merging two neighbours at a time, the merge that stands first in the list first."""

    def __init__(self, model: dict[str, Any]) -> None:
        if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
            raise PlanError("this tokenizer marks the inside or end of words on its pieces; it cannot be trimmed")
        self.model = model
        self.ids: dict[str, int] = model["vocab"]
        self.ranks = {(left, right): rank for rank, (left, right) in enumerate(model["merges"])}

    def always(self) -> set[int]:
        return _smallest(self.ids, bool(self.model.get("byte_fallback"))) | _known(self.ids, self.model["unk_token"])

    def parts(self, piece: str) -> list[int]:
        """The pieces that stand in the word while this one is built.

        Merges inside a piece never look beyond its ends, else it would not have come out; so building the piece
        alone gives the same ones as any text does.
        """
        symbols, passed = list(piece), set(piece)
        while len(symbols) > 1:
            pairs = enumerate(pairwise(symbols))
            ranked = [(self.ranks[pair], place) for place, pair in pairs if pair in self.ranks]
            if not ranked:
                break
            place = min(ranked)[1]
            symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
            passed.add(symbols[place])
        return [self.ids[p] for p in passed if p in self.ids]

    def cut(self, new: Mapping[int, int]) -> dict[str, Any]:
        vocabulary = {p: new[id] for p, id in sorted(self.ids.items(), key=lambda entry: entry[1]) if id in new}
        merges = [[a, b] for a, b in self.model["merges"] if {a, b, a + b} <= vocabulary.keys()]
        return self.model | {"vocab": vocabulary, "merges": merges}


class _Unigram:
    """Pieces with scores, of which the best sum over a text wins. Pieces that never win can go without a trace."""

    def __init__(self, model: dict[str, Any]) -> None:
        self.model = model
        self.ids = {piece: id for id, (piece, _) in enumerate(model["vocab"])}

    def always(self) -> set[int]:
        # An unknown character's score is the least of all pieces less ten: the piece that sets it has to stay.
        scores = [score for _, score in self.model["vocab"]]
        least = {min(range(len(scores)), key=scores.__getitem__)}
        unknown = {self.model["unk_id"]} if self.model.get("unk_id") is not None else set()
        return _smallest(self.ids, bool(self.model.get("byte_fallback"))) | least | unknown

    def parts(self, piece: str) -> list[int]:
        return []

    def cut(self, new: Mapping[int, int]) -> dict[str, Any]:
        unknown = self.model.get("unk_id")
        kept = [entry for id, entry in enumerate(self.model["vocab"]) if id in new]
        return self.model | {"vocab": kept, "unk_id": None if unknown is None else new[unknown]}


_MODELS: dict[str, Callable[[dict[str, Any]], _Bpe | _Unigram]] = {"BPE": _Bpe, "Unigram": _Unigram}


def _smallest(ids: Mapping[str, int], byte_fallback: bool) -> set[int]:
    """The pieces from which any text can be written: the 256 bytes, or else every single character."""
    found = {id for piece, id in ids.items() if _BYTE.fullmatch(piece)}
    if not byte_fallback or len(found) < 256:
        found |= {id for piece, id in ids.items() if len(piece) == 1}
    return found | _known(ids, _SPACE)


def _known(ids: Mapping[str, int], piece: str | None) -> set[int]:
    return set() if piece is None or piece not in ids else {ids[piece]}


# --- the files ------------------------------------------------------------------------------------------------------


def _definition(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise PlanError(
            f"a {type(tokenizer).__name__} cannot be trimmed: it has no tokenizer.json. Save the tokenizer once with "
            "transformers, in the format of the tokenizers library"
        )
    definition: dict[str, Any] = json.loads(backend.to_str())
    kind = definition["model"].get("type")
    if kind not in _MODELS:
        raise PlanError(f"a tokenizer of the type {kind} cannot be trimmed; {' and '.join(_MODELS)} can")
    return definition


def _named_ids(folder: Path) -> set[int]:
    """The token ids that the model's configurations name."""
    found: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        if (folder / name).is_file():
            for key, value in json.loads((folder / name).read_text()).items():
                if key.endswith("_token_id"):
                    found |= {id for id in (value if isinstance(value, list) else [value]) if isinstance(id, int)}
    return found


def _id_of(tokenizer: PreTrainedTokenizerBase, token: str) -> int | None:
    id = tokenizer.convert_tokens_to_ids(token)
    return id if isinstance(id, int) else None


def _settings(folder: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """tokenizer_config.json for a tokenizer that is read from its definition alone, whatever class it had."""
    path = folder / "tokenizer_config.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    named = {key: value for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    settings = named | {key: value for key, value in found.items() if key not in _SETTLED}
    return settings | {"tokenizer_class": "PreTrainedTokenizerFast"}


def _processor_ids(processor: dict[str, Any] | None) -> set[int]:
    """The ids that a post-processor puts around a text."""
    if not processor:
        return set()
    found = {id for part in processor.get("processors", []) for id in _processor_ids(part)}
    found |= {id for token in (processor.get("special_tokens") or {}).values() for id in token["ids"]}
    return found | {processor[end][1] for end in ("sep", "cls") if end in processor}


def _renumber_processor(processor: dict[str, Any] | None, new: Mapping[int, int]) -> None:
    """The same ids, made the new ones in place."""
    if not processor:
        return
    for part in processor.get("processors", []):
        _renumber_processor(part, new)
    for token in (processor.get("special_tokens") or {}).values():
        token["ids"] = [new[id] for id in token["ids"]]
    for end in ("sep", "cls"):
        if end in processor:
            processor[end] = [processor[end][0], new[processor[end][1]]]


def _prove_ids(trimmed: Trimmed, names: Mapping[int, str]) -> None:
    """Raise PlanError unless the library reads every kept token back under its new id."""
    from tokenizers import Tokenizer

    read = Tokenizer.from_str(json.dumps(trimmed.definition))
    wrong = [names[old] for new, old in enumerate(trimmed.kept) if read.token_to_id(names[old]) != new]
    if wrong or read.get_vocab_size() != len(trimmed.kept):
        raise PlanError(
            f"this tokenizer cannot be trimmed: renumbered, {len(wrong)} of its tokens would get another id"
            + (f", {wrong[0]!r} first" if wrong else "")
        )

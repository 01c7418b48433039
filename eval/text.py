"""Read texts to calibrate, train and measure on, and keep the measured ones out of the others.

Sources: `embedded` (English prose that every Python has on disk), `wikitext2` and `c4` (from the hub), the
instruction data `trivia_qa` and `alpaca` (from the hub), or a .txt, .raw, .jsonl, .json or .parquet file.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgepress.checkpoints.errors import TextError, near
from edgepress.checkpoints.lazy import torch
from edgepress.eval.chat import in_template
from edgepress.eval.rows import FORMS_TEXT, SUFFIXES, file_texts, hub_rows, read_utf8, require_plain, usable_texts

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


Use = Literal["calibrate", "evaluate", "whole"]
# Instruction data on the hub: its name, configuration, split to train on, split to measure on if it has one, columns.
INSTRUCTIONS: dict[str, tuple[str, str | None, str, str | None, list[str]]] = {
    "trivia_qa": ("mandarjoshi/trivia_qa", "rc.nocontext", "train", "validation", ["question", "answer"]),
    "alpaca": ("tatsu-lab/alpaca", None, "train", None, ["instruction", "input", "output"]),
}
NAMED = ("embedded", "wikitext2", "c4", *INSTRUCTIONS)
END_OF_TEXT = "<|endoftext|>"  # separates stories in TinyStories' files
_CHATS_AT_ONCE = 256
FIRST_PART = " (first four fifths)"  # ends the name of a text of which the rest is kept for measuring
_HELD_OUT = 5  # of a user's file, every last fifth is kept for measuring


@dataclass(frozen=True)
class Text:
    """Documents, each tokenised on its own and put one after the other."""

    name: str
    documents: tuple[str, ...]
    exchanges: bool = False  # questions with answers: the tokenizer's end token closes each
    chats: bool = False  # each document is JSON, a list of {role, content}; the tokenizer's chat template writes it
    answers: tuple[int, ...] = ()  # of exchanges: where in each document the answer begins, 0 where nothing is asked
    whole_rows: bool = False  # documents are a data set's rows, each a text of its own however many lines it has

    @cached_property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for document in self.documents:
            digest.update(f"{len(document)} ".encode() + document.encode())
        if self.whole_rows and any("\n" in document.strip() for document in self.documents):
            digest.update(b"rows")  # its lines were rows once
        return digest.hexdigest()

    def token_ids(self, tokenizer: PreTrainedTokenizerBase, limit: int | None = None) -> Tensor:
        """One sequence (tokens,) int64 of all documents, or of as many as give `limit` tokens.

        Raises TextError where there are fewer than `limit`.
        """
        ids: list[int] = []
        for found in self._tokenised(tokenizer, limit):
            ids += found
            if limit is not None and len(ids) >= limit:
                return torch.tensor(ids[:limit])
        if limit is not None:
            raise TextError(f"the text '{self.name}' has {len(ids)} tokens; {limit} are asked for")
        return torch.tensor(ids)

    def _tokenised(self, tokenizer: Any, limit: int | None = None) -> Iterator[list[int]]:
        """Each document's ids, with the end token after an exchange; what lies far behind `limit` tokens may be cut."""
        # A text shorter than the model's positions is the exception here; transformers would warn each time.
        tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
        end = getattr(tokenizer, "eos_token_id", None) if self.exchanges else None
        read = 0
        for document in self._in_templates(tokenizer) if self.chats else self.documents:
            if self.chats:  # special tokens are the template's
                ids = list(tokenizer(document, add_special_tokens=False)["input_ids"])
            else:
                ids = list(tokenizer(_enough(document, limit, read))["input_ids"])
            if end is not None and ids and ids[-1] != end:  # some tokenizers add it themselves
                ids.append(end)
            read += len(ids)
            yield ids

    def row_ids(self, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
        """The ids of each row: of a data set's rows and exchanges one by one, else of each line that is not empty."""
        text = self
        if not (self.whole_rows or self.exchanges or self.chats):
            text = replace(self, documents=tuple(self.rows()), whole_rows=True)
        return text._tokenised(tokenizer)

    def learnt(self, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[list[int], int]]:
        """Each document's ids, and at which of them its answer begins: 0 where nothing is asked.

        What is asked reads as when the model is measured, so the answer begins where the ids are no longer those of
        the prompt alone. Raises TextError for conversations, whose turns a template joins.
        """
        if self.chats:
            raise TextError(
                f"the text '{self.name}' holds conversations, in which answers are not told from what was asked; use "
                "--lora-loss all, or rows of what was asked and what was answered"
            )
        starts = self.answers or (0,) * len(self.documents)
        for document, start, ids in zip(self.documents, starts, self._tokenised(tokenizer), strict=True):
            asked = tokenizer(document[:start])["input_ids"] if start else []
            yield ids, next((i for i, (a, b) in enumerate(zip(asked, ids, strict=False)) if a != b), len(asked))

    def _in_templates(self, tokenizer: Any) -> Iterator[str]:
        """Conversations as the tokenizer's own chat template writes them."""
        if not getattr(tokenizer, "chat_template", None):
            raise TextError(
                f"the text '{self.name}' holds conversations, and the tokenizer has no chat template to write them "
                f"with; give rows with the fields {FORMS_TEXT}"
            )
        where = Path(getattr(tokenizer, "name_or_path", "") or "the model")
        for start in range(0, len(self.documents), _CHATS_AT_ONCE):
            turns = [json.loads(document) for document in self.documents[start : start + _CHATS_AT_ONCE]]
            yield from in_template(tokenizer, turns, where, f"the text '{self.name}'", answer_next=False)

    def rows(self) -> list[str]:
        """Rows that are not empty: a data set's own, else lines, as WikiText-2's are. Raises TextError for chats."""
        if self.chats:
            raise TextError(f"the text '{self.name}' holds conversations, which have no rows; use --protocol windows")
        if self.whole_rows:
            return [document for document in self.documents if document.strip()]
        return [line for document in self.documents for line in document.splitlines() if line.strip()]


def starts_with_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer by its own habit puts its start token before a text."""
    start = getattr(tokenizer, "bos_token_id", None)
    return start is not None and list(tokenizer("a")["input_ids"])[:1] == [start]


def _enough(document: str, limit: int | None, have: int) -> str:
    # No tokenizer here makes more than one token a byte, and few make less than one in 16 characters; cutting
    # far behind the limit saves tokenising all of WikiText for its first 16,384 tokens.
    return document if limit is None else document[: 16 * (limit - have) + 4096]


def load_text(spec: str, use: Use) -> Text:
    """The text a user names, or the part of it for this use.

    embedded: one half each. wikitext2 and trivia_qa: the training split, the split to measure on. alpaca, which has
    one split, and a file: the first four fifths, the last fifth. Raises TextError saying what to pass instead.
    """
    if spec == "embedded":
        return _embedded(use)
    if spec == "wikitext2":
        return _wikitext2(use)
    if spec == "c4":
        return _c4(use)
    if spec in INSTRUCTIONS:
        return _instructions(spec, use)
    path = Path(spec).expanduser()
    if not path.is_file():
        raise TextError(f"there is no text '{spec}'{near(spec, NAMED)}: not one of {', '.join(NAMED)}, and not a file")
    text = read_file(path)
    return text if use == "whole" else _part(text, use, path)


def held_out_of(spec: str, others: Iterable[str]) -> bool:
    """Whether a file to measure on, by whatever path, is also one to train on: then only its last fifth is measured."""
    path = Path(spec).expanduser()
    trained = [Path(other).expanduser() for other in others]
    return path.is_file() and any(other.is_file() and path.samefile(other) for other in trained)


def _part(text: Text, use: Use, origin: Path | str) -> Text:
    """The first four fifths of a text's documents, or of its lines where it has few documents; or the rest."""
    answers = text.answers
    if len(text.documents) >= _HELD_OUT:
        cut = len(text.documents) * (_HELD_OUT - 1) // _HELD_OUT
        parts: Sequence[tuple[str, ...]] = (text.documents[:cut], text.documents[cut:])
        answers = answers[:cut] if use == "calibrate" else answers[cut:]
    else:
        whole = "\n".join(text.documents)
        cut = whole.find("\n", len(whole) * (_HELD_OUT - 1) // _HELD_OUT) + 1
        if cut == 0:
            raise TextError(f"{origin} has no line end in its last fifth to be split at; give --text as well as --data")
        parts, answers = ((whole[:cut],), (whole[cut:],)), ()
    first = use == "calibrate"
    name = text.name + (FIRST_PART if first else " (last fifth)")
    rows = text.whole_rows and len(text.documents) >= _HELD_OUT
    return Text(name, parts[0 if first else 1], text.exchanges, text.chats, answers, rows)


def read_file(path: Path) -> Text:
    """A text file, JSON lines, JSON or parquet; rows as in eval/rows.py. Raises TextError naming each bad row."""
    if path.suffix.lower() in SUFFIXES:
        texts, chats = file_texts(path)
        return _of_rows(path.name, texts, chats)
    require_plain(path)
    try:
        text = read_utf8(path)
    except OSError as error:
        raise TextError(f"{path} cannot be read as text: {error}") from None
    require_plain(path, text)
    parts = text.split(END_OF_TEXT)
    if not any(part.strip() for part in parts):
        raise TextError(f"{path} holds no text: it is empty or has nothing but spaces")
    return Text(path.name, tuple(part.strip() for part in parts if part.strip()) if len(parts) > 1 else (parts[0],))


def _of_rows(name: str, texts: Sequence[tuple[str, int]], chats: bool = False) -> Text:
    answers = tuple(answer for _, answer in texts)
    exchanges = any(answers)
    return Text(name, tuple(text for text, _ in texts), exchanges, chats, answers if exchanges else (), whole_rows=True)


def _embedded(use: Use) -> Text:
    """The topics that pydoc's help() prints, in two halves of nearly equal size that share no paragraph."""
    topics = importlib.import_module("pydoc_data.topics").topics
    documents = without_repeats(sorted(set(topics.values()), key=lambda text: (-len(text), text)))
    if use == "whole":
        return Text("embedded", tuple(documents))
    halves: tuple[list[str], list[str]] = ([], [])
    for document in documents:  # the longest first, each to the shorter half
        min(halves, key=lambda half: sum(map(len, half))).append(document)
    first = use == "calibrate"
    return Text(f"embedded ({'calibration' if first else 'held-out'} half)", tuple(halves[0 if first else 1]))


def without_repeats(documents: Sequence[str]) -> list[str]:
    """Documents without the paragraphs that an earlier one has already.

    Many help topics are sections of longer ones, word for word: split as they are, the half to measure on would
    repeat what the other half calibrated on. Paragraphs under 40 characters, headings mostly, may recur.
    """
    seen: set[str] = set()
    kept = []
    for document in documents:
        paragraphs = []
        for paragraph in re.split(r"\n\s*\n", document):
            words = " ".join(paragraph.split())
            if len(words) < 40 or words not in seen:
                paragraphs.append(paragraph)
            seen.add(words)
        if sum(map(len, paragraphs)) >= 200:  # less is a heading whose text is gone
            kept.append("\n\n".join(paragraphs))
    return kept


def _wikitext2(use: Use) -> Text:
    split = "train" if use == "calibrate" else "test"
    rows = _hub("Salesforce/wikitext", "wikitext-2-raw-v1", split, "wikitext2")
    # The hub stores the file's blank lines as empty rows; put back, the text is the original file's.
    return Text(f"wikitext2 ({split})", ("".join(row["text"] or " \n" for row in rows),))


def _c4(use: Use) -> Text:
    if use == "evaluate":
        return _wikitext2(use)
    rows = _hub("allenai/c4", "en", "train", "c4", take=4000)
    return Text("c4 (train, first 4000 documents)", tuple(row["text"] for row in rows))


def _instructions(spec: str, use: Use) -> Text:
    """Questions and answers, or instructions and responses; rows that the hub has without an answer are left out."""
    name, config, training, measuring, columns = INSTRUCTIONS[spec]
    split = measuring if use == "evaluate" and measuring else training
    rows = _hub(name, config, split, spec, columns=columns, instead=f"rows with the fields {FORMS_TEXT}")
    texts, unusable = usable_texts(rows)
    if not texts:
        raise TextError(f"the data set '{spec}' has no row with a question and its answer")
    left_out = f", {unusable} rows without an answer left out" if unusable else ""
    whole = _of_rows(f"{spec} ({split}{left_out})", texts)
    return whole if measuring or use == "whole" else _part(whole, use, spec)


def _hub(
    name: str, config: str | None, split: str, spec: str, take: int | None = None,
    columns: list[str] | None = None, instead: str = "",
) -> list[dict[str, Any]]:  # fmt: skip
    form = f".jsonl, .json or .parquet, {instead}" if instead else ".txt, .raw, .jsonl, .json, .parquet"
    instead = f"a local file ({form}), or 'embedded', which needs no network"
    rows = hub_rows(name, config, split, spec, instead, stream=take is not None, columns=columns)
    return list(itertools.islice(rows, take))


# --- overlap ----------------------------------------------------------------------------------------------------------
# Training text without what is measured on: documents that share words with the measuring text are found and left
# out.
#
# Texts are compared as lower-case words, so that file formats, line ends, wrapping and punctuation do not matter. A
# piece of 50 words counts as shared where half of its 13-word windows or more stand in the measuring text: windows of
# 13 words as in GPT-3's decontamination (Brown et al. 2020, arXiv 2005.14165, appendix C), pieces of 50 as in Lee et
# al. 2022 (arXiv 2107.06499). A document, or what was asked in it, of less than 13 words is shared where it is there
# as a whole.
#
# A number or letter at the beginning of a line ("12. ", "(b) ") may be the line's, as in a list, or the text's: a
# document is compared both with all of them and without.


WINDOW, PIECE = 13, 50
_COMMON = 10  # a window in more measured documents than this is a phrase of the form, not of a document
_SHORTEST = 4  # words; less, such as a heading, may recur
_SHORTEST_UNIT = 5  # words of a line or sentence; less may recur
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W_\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+")
_HIDDEN = re.compile(r"[\u00ad\u200b-\u200f\u2060\ufeff]")  # soft hyphens and the like, which nobody sees
_LABEL = re.compile(r"(?m)^[^\w\n]*(?:\d[\d.:,/-]*(?!\w)|(?:[a-z]|[ivxlc]+)[.):\]])[^\w\n]*", re.IGNORECASE)
_UNITS = (re.compile(r"\n"), re.compile(r"[.!?]\s+"))  # ends of lines, of sentences
_ANSWER = re.compile(r"[\n ](?:Answer|Response):")
_Hashes = NDArray[np.uint64]


@dataclass(frozen=True)
class Measured:
    """What the measuring text holds: hashes of its windows of words, sorted, and of its short documents and units."""

    windows: _Hashes
    documents: frozenset[int]
    units: tuple[frozenset[int], ...] = (frozenset(),) * len(_UNITS)  # of each kind

    @classmethod
    def of(cls, text: Text) -> Measured:
        documents, parts = set(), []
        units: list[Counter[int]] = [Counter() for _ in _UNITS]
        for document in text.documents:
            spellings = _spellings(document)
            for seen, kind in zip(units, _UNITS, strict=True):
                seen.update({unit for s in spellings for unit, _ in _units(s, kind) if unit is not None})
            documents |= {whole for s in spellings for whole in _wholes(s, _words(s), text.exchanges)}
            parts.append(np.unique(np.concatenate([_windows(_words(s)) for s in spellings])))
        found, counts = np.unique(np.concatenate([*parts, np.empty(0, np.uint64)]), return_counts=True)
        rare = (frozenset(unit for unit, count in seen.items() if count <= _COMMON) for seen in units)
        return cls(found[counts <= _COMMON], frozenset(documents), tuple(rare))

    def shares(self, document: str, exchange: bool) -> bool:
        return any(self._shares(spelling, exchange) for spelling in _spellings(document))

    def _shares(self, document: str, exchange: bool) -> bool:
        words = _words(document)
        if any(whole in self.documents for whole in _wholes(document, words, exchange)):
            return True
        if any(_half_known(document, kind, known) for kind, known in zip(_UNITS, self.units, strict=True) if known):
            return True
        hashes = _windows(words)
        if not hashes.size or not self.windows.size:
            return False
        places = np.searchsorted(self.windows, hashes).clip(max=self.windows.size - 1)
        known = np.concatenate([[0], np.cumsum(self.windows[places] == hashes)])
        starts = np.arange(0, max(1, hashes.size - PIECE + WINDOW), PIECE // 2)
        ends = np.minimum(starts + PIECE - WINDOW + 1, hashes.size)
        return bool(np.any(2 * (known[ends] - known[starts]) >= ends - starts))


def without_measured(text: Text, measured: Measured) -> tuple[Text, int, int]:
    """The text without what it shares; how many documents were left out, and of how many; of a few long ones, passages.

    A text that shares nothing comes back as it is.
    """
    answers = text.answers
    if len(text.documents) >= 5:
        places = [i for i, d in enumerate(text.documents) if not measured.shares(d, text.exchanges)]
        kept, answers = [text.documents[i] for i in places], tuple(answers[i] for i in places) if answers else ()
        left_out, of = len(text.documents) - len(kept), len(text.documents)
    else:
        kept, left_out, of, answers = [], 0, 0, ()
        for document in text.documents:
            passages = list(_passages(document))
            own = [passage for passage in passages if not measured.shares(passage, text.exchanges)]
            left_out, of = left_out + len(passages) - len(own), of + len(passages)
            kept += ["".join(own)] if own else []
    return (replace(text, documents=tuple(kept), answers=answers) if left_out else text), left_out, of


def _passages(document: str) -> Iterator[str]:
    """Whole lines together that hold a piece's words."""
    lines: list[str] = []
    words = 0
    for line in document.splitlines(keepends=True):
        lines.append(line)
        words += len(line.split())
        if words >= PIECE:
            yield "".join(lines)
            lines, words = [], 0
    if lines:
        yield "".join(lines)


def _spellings(document: str) -> list[str]:
    """The document, and it without what may number its lines, where something does."""
    bare = _LABEL.sub("", document)
    return [document] if bare == document else [document, bare]


def _half_known(document: str, kind: re.Pattern[str], known: frozenset[int]) -> bool:
    """Whether half of the words of some piece stand in units that are known."""
    units = list(_units(document, kind))
    if not any(unit in known for unit, _ in units):
        return False
    marks = np.repeat([unit in known for unit, _ in units], [count for _, count in units])
    total = np.concatenate([[0], np.cumsum(marks)])
    starts = np.arange(0, max(1, marks.size - PIECE + 1), PIECE // 2)
    ends = np.minimum(starts + PIECE, marks.size)
    return bool(np.any(2 * (total[ends] - total[starts]) >= ends - starts))


def _units(document: str, kind: re.Pattern[str]) -> Iterator[tuple[int | None, int]]:
    """A hash of each line or sentence, None for a short one, and its number of words."""
    for part in kind.split(document):
        words = _words(part)
        yield (hash(words.tobytes()) if len(words) >= _SHORTEST_UNIT else None), len(words)


def _words(document: str) -> _Hashes:
    if not document.isascii():  # one spelling of what looks the same
        document = unicodedata.normalize("NFKC", _HIDDEN.sub("", document))
    words = _WORD.findall(document.casefold())
    return np.fromiter(map(hash, words), np.int64, len(words)).view(np.uint64)


def _windows(words: _Hashes) -> _Hashes:
    """A hash of each run of WINDOW words."""
    if len(words) < WINDOW:
        return np.empty(0, np.uint64)
    total = np.zeros(len(words) - WINDOW + 1, np.uint64)
    for place in range(WINDOW):
        total = total * np.uint64(0x9E3779B97F4A7C15) + words[place : place + total.size]
    return total


def _wholes(document: str, words: _Hashes, exchange: bool) -> Iterator[int]:
    """A hash of a short document, and of what was asked in an exchange."""
    if _SHORTEST <= len(words) < WINDOW:
        yield hash(words.tobytes())
    if exchange and (mark := _ANSWER.search(document)):
        asked = _words(document[: mark.start()])
        if len(asked) > _SHORTEST:
            yield hash(asked.tobytes())

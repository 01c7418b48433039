"""Text to calibrate, train and measure on; the two kinds never overlap.

Sources: `embedded` (English prose that every Python has on disk), `wikitext2` and `c4` (from the hub),
or a .txt, .raw, .jsonl, .json or .parquet file.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from checkpoints.errors import TextError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Use = Literal["calibrate", "evaluate", "whole"]
NAMED = ("embedded", "wikitext2", "c4")
END_OF_TEXT = "<|endoftext|>"  # separates stories in TinyStories' files
_HELD_OUT = 5  # of a user's file, every last fifth is kept for measuring


@dataclass(frozen=True)
class Text:
    """Documents, each tokenised on its own and put one after the other."""

    name: str
    documents: tuple[str, ...]

    @cached_property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for document in self.documents:
            digest.update(f"{len(document)} ".encode() + document.encode())
        return digest.hexdigest()

    def token_ids(self, tokenizer: PreTrainedTokenizerBase, limit: int | None = None) -> Tensor:
        """One sequence (tokens,) int64 of all documents, or of as many as give `limit` tokens.

        Raises TextError where there are fewer than `limit`.
        """
        # A text shorter than the model's positions is the exception here; transformers would warn each time.
        tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
        ids: list[int] = []
        for document in self.documents:
            ids += tokenizer(_enough(document, limit, len(ids)))["input_ids"]
            if limit is not None and len(ids) >= limit:
                return torch.tensor(ids[:limit])
        if limit is not None:
            raise TextError(f"the text '{self.name}' has {len(ids)} tokens; {limit} are asked for")
        return torch.tensor(ids)

    def rows(self) -> list[str]:
        """Lines that are not empty: WikiText-2's rows, or the lines of any other text."""
        return [line for document in self.documents for line in document.splitlines() if line.strip()]


def _enough(document: str, limit: int | None, have: int) -> str:
    # No tokenizer here makes more than one token a byte, and few make less than one in 16 characters; cutting
    # far behind the limit saves tokenising all of WikiText for its first 16,384 tokens.
    return document if limit is None else document[: 16 * (limit - have) + 4096]


def load_text(spec: str, use: Use) -> Text:
    """The text a user names, or the part of it for this use.

    embedded: one half each. wikitext2: the training split, the test split. A file: its first four fifths,
    its last fifth. Raises TextError saying what is there and what to pass instead.
    """
    if spec == "embedded":
        return _embedded(use)
    if spec == "wikitext2":
        return _wikitext2(use)
    if spec == "c4":
        return _c4(use)
    path = Path(spec).expanduser()
    if not path.is_file():
        raise TextError(f"there is no text '{spec}': not one of {', '.join(NAMED)}, and not a file")
    text = read_file(path)
    if use == "whole":
        return text
    if len(text.documents) >= _HELD_OUT:
        cut = len(text.documents) * (_HELD_OUT - 1) // _HELD_OUT
        parts: Sequence[tuple[str, ...]] = (text.documents[:cut], text.documents[cut:])
    else:
        whole = "\n".join(text.documents)
        cut = whole.find("\n", len(whole) * (_HELD_OUT - 1) // _HELD_OUT) + 1
        if cut == 0:
            raise TextError(f"{path} has no line end in its last fifth to be split at; give --text as well as --data")
        parts = ((whole[:cut],), (whole[cut:],))
    first = use == "calibrate"
    return Text(f"{path.name} ({'first four fifths' if first else 'last fifth'})", parts[0 if first else 1])


def read_file(path: Path) -> Text:
    """A text file, JSON lines, JSON or parquet; rows need a `text`, or instruction and answer fields."""
    try:
        if path.suffix == ".jsonl":
            rows = [
                _json_line(path, n, line) for n, line in enumerate(path.read_text().splitlines(), 1) if line.strip()
            ]
        elif path.suffix == ".json":
            rows = json.loads(path.read_text())
        elif path.suffix == ".parquet":
            from pyarrow import parquet

            rows = parquet.read_table(path).to_pylist()
        else:
            parts = path.read_text().split(END_OF_TEXT)
            return Text(
                path.name, tuple(part.strip() for part in parts if part.strip()) if len(parts) > 1 else (parts[0],)
            )
    except (ValueError, OSError) as error:  # undecodable bytes, JSON, and pyarrow's own are all ValueErrors
        raise TextError(f"{path} cannot be read as {path.suffix or 'text'}: {error}") from None
    if not isinstance(rows, list):
        raise TextError(f"{path} must hold a list of rows")
    return Text(path.name, tuple(_row_text(path, n, row) for n, row in enumerate(rows, 1)))


def _json_line(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise TextError(f"{path}, line {number}: not JSON ({error.msg})") from None


def _row_text(path: Path, number: int, row: Any) -> str:
    """A row's text: `text`, or what was asked and what was answered, one after the other."""
    if isinstance(row, str):
        return row
    fields = ("text",), ("instruction", "input", "output"), ("prompt", "answer"), ("context", "answer")
    for names in fields:
        if isinstance(row, dict) and isinstance(row.get(names[0]), str):
            return "\n".join(str(row[name]) for name in names if row.get(name))
    raise TextError(f"{path}, row {number}: no text field; rows need one of {', '.join(f[0] for f in fields)}")


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


def _hub(name: str, config: str, split: str, spec: str, take: int | None = None) -> list[dict[str, Any]]:
    instead = "a local file (.txt, .raw, .jsonl, .json, .parquet), or 'embedded', which needs no network"
    return list(itertools.islice(hub_rows(name, config, split, spec, instead, stream=take is not None), take))


def hub_rows(
    name: str, config: str, split: str, spec: str, instead: str, stream: bool = True
) -> Iterator[dict[str, Any]]:
    """The rows of a data set of the hub, one by one.

    Raises TextError where it cannot be reached, saying what to pass `instead`.
    """
    from datasets import load_dataset

    try:
        yield from load_dataset(name, config, split=split, streaming=stream)
    except Exception as error:  # datasets raises its own, the hub's and the network's errors alike
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TextError(
            f"the data set '{spec}' could not be had from the hub: {reason}\nPass instead {instead}"
        ) from None

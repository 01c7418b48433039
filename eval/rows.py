"""Rows of instruction data, from the hub or from a file, as text to train on. No torch here.

A row is a string, or a mapping with the fields of one of the FORMS. Question and answer read as in the thesis's
evaluation (section 3.6.2): "Question: ...", "Answer: ..." on a line of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from checkpoints.errors import TextError

_SHOWN_FAULTS = 5
# What data sets write where the tokenizer's own end token belongs.
_END_MARKS = ("###eos_token###", "<|endoftext|>", "</s>")


def _question(row: Mapping[str, Any]) -> tuple[str, str]:
    return f"Question: {row['question'].strip()}\nAnswer:", row["answer"]


def _instruction(row: Mapping[str, Any]) -> tuple[str, str]:
    given = str(row.get("input") or "").strip()
    parts = [f"Instruction: {row['instruction'].strip()}", *([f"Input: {given}"] if given else []), "Response:"]
    return "\n".join(parts), row["output"]


# The fields a row must have -> what was asked and what was answered. The first form that fits is taken.
FORMS: dict[tuple[str, ...], Callable[[Mapping[str, Any]], tuple[str, str]]] = {
    ("instruction", "output"): _instruction,
    # A prompt may end in anything, a heading for example: the answer gets a line of its own.
    ("prompt", "answer"): lambda row: (row["prompt"] + ("" if row["prompt"][-1].isspace() else "\n"), row["answer"]),
    ("context", "answer"): lambda row: (row["context"], row["answer"]),
    ("question", "answer"): _question,
}
FORMS_TEXT = "text; " + "; ".join(", ".join(names) for names in FORMS).replace("instruction,", "instruction, (input,)")


class RowError(ValueError):
    """What is wrong with one row; whoever knows its place adds it."""


def row_text(row: Any) -> tuple[str, bool]:
    """A row's text, and whether it is an exchange that an end token should close.

    Raises RowError where no field is known, a field is no text, or nothing was asked or answered.
    """
    if isinstance(row, str):
        return row, False
    if not isinstance(row, Mapping):
        raise RowError(f"neither text nor fields but {type(row).__name__}")
    names = next((names for names in FORMS if all(name in row for name in names)), None)
    if names is None:
        if isinstance(row.get("text"), str):
            return row["text"], False
        there = ", ".join(map(str, row)) or "no field"
        raise RowError(f"no text field; it has {there}, and needs one of: {FORMS_TEXT}")
    values = dict(row)
    if isinstance(values.get("answer"), Mapping):  # TriviaQA on the hub: {"value": ..., "aliases": [...]}
        values["answer"] = values["answer"].get("value")
    for name in names:
        if not isinstance(values[name], str):
            raise RowError(f"'{name}' is not text")
        if not values[name].strip():
            raise RowError(f"'{name}' is empty")
    asked, answered = FORMS[names](values)
    answered = _without_end_mark(answered)
    if not answered:
        raise RowError(f"'{names[-1]}' is empty")
    return asked + ("" if asked[-1].isspace() else " ") + answered, True


def _without_end_mark(answer: str) -> str:
    answer = answer.strip()
    for mark in _END_MARKS:
        answer = answer.removesuffix(mark).rstrip()
    return answer


def usable_texts(rows: Iterable[Any]) -> tuple[list[str], int]:
    """The texts of a hub's rows, and how many rows hold nothing to learn from; nobody here can mend those."""
    texts, unusable = [], 0
    for row in rows:
        try:
            texts.append(row_text(row)[0])
        except RowError:
            unusable += 1
    return texts, unusable


def file_texts(path: Path) -> tuple[list[str], bool]:
    """The texts of a .jsonl, .json or .parquet file's rows, and whether they are exchanges.

    Raises TextError naming the line or row of every fault, at most a few of them.
    """
    texts, faults, exchanges = [], [], False
    for place, row in _rows(path):
        try:
            if isinstance(row, RowError):
                raise row
            text, exchange = row_text(row)
            exchanges |= exchange
            texts.append(text)
        except RowError as error:
            faults.append(f"{place}: {error}")
    if faults:
        more = len(faults) - _SHOWN_FAULTS
        shown = [*faults[:_SHOWN_FAULTS], *([f"and {more} more"] if more > 0 else [])]
        raise TextError(f"{path}, " + "\n  ".join(shown))
    if not any(text.strip() for text in texts):
        raise TextError(f"{path} holds no text; rows need one of: {FORMS_TEXT}")
    return texts, exchanges


def _rows(path: Path) -> Iterable[tuple[str, Any]]:
    """Each row with its place; a line that is not JSON is a RowError in the row's place."""
    if path.suffix == ".jsonl":
        # Not splitlines(): JSON allows line separators such as U+2028 inside a string.
        for number, line in enumerate(path.read_text().rstrip().split("\n"), 1):
            yield f"line {number}", _json_line(line)
        return
    if path.suffix == ".json":
        rows = json.loads(path.read_text())
    else:
        from pyarrow import parquet

        rows = parquet.read_table(path).to_pylist()
    if not isinstance(rows, list):
        raise TextError(f"{path} must hold a list of rows")
    for number, row in enumerate(rows, 1):
        yield f"row {number}", row


def _json_line(line: str) -> Any:
    if not line.strip():
        return RowError("empty")
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        return RowError(f"not JSON ({error.msg})")

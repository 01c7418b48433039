"""Rows of instruction data, from the hub or from a file, as text to train on. No torch here.

A row is a string, or a mapping with the fields of one of the FORMS. Question and answer read as in the thesis's
evaluation (section 3.6.2): "Question: ...", "Answer: ..." on a line of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from checkpoints.errors import TextError
from eval.row_files import RowError, read_rows

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
        raise RowError(f"no text; it has {there}")
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
    """The texts of a file's rows, and whether they are exchanges. Raises TextError naming the place of every fault."""
    rows = read_rows(path, lambda _, row: row_text(row), f"rows that are text or have the fields {FORMS_TEXT}")
    if not any(text.strip() for text, _ in rows):
        raise TextError(f"{path} holds no text; rows need one of: {FORMS_TEXT}")
    return [text for text, _ in rows], any(exchange for _, exchange in rows)

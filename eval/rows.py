"""Rows of instruction data, from the hub or from a file, as text to train on. No torch here.

A row is a string, or a mapping with the fields of one of the FORMS. Question and answer read as in the thesis's
evaluation (section 3.6.2): "Question: ...", "Answer: ..." on a line of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from edgepress.checkpoints.errors import TextError
from edgepress.eval.row_files import RowError, read_rows

# What data sets write where the tokenizer's own end token belongs.
_END_MARKS = ("###eos_token###", "<|endoftext|>", "</s>")


def _question(row: Mapping[str, Any]) -> tuple[str, str]:
    return f"Question: {row['question'].strip()}\nAnswer:", row["answer"]


def _about(row: Mapping[str, Any]) -> tuple[str, str]:
    asked, answered = _question(row)
    return f"Context: {row['context'].strip()}\n{asked}", answered


def _instruction(given: str, answered: str) -> _Form:
    def form(row: Mapping[str, Any]) -> tuple[str, str]:
        words = str(row.get(given) or "").strip()
        parts = [f"Instruction: {row['instruction'].strip()}", *([f"Input: {words}"] if words else []), "Response:"]
        return "\n".join(parts), row[answered]

    return form


def _prompt(answered: str) -> _Form:
    # A prompt may end in anything, a heading for example: the answer gets a line of its own.
    return lambda row: (row["prompt"] + ("" if row["prompt"][-1].isspace() else "\n"), row[answered])


_Form = Callable[[Mapping[str, Any]], tuple[str, str]]
# The fields a row must have -> what was asked and what was answered. The first form that reads all fields is taken.
FORMS: dict[tuple[str, ...], _Form] = {
    ("instruction", "output"): _instruction("input", "output"),
    ("instruction", "response"): _instruction("context", "response"),
    ("prompt", "answer"): _prompt("answer"),
    ("prompt", "completion"): _prompt("completion"),
    ("prompt", "response"): _prompt("response"),
    ("context", "question", "answer"): _about,  # SQuAD's order
    ("context", "answer"): lambda row: (row["context"], row["answer"]),
    ("question", "answer"): _question,
}
_OPTIONAL: dict[tuple[str, ...], str] = {("instruction", "output"): "input", ("instruction", "response"): "context"}
_CHATS = {"messages": ("role", "content"), "conversations": ("from", "value")}
_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
_ROLES |= {"tool": "tool", "function": "tool", "observation": "tool", "developer": "system"}
_KNOWN = dict.fromkeys(["text", *_CHATS, "input", *(name for names in FORMS for name in names)])
FORMS_TEXT = "text; " + "; ".join(
    ", ".join((names[0], f"({_OPTIONAL[names]},) {names[1]}") if names in _OPTIONAL else names) for names in FORMS
)


def row_text(row: Any) -> tuple[str, bool]:
    """A row's text, and whether it is an exchange that an end token should close.

    Raises RowError where no field is known, a field is no text, nothing was asked or answered, or a known field
    would be left unread.
    """
    if isinstance(row, str):
        return _text({"row": row}, "row"), False
    if not isinstance(row, Mapping):
        raise RowError("null" if row is None else f"neither text nor fields but {type(row).__name__}")
    values = _with_answer(row)
    there = [name for name in _KNOWN if not _is_blank(values.get(name))]
    names = next((n for n in FORMS if {*there} <= {*n, _OPTIONAL.get(n)} and all(m in values for m in n)), None)
    if names is None and there == ["text"]:
        return _text(values, "text"), False
    if names is None:
        names = _best_form(values, there)
    if names is None:
        return _text(values, "text"), False
    for name in names:
        if not _text(values, name).strip():
            raise RowError(f"'{name}' is empty")
    if (optional := _OPTIONAL.get(names)) and not _is_blank(values.get(optional)):
        _text(values, optional)
    asked, answered = FORMS[names](values)
    answered = _without_end_mark(answered)
    if not answered:
        raise RowError(f"'{names[-1]}' is empty")
    return asked + ("" if asked[-1].isspace() else " ") + answered, True


def _best_form(values: Mapping[str, Any], there: list[str]) -> tuple[str, ...] | None:
    """The form of a row that has fields beside those of a form; None: its text alone. Raises RowError.

    Fields that the others repeat word for word may be left unread, such as Alpaca's `text`.
    """
    names = next((n for n in FORMS if all(m in values for m in n)), None)
    read = {*names, _OPTIONAL.get(names)} if names else {"text"} & {*values}
    if not read:
        raise RowError(f"no text; it has {', '.join(map(str, values)) or 'no field'}")
    unread = [name for name in there if name not in read]
    repeats = unread == ["text"] and all(
        isinstance(values.get(name), str) and values[name].strip() in str(values["text"]) for name in names or ()
    )
    if unread and not repeats:
        every = ", ".join(f"'{name}'" for name in there)
        raise RowError(f"it has {every}, which no form reads together; remove or join what is not to be read")
    return names


def _with_answer(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row, with the first of several answers as `answer`: TriviaQA's {"value", "aliases"}, SQuAD's {"text"}."""
    values = dict(row)
    answer = values.get("answer")
    if answer is None and values.get("answers") is not None:
        answer = values["answers"]
    if isinstance(answer, Mapping):
        answer = answer.get("value", answer.get("text"))
    if isinstance(answer, list) and answer and all(isinstance(one, str) for one in answer):
        answer = answer[0]
    elif isinstance(answer, list) and not answer:
        answer = ""
    if "answer" in values or "answers" in values:
        values["answer"] = answer
    return values


def _is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if value is None:
        raise RowError(f"'{name}' is null")
    if not isinstance(value, str):
        kind = "an object" if isinstance(value, Mapping) else "a list" if isinstance(value, list) else ""
        raise RowError(f"'{name}' is not text but {kind or type(value).__name__}")
    if not _whole(value):
        raise RowError(f"'{name}' holds half of a character (a lone surrogate), which no UTF-8 text can")
    return value


def _whole(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def chat_of(row: Any) -> str | None:
    """A row's conversation as JSON, a list of {role, content}; None where it has none. Raises RowError."""
    field = next((name for name in _CHATS if isinstance(row, Mapping) and name in row), None)
    if field is None:
        return None
    others = [name for name in _KNOWN if name != field and not _is_blank(row.get(name))]
    if others:
        raise RowError(f"it has '{field}' and '{others[0]}', which no form reads together; keep one")
    if row[field] is None or not isinstance(row[field], list) or not row[field]:
        what = "null" if row[field] is None else "empty" if row[field] in ([], "") else "not a list of turns"
        raise RowError(f"'{field}' is {what}")
    turns = [_turn(f"{field}[{place}]", turn, *_CHATS[field]) for place, turn in enumerate(row[field])]
    return json.dumps(turns, ensure_ascii=False)


def _turn(where: str, turn: Any, speaker: str, said: str) -> dict[str, str]:
    if not isinstance(turn, Mapping):
        raise RowError(f"'{where}' is not an object with '{speaker}' and '{said}'")
    role = _ROLES.get(turn[speaker]) if isinstance(turn.get(speaker), str) else None
    if role is None:
        raise RowError(f"'{where}.{speaker}' is {turn.get(speaker)!r}, not one of {', '.join(_ROLES)}")
    words = turn.get(said)
    if isinstance(words, list):  # parts, as multimodal data has them
        for part in words:
            if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
                kind = part.get("type", "no type") if isinstance(part, Mapping) else type(part).__name__
                raise RowError(f"'{where}.{said}' has a part that is not text ({kind})")
        words = "".join(part["text"] for part in words)
    if not _text({f"{where}.{said}": words}, f"{where}.{said}").strip():
        raise RowError(f"'{where}.{said}' is empty")
    if turn.get("tool_calls"):
        raise RowError(f"'{where}.tool_calls' cannot be read")
    return {"role": role, "content": str(words)}


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


def file_texts(path: Path) -> tuple[list[str], bool, bool]:
    """The texts of a file's rows, and whether they are exchanges, or chats as JSON (`chat_of`).

    Raises TextError naming the place of every fault.
    """

    def parse(_: int, row: Any) -> tuple[str, bool, bool]:
        chat = chat_of(row)
        return (*row_text(row), False) if chat is None else (chat, False, True)

    rows = read_rows(path, parse, f"rows that are text or have the fields {FORMS_TEXT}; or {'; '.join(_CHATS)}")
    if not any(text.strip() for text, _, _ in rows):
        raise TextError(f"{path} holds no text; rows need one of: {FORMS_TEXT}")
    chats = any(chat for _, _, chat in rows)
    if chats and not all(chat for _, _, chat in rows):
        raise TextError(f"{path} mixes conversations with other rows; put them in two files")
    return [text for text, _, _ in rows], any(exchange for _, exchange, _ in rows), chats

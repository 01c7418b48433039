"""Read rows of data from files or the hub: text to train on, instructions with reference answers; no torch.

A row is a string, or a mapping with the fields of one of the FORMS. What is asked is written once for training and
for the tasks that measure: questions as in the thesis's evaluation (section 3.6.2), "Question: ... Answer:".
"""

from __future__ import annotations

import codecs
import io
import itertools
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from edgepress.checkpoints.documents import parse_json
from edgepress.checkpoints.errors import TextError, installed, missing, require_package

# What data sets write where the tokenizer's own end token belongs.
_END_MARKS = ("###eos_token###", "<|endoftext|>", "</s>")


def question_prompt(question: str, context: str = "") -> str:
    """A question for closed book, or with a context for open book."""
    return f"Context: {context} {question_prompt(question)}" if context else f"Question: {question} Answer:"


def instruction_prompt(instruction: str, given: str = "") -> str:
    """An instruction, and the input that it speaks of."""
    return "\n".join([f"Instruction: {instruction}", *([f"Input: {given}"] if given else []), "Response:"])


def prepared_prompt(prompt: str) -> str:
    """A prompt as it stands. An answer follows a colon after a space, anything else on a line of its own."""
    prompt = prompt.rstrip(" ")
    return prompt if prompt.endswith(":") or prompt[-1:].isspace() else prompt + "\n"


def question_of(context: str) -> str:
    """The question in a text "Question: ... Answer:", or the text itself."""
    return context.strip().removeprefix("Question:").removesuffix("Answer:").strip()


def _question(row: Mapping[str, Any]) -> tuple[str, str]:
    return question_prompt(row["question"].strip()), row["answer"]


def _about(row: Mapping[str, Any]) -> tuple[str, str]:
    return question_prompt(row["question"].strip(), row["context"].strip()), row["answer"]


def _written(row: Mapping[str, Any]) -> tuple[str, str]:
    context = row["context"].strip()
    whole = context.startswith("Question:") and context.endswith("Answer:")
    return question_prompt(question_of(context)) if whole else row["context"], row["answer"]


def _instruction(given: str, answered: str) -> _Form:
    return lambda row: (
        instruction_prompt(row["instruction"].strip(), str(row.get(given) or "").strip()),
        row[answered],
    )


def _prompt(answered: str) -> _Form:
    return lambda row: (prepared_prompt(row["prompt"]), row[answered])


_Form = Callable[[Mapping[str, Any]], tuple[str, str]]
# The fields a row must have -> what was asked and what was answered. The first form that reads all fields is taken.
FORMS: dict[tuple[str, ...], _Form] = {
    ("instruction", "output"): _instruction("input", "output"),
    ("instruction", "response"): _instruction("context", "response"),
    ("prompt", "answer"): _prompt("answer"),
    ("prompt", "completion"): _prompt("completion"),
    ("prompt", "response"): _prompt("response"),
    ("context", "question", "answer"): _about,  # SQuAD's order
    ("context", "answer"): _written,
    ("question", "answer"): _question,
}
_OPTIONAL: dict[tuple[str, ...], str] = {("instruction", "output"): "input", ("instruction", "response"): "context"}
_CHATS = {"messages": ("role", "content"), "conversations": ("from", "value")}
_UNREAD = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")  # of a turn, beside its text
_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
_ROLES |= {"tool": "tool", "function": "tool", "observation": "tool", "developer": "system"}
# What belongs to a row of other tools' data and is read by no form: it changes what the row says.
_BESIDE = ("system", "history", "tools", "choices", "options")
_KNOWN = dict.fromkeys(["text", *_CHATS, "input", *(name for names in FORMS for name in names), *_BESIDE])
FORMS_TEXT = "text; " + "; ".join(
    ", ".join((names[0], f"({_OPTIONAL[names]},) {names[1]}") if names in _OPTIONAL else names) for names in FORMS
)


def row_text(row: Any) -> tuple[str, int]:
    """A row's text, and in an exchange, which an end token should close, the place where its answer begins; else 0.

    Raises RowError where no field is known, a field is no text, nothing was asked or answered, or a known field
    would be left unread.
    """
    if isinstance(row, str):
        return _text({"row": row}, "row"), 0
    if not isinstance(row, Mapping):
        raise RowError("null" if row is None else f"neither text nor fields but {type(row).__name__}")
    values = _with_answer(row)
    there = [name for name in _KNOWN if not _is_blank(values.get(name))]
    names = next((n for n in FORMS if {*there} <= {*n, _OPTIONAL.get(n)} and all(m in values for m in n)), None)
    if names is None and there == ["text"]:
        return _text(values, "text"), 0
    if names is None:
        names = _best_form(values, there)
    if names is None:
        return _text(values, "text"), 0
    for name in names:
        if not _text(values, name).strip():
            raise RowError(f"'{name}' is empty")
    if (optional := _OPTIONAL.get(names)) and not _is_blank(values.get(optional)):
        _text(values, optional)
    asked, answered = FORMS[names](values)
    answered = _without_end_mark(answered)
    if not answered:
        raise RowError(f"'{names[-1]}' is empty")
    return asked + ("" if asked[-1].isspace() else " ") + answered, len(asked)


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
    return value is None or value in ([], {}) or (isinstance(value, str) and not value.strip())


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if value is None:
        raise RowError(f"'{name}' is null")
    if not isinstance(value, str):
        kind = "an object" if isinstance(value, Mapping) else "a list" if isinstance(value, list) else ""
        raise RowError(f"'{name}' is not text but {kind or type(value).__name__}")
    if not _whole(value):
        raise RowError(f"'{name}' {_HALF}")
    return value


_HALF = "holds half of a character (a lone surrogate), which no UTF-8 text can"


def _texts(value: Any) -> Iterator[str]:
    """The text that a value is, or those in a list; of objects in it each field was looked at when it was read."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _whole(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def chat_of(row: Any) -> str | None:
    """A row's conversation as JSON, a list of {role, content}; None where it has none. Raises RowError.

    A `system` beside the turns, as in ShareGPT's rows, is the first of them.
    """
    field = next((name for name in _CHATS if isinstance(row, Mapping) and name in row), None)
    if field is None:
        return None
    others = [name for name in _KNOWN if name not in (field, "system") and not _is_blank(row.get(name))]
    if others:
        raise RowError(f"it has '{field}' and '{others[0]}', which no form reads together; keep one")
    if row[field] is None or not isinstance(row[field], list) or not row[field]:
        what = "null" if row[field] is None else "empty" if row[field] in ([], "") else "not a list of turns"
        raise RowError(f"'{field}' is {what}")
    turns = [_turn(f"{field}[{place}]", turn, *_CHATS[field]) for place, turn in enumerate(row[field])]
    if not _is_blank(row.get("system")):
        if turns[0]["role"] == "system":
            raise RowError(f"it has 'system', and '{field}' begins with such a turn too; keep one")
        turns.insert(0, {"role": "system", "content": _text(row, "system")})
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
    if unread := [name for name in _UNREAD if not _is_blank(turn.get(name))]:
        raise RowError(f"'{where}.{unread[0]}' cannot be read")
    return {"role": role, "content": str(words)}


def _without_end_mark(answer: str) -> str:
    answer = answer.strip()
    for mark in _END_MARKS:
        answer = answer.removesuffix(mark).rstrip()
    return answer


def usable_texts(rows: Iterable[Any]) -> tuple[list[tuple[str, int]], int]:
    """As `row_text` of a hub's rows, and how many rows hold nothing to learn from; nobody here can mend those."""
    texts, unusable = [], 0
    for row in rows:
        try:
            texts.append(row_text(row))
        except RowError:
            unusable += 1
    return texts, unusable


def file_texts(path: Path) -> tuple[list[tuple[str, int]], bool]:
    """The texts of a file's rows with the places where answers begin, and whether they are chats as JSON (`chat_of`).

    Raises TextError naming the place of every fault.
    """

    def parse(_: int, row: Any) -> tuple[str, int, bool]:
        chat = chat_of(row)
        return (*row_text(row), False) if chat is None else (chat, 0, True)

    rows = read_rows(path, parse, f"rows that are text or have the fields {FORMS_TEXT}; or {'; '.join(_CHATS)}")
    if not any(text.strip() for text, _, _ in rows):
        raise TextError(f"{path} holds no text; rows need one of: {FORMS_TEXT}")
    chats = any(chat for _, _, chat in rows)
    if chats and not all(chat for _, _, chat in rows):
        raise TextError(f"{path} mixes conversations with other rows; put them in two files")
    return [(text, answer) for text, answer, _ in rows], chats


# --- files of rows ----------------------------------------------------------------------------------------------------
# Rows of data: of a .jsonl, .json or .parquet file, every fault named at once, or of the hub. No torch here.


SUFFIXES = (".jsonl", ".json", ".parquet")
# Rows and documents in formats that are not read here: as plain text their markup would be measured too.
_FOREIGN = {
    ".ndjson": "rename it to end in .jsonl", ".jsonlines": "rename it to end in .jsonl",
    ".csv": "save its rows as .jsonl or .parquet", ".tsv": "save its rows as .jsonl or .parquet",
    ".xlsx": "save its rows as .jsonl", ".xls": "save its rows as .jsonl", ".arrow": "save its rows as .parquet",
    ".feather": "save its rows as .parquet", ".html": "save its text as .txt", ".htm": "save its text as .txt",
    ".pdf": "save its text as .txt", ".docx": "save its text as .txt", ".epub": "save its text as .txt",
    ".gz": "unpack it", ".bz2": "unpack it", ".xz": "unpack it", ".zst": "unpack it", ".zip": "unpack it",
}  # fmt: skip
_SHOWN_FAULTS = 5
# Longest first: UTF-32's little-endian mark begins with UTF-16's.
_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
Row = TypeVar("Row")


class RowError(ValueError):
    """What is wrong with one row; whoever knows its place adds it."""


def require_plain(path: Path, text: str = "") -> None:
    """Raise TextError where a file is no plain text by its name, or by its text is rows of JSON under another name."""
    if remedy := _FOREIGN.get(path.suffix.lower()):
        raise TextError(f"{path} is no plain text, as its name says, nor a file of rows that can be read; {remedy}")
    if text.startswith("%PDF-"):
        raise TextError(f"{path} is a PDF, no plain text; save its text as .txt")
    lines = [line for line in itertools.islice(io.StringIO(text), 100) if line.strip()]
    if len(lines) > 1 and all(_is_row(line) for line in lines):
        raise TextError(f"{path} holds rows of JSON, not plain text; rename it to end in .jsonl")


def _is_row(line: str) -> bool:
    try:
        row = json.loads(line) if line.startswith("{") else None
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and any(name in row for name in _KNOWN)


def read_utf8(path: Path) -> str:
    """A file's text with line ends as \\n, without a byte order mark.

    Raises TextError naming the encoding where it is not UTF-8, and for bytes that are no text.
    """
    data = path.read_bytes()
    require_utf8(path, data)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise not_utf8(path, error) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def require_utf8(path: Path, data: bytes) -> None:
    """Raise TextError where a file, of which these are the first bytes, is in another encoding or no text."""
    name = next((name for mark, name in _MARKS if data.startswith(mark)), "")
    if not name and b"\0" in data:
        places = [place for place, byte in enumerate(data[:4096]) if not byte]
        alternate = len(places) * 4 > min(len(data), 4096) and len({place % 2 for place in places}) == 1
        if not alternate:
            raise TextError(f"{path} is no text: byte {data.index(0)} is NUL; give a file of UTF-8 text")
        name = "UTF-16"
    if name:
        raise TextError(f"{path} is in {name}, not UTF-8. {_convert(path, name)}")


def not_utf8(path: Path, error: UnicodeDecodeError) -> TextError:
    byte = error.object[error.start]
    return TextError(
        f"{path} is not UTF-8: it has byte 0x{byte:02x} at {error.start}; Latin-1 or Windows-1252, as it seems. "
        + _convert(path, "WINDOWS-1252")
    )


def _convert(path: Path, encoding: str) -> str:
    return f"Convert it with: iconv -f {encoding} -t UTF-8 {path.name} > utf8-{path.name}"


def read_rows(path: Path, parse: Callable[[int, Any], Row], form: str, limit: int = 0) -> list[Row]:
    """What `parse` makes of a file's rows and their numbers, counted from 1; of the first `limit` rows unless it is 0.

    Raises TextError with the line or row of everything that is malformed, empty or a RowError to `parse` (a few of
    many), and with the `form` that rows must have; likewise for a file without rows.
    """
    if path.exists() and not path.is_file():
        raise TextError(f"{path} is no file of rows, but a folder, device or pipe")
    rows, faults = [], []
    place = "line" if path.suffix.lower() == ".jsonl" else "row"
    for number, raw in enumerate(itertools.islice(_raw_rows(path), limit or None), 1):
        try:
            if isinstance(raw, RowError):
                raise raw
            rows.append(parse(number, raw))
        except RowError as fault:
            faults.append(f"{place} {number}: {fault}")
    if faults:
        more = len(faults) - _SHOWN_FAULTS
        shown = [*faults[:_SHOWN_FAULTS], *([f"and {more} more"] if more > 0 else [])]
        raise TextError(f"{path}, " + "\n  ".join(shown) + f"\nExpected {form}")
    if not rows:
        raise TextError(f"{path} holds no row. Expected {form}")
    return rows


def _raw_rows(path: Path) -> Iterator[Any]:
    """Each row as it is read; a line that is empty or no JSON is a RowError in the row's place."""
    suffix = path.suffix.lower()
    try:
        if suffix == ".jsonl":
            yield from _json_lines(path)
        elif suffix == ".json":
            rows = parse_json(read_utf8(path).encode(), f"{path} cannot be read as {suffix}: it", TextError, _once)
            if not isinstance(rows, list):
                raise TextError(f"{path} must hold a list of rows")
            yield from rows
        elif suffix == ".parquet":
            require_package("pyarrow", str(path))
            from pyarrow import parquet

            file = parquet.ParquetFile(path)
            _once([(name, None) for name in file.schema_arrow.names])
            for batch in file.iter_batches():
                yield from batch.to_pylist()
        else:
            raise TextError(f"{path} is no file of rows; its name must end in {', '.join(SUFFIXES)}")
    except UnicodeDecodeError as error:
        raise not_utf8(path, error) from None
    except (ValueError, OSError) as error:  # undecodable bytes, JSON's and pyarrow's own are all ValueErrors
        raise TextError(f"{path} cannot be read as {suffix}: {error}") from None


def _json_lines(path: Path) -> Iterator[Any]:
    empty = 0  # lines since the last row; at the end of a file they do not count
    # newline: JSON allows other line separators, such as U+2028, inside a string.
    with path.open("rb") as raw:
        require_utf8(path, raw.peek(4096))
        for line in io.TextIOWrapper(raw, encoding="utf-8-sig", newline="\n"):
            if not line.strip():
                empty += 1
                continue
            yield from (RowError("empty; remove the line") for _ in range(empty))
            empty = 0
            try:
                yield json.loads(line, object_pairs_hook=_once)
            except json.JSONDecodeError as error:
                yield RowError(f"not JSON ({error.msg})")
            except ValueError as error:  # a field twice, or a number of thousands of digits
                yield RowError(f"not to be read as JSON ({str(error).partition(';')[0]})")
            except RecursionError:
                yield RowError("not JSON (nested too deeply)")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these fields.

    Raises ValueError where one of them is there twice, and nobody can say which counts, or holds what is no text.
    """
    for name, value in pairs:
        if not all(map(_whole, (name, *_texts(value)))):
            raise ValueError(f"'{name}' {_HALF}".encode(errors="backslashreplace").decode())
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the field '{next(name for name in names if names.count(name) > 1)}' is there twice")
    return found


def hub_rows(
    name: str, config: str | None, split: str, spec: str, instead: str, stream: bool = True,
    columns: list[str] | None = None,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """The rows of a data set of the hub, one by one, whole or with these columns.

    Raises TextError where it cannot be reached, saying what to pass `instead`.
    """
    if not installed("datasets"):
        raise TextError(missing("datasets", f"the text '{spec}'") + f". Or pass {instead}")
    from datasets import load_dataset

    # Each of its retries would be two lines of warning; the error below says it once.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        data = load_dataset(name, config, split=split, streaming=stream)
        yield from data.select_columns(columns) if columns else data
    except Exception as error:  # datasets raises its own, the hub's and the network's errors alike
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TextError(
            f"the data set '{spec}' could not be had from the hub: {reason}\nPass instead {instead}"
        ) from None


# --- instructions -----------------------------------------------------------------------------------------------------
# Instructions with their reference answers: from the hub by name, or from local files of several schemas.
#
#     alpaca, FireAct    {instruction, input, output}
#     Dolly              {instruction, context, response}
#     prepared prompts   {prompt, answer}, the prompt taken as it stands
#     AgentInstruct      {conversations: [{from, value}, ...]} or {messages: [{role, content}, ...]}
#
# Of a conversation the last request that was answered counts, with its answer, as in the second thesis, section
# 3.1.3.


# Name on the hub, and its splits in order; empty for the only one.
HUB = {
    "alpaca": ("tatsu-lab/alpaca", ("train",)),
    "dolly": ("databricks/databricks-dolly-15k", ("train",)),
    "agent": ("zai-org/AgentInstruct", ("os", "db", "alfworld", "webshop", "kg", "mind2web")),
}
_ASKING, _ANSWERING = ("human", "user"), ("gpt", "assistant")
FILE_FORM = (
    "a .json, .jsonl or .parquet file whose rows have {instruction, input, output}, {instruction, context, response}, "
    "{prompt, answer}, {conversations} or {messages}"
)


@dataclass(frozen=True)
class Instruction:
    id: str  # row or line of the file, counted from 1
    instruction: str
    context: str  # what the instruction speaks of; often empty
    reference: str
    prepared: bool = False  # the instruction is a whole prompt already

    def prompt(self, chat: bool) -> str:
        """What the model reads: the request alone for a chat template, otherwise with headings to be continued."""
        if self.prepared:
            return self.instruction.strip() if chat else prepared_prompt(self.instruction)
        if chat:
            return "\n\n".join(part for part in (self.instruction, self.context) if part)
        return instruction_prompt(self.instruction, self.context)


@dataclass(frozen=True)
class InstructionSet:
    name: str
    rows: tuple[Instruction, ...]
    unusable: int = 0  # rows before the last one that have no text to ask or to compare with; the hub's only


def load_instructions(source: str, limit: int = 0) -> InstructionSet:
    """The first `limit` rows (0: all) of a hub name or a .json, .jsonl or .parquet file.

    Raises TextError naming every faulty one of these rows in a file, or, without a hub, the file form to give
    instead. The hub's faulty rows, which nobody here can mend, are left out and counted.
    """
    if source in HUB:
        return _from_hub(source, limit)
    path = Path(source).expanduser()
    if not path.is_file():
        raise TextError(
            f"there is no instruction data '{source}': not one of {', '.join(HUB)}, and not a file. Give {FILE_FORM}"
        )
    return InstructionSet(path.stem, tuple(read_rows(path, parse_row, FILE_FORM, limit)))


def _from_hub(source: str, limit: int) -> InstructionSet:
    rows: list[Instruction] = []
    unusable = 0
    name, splits = HUB[source]
    streams = (hub_rows(name, "default", split, source, FILE_FORM) for split in splits)
    for number, row in enumerate(itertools.chain.from_iterable(streams), 1):
        try:
            rows.append(parse_row(number, row))
        except RowError:
            unusable += 1
        if limit and len(rows) == limit:
            break
    if not rows:
        raise TextError(f"the data set '{source}' of the hub has no usable row. Give {FILE_FORM}")
    return InstructionSet(source, tuple(rows), unusable)


# --- rows to instructions -------------------------------------------------------------------------------------------


def parse_row(number: int, row: Any) -> Instruction:
    """One row of any of the schemas. Raises RowError."""
    if not isinstance(row, Mapping):
        raise RowError(f"not an object with fields but {type(row).__name__}")
    for needed, parse in _SCHEMAS:
        if all(name in row for name in needed):
            return parse(str(number), row)
    raise RowError(f"no instruction; it has {', '.join(map(str, row)) or 'no field'}")


def _plain(asked: str, context: str, answered: str, prepared: bool = False) -> Callable[[str, Any], Instruction]:
    def parse(number: str, row: Mapping[str, Any]) -> Instruction:
        given = _field_text(row, context, may_be_empty=True) if context in row else ""
        wanted = _field_text(row, asked)
        return Instruction(number, row[asked] if prepared else wanted, given, _field_text(row, answered), prepared)

    return parse


def _conversation(turns: str, speaker: str, said: str) -> Callable[[str, Any], Instruction]:
    def parse(number: str, row: Mapping[str, Any]) -> Instruction:
        listed = row[turns]
        if not isinstance(listed, Sequence) or not all(isinstance(t, Mapping) and t.get(speaker) for t in listed):
            raise RowError(f"'{turns}' is not a list of turns with '{speaker}' and '{said}'")
        for request, answer in reversed(list(itertools.pairwise(listed))):
            if request[speaker] in _ASKING and answer[speaker] in _ANSWERING:
                return Instruction(number, _field_text(request, said), "", _field_text(answer, said))
        raise RowError(f"'{turns}' has no turn of {' or '.join(_ASKING)} followed by one of {' or '.join(_ANSWERING)}")

    return parse


_SCHEMAS: tuple[tuple[tuple[str, ...], Callable[[str, Any], Instruction]], ...] = (
    (("instruction", "output"), _plain("instruction", "input", "output")),
    (("instruction", "response"), _plain("instruction", "context", "response")),
    (("prompt", "answer"), _plain("prompt", "", "answer", prepared=True)),
    (("conversations",), _conversation("conversations", "from", "value")),
    (("messages",), _conversation("messages", "role", "content")),
)


def _field_text(row: Mapping[str, Any], name: str, may_be_empty: bool = False) -> str:
    value = row.get(name)
    if value is None and may_be_empty:
        return ""
    if not isinstance(value, str):
        raise RowError(f"'{name}' is null" if value is None and name in row else f"'{name}' is not text")
    if not value.strip() and not may_be_empty:
        raise RowError(f"'{name}' is empty")
    return value.strip()

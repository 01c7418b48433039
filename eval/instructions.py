"""Instructions with their reference answers: from the hub by name, or from local files of several schemas.

    alpaca, FireAct    {instruction, input, output}
    Dolly              {instruction, context, response}
    prepared prompts   {prompt, answer}, the prompt taken as it stands
    AgentInstruct      {conversations: [{from, value}, ...]} or {messages: [{role, content}, ...]}

Of a conversation the last request that was answered counts, with its answer, as in the second thesis, section 3.1.3.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints.errors import TextError

# Name on the hub, and its splits in order; empty for the only one.
HUB = {
    "alpaca": ("tatsu-lab/alpaca", ("train",)),
    "dolly": ("databricks/databricks-dolly-15k", ("train",)),
    "agent": ("zai-org/AgentInstruct", ("os", "db", "alfworld", "webshop", "kg", "mind2web")),
}
_ASKING, _ANSWERING = ("human", "user"), ("gpt", "assistant")
_SHOWN_FAULTS = 5


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
            return self.instruction
        if chat:
            return "\n\n".join(part for part in (self.instruction, self.context) if part)
        given = f"Input: {self.context}\n" if self.context else ""
        return f"Instruction: {self.instruction}\n{given}Response:"


@dataclass(frozen=True)
class InstructionSet:
    name: str
    rows: tuple[Instruction, ...]


def load_instructions(source: str, limit: int = 0) -> InstructionSet:
    """The first `limit` rows (0: all) of a hub name or a .json, .jsonl or .parquet file.

    Raises TextError naming the row of every fault, or, without a hub, the file form to give instead.
    """
    if source in HUB:
        return InstructionSet(source, tuple(_parsed(source, _hub(source, limit))))
    path = Path(source).expanduser()
    if not path.is_file():
        raise TextError(f"there is no instruction data '{source}': not one of {', '.join(HUB)}, and not a file")
    rows = list(_parsed(str(path), _file_rows(path)))
    if not rows:
        raise TextError(f"{path} has no row")
    return InstructionSet(path.stem, tuple(rows[: limit or None]))


# --- rows to instructions -------------------------------------------------------------------------------------------


class _Fault(ValueError):
    """What is wrong with one row."""


def _parsed(where: str, rows: Iterable[tuple[str, Any]]) -> Iterator[Instruction]:
    found, faults = [], []
    for place, row in rows:
        try:
            if isinstance(row, _Fault):
                raise row
            found.append(parse_row(place.rpartition(" ")[2], row))
        except _Fault as fault:
            faults.append(f"{place}: {fault}")
    if faults:
        more = len(faults) - _SHOWN_FAULTS
        raise TextError(f"{where}, " + "; ".join(faults[:_SHOWN_FAULTS]) + (f"; and {more} more" if more > 0 else ""))
    yield from found


def parse_row(number: str, row: Any) -> Instruction:
    """One row of any of the schemas."""
    if not isinstance(row, Mapping):
        raise _Fault(f"not an object with fields but {type(row).__name__}")
    for needed, parse in _SCHEMAS:
        if all(name in row for name in needed):
            return parse(number, row)
    forms = " or ".join("{" + ", ".join(needed) + "}" for needed, _ in _SCHEMAS)
    raise _Fault(f"fields {', '.join(map(str, row)) or 'none'}; needed are {forms}")


def _plain(asked: str, context: str, answered: str, prepared: bool = False) -> Callable[[str, Any], Instruction]:
    def parse(number: str, row: Mapping[str, Any]) -> Instruction:
        given = _text(row, context, may_be_empty=True) if context in row else ""
        return Instruction(number, _text(row, asked), given, _text(row, answered), prepared)

    return parse


def _conversation(turns: str, speaker: str, said: str) -> Callable[[str, Any], Instruction]:
    def parse(number: str, row: Mapping[str, Any]) -> Instruction:
        listed = row[turns]
        if not isinstance(listed, Sequence) or not all(isinstance(t, Mapping) and t.get(speaker) for t in listed):
            raise _Fault(f"'{turns}' is not a list of turns with '{speaker}' and '{said}'")
        for request, answer in reversed(list(zip(listed, listed[1:], strict=False))):
            if request[speaker] in _ASKING and answer[speaker] in _ANSWERING:
                return Instruction(number, _text(request, said), "", _text(answer, said))
        raise _Fault(f"'{turns}' has no turn of {' or '.join(_ASKING)} followed by one of {' or '.join(_ANSWERING)}")

    return parse


_SCHEMAS: tuple[tuple[tuple[str, ...], Callable[[str, Any], Instruction]], ...] = (
    (("instruction", "output"), _plain("instruction", "input", "output")),
    (("instruction", "response"), _plain("instruction", "context", "response")),
    (("prompt", "answer"), _plain("prompt", "", "answer", prepared=True)),
    (("conversations",), _conversation("conversations", "from", "value")),
    (("messages",), _conversation("messages", "role", "content")),
)


def _text(row: Mapping[str, Any], name: str, may_be_empty: bool = False) -> str:
    value = row.get(name)
    if value is None and may_be_empty:
        return ""
    if not isinstance(value, str):
        raise _Fault(f"'{name}' is not text")
    if not value.strip() and not may_be_empty:
        raise _Fault(f"'{name}' is empty")
    return value.strip()


# --- reading --------------------------------------------------------------------------------------------------------


def _file_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Each row with its place; a line that is no JSON is a fault in the row's place."""
    try:
        if path.suffix == ".jsonl":
            # Not splitlines(): a JSON string may hold U+2028 and its like.
            lines = path.read_text(encoding="utf-8").rstrip().split("\n")
            rows = [_json_line(line) for line in lines]
        elif path.suffix == ".json":
            rows = json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".parquet":
            from pyarrow import parquet

            rows = parquet.read_table(path).to_pylist()
        else:
            raise TextError(f"{path}: instruction data is read from .json, .jsonl and .parquet files")
    except (ValueError, OSError) as error:  # undecodable bytes, JSON's and pyarrow's own are all ValueErrors
        raise TextError(f"{path} cannot be read as {path.suffix}: {error}") from None
    if not isinstance(rows, list):
        raise TextError(f"{path} must hold a list of rows")
    word = "line" if path.suffix == ".jsonl" else "row"
    return ((f"{word} {number}", row) for number, row in enumerate(rows, 1))


def _json_line(line: str) -> Any:
    if not line.strip():
        return _Fault("empty")
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        return _Fault(f"not JSON ({error.msg})")


def _hub(source: str, limit: int) -> Iterator[tuple[str, Any]]:
    """Rows of the hub's splits one after the other, only as many as are wanted."""
    from datasets import load_dataset

    name, splits = HUB[source]
    rows: list[Any] = []
    try:
        for split in splits:
            data = load_dataset(name, split=split, streaming=bool(limit))
            rows += list(data.take(limit - len(rows)) if limit else data)
            if limit and len(rows) >= limit:
                break
    except Exception as error:  # datasets raises its own, the hub's and the network's errors alike
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TextError(
            f"the data set '{source}' could not be had from the hub: {reason}\n"
            "Give a local .json, .jsonl or .parquet file instead, whose rows have {instruction, input, output}, "
            "{instruction, context, response}, {prompt, answer} or {conversations}"
        ) from None
    return ((f"row {number}", row) for number, row in enumerate(rows, 1))

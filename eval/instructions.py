"""Instructions with their reference answers: from the hub by name, or from local files of several schemas.

    alpaca, FireAct    {instruction, input, output}
    Dolly              {instruction, context, response}
    prepared prompts   {prompt, answer}, the prompt taken as it stands
    AgentInstruct      {conversations: [{from, value}, ...]} or {messages: [{role, content}, ...]}

Of a conversation the last request that was answered counts, with its answer, as in the second thesis, section 3.1.3.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgepress.checkpoints.errors import TextError
from edgepress.eval.row_files import RowError, hub_rows, read_rows

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
            return self.instruction
        if chat:
            return "\n\n".join(part for part in (self.instruction, self.context) if part)
        given = f"Input: {self.context}\n" if self.context else ""
        return f"Instruction: {self.instruction}\n{given}Response:"


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
        given = _text(row, context, may_be_empty=True) if context in row else ""
        return Instruction(number, _text(row, asked), given, _text(row, answered), prepared)

    return parse


def _conversation(turns: str, speaker: str, said: str) -> Callable[[str, Any], Instruction]:
    def parse(number: str, row: Mapping[str, Any]) -> Instruction:
        listed = row[turns]
        if not isinstance(listed, Sequence) or not all(isinstance(t, Mapping) and t.get(speaker) for t in listed):
            raise RowError(f"'{turns}' is not a list of turns with '{speaker}' and '{said}'")
        for request, answer in reversed(list(itertools.pairwise(listed))):
            if request[speaker] in _ASKING and answer[speaker] in _ANSWERING:
                return Instruction(number, _text(request, said), "", _text(answer, said))
        raise RowError(f"'{turns}' has no turn of {' or '.join(_ASKING)} followed by one of {' or '.join(_ANSWERING)}")

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
        raise RowError(f"'{name}' is null" if value is None and name in row else f"'{name}' is not text")
    if not value.strip() and not may_be_empty:
        raise RowError(f"'{name}' is empty")
    return value.strip()

"""Question answering after the thesis (section 3.6.2): closed book, and open book with the shortest context.

Questions come from the hub (TriviaQA's validation split) or from a .jsonl file whose rows have one of three forms:
{"question", "answer": {"value", "aliases"}, "search_results": {"search_context": [...]}}, the hub's own;
{"question", "answers": [...], "ctxs": [{"text"}, ...]}; {"context": "Question: ...\\nAnswer:", "answer", "aliases"}.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from checkpoints.errors import TextError
from eval.answers import Answer, Question, answer_all
from eval.matching import TIERS, VERSION, inside_a_word, match, normalise
from eval.results import Result, Score, proportion
from eval.settings import Settings
from eval.subject import Subject

OPEN = "triviaqa-open"
SAMPLES = 1200  # of the validation split, as in the thesis
_HUB, _CLOSED, _OPEN = "mandarjoshi/trivia_qa", "rc.nocontext", "rc"
_FORMS = (
    "rows of question and answers (and ctxs or search_results with the contexts), or of context, answer and aliases"
)


@dataclass(frozen=True)
class Item:
    """One question as its data set has it."""

    id: str
    question: str
    expected: tuple[str, ...]
    contexts: tuple[str, ...] = ()


def closed(name: str, subject: Subject, settings: Settings) -> Result:
    items = load_items(name, settings)
    questions = [Question(item.id, f"Question: {item.question} Answer:", item.expected) for item in items]
    return _asked(name, subject, settings, questions, "closed book")


def opened(name: str, subject: Subject, settings: Settings) -> Result:
    items = load_items(name, settings)
    cut = 0
    questions = []
    for item in items:
        prompt, was_cut = _with_context(item, subject, settings)
        cut += was_cut
        questions.append(Question(item.id, prompt, item.expected))
    book = "open book, shortest context" + (f", {cut} contexts cut to the model's positions" if cut else "")
    return _asked(name, subject, settings, questions, book)


def _asked(name: str, subject: Subject, settings: Settings, questions: list[Question], book: str) -> Result:
    began = time.perf_counter()
    answers = answer_all(subject, questions, settings, name, _grade)
    chat = "chat template" if settings.chat else "no chat template"
    origin = ", ".join(path.name for path in settings.files_of(name)) or f"{_HUB}, validation"
    protocol = f"{book}; {origin}; greedy, 1 to {settings.new_tokens} tokens, {chat}; match v{VERSION}; {subject.dtype}"
    protocol += "" if settings.kv.plain else f"; {settings.kv}"
    ids = [q.id for q in questions]
    counted: dict[str, set[str]] = {"accuracy": set(TIERS), **{tier: {tier} for tier in TIERS}}
    return Result(
        name,
        tuple(_score(metric, ids, answers, tiers, protocol) for metric, tiers in counted.items()),
        time.perf_counter() - began,
        {
            "substring_inside_a_word": sum(bool(a.facts["inside_a_word"]) for a in answers),
            "answered_seconds": sum(a.seconds for a in answers),
            "answer_tokens": sum(a.tokens for a in answers),
        },
    )


def _score(metric: str, ids: list[str], answers: list[Answer], tiers: set[str], protocol: str) -> Score:
    return proportion(metric, ids, [float(a.facts["tier"] in tiers) for a in answers], protocol)


def _grade(question: Question, answer: str) -> dict[str, Any]:
    tier = match(answer, question.expected)
    return {"tier": tier, "inside_a_word": tier == "substring" and inside_a_word(answer, question.expected)}


def _with_context(item: Item, subject: Subject, settings: Settings) -> tuple[str, bool]:
    """The prompt, its context cut at the end where the model has no positions for all of it."""
    context = min(item.contexts, key=len)

    def prompt(words: str) -> str:
        return f"Context: {words} Question: {item.question} Answer:"

    # What the prompt needs beside the context; 64 tokens more for a chat template and where words join differently.
    others = len(subject.tokenizer(prompt(""))["input_ids"]) + settings.new_tokens + 64
    ids = subject.tokenizer(context, add_special_tokens=False)["input_ids"]
    room = max(1, subject.positions - others)
    if len(ids) <= room:
        return prompt(context), False
    return prompt(str(subject.tokenizer.decode(ids[:room]))), True


# --- data -------------------------------------------------------------------------------------------------------------


def check(name: str, settings: Settings) -> None:
    load_items(name, settings)


@cache  # the same questions for every checkpoint
def load_items(name: str, settings: Settings) -> tuple[Item, ...]:
    """The first questions, at most settings.limit or 1,200, that have an answer (and a context where one is needed).

    Raises TextError naming the file and line of what cannot be read, or the form of file that is taken instead of
    the hub's data.
    """
    files, with_context = settings.files_of(name), name == OPEN
    items = _from_files(files, with_context) if files else _from_hub(name, with_context)
    chosen = tuple(itertools.islice(items, settings.limit or SAMPLES))
    if not chosen:
        raise TextError(f"{name}: there is no question in {', '.join(map(str, files)) or _HUB}")
    return chosen


def _from_files(files: list[Path], with_context: bool) -> Iterator[Item]:
    for file in files:
        try:
            lines = file.read_text(encoding="utf-8").split("\n")
        except (OSError, ValueError) as error:
            raise TextError(f"{file} cannot be read: {error}") from None
        if lines[-1] == "":
            lines.pop()
        for number, line in enumerate(lines, 1):
            place = f"{file}, line {number}"
            if not line.strip():
                raise TextError(f"{place}: empty; remove the line")
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise TextError(f"{place}: not JSON ({error.msg})") from None
            prefix = f"{file.stem}/" if len(files) > 1 else ""
            item = _item(f"{prefix}{number}", row, place)
            if with_context and not item.contexts:
                raise TextError(f"{place}: no context; open-book questions need ctxs or search_results")
            yield item


def _from_hub(name: str, with_context: bool) -> Iterator[Item]:
    from eval.text import hub_rows

    config = _OPEN if with_context else _CLOSED
    rows: Iterable[dict[str, Any]] = hub_rows(
        _HUB, config, "validation", name, f"a .jsonl file with --from {name}=FILE: {_FORMS}"
    )
    for number, row in enumerate(rows, 1):
        item = _item(str(row.get("question_id") or number), row, f"{_HUB}, row {number}")
        if item.contexts or not with_context:
            yield item


def _item(number: str, row: Any, place: str) -> Item:
    if not isinstance(row, dict):
        raise TextError(f"{place}: not an object; expected {_FORMS}")
    answer = row.get("answer")
    if isinstance(answer, dict):
        expected = [answer.get("value"), *(answer.get("aliases") or [])]
    else:
        expected = [*(row.get("answers") or []), answer, *(row.get("aliases") or [])]
    question = row.get("question")
    if question is None and isinstance(row.get("context"), str):
        question = row["context"].strip().removeprefix("Question:").removesuffix("Answer:")
    known = tuple(dict.fromkeys(e for e in expected if isinstance(e, str) and normalise(e)))
    if not isinstance(question, str) or not question.strip() or not known:
        lacks = "no question" if not isinstance(question, str) or not question.strip() else "no answer"
        raise TextError(f"{place}: {lacks}; expected {_FORMS}")
    return Item(number, question.strip(), known, _contexts(row))


def _contexts(row: dict[str, Any]) -> tuple[str, ...]:
    found = [c.get("text") for c in row.get("ctxs") or [] if isinstance(c, dict)]
    found += (row.get("search_results") or {}).get("search_context") or []
    return tuple(text.strip() for text in found if isinstance(text, str) and text.strip())

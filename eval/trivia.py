"""Question answering after the thesis (section 3.6.2): closed book, and open book with the shortest context.

Questions come from the hub (TriviaQA's validation split) or from a file whose rows have one of three forms:
{"question", "answer": {"value", "aliases"}, "search_results": {"search_context": [...]}}, the hub's own;
{"question", "answers": [...], "ctxs": [{"text"}, ...]}; {"context": "Question: ...\\nAnswer:", "answer", "aliases"}.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from edgepress.checkpoints.errors import TextError
from edgepress.eval.answers import Answer, Question, answer_all
from edgepress.eval.metrics import TIERS, VERSION, inside_a_word, match, normalise
from edgepress.eval.results import Result, Score, proportion
from edgepress.eval.rows import SUFFIXES, RowError, hub_rows, question_of, question_prompt, read_rows
from edgepress.eval.subject import Subject
from edgepress.eval.tasks import Settings

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
    questions = [Question(item.id, question_prompt(item.question), item.expected) for item in items]
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
    how = f"greedy, 1 to {settings.new_tokens} tokens, {chat}; match v{VERSION}; {subject.answering}"
    protocol = f"{book}; {origin}; {how}" + ("" if settings.kv.plain else f"; {settings.kv}")
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
        return question_prompt(item.question, words)

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
    limit = settings.limit or SAMPLES
    if files:
        return tuple(_from_files(files, with_context, limit))
    chosen = tuple(itertools.islice(_from_hub(name, with_context), limit))
    if not chosen:
        raise TextError(f"{name}: there is no question in {_HUB}")
    return chosen


def _from_files(files: list[Path], with_context: bool, limit: int) -> list[Item]:
    items: list[Item] = []
    for file in files:
        prefix = f"{file.stem}/" if len(files) > 1 else ""

        def parse(number: int, row: Any, prefix: str = prefix) -> Item:
            item = _item(f"{prefix}{number}", row)
            if with_context and not item.contexts:
                raise RowError("no context; open-book questions need ctxs or search_results")
            return item

        if len(items) < limit:
            items += read_rows(file, parse, _FORMS, limit - len(items))
    return items


def _from_hub(name: str, with_context: bool) -> Iterator[Item]:
    config = _OPEN if with_context else _CLOSED
    instead = f"a {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file with --from {name}=FILE: {_FORMS}"
    for number, row in enumerate(hub_rows(_HUB, config, "validation", name, instead), 1):
        try:
            item = _item(str(row.get("question_id") or number), row)
        except RowError as fault:
            raise TextError(f"{_HUB}, row {number}: {fault}") from None
        if item.contexts or not with_context:
            yield item


def _item(number: str, row: Any) -> Item:
    if not isinstance(row, dict):
        raise RowError("not an object")
    answer = row.get("answer")
    if isinstance(answer, dict):
        expected = [answer.get("value"), *(answer.get("aliases") or [])]
    else:
        expected = [*(row.get("answers") or []), answer, *(row.get("aliases") or [])]
    question = row.get("question")
    if question is None and isinstance(row.get("context"), str):
        question = question_of(row["context"])
    known = tuple(dict.fromkeys(e for e in expected if isinstance(e, str) and normalise(e)))
    if not isinstance(question, str) or not question.strip() or not known:
        raise RowError("no question" if not isinstance(question, str) or not question.strip() else "no answer")
    return Item(number, question.strip(), known, _contexts(row))


def _contexts(row: dict[str, Any]) -> tuple[str, ...]:
    found = [c.get("text") for c in row.get("ctxs") or [] if isinstance(c, dict)]
    found += (row.get("search_results") or {}).get("search_context") or []
    return tuple(text.strip() for text in found if isinstance(text, str) and text.strip())

"""The task `generation`: answers to instructions, how close they come to the references, what they cost.

Protocol of the second thesis, section 4.1: a model, whatever it was tuned on, answers Alpaca, Dolly and AgentInstruct,
so that each set but one is another data set's. Beside the metrics stand the measures of its section 2.6.2: seconds
an answer, size of the stored output, size of the model. Decoding is greedy where the thesis samples, so that a
repetition gives the same numbers.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepress.checkpoints.errors import PlanError, TextError
from edgepress.eval.answers import Answer, Question, answer_all
from edgepress.eval.instructions import HUB, Instruction, InstructionSet, load_instructions
from edgepress.eval.metrics import (
    NotMeasuredError,
    bleu,
    bleu_protocol,
    bleu_terms,
    f1,
    rouge_l,
    rouge_protocol,
    sbert_cosines,
)
from edgepress.eval.results import RESAMPLES, Result, Score, mean, not_measured
from edgepress.eval.settings import Settings
from edgepress.eval.subject import Subject

SAMPLES = 200  # rows of each set
METRICS = ("rouge_l", "f1", "sbert", "bleu", "seconds", "output size")
_TEMPLATE_TOKENS = 64  # room for what a chat template adds


def check(name: str, settings: Settings) -> None:
    _sets(name, settings)


def run(name: str, subject: Subject, settings: Settings) -> Result:
    """Scores `rouge_l, dolly` and so on for each set, then the model's size."""
    began = time.perf_counter()
    scores: list[Score] = []
    details: dict[str, Any] = {}
    for data in _sets(name, settings):
        found, details[data.name] = _of_set(name, subject, settings, data)
        scores += found
    scores.sort(key=lambda score: METRICS.index(score.metric.partition(",")[0]))  # one metric's sets together
    scores.append(_fixed("model size", subject.checkpoint.shape.model_mib, "MiB", "model size: all stored tensors"))
    return Result(name, tuple(scores), time.perf_counter() - began, details)


@cache  # the same rows for every checkpoint
def _sets(name: str, settings: Settings) -> tuple[InstructionSet, ...]:
    sources = [str(path) for path in settings.files_of(name)] or list(HUB)
    sets = tuple(load_instructions(source, settings.limit or SAMPLES) for source in sources)
    if len({s.name for s in sets}) < len(sets):
        raise PlanError(f"--from {name}=FILE: two files have the same name; the scores could not be told apart")
    return sets


def _of_set(
    name: str, subject: Subject, settings: Settings, data: InstructionSet
) -> tuple[list[Score], dict[str, Any]]:
    rows = _that_fit(name, subject, settings, data)
    questions = [Question(row.id, row.prompt(settings.chat), (row.reference,)) for row in rows]
    asked = replace(settings, new_tokens=settings.reply_tokens)
    answers = answer_all(subject, questions, asked, f"{name}-{data.name}")
    scores = _scores(answers, data, subject, settings)
    for score in scores:
        if math.isnan(score.value):
            subject.runtime.progress.note(f"{name}: {score.protocol}")
    return scores, {"rows": len(rows), "too_long": len(data.rows) - len(rows), "unusable": data.unusable}


def _that_fit(name: str, subject: Subject, settings: Settings, data: InstructionSet) -> list[Instruction]:
    """The rows whose prompt and answer the model has positions for; says how many have not."""
    room = subject.positions - settings.reply_tokens - (_TEMPLATE_TOKENS if settings.chat else 0)
    rows = [row for row in data.rows if len(subject.tokenizer(row.prompt(settings.chat))["input_ids"]) <= room]
    left_out = len(data.rows) - len(rows)
    if not rows:
        raise TextError(
            f"none of the {left_out} prompts of '{data.name}' fits into {subject.positions} positions beside "
            f"{settings.reply_tokens} tokens of an answer; give fewer with --reply-tokens"
        )
    if left_out:
        subject.runtime.progress.note(
            f"{name}: {left_out} of {len(data.rows)} rows of '{data.name}' left out: too long for the model's "
            f"{subject.positions} positions"
        )
    return rows


# --- scores ---------------------------------------------------------------------------------------------------------


def _scores(answers: Sequence[Answer], data: InstructionSet, subject: Subject, settings: Settings) -> list[Score]:
    said, wanted = [a.text for a in answers], [a.question.expected[0] for a in answers]
    cosines, sbert = _sbert(said, wanted, subject, settings)
    ids = [f"{data.name}/{a.question.id}" for a in answers]
    chat = "chat template" if settings.chat else "no chat template"
    embeddings = sbert if cosines else "not measured"
    protocol = (
        f"{data.name}, {len(answers)} rows, greedy, 1 to {settings.reply_tokens} tokens, {chat}; {subject.answering}; "
        f"rouge_l: {rouge_protocol()}; f1: multisets of words; sbert: {embeddings}; bleu: {bleu_protocol()}; "
        f"seconds: each answer's share of batches of at most {settings.batch_tokens} tokens"
    )
    protocol += "" if settings.kv.plain else f"; {settings.kv}"

    def of(metric: str, values: Sequence[float], higher: bool = True, unit: str = "") -> Score:
        name = f"{metric}, {data.name}"
        return mean(name, ids, values, protocol, higher_is_better=higher, unit=unit, of="answers")

    terms = bleu_terms(said, wanted)
    low, high = bleu_interval(terms)
    interval = f"95 %, bootstrap over {len(terms)} answers"
    return [
        of("rouge_l", rouge_l(said, wanted)),
        of("f1", [f1(a, r) for a, r in zip(said, wanted, strict=True)]),
        of("sbert", cosines) if cosines else not_measured(f"sbert, {data.name}", sbert),
        Score(f"bleu, {data.name}", bleu(terms), low, high, len(terms), interval, protocol),
        of("seconds", [a.seconds for a in answers], higher=False, unit="s"),
        _fixed(f"output size, {data.name}", output_kib(answers), "KiB", protocol),
    ]


def _sbert(said: Sequence[str], wanted: Sequence[str], subject: Subject, settings: Settings) -> tuple[list[float], str]:
    """Cosines and the model's name, or none and the reason."""
    try:
        return sbert_cosines(said, wanted, settings.sbert, subject.runtime.device.type)
    except NotMeasuredError as reason:
        return [], str(reason)


def bleu_interval(terms: NDArray[np.int64], seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile bootstrap of corpus BLEU from its sentences' terms (answers, 10)."""
    generator = np.random.default_rng(seed)
    drawn = [bleu(terms[generator.integers(len(terms), size=len(terms))]) for _ in range(RESAMPLES)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def _fixed(metric: str, value: float, unit: str, protocol: str) -> Score:
    """A number that was counted, not sampled."""
    return Score(metric, value, math.nan, math.nan, 1, "", protocol, higher_is_better=False, unit=unit)


def output_kib(answers: Sequence[Answer]) -> float:
    """Equation 2.54: KiB of prompts, answers and references as JSON lines."""
    lines = (
        json.dumps(
            {"prompt": a.question.prompt, "answer": a.text, "reference": a.question.expected[0]}, ensure_ascii=False
        )
        for a in answers
    )
    return sum(len(line.encode()) + 1 for line in lines) / 1024

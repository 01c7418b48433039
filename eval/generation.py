"""The task `generation`: answers to instructions, how close they come to the references, what they cost.

Protocol of the second thesis, section 4.1: a model, whatever it was tuned on, answers Alpaca, Dolly and AgentInstruct,
so that each set but one is another data set's. Beside the metrics stand the measures of its section 2.6.2: seconds
an answer, size of the stored output, size of the model. Decoding is greedy where the thesis samples, so that a
repetition gives the same numbers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from checkpoints.errors import PlanError, TextError
from checkpoints.shape import ModelShape
from eval.answers import Answer, Question, answer_all
from eval.instructions import HUB, Instruction, InstructionSet, load_instructions
from eval.metrics import (
    NotMeasuredError,
    bleu,
    bleu_protocol,
    bleu_terms,
    f1,
    rouge_l,
    rouge_protocol,
    sbert_cosines,
)
from eval.results import RESAMPLES, Result, Score, mean
from eval.settings import Settings
from eval.subject import Subject

SAMPLES = 200  # rows of each set
_TEMPLATE_TOKENS = 64  # room for what a chat template adds


def run(name: str, subject: Subject, settings: Settings) -> Result:
    """Scores of each set by name: `dolly rouge_l`, … A metric that cannot be had is noted and stands in the details."""
    began = time.perf_counter()
    sources = [str(path) for path in settings.files_of(name)] or list(HUB)
    sets = [load_instructions(source, settings.limit or SAMPLES) for source in sources]
    if len({s.name for s in sets}) < len(sets):
        raise PlanError(f"--from {name}=FILE: two files have the same name; the scores could not be told apart")
    scores: list[Score] = []
    details: dict[str, Any] = {}
    for instructions in sets:
        found, facts = _of_set(name, subject, settings, instructions)
        scores += found
        details[instructions.name] = facts
    scores.append(_fixed("model_size", model_mib(subject.checkpoint.shape), "MiB", "all stored tensors"))
    return Result(name, tuple(scores), time.perf_counter() - began, details)


def _of_set(
    name: str, subject: Subject, settings: Settings, data: InstructionSet
) -> tuple[list[Score], dict[str, Any]]:
    rows = _that_fit(subject, settings, data)
    questions = [Question(row.id, row.prompt(settings.chat), (row.reference,)) for row in rows]
    task = f"{name}-{data.name}"
    answers = answer_all(subject, questions, replace(settings, new_tokens=settings.reply_tokens), task)
    facts: dict[str, Any] = {"rows": len(rows), "too_long": len(data.rows) - len(rows), "unusable": data.unusable}
    chat = "chat template" if settings.chat else "no chat template"
    how = f"{data.name}, {len(rows)} rows, greedy, 1 to {settings.reply_tokens} tokens, {chat}; {subject.dtype}"
    scores = _quality(answers, f"{data.name} ", how, subject, settings, facts) + _cost(
        answers, f"{data.name} ", how, settings
    )
    for metric, reason in facts.get("not_measured", {}).items():
        subject.runtime.progress.note(f"{task}: {metric} not measured: {reason}")
    if facts["too_long"]:
        subject.runtime.progress.note(
            f"{task}: {facts['too_long']} of {len(data.rows)} rows left out: too long for {subject.positions} positions"
        )
    return scores, facts


def _that_fit(subject: Subject, settings: Settings, data: InstructionSet) -> list[Instruction]:
    """The rows whose prompt and answer the model has positions for."""
    room = subject.positions - settings.reply_tokens - (_TEMPLATE_TOKENS if settings.chat else 0)
    prompts = [row.prompt(settings.chat) for row in data.rows]
    rows = [
        row
        for row, prompt in zip(data.rows, prompts, strict=True)
        if len(subject.tokenizer(prompt)["input_ids"]) <= room
    ]
    if not rows:
        raise TextError(
            f"none of the {len(data.rows)} prompts of '{data.name}' fits into {subject.positions} positions beside "
            f"{settings.reply_tokens} tokens of an answer; give fewer with --reply-tokens"
        )
    return rows


# --- scores ---------------------------------------------------------------------------------------------------------


def _quality(
    answers: Sequence[Answer], prefix: str, how: str, subject: Subject, settings: Settings, facts: dict[str, Any]
) -> list[Score]:
    ids = [prefix + a.question.id for a in answers]
    said, wanted = [a.text for a in answers], [a.question.expected[0] for a in answers]
    scores = [
        mean(f"{prefix}rouge_l", ids, rouge_l(said, wanted), f"{how}; {rouge_protocol()}", of="answers"),
        mean(f"{prefix}f1", ids, [f1(a, r) for a, r in zip(said, wanted, strict=True)], how, of="answers"),
    ]
    try:
        cosines, model = sbert_cosines(said, wanted, settings.sbert, subject.runtime.device.type)
        scores.append(mean(f"{prefix}sbert", ids, cosines, f"{how}; {model}", of="answers"))
    except NotMeasuredError as reason:
        facts["not_measured"] = {"sbert": str(reason)}
    return [*scores, _bleu(prefix, bleu_terms(said, wanted), how)]


def _bleu(prefix: str, terms: NDArray[np.int64], how: str) -> Score:
    """A corpus's BLEU is no mean over answers, so the answers are drawn and their terms summed anew each time."""
    low, high = bleu_interval(terms)
    interval = f"95 %, bootstrap over {len(terms)} answers"
    return Score(f"{prefix}bleu", bleu(terms), low, high, len(terms), interval, f"{how}; {bleu_protocol()}")


def bleu_interval(terms: NDArray[np.int64], seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile bootstrap of corpus BLEU from its sentences' terms (answers, 10)."""
    generator = np.random.default_rng(seed)
    drawn = [bleu(terms[generator.integers(len(terms), size=len(terms))]) for _ in range(RESAMPLES)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def _cost(answers: Sequence[Answer], prefix: str, how: str, settings: Settings) -> list[Score]:
    ids = [prefix + a.question.id for a in answers]
    batches = f"{how}; batches of at most {settings.batch_tokens} tokens, each answer its share"
    seconds = [a.seconds for a in answers]
    return [
        mean(f"{prefix}seconds", ids, seconds, batches, higher_is_better=False, unit="s", of="answers"),
        _fixed(f"{prefix}output_size", output_kib(answers), "KiB", how),
    ]


def _fixed(metric: str, value: float, unit: str, protocol: str) -> Score:
    """A number that was counted, not sampled."""
    return Score(metric, value, value, value, 1, "", protocol, higher_is_better=False, unit=unit)


def output_kib(answers: Sequence[Answer]) -> float:
    """Equation 2.54: KiB of prompts, answers and references as JSON lines."""
    lines = (
        json.dumps(
            {"prompt": a.question.prompt, "answer": a.text, "reference": a.question.expected[0]}, ensure_ascii=False
        )
        for a in answers
    )
    return sum(len(line.encode()) + 1 for line in lines) / 1024


def model_mib(shape: ModelShape) -> float:
    """Equation 2.55: MiB of all stored tensors, adapter included, each element at its stored width.

    Zeros of an N:M pattern count: they are stored. Buffers that no file holds (rotary tables) do not.
    """
    blocks = [t for index in range(len(shape.blocks)) for t in shape.block_tensors(index)]
    return sum(t.nbytes for t in (*blocks, *shape.outer, *shape.adapter_tensors())) / 2**20

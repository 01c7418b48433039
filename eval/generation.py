"""Continue prompts, and score answers to instructions against their references (the task `generation`).

Protocol of the second thesis, section 4.1: a model, whatever it was tuned on, answers Alpaca, Dolly and AgentInstruct,
so that each set but one is another data set's. Beside the metrics stand the measures of its section 2.6.2: seconds
an answer, size of the stored output, size of the model. Decoding is greedy, or with `--top-p` sampled from generators
of our own: a repetition gives the same numbers either way.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import PlanError, TextError, require_package, require_unicode
from edgepress.checkpoints.kv_format import KVFormat
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.tokens import require_known
from edgepress.eval.answers import Answer, Question, Sampling, answer_all, end_tokens
from edgepress.eval.chat import in_template
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
from edgepress.eval.rows import HUB, Instruction, InstructionSet, load_instructions
from edgepress.eval.subject import Subject
from edgepress.eval.tasks import Settings

SAMPLES = 200  # rows of each set
METRICS = ("rouge_l", "f1", "sbert", "bleu", "seconds", "output size")
_TEMPLATE_TOKENS = 64  # room for what a chat template adds


def check(name: str, settings: Settings) -> None:
    for package in ("sacrebleu", "rouge_score"):
        require_package(package, f"--task {name}")
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
    sampling = _sampling(subject, settings)
    answers = answer_all(subject, questions, asked, f"{name}-{data.name}", sampling=sampling)
    scores = _scores(answers, data, subject, settings)
    for score in scores:
        if math.isnan(score.value):
            subject.runtime.progress.note(f"{name}: {score.protocol}")
    return scores, {"rows": len(rows), "too_long": len(data.rows) - len(rows), "unusable": data.unusable}


def _sampling(subject: Subject, settings: Settings) -> Sampling | None:
    return Sampling(settings.top_p, settings.temperature, subject.runtime.seed) if settings.top_p else None


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
        f"{data.name}, {len(answers)} rows, {_sampling(subject, settings) or 'greedy'}, 1 to {settings.reply_tokens} "
        f"tokens, {chat}; {subject.answering}; "
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


# --- continuing a prompt ----------------------------------------------------------------------------------------------
# Continuations of one prompt by a checkpoint's effective dense weights, greedy or sampled.


@dataclass(frozen=True)
class Decoding:
    tokens: int = 60  # new ones at most
    temperature: float = 0.0  # 0: the likeliest token at each step
    seed: int = 0
    chat: bool = False  # the prompt is a user's turn in the tokenizer's chat template
    kv: KVFormat = field(default_factory=KVFormat)

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise PlanError(f"--tokens {self.tokens}: at least 1")
        if not 0 <= self.temperature < math.inf:
            raise PlanError(f"--temperature {self.temperature}: 0 (greedy) or more")

    def __str__(self) -> str:
        how = f"temperature {self.temperature:g}, seed {self.seed}" if self.temperature else "greedy"
        cache = "" if self.kv.plain else f", {self.kv}"
        return f"{how}, at most {self.tokens} new tokens{', chat template' if self.chat else ''}{cache}"


@dataclass(frozen=True)
class Continuation:
    prompt: str  # as the tokenizer gives it back
    text: str  # what follows
    tokens: int
    ended: bool  # by a token that ends the text, not by the limit
    seconds: float  # without loading


@torch.no_grad()
def continue_prompt(checkpoint: Checkpoint, prompt: str, decoding: Decoding, device: torch.device) -> Continuation:
    """At most decoding.tokens new tokens after the prompt, in the checkpoint's stored precision.

    Sampling draws from a generator of its own: the same seed, the same noise for every checkpoint. Raises TextError
    for an empty prompt, PlanError where a chat template is asked for and there is none.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    from edgepress.eval.kv_cache import on_model

    subject = Subject(checkpoint, Runtime(device, checkpoint.stored_dtype))
    tokenizer: Any = subject.tokenizer
    ids = _prompt_ids(checkpoint, tokenizer, prompt, decoding.chat).to(device)
    model: Any = subject.model
    ends = end_tokens(subject)
    # A configuration of our own: the folder's sampling and penalties would change what is compared.
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=decoding.tokens, do_sample=False, pad_token_id=ends[0] if ends else 0, eos_token_id=ends or None
    )
    processors = LogitsProcessorList([GumbelNoise(decoding)] if decoding.temperature else [])
    with on_model(model, checkpoint.shape, decoding.kv, torch.zeros(1, dtype=torch.long)) as cache:
        began = time.perf_counter()
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            logits_processor=processors,
            past_key_values=cache,
        )[0].tolist()
        seconds = time.perf_counter() - began
    new = output[ids.shape[1] :]
    ended = bool(new) and new[-1] in ends
    asked, whole = (str(tokenizer.decode(t, skip_special_tokens=True)) for t in (output[: ids.shape[1]], output))
    # Decoded alone, the new tokens would lose the space that some tokenizers put before a word.
    text = whole[len(asked) :] if whole.startswith(asked) else str(tokenizer.decode(new, skip_special_tokens=True))
    return Continuation(asked, text, len(new) - ended, ended, seconds)


class GumbelNoise:
    """Makes the likeliest token a sample of softmax(scores / temperature), as argmax(scores / T + Gumbel noise) is.

    transformers' own sampling draws from torch's global generator.
    """

    def __init__(self, decoding: Decoding) -> None:
        self._temperature = decoding.temperature
        self._generator = torch.Generator().manual_seed(decoding.seed)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores (b, vocabulary) are logits."""
        uniform = torch.rand(scores.shape, generator=self._generator, dtype=torch.float64)
        noise = -torch.log(-torch.log(uniform.clamp_min(torch.finfo(torch.float64).tiny)))
        return scores.double() / self._temperature + noise.to(scores.device)


def _prompt_ids(checkpoint: Checkpoint, tokenizer: Any, prompt: str, chat: bool) -> Tensor:
    """The prompt's token ids (1, L)."""
    require_unicode(prompt, "the prompt", PlanError)
    if chat:
        turn = [{"role": "user", "content": prompt}]
        prompt = in_template(tokenizer, [turn], checkpoint.folder, "--chat", answer_next=True)[0]
    ids: Tensor = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat)["input_ids"]
    if not ids.numel():
        raise TextError("the prompt is empty; give at least one word to continue")
    require_known(ids, checkpoint.shape.vocabulary, checkpoint.name)
    return ids.long()


def same_words(text: str, other: str) -> int:
    """How many words two texts share from their beginning."""
    pairs = zip(text.split(), other.split(), strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(text.split()), len(other.split())))

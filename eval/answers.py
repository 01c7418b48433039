"""Answer many questions, greedily or sampled: batched, kept on disk, the same whatever the batch.

Prompts of like length are answered together (eval/answers.py). In float32 rounding is too small to change a word; in
bfloat16 the likeliest two tokens can be so close that the batch decides, which is why `auto` means float32 here.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgepress.checkpoints.errors import TextError
from edgepress.checkpoints.kv_format import PLAIN, KVFormat
from edgepress.checkpoints.tokens import require_known
from edgepress.eval.answer_file import AnswerFile
from edgepress.eval.chat import in_template
from edgepress.eval.subject import Subject
from edgepress.eval.tasks import Settings

Grade = Callable[["Question", str], dict[str, Any]]


@dataclass(frozen=True)
class Question:
    id: str  # the same for every checkpoint that is asked; unique within a task
    prompt: str  # before the chat template
    expected: tuple[str, ...]


@dataclass(frozen=True)
class Answer:
    question: Question
    text: str
    tokens: int  # generated, without the end mark
    seconds: float  # its share of its batch
    facts: dict[str, Any] = field(default_factory=dict)  # what `grade` said


def answer_all(
    subject: Subject,
    questions: Sequence[Question],
    settings: Settings,
    task: str,
    grade: Grade | None = None,
    key: dict[str, Any] | None = None,
    sampling: Sampling | None = None,
) -> list[Answer]:
    """Answers in the questions' order, each of 1 to settings.new_tokens tokens, the likeliest at each step or sampled.

    With settings.answers they are kept in FOLDER/LABEL/TASK.jsonl, and those already there are not computed again.
    `grade` says of each answer what is worth keeping beside it; `key` is whatever else decides the answers and must
    be the same to resume. Raises CheckpointError for a file of other answers, TextError for prompts that are empty or
    too long for the model.
    """
    _require_distinct(questions)
    prompts = _as_given(subject, questions, settings.chat)
    how = {"new_tokens": settings.new_tokens, "chat": settings.chat, "dtype": subject.dtype}
    how |= settings.kv.key() | (key or {}) | (asdict(sampling) if sampling else {})
    path = Path(settings.answers) / subject.label / f"{task}.jsonl" if settings.answers else None
    note = subject.runtime.progress.note
    kept = AnswerFile(path, task, subject.checkpoint.fingerprint, subject.label, how, note) if path else None
    rows: dict[str, dict[str, Any]] = {}
    with kept or nullcontext():
        if kept:
            rows = _still_valid(kept, questions, prompts)
        todo = [(q, p) for q, p in zip(questions, prompts, strict=True) if q.id not in rows]
        subject.runtime.progress.start(task, len(todo))
        for batch in _batches(subject, todo, settings):
            new = _answered(subject, batch, settings, grade, sampling)
            if kept:
                kept.add(new)
            rows |= {row["id"]: row for row in new}
            for _ in new:
                subject.runtime.progress.step()
    # Graded again, since the file may be older than the rules.
    return [
        Answer(q, rows[q.id]["answer"], rows[q.id]["tokens"], rows[q.id]["seconds"], _graded(grade, q, rows[q.id]))
        for q in questions
    ]


# --- prompts ----------------------------------------------------------------------------------------------------------


def _as_given(subject: Subject, questions: Sequence[Question], chat: bool) -> list[str]:
    """The prompts as the model gets them. Raises PlanError where a chat template is asked for and there is none."""
    if not chat:
        return [question.prompt for question in questions]
    turns = [[{"role": "user", "content": question.prompt}] for question in questions]
    return in_template(subject.tokenizer, turns, subject.checkpoint.folder, "--chat", answer_next=True)


def _require_distinct(questions: Sequence[Question]) -> None:
    if not questions:
        raise TextError("there is no question to answer")
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            raise TextError(f"two questions have the id '{question.id}'")
        seen.add(question.id)


def _still_valid(kept: AnswerFile, questions: Sequence[Question], prompts: Sequence[str]) -> dict[str, dict[str, Any]]:
    for question, prompt in zip(questions, prompts, strict=True):
        row = kept.rows.get(question.id)
        if row is not None and row["prompt"] != prompt:
            raise TextError(
                f"{kept.path} has another prompt for question '{question.id}': its questions came from other data. "
                "Remove that file, or keep these answers elsewhere with --answers FOLDER"
            )
    return {question.id: kept.rows[question.id] for question in questions if question.id in kept.rows}


# --- batches ----------------------------------------------------------------------------------------------------------

_Asked = tuple[Question, str, list[int]]


def _batches(subject: Subject, todo: Sequence[tuple[Question, str]], settings: Settings) -> Iterator[list[_Asked]]:
    """Questions of like length together, the longest first: memory runs out at once or never."""
    if not todo:
        return
    ids_of = subject.tokenizer([p for _, p in todo], add_special_tokens=not settings.chat)["input_ids"]
    tokenised = [(q, p, list(ids)) for (q, p), ids in zip(todo, ids_of, strict=True)]
    room = subject.positions - settings.new_tokens
    for question, _, ids in tokenised:
        if not ids:
            raise TextError(f"question '{question.id}' is empty")
        require_known(torch.tensor(ids), subject.checkpoint.shape.vocabulary, f"question '{question.id}'")
        if len(ids) > room:
            raise TextError(
                f"question '{question.id}' has {len(ids)} tokens; the model's {subject.positions} positions leave "
                f"{room} beside {settings.new_tokens} for the answer"
            )
    tokenised.sort(key=lambda asked: -len(asked[2]))
    batch: list[_Asked] = []
    for asked in tokenised:
        longest = len((batch or [asked])[0][2]) + settings.new_tokens
        if batch and (len(batch) + 1) * longest > settings.batch_tokens:
            yield batch
            batch = []
        batch.append(asked)
    if batch:
        yield batch


def _answered(
    subject: Subject, batch: list[_Asked], settings: Settings, grade: Grade | None, sampling: Sampling | None
) -> list[dict[str, Any]]:
    """The batch's lines of the answer file."""
    began = time.perf_counter()
    choose = sampling.choosing([question.id for question, _, _ in batch]) if sampling else _likeliest
    replies = greedy(subject, [ids for _, _, ids in batch], settings.new_tokens, settings.kv, choose)
    seconds = (time.perf_counter() - began) / len(batch)
    rows = []
    for (question, prompt, _), reply in zip(batch, replies, strict=True):
        row: dict[str, Any] = {"id": question.id, "prompt": prompt}
        row["answer"] = str(subject.tokenizer.decode(reply, skip_special_tokens=True))
        row |= {"expected": list(question.expected), "tokens": len(reply), "seconds": round(seconds, 6)}
        rows.append(row | _graded(grade, question, row))
    return rows


def _graded(grade: Grade | None, question: Question, row: dict[str, Any]) -> dict[str, Any]:
    return grade(question, row["answer"]) if grade else {}


# --- greedy decoding --------------------------------------------------------------------------------------------------
# Greedy decoding of many prompts at once that reads and computes no more than each of them needs.
#
# Prompts are padded on the left; the padding is masked, and positions count from the first real token, so a
# sequence's logits are those it has alone, up to rounding. A row enters the batch about where its prompt begins and
# leaves it when its answer ends: neither padding nor finished answers take much arithmetic.


# Times at which the rows of a batch may enter. Each costs one more reading of the weights, about a step of decoding.
ENTRIES = 8


def end_tokens(subject: Subject) -> list[int]:
    """Every token that ends an answer: the tokenizer's, the configuration's and the generation settings'."""
    wanted: list[Any] = [subject.tokenizer.eos_token_id, getattr(subject.model.config, "eos_token_id", None)]
    path = subject.checkpoint.folder / "generation_config.json"
    if path.is_file():
        wanted.append(json.loads(path.read_text()).get("eos_token_id"))
    flat = {token for item in wanted for token in (item if isinstance(item, list) else [item])}
    return sorted(token for token in flat if token is not None)


@dataclass(frozen=True)
class Sampling:
    """Tokens drawn from the fewest likeliest whose odds at this temperature sum to `top_p` (nucleus sampling, Holtzman
    et al., arXiv 1904.09751).

    Each question has a generator of its own, from the seed and its id: its answer does not depend on its batch.
    """

    top_p: float
    temperature: float = 1.0
    seed: int = 0

    def __str__(self) -> str:
        return f"top-p {self.top_p:g}, temperature {self.temperature:g}, seed {self.seed}"

    def choosing(self, ids: Sequence[str]) -> Choose:
        digests = [hashlib.sha256(f"{self.seed} {name}".encode()).digest() for name in ids]
        generators = [torch.Generator().manual_seed(int.from_bytes(d[:7], "big")) for d in digests]

        def choose(logits: Tensor, prompts: Sequence[int]) -> Tensor:
            drawn = [torch.rand((), generator=generators[i], dtype=torch.float64) for i in prompts]
            return nucleus(logits, torch.stack(drawn).to(logits.device), self.top_p, self.temperature)

        return choose


def nucleus(logits: Tensor, drawn: Tensor, top_p: float, temperature: float) -> Tensor:
    """Token ids (b,) from logits (b, vocabulary) and numbers drawn (b,) in [0, 1): the distribution's inverse."""
    odds, order = (logits.double() / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    total = odds.cumsum(-1)
    kept = (total - odds < top_p).sum(-1)  # the likeliest always
    share = total.gather(-1, kept[:, None] - 1)
    place = torch.minimum((total <= drawn[:, None] * share).sum(-1), kept - 1)
    return order.gather(-1, place[:, None])[:, 0]


# Logits (b, vocabulary) and the places of the prompts that the rows belong to -> a token for each row (b,).
Choose = Callable[[Tensor, Sequence[int]], Tensor]


def _likeliest(logits: Tensor, prompts: Sequence[int]) -> Tensor:
    return logits.argmax(-1)


@torch.no_grad()
def greedy(
    subject: Subject,
    prompts: Sequence[list[int]],
    new_tokens: int,
    kv: KVFormat = PLAIN,
    choose: Choose = _likeliest,
) -> list[list[int]]:
    """1 to new_tokens tokens after each prompt, the likeliest at each step, in one batch; the end mark is left off.

    choose: which token instead of the likeliest. Settings of the checkpoint's own (sampling, penalties) stay out. What
    the padding holds does not matter, so a tokenizer needs no pad token. kv: each token sees those before it as they
    come out of such a cache.
    """
    device = subject.runtime.device
    ends = end_tokens(subject)
    rows = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # the prompt of each row
    ids, mask = (t.to(device) for t in padded_left([prompts[i] for i in rows]))
    cache, logits = _compressed(subject, ids, mask, kv) if not kv.plain else prefill(subject.model, ids, mask)
    logits[:, ends] = -torch.inf  # an answer has at least one token
    replies: list[list[int]] = [[] for _ in prompts]
    while True:
        tokens = choose(logits, rows)
        going = []
        for row, token in enumerate(tokens.tolist()):
            if token not in ends:
                replies[rows[row]].append(token)
                if len(replies[rows[row]]) < new_tokens:
                    going.append(row)
        if not going:
            return replies
        if len(going) < len(rows):  # a copy of the cache, which the next step makes anyway to append its column
            kept = torch.tensor(going, device=device)
            cache.batch_select_indices(kept)
            rows, mask, tokens = [rows[row] for row in going], mask[kept], tokens[kept]
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        logits = _last_logits(subject.model, tokens[:, None], mask, cache)


def prefill(model: Any, ids: Tensor, mask: Tensor) -> tuple[Any, Tensor]:
    """The cache of keys and values of all prompts, and the logits (b, vocabulary) after their last tokens.

    ids and mask (b, L) as `padded_left` makes them, the longest prompt first. The columns go through the model in at
    most ENTRIES pieces, each without the rows whose prompts begin after it. A row that enters gets another row's
    cache as its padding: the mask hides it.
    """
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    begins = (mask == 0).sum(-1).tolist()
    width, step = ids.shape[1], -(-len(begins) // ENTRIES)
    logits, present = torch.empty(0), 0
    for start, stop in pairwise([*sorted(set(begins[::step])), width]):
        count = sum(begin < stop for begin in begins)
        if present and count > present:
            cache.batch_select_indices(torch.arange(count, device=ids.device).clamp(max=present - 1))
        logits = _last_logits(model, ids[:count, start:stop], mask[:count, :stop], cache)
        present = count
    return cache, logits


def _compressed(subject: Subject, ids: Tensor, mask: Tensor, kv: KVFormat) -> tuple[Any, Tensor]:
    """As `prefill`, with all rows in one piece: a compressed cache takes its prompts at once."""
    from edgepress.eval.kv_cache import on_model

    with on_model(subject.model, subject.checkpoint.shape, kv, (mask == 0).sum(-1)) as cache:
        return cache, _last_logits(subject.model, ids, mask, cache)


def _last_logits(model: Any, ids: Tensor, mask: Tensor, cache: Any) -> Tensor:
    """Float32 logits (b, vocabulary) after the last of the columns ids (b, new); mask (b, cached + new)."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    out = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    logits: Tensor = out.logits[:, -1].float()
    return logits


def padded_left(prompts: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both (prompts, longest) int64."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask

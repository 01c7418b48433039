"""Greedy decoding in batches whose rows come and go, against loops over one prompt at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.runtime import Runtime
from edgepress.eval.answers import ENTRIES, end_tokens, greedy, padded_left, prefill
from edgepress.eval.subject import Subject

pytestmark = pytest.mark.unit

Tiny = Callable[..., Path]
ENDS = [2, *range(3, 512, 8)]  # so many that answers end anywhere
LENGTHS = [3, 40, 9, 9, 1, 17, 26, 5, 33, 12, 12, 21, 2, 30]  # more prompts than ENTRIES; most beyond the window of 8
NEW_TOKENS = 20


@pytest.fixture(params=["llama", "qwen2", "gemma3_text"])
def subject(request: pytest.FixtureRequest, tiny_model: Tiny, tmp_path: Path) -> Subject:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model(request.param, tie_word_embeddings=False), folder)  # tied, they repeat one token
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ENDS}))
    return Subject(Checkpoint.open(folder), Runtime())


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 512, (length,), generator=generator).tolist() for length in LENGTHS]


def plain(subject: Subject) -> Any:
    return AutoModelForCausalLM.from_pretrained(subject.checkpoint.folder, dtype=torch.float32)


@torch.no_grad()
def one_by_one(model: Any, asked: Sequence[list[int]]) -> list[list[int]]:
    """The whole sequence anew for each token: no cache, no batch, no padding."""
    replies = []
    for prompt in asked:
        ids = list(prompt)
        while len(ids) < len(prompt) + NEW_TOKENS:
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
            if len(ids) == len(prompt):
                logits[ENDS] = -torch.inf  # at least one token
            token = int(logits.argmax())
            if token in ENDS:
                break
            ids.append(token)
        replies.append(ids[len(prompt) :])
    return replies


def test_answers_of_any_length_equal_a_plain_loop(subject: Subject) -> None:
    expected = one_by_one(plain(subject), prompts())
    lengths = set(map(len, expected))
    assert len(lengths) >= 5 and max(lengths) > 3 * min(lengths)
    assert end_tokens(subject) == ENDS
    assert greedy(subject, prompts(), NEW_TOKENS) == expected


@torch.no_grad()
def test_prompts_that_enter_late_have_the_logits_they_have_alone(subject: Subject) -> None:
    asked = sorted(prompts(), key=len, reverse=True)
    cache, logits = prefill(subject.model, *padded_left(asked))
    model = plain(subject)
    assert cache.get_seq_length() == max(LENGTHS)
    for row, prompt in zip(logits, asked, strict=True):
        alone = model(input_ids=torch.tensor([prompt])).logits[0, -1]
        torch.testing.assert_close(row, alone, rtol=1e-4, atol=1e-4)


def test_finished_answers_and_padding_are_not_computed(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that go through the model: no row after its answer's end, and each prompt with little padding."""
    passes: list[tuple[int, int]] = []
    forward = subject.model.forward

    def counted(**given: Any) -> Any:
        passes.append(tuple(given["input_ids"].shape))
        assert given["logits_to_keep"] == 1
        return forward(**given)

    monkeypatch.setattr(subject.model, "forward", counted)
    replies = greedy(subject, prompts(), NEW_TOKENS)
    # Step k asks for token k + 1 of every answer that has k tokens and may have more.
    expected = [(rows, 1) for k in range(1, NEW_TOKENS) if (rows := sum(len(reply) >= k for reply in replies))]
    reading, decoding = passes[: -len(expected)], passes[-len(expected) :]
    assert decoding == expected
    assert len(reading) <= ENTRIES
    assert sum(LENGTHS) <= sum(rows * columns for rows, columns in reading) < 0.6 * len(LENGTHS) * max(LENGTHS)


def test_one_prompt_and_one_token_will_do(subject: Subject) -> None:
    alone = [greedy(subject, [prompt], 1)[0] for prompt in prompts()]
    assert alone == greedy(subject, prompts(), 1)
    assert all(len(reply) == 1 and reply[0] not in ENDS for reply in alone)

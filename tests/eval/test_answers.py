"""Batched answers against one-at-a-time generation; the file that keeps them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import CheckpointError, PlanError, TextError
from edgepress.checkpoints.runtime import Runtime, Silent
from edgepress.eval.answers import Question, Sampling, answer_all, greedy, nucleus, padded_left
from edgepress.eval.subject import Subject
from edgepress.eval.tasks import Settings

pytestmark = pytest.mark.unit

Tiny = Callable[..., Path]
TEXTS = ["a", "What is it?", "Question: which of these is a longer prompt than the others here? Answer:", "for x in y"]
QUESTIONS = [Question(str(i), text, ("x",)) for i, text in enumerate(TEXTS * 2)]
QUESTIONS = [replace(q, prompt=q.prompt + " more" * (i % 3)) for i, q in enumerate(QUESTIONS)]


def subject_of(folder: Path, progress: Any = None) -> Subject:
    return Subject(Checkpoint.open(folder), Runtime(progress=progress or Silent()), "tiny")


@pytest.fixture(scope="module")
def subject(tiny_model: Tiny) -> Subject:
    return subject_of(tiny_model())


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
@torch.no_grad()
def test_left_padding_leaves_logits_as_they_are(tiny_model: Tiny, family: str) -> None:
    subject = subject_of(tiny_model(family))
    prompts = [subject.tokenizer(text)["input_ids"] for text in TEXTS]
    model: Any = AutoModelForCausalLM.from_pretrained(subject.checkpoint.folder, dtype=torch.float32)
    ids, mask = padded_left(prompts)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    together = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -1]
    for row, prompt in zip(together, prompts, strict=True):
        alone = model(input_ids=torch.tensor([prompt])).logits[0, -1]
        torch.testing.assert_close(row, alone, rtol=1e-4, atol=1e-4)


def test_answers_do_not_depend_on_the_batch(subject: Subject) -> None:
    alone, pairs, all_at_once = (
        answer_all(subject, QUESTIONS, Settings(new_tokens=10, batch_tokens=size), "t") for size in (1, 80, 10_000)
    )
    assert [a.text for a in alone] == [a.text for a in pairs] == [a.text for a in all_at_once]
    assert [a.question for a in alone] == QUESTIONS  # in the order of the questions, not of their lengths
    assert all(1 <= a.tokens <= 10 and a.seconds > 0 for a in alone)


def test_an_answer_ends_before_any_end_token_and_is_never_empty(tiny_model: Tiny, tmp_path: Path) -> None:
    """Every token of the vocabulary but a few ends an answer, so each is one token long."""
    import shutil

    folder = tmp_path / "ending"
    shutil.copytree(tiny_model(), folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(2, 512))}))
    subject = subject_of(folder)
    answers = greedy(subject, [[5, 6, 7], [8, 9]], 6)
    assert [len(a) for a in answers] != [6, 6]
    assert all(set(a) <= {0, 1} for a in answers)


class Interrupting(Silent):
    """Stops the work after some steps, as Ctrl-C does."""

    def __init__(self, after: int) -> None:
        self.left = after

    def step(self, **numbers: float | str) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


def test_an_interrupted_run_goes_on_where_it_stopped(tiny_model: Tiny, tmp_path: Path) -> None:
    settings = Settings(new_tokens=6, batch_tokens=60, answers=str(tmp_path))
    whole = answer_all(subject_of(tiny_model()), QUESTIONS, replace(settings, answers=""), "t")
    with pytest.raises(KeyboardInterrupt):
        answer_all(subject_of(tiny_model(), Interrupting(2)), QUESTIONS, settings, "t")
    path = tmp_path / "tiny" / "t.jsonl"
    kept = path.read_text().splitlines()
    assert 1 < len(kept) < 1 + len(QUESTIONS)
    with path.open("a") as file:
        file.write('{"id": "7", "promp')  # a kill in the middle of a line
    resumed = answer_all(subject_of(tiny_model()), QUESTIONS, settings, "t")
    assert [a.text for a in resumed] == [a.text for a in whole]
    assert path.read_text().splitlines()[: len(kept)] == kept
    rows = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    assert sorted(row["id"] for row in rows) == sorted(q.id for q in QUESTIONS)
    assert {row["prompt"] for row in rows} == {q.prompt for q in QUESTIONS}


def test_a_finished_file_is_read_without_loading_the_model(subject: Subject, tmp_path: Path) -> None:
    settings = Settings(new_tokens=4, answers=str(tmp_path))
    first = answer_all(subject, QUESTIONS, settings, "t", lambda q, text: {"length": len(text)})
    again = Subject(subject.checkpoint, Runtime(), "tiny")
    second = answer_all(again, QUESTIONS[:3], settings, "t", lambda q, text: {"length": 2 * len(text)})
    assert "model" not in again.__dict__
    assert [a.text for a in second] == [a.text for a in first[:3]]
    assert [a.facts["length"] for a in second] == [2 * a.facts["length"] for a in first[:3]]  # graded anew


def test_a_file_of_another_checkpoint_or_other_settings_names_both(
    subject: Subject, tiny_model: Tiny, tmp_path: Path
) -> None:
    settings = Settings(new_tokens=4, answers=str(tmp_path))
    answer_all(subject, QUESTIONS[:2], settings, "t")
    other = subject_of(tiny_model("llama", seed=5))
    with pytest.raises(CheckpointError) as raised:
        answer_all(other, QUESTIONS[:2], settings, "t")
    assert subject.checkpoint.fingerprint[:12] in str(raised.value)
    assert other.checkpoint.fingerprint[:12] in str(raised.value)
    with pytest.raises(CheckpointError, match=r"new_tokens 4; this one is t on tiny .* new_tokens 5"):
        answer_all(subject, QUESTIONS[:2], replace(settings, new_tokens=5), "t")
    with pytest.raises(TextError, match="another prompt for question '0'"):
        answer_all(subject, [replace(QUESTIONS[0], prompt="else")], settings, "t")


def test_a_damaged_line_is_named(subject: Subject, tmp_path: Path) -> None:
    settings = Settings(new_tokens=4, answers=str(tmp_path))
    answer_all(subject, QUESTIONS[:2], settings, "t")
    path = tmp_path / "tiny" / "t.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "{oops", lines[2]]) + "\n")
    with pytest.raises(TextError, match="line 2: not an answer"):
        answer_all(subject, QUESTIONS[:2], settings, "t")


def test_a_chat_template_is_used_or_missed(tiny_model: Tiny) -> None:
    subject = subject_of(tiny_model())
    with pytest.raises(PlanError, match="no chat template"):
        answer_all(subject, QUESTIONS, Settings(chat=True), "t")
    subject.tokenizer.chat_template = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}A:"
    seen = answer_all(subject, QUESTIONS[:2], Settings(chat=True, new_tokens=3), "t")
    plain = [replace(q, prompt=f"<s>{q.prompt}</s>A:") for q in QUESTIONS[:2]]
    assert [a.text for a in seen] == [a.text for a in answer_all(subject, plain, Settings(new_tokens=3), "t")]


def test_a_tokenizer_without_pad_token_will_do(tiny_model: Tiny, subject: Subject) -> None:
    bare = subject_of(tiny_model())
    bare.tokenizer.pad_token = None
    settings = Settings(new_tokens=4)
    assert [a.text for a in answer_all(bare, QUESTIONS, settings, "t")] == [
        a.text for a in answer_all(subject, QUESTIONS, settings, "t")
    ]


def test_impossible_questions_are_named(subject: Subject) -> None:
    for prompt, words in (("", "is empty"), ("word " * 400, "256 positions leave 246 beside 10")):
        with pytest.raises(TextError, match=words):
            answer_all(subject, [Question("7", prompt, ("x",))], Settings(new_tokens=10), "t")
    with pytest.raises(TextError, match="two questions have the id '0'"):
        answer_all(subject, [QUESTIONS[0], QUESTIONS[0]], Settings(), "t")
    with pytest.raises(TextError, match="no question"):
        answer_all(subject, [], Settings(), "t")


def test_the_nucleus_is_drawn_from_by_its_odds() -> None:
    odds = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15], dtype=torch.float64)
    drawn = torch.linspace(0, 1, 10_001, dtype=torch.float64)[:-1]

    def shares(top_p: float, temperature: float = 1.0) -> list[float]:
        logits = odds.log().expand(len(drawn), -1)
        return (nucleus(logits, drawn, top_p, temperature).bincount(minlength=5) / len(drawn)).tolist()

    # By hand: 0.4 alone; 0.4 and 0.3; 0.4, 0.3 and 0.15; all.
    assert shares(0.39) == [0, 1, 0, 0, 0]
    assert shares(0.5) == pytest.approx([0, 4 / 7, 0, 3 / 7, 0], abs=2e-4)
    assert shares(0.75) == pytest.approx([0, 0.4 / 0.85, 0, 0.3 / 0.85, 0.15 / 0.85], abs=2e-4)
    assert shares(1.0) == pytest.approx(odds.tolist(), abs=2e-4)
    sharper = (odds**2 / (odds**2).sum()).tolist()
    assert shares(1.0, temperature=0.5) == pytest.approx(sharper, abs=2e-4)


def test_sampled_answers_do_not_depend_on_the_batch(subject: Subject) -> None:
    questions = QUESTIONS[:4]
    settings = Settings(new_tokens=8)
    together = answer_all(subject, questions, settings, "t", sampling=Sampling(0.9, seed=1))
    alone = [
        answer_all(subject, [q], replace(settings, batch_tokens=1), "t", sampling=Sampling(0.9, seed=1))[0].text
        for q in questions
    ]
    assert [a.text for a in together] == alone
    other = answer_all(subject, questions, settings, "t", sampling=Sampling(0.9, seed=2))
    assert [a.text for a in other] != alone
    plain = answer_all(subject, questions, settings, "t")
    nearly = answer_all(subject, questions, settings, "t", sampling=Sampling(1e-9))
    assert [a.text for a in nearly] == [a.text for a in plain]

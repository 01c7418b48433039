"""Which precision `auto` means for each task."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.runtime import Silent
from edgepress.eval.results import Result
from edgepress.eval.subject import Subject
from edgepress.eval.tasks import Settings, Task, find_tasks
from edgepress.pipeline.evaluate import measure_all

pytestmark = pytest.mark.unit


@pytest.fixture
def named(tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Checkpoint]]:
    """A model stored in bfloat16 on a processor that multiplies it."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    return [("tiny", Checkpoint.open(tiny_model(dtype="bfloat16")))]


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What each task would be measured in, and how it would name that for answers."""
    found: dict[str, str] = {}

    def run(name: str, subject: Subject, settings: Settings) -> Result:
        found[name] = subject.answering
        return Result(name, (), 0.0, {})

    monkeypatch.setattr(Task, "load", lambda self: run)
    return found


NAMES = ["triviaqa-closed", "perplexity", "triviaqa-open", "robustness", "generation", "piqa"]
BF16 = "bfloat16, near-ties may depend on the batch"


@pytest.mark.parametrize(
    ("dtype", "followed", "expected"),
    [
        ("auto", "perplexity", ["float32", BF16, "float32", BF16, "float32", BF16]),
        ("auto", "triviaqa-closed", ["float32", BF16, "float32", "float32", "float32", BF16]),
        ("bfloat16", "triviaqa-closed", [BF16] * 6),
        ("float32", "perplexity", ["float32"] * 6),
    ],
)
def test_answers_are_float32_unless_the_user_says_otherwise(
    named: list[tuple[str, Checkpoint]], used: dict[str, str], dtype: str, followed: str, expected: list[str]
) -> None:
    tasks = find_tasks(NAMES)
    (measured,) = measure_all(named, tasks, Settings(robust_task=followed), "cpu", dtype, Silent())
    assert [used[name] for name in NAMES] == expected
    assert list(measured.results) == NAMES  # in the order the user gave

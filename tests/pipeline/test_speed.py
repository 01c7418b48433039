"""The task `speed` in its process of its own: what it reports, never how fast that is."""

from __future__ import annotations

import math
import os
import signal
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import CheckpointError
from edgepress.checkpoints.runtime import Runtime, Silent
from edgepress.eval import speed
from edgepress.eval.subject import Subject
from edgepress.eval.tasks import Settings

pytestmark = pytest.mark.pipeline


class Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


def test_medians_spread_memory_and_protocol(tiny_model: Callable[..., Path]) -> None:
    notes = Notes()
    given = Settings(speed_prompt=16, speed_tokens=4, repeats=3, kernels=True)
    result = speed.run("speed", Subject(Checkpoint.open(tiny_model()), Runtime(progress=notes)), given)
    (timing,) = result.details["timings"]
    assert len(timing["repeats"]) == 3 and timing["engine"] == "effective" and timing["dtype"] == "float32"
    assert timing["threads"] == torch.get_num_threads()
    scores = {score.metric: score for score in result.scores}
    rates = [16 / r["prefill_seconds"] for r in timing["repeats"]]
    prefill = scores["prefill, effective"]
    assert (prefill.value, prefill.low, prefill.high) == (statistics.median(rates), min(rates), max(rates))
    rates = [3 / r["decode_seconds"] for r in timing["repeats"]]
    assert scores["decode, effective"].value == statistics.median(rates)
    assert scores["first token, effective"].unit == "s"
    assert scores["peak memory, effective"].value == timing["peak_memory_bytes"] / 2**20
    assert timing["peak_memory_bytes"] >= timing["libraries_bytes"] > 0
    for words in ("prompt 16, 4 new tokens", "float32", f"{torch.get_num_threads()} thread"):
        assert words in prefill.protocol
    kernels = scores["decode, kernels"]
    assert (
        math.isnan(kernels.value)
        and kernels.protocol == "decode, kernels not measured: the checkpoint is not quantised"
    )
    assert any("kernels not measured" in note for note in notes.notes)


def killed(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_is_an_error_that_says_why(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "_timed", killed)
    checkpoint = Checkpoint.open(tiny_model())
    with pytest.raises(CheckpointError, match="for want of memory"):
        speed.measure_speed(checkpoint, "effective", speed.Workload(4, 2), torch.device("cpu"), torch.float32)

"""Speed with GPTQModel's kernels, which a machine compiles once: a tiny model's stages 4 and 5."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.eval.speed import Workload, measure_speed

pytestmark = pytest.mark.real

FLAGS = ("--skip", "depth,wanda,lora", "--data", "embedded", "--window", "64", "--tokens", "512", "--group", "32")
BUDGET = ("--quant-samples", "2", "--quant-length", "64", "--eora", "4", "--eora-samples", "2", "--eora-length", "64")


def test_kernels_multiply_the_codes(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "edgepress.pipeline.cli",
        "--model",
        str(tiny_model()),
        "-o",
        str(tmp_path / "out"),
    ]
    done = subprocess.run([*command, *FLAGS, *BUDGET], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for stage in ("1-gptq*", "2-eora*"):
        checkpoint = Checkpoint.open(next((tmp_path / "out").glob(stage)))
        timing = measure_speed(checkpoint, "kernels", Workload(16, 4, 2), torch.device("cpu"), torch.float32)
        assert timing.kernels and timing.protocol.startswith("prompt 16, 4 new tokens, batch 1; kernels (")
        assert len(timing.repeats) == 2
        assert all(r.decode_seconds > 0 for r in timing.repeats)

"""What the tests of LoRA's layers, training and teacher share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.runtime import Silent
from edgepress.checkpoints.tokens import TokenBatches
from edgepress.stages.options import Lora


class Watcher(Silent):
    """Remembers every number, and raises when a step is reported that a test wants to be the last."""

    def __init__(self, die_at: int = 0) -> None:
        self.die_at, self.steps, self.planned, self.said = die_at, [], [], []

    def start(self, task: str, steps: int) -> None:
        self.planned.append((task, steps))

    def step(self, **numbers: float | str) -> None:
        self.steps.append(numbers)
        if numbers.get("step", "").split("/")[0] == str(self.die_at):
            raise KeyboardInterrupt

    def say(self, message: str) -> None:
        self.said.append(message)


def text(samples: int = 16, length: int = 16) -> TokenBatches:
    """Counting by one: something to learn."""
    starts = torch.arange(samples) * 13 % 40 + 3
    return TokenBatches("counting", starts[:, None] + torch.arange(length))


def options(**changes: Any) -> Lora:
    fields = {"rank": 4, "alpha": 8, "steps": 8, "samples": 16, "length": 16, "batch": 4, "micro_batch": 2}
    return Lora(**(fields | {"dropout": 0.1, "learning_rate": 5e-3, "save_steps": 3} | changes))


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def mean_loss(checkpoint: Checkpoint, ids: Tensor) -> float:
    with torch.no_grad():
        logits = checkpoint.model()(input_ids=ids).logits
    return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))

"""The model and tokenizer of a checkpoint that is measured, loaded once for all tasks."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.runtime import Runtime

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Subject:
    def __init__(self, checkpoint: Checkpoint, runtime: Runtime, label: str = "") -> None:
        self.checkpoint, self.runtime = checkpoint, runtime
        self.label = label or checkpoint.name

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.checkpoint.tokenizer()

    @cached_property
    def model(self) -> PreTrainedModel:
        """Dense effective weights in the runtime's precision."""
        return self.checkpoint.model(self.runtime.device, self.runtime.dtype)

    @property
    def dtype(self) -> str:
        return str(self.runtime.dtype).removeprefix("torch.")

    @property
    def answering(self) -> str:
        """The precision as the protocol of greedy answers names it."""
        return self.dtype if self.dtype == "float32" else f"{self.dtype}, near-ties may depend on the batch"

    @property
    def positions(self) -> int:
        """Tokens the model was made for."""
        return self.checkpoint.shape.positions

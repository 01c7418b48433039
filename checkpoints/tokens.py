"""Token windows that a stage calibrates or trains on, with the proof of which tokens they were."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from checkpoints.errors import TextError


@dataclass(frozen=True)
class TokenBatches:
    """ids (samples, length) int64, and the name of the text they come from.

    documents: the text itself, for the one stage that changes how text becomes ids.
    """

    name: str
    ids: Tensor
    documents: tuple[str, ...] = field(default=(), repr=False)

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.ids.contiguous().numpy().tobytes()).hexdigest()

    def facts(self) -> dict[str, Any]:
        samples, length = self.ids.shape
        return {"name": self.name, "samples": samples, "length": length, "sha256": self.sha256}

    def chunks(self, tokens: int) -> list[Tensor]:
        """Batches of at most `tokens` tokens (never less than one sequence)."""
        return list(torch.split(self.ids, max(1, tokens // self.ids.shape[1])))


def sample_windows(name: str, ids: Tensor, samples: int, length: int, generator: torch.Generator) -> TokenBatches:
    """`samples` windows of `length` tokens drawn without overlap from one long sequence ids (tokens,).

    Raises TextError where the text is too short to draw them.
    """
    slots = ids.numel() // length
    if slots < samples:
        raise TextError(
            f"the text '{name}' has {ids.numel()} tokens; {samples} windows of {length} need {samples * length}. "
            "Give a longer text, or ask for fewer or shorter windows."
        )
    # Windows sit on a grid with a random offset: no two overlap, whichever are drawn.
    spare = ids.numel() - slots * length
    offset = int(torch.randint(spare + 1, (1,), generator=generator))
    chosen = torch.randperm(slots, generator=generator)[:samples].sort().values
    grid = ids[offset : offset + slots * length].view(slots, length)
    return TokenBatches(name, grid[chosen].contiguous())

"""Windows of tokens that a stage calibrates or trains on, with their hash."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from edgepress.checkpoints.errors import TextError
from edgepress.checkpoints.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from edgepress.checkpoints.shape import ModelShape


@dataclass(frozen=True)
class TokenBatches:
    """ids (samples, length) int64, and the name of the text they come from.

    documents: the text itself, for the one stage that changes how text becomes ids. left_out: documents (of a few
    long ones, passages) of the text that were left out because they are measured on; none of them is left, which
    `overlap` states. None: not compared, as of text that the model writes itself.
    """

    name: str
    ids: Tensor
    documents: tuple[str, ...] = field(default=(), repr=False)
    left_out: int | None = None

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.ids.contiguous().numpy().tobytes()).hexdigest()

    def facts(self) -> dict[str, Any]:
        samples, length = self.ids.shape
        facts = {"name": self.name, "samples": samples, "length": length, "sha256": self.sha256}
        return facts if self.left_out is None else facts | {"overlap": 0, "left_out": self.left_out}

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


# Families whose positions are rows of a learned table; the others turn or shift by position, and go on beyond it.
_TABLES = ("gpt2", "gptj", "gpt_neo", "gpt_bigcode", "opt", "biogpt", "xglm")


def require_known(ids: Tensor, rows: int, where: str) -> None:
    """Raise TextError where ids name a token that an embedding of so many rows does not have."""
    beyond = ids[ids >= rows]
    if beyond.numel():
        raise TextError(
            f"the tokenizer gives token {int(beyond.min())}, the embedding has {rows} rows ({where}). Take the "
            "tokenizer that belongs to the model, or resize the model's embedding to it"
        )


def beyond_positions(shape: ModelShape, length: int, option: str) -> str:
    """A note where windows are longer than the model was trained for, or nothing.

    Raises TextError where the family's positions are a table, which has no row for them.
    """
    positions = shape.config.get("max_position_embeddings")
    if not isinstance(positions, int) or length <= positions:
        return ""
    found = f"{option} {length} is more than the {positions} positions of the model"
    if shape.family in _TABLES:
        raise TextError(f"{found}, which are a table; at most {positions} fit")
    return f"{found}; what lies beyond them the model was not trained for"

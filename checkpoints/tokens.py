"""Windows of tokens that a stage calibrates or trains on, with their hash."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from edgepress.checkpoints.errors import TextError
from edgepress.checkpoints.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from edgepress.checkpoints.shape import ModelShape


IGNORED = -100  # torch's and transformers' label of what is not learnt


@dataclass(frozen=True)
class TokenBatches:
    """ids (samples, length) int64, and the name of the text they come from.

    documents: the text itself, for the one stage that changes how text becomes ids. left_out: documents (of a few
    long ones, passages) of the text that were left out because they are measured on; none of them is left, which
    `overlap` states. None: not compared, as of text that the model writes itself. labels (samples, length) int64: ids
    that are to be learnt, IGNORED elsewhere; what follows the last of a row is padding. None: all are learnt.
    """

    name: str
    ids: Tensor
    documents: tuple[str, ...] = field(default=(), repr=False)
    left_out: int | None = None
    labels: Tensor | None = field(default=None, repr=False)

    @cached_property
    def sha256(self) -> str:
        digest = hashlib.sha256(self.ids.contiguous().numpy().tobytes())
        if self.labels is not None:
            digest.update(self.labels.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def lengths(self) -> list[int]:
        """Tokens of each row up to the last that is learnt."""
        samples, length = self.ids.shape
        if self.labels is None:
            return [length] * samples
        return [int(row.nonzero()[-1]) + 1 for row in self.labels != IGNORED]

    def facts(self) -> dict[str, Any]:
        samples, length = self.ids.shape
        facts = {"name": self.name, "samples": samples, "length": length, "sha256": self.sha256}
        if self.labels is not None:
            facts["learnt_tokens"] = int((self.labels != IGNORED).sum())
        return facts if self.left_out is None else facts | {"overlap": 0, "left_out": self.left_out}

    def chunks(self, tokens: int) -> list[Tensor]:
        """Batches of at most `tokens` tokens (never less than one sequence)."""
        return list(torch.split(self.ids, max(1, tokens // self.ids.shape[1])))


def sample_windows(
    name: str, ids: Tensor, samples: int, length: int, generator: torch.Generator, labels: Tensor | None = None
) -> TokenBatches:
    """`samples` windows of `length` tokens drawn without overlap from one long sequence ids (tokens,).

    labels (tokens,): windows have theirs, and at least one that is learnt; there may be fewer than `samples` of these.
    Raises TextError where the text is too short.
    """
    slots = ids.numel() // length
    if slots < samples and labels is None:
        raise TextError(
            f"the text '{name}' has {ids.numel()} tokens; {samples} windows of {length} need {samples * length}. "
            "Give a longer text, or ask for fewer or shorter windows."
        )
    # Windows sit on a grid with a random offset: no two overlap, whichever are drawn.
    spare = ids.numel() - slots * length
    offset = int(torch.randint(spare + 1, (1,), generator=generator))
    cut = slice(offset, offset + slots * length)
    order = torch.randperm(slots, generator=generator)
    if labels is not None:
        learnt = labels[cut].view(slots, length)
        order = order[(learnt[order, 1:] != IGNORED).any(1)]  # the first of a window is not predicted
    chosen = order[:samples].sort().values
    grid = ids[cut].view(slots, length)
    return TokenBatches(name, grid[chosen].contiguous(), labels=None if labels is None else learnt[chosen].contiguous())


def sample_rows(
    name: str, rows: Sequence[tuple[list[int], int]], samples: int, length: int, generator: torch.Generator
) -> TokenBatches:
    """At most `samples` rows, cut to `length` tokens and padded on the right; each is ids and the first that is learnt.

    Rows with nothing to learn within the length are not drawn.
    """
    usable = [(ids[:length], max(1, start)) for ids, start in rows if len(ids[:length]) > max(1, start)]
    chosen = torch.randperm(len(usable), generator=generator)[:samples].sort().values.tolist()
    found = torch.zeros(len(chosen), length, dtype=torch.int64)
    labels = torch.full_like(found, IGNORED)
    for place, (ids, start) in enumerate(usable[index] for index in chosen):
        found[place, : len(ids)] = torch.tensor(ids)
        labels[place, start : len(ids)] = found[place, start : len(ids)]
    return TokenBatches(name, found, labels=labels)


def by_length(lengths: Sequence[int], batch: int, generator: torch.Generator) -> Tensor:
    """An order (rows,) in which rows of like length are in one batch: sorted, longest first, within random shares.

    Shares of 50 batches, or a quarter of all, keep some of the shuffling, as transformers' grouping by length does. The
    longest row comes first, so that memory runs out at once or never.
    """
    order = torch.randperm(len(lengths), generator=generator).tolist()
    share = batch * max(1, min(50, len(lengths) // (4 * batch)))
    shares = [sorted(order[i : i + share], key=lambda row: -lengths[row]) for i in range(0, len(order), share)]
    shares.sort(key=lambda rows: -lengths[rows[0]])
    return torch.tensor([row for rows in shares for row in rows])


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

"""Windows: drawn without overlap, the same for the same seed, and provably which tokens they were."""

from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepress.checkpoints.errors import TextError
from edgepress.checkpoints.tokens import TokenBatches, sample_windows

pytestmark = pytest.mark.unit


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 40), st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_windows_never_overlap(samples: int, length: int, spare: int, seed: int) -> None:
    ids = torch.arange(samples * length + spare)  # each token is its own position
    batches = sample_windows("text", ids, samples, length, seeded(seed))
    assert batches.ids.shape == (samples, length)
    assert batches.ids.unique().numel() == samples * length
    starts = batches.ids[:, :1]
    assert torch.equal(batches.ids, starts + torch.arange(length))
    assert int(batches.ids.min()) >= 0
    assert int(batches.ids.max()) < ids.numel()


def test_the_seed_decides() -> None:
    ids = torch.arange(1000)
    first = sample_windows("text", ids, 5, 17, seeded(3))
    assert torch.equal(sample_windows("text", ids, 5, 17, seeded(3)).ids, first.ids)
    assert not torch.equal(sample_windows("text", ids, 5, 17, seeded(4)).ids, first.ids)


def test_every_part_of_a_text_can_be_drawn() -> None:
    ids = torch.arange(103)
    drawn = torch.cat([sample_windows("text", ids, 2, 10, seeded(seed)).ids.flatten() for seed in range(200)])
    assert drawn.unique().numel() == 103


@pytest.mark.parametrize("tokens", [0, 1, 39])
def test_a_text_that_is_too_short(tokens: int) -> None:
    with pytest.raises(TextError, match=rf"'short' has {tokens} tokens; 4 windows of 10 need 40.*fewer or shorter"):
        sample_windows("short", torch.arange(tokens), 4, 10, seeded(0))


def test_facts_prove_the_tokens() -> None:
    ids = torch.arange(12).view(3, 4)
    raw = b"".join(int(i).to_bytes(8, "little") for i in range(12))
    facts = {"name": "text", "samples": 3, "length": 4, "sha256": hashlib.sha256(raw).hexdigest()}
    assert TokenBatches("text", ids).facts() == facts
    assert TokenBatches("text", ids.T.contiguous().T).sha256 == facts["sha256"]  # whatever the order in memory
    changed = ids.clone()
    changed[2, 3] = 99
    assert TokenBatches("text", changed).sha256 != facts["sha256"]


@pytest.mark.parametrize(("tokens", "sizes"), [(8, [2, 2, 1]), (11, [2, 2, 1]), (3, [1] * 5), (1000, [5])])
def test_chunks_hold_at_most_so_many_tokens(tokens: int, sizes: list[int]) -> None:
    batches = TokenBatches("text", torch.arange(20).view(5, 4))
    chunks = batches.chunks(tokens)
    assert [len(chunk) for chunk in chunks] == sizes
    assert torch.equal(torch.cat(chunks), batches.ids)

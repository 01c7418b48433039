"""Hidden states in memory and in files: the same numbers, wherever they lie."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from edgepress.checkpoints.checkpoint import Checkpoint, Skeleton
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.walk import Scratch, States, Walk
from edgepress.stages import depth

pytestmark = pytest.mark.unit

SHAPES: list[tuple[int, ...]] = [(2, 3, 4), (1, 5, 4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_gives_back_what_was_written_and_survives_reopening(tmp_path: Path, dtype: torch.dtype) -> None:
    chunks = [torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype) for shape in SHAPES]
    states = States(SHAPES, dtype, tmp_path / "s.bin")
    for index in (1, 0):
        states.write(index, chunks[index])
    states.flush()
    again = States(SHAPES, dtype, tmp_path / "s.bin")
    assert len(again.chunks) == 2
    for kept, chunk in zip(again.chunks, chunks, strict=True):
        assert torch.equal(kept, chunk)
    # what is read is a copy: writing to it does not change the file
    again.chunks[0].zero_()
    assert torch.equal(again.chunks[0], chunks[0])


def test_scratch_spills_exactly_what_does_not_fit_and_cleans_up() -> None:
    size = sum(torch.Size(s).numel() for s in SHAPES) * 4
    with Scratch(size) as scratch:
        first = scratch.states(SHAPES, torch.float32)
        assert first.path is None and not scratch.spilled
        first.write(0, torch.ones(SHAPES[0]))
        first.write(1, torch.full(SHAPES[1], 2.0))
        second = scratch.states(SHAPES, torch.float32, like=first)
        assert second.path is not None and second.path.is_file()
        assert torch.equal(second.chunks[1], torch.full(SHAPES[1], 2.0))
        second.write(0, torch.zeros(SHAPES[0]))
        assert bool((first.chunks[0] == 1).all()), "a copy must not share"
        folder = second.path.parent
    assert not folder.exists()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
def test_rankings_and_outputs_are_the_same_spilled_or_held(tiny_model: Callable[..., Path], family: str) -> None:
    source = Checkpoint.open(tiny_model(family))
    ids = torch.randint(3, 512, (4, 24), generator=torch.Generator().manual_seed(5))
    chunks = list(torch.split(ids, 2))
    results = []
    for spill in (0, 2**30):
        runtime = Runtime(spill_bytes=spill)
        walk = Walk(source, chunks, runtime, last_outputs=True)
        assert (walk.states.path is not None) == (spill == 0)
        for block in walk:
            block.done()
        scores = [
            metric(Skeleton(source), list(range(6)), [1, 2, 3, 4], chunks, runtime)
            for metric in (depth.perplexity, depth.taylor)
        ]
        results.append(([c.clone() for c in walk.states.chunks], scores))
    (held, ranked), (spilled, ranked_again) = results
    assert ranked == ranked_again
    assert all(torch.equal(a, b) for a, b in zip(held, spilled, strict=True))

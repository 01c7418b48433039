"""Parts of an N:M pattern, on the way to it: as text, against brute force, and by every method through the stage."""

from __future__ import annotations

import itertools
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import NumericsError, PlanError
from edgepress.checkpoints.masks import group_zeros
from edgepress.checkpoints.packed_sizes import packed_sizes
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.shape import Capped, Part, Pattern, Within, parse_sparsity
from edgepress.checkpoints.tokens import TokenBatches
from edgepress.checkpoints.writer import CheckpointWriter
from edgepress.stages import wanda
from edgepress.stages.options import Wanda
from edgepress.stages.pruning import METHODS, NOTHING
from edgepress.stages.pruning.select import kept
from edgepress.stages.pruning.sparsegpt import blocks

pytestmark = pytest.mark.unit

TWO_OF_FOUR = Pattern(2, 4)


@pytest.mark.parametrize("text", ["1/4 of 2:4", "3/7 of 1:8", "1/2 of 2:4 in gate_proj"])
def test_a_part_is_read_back_from_its_text(text: str) -> None:
    found = parse_sparsity(text)
    assert str(found) == text
    assert parse_sparsity(str(found)) == found
    amount = found.amount if isinstance(found, Within) else found
    assert isinstance(amount, Part)
    of = amount.whole
    # 336 is a multiple of every part's group here, so that the share comes out whole
    assert found.on(336, 5) == Capped(336 // of.of * of.removed * amount.part // amount.parts, 336, of)


@pytest.mark.parametrize("text", ["0/4 of 2:4", "4/4 of 2:4", "1/4 of 0.5", "1/4 of 4:4", "1/4 of", "x/4 of 2:4"])
def test_what_is_no_part_is_refused(text: str) -> None:
    with pytest.raises(PlanError):
        parse_sparsity(text)


def test_folders_carry_the_part() -> None:
    assert Wanda("1/4 of 2:4").label == "wanda-1in4-2of4"


@pytest.mark.parametrize("gone", range(1, 8))
def test_the_cheapest_weights_that_the_cap_allows_go(gone: int) -> None:
    score = torch.rand(6, 16, generator=torch.Generator().manual_seed(gone), dtype=torch.float64)
    mask = kept(score, Capped(gone, 16, TWO_OF_FOUR), torch.ones_like(score))
    for row, keep in zip(score.tolist(), mask.tolist(), strict=True):
        allowed = (
            chosen
            for chosen in itertools.combinations(range(16), gone)
            if all(sum(c // 4 == group for c in chosen) <= 2 for group in range(4))
        )
        best = min(allowed, key=lambda chosen: sum(row[c] for c in chosen))
        assert [c for c in range(16) if not keep[c]] == list(best)


def test_zeros_that_are_there_count_in_the_cap_before_equal_scores() -> None:
    weight = torch.tensor([[1.0, 1, 1, 0, 1, 1, 1, 1]])
    mask = kept(torch.zeros(1, 8), Capped(2, 8, TWO_OF_FOUR), weight)  # dead inputs: all scores are equal
    assert mask.tolist() == [[False, True, True, False, True, True, True, True]]


@pytest.mark.parametrize("whole", [TWO_OF_FOUR, Pattern(5, 12), Pattern(100, 160)], ids=str)
def test_sparsegpt_cuts_no_group_of_the_cap(whole: Pattern) -> None:
    spans = [span for part in blocks(480, Part(1, 2, whole).on(480)) for span in part]
    assert [s.start for s in spans] == [0, *(s.end for s in spans[:-1])] and spans[-1].end == 480
    assert all(s.start % whole.of == 0 for s in spans)
    assert sum(s.removed for s in spans) == 480 * whole.removed // (2 * whole.of)
    assert all(s.removed <= (s.end - s.start) // whole.of * whole.removed for s in spans)


@pytest.mark.parametrize("method", METHODS)
def test_zeros_grow_into_the_pattern(
    method: str, build: Callable[..., Checkpoint], tokens: Callable[..., TokenBatches],
    seal: Callable[..., Checkpoint], tmp_path: Path,
) -> None:  # fmt: skip
    source = build("llama", blocks=2)
    earlier: dict[tuple[int, str], torch.Tensor] = {}
    for pattern in ("1/3 of 2:4", "2/3 of 2:4", "2:4"):
        wanted = Wanda(pattern, method=method)
        target = CheckpointWriter(tmp_path / wanted.label)
        planned = wanda.plan(source.shape, wanted)
        wanda.run(source, target, tokens(5), wanted, Runtime(chunk_tokens=48))
        source = seal(target, source, pattern=str(planned.pattern))
        assert source.shape.pattern == planned.pattern
        assert source.facts()["packed_bytes"] == packed_sizes(planned).total
        for index, block in enumerate(source.shape.blocks):
            for x in (x for x in block.linears if x.pattern is not None):
                weight = source.base_weight(index, x)
                zeros = weight == 0
                assert bool((group_zeros(weight, 4) <= 2).all())
                expected = x.pattern.on(x.in_features, x.out_features)
                assert bool((group_zeros(weight, expected.of) == expected.removed).all())
                assert not bool((earlier.get((index, x.name), torch.zeros_like(zeros)) & ~zeros).any())
                earlier[index, x.name] = zeros


def test_a_method_that_ignores_the_cap_fails_its_run(
    build: Callable[..., Checkpoint], tokens: Callable[..., TokenBatches], tmp_path: Path, monkeypatch: Any
) -> None:
    greedy: Any = types.ModuleType("greedy")
    greedy.NEEDS, greedy.sparsity = NOTHING, lambda amount: amount

    def prune(block: Any, groups: Any) -> dict[str, Any]:
        for name, nm in groups.items():
            block.linears[name].weight[:, : nm.removed] = 0
        return {}

    greedy.prune = prune
    monkeypatch.setitem(sys.modules, "greedy", greedy)
    monkeypatch.setitem(METHODS, "greedy", "greedy")
    with pytest.raises(NumericsError, match="greedy took more than 1/4 of 2:4 allows in mlp"):
        wanda.run(
            build("llama", blocks=1), CheckpointWriter(tmp_path / "out"), tokens(2),
            Wanda("1/4 of 2:4", method="greedy"), Runtime(),
        )  # fmt: skip

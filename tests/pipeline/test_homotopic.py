"""`--homotopic`: how a recipe falls into rounds, against sums by hand, and what is refused before anything runs."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from edgepress.checkpoints.errors import RecipeError
from edgepress.checkpoints.families import PRESETS, shape_from_config
from edgepress.checkpoints.shape import parse_amount
from edgepress.pipeline.plan import plan
from edgepress.pipeline.recipe import DISTILL, amount_after, build, share, unrolled
from edgepress.pipeline.sweep_recipe import load_sweep
from edgepress.pipeline.tree import grow, spec_fingerprints
from edgepress.stages.options import Depth, Lora, Wanda

pytestmark = pytest.mark.unit

SHAPE = shape_from_config(PRESETS["smollm2-135m"])


@given(total=st.integers(0, 400), rounds=st.integers(1, 40))
def test_shares_are_even_and_the_larger_ones_lead(total: int, rounds: int) -> None:
    shares = [share(total, number, rounds) for number in range(rounds)]
    assert sum(shares) == total
    assert max(shares) - min(shares) <= 1 and shares[0] == max(shares)
    for done in range(rounds + 1):  # never behind an even pace, and never a whole one ahead
        assert 0 <= sum(shares[:done]) - Fraction(total * done, rounds) < 1


def test_two_blocks_over_four_rounds() -> None:
    assert [share(2, number, 4) for number in range(4)] == [1, 0, 1, 0]


@given(pattern=st.sampled_from(["2:4", "1:8", "0.5", "0.05", "1/2 of 2:4"]), rounds=st.integers(2, 12))
def test_zeros_grow_by_equal_parts_to_exactly_the_pattern(pattern: str, rounds: int) -> None:
    width = 960
    whole = parse_amount(pattern).on(width)
    share_of_row = Fraction(whole.removed, whole.of)
    for done in range(1, rounds):
        step = parse_amount(amount_after(pattern, done, rounds)).on(width)
        assert step.of == width
        assert 0 <= share_of_row * width * done / rounds - step.removed < 1 + 1e-9
    assert amount_after(pattern, rounds, rounds) == pattern


@given(steps=st.integers(0, 60), samples=st.integers(80, 300), rounds=st.integers(2, 9), remove=st.integers(0, 9))
def test_the_rounds_take_the_budget_of_one(steps: int, samples: int, rounds: int, remove: int) -> None:
    flags = {"lora.steps": steps, "lora.samples": samples, "depth.remove": remove, "wanda.pattern": "2:4"}
    once = Lora(samples=samples, steps=steps)
    if once.total_steps < 2 * rounds:
        with pytest.raises(RecipeError, match="optimiser steps in all"):
            build(None, {"homotopic": rounds, **flags})
        return
    stages = list(unrolled(build(None, {"homotopic": rounds, **flags})))
    trained = [o for _, o in stages if isinstance(o, Lora)]
    assert len(trained) == rounds
    assert sum(o.total_steps for o in trained) == once.total_steps
    assert all(o.steps >= 2 and o.save_steps <= o.steps and o.distill == DISTILL for o in trained)
    windows = [o.samples - o.held_out for o in trained]
    if (samples - once.held_out) // rounds >= once.batch:
        assert sum(windows) == samples - once.held_out
    assert min(windows) >= once.batch
    assert sum(o.remove for _, o in stages if isinstance(o, Depth)) == remove
    assert [o.pattern for _, o in stages if isinstance(o, Wanda)][-1] == "2:4"


def test_order_of_the_stages() -> None:
    recipe = build(None, {"homotopic": 4, "depth.remove": 2, "wanda.pattern": "2:4", "pad.multiple": 32})
    pruned = ["depth", "wanda", "lora", "wanda", "lora"] * 2
    assert [name for name, _ in unrolled(recipe)] == ["pad", *pruned, "gptq", "eora"]
    steps = plan(recipe, SHAPE)
    assert [s.stage for s in steps] == ["pad", *pruned, "gptq", "eora"]
    assert [s.turn for s in steps if s.stage == "lora"] == [0, 1, 2, 3]
    once = plan(build(None, {"depth.remove": 2, "wanda.pattern": "2:4", "pad.multiple": 32}), SHAPE)
    assert steps[-1].shape == once[-1].shape
    assert "its own warm-up" in " ".join(recipe.notes)


@pytest.mark.parametrize(
    ("flags", "skip", "reasons"),
    [
        ({"homotopic": 1}, "", ["at least 2 rounds"]),
        ({"homotopic": -3}, "", ["at least 2 rounds"]),
        ({"homotopic": 6, "lora.steps": 7}, "", ["7 optimiser steps in all", "give at most 3 rounds"]),
        ({"homotopic": 2}, "lora", ["lora, which does so, is left out"]),
        ({"homotopic": 2, "depth.remove": 0, "wanda.pattern": "none"}, "", ["nothing to remove"]),
        ({"homotopic": 3, "wanda.pattern": "none"}, "", ["only 2 blocks go, so at most 2 rounds"]),
        ({"homotopic": 2, "depth.layers": "0-9"}, "", ["cannot divide --layers"]),
        ({"homotopic": 2, "lora.method": "qlora+dora"}, "", ["give --recover dora, or leave --homotopic out"]),
        (
            {"homotopic": 1, "depth.remove": 0, "wanda.pattern": "none"},
            "lora",
            ["at least 2 rounds", "is left out", "nothing to remove"],
        ),
    ],
)
def test_what_cannot_go_in_rounds(flags: dict[str, Any], skip: str, reasons: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        build(None, flags, skip)
    for reason in reasons:
        assert any(reason in fault for fault in caught.value.faults)


@pytest.mark.parametrize(
    ("order", "reason"),
    [
        (["depth", "lora", "wanda"], "ends each round with lora; here wanda comes after it"),
        (["wanda", "gptq", "lora"], "gptq stands between them"),
    ],
)
def test_orders_that_cannot_be_repeated(order: list[str], reason: str, tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump({"homotopic": 2, "stages": order}))
    with pytest.raises(RecipeError, match=reason):
        build(str(file), {})


def test_a_fault_of_every_round_is_told_once() -> None:
    with pytest.raises(RecipeError) as caught:
        plan(build(None, {"homotopic": 4, "wanda.pattern": "2:7", "depth.remove": 0}, "gptq"), SHAPE)
    assert Counter("widths divisible by 7" in fault for fault in caught.value.faults) == {True: 1}


def test_the_written_recipe_is_the_recipe(tmp_path: Path) -> None:
    recipe = build(None, {"homotopic": 2, "wanda.pattern": "2:4", "lora.distill": 0.25})
    assert [o.distill for _, o in recipe.stages if isinstance(o, Lora)] == [0.25]
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({k: v for k, v in recipe.to_dict().items() if v is not None}))
    again = build(str(file), {})
    assert (again.stages, again.homotopic) == (recipe.stages, 2)


def test_rounds_and_one_run_in_the_same_sweep(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(
        "stages: [{wanda: {pattern: '2:4'}}, {lora: {distill: 0.5}}]\n"
        "sweep: {configurations: [{name: once}, {name: rounds, homotopic: 2}, {name: more, homotopic: 4}]}\n"
    )
    tree = grow(load_sweep(str(file), {}).configurations, lambda recipe: SHAPE, spec_fingerprints)
    assert [len(path) for path in tree.paths.values()] == [3, 5, 9]
    assert tree.distinct == 2 + 4 + 8  # they differ from the first pruning on
    assert len({path[0] for path in tree.paths.values()}) == 1  # and are measured alike

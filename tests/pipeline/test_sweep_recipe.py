"""Sweep recipes: what they expand to, what is wrong with them, and the tree of stage runs, without weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgepress.checkpoints.errors import PlanError, RecipeError
from edgepress.checkpoints.families import PRESETS, shape_from_config
from edgepress.pipeline.recipe import Recipe, build
from edgepress.pipeline.sweep_recipe import ablation, is_sweep, load_sweep
from edgepress.pipeline.tree import Tree, grow, spec_fingerprints

pytestmark = pytest.mark.unit

Write = Callable[[str], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def call(text: str) -> str:
        path = tmp_path / "sweep.yaml"
        path.write_text(text)
        return str(path)

    return call


def tree_of(name: str, preset: str = "llama-3.2-1b") -> Tree:
    shape = shape_from_config(PRESETS[preset])
    return grow(load_sweep(name, {}).configurations, lambda recipe: shape, spec_fingerprints)


def brute_force(name: str) -> tuple[int, int]:
    """Stage runs asked for, and how many different beginnings they have, from the recipes themselves."""
    recipes = [c.recipe for c in load_sweep(name, {}).configurations]
    asked = sum(len(r.stages) for r in recipes)
    prefixes = {(r.model, r.stages[: n + 1]) for r in recipes for n in range(len(r.stages))}
    return asked, len(prefixes)


@pytest.mark.parametrize(
    ("name", "configurations", "asked", "distinct"),
    [("table-a1", 45, 73, 43), ("table-a2", 89, 316, 109), ("table-b1", 3, 10, 9), ("sweep-two-minutes", 8, 13, 8)],
)
def test_shipped_sweeps_have_the_thesis_counts(name: str, configurations: int, asked: int, distinct: int) -> None:
    tree = tree_of(name)
    assert is_sweep(name)
    assert len(tree.paths) == configurations
    assert (tree.asked, tree.distinct, tree.shared) == (asked, distinct, asked - distinct)
    assert brute_force(name) == (asked, distinct)


def test_table_a1_has_the_patterns_that_the_thesis_stopped_at() -> None:
    names = {c.name for c in load_sweep("table-a1", {}).configurations}
    assert {"baseline", "baseline instruct", "depth 8", "width 12:16", "depth 4 + width 12:16"} <= names
    assert "depth 6 + width 1:16" in names and "depth 6 + width 8:16" not in names
    assert "depth 8 + width 4:8" in names and "depth 8 + width 6:8" not in names


def test_table_a2_leaves_out_the_cells_that_the_thesis_leaves_out() -> None:
    recipes = {c.name: c.recipe for c in load_sweep("table-a2", {}).configurations}
    assert [s for s, _ in recipes["depth 2 wanda 1:8 / triviaqa / eora"].stages] == [
        *("depth", "wanda", "lora", "gptq", "eora")
    ]
    assert "width 4:8 / wikitext / eora" not in recipes and "width 4:8 / wikitext / yes" in recipes
    assert "depth 4 wanda 1:16 / triviaqa / yes" not in recipes and "depth 4 wanda 1:16 / triviaqa / no" in recipes


def test_table_b1_puts_recovery_before_width() -> None:
    early = next(c.recipe for c in load_sweep("table-b1", {}).configurations if c.name == "early")
    assert [stage for stage, _ in early.stages] == ["depth", "lora", "wanda", "gptq", "eora"]


def test_grid_list_order_and_labels(write: Write) -> None:
    file = write(
        "stages: [depth, wanda: {samples: 8}]\n"
        "sweep:\n"
        "  grid: {wanda.pattern: ['1:8', '2:4'], seed: [0, 1]}\n"
        "  configurations:\n"
        "    - {name: early, stages: [lora, {wanda: {length: 64}}], wanda.pattern: '4:8'}\n"
        "    - name: 'd{depth.remove} {stages}'\n"
        "      grid: {depth.remove: [1, 3], stages: {alone: [depth], both: [depth, lora]}}\n"
    )
    sweep = load_sweep(file, {"wanda.samples": 16, "tokens": 1024})
    recipes = {c.name: c.recipe for c in sweep.configurations}
    assert list(recipes) == [
        *(f"wanda.pattern={p} seed={s}" for p in ("1:8", "2:4") for s in (0, 1)),
        *("early", "d1 alone", "d1 both", "d3 alone", "d3 both"),
    ]
    assert recipes["wanda.pattern=2:4 seed=1"].seed == 1
    assert all(recipe.tokens == 1024 for recipe in recipes.values())
    early = dict(recipes["early"].stages)
    assert list(early) == ["lora", "wanda"]
    wanda: Any = early["wanda"]
    assert (wanda.pattern, wanda.samples, wanda.length) == ("4:8", 16, 64)  # own, flag, written at the stage
    assert [stage for stage, _ in recipes["d3 both"].stages] == ["depth", "lora"]


def test_a_grid_over_quant_takes_eora_along_with_none(write: Write) -> None:
    sweep = load_sweep(write("sweep: {grid: {gptq.quant: [none, gptq4]}}"), {})
    assert [[s for s, _ in c.recipe.stages][3:] for c in sweep.configurations] == [[], ["gptq", "eora"]]
    assert any("eora is left out" in note for note in sweep.notes)


def test_every_fault_comes_at_once(write: Write) -> None:
    file = write(
        "seed: one\nstages: [depth, wonda]\n"
        "sweep:\n  gird: 1\n  grid: {wanda.pattern: ['1:8'], lora.rnak: [1]}\n  configurations:\n"
        "    - {name: a, stages: []}\n"
        "    - {name: a, stages: [depth], depth.remove: -1}\n"
        "    - {name: b, stages: [depth], wanda.pattern: '9:8', foo.bar: 1}\n"
        "    - {name: 'c {x}', grid: {depth.remove: 5}}\n"
        "    - {name: d, grid: {stages: {no: [depth]}}}\n"
        "    - {name: e, stages: [eora]}\n"
        "    - 7\n"
    )
    with pytest.raises(RecipeError) as caught:
        load_sweep(file, {})
    text = str(caught.value)
    for word in (
        *(
            "'one' is not a whole number",
            "unknown stage 'wonda' (near: wanda)",
            "no key 'gird' (near: grid)",
            "no option 'rnak' (near: rank)",
        ),
        *("2 configurations have the name 'a'", "--depth -1", "wanda is left out", "unknown stage 'foo'"),
        *("5 is not a list", "speaks of {x}", "truth values in YAML", "eora needs gptq", "configuration 7"),
    ):
        assert word in text, word


def test_a_value_of_the_wrong_kind_is_told_and_goes_no_further(write: Write) -> None:
    file = write(
        "stages: [lora]\nsweep:\n  configurations:\n"
        "    - {name: a, stages: [lora], lora.method: ~}\n"
        "    - {name: 'b {lora.method}', stages: [lora], grid: {lora.method: [lora, ~, 3]}}\n"
        "    - {name: 'c {seed}', stages: [depth], grid: {seed: [1, ~]}}\n"
    )
    with pytest.raises(RecipeError) as caught:
        load_sweep(file, {})
    text = str(caught.value)
    for word in ("lora.method: None is not text", "lora.method: 3 is not text", "seed: None is not a whole number"):
        assert word in text, word


def test_a_grid_beyond_max_runs_is_counted_not_multiplied_out(write: Write) -> None:
    values = list(range(100))
    grid = ", ".join(f"{key}: {values}" for key in ("seed", "tokens", "window", "spill_mib", "lora.rank", "eora.rank"))
    with pytest.raises(RecipeError, match=r"makes 1000000000000 configurations, more than --max-runs 256 \(100 seed x"):
        load_sweep(write(f"sweep: {{grid: {{{grid}}}}}"), {})


def test_flags_that_no_configuration_would_heed_are_refused(write: Write) -> None:
    file = write("stages: [wanda]\nsweep: {grid: {wanda.pattern: ['1:8', '2:4']}}")
    with pytest.raises(RecipeError) as caught:
        load_sweep(file, {"wanda.pattern": "4:8", "gptq.group": 32, "seed": 3})
    text = str(caught.value)
    assert "wanda.pattern is given, but every configuration sets it" in text
    assert "gptq.group is given, but every configuration leaves the stage gptq out" in text
    assert "seed" not in text


def test_only_and_leave_out_choose_by_name() -> None:
    chosen = load_sweep("table-a1", {}, only=["depth ?", "width*"], leave_out=["*16"])
    assert len(chosen.configurations) == 4 + 6
    with pytest.raises(RecipeError, match="no configuration is named 'nothing'"):
        load_sweep("table-a1", {}, only=["nothing"])


def test_configurations_that_are_the_same_are_named(write: Write) -> None:
    sweep = load_sweep(write("stages: [depth]\nsweep: {configurations: [{name: a}, {name: b, depth.remove: 2}]}"), {})
    assert sweep.notes == ("'a', 'b' are the same",)


def test_a_sweep_is_not_a_recipe_nor_a_recipe_a_sweep() -> None:
    with pytest.raises(RecipeError, match="compress sweep"):
        build("table-a1", {})
    with pytest.raises(RecipeError, match="holds no sweep"):
        load_sweep("default", {})
    assert not is_sweep("default") and not is_sweep("no-such") and not is_sweep("")


def test_what_cannot_be_planned_names_the_configurations(write: Write) -> None:
    file = write("stages: [depth, wanda]\nsweep: {grid: {wanda.pattern: ['1:8', '1:7', '1:5'], depth.remove: [1, 2]}}")
    shape = shape_from_config(PRESETS["llama-3.2-1b"])
    with pytest.raises(RecipeError, match=r"pattern=1:7 depth.remove=1' and 1 more") as caught:
        grow(load_sweep(file, {}).configurations, lambda recipe: shape, spec_fingerprints)
    assert len(caught.value.faults) == 2


def test_measuring_otherwise_does_not_compute_again(write: Write) -> None:
    file = write("stages: [depth, wanda]\nsweep: {grid: {tokens: [1024, 2048]}}")
    shape = shape_from_config(PRESETS["llama-3.2-1b"])
    tree = grow(load_sweep(file, {}).configurations, lambda recipe: shape, spec_fingerprints)
    assert (tree.asked, tree.distinct, len(tree.nodes)) == (4, 2, 6)


def names_and_stages(recipe: Recipe) -> dict[str, list[str]]:
    return {c.name: [stage for stage, _ in c.recipe.stages] for c in ablation(recipe).configurations}


def test_ablation_leaves_each_stage_out_and_shows_each_alone() -> None:
    assert names_and_stages(build(None, {})) == {
        "no stage": [],
        "all stages": ["depth", "wanda", "lora", "gptq", "eora"],
        "without depth": ["wanda", "lora", "gptq", "eora"],
        "without wanda": ["depth", "lora", "gptq", "eora"],
        "without lora": ["depth", "wanda", "gptq", "eora"],
        "without gptq and eora": ["depth", "wanda", "lora"],
        "without eora": ["depth", "wanda", "lora", "gptq"],
        "only depth": ["depth"],
        "only wanda": ["wanda"],
        "only lora": ["lora"],
        "only gptq": ["gptq"],
        "only gptq and eora": ["gptq", "eora"],
    }
    # of two stages, leaving one out is showing the other alone
    assert list(names_and_stages(build(None, {}, skip="lora,gptq,eora"))) == [
        *("no stage", "all stages", "without depth", "without wanda")
    ]
    with pytest.raises(PlanError, match="nothing to take apart"):
        ablation(build(None, {}, skip="depth,wanda,lora,gptq,eora"))

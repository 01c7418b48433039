"""Every shipped recipe plans without weights, and what a plan states is what the theses print where it compares."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from edgepress.checkpoints.families import PRESETS, shape_from_config
from edgepress.checkpoints.shape import ModelShape
from edgepress.eval.rows import SUFFIXES
from edgepress.pipeline.plan import examined
from edgepress.pipeline.recipe import Draft, Recipe, build
from edgepress.pipeline.sweep_recipe import is_sweep, load_sweep
from edgepress.pipeline.tree import Tree, grow, spec_fingerprints

pytestmark = pytest.mark.pipeline

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
TABLES = [name for name in RECIPES if "table" in name or "franken" in name]
SHAPES = {name: shape_from_config(config) for name, config in PRESETS.items()}


def shape_of(recipe: Recipe) -> ModelShape:
    return SHAPES[recipe.model or "smollm2-135m"]


def planned(name: str) -> Tree:
    return grow(load_sweep(name, {}).configurations, shape_of, spec_fingerprints, texts=True)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_plans(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # without any text beside
    if is_sweep(name):
        sweep = load_sweep(name, {})
        assert len(planned(name).paths) == len(sweep.configurations)
        assert all(c.recipe.protocol == "rows" or not c.recipe.data.endswith(SUFFIXES) for c in sweep.configurations)
    else:
        examined(Draft(build(name, {})), shape_of)


def test_every_table_says_what_compares_with_print_and_what_does_not() -> None:
    """In its own header, and in the map's row of the table."""
    rows = [line.split("|")[1:-1] for line in (FOLDER / "README.md").read_text().splitlines() if line.startswith("| ")]
    for name in TABLES:
        about = " ".join(yaml.safe_load((FOLDER / f"{name}.yaml").read_text())["about"].split())
        assert re.search(r"Compares with print: .{4,}\. Does not: .{8,}\.", about), name
        said = [cells[2].strip() for cells in rows if f"`{name}`" in cells[1]]
        assert said and all(said), name


def test_every_recipe_is_in_the_map() -> None:
    text = (FOLDER / "README.md").read_text()
    assert [name for name in RECIPES if f"`{name}`" not in text] == []


def test_both_models_of_the_approximate_tables() -> None:
    for name in ("approx-table-4-1", "approx-table-4-3", "approx-table-4-5"):
        found = grow(
            load_sweep(name, {"model": "gemma-3-1b-instruct"}).configurations, shape_of, spec_fingerprints, texts=True
        )
        assert len(found.paths) == 18


def test_parameters_of_table_a1() -> None:
    """Millions of parameters that are not zero, as printed."""
    printed = {
        "baseline instruct": 1235.8, "depth 2": 1114.2, "depth 4": 992.5, "depth 6": 870.9, "depth 8": 749.2,
        "width 1:2": 749.3, "width 3:4": 506.0, "width 1:8": 1114.2, "width 1:16": 1175.0,
        "depth 2 + width 1:8": 1007.7, "depth 4 + width 1:16": 946.9, "depth 8 + width 3:4": 384.3,
    }  # fmt: skip
    tree = planned("table-a1")
    for name, millions in printed.items():
        node = tree.nodes[tree.paths[name][-1]]
        shape = node.step.shape if node.step else node.before
        assert shape.parameters_nonzero / 1e6 == pytest.approx(millions, abs=0.11), name


def test_sizes_of_peft_table_4_1() -> None:
    """Gigabytes of the models before quantisation, as printed."""
    tree = planned("peft-table-4-1")
    for name, printed in {"LLaMA 2 7B": 13.48, "LLaMA 2 70B": 137.98, "LLaMA 3 8B": 16.07}.items():
        assert tree.nodes[tree.paths[name][-1]].before.file_bytes / 1e9 == pytest.approx(printed, abs=0.03)


def test_cells_of_the_peft_thesis() -> None:
    """As many configurations as tables B.2, B.4 and B.6 have cells of LLaMA-2-7B, and the baselines and IA3 of 4.5."""
    names = [c.name for c in load_sweep("peft-table-4-5", {}).configurations]
    lora = [n for n in names if "QLoRA" in n or "Q-RsLoRA" in n]
    assert len(lora) == 3 * 19
    assert len([n for n in names if "QDoRA" in n]) == 3 * 12
    assert len([n for n in names if "HQQ" in n]) == 16
    assert len(names) == 57 + 36 + 16 + 3 + 6
    assert len({c.recipe for c in load_sweep("franken-25", {}).configurations}) >= 24

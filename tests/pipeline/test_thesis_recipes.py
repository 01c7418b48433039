"""The shipped tables of the theses: which combinations they hold, and that each plans at reduced size."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from benchmarks.thesis_tables import TABLES, reduced
from edgepress.checkpoints.families import PRESETS, shape_from_config
from edgepress.pipeline.sweep_recipe import load_sweep
from edgepress.pipeline.tree import Tree, grow, spec_fingerprints
from edgepress.stages.options import Lora

pytestmark = pytest.mark.unit

PACKAGED = shape_from_config(PRESETS["smollm2-135m"])


def tree(name: str) -> Tree:
    shape = shape_from_config(PRESETS["llama-2-7b"])
    return grow(load_sweep(name, {}).configurations, lambda recipe: shape, spec_fingerprints)


@pytest.mark.parametrize("table", TABLES)
def test_every_table_plans_at_reduced_size(table: str, tmp_path: Path) -> None:
    recipe = reduced(table, 4, 64, 1024, 4, "trivia.jsonl", "rows.jsonl")
    file = tmp_path / "reduced.yaml"
    file.write_text(yaml.safe_dump(recipe))
    sweep = load_sweep(str(file), {})
    configurations = [c for c in sweep.configurations if c.recipe.model is None]
    assert grow(configurations, lambda recipe: PACKAGED, spec_fingerprints).distinct
    for configuration in configurations:
        texts = {configuration.recipe.data, configuration.recipe.text}
        texts |= {o.data for _, o in configuration.recipe.stages if isinstance(o, Lora)}
        assert texts <= {"embedded", "trivia.jsonl", "rows.jsonl", ""}
        assert all(o.total_steps == 4 for _, o in configuration.recipe.stages if isinstance(o, Lora))


@pytest.mark.parametrize("number", ["4-1", "4-3", "4-5"])
def test_the_approximations_and_their_combinations(number: str) -> None:
    found = tree(f"approx-table-{number}")
    # The table's 16 rows of a model, but for the two that only measure, perturbed and masked; and all weights trained.
    assert set(found.paths) == {
        "baseline", "pruned", "int8", "int4", "nf4", "lora", "pruned + lora", "int8 + lora", "int4 + lora",
        "nf4 + lora", "int8 + pruned + lora", "int4 + pruned + lora", "perturbed + lora", "masked + lora",
        "dense, all weights", "pruned, all weights", "masked, all weights", "perturbed, all weights",
    }  # fmt: skip
    ends = {name: found.nodes[path[-1]] for name, path in found.paths.items()}
    shape = ends["int4 + pruned + lora"].step.shape  # type: ignore[union-attr]
    assert str(shape.blocks[0].linears[0].pattern or shape.blocks[0].linears[4].pattern) == "0.05 in gate_proj"
    assert shape.grid is not None and shape.grid.bits == 4


def test_trainable_parameters_are_the_table_s() -> None:
    from edgepress.stages.recovery.shapes import trainable_parameters

    found = tree("peft-table-4-3")
    table = {
        "nf4 + lora r 8": 19_988_480,
        "nf4 + lora r 16": 39_976_960,
        "nf4 + lora r 64": 159_907_840,
        "nf4 + lora r 256": 639_631_360,
        "nf4 + dora r 8": 21_348_352,
        "nf4 + ia3": 1_581_056,
    }
    for name, trained in table.items():
        node = found.nodes[found.paths[name][-1]]
        assert node.step is not None and isinstance(node.step.options, Lora)
        assert trainable_parameters(node.before, node.step.options) == trained, name


def test_the_cells_are_those_of_tables_b_2_to_b_7() -> None:
    """Not every method has all settings there, and HQQ was not run on HH-RLHF."""
    names = list(tree("peft-table-4-5").paths)
    assert len(names) == 3 * 2 + 3 * (5 + 6 + 4 + 4 + 4 + 4 + 4 + 1) + 2 * 2 * 4
    for data in ("Unnatural", "OASST", "HH-RLHF"):
        assert {f"{data} / QLoRA {s}" for s in ("64, 16", "8, 16", "16, 32", "64, 128", "256, 128")} <= set(names)

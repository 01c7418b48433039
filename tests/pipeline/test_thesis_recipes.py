"""The shipped tables of the theses: which combinations they hold, and that each plans and runs at reduced size."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from benchmarks.thesis_tables import TABLES, Size, kinds, reduced
from edgepress.checkpoints.families import PRESETS, shape_from_config
from edgepress.pipeline.store import Store
from edgepress.pipeline.sweep import SweepView, carry_out, prepare
from edgepress.pipeline.sweep_recipe import load_sweep
from edgepress.pipeline.tree import Tree, grow, spec_fingerprints
from edgepress.pipeline.workers import Here
from edgepress.stages.options import Lora

pytestmark = pytest.mark.pipeline

PACKAGED = shape_from_config(PRESETS["smollm2-135m"])


def tree(name: str) -> Tree:
    shape = shape_from_config(PRESETS["llama-2-7b"])
    return grow(load_sweep(name, {}).configurations, lambda recipe: shape, spec_fingerprints)


@pytest.mark.parametrize("table", TABLES)
def test_every_table_plans_at_reduced_size(table: str, tmp_path: Path) -> None:
    recipe = reduced(table, Size(4, 64, 1024, 4, "trivia.jsonl", "rows.jsonl"))
    file = tmp_path / "reduced.yaml"
    file.write_text(yaml.safe_dump(recipe))
    configurations = load_sweep(str(file), {}).configurations
    whole = load_sweep(TABLES[table], {}).configurations if table != "franken" else [None]
    assert len(configurations) == len(whole)
    assert grow(configurations, lambda recipe: PACKAGED, spec_fingerprints).distinct
    for configuration in configurations:
        assert configuration.recipe.model is None
        texts = {configuration.recipe.data, configuration.recipe.text}
        texts |= {o.data for _, o in configuration.recipe.stages if isinstance(o, Lora)}
        assert texts <= {"embedded", "trivia.jsonl", "rows.jsonl", ""}
        assert all(o.total_steps == 4 for _, o in configuration.recipe.stages if isinstance(o, Lora))


BLOCKS = {"a1": 8, "a2": 8, "b1": 8, "franken": 32, "franken-25": 32}  # room for what the tables take out; else 2
Model = Callable[[int], tuple[Path, Path]]


@pytest.fixture(scope="module")
def tiny_of(tmp_path_factory: pytest.TempPathFactory, make_tiny: Callable[..., Path]) -> Model:
    """A tiny model of so many blocks, and the store of what was made of it: tables share stage runs."""
    home = tmp_path_factory.mktemp("tables")

    def made(blocks: int) -> tuple[Path, Path]:
        model = home / f"model-{blocks}"
        return model if model.is_dir() else make_tiny(model, blocks=blocks), home / f"out-{blocks}"

    return made


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Rows of questions with short answers, and of instructions."""
    home = tmp_path_factory.mktemp("rows")
    asked = [{"question": f"What comes after {n}?", "answer": [str(n + 1)]} for n in range(40)]
    told = [{"instruction": f"Count from {n} on.", "output": f"{n + 1}, {n + 2}, {n + 3}"} for n in range(40)]
    for name, entries in (("trivia", asked), ("instructions", told)):
        (home / f"{name}.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return home / "trivia.jsonl", home / "instructions.jsonl"


@pytest.mark.parametrize("table", TABLES)
def test_every_table_runs_at_reduced_size(
    table: str, tiny_of: Model, rows: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One configuration of every kind on a tiny model; those left out differ from one of these in numbers alone."""
    blocks = BLOCKS.get(table, 2)
    model, out = tiny_of(blocks)
    size = Size(4, 32, 256, 1, *map(str, rows), blocks=blocks, divisor=8, group=32)
    file = tmp_path / "reduced.yaml"
    file.write_text(yaml.safe_dump(reduced(table, size)))
    flags = {"model": str(model)}
    chosen = kinds(load_sweep(str(file), flags).configurations)
    sweep = load_sweep(str(file), flags, only=chosen)
    assert [c.name for c in sweep.configurations] == chosen
    said: list[str] = []
    with Store(out).opened(), SweepView(Console(), tmp_path / "sweep.log", quiet=True) as view:

        def tell(key: str, text: str) -> None:
            said.append(text)
            view.step(key, text)

        grown = prepare(sweep, out)
        result = carry_out(grown, out, Here(tell), view, lambda name: None)
    assert result.failed_configurations() == {}
    assert set(grown.paths) == set(chosen)
    for outcome in result.outcomes.values():
        assert math.isfinite(outcome.measured["perplexity"])
        step = grown.nodes[outcome.key].step
        if step is not None:  # what was planned is what was written
            assert outcome.record.file_bytes == step.shape.file_bytes
            assert outcome.record.parameters_total == step.shape.parameters_total
    assert not [line for line in said if "the forecast is wrong" in line]


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

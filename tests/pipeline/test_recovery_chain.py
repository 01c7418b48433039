"""Every way to recover through the command's own path: store, mask, plan, packed file, chip, quality."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import RecipeError
from edgepress.checkpoints.image import pack_checkpoint, unpack_checkpoint
from edgepress.checkpoints.manifest import fingerprint
from edgepress.checkpoints.packed_sizes import packed_sizes
from edgepress.checkpoints.writer import prove_pattern, verify
from edgepress.pipeline.cli import app
from edgepress.pipeline.plan import plan
from edgepress.pipeline.recipe import build
from edgepress.pipeline.sweep_recipe import ablation, load_sweep
from edgepress.stages.options import Lora, decisive

pytestmark = pytest.mark.pipeline

FLAGS: dict[str, Any] = {
    "depth.remove": 0, "wanda.pattern": "2:4", "wanda.method": "magnitude",
    "gptq.group": 32, "gptq.scale_search": False, "lora.targets": "all",
    "lora.steps": 2, "lora.held_out": 0, "lora.learning_rate": 0.01, "lora.rank": 4,
}  # fmt: skip
MERGED = ["rslora", "dora", "ia3"]
BESIDE = ["qlora", "qlora+dora", "qlora+ia3", "rslora+loftq"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One store for all methods: what comes before lora is computed once."""
    out: Path = tmp_path_factory.mktemp("recovery") / "out"
    return out


@pytest.mark.parametrize("method", [*MERGED, *BESIDE])
def test_a_method_runs_through_the_pipeline(
    method: str, store: Path, tiny_llama: Path, run_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    beside = method in BESIDE
    flags, skip = FLAGS | {"lora.method": method}, "" if beside else "gptq,eora"
    shape = Checkpoint.open(tiny_llama).shape
    recipe = build(None, flags | {"model": str(tiny_llama), "lora.samples": 16, "lora.length": 64}, skip)
    assert [name for name, _ in recipe.stages] == ["wanda", "gptq", "lora"] if beside else ["wanda", "lora"]
    step = plan(recipe, shape)[-1]

    given = {key.replace(".", "__"): value for key, value in flags.items()}
    values = {key: value for key, value in given.items() if not key.startswith("eora")}
    result = run_recipe(store, tiny_llama, skip="eora" if beside else skip, **values)
    report, manifest = result.report["stages"][-1], result.stages[-1].checkpoint.manifest
    found, parent = result.stages[-1].checkpoint, result.stages[-2].checkpoint
    assert (report["stage"], report["file_bytes"], report["packed_bytes"]) == (
        "lora", step.shape.file_bytes, packed_sizes(step.shape).total,
    )  # fmt: skip
    assert report["sparsity"]["holds"] and report["sparsity"]["refilled_zeros"] == 0
    assert manifest.facts["trainable_parameters"] > 0
    assert manifest.facts["added_bytes"] == sum(t.nbytes for t in step.shape.adapter_tensors())
    assert bool(manifest.facts["added_bytes"]) == beside
    assert report["perplexity"]["after"] < report["perplexity"]["before"]
    facts = prove_pattern(found, found.shape.pattern, parent)
    assert facts["kept_zeros"] == facts["expected_zeros"] > 0 == facts["refilled_zeros"]
    assert any(line.startswith("2:4") for line in verify(found))

    image, back = tmp_path / "model.bin", tmp_path / "back"
    pack_checkpoint(found, image)
    unpack_checkpoint(image, back)
    assert image.stat().st_size == packed_sizes(step.shape).total
    restored = Checkpoint.open(back)
    assert restored.shape.blocks == found.shape.blocks
    for name, tensor in found.block(2).items():
        assert tensor.equal(restored.block(2)[name]), name
    shown = CliRunner().invoke(app, ["check", str(found.folder), "--json"])
    assert shown.exit_code == 0, shown.output
    verdict = json.loads(shown.stdout)
    assert verdict["footprint"]["chip_parts"]["adapters"] == manifest.facts["added_bytes"]

    again = run_recipe(store, tiny_llama, skip="eora" if beside else skip, **values)
    assert again.computed == 0


def test_plan_says_what_a_method_trains_adds_and_takes_and_in_which_order(tiny_llama: Path) -> None:
    flags = ["--model", str(tiny_llama), "--depth", "0", "--lora-targets", "all", "--group", "32"]
    shown = CliRunner().invoke(app, ["plan", *flags, "--recover", "qlora+dora", "--json"])
    assert shown.exit_code == 0, shown.output
    told = json.loads(shown.stdout)
    assert [stage["stage"] for stage in told["stages"]] == ["wanda", "gptq", "lora"]
    (entry,) = told["recovery"]
    widths = [(64, 64), (32, 64), (32, 64), (64, 64), (128, 64), (128, 64), (64, 128)]
    low_rank = 6 * sum(8 * (rows + columns) for rows, columns in widths)
    magnitudes = 6 * sum(rows for rows, _ in widths)
    assert entry["trainable_parameters"] == low_rank + magnitudes
    assert entry["added_bytes"] == 2 * low_rank + 4 * magnitudes
    assert entry["peak_memory_bytes"] == told["stages"][-1]["peak_memory_bytes"]
    assert entry["seconds"] > 0
    assert "lora comes after gptq: --recover qlora+dora trains on the quantised weights" in told["notes"]
    assert any(note.startswith("eora is left out: a layer has room for one adapter") for note in told["notes"])
    said = " ".join(CliRunner().invoke(app, ["plan", *flags, "--recover", "dora"]).output.split())
    assert f"lora (dora): trains {low_rank + magnitudes:,} parameters" in said
    assert "merged into them, no byte added" in said


def test_a_recipe_that_lists_its_stages_decides_the_order(tiny_llama: Path, tmp_path: Path) -> None:
    shape = Checkpoint.open(tiny_llama).shape
    listed = tmp_path / "r.yaml"

    def refused(text: str, **flags: Any) -> str:
        listed.write_text(text)
        with pytest.raises(RecipeError) as caught:
            plan(build(str(listed), {key.replace("__", "."): value for key, value in flags.items()}), shape)
        return str(caught.value)

    early = "stages: [lora: {method: qlora}, gptq: {group: 32}]"
    assert "--recover qlora trains on quantised weights, and no quantiser comes before lora" in refused(early)
    late = "stages: [gptq: {group: 32}, lora: {}]"
    assert "--recover qlora trains beside quantised weights and merges nothing" in refused(late)
    assert refused("stages: [gptq: {group: 32}, lora: {method: qlora}, eora: {rank: 4}]").count("one adapter") == 1
    listed.write_text(late)
    recipe = build(str(listed), {"lora.method": "qlora"})
    assert [step.stage for step in plan(recipe, shape)] == ["gptq", "lora"]
    # asked for in the usual order, EoRA is not left out in silence
    asked = build(None, {"lora.method": "qlora", "eora.rank": 4, "gptq.group": 32, "depth.remove": 0})
    with pytest.raises(RecipeError, match="eora: this checkpoint already carries an adapter"):
        plan(asked, shape)
    with pytest.raises(RecipeError, match="no quantiser comes before lora"):
        plan(build(None, {"lora.method": "loftq", "gptq.quant": "none", "depth.remove": 0}), shape)


def test_a_sweep_orders_each_configuration_by_its_method(tmp_path: Path) -> None:
    sweep = tmp_path / "s.yaml"
    sweep.write_text("sweep: {grid: {lora.method: [lora, qlora+ia3, dora]}}\n")
    orders = [[name for name, _ in c.recipe.stages] for c in load_sweep(str(sweep), {}).configurations]
    usual = ["depth", "wanda", "lora", "gptq", "eora"]
    assert orders == [usual, ["depth", "wanda", "gptq", "lora"], usual]


def test_an_ablation_keeps_such_a_method_with_its_quantiser() -> None:
    sweep = ablation(build(None, {"lora.method": "qlora", "depth.remove": 0}))
    assert {c.name: [name for name, _ in c.recipe.stages] for c in sweep.configurations} == {
        "no stage": [],
        "all stages": ["wanda", "gptq", "lora"],
        "without wanda": ["gptq", "lora"],
        "without gptq and lora": ["wanda"],
        "without lora": ["wanda", "gptq"],
        "only gptq": ["gptq"],
    }
    plain = ablation(build(None, {"lora.method": "dora", "depth.remove": 0}))
    assert ["wanda", "lora"] in [[name for name, _ in c.recipe.stages] for c in plain.configurations]


def test_fingerprints_from_before_there_was_a_choice_are_still_the_same() -> None:
    before = {
        "rank": 8, "alpha": 16, "dropout": 0.1, "targets": "q_proj,k_proj,v_proj,o_proj", "data": "", "samples": 80,
        "length": 512, "batch": 8, "micro_batch": 2, "steps": 0, "epochs": 2, "learning_rate": 1e-3,
        "checkpointing": False, "save_steps": 6, "held_out": 4, "patience": 2, "distill": 0.0, "teacher": "auto",
    }  # fmt: skip
    former = {"dropout": 0.1, "targets": "q_proj,k_proj,v_proj,o_proj", "samples": 80, "epochs": 2}
    assert decisive(Lora(**former)) == before
    assert decisive(Lora(**former, method="dora")) == before | {"method": "dora"}
    keys = {fingerprint("p", "lora", 1, decisive(Lora(method=m)), None, 0, "float32") for m in ("lora", "dora", "ia3")}
    assert len(keys) == 3

"""`--tune` from the command: planned, run, found in the store, proved, packed, compensated after, and put in order."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import RecipeError
from edgepress.checkpoints.packed_sizes import packed_sizes
from edgepress.checkpoints.writer import prove_pattern
from edgepress.pipeline.calibration import training_specs
from edgepress.pipeline.plan import plan
from edgepress.pipeline.recipe import build
from edgepress.pipeline.sweep_recipe import ablation
from edgepress.stages import tune
from edgepress.stages.options import Gptq, Lora, Tune
from edgepress.stages.requirements import training_operations
from tests.pipeline.conftest import QUICK

pytestmark = pytest.mark.pipeline
SHORT = (
    *("--tune", "2", "--tune-samples", "8", "--tune-length", "64", "--tune-batch", "2", "--tune-micro-batch", "1"),
    *("--tune-held-out", "2", "--tune-save-steps", "1"),
)


def test_a_run_with_tune_and_eora_after_it(tiny_llama: Path, compress: Callable[..., Any], tmp_path: Path) -> None:
    command = ("--model", tiny_llama, *QUICK, *SHORT, "--skip", "depth,lora", "--wanda", "2:4", "--quant", "gptq2-s")
    planned = compress("plan", *command, "--json")
    assert planned.returncode == 0, planned.stderr
    forecast = json.loads(planned.stdout)
    ran = compress(*command, "-o", tmp_path, "--json")
    assert ran.returncode == 0, ran.stderr
    stages = {stage["stage"]: stage for stage in json.loads(ran.stdout)["stages"]}
    assert list(stages) == ["wanda", "gptq", "tune", "eora"]
    masked, before, after = (Checkpoint.open(Path(stages[name]["path"])) for name in ("wanda", "gptq", "tune"))
    assert after.shape == before.shape and after.folder.name.startswith("3-tune-2-")
    assert stages["tune"]["packed_bytes"] == stages["gptq"]["packed_bytes"] == packed_sizes(after.shape).total
    assert stages["tune"]["file_bytes"] == stages["gptq"]["file_bytes"]
    assert stages["tune"]["sparsity"]["holds"]
    assert after.shape.pattern is not None and prove_pattern(after, after.shape.pattern, masked)["holds"]
    manifest = after.manifest
    assert manifest is not None and manifest.options["steps"] == 2
    assert manifest.facts["trainable_parameters"] == tune.trainable_parameters(before.shape)
    assert [w["stage"] for w in forecast["recovery"]] == ["tune"]
    assert forecast["recovery"][0]["trainable_parameters"] == manifest.facts["trainable_parameters"]
    assert forecast["recovery"][0]["added_bytes"] == 0
    assert (after.folder / "loss.png").is_file() and len(manifest.facts["losses"]) == 2
    verified = compress("verify", after.folder)
    assert verified.returncode == 0 and "2:4: " in verified.stdout, verified.stderr
    again = compress(*command, "-o", tmp_path, "--json")
    assert all(stage["reused"] for stage in json.loads(again.stdout)["stages"])


def test_its_flags_decide_the_fingerprint_and_its_place(tiny_llama: Path) -> None:
    recipe = build(None, {"tune.steps": 5, "lora.method": "qlora"})
    assert [name for name, _ in recipe.stages] == ["depth", "wanda", "gptq", "tune", "lora"]
    assert [name for name, _ in build(None, {}).stages] == ["depth", "wanda", "lora", "gptq", "eora"]
    listed = build("early-lora", {"tune.steps": 5})
    names = [name for name, _ in listed.stages]
    assert names[names.index("gptq") + 1] == "tune"
    assert training_specs(build(None, {"tune.steps": 5, "tune.data": "c4"})) == ["embedded", "self", "c4"]
    with pytest.raises(RecipeError, match="--tune trains the scales of quantised weights"):
        plan(
            build(None, {"model": str(tiny_llama), "tune.steps": 5, "gptq.quant": "none"}),
            Checkpoint(tiny_llama, None).shape,
        )


def test_an_ablation_shows_tune_with_the_quantiser_it_needs() -> None:
    found = ablation(build(None, {"tune.steps": 5}, "depth,wanda,lora")).configurations
    assert {c.name: [name for name, _ in c.recipe.stages] for c in found} == {
        "no stage": [],
        "all stages": ["gptq", "tune", "eora"],
        "only gptq and eora": ["gptq", "eora"],
        "without eora": ["gptq", "tune"],
        "only gptq": ["gptq"],
    }


def test_the_forecast_counts_what_is_trained(tiny_llama: Path) -> None:
    from edgepress.stages import gptq

    shape = gptq.plan(Checkpoint(tiny_llama, None).shape, Gptq("gptq4-s", group=32))
    # 6 blocks of 7 layers, a row each of d and e; a scale and a minimum for every 32 inputs; norms of 64.
    rows, groups = 64 + 32 + 32 + 64 + 128 + 128 + 64, (64 + 32 + 32 + 64) * 2 + 128 * 2 * 2 + 64 * 4
    assert tune.trainable_parameters(shape) == 6 * (2 * rows + 2 * groups + 2 * 64) + 64
    short, long = (tune.cost(shape, Tune(steps=steps)) for steps in (10, 100))
    assert long.operations > 8 * short.operations
    assert tune.cost(shape, Tune(10, micro_batch=4)).peak_memory_bytes > short.peak_memory_bytes
    assert training_operations(Tune(10, distill=0.0), 1) == 3 * 10 * 4 * 512 + 2 * 8 * 512
    assert training_operations(Lora(steps=10), 1) == 3 * 10 * 8 * 512 + 2 * 4 * 512

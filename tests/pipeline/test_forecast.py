"""The forecast of a sweep: counts, bytes and operations against sums made another way."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgepress.checkpoints.families import PRESETS, shape_from_config
from edgepress.pipeline.plan import plan
from edgepress.pipeline.sweep_recipe import load_sweep
from edgepress.pipeline.tree import forecast, grow, node_seconds, spec_fingerprints
from edgepress.stages.options import STAGES
from edgepress.stages.pruning import METHODS as PRUNERS
from edgepress.stages.quantisers import METHODS as QUANTISERS
from edgepress.stages.recovery import METHODS as RECOVERIES

pytestmark = pytest.mark.unit

SHAPE = shape_from_config(PRESETS["smollm2-135m"])


def test_disk_memory_and_time_are_those_of_the_distinct_stage_runs() -> None:
    sweep = load_sweep("table-b1", {"depth.remove": 4})
    tree = grow(sweep.configurations, lambda recipe: SHAPE, spec_fingerprints)
    expected = forecast(tree)
    standard, early = (plan(c.recipe, SHAPE) for c in sweep.configurations[1:])
    steps = [*standard, *early[1:]]  # they share depth
    assert expected.disk_bytes == sum(step.written_bytes for step in steps)
    assert expected.peak_memory_bytes == max(step.cost.peak_memory_bytes for step in steps)
    assert (expected.asked, expected.distinct, expected.shared, expected.configurations) == (10, 9, 1, 3)
    alone = [node_seconds(node, 1e9) for node in tree.nodes.values()]
    assert all(seconds > 0 for seconds in alone)
    assert sum(node_seconds(node, 2e9) for node in tree.nodes.values()) < sum(alone)
    assert expected.seconds > 0


def test_operations_grow_with_what_they_are_made_of() -> None:
    def operations(stage: str, **options: Any) -> float:
        module = importlib.import_module(f"edgepress.stages.{stage}")
        return float(module.cost(SHAPE, STAGES[stage](**options)).operations)

    for stage in ("wanda", "gptq", "eora"):
        assert operations(stage, samples=64) > operations(stage, samples=8)
    assert operations("lora", steps=20, held_out=0) == 2 * operations("lora", steps=10, held_out=0)
    assert operations("depth", remove=2, rerank=True) == 2 * operations("depth", remove=2)
    assert operations("depth", metric="influence") < operations("depth", metric="perplexity")
    # two passes over the blocks' linear layers, by the parameters of the shape itself
    weights = sum(x.weights for b in SHAPE.blocks for x in b.linears)
    assert operations("wanda", samples=4, length=100) == 2 * 400 * weights
    assert operations("wanda", method="magnitude") < operations("wanda") < operations("wanda", method="sparsegpt")
    assert operations("wanda", method="sparsegpt") == operations("gptq")


def test_plan_of_a_sweep_needs_no_weights(compress: Callable[..., Any]) -> None:
    done = compress("plan", "--recipe", "table-a1", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["asked"], facts["distinct"], facts["shared"], facts["configurations"]) == (73, 43, 30, 45)
    assert facts["disk_bytes"] > 40 * 2**30 and facts["seconds"] > 0 and facts["peak_memory_bytes"] > 2**30
    refused = compress("plan", "--recipe", "table-a1", "--skip", "wanda")
    assert refused.returncode == 2 and "--skip belongs to a recipe of one run" in refused.stderr


SPEED = """
import json, sys
from edgepress.pipeline.cli import main
loaded = {}
for line in json.loads(sys.argv[1]):
    sys.argv = ["compress", "plan", *line]
    try:
        main()
    except SystemExit as ended:
        assert ended.code == 0, line
    loaded[" ".join(line)] = sorted({"torch", "transformers", "peft", "pandas", "matplotlib"} & sys.modules.keys())
sys.stderr.write(json.dumps({line: names for line, names in loaded.items() if names}))
"""


@pytest.mark.pipeline
def test_no_plan_waits_for_torch_or_transformers(tiny_llama: Path) -> None:
    lines = [
        [],
        ["--pad-ffn", "64", "--vocabulary-size", "300", "--homotopic", "2", "--json"],
        ["--recipe", "sweep-two-minutes"],
        *(["--prune", name] for name in PRUNERS),
        *(["--quant", name, "--wanda", "none"] for name in QUANTISERS),  # some keep no pattern
        *(["--recover", name] for name in RECOVERIES),
        ["--quant", "w4a8", "--smooth"],
        ["--quant-effort", "high", "--quant-embeddings", "8", "--device", "cpu", "--dtype", "bfloat16"],
    ]
    small = ["--model", str(tiny_llama), "--data", "embedded", "--protect-first", "1", "--protect-last", "1"]
    lines = [[*small, *line] for line in lines]
    # One process for all: what one of them loaded stays loaded, so the first that is named is the one to look at.
    done = subprocess.run([sys.executable, "-c", SPEED, json.dumps(lines)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stderr) == {}

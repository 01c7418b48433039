"""SparseGPT and the gates' L1 through the command's stages: mask, manifest, plan, packed file, what is refused."""

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
from edgepress.checkpoints.manifest import Manifest
from edgepress.checkpoints.packed_sizes import packed_sizes
from edgepress.checkpoints.writer import prove_pattern, verify
from edgepress.pipeline.cli import app
from edgepress.pipeline.plan import plan
from edgepress.pipeline.recipe import build

pytestmark = pytest.mark.pipeline


@pytest.mark.parametrize(
    ("method", "amount", "states", "zeros"),
    [
        ("sparsegpt", "2:4", "2:4", 1 / 2),
        ("sparsegpt-layer", "0.5", "0.5 in each layer", 1 / 2),
        ("fisher", "2:4", "2:4", 1 / 2),
        ("gate-l1", "0.5", "0.5 in gate_proj", 1 / 2),
    ],
)
def test_the_mask_lives_through_lora_gptq_and_eora_and_comes_back_from_the_packed_file(
    method: str, amount: str, states: str, zeros: float, tiny_llama: Path, run_recipe: Callable[..., Any],
    tmp_path: Path,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    flags = {"wanda.method": method, "wanda.pattern": amount, "depth.remove": 0}
    result = run_recipe(out, tiny_llama, **{key.replace(".", "__"): value for key, value in flags.items()})
    folders = sorted(p for p in out.iterdir() if p.name[0].isdigit())
    assert [p.name.split("-")[1] for p in folders] == [method.split("-")[0], "lora", "gptq4", "eora"]
    report = json.loads((out / "report.json").read_text())["stages"]
    planned = plan(
        build(None, flags | {"model": str(tiny_llama), "gptq.group": 32, "eora.rank": 4}),
        Checkpoint.open(tiny_llama).shape,
    )
    pruned = Checkpoint.open(folders[0])
    pattern = pruned.shape.pattern
    assert pattern is not None
    covered = [x for block in pruned.shape.blocks for x in block.linears if pattern.covers(x.name)]
    assert len(covered) == (6 if method == "gate-l1" else 6 * 7)
    for folder, stage, step in zip(folders, report, planned, strict=True):
        found = Checkpoint.open(folder)
        assert found.shape.pattern == pattern  # from the folder alone
        assert stage["sparsity"] == Manifest.read(folder).sparsity
        assert (stage["sparsity"]["pattern"], stage["sparsity"]["holds"]) == (states, True)
        facts = prove_pattern(found, pattern, pruned)
        assert facts["kept_zeros"] == facts["expected_zeros"] == sum(int(x.weights * zeros) for x in covered)
        assert facts["refilled_zeros"] == 0
        assert stage["packed_bytes"] == packed_sizes(step.shape).total
        assert stage["file_bytes"] == step.shape.file_bytes
        assert step.to_dict()["pattern"] == states
        assert any(line.startswith(states) for line in verify(found))
        image, back = tmp_path / f"{folder.name}.bin", tmp_path / folder.name
        pack_checkpoint(found, image)
        unpack_checkpoint(image, back)
        assert image.stat().st_size == packed_sizes(step.shape).total
        assert Checkpoint.open(back).shape.pattern == pattern
        for path in folder.glob("*.safetensors"):
            assert (back / path.name).read_bytes() == path.read_bytes(), path
    assert result.stages[0].checkpoint.manifest.facts["method"] == method


def test_the_method_is_a_flag_and_a_recipe_key_and_a_wrong_one_is_named(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("stages:\n  - wanda: {pattern: '2:4', method: sparsegpt}\n")
    (stage, options), *rest = build(str(recipe), {}).stages
    assert (stage, options.label, rest) == ("wanda", "sparsegpt-2of4", [])
    assert build(str(recipe), {"wanda.method": "magnitude"}).stages[0][1].label == "magnitude-2of4"
    with pytest.raises(RecipeError, match="--prune luck: there are wanda, magnitude, sparsegpt, sparsegpt-layer,"):
        build(None, {"wanda.method": "luck"})
    with pytest.raises(RecipeError, match="--prune sparsegpt has nothing to prune with --wanda none"):
        build(None, {"wanda.method": "sparsegpt", "wanda.pattern": "none"})
    flags = ["--prune", "gate-l1", "--wanda", "0.5", "--skip", "lora,gptq,eora", "--json"]
    shown = CliRunner().invoke(app, ["plan", "--model", "smollm2-135m", *flags])
    assert shown.exit_code == 0, shown.output
    stage = json.loads(shown.stdout)["stages"][-1]
    assert stage["pattern"] == "0.5 in gate_proj"
    assert "gate-l1 leaves self_attn.q_proj, " in stage["remarks"][0]

"""`--homotopic` on a tiny LLaMA: nested masks, exactly the asked pattern, the budget of one run, and going on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.manifest import Manifest
from edgepress.checkpoints.masks import group_zeros
from edgepress.checkpoints.packed_sizes import packed_sizes
from edgepress.checkpoints.writer import verify
from edgepress.pipeline.plan import plan
from edgepress.pipeline.recipe import build

pytestmark = pytest.mark.pipeline

FLAGS: dict[str, Any] = {"homotopic": 2, "depth__remove": 2, "wanda__pattern": "2:4", "lora__samples": 24}
ORDER = ["depth", "wanda", "lora"] * 2 + ["gptq", "eora"]


@pytest.fixture(scope="module")
def rounds(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, run_recipe: Callable[..., Any]) -> Path:
    out: Path = tmp_path_factory.mktemp("homotopic") / "out"
    assert run_recipe(out, tiny_llama, **FLAGS).computed == len(ORDER)
    return out


def folders(out: Path) -> list[Path]:
    found = [p for p in out.iterdir() if p.name[0].isdigit()]
    return sorted(found, key=lambda p: int(p.name.partition("-")[0]))


def weights(folder: Path) -> dict[tuple[int, str], torch.Tensor]:
    """By the block's number in the uncompressed model."""
    checkpoint = Checkpoint.open(folder)
    origin = Manifest.read(folder).origin["blocks"]
    return {
        (origin[index], x.name): checkpoint.base_weight(index, x)
        for index, block in enumerate(checkpoint.shape.blocks)
        for x in block.linears
    }


def test_every_stage_of_every_round_is_in_the_store(rounds: Path, tiny_llama: Path) -> None:
    manifests = [Manifest.read(folder) for folder in folders(rounds)]
    assert [m.stage for m in manifests] == ORDER
    patterns = [m.sparsity["pattern"] if m.sparsity else None for m in manifests]
    assert patterns == [None, "1/2 of 2:4", "1/2 of 2:4", "1/2 of 2:4", "2:4", "2:4", "2:4", "2:4"]
    assert all(m.sparsity["holds"] and not m.sparsity["refilled_zeros"] for m in manifests if m.sparsity)
    assert [m.file_bytes for m in manifests] == [s["file_bytes"] for s in report(rounds)["stages"]]
    for folder in folders(rounds):
        assert verify(Checkpoint.open(folder))


def test_zeros_only_grow_and_end_as_asked(rounds: Path) -> None:
    last: dict[tuple[int, str], torch.Tensor] = {}
    for folder in folders(rounds)[1:]:
        found = weights(folder)
        for key, weight in found.items():
            assert bool((group_zeros(weight, 4) <= 2).all()) or Manifest.read(folder).stage in ("gptq", "eora")
            if key in last:
                assert not bool(((last[key] == 0) & (weight != 0)).any())
        last = found
    final = weights(folders(rounds)[5])
    assert len(final) == 4 * 7
    assert all(bool((group_zeros(weight, 4) == 2).all()) for weight in final.values())


def test_the_rounds_train_as_long_as_one_run_on_windows_of_their_own(rounds: Path) -> None:
    trained = [m for m in map(Manifest.read, folders(rounds)) if m.stage == "lora"]
    assert [m.options["steps"] for m in trained] == [2, 2]  # of the 4 that the recipe gives
    assert sum(m.facts["steps"] for m in trained) == 4
    assert all(m.options["distill"] == 0.5 for m in trained)
    assert len({m.calibration["sha256"] for m in trained}) == 2
    recipe = report(rounds)["recipe"]
    assert recipe["homotopic"] == 2 and [next(iter(s)) for s in recipe["stages"]] == [*ORDER[:3], "gptq", "eora"]


def test_the_plan_says_what_comes(rounds: Path, tiny_llama: Path) -> None:
    flags = {key.replace("__", "."): value for key, value in FLAGS.items()}
    quick = {"lora.steps": 4, "lora.batch": 4, "lora.rank": 4, "lora.length": 64, "gptq.group": 32, "eora.rank": 4}
    protect = {"depth.protect_first": 1, "depth.protect_last": 1}
    steps = plan(
        build(None, {**flags, **quick, **protect, "model": str(tiny_llama)}), Checkpoint.open(tiny_llama).shape
    )
    found = [Manifest.read(folder) for folder in folders(rounds)]
    assert [s.shape.file_bytes for s in steps] == [m.file_bytes for m in found]
    assert [packed_sizes(s.shape).total for s in steps] == [m.packed_bytes for m in found]


def test_a_run_that_stopped_between_rounds_goes_on_to_the_same_bytes(
    rounds: Path, tiny_llama: Path, run_recipe: Callable[..., Any], weight_hashes: Callable[..., Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(rounds, out, symlinks=True)
    whole = weight_hashes(out)
    assert run_recipe(out, tiny_llama, **FLAGS).computed == 0
    for folder in folders(out)[4:]:
        shutil.rmtree(folder)
    again = run_recipe(out, tiny_llama, **FLAGS)
    assert again.computed == 4
    assert weight_hashes(out) == whole


def test_rounds_that_compare_hidden_states(tiny_llama: Path, run_recipe: Callable[..., Any], tmp_path: Path) -> None:
    """Round after round the student has fewer blocks; each is compared with the teacher's that it was."""
    short = FLAGS | {"skip": "gptq,eora", "wanda__pattern": "none"}
    plain, hidden = (
        run_recipe(tmp_path / str(weight), tiny_llama, **short, lora__distill_hidden=weight) for weight in (0.0, 1.0)
    )
    trained = [r for r in hidden.stages if r.checkpoint.manifest.stage == "lora"]
    assert [r.checkpoint.manifest.options["distill_hidden"] for r in trained] == [1.0, 1.0]
    assert [len(r.checkpoint.shape.blocks) for r in trained] == [5, 4]
    first = [next(r for r in result.stages if r.checkpoint.manifest.stage == "lora") for result in (plain, hidden)]
    assert first[1].checkpoint.manifest.facts["losses"][0] > first[0].checkpoint.manifest.facts["losses"][0]
    assert run_recipe(tmp_path / "1.0", tiny_llama, **short, lora__distill_hidden=1.0).computed == 0


def test_hidden_states_are_refused_without_a_teacher(compress: Callable[..., Any]) -> None:
    refused = compress("plan", "--distill-hidden", "1", "--model", "smollm2-135m")
    assert refused.returncode == 2
    assert "without --distill there is no teacher; give --distill 0.5 with it" in " ".join(refused.stderr.split())
    rounds = compress("plan", "--distill-hidden", "1", "--homotopic", "2", "--model", "smollm2-135m")
    assert rounds.returncode == 0, rounds.stderr  # rounds distil of themselves


def report(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "report.json").read_text())
    return found

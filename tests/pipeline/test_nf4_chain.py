"""A tiny LLaMA with 1:8 zeros in nf4 and nf4-thesis: resume, eval, verify, pack, check; and who loads the folder."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.families import PRESETS, shape_from_config
from edgepress.checkpoints.forms import CODEBOOKS
from edgepress.checkpoints.packed_sizes import packed_sizes
from edgepress.checkpoints.writer import prove_pattern
from edgepress.stages import gptq, wanda
from edgepress.stages.options import Gptq, Wanda

pytestmark = pytest.mark.pipeline
FLAGS = ("--skip", "depth,lora", "--wanda", "1:8")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, run_recipe: Callable[..., Any]) -> Path:
    """A store with both, and eora at 8 bits on top of nf4."""
    folder = tmp_path_factory.mktemp("nf4") / "out"
    common = {"skip": "depth,lora", "wanda__pattern": "1:8"}
    run_recipe(folder, tiny_llama, **common, gptq__quant="nf4-thesis", eora__rank=0)
    run_recipe(folder, tiny_llama, **common, gptq__quant="nf4", eora__bits=8)
    return folder


def folder_of(out: Path, start: str) -> Path:
    (found,) = (path for path in out.iterdir() if path.name.startswith(start) and len(path.name) == len(start) + 8)
    return found


@pytest.mark.parametrize("name", ["2-nf4-", "2-nf4-thesis-", "3-eora-r4-8bit-"])
def test_what_the_store_holds_is_proved_packed_and_judged(
    out: Path, name: str, compress: Callable[..., Any], tmp_path: Path
) -> None:
    folder, pruned = folder_of(out, name), Checkpoint.open(folder_of(out, "1-wanda-1of8-"))
    found = Checkpoint.open(folder)
    assert found.shape.pattern is not None
    assert prove_pattern(found, found.shape.pattern, pruned)["holds"]
    verified = compress("verify", folder)
    assert verified.returncode == 0 and "1:8: " in verified.stdout, verified.stderr
    image = tmp_path / "model.bin"
    assert compress("pack", folder, "-o", image).returncode == 0
    assert image.stat().st_size == packed_sizes(found.shape).total
    assert compress("unpack", image, "-o", tmp_path / "back").returncode == 0
    for path in folder.rglob("*.safetensors"):
        assert (tmp_path / "back" / path.relative_to(folder)).read_bytes() == path.read_bytes(), path
    judged = compress("check", folder, "--soc", "siracusa", "--json")
    assert judged.returncode == 0, judged.stderr
    assert any("levels of a codebook" in note for note in json.loads(judged.stdout)["notes"])


def test_eora_brings_the_layers_nearer_and_quality_is_measured(out: Path) -> None:
    manifest = json.loads((folder_of(out, "3-eora-r4-8bit-") / "manifest.json").read_text())
    facts, quality = manifest["facts"], manifest["quality"]
    assert facts["total"]["error_after"] < facts["total"]["error_before"]
    assert quality


def test_a_rerun_computes_nothing(out: Path, tiny_llama: Path, run_recipe: Callable[..., Any]) -> None:
    again = run_recipe(out, tiny_llama, skip="depth,lora", wanda__pattern="1:8", gptq__quant="nf4", eora__bits=8)
    assert again.computed == 0


def test_plan_states_bits_model_size_and_who_loads_it(compress: Callable[..., Any]) -> None:
    flags = ("plan", *FLAGS, "--model", "smollm2-135m", "--eora", "0")
    sizes = {}
    for name in CODEBOOKS:
        shown = compress(*flags, "--quant", name, "--json")
        assert shown.returncode == 0, shown.stderr
        stage = json.loads(shown.stdout)["stages"][-1]
        assert (stage["bits"], stage["scratch_bytes"]) == (4, 0)
        assert any("only this project loads" in said for said in stage["remarks"]) == (name == "nf4-thesis")
        sizes[name] = stage["model_mib"]
    assert sizes["nf4-thesis"] > sizes["nf4"]
    refused = compress(*flags, "--quant", "nf4", "--symmetric", "--quant-effort", "high")
    said = " ".join(refused.stderr.split())
    assert refused.returncode == 2 and "nf4 has fixed levels" in said and "nf4 has no such solution" in said


def test_widths_that_bitsandbytes_misreads_are_named() -> None:
    """A multiple of 16 that is none of 64, its block."""
    config = PRESETS["smollm2-135m"]
    assert gptq.remarks(shape_from_config(config), Gptq(quant="nf4")) == []
    (said,) = gptq.remarks(shape_from_config({**config, "intermediate_size": 1520}), Gptq(quant="nf4"))
    assert "misreads rows of 1520 on a CPU" in said and "this project reads it right" in said


def test_what_needs_dense_weights_says_that_these_are_nf4(out: Path) -> None:
    with pytest.raises(PlanError, match=r"already quantised \(nf4\)"):
        wanda.plan(Checkpoint.open(folder_of(out, "2-nf4-")).shape, Wanda(pattern="2:4"))


def test_transformers_stops_at_a_codebook_that_it_does_not_know(out: Path) -> None:
    from transformers import AutoModelForCausalLM

    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(folder_of(out, "2-nf4-thesis-"))


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed: pip install bitsandbytes"
)
def test_transformers_with_bitsandbytes_loads_nf4_as_it_is(out: Path) -> None:
    import bitsandbytes.functional as bnb
    from transformers import AutoModelForCausalLM

    found = Checkpoint.open(folder_of(out, "2-nf4-"))
    model = AutoModelForCausalLM.from_pretrained(found.folder)
    assert type(model.lm_head) is torch.nn.Linear
    for index, block in enumerate(found.shape.blocks):
        dense = found.block(index)
        for linear in block.linears:
            weight = model.get_submodule(f"model.layers.{index}.{linear.name}").weight
            assert torch.equal(bnb.dequantize_4bit(weight, weight.quant_state), dense[f"{linear.name}.weight"])

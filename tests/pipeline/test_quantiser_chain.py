"""Every other way to quantise through the command: store, mask, forecast, perplexity, memory map, packed file, EoRA."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgepress.checkpoints.forms import RealGrid
from edgepress.checkpoints.image import pack_checkpoint, unpack_checkpoint
from edgepress.checkpoints.packed_sizes import packed_sizes
from edgepress.checkpoints.writer import verify
from edgepress.eval.speed import without_kernels
from edgepress.hardware.check import check
from edgepress.hardware.soc import load_soc
from edgepress.stages.options import Gptq
from edgepress.stages.quantisers import METHODS, form

pytestmark = pytest.mark.pipeline

# One of ggml's types and one of our own beside the others; q4_k and its like refuse a pattern.
OTHERS = [n for n in METHODS if not n.startswith("gptq") and not n.endswith("_k")] + ["gptq3-s", "q6_k"]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One store, so that all methods start from the same pruned checkpoint."""
    return tmp_path_factory.mktemp("quantisers") / "out"


@pytest.mark.parametrize("method", OTHERS)
def test_each_method_goes_through_the_command(
    method: str, out: Path, tiny_llama: Path, run_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    values = {"wanda__pattern": "2:4", "skip": "depth,lora", "gptq__quant": method}
    result = run_recipe(out, tiny_llama, **values)
    pruned, quantised, adapted = result.stages
    for stage in (quantised, adapted):
        shape = stage.checkpoint.shape
        facts = stage.checkpoint.manifest
        assert facts.sparsity["holds"] and facts.sparsity["pattern"] == "2:4"
        assert (shape.file_bytes, packed_sizes(shape).total) == (facts.file_bytes, facts.packed_bytes)
        assert any(line.startswith("2:4") for line in verify(stage.checkpoint))
        assert shape.activation_bits == (8 if method == "w4a8" else 16)
        assert stage.after["perplexity"] < 2 * pruned.after["perplexity"]
    assert quantised.checkpoint.folder.name.startswith(f"2-{method}-")
    wanted = {"q6_k": 8}.get(method, form(Gptq(quant=method), masked=True).bits)  # 64 columns take Q8_0
    assert quantised.checkpoint.shape.grid.bits == wanted
    pack_checkpoint(adapted.checkpoint, tmp_path / "image")
    back = unpack_checkpoint(tmp_path / "image", tmp_path / "back")
    assert back.shape.grid == adapted.checkpoint.shape.grid
    siracusa = load_soc("siracusa")
    chips = [check(stage.checkpoint.shape, siracusa, timing=True) for stage in (pruned, quantised)]
    bits = quantised.checkpoint.shape.grid.bits
    assert chips[1].weights.block_codes < chips[0].weights.dense_linears * (bits / 16 + 0.1)
    assert not isinstance(chips[1].timing, str)
    again = run_recipe(out, tiny_llama, **values)
    assert again.computed == 0


def test_smoothing_goes_through_the_command(out: Path, tiny_llama: Path, run_recipe: Callable[..., Any]) -> None:
    values = {"wanda__pattern": "2:4", "skip": "depth,lora", "gptq__quant": "w4a8", "gptq__smooth": True}
    pruned, quantised, adapted = run_recipe(out, tiny_llama, **values).stages
    for stage in (quantised, adapted):
        shape, facts = stage.checkpoint.shape, stage.checkpoint.manifest
        assert facts.sparsity["holds"] and shape.activation_bits == 8
        assert (shape.file_bytes, packed_sizes(shape).total) == (facts.file_bytes, facts.packed_bytes)
        assert stage.after["perplexity"] < 2 * pruned.after["perplexity"]
    assert quantised.checkpoint.folder.name.startswith("2-w4a8-smooth-")
    assert all(
        "threshold" in layer for block in quantised.checkpoint.manifest.facts["blocks"] for layer in block.values()
    )
    assert run_recipe(out, tiny_llama, **values).computed == 0


@pytest.mark.parametrize("method", ["hqq4", "hqq2"])
def test_real_zero_points_where_no_pattern_forbids_them(
    method: str, out: Path, tiny_llama: Path, run_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    values = {"skip": "depth,wanda,lora", "gptq__quant": method}
    result = run_recipe(out, tiny_llama, **values)
    for stage in result.stages:
        shape, facts = stage.checkpoint.shape, stage.checkpoint.manifest
        assert shape.grid == RealGrid(int(method[3]), 32)
        assert (shape.file_bytes, packed_sizes(shape).total) == (facts.file_bytes, facts.packed_bytes)
        assert verify(stage.checkpoint)
    adapted = result.stages[-1].checkpoint
    pack_checkpoint(adapted, tmp_path / "image")
    back = unpack_checkpoint(tmp_path / "image", tmp_path / "back")
    assert back.shape == adapted.shape
    assert without_kernels(adapted) == "no library knows real zero points"
    assert not isinstance(check(adapted.shape, load_soc("siracusa"), timing=True).timing, str)
    assert run_recipe(out, tiny_llama, **values).computed == 0


def test_the_command_plans_and_refuses_in_words(compress: Callable[..., Any]) -> None:
    flags = ["plan", "--skip", "depth,wanda,lora,eora", "--model", "smollm2-135m"]
    shown = compress(*flags, "--quant", "hqq2", "--json")
    assert shown.returncode == 0, shown.stderr
    (stage,) = json.loads(shown.stdout)["stages"]
    assert (stage["bits"], stage["scratch_bytes"]) == (2, 0)
    refused = compress(*flags, "--quant", "awq4", "--quant-effort", "high")
    assert refused.returncode == 2
    assert "awq4 has no such solution; it goes with gptq4" in " ".join(refused.stderr.split())
    refused = compress(*flags, "--smooth")
    assert refused.returncode == 2 and "give --quant w4a8 with it, not gptq4" in " ".join(refused.stderr.split())

"""What a GPU computes is what the host computes; nothing forgets a transfer. Skipped where torch sees no GPU."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import edgepress
from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.tokens import TokenBatches
from edgepress.checkpoints.writer import CheckpointWriter
from edgepress.eval.perplexity import Protocol, measure
from edgepress.eval.text import load_text
from edgepress.stages.options import Depth, Gptq, Lora, Wanda

pytestmark = [
    pytest.mark.pipeline,
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here"),
]

HOST, GPU = torch.device("cpu"), torch.device("cuda")
WINDOWS = {"samples": 8, "length": 32}
QUANT = WINDOWS | {"group": 32}
LORA = WINDOWS | {"rank": 4, "steps": 2, "batch": 4, "micro_batch": 2, "held_out": 2}
FEW = Protocol(window=64, tokens=512)
CASES: dict[str, tuple[str, Any]] = {
    "depth, perplexity": ("depth", Depth(1, protect_first=0, protect_last=0, **WINDOWS)),
    "depth, influence": ("depth", Depth(1, metric="influence", protect_first=0, protect_last=0, **WINDOWS)),
    "wanda": ("wanda", Wanda("2:4", **WINDOWS)),
    "sparsegpt": ("wanda", Wanda("2:4", method="sparsegpt", **WINDOWS)),
    "fisher": ("wanda", Wanda("2:4", method="fisher", **WINDOWS)),
    "gate-l1": ("wanda", Wanda("0.5", method="gate-l1", **WINDOWS)),
    "gptq4": ("gptq", Gptq("gptq4", quant_embeddings=4, **QUANT)),
    "gptq4, storage order": ("gptq", Gptq("gptq4", activation_order=False, **QUANT)),
    "gptq4-s": ("gptq", Gptq("gptq4-s", **QUANT)),
    "q3_k": ("gptq", Gptq("q3_k", **QUANT)),
    "hqq4": ("gptq", Gptq("hqq4", **QUANT)),
    "awq4": ("gptq", Gptq("awq4", **QUANT)),
    "w4a8": ("gptq", Gptq("w4a8", **QUANT)),
    "w4a8, smoothed": ("gptq", Gptq("w4a8", smooth=True, **QUANT)),
    "nf4": ("gptq", Gptq("nf4", **QUANT)),
    "depth, taylor": ("depth", Depth(1, metric="taylor", protect_first=0, protect_last=0, **WINDOWS)),
    "gptq4, high": ("gptq", Gptq("gptq4", effort="high", effort_steps=4, **QUANT)),
    "gptq4-s, high": ("gptq", Gptq("gptq4-s", effort="high", effort_steps=4, **QUANT)),
    "lora": ("lora", Lora(**LORA)),
    "dora": ("lora", Lora(method="dora", **LORA)),
    "distilled": ("lora", Lora(distill=0.5, **LORA)),
}


def run(stage: str, source: Checkpoint, options: Any, device: torch.device, folder: Path) -> Checkpoint:
    """The checkpoint that the stage writes."""
    ids = torch.randint(3, source.shape.vocabulary, (8, 32), generator=torch.Generator().manual_seed(0))
    module = importlib.import_module(f"edgepress.stages.{stage}")
    module.run(source, CheckpointWriter(folder), TokenBatches("random", ids), options, Runtime(device))
    return Checkpoint(folder, None)


def perplexity(checkpoint: Checkpoint, device: torch.device) -> float:
    return measure(checkpoint, load_text("embedded", "measure"), FEW, Runtime(device)).perplexity


@pytest.fixture(scope="module")
def source(tiny_model: Callable[..., Path]) -> Checkpoint:
    return Checkpoint.open(tiny_model(num_hidden_layers=3))


@pytest.mark.parametrize("case", CASES)
def test_a_stage_gives_what_the_host_gives(case: str, source: Checkpoint, tmp_path: Path) -> None:
    """By the perplexity, since sums in another order can turn a code that lies between two."""
    stage, options = CASES[case]
    host = run(stage, source, options, HOST, tmp_path / "host")
    there = run(stage, source, options, GPU, tmp_path / "there")
    assert [b.linears for b in there.shape.blocks] == [b.linears for b in host.shape.blocks]
    assert perplexity(there, GPU) == pytest.approx(perplexity(host, HOST), rel=1e-2)


def test_the_whole_chain_gives_what_the_host_gives(source: Checkpoint, tmp_path: Path) -> None:
    """Training draws its dropout on its own device, so that it is left out here."""
    small: dict[str, Any] = {
        "data": "embedded", "window": 64, "tokens": 512, "depth": 1, "protect_first": 0, "protect_last": 0,
        "wanda": "2:4", "lora_dropout": 0.0, "lora_samples": 8, "lora_length": 32, "lora_batch": 4, "lora_held_out": 0,
        "lora_steps": 2, "group": 32, "eora": 4, "quant_samples": 8, "quant_length": 32,
    }  # fmt: skip
    found = {
        device: edgepress.compress(source.folder, out=tmp_path / device, device=device, dtype="float32", **small)
        for device in ("cpu", "cuda")
    }
    assert [s.folder.name[0] for s in found["cuda"].stages] == ["1", "2", "3", "4", "5"]
    assert found["cuda"].perplexity == pytest.approx(found["cpu"].perplexity, rel=2e-2)


@pytest.mark.parametrize("quant", ["nf4", "nf4-thesis", "gptq4"])
def test_packed_layers_are_read_as_on_the_host(quant: str, source: Checkpoint, tmp_path: Path) -> None:
    """nf4 by bitsandbytes' kernels, where they are installed."""
    found = run("gptq", source, Gptq(quant, **QUANT), HOST, tmp_path / "out")
    (_, there), (_, host) = (found.packed_layers(0, device, torch.bfloat16) for device in (GPU, HOST))
    assert set(there) == set(host) and there
    for name, read in there.items():
        assert read().device.type == "cuda" and read().dtype == torch.bfloat16
        assert torch.equal(read().cpu(), host[name]()), name

"""GPTQ on dense SmolLM2-135M: perplexity and seconds of every grid, order and damping, beside GPTQModel's own.

32 x 512 calibration tokens and the first 16,384 tokens of the text in windows of 512, both from files:

    .venv/bin/python -m benchmarks.gptq wiki.valid.raw wiki.test.raw [--library] [--only NAME] [--blocks N]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.quiet import quiet_import
from edgepress.checkpoints.runtime import Runtime, choose_dtype
from edgepress.checkpoints.sources import open_source
from edgepress.checkpoints.tokens import TokenBatches, sample_windows
from edgepress.checkpoints.writer import CheckpointWriter
from edgepress.eval.perplexity import Protocol, measure
from edgepress.eval.text import Text, load_text
from edgepress.stages import depth, gptq
from edgepress.stages.options import Depth, Gptq

OURS: dict[str, dict[str, Any]] = {
    "default": {},
    "effort high": {"effort": "high"},
    "symmetric": {"symmetric": True},
    "no scale search": {"scale_search": False},
    "storage order": {"activation_order": False},
    "storage order, no search": {"activation_order": False, "scale_search": False},
    "damping 0.001": {"damping": 0.001},
    "damping 0.05": {"damping": 0.05},
    "damping 0.1": {"damping": 0.1},
    "group 32": {"group": 32},
    "8 bits": {"quant": "gptq8"},
    "3 bits": {"quant": "gptq3"},
    "one scale a row": {"quant": "gptq4-channel"},
}


def ours(source: Checkpoint, windows: TokenBatches, text: Text, options: Gptq, runtime: Runtime) -> tuple[float, float]:
    """Perplexity and the stage's seconds."""
    with tempfile.TemporaryDirectory() as folder:
        target = CheckpointWriter(Path(folder) / "out")
        began = time.perf_counter()
        gptq.run(source, target, windows, options, runtime)
        seconds = time.perf_counter() - began
        return measure(Checkpoint(target.folder, None), text, Protocol(), runtime).perplexity, seconds


def library(source: Checkpoint, windows: TokenBatches, folder: Path, **more: Any) -> float:
    """Quantise by GPTQModel's own solver, 4 bits in groups of 64, into the folder; seconds of that alone."""
    with quiet_import():
        from gptqmodel import GPTQModel, QuantizeConfig
    config = QuantizeConfig(bits=4, group_size=64, device="cpu", **more)
    model = GPTQModel.load(str(source.folder), config)
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in windows.ids]
    began = time.perf_counter()
    model.quantize(rows, batch_size=1)
    seconds = time.perf_counter() - began
    model.save(str(folder))
    source.tokenizer().save_pretrained(folder)
    return seconds


def first_blocks(source: Checkpoint, count: int, windows: TokenBatches, runtime: Runtime) -> Checkpoint:
    """A shorter model for a ratio of times in a minute; every block costs the same."""
    target = CheckpointWriter(Path(tempfile.mkdtemp(prefix="edgepress-")) / "short")
    depth.run(source, target, windows, Depth(layers=f"0-{count - 1}"), runtime)
    return Checkpoint(target.folder, None)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("calibration")
    parser.add_argument("text")
    parser.add_argument("--library", action="store_true", help="GPTQModel's solver as well")
    parser.add_argument("--only", nargs="*", default=list(OURS))
    parser.add_argument("--blocks", type=int, default=0, help="time a model of only the first N blocks")
    arguments = parser.parse_args()
    source = open_source(None)
    runtime = Runtime(dtype=choose_dtype("auto", torch.device("cpu"), "BF16"))
    text = load_text(arguments.text, "whole")
    ids = load_text(arguments.calibration, "whole").token_ids(source.tokenizer())
    windows = sample_windows("calibration", ids, 32, 512, torch.Generator().manual_seed(0))
    if arguments.blocks:
        source = first_blocks(source, arguments.blocks, windows, runtime)
    print(f"{'settings':<40} {'perplexity':>10} {'seconds':>8}", flush=True)
    print(f"{'dense':<40} {measure(source, text, Protocol(), runtime).perplexity:10.2f}", flush=True)
    for name in arguments.only:
        perplexity, seconds = ours(source, windows, text, Gptq(**({"group": 64} | OURS[name])), runtime)
        print(f"{name:<40} {perplexity:10.2f} {seconds:8.1f}", flush=True)
    if arguments.library:
        for name, more in (
            ("GPTQModel, default", {}),
            ("GPTQModel, asymmetric, act order", {"sym": False, "desc_act": True}),
        ):
            with tempfile.TemporaryDirectory() as folder:
                seconds = library(source, windows, Path(folder), **more)
                perplexity = measure(Checkpoint(Path(folder), None), text, Protocol(), runtime).perplexity
            print(f"{name:<40} {perplexity:10.2f} {seconds:8.1f}", flush=True)


if __name__ == "__main__":
    main()

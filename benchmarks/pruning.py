"""Dense SmolLM2-135M pruned by every method of stages/pruning: perplexity, seconds, peak memory.

32 x 512 calibration tokens and the first 16,384 tokens of the text in windows of 512, both from files:

    .venv/bin/python -m benchmarks.pruning wiki.valid.raw wiki.test.raw [--patterns 2:4 0.5] [--only NAME ...]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.memory import peak_bytes, reset_peak
from edgepress.checkpoints.runtime import Runtime, choose_dtype
from edgepress.checkpoints.sources import open_source
from edgepress.checkpoints.tokens import TokenBatches, sample_windows
from edgepress.checkpoints.writer import CheckpointWriter, prove_pattern
from edgepress.eval.perplexity import Protocol, measure
from edgepress.eval.text import Text, load_text
from edgepress.stages import wanda
from edgepress.stages.options import Wanda
from edgepress.stages.pruning import METHODS


def pruned(source: Checkpoint, windows: TokenBatches, text: Text, options: Wanda, runtime: Runtime) -> str:
    """One line: perplexity, seconds, peak memory, zeros kept of those the pattern asks for."""
    with tempfile.TemporaryDirectory() as folder:
        target = CheckpointWriter(Path(folder) / "out")
        reset_peak()
        began = time.perf_counter()
        facts = wanda.run(source, target, windows, options, runtime)
        seconds, peak = time.perf_counter() - began, peak_bytes()
        result = Checkpoint(target.folder, None)
        pattern = wanda.plan(source.shape, options).pattern
        assert pattern is not None
        proof = prove_pattern(result, pattern)
        perplexity = measure(result, text, Protocol(), runtime).perplexity
    zeros = f"{proof['kept_zeros']} of {proof['expected_zeros']}"
    return f"{perplexity:10.2f} {seconds:8.1f} {peak / 2**30:9.2f} {zeros:>24}  {mean_error(facts)}"


def mean_error(facts: dict[str, Any]) -> str:
    """Mean over all layers of the relative squared error of their outputs, where the method measures it."""
    layers = [layer for block in facts["blocks"] for layer in block.values()]
    errors = [layer["error"] for layer in layers if "error" in layer]
    return f"mean output error {statistics.mean(errors):.4f}" if errors else ""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("calibration")
    parser.add_argument("text")
    parser.add_argument("--patterns", nargs="*", default=["2:4"])
    parser.add_argument("--only", nargs="*", default=[name for name in METHODS if name != "gate-l1"])
    arguments = parser.parse_args()
    source = open_source(None)
    runtime = Runtime(dtype=choose_dtype("auto", torch.device("cpu"), "BF16"))
    text = load_text(arguments.text, "whole")
    ids = load_text(arguments.calibration, "whole").token_ids(source.tokenizer())
    windows = sample_windows("calibration", ids, 32, 512, torch.Generator().manual_seed(0))
    print(f"{'method':<20} {'perplexity':>10} {'seconds':>8} {'peak GiB':>9} {'zeros':>24}", flush=True)
    print(f"{'dense':<20} {measure(source, text, Protocol(), runtime).perplexity:10.2f}", flush=True)
    for pattern in arguments.patterns:
        for name in arguments.only:
            line = pruned(source, windows, text, Wanda(pattern, method=name), runtime)
            print(f"{name + ' ' + pattern:<20} {line}", flush=True)


if __name__ == "__main__":
    main()

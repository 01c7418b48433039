"""Seconds of wanda and of the perplexity ranking against the number of blocks, SmolLM2's shape, random weights.

Wanda grows linearly. The ranking runs each candidate's suffix: n (n - 1) / 2 block passes, half of the square.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch

from benchmarks.shapes import write_random
from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.tokens import TokenBatches
from edgepress.checkpoints.writer import CheckpointWriter
from edgepress.stages import depth, wanda
from edgepress.stages.options import Depth, Wanda


def main() -> None:
    runtime = Runtime(dtype=torch.bfloat16)
    ids = torch.randint(40000, (8, 128), generator=torch.Generator().manual_seed(0))
    print(f"{'blocks':>6} {'wanda s':>8} {'a block':>8} {'ranking s':>10} {'a block pass':>13}")
    with tempfile.TemporaryDirectory() as home:
        for blocks in (15, 30, 60):
            source = Checkpoint.open(write_random(Path(home) / str(blocks), "smollm2-135m", blocks))
            batches = TokenBatches("random", ids)
            began = time.perf_counter()
            wanda.run(source, CheckpointWriter(Path(home) / f"out-{blocks}"), batches, Wanda("2:4"), runtime)
            pruning = time.perf_counter() - began
            options = Depth(remove=2, protect_first=0, protect_last=0, samples=8, length=128)
            began = time.perf_counter()
            depth.choose(source, batches, options, runtime)
            ranking = time.perf_counter() - began
            passes = blocks + blocks * (blocks - 1) / 2
            row = f"{blocks:>6} {pruning:8.2f} {pruning / blocks:8.3f} {ranking:10.2f} {ranking / passes:13.4f}"
            print(row, flush=True)


if __name__ == "__main__":
    main()

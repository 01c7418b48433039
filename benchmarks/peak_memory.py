"""Peak resident size of depth and wanda, each in a process of its own, against the number of blocks.

Goals: 30, 60 and 120 blocks of SmolLM2's shape within 5 % of each other; Llama-3.2-1B's shape (2.3 GiB) under
3 GiB; the plan's forecast within 20 %. Random weights; the ranking's default 10 x 128 tokens, and 16 x 256 for
wanda.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.shapes import write_random
from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.memory import peak_bytes
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.tokens import TokenBatches
from edgepress.checkpoints.writer import CheckpointWriter
from edgepress.stages import depth, wanda
from edgepress.stages.options import Depth, Wanda

GIB = 2**30


def child(model: Path, stage: str) -> None:
    """Run one stage and print the process's peak and the forecast, in bytes."""
    source = Checkpoint.open(model)
    windows = (10, 128) if stage == "depth" else (16, 256)
    ids = torch.randint(source.shape.vocabulary // 2, windows, generator=torch.Generator().manual_seed(0))
    runtime = Runtime(dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory(dir=model.parent) as folder:
        target, batches = CheckpointWriter(Path(folder) / "out"), TokenBatches("random", ids)
        if stage == "depth":
            removal = Depth(remove=2)
            depth.run(source, target, batches, removal, runtime)
            cost = depth.cost(source.shape, removal)
        else:
            pruning = Wanda("2:4", samples=16, length=256)
            wanda.run(source, target, batches, pruning, runtime)
            cost = wanda.cost(source.shape, pruning)
        print(peak_bytes(), cost.peak_memory_bytes)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--child", nargs=2, metavar=("MODEL", "STAGE"))
    parser.add_argument("--big", action="store_true", help="Llama-3.1-8B's shape as well: 15 GiB of disk, 15 minutes")
    parser.add_argument("--only", help="one preset")
    arguments = parser.parse_args()
    if arguments.child:
        child(Path(arguments.child[0]), arguments.child[1])
        return
    cases = [("smollm2-135m", 30), ("smollm2-135m", 60), ("smollm2-135m", 120), ("llama-3.2-1b", 16)]
    if arguments.big:
        cases.append(("llama-3.1-8b", 32))
    print(f"{'model':<14} {'blocks':>6} {'weights GiB':>11} {'stage':<6} {'peak GiB':>8} {'forecast':>8} {'ratio':>6}")
    with tempfile.TemporaryDirectory() as home:
        for preset, blocks in cases:
            if arguments.only not in (None, preset):
                continue
            model = write_random(Path(home) / f"{preset}-{blocks}", preset, blocks)
            size = sum(p.stat().st_size for p in model.glob("*.safetensors")) / GIB
            for stage in ("depth", "wanda"):
                command = [sys.executable, "-m", "benchmarks.peak_memory", "--child", str(model), stage]
                output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                peak, forecast = (int(word) / GIB for word in output.split()[-2:])
                row = f"{preset:<14} {blocks:>6} {size:11.2f} {stage:<6} {peak:8.2f} {forecast:8.2f}"
                print(f"{row} {forecast / peak:6.2f}", flush=True)


if __name__ == "__main__":
    main()

"""Peak resident size of depth and wanda, each in a process of its own, against the number of blocks; and of training.

Goals: 30, 60 and 120 blocks of SmolLM2's shape within 5 % of each other; Llama-3.2-1B's shape (2.3 GiB) under
3 GiB; the plan's forecast within 20 %. Random weights; the ranking's default 10 x 128 tokens, and 16 x 256 for
wanda. --lora: LoRA on dense weights beside QLoRA on NF4 kept packed, one step; the second at most 0.35 of the first's
peak, forecasts within 10 %.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.shapes import write_random
from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.forms import Codebook
from edgepress.checkpoints.memory import peak_bytes
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.tokens import TokenBatches
from edgepress.checkpoints.writer import CheckpointWriter
from edgepress.stages import depth, gptq, lora, wanda
from edgepress.stages.options import Depth, Gptq, Lora, Wanda

GIB = 2**30


def child(model: Path, stage: str) -> None:
    """Run one stage and print the process's peak and the forecast, in bytes."""
    source = Checkpoint.open(model)
    options = Lora(**json.loads(stage)) if stage.startswith("{") else None
    windows = (options.samples, options.length) if options else (10, 128) if stage == "depth" else (16, 256)
    ids = torch.randint(source.shape.vocabulary // 2, windows, generator=torch.Generator().manual_seed(0))
    runtime = Runtime(dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory(dir=model.parent) as folder:
        target, batches = CheckpointWriter(Path(folder) / "out"), TokenBatches("random", ids)
        if options:
            lora.run(source, target, batches, options, runtime)
            cost = lora.cost(source.shape, options)
        elif stage == "depth":
            removal = Depth(remove=2)
            depth.run(source, target, batches, removal, runtime)
            cost = depth.cost(source.shape, removal)
        else:
            pruning = Wanda("2:4", samples=16, length=256)
            wanda.run(source, target, batches, pruning, runtime)
            cost = wanda.cost(source.shape, pruning)
        print(peak_bytes(), cost.peak_memory_bytes)


def measured(model: Path, stage: str) -> tuple[float, float]:
    """Peak and forecast in GiB, of a process of its own."""
    command = [sys.executable, "-m", "benchmarks.peak_memory", "--child", str(model), stage]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    peak, forecast = (int(word) / GIB for word in output.split()[-2:])
    return peak, forecast


def coded(folder: Path, dense: Checkpoint) -> None:
    """The model in NF4, every block with the codes of the first: their values do not matter."""
    writer, after = CheckpointWriter(folder), gptq.plan(dense.shape, Gptq("nf4"))
    tensors = dict(dense.block(0))
    for x in after.blocks[0].linears:
        assert isinstance(x.grid, Codebook)
        stored = x.grid.write(tensors.pop(f"{x.name}.weight"), torch.bfloat16)
        tensors |= {f"{x.name}.{kind}": tensor for kind, tensor in stored.items()}
    for index in range(len(after.blocks)):
        writer.write_block(index, tensors)
    writer.copy_outer(dense)
    writer.finish(after.config, dense)


def training(home: Path, preset: str, micro_batch: int, length: int) -> None:
    """One step of LoRA, and of QLoRA with each of what saves memory, on a model of the preset's shape."""
    dense = write_random(home / preset, preset)
    if not (home / "nf4" / "config.json").is_file():
        coded(home / "nf4", Checkpoint.open(dense))
    step = {"samples": micro_batch, "batch": micro_batch, "micro_batch": micro_batch, "length": length, "steps": 1}
    step |= {"held_out": 0, "rank": 64, "targets": "all"}
    cases = {
        "lora": (dense, {}),
        "lora, checkpointing": (dense, {"checkpointing": True}),
        "qlora": (home / "nf4", {"method": "qlora"}),
        "qlora, packed": (home / "nf4", {"method": "qlora", "packed": True}),
        "qlora, packed, checkpointing": (home / "nf4", {"method": "qlora", "packed": True, "checkpointing": True}),
    }
    print(f"{preset}, {micro_batch} x {length} tokens")
    print(f"{'':<30} {'peak GiB':>8} {'of lora':>8} {'forecast':>8} {'ratio':>6}")
    first = 0.0
    for name, (model, more) in cases.items():
        peak, forecast = measured(model, json.dumps(step | more))
        first = first or peak
        print(f"{name:<30} {peak:8.2f} {peak / first:8.2f} {forecast:8.2f} {forecast / peak:6.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--child", nargs=2, metavar=("MODEL", "STAGE"))
    parser.add_argument("--big", action="store_true", help="Llama-3.1-8B's shape as well: 15 GiB of disk, 15 minutes")
    parser.add_argument("--only", help="one preset")
    parser.add_argument("--lora", action="store_true", help="training instead")
    parser.add_argument("--micro-batch", type=int, default=2, help="windows at once in training")
    parser.add_argument("--length", type=int, default=512, help="tokens of one")
    parser.add_argument("--home", type=Path, help="where the random models are kept for another time")
    arguments = parser.parse_args()
    if arguments.child:
        child(Path(arguments.child[0]), arguments.child[1])
        return
    if arguments.lora:
        with tempfile.TemporaryDirectory() as passing:
            home = arguments.home or Path(passing)
            training(home, arguments.only or "llama-3.2-1b", arguments.micro_batch, arguments.length)
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
                peak, forecast = measured(model, stage)
                row = f"{preset:<14} {blocks:>6} {size:11.2f} {stage:<6} {peak:8.2f} {forecast:8.2f}"
                print(f"{row} {forecast / peak:6.2f}", flush=True)


if __name__ == "__main__":
    main()

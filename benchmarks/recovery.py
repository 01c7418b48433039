"""What comes back after pruning: 2:4 through masked LoRA, GPTQ and EoRA; the whole chain against a tuned dense model.

SmolLM2-135M, trained and calibrated on one text, measured on the first 16,384 tokens of another:

    .venv/bin/python -m benchmarks.recovery wiki.valid.raw wiki.test.raw [--part 2:4|chain] [-o OUT]

Stages lie in OUT (default: a temporary folder), so an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from edgepress.checkpoints.quiet import quiet_libraries
from edgepress.pipeline.progress import Reporter
from edgepress.pipeline.recipe import build
from edgepress.pipeline.run import run
from edgepress.pipeline.store import Store

# Merging is free, so every linear layer is adapted; one rank for all.
BUDGET: dict[str, Any] = {
    "lora.targets": "all",
    "lora.rank": 16,
    "lora.alpha": 32,
    "lora.dropout": 0.0,
    "lora.length": 256,
    "lora.samples": 816,
    "lora.held_out": 16,
    "lora.micro_batch": 8,  # the masked sum of weight and adapter is made once for each
    "lora.steps": 150,
    "lora.learning_rate": 1e-3,
    "lora.save_steps": 25,
}
# The chain and the dense model it is held against: what two cores do in a few minutes each.
SHORT: dict[str, Any] = BUDGET | {"lora.samples": 176, "lora.steps": 0, "lora.epochs": 2, "lora.save_steps": 10}
QUANT: dict[str, Any] = {"gptq.group": 64}


def stages(flags: dict[str, Any], skip: str, out: Path) -> list[dict[str, Any]]:
    with Store(out).opened(), Reporter(Console(stderr=True), out / "compress.log") as reporter:
        report = run(build(None, flags, skip), out, reporter).report
    dense = {"stage": "dense", "perplexity": {"after": report["baseline"]["perplexity"]}, "seconds": 0.0}
    return [dense, *report["stages"]]


def show(title: str, entries: list[dict[str, Any]]) -> None:
    print(f"\n{title}")
    for entry in entries:
        sparsity = (entry.get("sparsity") or {}).get("pattern") or ""
        print(f"  {entry['stage']:<8} {entry['perplexity']['after']:8.2f} {entry['seconds']:7.0f} s  {sparsity}")


def two_of_four(flags: dict[str, Any], out: Path) -> None:
    entries = stages(flags | {"wanda.pattern": "2:4"}, "depth", out)
    show("2:4, recovered, quantised, compensated", entries)
    _, wanda, lora, gptq, eora = (entry["perplexity"]["after"] for entry in entries)
    print(f"  masked LoRA {wanda:.1f} -> {lora:.2f} (goal 38) in {entries[2]['seconds']:.0f} s (goal 1200)")
    print(f"  GPTQ against that: {gptq / lora:.3f} x (goal 1.25)")
    print(f"  EoRA wins back {(gptq - eora) / (gptq - lora):.0%} of what GPTQ lost (goal 25 %)")


def chain(flags: dict[str, Any], out: Path) -> None:
    dense = stages(flags, "depth,wanda,gptq,eora", out)
    show("dense, tuned with the same budget", dense)
    entries = stages(flags | {"depth.remove": 2, "wanda.pattern": "1:8"}, "", out)
    show("--depth 2 --wanda 1:8 --quant gptq4", entries)
    ratio = entries[-1]["perplexity"]["after"] / dense[-1]["perplexity"]["after"]
    print(f"  whole chain against the tuned dense model: {ratio:.3f} x (goal 1.4)")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("training")
    parser.add_argument("text")
    parser.add_argument("--part", choices=("2:4", "chain"))
    parser.add_argument("-o", "--out", type=Path)
    arguments = parser.parse_args()
    quiet_libraries()
    flags = {"data": arguments.training, "text": arguments.text, **QUANT}
    with tempfile.TemporaryDirectory() as temporary:
        out = arguments.out or Path(temporary)
        if arguments.part != "chain":
            two_of_four(flags | BUDGET, out / "two-of-four")
        if arguments.part != "2:4":
            chain(flags | SHORT, out / "chain")


if __name__ == "__main__":
    main()

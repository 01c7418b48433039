"""Are a chip's tokens Python's? stories260K through the whole chain at every pattern and width, on a simulated core.

`python -m benchmarks.chip_tokens STORIES260K.bin TINYSTORIES.txt [simulator]`: patterns none, 1:8, 2:4; 8, 4, 3 bits;
each without and with EoRA's adapter; 5 prompts of 200 new tokens, whatever ends the text. Stages are shared: a short
LoRA for each pattern, one quantisation for each of its widths. qemu is the fastest simulator; auto takes unicorn.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import edgepress
from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.hardware.rv32.build import build, find_compiler
from edgepress.hardware.rv32.simulator import difference, expected_tokens, find_simulator, simulate
from edgepress.hardware.soc import load_soc
from edgepress.pipeline.export import plan_export

PROMPTS = ("Once upon a time", "Lily and Tom went to the", "The little dog was", "One day, a big", "Mom said")
NEW, CONTEXT = 200, 256


def equal_tokens(checkpoint: Path, prompt: str, simulator: str) -> tuple[int, int, int]:
    """How many of the new tokens are Python's up to the first that is not, of how many; and instructions a token."""
    planned = plan_export(Checkpoint.open(checkpoint), load_soc("siracusa"), prompt, NEW, CONTEXT)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        replace(planned, run=replace(planned.run, ends=())).write(folder)
        build(folder, find_compiler())
        outcome, wanted = simulate(folder, simulator=simulator), expected_tokens(folder)
    same = len(wanted)
    if difference(outcome.tokens, wanted):
        pairs = enumerate(zip(outcome.tokens, wanted, strict=False))
        same = next((k for k, (own, other) in pairs if own != other), min(len(outcome.tokens), len(wanted)))
    return same - len(planned.run.prompt), NEW, round(outcome.instructions_a_token)


def main(model: str, text: str, simulator: str = "auto") -> None:
    simulator = find_simulator(simulator)
    print(f"{simulator}; {' '.join(find_compiler()[:4])}; {len(PROMPTS)} prompts of {NEW} new tokens")
    print(f"{'pattern':<9}{'bits':<6}{'adapter':<9}{'equal tokens':<28}{'instructions a token':>20}", flush=True)
    missed = 0
    with tempfile.TemporaryDirectory() as out:
        for pattern in ("none", "1:8", "2:4"):
            for bits in (8, 4, 3):
                run = edgepress.compress(
                    model, data=text, out=out, skip=["wanda"] if pattern == "none" else [],
                    wanda="1:8" if pattern == "none" else pattern, quant=f"gptq{bits}", depth=1, protect_first=1,
                    protect_last=1, pad_ffn=32, lora_targets="all", lora_rank=16, lora_length=256, lora_samples=64,
                    lora_epochs=1, group=32, quant_embeddings=8, eora=4, eora_bits=8, progress=False,
                )  # fmt: skip
                for stage in run.stages[-2:]:
                    found = [equal_tokens(stage.folder, prompt, simulator) for prompt in PROMPTS]
                    missed += sum(same != all_of for same, all_of, _ in found)
                    told = " ".join(str(same) for same, _, _ in found)
                    mean = sum(taken for _, _, taken in found) / len(found)
                    beside = "yes" if stage.name == "eora" else "no"
                    print(f"{pattern:<9}{bits:<6}{beside:<9}{told:<28}{mean:>20,.0f}", flush=True)
    if missed:
        sys.exit(f"{missed} of the runs leave Python's tokens")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    main(*sys.argv[1:])

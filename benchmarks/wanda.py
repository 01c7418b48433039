"""The wanda stage on SmolLM2-135M: against one forward pass over its calibration tokens, and its masks against
the published loop over groups.

Goals: the stage at most 2.5 x the forward pass, the masks at most 0.1 x the loop.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgepress.checkpoints.runtime import Runtime, choose_dtype
from edgepress.checkpoints.sources import open_source
from edgepress.checkpoints.tokens import sample_windows
from edgepress.checkpoints.writer import CheckpointWriter
from edgepress.eval.text import load_text
from edgepress.stages import wanda
from edgepress.stages.options import Wanda
from edgepress.stages.pruning.wanda import prune_n_of_m


def loop_over_groups(weight: Tensor, norm: Tensor, n: int, m: int) -> Tensor:
    """The mask as published code makes it: a Python loop over the groups of a row, all rows at once."""
    score = weight.abs() * norm
    dropped = torch.zeros_like(score, dtype=torch.bool)
    for start in range(0, score.shape[1], m):
        lowest = torch.topk(score[:, start : start + m], n, dim=1, largest=False)[1]
        dropped.scatter_(1, start + lowest, True)
    return ~dropped


def best_of(runs: int, call: Any, *arguments: Any) -> float:
    seconds = []
    for _ in range(runs):
        began = time.perf_counter()
        call(*arguments)
        seconds.append(time.perf_counter() - began)
    return min(seconds)


@torch.no_grad()
def main() -> None:
    source = open_source(None)
    dtype = choose_dtype("auto", torch.device("cpu"), "BF16")
    ids = load_text("embedded", "calibrate").token_ids(source.tokenizer())
    windows = sample_windows("embedded", ids, 32, 512, torch.Generator().manual_seed(0))
    runtime = Runtime(dtype=dtype)

    model: Any = source.model(dtype=dtype)
    model.model(input_ids=windows.ids[:1], use_cache=False)  # the first pass allocates
    began = time.perf_counter()
    for chunk in windows.chunks(runtime.chunk_tokens):
        model.model(input_ids=chunk, use_cache=False)  # without the head, which the stage does not run either
    forward = time.perf_counter() - began
    del model
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        wanda.run(source, CheckpointWriter(Path(folder) / "out"), windows, Wanda(), runtime)
        stage = time.perf_counter() - began
    print(f"stage {stage:.1f} s, one forward pass {forward:.1f} s: ratio {stage / forward:.2f}, goal 2.5")

    print(f"{'pattern':<8} {'ours ms':>8} {'loop ms':>8} {'ratio':>6}   goal 0.1; masks of one block's layers")
    layers = {name: w.float() for name, w in source.block(15).items() if w.dim() == 2}
    generator = torch.Generator().manual_seed(1)
    norms = {name: torch.rand(w.shape[1], generator=generator) for name, w in layers.items()}
    for n, m in ((1, 8), (2, 4), (4, 8), (8, 16)):
        ours = sum(best_of(7, prune_n_of_m, w, norms[k], n, m) for k, w in layers.items())
        loop = sum(best_of(7, loop_over_groups, w, norms[k], n, m) for k, w in layers.items())
        for name, weight in layers.items():
            masks = (f(weight, norms[name], n, m) for f in (prune_n_of_m, loop_over_groups))
            # of equal scores either may go, so compare what is kept, not where
            kept = [(weight.abs() * norms[name] * mask).view(-1, m).sort(dim=-1).values for mask in masks]
            assert torch.equal(*kept), name
        print(f"{n}:{m:<6} {ours * 1e3:8.2f} {loop * 1e3:8.2f} {ours / loop:6.3f}")


if __name__ == "__main__":
    main()

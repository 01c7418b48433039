"""Perplexity ranking of SmolLM2-135M's blocks: one walk, against a plain loop over candidates.

Same candidates, same tokens, same precision. Goal: at most 0.55 of the plain loop's time, the same
perplexities to 1e-3 in bfloat16 and 1e-5 in float32.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgepress.checkpoints.checkpoint import Checkpoint, Skeleton
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.sources import open_source
from edgepress.checkpoints.tokens import TokenBatches, sample_windows
from edgepress.eval.text import load_text
from edgepress.stages.depth import perplexity

PROTECT_FIRST, PROTECT_LAST = 4, 2


@torch.no_grad()
def plain_loop(source: Checkpoint, ids: Tensor, candidates: list[int], dtype: torch.dtype) -> dict[int, float]:
    """Remove each block from the model in memory and run everything."""
    model: Any = source.model(dtype=dtype)
    layers = model.model.layers
    scores = {}
    for j in candidates:
        model.model.layers = nn.ModuleList(layer for i, layer in enumerate(layers) if i != j)
        logits = model(input_ids=ids, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        scores[j] = math.exp(float(loss))
    return scores


def measure(source: Checkpoint, windows: TokenBatches, dtype: torch.dtype) -> tuple[float, float, float]:
    """Seconds of the walk, seconds of the plain loop, largest relative difference of a perplexity."""
    count = len(source.shape.blocks)
    candidates = list(range(PROTECT_FIRST, count - PROTECT_LAST))
    runtime = Runtime(dtype=dtype)
    plain_loop(source, windows.ids, candidates[:1], dtype)  # imports and kernels that both need
    began = time.perf_counter()
    skeleton = Skeleton(source, dtype=dtype)
    ours = perplexity(skeleton, list(range(count)), candidates, windows.chunks(runtime.chunk_tokens), runtime)
    walk = time.perf_counter() - began
    began = time.perf_counter()
    plain = plain_loop(source, windows.ids, candidates, dtype)
    return walk, time.perf_counter() - began, max(abs(ours[j] / plain[j] - 1) for j in candidates)


def main() -> None:
    source = open_source(None)
    ids = load_text("embedded", "calibrate").token_ids(source.tokenizer())
    windows = sample_windows("embedded", ids, 10, 128, torch.Generator().manual_seed(0))
    print(f"{'precision':<10} {'walk s':>8} {'plain s':>8} {'ratio':>6} {'goal':>5}  {'difference':>10} {'goal':>6}")
    for dtype, goal in ((torch.bfloat16, 1e-3), (torch.float32, 1e-5)):
        walk, plain, difference = measure(source, windows, dtype)
        name = str(dtype).removeprefix("torch.")
        print(f"{name:<10} {walk:8.1f} {plain:8.1f} {walk / plain:6.2f}  0.55  {difference:10.1e} {goal:6.0e}")


if __name__ == "__main__":
    main()

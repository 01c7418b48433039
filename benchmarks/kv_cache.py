"""Perplexity of SmolLM2-135M with a compressed KV cache, and the bytes of that cache.

Goal: 8 bit changes perplexity by less than 0.5 %, 4 bit by less than 3 %. Usage:
python -m benchmarks.kv_cache TEXT [tokens] [float32|bfloat16]
TEXT is WikiText-2's wiki.test.raw for the numbers in the README; windows of 512.
"""

from __future__ import annotations

import sys
import time

import torch

from edgepress.checkpoints.kv_format import KVFormat
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.sources import open_source
from edgepress.eval.perplexity import Protocol, measure
from edgepress.eval.text import load_text

WINDOW = 512
GOALS = {KVFormat(8): 0.5, KVFormat(4): 3.0}  # per cent
OTHERS = (KVFormat(4, sinks=0), KVFormat(16, 252, 4), KVFormat(4, 252, 4))


def main(file: str, tokens: int = 16384, dtype: str = "bfloat16") -> None:
    source, text = open_source(None), load_text(file, "whole")
    runtime, protocol = Runtime(dtype=getattr(torch, dtype)), Protocol("windows", WINDOW, tokens)
    shape = source.shape
    missed = []
    plain = 0.0
    print(f"{protocol}; {text.name}; {dtype}; bytes: the whole cache of one sequence of {WINDOW} tokens", flush=True)
    for form in (KVFormat(), *GOALS, *OTHERS):
        began = time.perf_counter()
        found = measure(source, text, protocol, runtime, kv=form).perplexity
        plain = plain or found
        one = form.token_bytes(shape.kv_heads, shape.head_dim) * WINDOW
        held = one if form.plain else form.capacity_bytes(WINDOW, shape.kv_heads, shape.head_dim)
        change = 100 * (found / plain - 1)
        goal = f", goal +-{GOALS[form]} %" if form in GOALS else ""
        if form in GOALS and abs(change) >= GOALS[form]:
            missed.append(str(form))
        print(
            f"{form!s:42} perplexity {found:.4f} ({change:+.3f} %{goal})  {len(shape.blocks) * held:>10,} bytes  "
            f"{time.perf_counter() - began:.0f} s",
            flush=True,
        )
    if missed:
        sys.exit(f"goal missed: {', '.join(missed)}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1], *(int(a) for a in sys.argv[2:3]), *sys.argv[3:4])

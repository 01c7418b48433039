"""How much quality a setting is likely to cost: a rough, stated proxy to rank settings that all fit.

The unit is the rise of the loss in nats per token of the uncompressed model, so exp(it) multiplies the perplexity.
Costs of different levers are added, which is too kind where two large ones meet. Every point is a measurement, none
of them of your model: measure what you choose.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

# Share of the blocks removed -> rise. SmolLM2-135M-Instruct without 2 of 30 blocks (README: 13.82 -> 17.31);
# Llama-3.2-1B-Instruct without 2, 4, 6, 8 of 16 (the thesis, table A.1: 26.61 -> 55.24, 230.77, 2081.04, 227734.90).
# No recovery by LoRA behind it.
DEPTH = ((0.0, 0.0), (2 / 30, 0.225), (2 / 16, 0.730), (4 / 16, 2.160), (6 / 16, 4.359), (8 / 16, 9.055))

# N:M removed -> rise: Llama-3.2-1B-Instruct (the thesis, table A.1: 26.61 -> 26.77, 27.19, 64.08, 81.32, 161.10).
PATTERNS = {"1:16": 0.006, "1:8": 0.022, "8:16": 0.879, "4:8": 1.117, "2:4": 1.801}

# Bits of the weights -> rise.
QUANTISED = {"none": 0.0, "gptq8": 0.002, "gptq8-channel": 0.004, "gptq4": 0.07, "gptq4-channel": 0.25, "gptq3": 0.4}
EMBEDDINGS = {0: 0.0, 8: 0.001, 4: 0.05}
VOCABULARY = ((512, 1.0), (1024, 0.5), (2048, 0.2), (4096, 0.03), (5083, 0.0))
LENGTH_COST = 1.0

SOURCES = (
    "blocks removed: SmolLM2-135M-Instruct (2 of 30) and Llama-3.2-1B-Instruct (2 to 8 of 16), before LoRA",
    "N:M: Llama-3.2-1B-Instruct, table A.1 of the thesis",
)


def depth_cost(removed: int, blocks: int) -> float:
    """For `removed` of `blocks`, between the measured shares on a straight line, beyond them along the last one."""
    return _between(DEPTH, removed / blocks)


def quantisation_cost(quant: str, group: int) -> float:
    return QUANTISED[quant]


def vocabulary_cost(size: int) -> float:
    """For the `size` most used tokens of a text nobody has named yet: what a small world's text lost."""
    return _between([(math.log2(s), cost) for s, cost in VOCABULARY], math.log2(size))


def _between(points: Sequence[tuple[float, float]], x: float) -> float:
    """Linear between points with rising x, and beyond the last along the last line."""
    for (x0, y0), (x1, y1) in pairwise(points):
        if x <= x1 or (x1, y1) == points[-1]:
            return y0 + (y1 - y0) * max(0.0, x - x0) / (x1 - x0)
    return points[-1][1]

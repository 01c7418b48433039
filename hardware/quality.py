"""How much quality a setting is likely to cost: a rough, stated proxy to rank settings that all fit.

The unit is the rise of the loss in nats per token of the uncompressed model, so exp(it) multiplies the perplexity.
Costs of different levers are added, which is too kind where two large ones meet. Every point is a measurement, most
likely none of them of your model: measure what you choose.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

Points = Sequence[tuple[float, float]]

# Share of the blocks removed -> rise. SmolLM2-135M-Instruct without 2 of 30 blocks (README: 13.82 -> 17.31);
# Llama-3.2-1B-Instruct without 2, 4, 6, 8 of 16 (the thesis, table A.1: 26.61 -> 55.24, 230.77, 2081.04, 227734.90).
# No recovery by LoRA behind it.
DEPTH: Points = ((0.0, 0.0), (2 / 30, 0.225), (2 / 16, 0.730), (4 / 16, 2.160), (6 / 16, 4.359), (8 / 16, 9.055))

# N:M removed -> rise: Llama-3.2-1B-Instruct (the thesis, table A.1: 26.61 -> 26.77, 27.19, 64.08, 81.32, 161.10).
PATTERNS = {"1:16": 0.006, "1:8": 0.022, "8:16": 0.879, "4:8": 1.117, "2:4": 1.801}

QUANTISED = {"none": 0.0, "gptq8": 0.002, "gptq8-channel": 0.004, "gptq4": 0.07, "gptq4-channel": 0.25, "gptq3": 0.4}
EMBEDDINGS = {0: 0.0, 8: 0.001, 4: 0.05}

# SmolLM2-135M-Instruct with the tokens that 253 stories of TinyStories use (4,660 of 49,152), or the 2,048 and 512
# most used of them, measured on 64 others by bits per byte: the rise against how many times as many tokens the
# unseen text takes, less one, and against the share of the vocabulary that is left.
LONGER: Points = ((0.0, 0.0), (0.057, 0.369), (0.182, 0.7), (0.969, 1.5))
SHARE: Points = ((512 / 49152, 1.5), (2048 / 49152, 0.7), (4660 / 49152, 0.369), (1.0, 0.0))

SOURCES = (
    "blocks removed: SmolLM2-135M-Instruct (2 of 30) and Llama-3.2-1B-Instruct (2 to 8 of 16), before LoRA",
    "bits and vocabulary: SmolLM2-135M-Instruct",
    "N:M: Llama-3.2-1B-Instruct",
)


def depth_cost(removed: int, blocks: int) -> float:
    """For `removed` of `blocks`."""
    return _between(DEPTH, removed / blocks)


def quantisation_cost(quant: str) -> float:
    """For a way to quantise by the gptq stage's name; groups of 32 to 128 cost the same here."""
    return QUANTISED[quant]


def vocabulary_cost(size: int, rows: int) -> float:
    """For the `size` most used of `rows` tokens, of a text that nobody has named yet."""
    return _between([(math.log2(share), cost) for share, cost in SHARE], math.log2(size / rows))


def length_cost(ratio: float) -> float:
    """For unseen text of the corpus's kind that takes `ratio` times as many tokens as before."""
    return _between(LONGER, max(0.0, ratio - 1))


def _between(points: Points, x: float) -> float:
    """On a straight line between two points, beyond either end along the line to its neighbour; never below 0."""
    lines = list(pairwise(points))
    (x0, y0), (x1, y1) = next((line for line in lines if x <= line[1][0]), lines[-1])
    return max(0.0, y0 + (y1 - y0) * (x - x0) / (x1 - x0))

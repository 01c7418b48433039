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

# 4-bit weights, by how many share a scale -> rise. 32 and 64: stories260K padded to 192, on unseen TinyStories (4.913
# -> 5.135, 5.225); 128: Llama-3.2-1B-Instruct without 2 of 16 blocks (the thesis, table A.2: 21.34 -> 22.89). Longer
# rows lie on the last line, where nothing was measured.
FOUR_BITS: Points = ((5, 0.044), (6, 0.062), (7, 0.070))  # against log2 of the weights that share a scale
# Other widths against 4 bits, in groups of 64: stories260K, 4.913 -> 4.9135 with 8 bits, 7.028 with 3.
OF_FOUR_BITS = {0: 0.0, 8: 0.002, 4: 1.0, 3: 5.8}
# Embedding and head as well: stories260K at 8 bits (4.9135 -> 4.9131, taken as 0.001; with 4 -> 5.0468).
EMBEDDINGS = {0: 0.0, 8: 0.001, 4: 0.027}

# How many times as many tokens an unseen text takes, less one -> rise, from bits per byte. First point: SmolLM2-135M-
# Instruct with all the tokens that 253 stories use, on 64 others (0.845 -> 0.971); the next: stories260K with 400 and
# 330 tokens of the 488 it needs. A trained model does badly with pieces it was not trained to see.
LONGER: Points = ((0.0, 0.0), (0.057, 0.369), (0.127, 2.600), (0.436, 7.330))
# Share of the vocabulary that is left -> how much longer unseen text gets: SmolLM2's tokenizer cut to the 512, 1,024,
# 2,048, 4,096 most used and all 4,660 tokens of the same stories.
SHARE: Points = tuple(
    (math.log2(size / 49152), longer)
    for size, longer in ((512, 0.969), (1024, 0.436), (2048, 0.182), (4096, 0.065), (4660, 0.057), (49152, 0.0))
)

SOURCES = (
    "blocks: SmolLM2-135M-Instruct and Llama-3.2-1B-Instruct",
    "bits: stories260K and Llama-3.2-1B-Instruct",
    "vocabulary: SmolLM2-135M-Instruct and stories260K",
    "none with LoRA behind it",
)


def depth_cost(removed: int, blocks: int) -> float:
    """For `removed` of `blocks`."""
    return _between(DEPTH, removed / blocks)


def quantisation_cost(bits: int, group: int, width: int) -> float:
    """For `bits` a weight (0: as it is) and a scale for every `group` weights; -1: for a row of `width`."""
    return OF_FOUR_BITS[bits] * _between(FOUR_BITS, math.log2(width if group == -1 else group))


def vocabulary_cost(size: int, rows: int) -> float:
    """For the `size` most used of `rows` tokens, of a text that nobody has named yet."""
    return length_cost(1 + _between(SHARE, math.log2(size / rows)))


def length_cost(ratio: float) -> float:
    """For unseen text of the corpus's kind that takes `ratio` times as many tokens as before."""
    return _between(LONGER, max(0.0, ratio - 1))


def _between(points: Points, x: float) -> float:
    """On a straight line between two points, beyond either end along the line to its neighbour; never below 0."""
    lines = list(pairwise(points))
    (x0, y0), (x1, y1) = next((line for line in lines if x <= line[1][0]), lines[-1])
    return max(0.0, y0 + (y1 - y0) * (x - x0) / (x1 - x0))

"""Search the settings of the stages for those with which a model fits a chip, from shapes alone.

For each way to quantise, the blocks that go and the tokens that stay are walked along the edge of what fits: more
blocks removed never need more room, nor do fewer tokens. So every setting on the edge is met and none behind it,
and a few hundred verdicts do for thousands of settings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.shape import (
    ModelShape,
    Pattern,
    parse_sparsity,
    with_blocks,
    with_grid,
    with_pattern,
    with_vocabulary,
)
from edgepress.hardware.check import Verdict, check
from edgepress.hardware.soc import Soc


@dataclass(frozen=True)
class Quantisation:
    """`quant` as the gptq stage names it; group -1 is one scale a row. bits 0 leaves the weights as they are."""

    quant: str = "none"
    bits: int = 0
    group: int = -1
    embedding_bits: int = 0


@dataclass(frozen=True)
class Settings:
    """What the stages would be asked to do."""

    vocabulary: int  # tokens that stay
    removed: int = 0  # blocks
    pattern: str = "none"
    quantisation: Quantisation = Quantisation()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Candidate:
    settings: Settings
    loss: float  # estimated or measured rise, nats a token
    measured: bool
    verdict: Verdict

    @property
    def over_bytes(self) -> int:
        """What lacks in all memories of the chip together."""
        return sum(max(0, -u.headroom_bytes) for u in self.verdict.memories if u.role != "off_chip")

    @property
    def weight_bytes(self) -> int:
        return sum(use.used_bytes for use in self.verdict.memories if use.role == "weights")

    @property
    def weight_room(self) -> int:
        return sum(use.capacity_bytes for use in self.verdict.memories if use.role == "weights")


@dataclass(frozen=True)
class Found:
    fitting: tuple[Candidate, ...]  # the best first
    closest: tuple[Candidate, ...]  # where nothing fits: the least lacking first
    verdicts: int  # how many were asked for
    patterns_help: bool


# A setting's loss in nats a token, and whether it was measured.
Loss = Callable[[Settings], tuple[float, bool]]
# A setting whose shape cannot be (a format's limits) is left out.
QUANTISATIONS = tuple(
    Quantisation(quant, bits, group, embedding)
    for quant, bits, group in (
        ("gptq8", 8, 128),
        ("gptq8-channel", 8, -1),
        ("gptq4", 4, 32),
        ("gptq4", 4, 128),
        ("gptq4-channel", 4, -1),
        ("gptq3", 3, 128),
    )
    for embedding in (0, 8, 4)
)


def is_dense(shape: ModelShape) -> bool:
    """Whether no layer is quantised and no adapter lies beside one."""
    return not any(x.grid or x.adapted for block in shape.blocks for x in block.linears)


def reshaped(shape: ModelShape, settings: Settings) -> ModelShape:
    """The model's shape after the stages. Raises PlanError for what cannot be."""
    how = settings.quantisation
    if settings.vocabulary != shape.vocabulary:
        shape = with_vocabulary(shape, settings.vocabulary)
    if settings.removed:
        shape = with_blocks(shape, range(len(shape.blocks) - settings.removed))
    if settings.pattern != "none":
        shape = with_pattern(shape, parse_sparsity(settings.pattern))
    return with_grid(shape, how.bits, how.group, False, how.embedding_bits) if how.bits else shape


def search(
    shape: ModelShape,
    soc: Soc,
    loss: Loss,
    *,
    removable: int,
    vocabularies: Sequence[int],
    patterns: Sequence[str] = (),
    best: int = 8,
    **how: Any,
) -> Found:
    """The settings that fit and cost least, one for each way to quantise and each number of blocks at most.

    removable: blocks that may go. vocabularies: sizes to choose from. patterns: N:M to try, used only where the
    chip's verdict counts fewer bytes for them. how: context, kv_bits and the like, for `check`. Where nothing fits,
    the two smallest of different bits instead, what lacks least first, and the smallest with all of its blocks.
    Of a model that is no longer dense only the vocabulary can be cut: the other stages take dense weights.
    """
    search_ = _Search(shape, soc, loss, how)
    quantisations = QUANTISATIONS
    if not is_dense(shape):
        removable, patterns, quantisations = 0, (), ()
    sizes = sorted({size for size in vocabularies if size < shape.vocabulary} | {shape.vocabulary}, reverse=True)
    plain = Quantisation()
    ways = [(plain, "none"), *((q, "none") for q in search_.possible(quantisations))]
    helping = [(q, p) for p in patterns for q, _ in ways if search_.saves(p, q)]
    ways += helping
    start = Settings(shape.vocabulary)
    ways.sort(key=lambda way: loss(replace(start, quantisation=way[0], pattern=way[1]))[0])
    fitting: list[Candidate] = []
    smallest: list[Candidate] = []
    for quantisation, pattern in ways:
        first = replace(start, quantisation=quantisation, pattern=pattern)
        worst = sorted(fitting, key=_rank)[best - 1].loss if len(fitting) >= best else None
        if worst is not None and loss(first)[0] > worst:
            continue  # not even without any cut would it be among the best
        least = search_.judge(replace(first, vocabulary=sizes[-1], removed=removable))
        if least.verdict.fits:
            fitting += search_.edge(first, sizes, removable)
        else:
            smallest.append(least)
    closest = () if fitting else search_.closest(smallest)
    return Found(tuple(sorted(fitting, key=_rank)[:best]), closest, search_.verdicts, bool(helping))


def _rank(candidate: Candidate) -> tuple[float, int]:
    """The least loss first, of equals the one that leaves most room."""
    return round(candidate.loss, 6), candidate.weight_bytes


class _Search:
    def __init__(self, shape: ModelShape, soc: Soc, loss: Loss, how: dict[str, Any]) -> None:
        self.shape, self.soc, self.loss, self.how = shape, soc, loss, how
        self.verdicts = 0

    def judge(self, settings: Settings) -> Candidate:
        self.verdicts += 1
        verdict = check(reshaped(self.shape, settings), self.soc, **self.how)
        return Candidate(settings, *self.loss(settings), verdict)

    def edge(self, first: Settings, sizes: Sequence[int], removable: int) -> Iterator[Candidate]:
        """For each number of blocks removed, the largest vocabulary that fits, while it still grows."""
        place = len(sizes) - 1  # the smallest, which fits at some depth
        for removed in range(removable + 1):
            here = None
            while (at := self.judge(replace(first, removed=removed, vocabulary=sizes[place]))).verdict.fits:
                here = at
                if place == 0:
                    break
                place -= 1  # a larger one, for as long as it fits
            if here is not None:
                yield here
            if here is not None and here.settings.vocabulary == sizes[0]:
                return  # removing more blocks buys nothing

    def closest(self, smallest: Sequence[Candidate]) -> tuple[Candidate, ...]:
        ordered = sorted(smallest, key=lambda c: (c.over_bytes, c.loss))
        first = {c.settings.quantisation.bits: c for c in reversed(ordered)}
        chosen = sorted(first.values(), key=lambda c: c.over_bytes)[:2]
        if not ordered[0].settings.removed:
            return tuple(chosen)
        return (*chosen, self.judge(replace(ordered[0].settings, removed=0)))

    def possible(self, ways: Sequence[Quantisation]) -> list[Quantisation]:
        """Those whose format can hold the model, each grid once."""
        seen = set()
        kept = []
        for way in ways:
            try:
                grid = reshaped(self.shape, Settings(self.shape.vocabulary, quantisation=way)).grid
            except PlanError:
                continue
            if (grid, way.embedding_bits) not in seen:
                seen.add((grid, way.embedding_bits))
                assert grid is not None
                kept.append(replace(way, group=grid.group))
        return kept

    def saves(self, pattern: str, quantisation: Quantisation) -> bool:
        """Whether the layers can take the pattern and this chip needs less room with it.

        At few bits the index of the zeros can take more than the zeros themselves.
        """
        n_of_m = parse_sparsity(pattern)
        if isinstance(n_of_m, Pattern) and any(x.in_features % n_of_m.of for b in self.shape.blocks for x in b.linears):
            return False
        plain = Settings(self.shape.vocabulary, quantisation=quantisation)
        return self.judge(replace(plain, pattern=pattern)).weight_bytes < self.judge(plain).weight_bytes


# --- what a setting may cost ------------------------------------------------------------------------------------------
# How much quality a setting is likely to cost: a rough, stated proxy to rank settings that all fit.
#
# The unit is the rise of the loss in nats per token of the uncompressed model, so exp(it) multiplies the perplexity.
# Costs of different levers are added, which is too kind where two large ones meet. Every point is a measurement, most
# likely none of them of your model: measure what you choose.


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

"""Stage 2: zero N of every M consecutive weights of a row, the least useful first.

WANDA (Sun et al., arXiv 2306.11695). The statistics of a block are taken from the already pruned blocks
before it, so later blocks see the inputs they will get.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from checkpoints.checkpoint import Checkpoint
from checkpoints.errors import PlanError
from checkpoints.reshape import with_pattern
from checkpoints.runtime import Runtime
from checkpoints.shape import LinearShape, ModelShape, Pattern, Sparsity, parse_sparsity
from checkpoints.tokens import TokenBatches
from checkpoints.walk import BlockVisit, Walk
from checkpoints.writer import CheckpointWriter
from stages.dense import require_dense
from stages.options import Wanda as Options

VERSION = 2
_FEW = 32  # groups up to this size are selected by comparing lanes, wider ones by sorting


def plan(shape: ModelShape, options: Options) -> ModelShape:
    """The shape with the pattern on every linear layer of every block.

    Raises PlanError naming each layer whose input width M does not divide, and for quantised layers.
    """
    pattern = parse_sparsity(options.pattern)
    unfit = {x.name: x.in_features for block in shape.blocks for x in block.linears if not _fits(pattern, x)}
    if unfit and isinstance(pattern, Pattern):
        layers = ", ".join(f"{name} ({width})" for name, width in unfit.items())
        raise PlanError(f"--wanda {pattern} needs input widths divisible by {pattern.of}; these are not: {layers}")
    require_dense(shape, "wanda")
    return with_pattern(shape, pattern)


def _fits(pattern: Sparsity, linear: LinearShape) -> bool:
    return linear.in_features % pattern.on(linear.in_features).of == 0


def run(
    source: Checkpoint, target: CheckpointWriter, calibration: TokenBatches, options: Options, runtime: Runtime
) -> dict[str, Any]:
    pattern = parse_sparsity(options.pattern)
    walk = Walk(source, calibration.chunks(runtime.chunk_tokens), runtime, target.work, task="wanda")
    for block in walk:
        norms = input_norms(block)
        score = {}
        for name, linear in block.linears.items():
            nm = pattern.on(linear.in_features)
            mask = prune_n_of_m(linear.weight, norms[name], nm.removed, nm.of)
            score[name] = lost_share(linear.weight, norms[name], mask)
            linear.weight.masked_fill_(~mask, 0)  # a product would leave -0.0, whose sign nothing keeps
        target.write_block(block.index, block.weights())
        block.done({"lost_score_share": score})
    target.copy_outer(source)
    target.finish(source.config, source)
    return {"pattern": options.pattern, "blocks": walk.facts}


def input_norms(block: BlockVisit) -> dict[str, Tensor]:
    """L2 norm of each input feature over all calibration tokens, float32, by layer: (in,)."""
    squares: dict[tuple[str, ...], Tensor] = {}

    def add(names: tuple[str, ...], x: Tensor) -> None:
        total = x.float().square().sum(dim=0)
        squares[names] = squares[names] + total if names in squares else total

    block.observe(add)
    return {name: total.sqrt() for names, total in squares.items() for name in names}


def prune_n_of_m(weight: Tensor, input_norm: Tensor, n: int, m: int) -> Tensor:
    """The mask that keeps the M - N best of every M consecutive weights of a row: True where a weight stays.

    weight (out, in); input_norm (in,) is the L2 norm of each input feature over the calibration tokens.
    Score abs(W_ij) * norm2(X_j): WANDA, arXiv 2306.11695, equation 1. Of equal scores the lower column goes.
    """
    rows, columns = weight.shape
    if columns % m:
        raise PlanError(f"{n}:{m} needs an input width divisible by {m}; this layer has {columns}")
    score = (weight.float() * input_norm).abs_().view(-1, m)  # (out * groups, m)
    if m > _FEW:
        dropped = score.argsort(dim=-1, stable=True)[:, :n]  # (out * groups, n)
        return torch.ones_like(score, dtype=torch.bool).scatter_(-1, dropped, False).view(rows, columns)
    # m lanes of (out * groups,): whole lanes, stacked and unstacked, take a fraction of the time of short rows
    lanes = torch.stack(score.unbind(dim=1))
    threshold = nth_smallest(lanes, n)
    kept = [lane > threshold for lane in lanes]
    keep = torch.stack(kept, dim=1)
    # Where several weights have the threshold's score, too many went: give back all but the first columns.
    count = torch.zeros_like(threshold, dtype=torch.uint8)
    for lane in kept:
        count += lane
    if bool((count != m - n).any()):
        uneven = (count != m - n).nonzero().squeeze(-1)
        dropped = score[uneven].argsort(dim=-1, stable=True)[:, :n]
        keep[uneven] = torch.ones_like(keep[uneven]).scatter_(-1, dropped, False)
    return keep.view(rows, columns)


def nth_smallest(score: Tensor, n: int) -> Tensor:
    """The n-th smallest of each column of score (m, groups): (groups,).

    A few rounds of elementwise minimum and maximum over whole lanes instead of a sort of each short column
    (benchmarks/wanda.py). Counted from the nearer end.
    """
    lanes = list(score)  # m tensors of (groups,)
    if n <= len(lanes) // 2:
        rounds, first, second = n, torch.maximum, torch.minimum
    else:
        rounds, first, second = len(lanes) - n + 1, torch.minimum, torch.maximum
    for done in range(rounds):  # each round carries the least (or greatest) of what is left to the end
        for i in range(len(lanes) - 1 - done):
            carried = second(lanes[i], lanes[i + 1])
            if done + 1 < rounds:  # the last round's rest is of no use
                lanes[i] = first(lanes[i], lanes[i + 1])
            lanes[i + 1] = carried
    chosen: Tensor = lanes[len(lanes) - rounds]
    return chosen


def lost_share(weight: Tensor, input_norm: Tensor, mask: Tensor) -> float:
    """Share of a layer's total score that pruning removes; 0 for nothing of value lost."""
    score = weight.float().abs() * input_norm
    return float((score * ~mask).sum() / score.sum().clamp_min(1e-30))

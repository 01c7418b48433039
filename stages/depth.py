"""Stage 1: remove whole transformer blocks, the least important first.

Shortened LLaMA (Kim et al., arXiv 2402.02834) ranks a block by the perplexity of the model without it, by a
first-order Taylor estimate, or by weight magnitude; block influence is ShortGPT's (arXiv 2403.03853). The estimate is
the sum of abs(W dL/dW) as the paper's code has it, or signed as the thesis's equation 3.1 prints it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from edgepress.checkpoints.errors import NumericsError, PlanError
from edgepress.checkpoints.lazy import F, torch
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.shape import ModelShape, cut_config, with_blocks, with_firsts
from edgepress.checkpoints.tokens import TokenBatches
from edgepress.stages.gradients import advance, backwards, nll
from edgepress.stages.options import Depth as Options
from edgepress.stages.requirements import (
    BASE_BYTES,
    Cost,
    block_bytes,
    block_weights,
    forward_operations,
    head_weights,
    held_state_bytes,
    linked_bytes,
    require_dense,
    tokens,
    walk_bytes,
)

if TYPE_CHECKING:
    from torch import Tensor

    from edgepress.checkpoints.checkpoint import Checkpoint, Skeleton
    from edgepress.checkpoints.walk import States
    from edgepress.checkpoints.writer import CheckpointWriter

    Metric = Callable[[Skeleton, list[int], list[int], list[Tensor], Runtime], dict[int, float]]

VERSION = 1
_TAYLOR = ("taylor", "taylor-signed")


def plan(shape: ModelShape, options: Options) -> ModelShape:
    """The shape after removal (which blocks go makes no difference to it). Raises PlanError."""
    require_dense(shape, "depth")
    count = len(shape.blocks)
    if options.layers:
        if unknown := sorted({i for i in options.sequence if i >= count}):
            raise PlanError(f"--layers names block {unknown[0]}; this model has 0 to {count - 1}")
        return with_blocks(shape, options.sequence)
    free = count - options.protect_first - options.protect_last
    if options.remove > free:
        raise PlanError(
            f"--depth {options.remove}: of {count} blocks, the first {options.protect_first} and the last "
            f"{options.protect_last} are protected, so at most {max(free, 0)} can go "
            "(--protect-first and --protect-last change that)"
        )
    return with_blocks(shape, range(count - options.remove))


def cost(before: ModelShape, options: Options) -> Cost:
    """What the stage takes on a model of this shape.

    Which blocks a ranking removes is not known yet: the protected first ones keep their number and are linked.
    """
    count = len(before.blocks)
    candidates = count - options.protect_first - options.protect_last
    held = held_state_bytes(
        before, options, {"perplexity": candidates, **dict.fromkeys(_TAYLOR, count)}.get(options.metric, 2)
    )
    gradients = 2 * block_bytes(before) if options.metric in _TAYLOR else 0
    at_block, at_ends = walk_bytes(before, options)
    logits = options.length * before.vocabulary * 10
    if options.layers:
        linked = [new for new, old in enumerate(options.sequence) if new == old]
    else:
        linked = list(range(min(options.protect_first, count - options.remove)))
    return Cost(
        BASE_BYTES + held + max(at_block + gradients, at_ends + logits),
        linked_bytes(before, linked),
        operations=_operations(before, options, candidates),
        slowdown=2.1,
    )


def _operations(before: ModelShape, options: Options, candidates: int) -> float:
    forward, head = forward_operations(before, options), head_weights(before)
    if options.layers or options.metric in ("magnitude", "influence"):
        return forward
    if options.metric in _TAYLOR:
        return 3 * (forward + tokens(options) * head)
    # The walk runs only the blocks behind each candidate, on average half of them, and one head a candidate.
    count, candidates = len(before.blocks), max(1, candidates)
    blocks = block_weights(before) * (count + candidates * count / 2)
    once = tokens(options) * (blocks + head * (candidates + 1))
    return float(once * (options.remove if options.rerank else 1))


def remarks(shape: ModelShape, options: Options) -> Iterator[str]:
    """Where blocks run several times, what that means for those who read sizes."""
    after = plan(shape, options)
    if (again := len(after.blocks) - len(after.own_blocks)) and options.layers:
        yield (
            f"depth: {again} of {len(after.blocks)} blocks have the weights of one before them; they count once, in "
            "parameters, packed image and on a chip, and lie in the checkpoint's files under each name"
        )


def run(
    source: Checkpoint, target: CheckpointWriter, calibration: TokenBatches, options: Options, runtime: Runtime
) -> dict[str, Any]:
    count = len(source.shape.blocks)
    if options.layers:
        kept, facts = options.sequence, {"layers": options.layers}
    else:
        if not target.work.entries:
            target.work.append({"chosen": choose(source, calibration, options, runtime)})
        facts = target.work.entries[0]["chosen"] | {"metric": options.metric}
        kept = [i for i in range(count) if i not in facts["removed"]]

    runtime.progress.start("writing blocks", len(kept))
    for new, old in enumerate(kept):
        target.copy_block(new, source, old)
        runtime.progress.step(block=f"{new + 1}/{len(kept)}")
    target.copy_outer(source)
    # A family may derive a per-block list from a pattern; what it derived for the whole model is what is cut.
    resolved = source.hf_config().to_dict()
    derived = {key: value for key, value in resolved.items() if isinstance(value, list) and len(value) == count}
    config = cut_config(dict(source.config) | derived, kept, count)
    target.finish(with_firsts(config, [source.shape.firsts[i] for i in kept]), source)
    return {**facts, "kept_blocks": kept}


def choose(source: Checkpoint, calibration: TokenBatches, options: Options, runtime: Runtime) -> dict[str, Any]:
    """Which blocks to remove: {"removed": in order of removal, "ranking": one {block: score} a round}.

    The lower a score, the less the block matters; ties fall to the lower block.
    """
    from edgepress.checkpoints.checkpoint import Skeleton

    skeleton = Skeleton(source, runtime.device, runtime.dtype)
    count = len(skeleton.blocks)
    free = range(options.protect_first, count - options.protect_last)
    order = list(range(count))
    chunks = calibration.chunks(runtime.chunk_tokens)
    rounds, removed = [], []
    for _ in range(options.remove if options.rerank else 1):
        candidates = [i for i in order if i in free]
        scores = METRICS[options.metric](skeleton, order, candidates, chunks, runtime)
        if not all(math.isfinite(score) for score in scores.values()):
            bad = next(i for i, score in scores.items() if not math.isfinite(score))
            raise NumericsError(f"ranking by {options.metric}: the score of block {bad} is not finite")
        rounds.append({str(i): scores[i] for i in candidates})
        ranked = sorted(candidates, key=lambda i: (scores[i], i))
        gone = ranked[:1] if options.rerank else ranked[: options.remove]
        removed += gone
        order = [i for i in order if i not in gone]
    return {"removed": removed, "ranking": rounds}


# --- metrics: block -> importance, lower goes first -----------------------------------------------------------------


def perplexity(
    skeleton: Skeleton, order: list[int], candidates: list[int], chunks: list[Tensor], runtime: Runtime
) -> dict[int, float]:
    """Perplexity of the model without each candidate, in one pass over the blocks."""
    return {j: math.exp(x) for j, x in _losses(skeleton, order, candidates, chunks, runtime).items() if j is not None}


def losses_without(
    source: Checkpoint, calibration: TokenBatches, blocks: Sequence[int], runtime: Runtime
) -> dict[int, float]:
    """Nats a token that the windows' loss rises by without each of these blocks, alone."""
    from edgepress.checkpoints.checkpoint import Skeleton

    skeleton = Skeleton(source, runtime.device, runtime.dtype)
    order, chunks = list(range(len(skeleton.blocks))), calibration.chunks(runtime.chunk_tokens)
    losses = _losses(skeleton, order, list(blocks), chunks, runtime, also_intact=True)
    whole = losses.pop(None)
    return {j: x - whole for j, x in losses.items() if j is not None}


def _losses(
    skeleton: Skeleton,
    order: list[int],
    candidates: list[int],
    chunks: list[Tensor],
    runtime: Runtime,
    also_intact: bool = False,
) -> dict[int | None, float]:
    """Nats a token of the model without each candidate; None: of the model as it is.

    At block i there is one hidden state for the intact model and one for every candidate j < i already
    skipped, so each block is loaded once and a candidate costs only the blocks behind it.
    """
    from edgepress.checkpoints.walk import Scratch

    shapes = [(*ids.shape, skeleton.checkpoint.shape.hidden_size) for ids in chunks]
    with Scratch(runtime.spill_bytes) as scratch:
        intact = scratch.states(shapes, runtime.dtype)
        for number, states in enumerate(skeleton.embed(chunks)):
            intact.write(number, states)
        without: dict[int | None, States] = {}
        runtime.progress.start("ranking blocks", len(order))
        for i in order:
            with skeleton.block(i) as block:
                for skipped in without.values():
                    advance(skeleton, block, i, skipped)
                if i in candidates:
                    without[i] = scratch.states(shapes, runtime.dtype, like=intact)
                advance(skeleton, block, i, intact)
            runtime.progress.step(block=i)
        ended = without | ({None: intact} if also_intact else {})
        with skeleton.head() as head, torch.no_grad():
            return {j: _mean_loss(head, skipped.chunks, chunks) for j, skipped in ended.items()}


def taylor(
    skeleton: Skeleton, order: list[int], candidates: list[int], chunks: list[Tensor], runtime: Runtime
) -> dict[int, float]:
    """Sum of abs(W * dL/dW) over a block's linear layers."""
    return _by_gradient(skeleton, order, candidates, chunks, runtime, lambda x: x.abs())


def taylor_signed(
    skeleton: Skeleton, order: list[int], candidates: list[int], chunks: list[Tensor], runtime: Runtime
) -> dict[int, float]:
    """Sum of -W * dL/dW over a block's linear layers: how the loss changes without them, to first order.

    Equation 3.1 of the pruning thesis, L(W = 0) ~ L(W) + dL/dW (-W). Weights that help and weights that hurt cancel
    out, and a block whose absence should lower the loss goes first.
    """
    return _by_gradient(skeleton, order, candidates, chunks, runtime, lambda x: -x)


def _by_gradient(
    skeleton: Skeleton,
    order: list[int],
    candidates: list[int],
    chunks: list[Tensor],
    runtime: Runtime,
    of: Callable[[Tensor], Tensor],
) -> dict[int, float]:
    """Sum of of(W * dL/dW), float32, over a block's linear layers."""
    runtime.progress.start("ranking blocks", len(order))
    scores = {}
    for i, linears in backwards(skeleton, order, chunks, runtime):
        scores[i] = sum(_weight_times_gradient(linear.weight, of) for linear in linears.values())
        runtime.progress.step(block=i)
    return {i: scores[i] for i in candidates}


def magnitude(
    skeleton: Skeleton, order: list[int], candidates: list[int], chunks: list[Tensor], runtime: Runtime
) -> dict[int, float]:
    """Sum of abs(W) over a block's linear layers."""
    runtime.progress.start("ranking blocks", len(candidates))
    scores = {}
    for i in candidates:
        weights = skeleton.checkpoint.block(i)
        scores[i] = sum(float(weights[f"{name}.weight"].float().abs().sum()) for name in skeleton.linears(i))
        runtime.progress.step(block=i)
    return scores


def influence(
    skeleton: Skeleton, order: list[int], candidates: list[int], chunks: list[Tensor], runtime: Runtime
) -> dict[int, float]:
    """1 - cosine between a block's input and output, the mean over tokens."""
    states = list(skeleton.embed(chunks))
    scores = {}
    runtime.progress.start("ranking blocks", len(order))
    for i in order:
        with skeleton.block(i) as block:
            after = [skeleton.run(block, i, s) for s in states]
        cosine = [F.cosine_similarity(x.float(), y.float(), dim=-1) for x, y in zip(states, after, strict=True)]
        scores[i] = 1 - float(torch.cat([c.flatten() for c in cosine]).mean())
        states = after
        runtime.progress.step(block=i)
    return {i: scores[i] for i in candidates}


METRICS: dict[str, Metric] = {
    "perplexity": perplexity,
    "taylor": taylor,
    "taylor-signed": taylor_signed,
    "magnitude": magnitude,
    "influence": influence,
}


def _weight_times_gradient(weight: Tensor, of: Callable[[Tensor], Tensor]) -> float:
    assert weight.grad is not None
    return float(of(weight.detach().float() * weight.grad.float()).sum())


def _mean_loss(head: Callable[[Tensor], Tensor], states: Sequence[Tensor], chunks: list[Tensor]) -> float:
    # One sequence at a time: over 49,152 words, the logits of 128 tokens are 25 MB in float32.
    pairs = zip(states, chunks, strict=True)
    rows = ((row, t) for chunk, ids in pairs for row, t in zip(torch.split(chunk, 1), torch.split(ids, 1), strict=True))
    total = sum(float(nll(head(row), t)) for row, t in rows)
    loss = total / sum(ids.shape[0] * (ids.shape[1] - 1) for ids in chunks)
    if not loss < math.log(sys.float_info.max):
        raise NumericsError(f"depth: the loss of the calibration windows is {loss:.4g} nats a token, not finite")
    return loss

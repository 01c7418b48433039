"""Stage 2: zero N of every M weights of a row by WANDA, SparseGPT, magnitude or in the gates alone (`--prune`).

Which those are is the method's to say (`--prune`): WANDA (Sun et al., arXiv 2306.11695) unless another of
stages/pruning is asked for. The statistics of a block are taken from the already pruned blocks before it, so later
blocks see the inputs they will get.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgepress.checkpoints.errors import NumericsError, PlanError
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.shape import (
    Capped,
    LinearShape,
    ModelShape,
    Part,
    Pattern,
    Sparsity,
    Within,
    parse_amount,
    with_pattern,
)
from edgepress.checkpoints.tokens import TokenBatches
from edgepress.stages.options import Wanda as Options
from edgepress.stages.pruning import GRADIENTS, NOTHING, fisher, method
from edgepress.stages.requirements import (
    Cost,
    backward_cost,
    block_bytes,
    linears,
    linked_bytes,
    require_dense,
    walk_cost,
)

if TYPE_CHECKING:
    from edgepress.checkpoints.checkpoint import Checkpoint
    from edgepress.checkpoints.walk import BlockVisit
    from edgepress.checkpoints.writer import CheckpointWriter

VERSION = 2


def plan(shape: ModelShape, options: Options) -> ModelShape:
    """The shape with the pattern on every linear layer that the method prunes.

    Raises PlanError naming each layer whose input width M does not divide, and for what cannot be pruned.
    """
    amount = parse_amount(options.pattern)
    pattern = method(options.method).sparsity(amount)
    layers = {x.name: x for block in shape.blocks for x in block.linears if pattern.covers(x.name)}
    if isinstance(pattern, Within):
        _require_one_pattern(shape, pattern, options, list(layers))
    nm = amount.whole if isinstance(amount, Part) else amount
    unfit = [x for x in layers.values() if isinstance(nm, Pattern) and x.in_features % nm.of]
    if unfit and isinstance(nm, Pattern):
        named = ", ".join(f"{x.name} ({x.in_features})" for x in unfit)
        raise PlanError(f"--wanda {nm} needs input widths divisible by {nm.of}; these are not: {named}")
    if idle := [x for x in layers.values() if not _groups(pattern, x).removed]:
        named = ", ".join(f"{x.name} ({x.out_features} x {x.in_features})" for x in idle)
        raise PlanError(f"--wanda {amount} is less than one weight and removes nothing in {named}; give a larger one")
    require_dense(shape, "wanda")
    return with_pattern(shape, pattern)


def cost(before: ModelShape, options: Options) -> Cost:
    """What the stage takes on a model of this shape."""
    needs, linked = method(options.method).NEEDS, linked_bytes(before)
    if needs != GRADIENTS:
        return walk_cost(before, options, needs, slowdown=3.9, linked=linked)
    # Squares of gradients in 32 bits among them.
    walk = backward_cost(before, options, linked, 5 * block_bytes(before))
    return replace(walk, scratch_bytes=walk.scratch_bytes + sum(x.weights for x in linears(before)) // 8)  # the masks


def remarks(shape: ModelShape, options: Options) -> list[str]:
    """Which layers stay dense, where the method does not prune them all."""
    pattern = method(options.method).sparsity(parse_amount(options.pattern))
    dense = dict.fromkeys(x.name for block in shape.blocks for x in block.linears if not pattern.covers(x.name))
    return [f"wanda: {options.method} leaves {', '.join(dense)} dense; the pattern is {pattern}"] if dense else []


def _require_one_pattern(shape: ModelShape, pattern: Within, options: Options, layers: list[str]) -> None:
    if not layers:
        there = ", ".join(dict.fromkeys(x.name for block in shape.blocks for x in block.linears))
        raise PlanError(
            f"--prune {options.method} prunes {pattern.layer}, which this model has not; it has {there}. "
            "--prune magnitude prunes them all"
        )
    already = shape.pattern
    if already is not None and not (isinstance(already, Within) and already.layer == pattern.layer):
        raise PlanError(
            f"--prune {options.method} on a model pruned at {already} already would leave two patterns, and a "
            "manifest states one; give the model from before, or --prune magnitude, which prunes every layer"
        )


def _groups(pattern: Sparsity, linear: LinearShape) -> Pattern:
    return pattern.on(linear.in_features, linear.out_features)


def run(
    source: Checkpoint, target: CheckpointWriter, calibration: TokenBatches, options: Options, runtime: Runtime
) -> dict[str, Any]:
    from edgepress.checkpoints.walk import Walk

    chosen, after = method(options.method), plan(source.shape, options)
    # Weights alone need no hidden states: the walk then carries none, and no block is run.
    chunks = calibration.chunks(runtime.chunk_tokens) if chosen.NEEDS not in (NOTHING, GRADIENTS) else []
    groups_of = [{x.name: _groups(x.pattern, x) for x in b.linears if x.pattern is not None} for b in after.blocks]
    if chosen.NEEDS == GRADIENTS:
        fisher.choose(source, calibration, groups_of, runtime, target.work.folder)
    walk = Walk(source, chunks, runtime, target.work, task=options.method)
    for block in walk:
        if (first := after.firsts[block.index]) < block.index:  # one mask for what is one block
            block.take(target.repeat_block(block.index, first))
            block.done(walk.facts[first])
            continue
        groups = groups_of[block.index]
        over = {name: _over(block, name, nm) for name, nm in groups.items()}
        facts = chosen.prune(block, groups)
        if broken := [name for name, nm in groups.items() if _over(block, name, nm) > over[name]]:
            raise NumericsError(
                f"block {block.index}: {options.method} took more than {options.pattern} allows in {', '.join(broken)}"
            )
        target.write_block(block.index, block.weights())
        block.done(facts)
    target.copy_outer(source)
    target.finish(source.config, source)
    return {"method": options.method, "pattern": str(after.pattern), "blocks": walk.facts}


def _over(block: BlockVisit, name: str, nm: Pattern) -> int:
    """Zeros beyond the cap of their groups. A model may come with some; a method must add none."""
    if not isinstance(nm, Capped):
        return 0
    from edgepress.checkpoints.masks import group_zeros

    return int((group_zeros(block.linears[name].weight, nm.within.of) - nm.within.removed).clamp_min(0).sum())

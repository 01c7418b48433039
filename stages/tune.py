"""After quantising: train scales, minima, real zero points and norms end to end, codes and mask fixed (`--tune`).

EfficientQAT (Chen et al., arXiv 2407.11062), section 3.3, with the uncompressed model as streamed teacher: the loss is
the divergence of the logits. GPTQ and `--quant-effort high` answer for a layer or a block; here all answer for
the model's output. The file's form and bytes stay. stages/recovery/scales.py has the layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.forms import Codebook
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.shape import ModelShape
from edgepress.checkpoints.tokens import TokenBatches
from edgepress.stages.options import Tune as Options
from edgepress.stages.recovery.shapes import teacher_disk_bytes, teacher_kind
from edgepress.stages.requirements import (
    BASE_BYTES,
    TRAINER_BYTES,
    Cost,
    block_weights,
    head_weights,
    linears,
    linked_bytes,
    outer_bytes,
    training_operations,
)

if TYPE_CHECKING:
    from edgepress.checkpoints.checkpoint import Checkpoint
    from edgepress.checkpoints.writer import CheckpointWriter

VERSION = 1


def plan(shape: ModelShape, options: Options) -> ModelShape:
    """The same shape: no byte is added. Raises PlanError where there is nothing to train."""
    if shape.grid is None:
        raise PlanError(
            "--tune trains the scales of quantised weights, and no quantiser comes before it. Put gptq before it "
            "(--quant gptq4), or leave --tune out"
        )
    if any(x.adapted for x in linears(shape)):
        raise PlanError(
            "--tune: an adapter lies beside these weights, which was made for the scales as they are; put tune right "
            "after gptq, before lora and eora"
        )
    if len(shape.own_blocks) < len(shape.blocks):
        raise PlanError(
            "--tune: a block runs several times here, and its scales would be trained as if each run had its own; "
            "leave --tune out, or the repeats out of --layers"
        )
    books = sorted({x.grid.describe() for x in linears(shape) if isinstance(x.grid, Codebook)})
    if books:
        raise PlanError(
            f"--tune trains scales of integer grids, and {books[0]} has fixed levels under scales that are codes or "
            "blocks across rows; quantise with gptq4, gptq4-s or q4_k, or leave --tune out"
        )
    return shape


def trainable_parameters(shape: ModelShape) -> int:
    """Scales, minima, zero points and the norms' numbers."""
    count = sum(t.elements for block in shape.blocks for t in block.others if _is_norm(t.name))
    count += sum(t.elements for t in shape.outer if _is_norm(t.name))
    for x in linears(shape):
        if x.grid is not None:
            trained = ("scales", "d", "e", "minima") + (() if x.grid.exact_zero and x.grid.integer else ("zeros",))
            sides = x.grid.sides(x.out_features, x.in_features)
            count += sum(rows * columns for name, ((rows, columns), _) in sides.items() if name in trained)
    return count


def _is_norm(name: str) -> bool:
    return "norm" in name.lower() and name.endswith(".weight")


def cost(before: ModelShape, options: Options) -> Cost:
    """What the stage takes on a model of this shape: codes in bytes, the dense weights of a step, and its tokens."""
    count, outer = len(before.blocks), outer_bytes(before)
    weights, widest = sum(x.weights for x in linears(before)), max(x.weights for x in linears(before))
    held = 2 * outer + (1 + 2) * weights + (before.file_bytes - outer) + 14 * widest
    kind = teacher_kind(before, options)
    taught = {"none": 0, "held": outer + 2 * weights, "streamed": outer}[kind]
    inner = max(x.out_features for x in linears(before))
    a_token = count * (14 * before.hidden_size + 4 * inner) * 2 + 3 * before.vocabulary * 4
    own = 4 * 4 * trainable_parameters(before)
    operations = training_operations(options, count * block_weights(before) + head_weights(before))
    return Cost(
        BASE_BYTES + TRAINER_BYTES + held + taught + options.micro_batch * options.length * a_token + own,
        linked_bytes(before, beside=[before.edge_tensors()]),
        teacher_disk_bytes(before, options) if kind == "streamed" else 0,
        operations,
        slowdown=2.9,
    )


def remarks(shape: ModelShape, options: Options) -> Iterator[str]:
    """What a person may not expect of these options."""
    windows, seen = options.samples - options.held_out, options.steps * options.batch
    if seen > 2 * windows:
        yield (
            f"tune: {options.steps} steps of {options.batch} go {seen / windows:.1f} times over the {windows} training "
            "windows; more come with --tune-samples"
        )


def run(
    source: Checkpoint, target: CheckpointWriter, calibration: TokenBatches, options: Options, runtime: Runtime
) -> dict[str, Any]:
    from edgepress.stages.recovery.scales import Tunable
    from edgepress.stages.training import own_random_state, require_a_batch, teacher, train

    require_a_batch(calibration.name, len(calibration.ids), options)
    seed = int(runtime.generator("tune").initial_seed() % 2**31)
    with (
        own_random_state(seed),
        teacher(source, calibration.ids, options, runtime, target.work) as taught,
        own_random_state(seed),  # again: whether the teacher had to compute anything must make no difference
    ):
        model = Tunable(source, runtime)
        training = train(model, calibration, options, runtime, target.work, taught)

    training.curve.write(target.folder, options)
    for line in (*training.curve.lines(), f"  {training.summary()}"):
        runtime.progress.say(line)
    for index in range(len(source.shape.blocks)):
        target.write_block(index, model.block(index))
    target.write_outer(model.outer())
    target.copy_edge(source)
    target.finish(source.config, source)
    trained = sum(p.numel() for p in model.parameters())
    runtime.progress.say(f"  tune: {trained:,} scales, minima and norms trained; no byte added")
    return {"trainable_parameters": trained, **training.facts()}

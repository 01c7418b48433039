"""The layers that a recovery method adapts and the bytes it adds, from shapes alone."""

from __future__ import annotations

from dataclasses import replace

from edgepress.checkpoints.errors import PlanError, near
from edgepress.checkpoints.shape import LinearShape, ModelShape
from edgepress.stages.options import Lora, Training


def target_names(shape: ModelShape, options: Lora) -> list[str]:
    """Names (without path) of the linear layers to adapt. Raises PlanError naming those that exist."""
    present = {x.name.rpartition(".")[2] for x in shape.blocks[0].linears}
    if options.targets == "all":
        return sorted(present)
    wanted = [name.strip() for name in options.targets.split(",")]
    if set(wanted) == {"q_proj", "k_proj", "v_proj", "o_proj"} and "qkv_proj" in present:
        wanted = ["qkv_proj", "o_proj"]  # as the thesis adapts, on families that fuse q, k and v
    if unknown := [name for name in wanted if name not in present]:
        named = ",".join(f"{name}{near(name, sorted(present))}" for name in unknown)
        raise PlanError(f"--lora-targets {named}: this model's blocks have {', '.join(sorted(present))}")
    return wanted


def with_adapters(shape: ModelShape, options: Lora) -> ModelShape:
    """The shape with the method's adapter beside every layer that it adapts. Raises PlanError as target_names."""
    names, adapter = set(target_names(shape, options)), options.recovery.adapter

    def on(x: LinearShape) -> LinearShape:
        return adapter.beside(x, options) if x.name.rpartition(".")[2] in names else x

    return replace(shape, blocks=tuple(replace(b, linears=tuple(map(on, b.linears))) for b in shape.blocks))


def adapters(shape: ModelShape, options: Lora) -> list[LinearShape]:
    """The adapted layers of all blocks, once where one runs again, with what lies beside them while it is trained."""
    return [x for block in with_adapters(shape, options).own_blocks for x in block.linears if x.adapted]


def training_bytes(shape: ModelShape, options: Lora) -> int:
    """Memory that training takes for what it trains: each number in 32 bits, its gradient, Adam's two moments; and what
    a step keeps for each weight of the layers that it computes with anew, of one block if activations are not kept."""
    recovery, found = options.recovery, adapters(shape, options)
    if recovery.whole:
        return 4 * 4 * shape.parameters_total
    kept = recovery.adapter.kept_bytes(shape.pattern is not None and not recovery.quantised)
    weights = sum(x.weights for x in found) // (len(shape.blocks) if options.checkpointing else 1)
    return 4 * 4 * sum(x.adapter_parameters for x in found) + kept * weights


def trainable_parameters(shape: ModelShape, options: Lora) -> int:
    """Numbers that the method trains on a model of this shape."""
    if options.recovery.whole:
        return shape.parameters_total
    return sum(x.adapter_parameters for x in adapters(shape, options))


# --- the teacher of --distill -----------------------------------------------------------------------------------------


# Beyond this much disk, `auto` holds the teacher instead. A fixed number: what is free on a machine must not decide
# which bytes come out.
_AUTO_LIMIT_BYTES = 16 * 2**30


def teacher_kind(shape: ModelShape, options: Training) -> str:
    """How the teacher is kept: none, held or streamed."""
    if options.distill == 0:
        return "none"
    if options.teacher != "auto":
        return options.teacher
    return "streamed" if teacher_disk_bytes(shape, options) <= _AUTO_LIMIT_BYTES else "held"


def teacher_disk_bytes(shape: ModelShape, options: Training) -> int:
    """Most disk the streamed teacher takes, in 16 bit: hidden states before and after a block, and those to compare."""
    windows = min(options.samples, options.total_steps * options.batch + options.held_out)
    copies = 2 + (len(shape.blocks) if options.distill_hidden else 0)
    return copies * windows * options.length * shape.hidden_size * 2

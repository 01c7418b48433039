"""What a stage requires: weights of the right kind, memory, disk, and arithmetic."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.forms import TensorShape
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.shape import LinearShape, ModelShape, safetensors_bytes
from edgepress.stages.options import Depth, Eora, Gptq, Lora, Training, Wanda
from edgepress.stages.pruning import HESSIANS, NOTHING

# --- cost -------------------------------------------------------------------------------------------------------------
# What a stage takes while it runs: memory, disk and arithmetic, counted from shapes alone.
#
# Every stage's module states its own with a `cost` beside its `plan`; here is what several of them count alike.


# Resident size of Python with torch, transformers and a model's code, measured on Linux with torch 2.14 and
# transformers 5.23 (benchmarks/peak_memory.py).
BASE_BYTES = 850 * 2**20
TRAINER_BYTES = 220 * 2**20  # that peft, GPTQModel and the Trainer add, measured alike
LOGITS_AT_ONCE = 2**23  # that stages/token_loss.py has in 32 bits
_FIXED_SECONDS = 1.0  # what every stage run takes besides its arithmetic

Calibrated = Depth | Wanda | Lora | Gptq | Eora  # options with samples and length


@dataclass(frozen=True)
class Cost:
    """The forecast of one stage run."""

    peak_memory_bytes: int  # of the process, resident
    linked_bytes: int  # of its source's safetensors files, those that the stage hard-links instead of writing its own
    scratch_bytes: int = 0  # of disk while the stage runs, given back when it is finished
    operations: float = 0.0  # multiply-adds; none where it only copies
    # Seconds measured over seconds that the arithmetic alone would take, in the README's demo (SmolLM2-135M, bfloat16,
    # two cores that multiply 4e11 times a second).
    slowdown: float = 1.0

    def seconds(self, speed: float) -> float:
        """Of the stage's own work, without measuring and writing. speed: multiply-adds per second of this machine."""
        return self.operations / speed * self.slowdown + _FIXED_SECONDS


def walk_cost(
    before: ModelShape, options: Wanda | Gptq | Eora, needs: str, slowdown: float, linked: int, beside: int = 0
) -> Cost:
    """Of a stage that walks through the blocks. needs: as a method's NEEDS; beside: bytes it holds beside a block."""
    at_block, at_ends = walk_bytes(before, options)
    if needs == HESSIANS:
        at_block += hessian_bytes(before)
    scratch = 0 if needs == NOTHING else state_bytes(before, options)
    if needs == NOTHING:
        operations = float(len(before.blocks) * block_weights(before))
    else:  # the block before and after it is changed; the Hessian, its factor, and the columns one after the other
        layers = linears(before) if needs == HESSIANS else []
        solver = (x.in_features**2 * (tokens(options) + x.out_features + 2 * x.in_features) for x in layers)
        operations = 2 * forward_operations(before, options) + sum(solver)
    return Cost(BASE_BYTES + max(at_block + beside, at_ends), linked, scratch, operations, slowdown)


def backward_cost(before: ModelShape, options: Depth | Wanda | Gptq, linked: int, beside: int = 0) -> Cost:
    """Of a walk back through the blocks with the loss's gradient, the states before every block held at once.

    beside: bytes of gradients, or what is made of them, that it holds beside a block.
    """
    count = len(before.blocks)
    at_block, at_ends = walk_bytes(before, options)
    states = held_state_bytes(before, options, count)
    peak = states + max(at_block + beside, at_ends + options.length * before.vocabulary * 10)
    operations = 3 * (forward_operations(before, options) + tokens(options) * head_weights(before))
    return Cost(BASE_BYTES + peak, linked, state_bytes(before, options, count), operations, slowdown=2.1)


def linked_bytes(
    shape: ModelShape, blocks: Iterable[int] = (), beside: Iterable[list[TensorShape]] | None = None
) -> int:
    """Bytes of the files of these blocks and beside them; by default those of the outer part and its packed copy."""
    shards = shape.shard_bytes()
    files = (list(shape.outer), shape.edge_tensors()) if beside is None else beside
    return sum(shards[i] for i in blocks) + sum(safetensors_bytes(tensors) for tensors in files if tensors)


# --- memory ----------------------------------------------------------------------------------------------------------


def walk_bytes(shape: ModelShape, options: Calibrated) -> tuple[int, int]:
    """Memory of a walk beside BASE_BYTES: while a block is on, and while the outer part is.

    A block is mapped from its file, copied to be edited, and has its activations.
    """
    states = held_state_bytes(shape, options)
    widest = max(max(x.in_features, x.out_features) for x in linears(shape))
    chunk = min(tokens(options), Runtime.chunk_tokens)
    return 3 * block_bytes(shape) + states + 12 * chunk * widest, outer_bytes(shape) + states


def hessian_bytes(shape: ModelShape) -> int:
    """Hessians of a block's inputs, their factor in float64, and a layer's weights in several float32 copies."""
    widths = {x.in_features for x in linears(shape)}
    biggest = max(x.weights for x in linears(shape))
    return sum(2 * n * n * 4 for n in widths) + 3 * max(widths) ** 2 * 8 + 8 * biggest * 4


def block_bytes(shape: ModelShape) -> int:
    """Of the largest block in 16 bits, dense and without adapters."""

    def dense(x: LinearShape) -> LinearShape:
        return replace(x, grid=None, adapter_rank=0, adapter_vector="")

    blocks = (replace(b, linears=tuple(map(dense, b.linears))) for b in shape.blocks)
    return 2 * max(sum(t.elements for t in b.stored()) for b in blocks)


def outer_bytes(shape: ModelShape) -> int:
    """Of embedding, last norm and head."""
    return sum(t.nbytes for t in shape.outer)


def state_bytes(shape: ModelShape, options: Calibrated, copies: int = 2) -> int:
    """Of the calibration tokens' hidden states in 16 bits; two copies are those before and after a block."""
    return copies * tokens(options) * shape.hidden_size * 2


def held_state_bytes(shape: ModelShape, options: Calibrated, copies: int = 2) -> int:
    """What of them is in memory: beyond a limit they lie in a file."""
    return min(state_bytes(shape, options, copies), Runtime.spill_bytes)


# --- arithmetic ------------------------------------------------------------------------------------------------------


def forward_operations(shape: ModelShape, options: Calibrated) -> float:
    """Of the calibration tokens going through all blocks once."""
    return float(tokens(options) * len(shape.blocks) * block_weights(shape))


def training_operations(options: Training, model: int) -> float:
    """Of a training and its held-out checks, teacher included. model: multiply-adds of one token's forward pass."""
    trained = options.total_steps * options.batch * options.length
    passes = 3 + options.checkpointing + bool(options.distill)
    looks = (options.total_steps // options.save_steps + 1) * options.held_out * options.length
    return float((passes * trained + looks) * model)


def tokens(options: Calibrated) -> int:
    return options.samples * options.length


def block_weights(shape: ModelShape) -> int:
    """Of the linear layers of the largest block."""
    return max(sum(x.weights for x in b.linears) for b in shape.blocks)


def head_weights(shape: ModelShape) -> int:
    return shape.vocabulary * shape.hidden_size


def linears(shape: ModelShape) -> list[LinearShape]:
    return [x for b in shape.blocks for x in b.linears]


# --- dense or quantised -----------------------------------------------------------------------------------------------
# What a stage says to a checkpoint that it cannot work on.


def require_dense(shape: ModelShape, stage: str, beside: str = "") -> None:
    """Raise PlanError where weights are quantised, or an adapter lies beside them, naming what to give instead.

    beside: the option that lets the stage work beside quantised weights, where there is one.
    """
    adapted = [x for block in shape.blocks for x in block.linears if x.adapted]
    if shape.grid is not None:
        also = f". {beside} trains beside quantised weights and merges nothing" if beside and not adapted else ""
        raise PlanError(
            f"{stage} needs dense weights; this checkpoint is already quantised ({shape.grid.describe()}). "
            + ("Give" if stage == "gptq" else f"Put {stage} before gptq, or give")
            + " the checkpoint from before quantisation"
            + also
        )
    if adapted:
        rank = max(x.adapter_rank for x in adapted)
        raise PlanError(
            f"{stage} needs dense weights; this checkpoint carries an adapter{f' of rank {rank}' if rank else ''} "
            "beside its weights. Merge the adapter, or give the checkpoint without it"
        )


def require_quantised(shape: ModelShape, what: str, instead: str) -> None:
    """Raise PlanError where no weight is quantised, or an adapter lies beside them already.

    what: the option that asks for it; instead: the one for dense weights.
    """
    if shape.grid is None:
        raise PlanError(
            f"{what} trains on quantised weights, and no quantiser comes before lora. Put gptq before it "
            f"(--quant gptq4), or merge into dense weights with {instead}"
        )
    if any(x.adapted for block in shape.blocks for x in block.linears):
        raise PlanError(
            f"{what}: an adapter lies beside these weights already, and a layer has room for one; give the quantised "
            "checkpoint without it, or leave eora out: --eora 0"
        )

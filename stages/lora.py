"""Stage 3: recover quality by training LoRA, DoRA, IA3, QLoRA, LoftQ or all weights (`--recover`), then merge it.

LoRA (Hu et al., arXiv 2106.09685) and the other methods of stages/recovery, through peft and transformers' Trainer.
On a layer with an N:M mask the adapter is trained through the mask, W_eff = (W + s B A) * mask, so what was trained
is what is merged and the zeros stay zeros. On quantised weights it is not merged: it lies beside them in PEFT's format.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from edgepress.checkpoints.config import described
from edgepress.checkpoints.disturb import FUSED, KINDS, Disturbance, find_gate
from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.quiet import quiet_import
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.shape import LinearShape, ModelShape
from edgepress.checkpoints.tokens import TokenBatches
from edgepress.stages.options import Lora as Options
from edgepress.stages.recovery import full
from edgepress.stages.recovery.shapes import (
    adapters,
    target_names,
    teacher_disk_bytes,
    teacher_kind,
    training_bytes,
    with_adapters,
)
from edgepress.stages.requirements import (
    BASE_BYTES,
    LOGITS_AT_ONCE,
    TRAINER_BYTES,
    Cost,
    block_bytes,
    block_weights,
    head_weights,
    linears,
    linked_bytes,
    outer_bytes,
    require_dense,
    require_quantised,
    training_operations,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from edgepress.checkpoints.checkpoint import Checkpoint
    from edgepress.checkpoints.writer import CheckpointWriter
    from edgepress.stages.recovery import Start

VERSION = 1
_DORA_STEPS = 400  # multiply-adds in whose time one weight's direction, norm and gradient pass by


def plan(shape: ModelShape, options: Options) -> ModelShape:
    """The same shape where adapters are merged, and on quantised weights that with adapters beside them.

    Raises PlanError for unknown targets, and for weights that are not of the kind that the method works on.
    """
    recovery = options.recovery
    if options.distill_hidden:
        _require_comparable(shape, options)
    for index, block in enumerate(shape.blocks if options.noise else ()):
        _require_noise(find_gate(block, index), options, shape)
    if recovery.whole and len(shape.own_blocks) < len(shape.blocks):
        raise PlanError(
            "--recover full: a block runs several times here, and its weights are saved as if each run had its own; "
            "give --recover lora, whose adapter is one for all its runs"
        )
    if options.packed and not recovery.quantised:
        raise PlanError(f"--lora-packed keeps quantised weights packed; give --recover {recovery.on_quantised()}")
    if not recovery.quantised:
        require_dense(shape, "lora", beside=f"--recover {recovery.on_quantised()}")
        target_names(shape, options)
        if recovery.whole and options.targets != "all":
            raise PlanError(f"--recover full trains every parameter; leave out --lora-targets {options.targets}")
        return shape
    require_quantised(shape, f"--recover {recovery}", instead=f"--recover {recovery.on_dense()}")
    if recovery.begin is not None:
        least = min(min(x.out_features, x.in_features) for x in adapters(shape, options))
        if options.rank > least:
            raise PlanError(f"--lora-rank {options.rank}: the smallest layer to adapt has rank {least}")
    return with_adapters(shape, options)


def _require_comparable(shape: ModelShape, options: Options) -> None:
    """Raise PlanError where no teacher has hidden states, or not one for every run of a block."""
    asked = f"--distill-hidden {options.distill_hidden:g}"
    if options.distill == 0:
        raise PlanError(
            f"{asked} compares hidden states with the teacher's, and without --distill there is no teacher; give "
            "--distill 0.5 with it, or 1 for the teacher alone"
        )
    if len(shape.own_blocks) < len(shape.blocks):
        raise PlanError(
            f"{asked}: a block runs several times here, and the teacher has no hidden states for its other runs; leave "
            "it out, and --distill compares the logits alone"
        )


def _require_noise(gate: LinearShape, options: Options, shape: ModelShape) -> None:
    """Raise PlanError where the adapter of a gate and up-projection in one layer would not see the gate's noise."""
    name = gate.name.rpartition(".")[2]
    if name in FUSED and name in target_names(shape, options):
        raise PlanError(
            f"--train-noise: gate and up-projection are one layer here, {name}, and an adapter on it would not see the "
            "noise of the gate alone; leave it out of --lora-targets"
        )


def disturbances(options: Options) -> list[Disturbance]:
    """What the model is trained under, drawn from the Trainer's own random state."""
    asked = zip(KINDS, (options.noise, options.mask), strict=True)
    return [Disturbance(kind, strength, seed=None) for kind, strength in asked if strength]


def cost(before: ModelShape, options: Options) -> Cost:
    """What the stage takes on a model of this shape.

    A held teacher is a second model; a streamed one keeps its embedding, norm and head to make logits with.
    """
    count, outer = len(before.blocks), outer_bytes(before)
    dense, codes = outer + count * block_bytes(before), before.file_bytes - outer
    kind = teacher_kind(before, options)
    held = {"none": 0, "held": dense, "streamed": outer}[kind] + (outer + codes if options.packed else dense)
    if _requantises(options) and not options.packed:
        held += codes  # the new ones, until they are written
    # Embedding and head are mapped from their file while they are copied; a step has its activations instead.
    passing = max(outer, _step_bytes(before, options) + training_bytes(before, options))
    return Cost(
        BASE_BYTES + TRAINER_BYTES + held + passing,
        linked_bytes(before, range(count if options.recovery.quantised and not _requantises(options) else 0)),
        (teacher_disk_bytes(before, options) if kind == "streamed" else 0) + _saved_bytes(before, options),
        _operations(before, options),
        slowdown=2.9,
    )


def _step_bytes(before: ModelShape, options: Options) -> int:
    """What a micro-batch keeps for its gradient, and what is computed with in passing.

    In bytes a token of a block with attention and a gated MLP, as autograd's hooks for saved tensors count them on
    Llama: norms in 32 bits, queries to outputs and what the activation multiplies 16 d + 6 inner, and of a layer's
    adapter a copy of its input in 32 bits, another of what dropout leaves, and one number a rank. Where all
    weights are trained, autograd keeps the layers' inputs in 16 bits and those of the norms' products instead.
    """
    count, inner = len(before.blocks), max(x.out_features for x in linears(before))
    # The loss of 16-bit logits: they, their logarithms, and two gradients in 32 bits.
    logits, passing = 14 * before.vocabulary, 0
    block = 16 * before.hidden_size + 6 * inner
    if options.recovery.whole:
        block += 10 * before.hidden_size + 2 * inner
    else:
        copies = 1 + (options.dropout > 0)
        own = sum(4 * copies * x.in_features + 4 * x.adapter_rank for x in adapters(before, options))
        block += own // len(before.own_blocks)
    if options.lean_loss:
        logits, passing = 2 * before.vocabulary, 3 * 4 * LOGITS_AT_ONCE
    if options.packed:  # one layer: whole numbers, values and products in 32 bits, and what is computed with
        passing += 14 * max(x.weights for x in linears(before))
    # Without checkpointing the most is held when the loss is made, with it in the last block's own gradients.
    kept = count * 2 * before.hidden_size + 2 * block if options.checkpointing else count * block
    if options.distill_hidden:  # the teacher's states, and their differences in 32 bits for the gradient
        kept += count * (2 + 4) * before.hidden_size
    return options.micro_batch * options.length * (kept + logits) + passing


def _requantises(options: Options) -> bool:
    """Whether layers may get other codes than they came with."""
    return options.recovery.begin is not None and options.loftq_steps > 1


def _saved_bytes(before: ModelShape, options: Options) -> int:
    """Of saved steps with all weights, where they are trained: the best and two more, with Adam's two moments."""
    return 3 * 12 * before.parameters_total if options.recovery.whole else 0


def _operations(before: ModelShape, options: Options) -> float:
    """Of the model in training and held-out checks, and of what the method computes with whole matrices besides."""
    model = len(before.blocks) * block_weights(before) + head_weights(before)
    found, own = adapters(before, options), 0.0
    weights = sum(x.weights for x in found)
    if any(x.adapter_vector == "magnitude" for x in found):  # in each micro-batch
        batches = options.total_steps * (options.batch // options.micro_batch)
        own += float(batches * weights * (3 * options.rank + _DORA_STEPS))
    if options.recovery.begin is not None:  # eigenvectors of the smaller Gram matrix
        narrow = [min(x.in_features, x.out_features) for x in found]
        turn = float(sum(2 * x.weights * n + 9 * n**3 for x, n in zip(found, narrow, strict=True)))
        own += options.loftq_steps * turn
    return training_operations(options, model) + own


def remarks(shape: ModelShape, options: Options) -> Iterator[str]:
    """What a person may not expect of these options."""
    windows, seen = options.samples - options.held_out, options.total_steps * options.batch
    if options.steps and seen < windows:
        yield (
            f"lora: {options.total_steps} steps of {options.batch} see only {seen} of {windows} training windows; "
            "--lora-steps 0 goes through all of them"
        )
    if options.noise or options.mask:
        yield "lora: training and its held-out checks are disturbed; other measurements are not, see --task robustness"
    recovery = options.recovery
    if not recovery.adapter.RANKED:
        learns = "trains every parameter in 32 bits" if recovery.whole else "learns one factor a row or column"
        yield (f"lora: {recovery.adapter_name} {learns}; --lora-rank, --lora-alpha and --lora-dropout change nothing")
    if recovery.quantised:
        dense = "are dequantised a layer at a time" if options.packed else "are dense in memory (but see --lora-packed)"
        yield (
            f"lora: the weights stay packed on the disk and {dense} while the adapter is trained; it is not "
            "merged, and a runtime computes it beside them"
        )
        if _requantises(options):
            yield (
                f"lora: loftq quantises up to {options.loftq_steps - 1} times anew, to the nearest codes, and not as "
                "the quantiser did; --loftq-steps 1 keeps its codes"
            )
        if recovery.adapter_name != "lora":
            yield f"lora: peft computes {recovery.adapter_name} beside dequantised weights, not with GPTQ's kernels"
        if shape.pattern is not None and recovery.adapter.RANKED:
            yield f"lora: the {shape.pattern} zeros stay in the packed weights; the adapter beside them is dense"


def run(
    source: Checkpoint, target: CheckpointWriter, calibration: TokenBatches, options: Options, runtime: Runtime
) -> dict[str, Any]:
    from edgepress.stages.training import own_random_state, require_a_batch, teacher, train

    require_a_batch(calibration.name, len(calibration.ids), options)
    seed = int(runtime.generator("lora").initial_seed() % 2**31)
    with (
        own_random_state(seed),
        teacher(source, calibration.ids, options, runtime, target.work) as taught,
        own_random_state(seed),  # again: whether the teacher had to compute anything must make no difference
    ):
        model, layers, starts = adapted(source, options, runtime)
        plain = model if options.recovery.whole else model.get_base_model()
        with ExitStack() as disturbed:
            for disturbance in disturbances(options):
                disturbed.enter_context(disturbance.on_model(plain, source.shape))
            blocks = plain.get_submodule(source.shape.block_prefix)
            training = train(model, calibration, options, runtime, target.work, taught, blocks)

    training.curve.write(target.folder, options)
    for line in (*training.curve.lines(), f"  {training.summary()}"):
        runtime.progress.say(line)
    if options.recovery.whole:
        full.write(source, target, model)
    elif options.recovery.quantised:
        _write_beside(source, target, model, layers, starts, options)
    else:
        _write_merged(source, target, layers, options)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    added = sum(x.adapter_bytes for x in adapters(source.shape, options)) if options.recovery.quantised else 0
    where = f"{added:,} bytes beside the weights" if added else "merged"
    runtime.progress.say(f"  {options.method}: {trained:,} parameters trained, {where}")
    began = _began(starts)
    if began:
        turns = began["start_errors"]
        runtime.progress.say(
            f"  {options.method}: error of the start {turns[0]:.4f} -> {turns[-1]:.4f} of the weights' norm in "
            f"{len(turns)} turns; {began['requantised_layers']} of {len(starts)} layers have new codes"
        )
    counts = {"method": options.method, "trainable_parameters": trained, "added_bytes": added}
    return counts | began | training.facts()


def _began(starts: Mapping[str, Start]) -> dict[str, Any]:
    """norm(W - Q - s B A) / norm(W) over all layers after each turn, for the manifest; nothing where none began so."""
    if not starts:
        return {}
    whole = sum(start.whole for start in starts.values())
    turns = zip(*(start.errors for start in starts.values()), strict=True)
    return {
        "start_errors": [math.sqrt(sum(errors) / whole) for errors in turns],
        "requantised_layers": sum(bool(start.stored) for start in starts.values()),
    }


class Adapted(NamedTuple):
    """A model in memory with new adapters; its adapted layers, and of those that a setting began, how."""

    model: Any
    layers: dict[str, Any]
    starts: dict[str, Start]


def adapted(source: Checkpoint, options: Options, runtime: Runtime) -> Adapted:
    """The model with adapters that are ready to be trained, through its mask if it has one."""
    from edgepress.checkpoints.packed_linear import last_kept

    with quiet_import():  # peft asks GPTQModel, which greets
        from peft import get_peft_model

    recovery = options.recovery
    if recovery.whole:
        return Adapted(full.whole(source, runtime), {}, {})
    config = recovery.adapter.config(target_names(source.shape, options), options, recovery.arguments)
    base = source.model(runtime.device, runtime.dtype, packed=options.packed)
    _share_blocks(base, source.shape)
    with quiet_import(), last_kept():
        model = get_peft_model(base, config)
    layers = adapted_layers(model)
    starts = dict(_begun(source, layers, options, runtime)) if recovery.begin is not None else {}
    # Beside packed weights nothing can be left out of the adapter when it is computed, so nothing is in training.
    masked = source.shape.pattern is not None and not recovery.quantised
    for layer in layers.values():
        recovery.adapter.start(layer, layer.base_layer.weight != 0 if masked else None)
    return Adapted(model, layers, starts)


def _share_blocks(model: Any, shape: ModelShape) -> None:
    """Let a block that runs several times be one module, so that all its runs train one adapter."""
    blocks = model.get_submodule(shape.block_prefix)
    for index, first in enumerate(shape.firsts):
        if first < index:
            blocks[index] = blocks[first]
            model.config.use_cache = False  # its runs would take each other's keys and values for their own


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """peft's layers by the name that the wrapped linear has in the checkpoint."""
    with quiet_import():
        from peft.tuners.tuners_utils import BaseTunerLayer

    found = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            found[re.sub(r"^base_model\.model\.", "", name)] = module
    return found


def before_and_after(
    source: Checkpoint, layers: Mapping[str, nn.Module]
) -> Iterator[tuple[int, LinearShape, str, Tensor, Tensor]]:
    """Of each of these layers its block, shape and name, and the weights (out, in) that were quantised and are now."""
    from edgepress.checkpoints.scaling import rescaled, scaled_folders
    from edgepress.stages.reference import reference_weights

    dense, numbers = reference_weights(source, "parent")
    scaled = scaled_folders(source)
    for index, number in enumerate(numbers):
        wanted, present = rescaled(scaled, index, dense.block(number)), source.block(index)
        for x in source.shape.blocks[index].linears:
            if (name := f"{source.shape.block_prefix}.{index}.{x.name}") in layers:
                yield index, x, name, wanted[f"{x.name}.weight"], present[f"{x.name}.weight"]


def _begun(
    source: Checkpoint, layers: Mapping[str, Any], options: Options, runtime: Runtime
) -> Iterator[tuple[str, Start]]:
    """Fill every layer's A and B as the setting says, and put the codes that go with them under it."""
    from edgepress.checkpoints.packed_linear import PackedLinear
    from edgepress.stages.quantisers.rounding import rounded

    begin = options.recovery.begin
    assert begin is not None
    for index, x, name, wanted, present in before_and_after(source, layers):
        layer = layers[name]
        wanted, present = wanted.to(runtime.device), present.to(runtime.device)
        # The zeros of a pattern stay, and with them every other code of 0: later stages hold a mask to its parent's.
        mask = present != 0 if x.pattern is not None else None
        if x.grid is None:  # one that the form cannot hold was not quantised, and lost nothing
            continue
        again = partial(rounded, mask=mask, form=x.grid, dtype=source.stored_dtype)
        start = begin(layer, wanted, present, again, options.loftq_steps)
        if start.stored:
            base, read = layer.base_layer, source.packed_reader(index, x, start.stored, runtime.device, runtime.dtype)
            if isinstance(base, PackedLinear):
                base.read = read
            else:
                base.weight.data = read()
        yield name, start


# --- what is written ------------------------------------------------------------------------------------------------


def _write_merged(source: Checkpoint, target: CheckpointWriter, layers: Mapping[str, Any], options: Options) -> None:
    """Each adapted layer with its adapter's change in the stored precision, everything else as it is."""
    prefix, adapter = source.shape.block_prefix, options.recovery.adapter
    for index, first in enumerate(source.shape.firsts):
        tensors, within = dict(source.stored_block(index)), f"{prefix}.{first}."
        for name in [n for n in layers if n.startswith(within)]:
            for kind, change in adapter.change(layers[name]).items():
                key = f"{name.removeprefix(within)}.{kind}"
                tensors[key] = (tensors[key].float() + change.detach().cpu()).to(tensors[key].dtype)
        target.write_block(index, tensors)
    target.copy_outer(source)
    target.finish(source.config, source)


def _write_beside(
    source: Checkpoint,
    target: CheckpointWriter,
    model: Any,
    layers: Mapping[str, Any],
    starts: Mapping[str, Start],
    options: Options,
) -> None:
    """The quantised weights, as they are but for layers that began with others, and the adapter in PEFT's format."""
    from edgepress.checkpoints.image import TORCH_DTYPES

    prefix, adapter = source.shape.block_prefix, options.recovery.adapter
    for index, block in enumerate(plan(source.shape, options).blocks):
        stored, within = {}, f"{prefix}.{source.shape.firsts[index]}."
        for linear in (x for x in block.linears if x.adapted):
            trained = adapter.tensors(layers[f"{within}{linear.name}"])
            for t in linear.adapter():
                tensor = trained[t.name.removeprefix(f"{linear.name}.")].detach().cpu()
                stored[t.name] = tensor.to(TORCH_DTYPES[t.dtype])
        anew = {
            f"{x.name}.{kind}": tensor
            for x in block.linears
            if (start := starts.get(f"{within}{x.name}")) is not None
            for kind, tensor in start.stored.items()
        }
        if anew:
            target.write_block(index, source.stored_block(index) | anew)
        else:
            target.copy_block(index, source, index)
        target.write_adapter_part(index, stored)
    target.copy_outer(source)
    target.join_adapter(described(model.peft_config["default"]))
    target.finish(source.config, source)

"""Stage 3: recover quality with low-rank adapters, then merge them.

LoRA (Hu et al., arXiv 2106.09685) through peft and transformers' Trainer. On a layer with an N:M mask the
adapter is trained through the mask, W_eff = (W + s B A) * mask, so what was trained is what is merged and
the zeros stay zeros.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from checkpoints.checkpoint import Checkpoint
from checkpoints.errors import PlanError
from checkpoints.quiet import quiet_import
from checkpoints.runtime import Runtime
from checkpoints.shape import ModelShape
from checkpoints.tokens import TokenBatches
from checkpoints.writer import CheckpointWriter
from stages.dense import require_dense
from stages.distill import teacher
from stages.options import Lora as Options
from stages.training import own_random_state, require_a_batch, train

VERSION = 1


def plan(shape: ModelShape, options: Options) -> ModelShape:
    """The same shape: adapters are merged. Raises PlanError for unknown targets and weights that are not dense."""
    require_dense(shape, "lora")
    target_names(shape, options)
    return shape


def remarks(shape: ModelShape, options: Options) -> Iterator[str]:
    """What a person may not expect of these options."""
    windows, seen = options.samples - options.held_out, options.total_steps * options.batch
    if seen < windows:
        yield (
            f"lora: {options.total_steps} steps of {options.batch} see only {seen} of {windows} training windows; "
            "--lora-steps 0 goes through all of them"
        )


def target_names(shape: ModelShape, options: Options) -> list[str]:
    """Names (without path) of the linear layers to adapt. Raises PlanError naming those that exist."""
    present = {x.name.rpartition(".")[2] for x in shape.blocks[0].linears}
    if options.targets == "all":
        return sorted(present)
    wanted = [name.strip() for name in options.targets.split(",")]
    if set(wanted) == {"q_proj", "k_proj", "v_proj", "o_proj"} and "qkv_proj" in present:
        wanted = ["qkv_proj", "o_proj"]  # the default, on families that fuse q, k and v
    if unknown := [name for name in wanted if name not in present]:
        raise PlanError(f"--lora-targets {','.join(unknown)}: this model's blocks have {', '.join(sorted(present))}")
    return wanted


def run(
    source: Checkpoint, target: CheckpointWriter, calibration: TokenBatches, options: Options, runtime: Runtime
) -> dict[str, Any]:
    require_a_batch(calibration.name, len(calibration.ids), options)
    seed = int(runtime.generator("lora").initial_seed() % 2**31)
    with (
        own_random_state(seed),
        teacher(source, calibration.ids, options, runtime, target.work) as taught,
        own_random_state(seed),  # again: whether the teacher had to compute anything must make no difference
    ):
        model, layers = adapted(source, options, runtime)
        training = train(model, calibration, options, runtime, target.work, taught)

    training.curve.write(target.folder)
    for line in (*training.curve.lines(), f"  {training.summary()}"):
        runtime.progress.say(line)
    deltas = {name: masked_delta(layer) for name, layer in layers.items()}
    _write_merged(source, target, deltas)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"trainable_parameters": trainable, **training.facts()}


def adapted(source: Checkpoint, options: Options, runtime: Runtime) -> tuple[nn.Module, dict[str, nn.Module]]:
    """The model in memory with new adapters, trained through its mask if it has one; and the adapted layers."""
    with quiet_import():  # peft asks GPTQModel, which greets
        from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=target_names(source.shape, options),
        task_type="CAUSAL_LM",
    )
    base = source.model(runtime.device, runtime.dtype)
    with quiet_import():
        model = get_peft_model(base, config)
    layers = adapted_layers(model)
    if source.shape.pattern is not None:
        for layer in layers.values():
            train_through_mask(layer)
    return model, layers


def _write_merged(source: Checkpoint, target: CheckpointWriter, deltas: dict[str, Tensor]) -> None:
    """W + s B A of each adapted layer in the stored precision, everything else as it is."""
    prefix = source.shape.block_prefix
    for index in range(len(source.shape.blocks)):
        tensors = dict(source.stored_block(index))
        for name in [n for n in deltas if n.startswith(f"{prefix}.{index}.")]:
            key = name.removeprefix(f"{prefix}.{index}.") + ".weight"
            tensors[key] = (tensors[key].float() + deltas[name].cpu()).to(tensors[key].dtype)
        target.write_block(index, tensors)
    target.copy_outer(source)
    target.finish(source.config, source)


# --- the adapter and the mask ---------------------------------------------------------------------------------------


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """peft's LoRA layers by the name that the wrapped linear has in the checkpoint."""
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            found[re.sub(r"^base_model\.model\.", "", name)] = module
    return found


def masked_delta(layer: Any) -> Tensor:
    """s B A of one layer (out, in) float32, zero wherever the mask is; differentiable."""
    delta: Tensor = layer.scaling["default"] * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight)
    mask = getattr(layer, "nm_mask", None)
    return delta if mask is None else delta * mask


def train_through_mask(layer: Any) -> None:
    """Make peft's layer compute with W_eff = (W + s B A) * mask; the mask is where W is not zero.

    Without dropout that is one product with W_eff. With dropout, which acts on the adapter's input alone, W
    and the masked adapter are applied one after the other.
    """
    weight = layer.base_layer.weight
    layer.nm_mask = weight != 0

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        delta = masked_delta(layer).to(x.dtype)
        dropout = layer.lora_dropout["default"]
        if not layer.training or isinstance(dropout, nn.Identity):
            return F.linear(x, weight + delta, layer.base_layer.bias)
        y: Tensor = layer.base_layer(x)
        return y + F.linear(dropout(x), delta)

    layer.forward = forward

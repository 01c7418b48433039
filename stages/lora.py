"""Stage 3: recover quality with low-rank adapters, then merge them.

LoRA (Hu et al., arXiv 2106.09685) through peft and transformers' Trainer. On a layer with an N:M mask the
adapter is trained through the mask, W_eff = (W + s B A) * mask, so what was trained is what is merged and
the zeros stay zeros.
"""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from checkpoints.checkpoint import Checkpoint
from checkpoints.errors import NumericsError, PlanError
from checkpoints.quiet import quiet_import
from checkpoints.runtime import Runtime
from checkpoints.shape import ModelShape
from checkpoints.tokens import TokenBatches
from checkpoints.walk import Work
from checkpoints.writer import CheckpointWriter
from stages.options import Lora as Options

VERSION = 1
_COMPLETE = "complete"  # marks a saved step as whole: a kill can leave half of one


def plan(shape: ModelShape, options: Options) -> ModelShape:
    """The same shape: adapters are merged. Raises PlanError for unknown targets and quantised weights."""
    if shape.grid is not None:
        raise PlanError("lora merges into dense weights; this checkpoint is quantised. Put lora before gptq")
    target_names(shape, options)
    return shape


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
    with quiet_import():  # peft asks GPTQModel, which greets
        from peft import LoraConfig, get_peft_model

    with own_random_state(int(runtime.generator("lora").initial_seed() % 2**31)):
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
        teacher = _teacher(source, runtime) if options.distill else None
        curve = train(model, calibration, options, runtime, target.work, teacher)

    prefix = source.shape.block_prefix
    deltas = {name.removeprefix(prefix + "."): masked_delta(layer) for name, layer in layers.items()}
    for index in range(len(source.shape.blocks)):
        tensors = dict(source.stored_block(index))
        for name in [n for n in deltas if n.startswith(f"{index}.")]:
            key = name.removeprefix(f"{index}.") + ".weight"
            tensors[key] = (tensors[key].float() + deltas[name].cpu()).to(tensors[key].dtype)
        target.write_block(index, tensors)
    target.copy_outer(source)
    target.finish(source.config, source)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    tokens = curve["steps"] * options.batch * options.length
    return {
        "trainable_parameters": trainable,
        "tokens": tokens,
        "tokens_per_second": tokens / target.work.seconds,
        **curve,
    }


def _teacher(source: Checkpoint, runtime: Runtime) -> nn.Module:
    """The uncompressed model, whole in memory: the oldest of the chain that has this vocabulary.

    A trimmed vocabulary comes first in the chain, and changes no logit of the tokens that stay.
    """
    *_, root = (c for c in source.ancestors() if c.shape.vocabulary == source.shape.vocabulary)
    return root.model(runtime.device, runtime.dtype)


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


# --- training -------------------------------------------------------------------------------------------------------


def train(
    model: nn.Module, data: TokenBatches, options: Options, runtime: Runtime, work: Work, teacher: nn.Module | None
) -> dict[str, Any]:
    """Train with transformers' Trainer: steps taken, loss of each, held-out losses, and the step that was kept.

    Goes on from the last whole saved step. With held-out windows, training stops when their loss has not
    improved for `patience` checks, and the adapter of the best check is the one that is merged.
    """
    from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    with quiet_import():
        from peft import set_peft_model_state_dict

    training, held_out = data.ids, data.ids[:0]
    if options.held_out:
        training, held_out = data.ids[: -options.held_out], data.ids[-options.held_out :]
    arguments = TrainingArguments(
        output_dir=str(work.folder),
        max_steps=options.total_steps,
        per_device_train_batch_size=options.micro_batch,
        gradient_accumulation_steps=options.batch // options.micro_batch,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        weight_decay=0.0,
        activation_checkpointing=options.checkpointing,
        train_sampling_strategy="sequential",  # the windows were shuffled by the stage's own generator
        logging_steps=1,
        logging_nan_inf_filter=False,  # else the Trainer logs an average in place of a NaN, and nobody sees it
        save_strategy="steps",
        save_steps=options.save_steps,
        save_total_limit=2,
        eval_strategy="steps" if options.held_out else "no",
        eval_steps=options.save_steps,
        per_device_eval_batch_size=options.micro_batch,
        prediction_loss_only=True,
        label_names=["labels"],
        load_best_model_at_end=bool(options.held_out),
        metric_for_best_model="eval_loss" if options.held_out else None,
        greater_is_better=False if options.held_out else None,
        restore_callback_states_from_checkpoint=True,  # or a resumed run would forget how long it has been patient
        report_to="none",
        disable_tqdm=True,
        use_cpu=runtime.device.type == "cpu",
        seed=int(torch.initial_seed() % 2**31),
        dataloader_pin_memory=runtime.device.type == "cuda",
        remove_unused_columns=False,
    )

    progress = runtime.progress

    class Report(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                loss = float(logs["loss"])
                for what, value in (("loss", loss), ("gradient", float(logs.get("grad_norm", 0)))):
                    if not np.isfinite(value):
                        raise NumericsError(
                            f"the training {what} became {value} at step {state.global_step}; "
                            "the last saved step is kept. Lower --lora-lr"
                        )
                progress.step(step=f"{state.global_step}/{state.max_steps}", loss=f"{loss:.3f}")

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            (work.folder / f"checkpoint-{state.global_step}" / _COMPLETE).touch()
            work.append({"step": state.global_step})

    class Distilling(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            """The ordinary loss, mixed with KL(teacher || student) over the same tokens."""
            if teacher is None:
                return super().compute_loss(model, inputs, *args, **kwargs)
            loss, outputs = super().compute_loss(model, inputs, *args, **(kwargs | {"return_outputs": True}))
            with torch.no_grad():
                wanted = teacher(input_ids=inputs["input_ids"]).logits[:, :-1]
            kl = token_divergence(outputs["logits"][:, :-1], wanted)
            count = kwargs.get("num_items_in_batch")
            mixed = (1 - options.distill) * loss + options.distill * (kl.mean() if count is None else kl.sum() / count)
            return (mixed, outputs) if kwargs.get("return_outputs") else mixed

    trainer = Distilling(
        model=model,
        args=arguments,
        train_dataset=_Windows(training),
        eval_dataset=_Windows(held_out) if options.held_out else None,
        data_collator=_collate,
        callbacks=[Report(), *([EarlyStoppingCallback(options.patience)] if options.held_out else [])],
    )
    trainer.remove_callback(PrinterCallback)  # output is the progress bar's
    saved = last_whole_step(work.folder)
    state = settled(saved, options) if saved else None
    progress.start("lora", 0 if state else options.total_steps - (int(saved.name.split("-")[1]) if saved else 0))
    if state is not None:
        # Killed between the last step and the merge: the Trainer would take one step too many.
        kept = Path(state.best_model_checkpoint).name if options.held_out else saved.name  # type: ignore[union-attr]
        set_peft_model_state_dict(model, load_file(work.folder / kept / "adapter_model.safetensors"))
    else:
        trainer.train(resume_from_checkpoint=str(saved) if saved else None)
        state = trainer.state
    history = state.log_history
    checks = {str(e["step"]): float(e["eval_loss"]) for e in history if "eval_loss" in e}
    best = min(checks, key=lambda step: checks[step]) if checks else str(state.global_step)
    if state.global_step < options.total_steps:
        progress.note(f"lora stopped at step {state.global_step}: the held-out loss no longer falls")
    return {
        "steps": state.global_step,
        "kept_step": int(best),
        "losses": [float(entry["loss"]) for entry in history if "loss" in entry],
        "held_out_losses": checks,
    }


def token_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of each token in nats, float32: (b, L) from logits (b, L, vocabulary)."""
    p, q = teacher.float().log_softmax(dim=-1), student.float().log_softmax(dim=-1)
    return F.kl_div(q, p, log_target=True, reduction="none").sum(dim=-1)


def settled(saved: Path, options: Options) -> Any:
    """The Trainer's state at a saved step if training was over there, else None."""
    from transformers import TrainerState

    state = TrainerState.load_from_json(str(saved / "trainer_state.json"))
    stopping = state.stateful_callbacks.get("EarlyStoppingCallback", {}).get("attributes", {})
    impatient = stopping.get("early_stopping_patience_counter", 0) >= options.patience
    return state if state.global_step >= options.total_steps or impatient else None


def last_whole_step(work: Path) -> Path | None:
    """The newest saved step that was written completely; half-written ones are removed."""
    steps = sorted(work.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    for path in steps:
        if not (path / _COMPLETE).is_file():
            shutil.rmtree(path)
    whole = [path for path in steps if path.is_dir()]
    return whole[-1] if whole else None


class _Windows(torch.utils.data.Dataset[Tensor]):
    def __init__(self, ids: Tensor) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return int(self.ids.shape[0])

    def __getitem__(self, index: int) -> Tensor:
        return self.ids[index]


def _collate(windows: list[Tensor]) -> dict[str, Tensor]:
    ids = torch.stack(windows)
    return {"input_ids": ids, "labels": ids}


@contextmanager
def own_random_state(seed: int) -> Iterator[None]:
    """A seeded global random state for the Trainer, which knows no other; the caller's comes back afterwards."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)

"""How LoRA trains: transformers' Trainer, resumed from its last whole step, watched, and stopped in time."""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from edgepress.checkpoints.errors import CheckpointError, NumericsError, TextError, not_written
from edgepress.checkpoints.manifest import sha256_file
from edgepress.checkpoints.quiet import quiet_import
from edgepress.checkpoints.runtime import Progress, Runtime
from edgepress.checkpoints.tokens import TokenBatches
from edgepress.checkpoints.walk import Work
from edgepress.stages.curve import Curve
from edgepress.stages.distill import Teacher, token_divergence
from edgepress.stages.options import Lora as Options

_COMPLETE = "complete"  # marks a saved step as whole: a kill can leave half of one
_BEGAN = "training_from"  # the journal's entry with the stage's seconds when training began


@dataclass(frozen=True)
class Training:
    """What came of it. `curve.kept_step` is the step whose adapter the model holds now."""

    curve: Curve
    steps: int
    tokens: int
    seconds: float  # of the training alone, held-out checks included

    def facts(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "kept_step": self.curve.kept_step,
            "tokens": self.tokens,
            "training_seconds": self.seconds,
            "tokens_per_second": self.tokens / self.seconds,
            "losses": self.curve.training,
            "held_out_losses": {str(step): loss for step, loss in self.curve.held_out.items()},
        }

    def summary(self) -> str:
        held = self.curve.held_out
        checked = f", held-out loss {next(iter(held.values())):.3f} -> {held[self.curve.kept_step]:.3f}" if held else ""
        return (
            f"{self.steps} steps, {self.tokens} tokens, {self.tokens / self.seconds:.0f} tokens/s; "
            f"loss {self.curve.training[0]:.3f} -> {self.curve.training[-1]:.3f}{checked}; "
            f"step {self.curve.kept_step} is kept"
        )


def train(
    model: nn.Module, data: TokenBatches, options: Options, runtime: Runtime, work: Work, teacher: Teacher | None
) -> Training:
    """Train the model's adapter on data.ids (windows, L); the last held_out windows only tell when to stop.

    Goes on from the last whole saved step. With held-out windows, training stops when their loss has not
    improved for `patience` checks, and the adapter of the best check is the one that stays in the model.
    Raises NumericsError where a loss or gradient is not finite, naming the last good step.
    """
    from transformers import EarlyStoppingCallback
    from transformers.trainer_callback import PrinterCallback

    windows = len(data.ids)
    steps = options.steps_over(windows)
    cut = windows - options.held_out
    trainer = _distilling(teacher, options.distill)(
        model=model,
        args=_arguments(options, steps, runtime, work.folder),
        train_dataset=_Windows(data.ids[:cut], first=0),
        eval_dataset=_Windows(data.ids[cut:], first=cut) if options.held_out else None,
        data_collator=_collate,
        callbacks=[
            _report(runtime.progress, work),
            *([EarlyStoppingCallback(options.patience)] if options.held_out else []),
        ],
    )
    trainer.remove_callback(PrinterCallback)  # output is the progress bar's
    saved = last_whole_step(work)
    state = settled(saved, steps, options.patience) if saved else None
    runtime.progress.start("lora", 0 if state else steps - (int(saved.name.split("-")[1]) if saved else 0))
    if not any(_BEGAN in entry for entry in work.entries):
        work.append({_BEGAN: work.seconds})
    if state is not None:
        # Killed between the last step and the merge: the Trainer would take one step too many.
        assert saved is not None
        kept = Path(state.best_model_checkpoint).name if options.held_out else saved.name
        _load_adapter(model, work.folder / kept)
    else:
        with _writing(work.folder):
            trainer.train(resume_from_checkpoint=str(saved) if saved else None)
        state = trainer.state
    if state.global_step < steps:
        runtime.progress.note(f"lora stopped at step {state.global_step}: the held-out loss no longer falls")
    history = state.log_history
    checks = {int(e["step"]): float(e["eval_loss"]) for e in history if "eval_loss" in e}
    best = min(checks, key=lambda step: checks[step]) if checks else state.global_step
    began = next(entry[_BEGAN] for entry in work.entries if _BEGAN in entry)
    return Training(
        curve=Curve([float(entry["loss"]) for entry in history if "loss" in entry], checks, best),
        steps=state.global_step,
        tokens=windows_seen(state.global_step, cut, options) * options.length,
        seconds=max(work.seconds - began, 1e-3),
    )


def require_a_batch(name: str, windows: int, options: Options) -> None:
    """Raise TextError where that many windows of a text, less those held out, fill no batch."""
    least = options.batch + options.held_out
    if windows < least:
        raise TextError(
            f"lora: the training text '{name}' yields no batch: it has {windows} windows of {options.length} tokens, "
            f"and --lora-batch {options.batch} with {options.held_out} held out needs {least}. "
            "Give a longer text with --lora-data, or lower --lora-length, --lora-batch or --lora-held-out"
        )


def windows_seen(steps: int, windows: int, options: Options) -> int:
    """Training windows that went through the model, repeats counted: the last batch of a pass may be smaller."""
    passes, rest = divmod(steps, -(-windows // options.batch))
    return passes * windows + min(rest * options.batch, windows)


def _arguments(options: Options, steps: int, runtime: Runtime, folder: Path) -> Any:
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
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


def _report(progress: Progress, work: Work) -> Any:
    """The Trainer's callback that tells of each step, marks saved ones, and stops at what is not finite."""
    from transformers import TrainerCallback

    class Report(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            logs = logs or {}
            for what, key in (
                ("training loss", "loss"),
                ("training gradient", "grad_norm"),
                ("held-out loss", "eval_loss"),
            ):
                value = float(logs.get(key, 0))
                if not math.isfinite(value):
                    raise NumericsError(f"the {what} became {value} at step {state.global_step}; {_kept(work)}")
            if "loss" in logs:
                progress.step(step=f"{state.global_step}/{state.max_steps}", loss=f"{float(logs['loss']):.3f}")

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            folder = work.folder / f"checkpoint-{state.global_step}"
            work.append({"step": state.global_step, "saved": _hashes(folder)})
            (folder / _COMPLETE).touch()  # last: a step saved again must not meet the line of its first time
            _remove_past(work, Path(state.best_model_checkpoint or folder).name)

    return Report()


def _kept(work: Work) -> str:
    """What is left after a loss that is not finite, and what to do."""
    saved = last_whole_step(work)
    if saved is None:
        return "no step was saved before it. Lower --lora-lr"
    step = saved.name.split("-")[1]
    return f"the adapter of step {step}, the last good one, is kept in {saved}. Lower --lora-lr"


def _distilling(teacher: Teacher | None, share: float) -> Any:
    """The Trainer's class, whose loss is mixed with KL(teacher || student) over the same tokens."""
    from transformers import Trainer

    class Distilling(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            inputs = dict(inputs)
            windows = inputs.pop("windows")
            if teacher is None:
                return super().compute_loss(model, inputs, *args, **kwargs)
            loss, outputs = super().compute_loss(model, inputs, *args, **(kwargs | {"return_outputs": True}))
            with torch.no_grad():
                wanted = teacher(inputs["input_ids"], windows)[:, :-1]
            kl = token_divergence(outputs["logits"][:, :-1], wanted)
            count = kwargs.get("num_items_in_batch")
            mixed = (1 - share) * loss + share * (kl.mean() if count is None else kl.sum() / count)
            return (mixed, outputs) if kwargs.get("return_outputs") else mixed

    return Distilling


# --- saved steps ----------------------------------------------------------------------------------------------------


def _load_adapter(model: nn.Module, folder: Path) -> None:
    with quiet_import():
        from peft import set_peft_model_state_dict
    set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))


def settled(saved: Path, steps: int, patience: int) -> Any:
    """The Trainer's state at a saved step if training was over there, else None."""
    from transformers import TrainerState

    state = TrainerState.load_from_json(str(saved / "trainer_state.json"))
    stopping = state.stateful_callbacks.get("EarlyStoppingCallback", {}).get("attributes", {})
    impatient = stopping.get("early_stopping_patience_counter", 0) >= patience
    return state if state.global_step >= steps or impatient else None


def last_whole_step(work: Work) -> Path | None:
    """The newest saved step that the journal answers for; half-written ones are removed.

    Raises CheckpointError naming a file of a saved step that is not as it was saved.
    """
    told = {entry["step"]: entry["saved"] for entry in work.entries if "saved" in entry}
    steps = sorted(work.folder.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    for path in steps:
        number = int(path.name.split("-")[1])
        if number not in told or not (path / _COMPLETE).is_file():
            shutil.rmtree(path)
            continue
        found = _hashes(path)
        for name in sorted(found.keys() | told[number]):
            if found.get(name) != told[number].get(name):
                raise CheckpointError(
                    f"{path / name} is not as it was saved; move {work.folder.parent} away and run the same command "
                    "again to train anew"
                )
    whole = [path for path in steps if path.is_dir()]
    return whole[-1] if whole else None


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Around the Trainer: torch says that a file could not be written as a RuntimeError of its zip writer."""
    try:
        yield
    except RuntimeError as error:
        if not not_written(error):
            raise
        raise CheckpointError(
            f"a training step could not be saved in {folder}: the disk is full, or a file may not grow so large; make "
            "room and run the same command again, which goes on from the last saved step"
        ) from None


def _remove_past(work: Work, best: str) -> None:
    """Remove all saved steps but the best and the last two.

    Not the Trainer's own rotation: killed in it, a step with its mark would lack files, as one that was damaged.
    """
    steps = sorted(work.folder.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    for path in steps[:-2]:
        if path.name != best:
            (path / _COMPLETE).unlink(missing_ok=True)
            shutil.rmtree(path)


def _hashes(folder: Path) -> dict[str, str]:
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != _COMPLETE]
    return {p.relative_to(folder).as_posix(): sha256_file(p) for p in files}


# --- data and randomness --------------------------------------------------------------------------------------------


class _Windows(torch.utils.data.Dataset[tuple[int, Tensor]]):
    """Windows with their number among all of the stage's, by which a teacher knows them."""

    def __init__(self, ids: Tensor, first: int) -> None:
        self.ids, self.first = ids, first

    def __len__(self) -> int:
        return int(self.ids.shape[0])

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        return self.first + index, self.ids[index]


def _collate(windows: list[tuple[int, Tensor]]) -> dict[str, Tensor]:
    ids = torch.stack([ids for _, ids in windows])
    return {"input_ids": ids, "labels": ids, "windows": torch.tensor([number for number, _ in windows])}


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

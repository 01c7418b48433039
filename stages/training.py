"""Train adapters or scales with transformers' Trainer: distillation, resuming, early stopping, the loss curve."""

from __future__ import annotations

import io
import math
import random
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import CheckpointError, NumericsError, TextError, not_written
from edgepress.checkpoints.manifest import sha256_file, write_bytes, write_json
from edgepress.checkpoints.quiet import quiet_import
from edgepress.checkpoints.runtime import Progress, Runtime
from edgepress.checkpoints.tokens import IGNORED, TokenBatches
from edgepress.checkpoints.walk import States, Walk, Work
from edgepress.stages.options import Lora, flag_of
from edgepress.stages.options import Training as Options
from edgepress.stages.recovery.shapes import teacher_kind
from edgepress.stages.token_loss import without_copies

_COMPLETE = "complete"  # marks a saved step as whole: a kill can leave half of one
_BEGAN = "training_from"  # the journal's entry with the stage's seconds when training began


@dataclass(frozen=True)
class Training:
    """What came of it. `curve.kept_step` is the step whose variables the model holds now."""

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
    model: nn.Module,
    data: TokenBatches,
    options: Options,
    runtime: Runtime,
    work: Work,
    teacher: Teacher | None,
    blocks: Iterable[nn.Module] = (),
) -> Training:
    """Train what asks for a gradient on data.ids (windows, L); the last held_out windows only tell when to stop.

    blocks: the model's, whose outputs are compared with the teacher's hidden states if the options say so.

    Goes on from the last whole saved step. With held-out windows, training stops when their loss has not
    improved for `patience` checks, and what the best check found is what stays in the model.
    Raises NumericsError where a loss or gradient is not finite, naming the last good step.
    """
    from transformers import EarlyStoppingCallback
    from transformers.trainer_callback import PrinterCallback

    windows = len(data.ids)
    steps = options.steps_over(windows)
    cut = windows - options.held_out
    trainer = _distilling(teacher, options, list(blocks))(
        model=model,
        args=_arguments(options, steps, runtime, work.folder),
        train_dataset=_Windows(data, 0, cut),
        eval_dataset=_Windows(data, cut, windows) if options.held_out else None,
        data_collator=_collate,
        callbacks=[
            _report(runtime.progress, work, options),
            *([EarlyStoppingCallback(options.patience)] if options.held_out else []),
        ],
    )
    trainer.remove_callback(PrinterCallback)  # output is the progress bar's
    saved = last_whole_step(work)
    state = settled(saved, steps, options.patience) if saved else None
    runtime.progress.start(options.stage, 0 if state else steps - (int(saved.name.split("-")[1]) if saved else 0))
    if not any(_BEGAN in entry for entry in work.entries):
        work.append({_BEGAN: work.seconds})
    if state is not None:
        # Killed between the last step and the merge: the Trainer would take one step too many.
        assert saved is not None
        kept = Path(state.best_model_checkpoint).name if options.held_out else saved.name
        _load_saved(model, work.folder / kept)
    else:
        lean = without_copies(model) if isinstance(options, Lora) and options.lean_loss else nullcontext()
        with _writing(work.folder), lean:
            trainer.train(resume_from_checkpoint=str(saved) if saved else None)
        state = trainer.state
    if state.global_step < steps:
        runtime.progress.note(f"{options.stage} stopped at step {state.global_step}: the held-out loss no longer falls")
    history = state.log_history
    checks = {int(e["step"]): float(e["eval_loss"]) for e in history if "eval_loss" in e}
    best = min(checks, key=lambda step: checks[step]) if checks else state.global_step
    began = next(entry[_BEGAN] for entry in work.entries if _BEGAN in entry)
    return Training(
        curve=Curve([float(entry["loss"]) for entry in history if "loss" in entry], checks, best),
        steps=state.global_step,
        tokens=_tokens_seen(data.lengths()[:cut], windows_seen(state.global_step, cut, options)),
        seconds=max(work.seconds - began, 1e-3),
    )


def require_a_batch(name: str, windows: int, options: Options) -> None:
    """Raise TextError where that many windows of a text, less those held out, fill no batch."""
    least = options.batch + options.held_out
    if windows < least:
        data, length, batch, held_out = (flag_of(options, x) for x in ("data", "length", "batch", "held_out"))
        raise TextError(
            f"{options.stage}: the training text '{name}' yields no batch: it has {windows} windows of "
            f"{options.length} tokens, and {batch} {options.batch} with {options.held_out} held out needs {least}. "
            f"Give a longer text with {data}, or lower {length}, {batch} or {held_out}"
        )


def windows_seen(steps: int, windows: int, options: Options) -> int:
    """Training windows that went through the model, repeats counted: the last batch of a pass may be smaller."""
    passes, rest = divmod(steps, -(-windows // options.batch))
    return passes * windows + min(rest * options.batch, windows)


def _tokens_seen(lengths: list[int], windows: int) -> int:
    """Of so many windows, taken in order and over again."""
    passes, rest = divmod(windows, len(lengths))
    return passes * sum(lengths) + sum(lengths[:rest])


def _arguments(options: Options, steps: int, runtime: Runtime, folder: Path) -> Any:
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=options.micro_batch,
        gradient_accumulation_steps=options.batch // options.micro_batch,
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant_with_warmup" if options.schedule == "constant" else options.schedule,
        warmup_steps=options.warmup,
        weight_decay=options.weight_decay,
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


def _report(progress: Progress, work: Work, options: Options) -> Any:
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
                    raise NumericsError(
                        f"the {what} became {value} at step {state.global_step}; {_kept(work, options)}"
                    )
            if "loss" in logs:
                progress.step(step=f"{state.global_step}/{state.max_steps}", loss=f"{float(logs['loss']):.3f}")

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            folder = work.folder / f"checkpoint-{state.global_step}"
            work.append({"step": state.global_step, "saved": _hashes(folder)})
            (folder / _COMPLETE).touch()  # last: a step saved again must not meet the line of its first time
            _remove_past(work, Path(state.best_model_checkpoint or folder).name)

    return Report()


def _kept(work: Work, options: Options) -> str:
    """What is left after a loss that is not finite, and what to do."""
    saved, rate = last_whole_step(work), flag_of(options, "learning_rate")
    if saved is None:
        return f"no step was saved before it. Lower {rate}"
    step = saved.name.split("-")[1]
    return f"{options.trained} of step {step}, the last good one, is kept in {saved}. Lower {rate}"


def _distilling(teacher: Teacher | None, options: Options, blocks: list[nn.Module]) -> Any:
    """The Trainer's class, whose loss is mixed with KL(teacher || student) over the same tokens.

    With distill_hidden the error of the outputs of `blocks`, the student's, is added with that weight.
    """
    from transformers import Trainer

    share, hidden = options.distill, options.distill_hidden

    class Distilling(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            inputs = dict(inputs)
            windows = inputs.pop("windows")
            if teacher is None:
                return super().compute_loss(model, inputs, *args, **kwargs)
            with outputs_of(blocks if hidden else []) as states:
                loss, outputs = super().compute_loss(model, inputs, *args, **(kwargs | {"return_outputs": True}))
            with torch.no_grad():
                lesson = teacher(inputs["input_ids"], windows)
            learnt, width = inputs["labels"][:, 1:] != IGNORED, inputs["labels"].shape[1] - 1
            count = kwargs.get("num_items_in_batch")

            def mean(of_tokens: Tensor) -> Tensor:
                of_tokens = of_tokens if learnt.all() else of_tokens[learnt]
                return of_tokens.mean() if count is None else of_tokens.sum() / count

            kl = token_divergence(outputs["logits"][:, :-1], lesson.logits[:, :width])
            mixed = (1 - share) * loss + share * mean(kl)
            if hidden:
                errors = hidden_errors([x[:, :width] for x in states], [x[:, :width] for x in lesson.states])
                mixed = mixed + hidden * mean(errors)
            return (mixed, outputs) if kwargs.get("return_outputs") else mixed

    return Distilling


# --- saved steps ----------------------------------------------------------------------------------------------------


def _load_saved(model: nn.Module, folder: Path) -> None:
    """The adapter of a saved step, or all that was trained."""
    adapter = folder / "adapter_model.safetensors"
    if not adapter.is_file():
        for path in sorted(folder.glob("model*.safetensors")):
            model.load_state_dict(load_file(path), strict=False)  # one of several, or without a tied head
        return
    with quiet_import():
        from peft import set_peft_model_state_dict
    set_peft_model_state_dict(model, load_file(adapter))


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


class _Windows(torch.utils.data.Dataset[tuple[int, Tensor, Tensor]]):
    """Windows from one number to another of all of the stage's, by which a teacher knows them, with their labels."""

    def __init__(self, data: TokenBatches, first: int, end: int) -> None:
        self.data, self.first, self.end = data, first, end

    def __len__(self) -> int:
        return self.end - self.first

    def __getitem__(self, index: int) -> tuple[int, Tensor, Tensor]:
        number = self.first + index
        ids = self.data.ids[number]
        return number, ids, ids if self.data.labels is None else self.data.labels[number]


def _collate(windows: list[tuple[int, Tensor, Tensor]]) -> dict[str, Tensor]:
    """A batch without what follows the last token that is learnt: causal attention does not see it."""
    labels = torch.stack([labels for _, _, labels in windows])
    width = int((labels != IGNORED).any(0).nonzero()[-1]) + 1
    ids = torch.stack([ids for _, ids, _ in windows])
    numbers = torch.tensor([number for number, _, _ in windows])
    return {"input_ids": ids[:, :width], "labels": labels[:, :width], "windows": numbers}


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


# --- distillation -----------------------------------------------------------------------------------------------------
# The uncompressed model as a teacher: held whole beside the student, or streamed before training.
#
# Streamed: the teacher walks block by block over the training windows once, and its last hidden states, not its
# logits, are kept in the unfinished folder. Its own norm and head turn them back into the full, exact logits of a
# batch when the batch comes. Nothing is lost, as it would be with the top k logits, and a token takes d numbers
# instead of one for every word: 47 MB for 80 windows of 512 on SmolLM2, where the logits would be 4 GB.
#
# With --distill-hidden the states after each of the teacher's blocks that the student still has are compared too, as
# HomoDistil does (Liang et al., arXiv 2302.09632, with TinyBERT's loss on hidden layers, arXiv 1909.10351). A streamed
# teacher keeps those as well. Student and teacher are as wide as each other here, so no projection is learned between
# them. Attention maps, which the paper matches besides, are not: fused attention gives none.


class Lesson(NamedTuple):
    """What the teacher says of a batch."""

    logits: Tensor  # (b, L, vocabulary)
    states: Sequence[Tensor]  # (b, L, d) after each of its blocks that the student has; none unless they are compared


Teacher = Callable[[Tensor, Tensor], Lesson]  # of token ids (b, L) and window numbers (b,)


@contextmanager
def teacher(
    source: Checkpoint, ids: Tensor, options: Options, runtime: Runtime, work: Work
) -> Iterator[Teacher | None]:
    """The model at the root of the source's chain for the windows ids (windows, L), or None without distillation.

    A streamed teacher computes here, before the caller loads the student; interrupted, it goes on at its block.
    """
    kind = teacher_kind(source.shape, options)
    if kind == "none":
        yield None
        return
    # The oldest of the chain that has this vocabulary: trimming it comes first, and changes no logit that stays.
    *_, root = (c for c in source.ancestors() if c.shape.vocabulary == source.shape.vocabulary)
    compared = counterparts(source, root) if options.distill_hidden else []
    if kind == "held":
        model = root.model(runtime.device, runtime.dtype)
        blocks: Any = model.get_submodule(root.shape.block_prefix)

        def held(batch: Tensor, _: Tensor) -> Lesson:
            with outputs_of([blocks[number] for number in compared]) as states:
                return Lesson(model(input_ids=batch).logits, states)

        yield held
        return
    numbers = visited(len(ids), options)
    walk, files = streamed(root, ids[numbers], runtime, Work(work.folder / "teacher"), compared)
    assert walk.states.path is not None
    width = (ids.shape[1], root.shape.hidden_size)
    last, *kept = (States([width] * len(numbers), runtime.dtype, path).chunks for path in (walk.states.path, *files))
    place = {number: index for index, number in enumerate(numbers)}

    def read(chunks: Sequence[Tensor], windows: Tensor) -> Tensor:
        return torch.stack([chunks[place[int(number)]] for number in windows])

    with walk.skeleton.head() as head:
        yield lambda batch, windows: Lesson(
            head(read(last, windows)), [read(chunks, windows).to(batch.device) for chunks in kept]
        )


def counterparts(source: Checkpoint, root: Checkpoint) -> list[int]:
    """Of each block of the source, the number of the block of `root` that it was.

    Raises CheckpointError where that is not recorded, or the blocks are not some of the root's in their order.
    """
    count, of_root = len(source.shape.blocks), len(root.shape.blocks)
    numbers = source.manifest.origin.get("blocks") if source.manifest else None
    if numbers is None and count == of_root:
        numbers = list(range(count))
    if numbers is None or len(numbers) != count or not set(numbers) <= set(range(of_root)):
        raise CheckpointError(
            f"--distill-hidden: it is not recorded which blocks of {root.folder} are left in {source.folder}; leave it "
            "out, and --distill compares the logits alone"
        )
    if any(later <= earlier for earlier, later in pairwise(numbers)):
        raise CheckpointError(
            f"--distill-hidden: the blocks of {source.folder} are {', '.join(map(str, numbers))} of {root.folder}, not "
            "in its order, so their outputs are no steps on its way; leave it out, and --distill compares the logits "
            "alone"
        )
    return list(numbers)


def visited(windows: int, options: Options) -> list[int]:
    """The windows that training and its held-out checks read; training takes them in order."""
    training = windows - options.held_out
    return [*range(min(training, options.steps_over(windows) * options.batch)), *range(training, windows)]


def streamed(
    root: Checkpoint, ids: Tensor, runtime: Runtime, work: Work, compared: Sequence[int] = ()
) -> tuple[Walk, list[Path]]:
    """A finished walk whose states are the teacher's last hidden states (windows, L, d), in a file that lasts; and a
    file of the states after each block in `compared`, in the same layout."""
    chunks = list(torch.split(ids, max(1, runtime.chunk_tokens // ids.shape[1])))
    walk = Walk(root, chunks, runtime, work, last_outputs=True, task="teacher")
    files = {number: work.folder / f"after-{number:05d}.bin" for number in compared}
    for block in walk:
        # Those before this block, which still lie there when a kill comes before it is done.
        if (copy := files.get(block.index - 1)) is not None:
            assert walk.states.path is not None
            shutil.copyfile(walk.states.path, copy)
            work.vouch(copy)
        block.done()
    for path in work.folder.glob("states-*.bin"):
        if path != walk.states.path:  # the states before the last block
            path.unlink()
    assert walk.states.path is not None
    if (last := len(root.shape.blocks) - 1) in files:
        files[last] = walk.states.path
    return walk, list(files.values())


def token_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of each token in nats, float32: (b, L) from logits (b, L, vocabulary)."""
    p, q = teacher.float().log_softmax(dim=-1), student.float().log_softmax(dim=-1)
    return F.kl_div(q, p, log_target=True, reduction="none").sum(dim=-1)


def hidden_errors(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Squared error of each token's hidden states relative to the teacher's, float32: (b, L), the mean over blocks.

    Both are (b, L, d), one for each block. HomoDistil compares BERT's states, which a norm has brought to one size. The
    states between a LLaMA model's blocks have not been through one: they grow from block to block, and of a few tokens
    they are a thousand times those of the rest, which would be all that a plain mean saw.
    """
    errors = [
        (s.float() - t.float()).square().sum(dim=-1) / t.float().square().sum(dim=-1).clamp_min(1e-12)
        for s, t in zip(student, teacher, strict=True)
    ]
    return torch.stack(errors).mean(dim=0)


@contextmanager
def outputs_of(blocks: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """A list that takes the output (b, L, d) of each of these blocks as it runs, until the context ends."""
    found: list[Tensor] = []

    def take(_: nn.Module, inputs: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_hook(take) for block in blocks]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


# --- the loss curve ---------------------------------------------------------------------------------------------------
# The loss curve of a training: lines for a terminal or a log, and `loss.json` and `loss.png` beside the weights.
#
# Both files are written before the manifest, which lists and hashes them like any other file of the checkpoint.


_LABEL = 8  # columns of the numbers on the left, the axis included
_TRAINING, _HELD_OUT = "·", "o"


@dataclass(frozen=True)
class Curve:
    """Losses in nats a token (with distillation: of the mixed objective)."""

    training: list[float]  # of step 1, 2, …
    held_out: dict[int, float]  # by step
    kept_step: int

    def write(self, folder: Path, options: Options) -> None:
        """`loss.json` and `loss.png`; the same losses give the same bytes."""
        write_json(folder / "loss.json", self.to_dict())
        write_bytes(folder / "loss.png", self.png(options.title, "merged" if options.stage == "lora" else "kept"))

    def to_dict(self) -> dict[str, Any]:
        return {"kept_step": self.kept_step, "training": self.training, "held_out": self.held_out}

    def lines(self, width: int = 80, height: int = 10) -> list[str]:
        """A chart of at most `width` columns. Where steps outnumber columns, a column shows their mean."""
        columns = width - _LABEL
        steps = len(self.training)
        if not steps:
            return []

        def column(step: int) -> int:
            return round((step - 1) / max(steps - 1, 1) * (columns - 1))

        bins: dict[int, list[float]] = {}
        for step, loss in enumerate(self.training, 1):
            bins.setdefault(column(step), []).append(loss)
        means = {place: sum(losses) / len(losses) for place, losses in bins.items()}
        values = [*means.values(), *self.held_out.values()]
        low, high = min(values), max(values)
        grid = [[" "] * columns for _ in range(height)]

        def mark(place: int, loss: float, sign: str) -> None:
            share = (high - loss) / (high - low) if high > low else 0.5
            grid[round(share * (height - 1))][place] = sign

        for place, loss in means.items():
            mark(place, loss, _TRAINING)
        for step, loss in self.held_out.items():
            mark(column(step), loss, _HELD_OUT)
        digits = max(0, 3 - len(str(int(high))))
        drawn = []
        for row, signs in enumerate(grid):
            loss = high - (high - low) * row / (height - 1)
            named = (0, (height - 1) // 2, height - 1) if high > low else (round(0.5 * (height - 1)),)
            label = f"{loss:.{digits}f}" if row in named else ""
            drawn.append(f"{label:>{_LABEL - 2}} ┤" + "".join(signs).rstrip())
        drawn.append(" " * (_LABEL - 1) + "└" + "─" * columns)
        last = f"step {steps}"
        drawn.append(f"{'':<{_LABEL}}{'step 1':<{columns - len(last)}}{last}")
        legend = f"{_TRAINING} training loss" + (f"   {_HELD_OUT} held-out loss" if self.held_out else "")
        return [*drawn, " " * _LABEL + legend]

    def png(self, title: str = "LoRA training", taken: str = "merged") -> bytes:
        """Both losses over the steps, and the step that was taken: merged into the weights, or kept."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        steps = range(1, len(self.training) + 1)
        few = len(self.training) < 60
        axes.plot(steps, self.training, color="#3b6ea5", linewidth=1.2, marker="." if few else "", label="training")
        if self.held_out:
            checks = sorted(self.held_out)
            losses = [self.held_out[step] for step in checks]
            axes.plot(checks, losses, color="#c0562b", linewidth=1.8, marker="o", label="held out")
            axes.axvline(self.kept_step, color="#777777", linestyle=":", label=f"{taken}: step {self.kept_step}")
        axes.set(xlabel="optimiser step", ylabel="loss, nats per token", title=title)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
        file = io.BytesIO()
        figure.savefig(file, format="png", metadata={"Software": None})  # its version has no place in a hashed file
        return file.getvalue()

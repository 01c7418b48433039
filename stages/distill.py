"""The uncompressed model as a teacher for LoRA: held whole beside the student, or streamed before training.

Streamed: the teacher walks block by block over the training windows once, and its last hidden states, not its
logits, are kept in the unfinished folder. Its own norm and head turn them back into the full, exact logits of a batch
when the batch comes. Nothing is lost, as it would be with the top k logits, and a token takes d numbers instead of
one for every word: 47 MB for 80 windows of 512 on SmolLM2, where the logits would be 4 GB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.shape import ModelShape
from edgepress.checkpoints.states import States
from edgepress.checkpoints.walk import Walk, Work
from edgepress.stages.options import Lora

# Beyond this much disk, `auto` holds the teacher instead. A fixed number: what is free on a machine must not decide
# which bytes come out.
_AUTO_LIMIT_BYTES = 16 * 2**30

Teacher = Callable[[Tensor, Tensor], Tensor]  # token ids (b, L), window numbers (b,) -> logits (b, L, vocabulary)


def teacher_kind(shape: ModelShape, options: Lora) -> str:
    """How the teacher is kept: none, held or streamed."""
    if options.distill == 0:
        return "none"
    if options.teacher != "auto":
        return options.teacher
    return "streamed" if teacher_disk_bytes(shape, options) <= _AUTO_LIMIT_BYTES else "held"


def teacher_disk_bytes(shape: ModelShape, options: Lora) -> int:
    """Most disk the streamed teacher takes: hidden states before and after a block, in 16 bit."""
    windows = min(options.samples, options.total_steps * options.batch + options.held_out)
    return 2 * windows * options.length * shape.hidden_size * 2


@contextmanager
def teacher(source: Checkpoint, ids: Tensor, options: Lora, runtime: Runtime, work: Work) -> Iterator[Teacher | None]:
    """The model at the root of the source's chain for the windows ids (windows, L), or None without distillation.

    A streamed teacher computes here, before the caller loads the student; interrupted, it goes on at its block.
    """
    kind = teacher_kind(source.shape, options)
    if kind == "none":
        yield None
        return
    # The oldest of the chain that has this vocabulary: trimming it comes first, and changes no logit that stays.
    *_, root = (c for c in source.ancestors() if c.shape.vocabulary == source.shape.vocabulary)
    if kind == "held":
        model = root.model(runtime.device, runtime.dtype)
        yield lambda batch, _: model(input_ids=batch).logits
        return
    numbers = visited(len(ids), options)
    walk = streamed(root, ids[numbers], runtime, Work(work.folder / "teacher"))
    assert walk.states.path is not None
    width = (ids.shape[1], root.shape.hidden_size)
    kept = States([width] * len(numbers), runtime.dtype, walk.states.path).chunks
    place = {number: index for index, number in enumerate(numbers)}
    with walk.skeleton.head() as head:
        yield lambda _, windows: head(torch.stack([kept[place[int(number)]] for number in windows]))


def visited(windows: int, options: Lora) -> list[int]:
    """The windows that training and its held-out checks read; training takes them in order."""
    training = windows - options.held_out
    return [*range(min(training, options.steps_over(windows) * options.batch)), *range(training, windows)]


def streamed(root: Checkpoint, ids: Tensor, runtime: Runtime, work: Work) -> Walk:
    """A finished walk whose states are the teacher's last hidden states (windows, L, d), in a file that lasts."""
    chunks = list(torch.split(ids, max(1, runtime.chunk_tokens // ids.shape[1])))
    walk = Walk(root, chunks, runtime, work, last_outputs=True, task="teacher")
    for block in walk:
        block.done()
    for path in work.folder.glob("states-*.bin"):
        if path != walk.states.path:  # the states before the last block
            path.unlink()
    return walk


def token_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of each token in nats, float32: (b, L) from logits (b, L, vocabulary)."""
    p, q = teacher.float().log_softmax(dim=-1), student.float().log_softmax(dim=-1)
    return F.kl_div(q, p, log_target=True, reduction="none").sum(dim=-1)

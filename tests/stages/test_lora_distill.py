"""LoRA's teacher: the divergence it trains on, and that streaming it changes nothing but memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoints.checkpoint import Checkpoint
from checkpoints.runtime import Runtime
from checkpoints.writer import CheckpointWriter
from stages import distill, lora
from tests.stages.lora_help import Watcher, options, text, weights

pytestmark = pytest.mark.unit

RUNTIME = Runtime()


def test_token_divergence_is_the_textbook_sum() -> None:
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(2, 3, 5, generator=generator), torch.randn(2, 3, 5, generator=generator)
    for b in range(2):
        for t in range(3):
            p, q = teacher[b, t].double().softmax(0), student[b, t].double().softmax(0)
            expected = sum(float(p[i]) * float(torch.log(p[i] / q[i])) for i in range(5))
            assert float(distill.token_divergence(student, teacher)[b, t]) == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def divergence_from_root(checkpoint: Checkpoint, ids: Tensor) -> float:
    *_, root = checkpoint.ancestors()
    p = root.model()(input_ids=ids).logits[:, :-1].double().log_softmax(-1)
    q = checkpoint.model()(input_ids=ids).logits[:, :-1].double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_distillation_trains_on_the_divergence_from_the_uncompressed_model(
    masked: Checkpoint, writer: CheckpointWriter, seal: Callable[..., Checkpoint]
) -> None:
    before = divergence_from_root(masked, text().ids)
    assert before > 0.1, "the fixture's parent must be another model"
    chosen = options(distill=1.0, dropout=0.0, held_out=0, learning_rate=2e-2, steps=16)
    pure = lora.run(masked, writer, text(), chosen, RUNTIME)
    assert pure["losses"][0] == pytest.approx(divergence_from_root(masked, text().ids[:4]), rel=1e-3)
    assert divergence_from_root(seal(writer, masked, pattern="2:4"), text().ids) < 0.8 * before
    mixed, plain = (
        lora.run(
            masked,
            CheckpointWriter(writer.folder.with_name(f"share-{share}")),
            text(),
            options(distill=share, dropout=0.0, held_out=0, steps=1),
            RUNTIME,
        )["losses"][0]
        for share in (0.25, 0.0)
    )
    assert mixed == pytest.approx(0.75 * plain + 0.25 * pure["losses"][0], rel=1e-3)

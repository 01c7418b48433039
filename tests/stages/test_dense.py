"""Quantised checkpoints and adapters, given where dense weights are needed: each stage says so and what to give."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path

import pytest

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import CheckpointError, PlanError
from edgepress.checkpoints.families import PRESETS, shape_from_config
from edgepress.checkpoints.shape import ModelShape
from edgepress.stages import eora, gptq
from edgepress.stages.options import STAGES, Eora, Gptq

pytestmark = pytest.mark.unit

DENSE = shape_from_config(PRESETS["smollm2-135m"])
QUANTISED = gptq.plan(DENSE, Gptq())
COMPENSATED = eora.plan(QUANTISED, Eora())
TRAINABLE = ("lora", QUANTISED)
NEEDS_DENSE = ("depth", "wanda", "lora", "gptq")


def with_adapter(shape: ModelShape) -> ModelShape:
    """A dense model beside which somebody put an adapter."""
    blocks = (replace(b, linears=tuple(replace(x, adapter_rank=8) for x in b.linears)) for b in shape.blocks)
    return replace(shape, blocks=tuple(blocks))


@pytest.mark.parametrize("stage", NEEDS_DENSE)
@pytest.mark.parametrize("shape", [QUANTISED, COMPENSATED], ids=["quantised", "compensated"])
def test_quantised_weights_are_refused(stage: str, shape: ModelShape) -> None:
    with pytest.raises(PlanError) as caught:
        importlib.import_module(f"edgepress.stages.{stage}").plan(shape, STAGES[stage]())
    assert str(caught.value) == (
        f"{stage} needs dense weights; this checkpoint is already quantised (4 bits). "
        + (f"Put {stage} before gptq, or give" if stage != "gptq" else "Give")
        + " the checkpoint from before quantisation"
        + (". --recover qlora trains beside quantised weights and merges nothing" * ((stage, shape) == TRAINABLE))
    )


@pytest.mark.parametrize("stage", NEEDS_DENSE)
def test_an_adapter_beside_dense_weights_is_refused(stage: str) -> None:
    with pytest.raises(PlanError) as caught:
        importlib.import_module(f"edgepress.stages.{stage}").plan(with_adapter(DENSE), STAGES[stage]())
    assert str(caught.value) == (
        f"{stage} needs dense weights; this checkpoint carries an adapter of rank 8 beside its weights. "
        "Merge the adapter, or give the checkpoint without it"
    )


def test_eora_refuses_a_second_adapter_and_names_what_to_give() -> None:
    with pytest.raises(PlanError, match="eora: this checkpoint already carries an adapter; give the quantised one"):
        eora.plan(COMPENSATED, Eora())


def test_a_bare_adapter_is_not_taken_for_a_model(tmp_path: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match=r"is an adapter in PEFT's format, not a model\. Give the model's folder"):
        Checkpoint.open(tmp_path)

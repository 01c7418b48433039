"""Channels of zeros: the same logits, and every layer in GPTQ's format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import PlanError, RecipeError
from edgepress.checkpoints.families import PRESETS, shape_from_config
from edgepress.checkpoints.forms import Grid
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.shape import Pattern, with_pattern
from edgepress.checkpoints.tokens import TokenBatches
from edgepress.checkpoints.writer import CheckpointWriter
from edgepress.pipeline.recipe import build
from edgepress.stages import gptq, pad
from edgepress.stages.options import Gptq, Pad

pytestmark = pytest.mark.unit

RUNTIME = Runtime(torch.device("cpu"), torch.float32)
NOTHING = TokenBatches("none", torch.empty(0, 0, dtype=torch.int64))


@pytest.mark.parametrize(
    ("family", "more"),
    [("llama", {}), ("llama", {"mlp_bias": True}), ("phi3", {}), ("gemma3_text", {})],
    ids=["llama", "biases", "fused", "gemma3"],
)
def test_the_padded_model_computes_the_same(
    tiny_model: Callable[..., Path], tmp_path: Path, family: str, more: dict[str, Any]
) -> None:
    folder = tiny_model(family, intermediate_size=76, **more)
    source = Checkpoint.open(folder)
    facts = pad.run(source, CheckpointWriter(tmp_path / "out", source.shape.block_prefix), NOTHING, Pad(32), RUNTIME)
    result = Checkpoint(tmp_path / "out", None)
    planned = pad.plan(source.shape, Pad(32))
    assert facts == {"width_before": 76, "width": 96}
    assert result.config["intermediate_size"] == 96
    assert result.shape.file_bytes == planned.file_bytes == result.facts()["file_bytes"]
    ids = torch.arange(3, 43).view(2, 20)
    with torch.no_grad():
        before = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
        after = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits
    torch.testing.assert_close(after, before, rtol=1e-5, atol=2e-5)
    # Nothing but zeros came in.
    old, new = source.block(0), result.block(0)
    assert all(new[name].count_nonzero() == old[name].count_nonzero() for name in old)
    assert all(new[name].sum() == pytest.approx(float(old[name].sum()), abs=1e-3) for name in old)


def test_stories260k_is_quantised_completely() -> None:
    shape = shape_from_config(PRESETS["stories260k"])
    assert gptq.left_dense(shape, Grid(4, 32)) == ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"]
    wider = pad.plan(shape, Pad(32))
    assert wider.number("intermediate_size") == 192
    assert gptq.left_dense(wider, Grid(4, 32)) == []
    after = gptq.plan(wider, Gptq(quant="gptq4"))
    assert all(x.grid is not None for block in after.blocks for x in block.linears)
    assert pad.remarks(shape, Pad(32)) == ["pad: the feed-forward width grows from 172 to 192 by channels of zeros"]
    assert "already" in pad.remarks(wider, Pad(32))[0]


def test_what_cannot_be_padded() -> None:
    shape = shape_from_config(PRESETS["stories260k"])
    with pytest.raises(PlanError, match="put pad before wanda and gptq"):
        pad.plan(with_pattern(shape, Pattern(2, 4)), Pad(32))
    block = shape.blocks[0]
    odd = replace(block, linears=(*block.linears[:-1], replace(block.linears[-1], name="mlp.experts_down")))
    with pytest.raises(PlanError, match=r"mlp\.experts_down"):
        pad.plan(replace(shape, blocks=(odd, *shape.blocks[1:])), Pad(32))
    with pytest.raises(PlanError, match="--pad-ffn -1"):
        Pad(-1)
    assert Pad().skipped
    with pytest.raises(RecipeError, match="--eora-against dense needs the uncompressed model's widths"):
        build(None, {"pad.multiple": 32, "eora.against": "dense"})

"""QQQ's smoothing before w4a8: the same model, the threshold of the least error, the mask, and outlier inputs gain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.forms import Grid
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.scaling import rescaled, scaled_folders
from edgepress.checkpoints.shape import Pattern
from edgepress.checkpoints.tokens import TokenBatches
from edgepress.checkpoints.walk import Walk
from edgepress.checkpoints.writer import CheckpointWriter, prove_pattern
from edgepress.stages import eora, gptq
from edgepress.stages.options import Eora, Gptq, decisive
from edgepress.stages.quantisers import w4a8

pytestmark = pytest.mark.unit

RUNTIME = Runtime(chunk_tokens=48)
PLAIN, SMOOTH = Gptq(quant="w4a8", group=32), Gptq(quant="w4a8", group=32, smooth=True)


def outlying(model: Any) -> None:
    """A few channels with numbers many times as large, as language models have them; their columns make up for it.

    Of a LLaMA model two weights in every four are zero.
    """
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        if model.config.model_type == "llama":
            for linear in (m for m in layer.modules() if isinstance(m, torch.nn.Linear)):
                fours = linear.weight.view(-1, 4)
                fours.scatter_(1, fours.abs().argsort(1)[:, :2], 0.0)
        layer.input_layernorm.weight[5::32] += 100
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
            linear.weight[:, 5::32] /= 100
        getattr(layer, "pre_feedforward_layernorm", layer.post_attention_layernorm).weight[5::32] += 100
        for linear in (mlp.gate_proj, mlp.up_proj):
            linear.weight[:, 5::32] /= 100
        attention.v_proj.weight[3::16] *= 40
        attention.o_proj.weight[:, 3::16] /= 40
        mlp.up_proj.weight[7::64] *= 40
        mlp.down_proj.weight[:, 7::64] /= 40


def by_hand(layers: list[Tensor], x: Tensor, s: Tensor) -> float:
    """Squared error of the outputs with inputs token by token at 8 bits and weights group by group at 4."""
    total = 0.0
    for W in layers:
        a, w = x / s, (W * s).view(len(W), -1, 32)
        step = a.abs().amax(1, keepdim=True) / 127
        grain = (2 * w.abs().amax(2, keepdim=True) / 15).half().float()
        codes = (w / grain).round().clamp(-8, 7)
        total += float(((a / step).round() * step @ (codes * grain).view_as(W).T - x @ W.T).square().sum())
    return total


def test_the_search_takes_the_best_threshold() -> None:
    """Against the formula, threshold after threshold; channels below it are left alone."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 64, generator=generator)
    x[:, 9] *= 60
    x[:, 40] *= 25
    layers = [torch.randn(rows, 64, generator=generator) for rows in (32, 16)]
    peaks = x.abs().amax(0)
    t, s = w4a8.search([(W, Grid(4, 32, symmetric=True)) for W in layers], x, peaks)
    thresholds = [float(peaks.max()) / 2 ** (step / 2) for step in range(1, 21)]
    scales = [(peaks / threshold).clamp(min=1) for threshold in thresholds]
    errors = [by_hand(layers, x, scale) for scale in scales if not (scale > 1).all()]
    best = min(range(len(errors)), key=errors.__getitem__)
    assert t == pytest.approx(thresholds[best]) and errors[best] < 0.6 * by_hand(layers, x, torch.ones(64))
    torch.testing.assert_close(s, scales[best])
    assert int((s > 1).sum()) < 40 and s[9] > s[40] > 1


def test_inputs_that_gain_nothing_are_left_alone() -> None:
    """Every number the largest: nothing to divide. And nothing comes in at all."""
    weight, grid = torch.randn(16, 32, generator=torch.Generator().manual_seed(1)), Grid(4, 32, symmetric=True)
    for x in (torch.ones(5, 32), torch.zeros(5, 32)):
        t, s = w4a8.search([(weight, grid)], x, x.abs().amax(0))
        assert t == 0 and torch.equal(s, torch.ones(32))


@pytest.mark.parametrize("family", ["llama", "qwen2", "smollm3", "gemma3"])
def test_the_block_is_what_it_was_and_no_input_passes_its_threshold(
    family: str, build: Callable[..., Checkpoint], tokens: Callable[..., TokenBatches]
) -> None:
    places: set[str | None] = set()
    grid = Grid(4, 32, symmetric=True)
    for block in Walk(build(family, blocks=3, edit=outlying), tokens(4).chunks(48), RUNTIME):
        was = [block.forward(states, {}) for states in block.inputs]
        dense = {name: linear.weight.clone() for name, linear in block.linears.items()}
        before = peaks(block)
        found = w4a8.smooth(block, dict.fromkeys(block.linears, grid))
        after = peaks(block)
        for states, expected in zip(block.inputs, was, strict=True):
            torch.testing.assert_close(block.forward(states, {}), expected, rtol=1e-3, atol=1e-3)
        for name, layer in found.items():
            places.add(layer.folded)
            assert (layer.folded is None) == (layer.threshold == layer.channels == 0)
            assert torch.equal(block.linears[name].weight, layer.weight)
            columns = layer.factors.get("columns", torch.ones_like(before[name]))
            rows = layer.factors.get("rows", torch.ones(len(layer.weight)))
            torch.testing.assert_close(layer.weight, dense[name] * rows.unsqueeze(1) * columns)
            torch.testing.assert_close(after[name], before[name] / columns, rtol=1e-3, atol=1e-3)
            if layer.folded is not None:
                assert float(after[name].max()) <= layer.threshold * 1.001
                alone = (
                    before[name] < layer.threshold / 40 if name.endswith("o_proj") else before[name] < layer.threshold
                )
                torch.testing.assert_close(columns[alone], torch.ones_like(columns[alone]))
        block.done()
    norm = "pre_feedforward_layernorm" if family == "gemma3" else "post_attention_layernorm"
    assert {"input_layernorm", norm, "mlp.up_proj"} <= places


def peaks(block: Any) -> dict[str, Tensor]:
    """Of each layer's inputs, the largest number of each channel."""
    return {name: found for names, (_, found) in w4a8.observed(block).items() for name in names}


@pytest.fixture(scope="module")
def source(build: Any, seal: Any, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Outlying channels, and a manifest that says 2:4."""
    dense = build("llama", blocks=3, edit=outlying)
    target = CheckpointWriter(tmp_path_factory.mktemp("masked"))
    for index in range(3):
        target.write_block(index, dense.block(index))
    target.copy_outer(dense)
    target.finish(dense.config, dense)
    made: Checkpoint = seal(target, dense, pattern="2:4")
    return made


def logits(checkpoint: Checkpoint) -> Tensor:
    ids = torch.arange(3, 99).view(4, 24)
    with torch.no_grad():
        found: Tensor = checkpoint.model()(input_ids=ids).logits
    return found


@pytest.mark.parametrize("effort", ["normal", "high"])
def test_outlying_inputs_gain_and_the_mask_holds(
    effort: str,
    source: Checkpoint,
    tokens: Callable[..., TokenBatches],
    seal: Callable[..., Checkpoint],
    tmp_path: Path,
) -> None:
    errors, wanted = {}, logits(source)
    for plain in (PLAIN, SMOOTH):
        options = replace(plain, effort=effort, effort_steps=8)
        target = CheckpointWriter(tmp_path / options.label)
        facts = gptq.run(source, target, tokens(8), options, RUNTIME)
        made = seal(target, source, pattern="2:4")
        assert made.shape.blocks == gptq.plan(source.shape, options).blocks and made.shape.activation_bits == 8
        assert prove_pattern(made, Pattern(2, 4), source)["holds"]
        for index, block in enumerate(source.shape.blocks):
            for x in block.linears:
                gone = source.block(index)[f"{x.name}.weight"] == 0
                assert not bool(made.block(index)[f"{x.name}.weight"][gone].any())
        errors[options.smooth] = float((logits(made) - wanted).norm() / wanted.norm())
        told = [layer for block in facts["blocks"] for name, layer in block.items() if name != "refined"]
        assert all(("smoothed_channels" in layer) == options.smooth for layer in told)
    assert sum(layer["smoothed_channels"] > 0 for layer in told) > len(told) / 2
    assert errors[True] < 0.7 * errors[False]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["w4a8", "w4a8-smooth"]


def test_eora_answers_the_smoothed_weights(
    source: Checkpoint,
    tokens: Callable[..., TokenBatches],
    writer: CheckpointWriter,
    seal: Callable[..., Checkpoint],
    tmp_path: Path,
) -> None:
    gptq.run(source, writer, tokens(8), SMOOTH, RUNTIME)
    quantised = seal(writer, source, pattern="2:4")
    for index in range(3):
        dense, present = rescaled(scaled_folders(quantised), index, source.block(index)), quantised.block(index)
        for x in quantised.shape.blocks[index].linears:
            exact = dense[f"{x.name}.weight"]
            assert float((present[f"{x.name}.weight"] - exact).norm() / exact.norm()) < 0.3, x.name
    facts = eora.run(quantised, CheckpointWriter(tmp_path / "eora"), tokens(8), Eora(rank=16), RUNTIME)
    assert facts["total"]["error_after"] < 0.7 * facts["total"]["error_before"]


def test_it_is_forecast_and_refused_where_inputs_are_not_rounded() -> None:
    from edgepress.checkpoints.families import PRESETS, shape_from_config

    shape = shape_from_config(PRESETS["smollm2-135m"])
    plain, smooth = (gptq.cost(shape, options) for options in (PLAIN, SMOOTH))
    assert smooth.peak_memory_bytes - plain.peak_memory_bytes == pytest.approx(4 * 3_540_000, rel=0.01)
    assert plain.operations < smooth.operations < 2 * plain.operations
    assert "smooth" not in decisive(PLAIN) and decisive(SMOOTH)["smooth"] is True
    for quant in ("gptq4", "awq4", "none"):
        with pytest.raises(PlanError, match=f"give --quant w4a8 with it, not {quant}"):
            Gptq(quant=quant, smooth=True)

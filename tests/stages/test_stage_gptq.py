"""Stage gptq on tiny models: the Hessians it sees, what it writes, and the plans it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import NumericsError, PlanError
from edgepress.checkpoints.families import PRESETS, shape_from_config
from edgepress.checkpoints.forms import Grid
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.tokens import TokenBatches
from edgepress.checkpoints.walk import Walk
from edgepress.checkpoints.writer import CheckpointWriter
from edgepress.stages import edge, gptq
from edgepress.stages.hessian import hessians, of_head
from edgepress.stages.options import Gptq, decisive
from tests.models import ALL_FAMILIES, build_model

pytestmark = pytest.mark.unit

RUNTIME = Runtime(chunk_tokens=48)


# --- the stage ------------------------------------------------------------------------------------------------------


def gram_by_hooks(model: Any, index: int, chunks: list[Tensor]) -> dict[str, Tensor]:
    sums: dict[str, Tensor] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(_: Any, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].flatten(0, 1)
            sums[name] = sums.get(name, torch.zeros(x.shape[1], x.shape[1], dtype=x.dtype)) + x.T @ x

        return hook

    layer = model.model.layers[index]
    handles = [
        m.register_forward_pre_hook(record(n)) for n, m in layer.named_modules() if isinstance(m, torch.nn.Linear)
    ]
    with torch.no_grad():
        for ids in chunks:
            model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return sums


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_hessians_equal_hooks_on_the_whole_model(
    family: str, build: Callable[..., Checkpoint], tokens: Callable[..., TokenBatches]
) -> None:
    source, chunks = build(family), tokens(5).chunks(48)
    model = source.model().double()
    for block in Walk(source, chunks, RUNTIME):
        expected = gram_by_hooks(model, block.index, chunks)
        found = hessians(block)
        assert sorted(name for names in found for name in names) == sorted(expected)
        assert len(found) == 4
        for names, hessian in found.items():
            assert hessian.dtype == torch.float32
            for name in names:
                size = float(expected[name].abs().max())
                torch.testing.assert_close(hessian.double(), expected[name], rtol=1e-4, atol=1e-5 * size)
        block.done()


def test_the_stage_quantises_each_block_behind_the_quantised_ones_and_keeps_the_mask(
    masked: Checkpoint, tokens: Callable[..., TokenBatches], writer: CheckpointWriter, seal: Callable[..., Checkpoint]
) -> None:
    ids, options = tokens(8), Gptq(group=32)
    facts = gptq.run(masked, writer, ids, options, RUNTIME)
    result = seal(writer, masked, pattern="2:4")
    planned = gptq.plan(masked.shape, options)
    assert result.shape.grid == planned.grid == Grid(4, 32, False)
    assert result.facts()["file_bytes"] == planned.file_bytes

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(masked.folder, dtype=torch.float32).eval()
    for index in range(3):
        grams = gram_by_hooks(model, index, ids.chunks(48))
        before, after = masked.block(index), result.block(index)
        for name, gram in grams.items():
            weight, quantised = before[f"{name}.weight"], after[f"{name}.weight"]
            assert bool((quantised[weight == 0] == 0).all())
            delta = (weight - quantised).double()
            error = float(((delta @ gram.double()) * delta).sum() / ((weight @ gram) * weight).sum())
            assert 0 < error < 0.02
            # had the stage seen other inputs than these, its own number would differ
            assert facts["blocks"][index][name]["error"] == pytest.approx(error, rel=1e-3)
            model.model.layers[index].get_submodule(name).weight.data = quantised.clone()
        for name in before.keys() - {f"{n}.weight" for n in grams}:
            assert torch.equal(before[name], after[name])


def test_a_singular_hessian_names_the_layer(
    build: Callable[..., Checkpoint],
    tokens: Callable[..., TokenBatches],
    writer: CheckpointWriter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = hessians

    def spoilt(block: Any) -> dict[tuple[str, ...], Tensor]:
        found = real(block)
        if block.index == 1:
            found["mlp.down_proj",].neg_()
        return found

    monkeypatch.setattr("edgepress.stages.quantisers.gptq.hessians", spoilt)
    with pytest.raises(NumericsError, match=r"1\.mlp\.down_proj.*stays singular.*damping tried"):
        gptq.run(build("llama", blocks=3), writer, tokens(), Gptq(group=32), RUNTIME)


def test_embedding_codes_stand_for_the_stored_embedding(
    build: Callable[..., Checkpoint],
    tokens: Callable[..., TokenBatches],
    writer: CheckpointWriter,
    seal: Callable[..., Checkpoint],
) -> None:
    from safetensors.torch import load_file

    source, options = build("llama", blocks=3), Gptq(group=32, quant_embeddings=4)
    gptq.run(source, writer, tokens(), options, RUNTIME)
    result = seal(writer, source)
    assert result.shape.embedding_bits == 4
    assert result.facts()["file_bytes"] == gptq.plan(source.shape, options).file_bytes
    packed = load_file(writer.folder / "edge" / "embedding.safetensors")
    codes = packed["model.embed_tokens.codes"]
    wide = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1).float()
    stands_for = wide * packed["model.embed_tokens.scales"].float() + packed["model.embed_tokens.minimum"].float()
    assert torch.equal(result.outer()["model.embed_tokens.weight"], stands_for)
    assert torch.equal(result.outer()["model.norm.weight"], source.outer()["model.norm.weight"])


@pytest.mark.parametrize("family", sorted(ALL_FAMILIES))
def test_the_heads_hessian_is_of_what_its_matrix_multiplies(
    family: str, tmp_path: Path, tokens: Callable[..., TokenBatches]
) -> None:
    build_model(family).save_pretrained(tmp_path)
    source, chunks = Checkpoint.open(tmp_path), tokens(5).chunks(48)
    walk = Walk(source, chunks, RUNTIME, last_outputs=True)
    for block in walk:
        block.done()
    found = of_head(walk.skeleton, walk.states.chunks)
    model, seen = source.model(), list[Tensor]()
    model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, 1)))
    with torch.no_grad():
        for ids in chunks:
            model(input_ids=ids)
    x = torch.cat(seen)
    torch.testing.assert_close(found, x.T @ x, rtol=1e-4, atol=1e-4 * float((x.T @ x).abs().max()))


def test_embedding_codes_lose_less_of_the_logits_by_gptq_and_are_the_nearest_if_asked(
    build: Callable[..., Checkpoint],
    tokens: Callable[..., TokenBatches],
    tmp_path: Path,
    seal: Callable[..., Checkpoint],
) -> None:
    source, batches = build("llama", blocks=2), tokens(16)
    walk = Walk(source, batches.chunks(48), RUNTIME, last_outputs=True)
    for block in walk:
        block.done()
    hessian, errors = of_head(walk.skeleton, walk.states.chunks), dict[str, float]()
    dense = source.outer()["model.embed_tokens.weight"].float()
    for codes in ("", "nearest"):
        options = Gptq(group=32, quant_embeddings=4, embedding_codes=codes)
        assert ("embedding_codes" in decisive(options)) == (not codes), "stores of the nearest codes stay what they are"
        target = CheckpointWriter(tmp_path / (codes or "gptq"))
        gptq.run(source, target, batches, options, RUNTIME)
        delta = seal(target, source).outer()["model.embed_tokens.weight"].float() - dense
        errors[codes] = float(((delta @ hessian) * delta).sum())
    assert errors[""] < 0.8 * errors["nearest"]
    plain = edge.quantise_outer(source.outer(), 4)[0]["model.embed_tokens.weight"].float() - dense
    assert errors["nearest"] == pytest.approx(float(((plain @ hessian) * plain).sum()))


def test_codes_of_the_head_are_the_same_after_an_interruption_behind_the_last_block(
    build: Callable[..., Checkpoint],
    tokens: Callable[..., TokenBatches],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, options = build("llama", blocks=3), Gptq(group=32, quant_embeddings=4)
    whole, cut = CheckpointWriter(tmp_path / "whole"), CheckpointWriter(tmp_path / "cut")
    gptq.run(source, whole, tokens(), options, RUNTIME)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(edge, "quantise_outer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            gptq.run(source, cut, tokens(), options, RUNTIME)
    gptq.run(source, CheckpointWriter(cut.folder), tokens(), options, RUNTIME)
    for name in ("edge/embedding.safetensors", "config.json"):
        assert (cut.folder / name).read_bytes() == (whole.folder / name).read_bytes()


# --- plans ----------------------------------------------------------------------------------------------------------


def test_plan_chooses_the_group_that_fits_and_says_so() -> None:
    shape = shape_from_config(PRESETS["smollm2-135m"])
    assert gptq.plan(shape, Gptq()).grid == Grid(4, 32)
    assert gptq.plan(shape, Gptq(group=128)).grid == Grid(4, 64)
    assert gptq.remarks(shape, Gptq(group=128)) == ["gptq: groups of 64: 128 does not divide every layer"]
    assert gptq.remarks(shape, Gptq(group=64)) == gptq.remarks(shape, Gptq()) == []
    assert gptq.plan(shape, Gptq(group=-1)).grid == Grid(4, -1)


def test_plan_says_that_the_nearest_codes_of_embeddings_lose_more() -> None:
    shape = shape_from_config(PRESETS["smollm2-135m"])
    for quant, codes, said in [("gptq4", "", False), ("gptq4", "nearest", True), ("int4", "", True)]:
        options = Gptq(quant, quant_embeddings=4, embedding_codes=codes)
        assert any("nearest 4-bit codes" in remark for remark in gptq.remarks(shape, options)) == said
    assert not any("nearest" in remark for remark in gptq.remarks(shape, Gptq(quant_embeddings=8)))


def test_plan_leaves_layers_that_the_format_cannot_hold() -> None:
    shape = shape_from_config(PRESETS["stories260k"])  # 172 is no multiple of 32
    planned = gptq.plan(shape, Gptq())
    dense = {x.name for block in planned.blocks for x in block.linears if x.grid is None}
    assert dense == {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
    assert gptq.left_dense(shape, Grid(4, 32)) == sorted(dense)
    assert any(
        "mlp.down_proj" in remark and "stay in 16 or 32 bits" in remark for remark in gptq.remarks(shape, Gptq())
    )
    dynamic = planned.config["quantization_config"]["dynamic"]
    assert set(dynamic) == {rf"-:.*{name}$".replace("mlp.", r"mlp\.") for name in dense}


def test_plan_refuses_what_cannot_be() -> None:
    shape = shape_from_config(PRESETS["smollm2-135m"])
    with pytest.raises(PlanError, match="already quantised"):
        gptq.plan(gptq.plan(shape, Gptq()), Gptq())
    narrow = PRESETS["stories260k"] | {"hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 5}
    with pytest.raises(PlanError, match="no layer of this model has sides that are multiples of 32"):
        gptq.plan(shape_from_config(narrow), Gptq())

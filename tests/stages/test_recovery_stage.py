"""The lora stage with every method: what was trained is what is stored, masks hold, training resumes, plans refuse."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import CheckpointError, PlanError
from edgepress.checkpoints.families import PRESETS, shape_from_config
from edgepress.checkpoints.masks import holds
from edgepress.checkpoints.quiet import quiet_import
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.shape import Pattern
from edgepress.checkpoints.writer import CheckpointWriter
from edgepress.stages import eora, gptq, lora, training
from edgepress.stages.options import Eora, Gptq, Lora
from tests.stages.lora_help import Watcher, mean_loss, options, text, weights

pytestmark = pytest.mark.unit

RUNTIME = Runtime()
MERGED = ["rslora", "dora", "ia3"]
BESIDE = ["qlora+rslora", "qlora+dora", "qlora+ia3", "loftq"]
DENSE = shape_from_config(PRESETS["smollm2-135m"])
PACKED = gptq.plan(DENSE, Gptq())


@pytest.fixture(scope="module")
def packed(
    masked: Checkpoint, tokens: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory, seal: Any
) -> Checkpoint:
    """The 2:4 model at 4 bits, and the dense one it was made from behind it."""
    target = CheckpointWriter(tmp_path_factory.mktemp("packed"))
    gptq.run(masked, target, tokens(), Gptq(group=32, scale_search=False), RUNTIME)
    sealed: Checkpoint = seal(target, masked, pattern="2:4")
    return sealed


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """The logits of the model in memory when its training was over."""
    seen: dict[str, Tensor] = {}
    real = training.train

    def spy(model: Any, *rest: Any) -> Any:
        with torch.no_grad():
            seen["before"] = model.eval()(input_ids=text().ids).logits
        result = real(model.train(), *rest)
        with torch.no_grad():
            seen["after"] = model.eval()(input_ids=text().ids).logits
        return result

    monkeypatch.setattr(training, "train", spy)
    return seen


@torch.no_grad()
def logits(checkpoint: Checkpoint) -> Tensor:
    return checkpoint.model()(input_ids=text().ids).logits


def chosen(method: str, **changes: Any) -> Lora:
    return options(method=method, targets="all", learning_rate=2e-2, **changes)


@pytest.mark.parametrize("method", MERGED)
def test_merged_is_what_was_trained_and_the_mask_is_exact(
    method: str, masked: Checkpoint, writer: CheckpointWriter, seal: Any, trained: dict[str, Tensor]
) -> None:
    facts = lora.run(masked, writer, text(), chosen(method), RUNTIME)
    merged = seal(writer, masked, pattern="2:4")
    torch.testing.assert_close(trained["before"], logits(masked), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(merged), trained["after"], rtol=1e-4, atol=1e-4)
    assert mean_loss(merged, text().ids) < 0.99 * mean_loss(masked, text().ids)
    assert merged.shape == lora.plan(masked.shape, chosen(method))
    assert not list(merged.folder.glob("adapter*"))
    assert (facts["method"], facts["added_bytes"]) == (method, 0)
    for index, block in enumerate(masked.shape.blocks):
        old, new = masked.block(index), merged.block(index)
        for linear in block.linears:
            key = f"{linear.name}.weight"
            assert torch.equal(new[key] == 0, old[key] == 0)
            assert holds(new[key], Pattern(2, 4))
            assert not torch.signbit(new[key][new[key] == 0]).any()  # a packed image leaves out +0 alone
            assert not torch.equal(new[key], old[key])


def test_ia3_merges_into_biases_too(
    build: Callable[..., Checkpoint], writer: CheckpointWriter, seal: Any, trained: dict[str, Tensor]
) -> None:
    source = build("qwen2", blocks=2)
    lora.run(source, writer, text(), chosen("ia3"), RUNTIME)
    merged = seal(writer, source)
    torch.testing.assert_close(logits(merged), trained["after"], rtol=1e-4, atol=1e-4)
    name = "self_attn.q_proj.bias"
    assert not torch.equal(merged.block(1)[name], source.block(1)[name])


@pytest.mark.parametrize("method", BESIDE)
def test_beside_packed_weights_is_what_was_trained_and_peft_reads_it(
    method: str, packed: Checkpoint, writer: CheckpointWriter, seal: Any, trained: dict[str, Tensor]
) -> None:
    facts = lora.run(packed, writer, text(), chosen(method), RUNTIME)
    result = seal(writer, packed, pattern="2:4")
    torch.testing.assert_close(logits(result), trained["after"], rtol=1e-4, atol=1e-4)
    assert mean_loss(result, text().ids) < 0.99 * mean_loss(packed, text().ids)
    if "loftq" in method:
        assert not torch.allclose(trained["before"], logits(packed), atol=1e-3)
    else:
        torch.testing.assert_close(trained["before"], logits(packed), rtol=1e-4, atol=1e-4)

    planned = lora.plan(packed.shape, chosen(method))
    assert result.shape.blocks == planned.blocks
    files = sum(path.stat().st_size for path in result.folder.rglob("*.safetensors"))
    assert files == planned.file_bytes == result.shape.file_bytes
    added = sum(t.nbytes for t in planned.adapter_tensors())
    assert facts["added_bytes"] == added
    assert facts["trainable_parameters"] == planned.parameters_total - packed.shape.parameters_total
    base = packed.model()
    for index, block in enumerate(packed.shape.blocks):
        for linear in block.linears:
            before, after = packed.base_weight(index, linear), result.base_weight(index, linear)
            assert torch.equal(after == 0, before == 0) or "loftq" in method
            assert not bool((after[before == 0]).any())  # an N:M pattern's zeros, and every other one
            assert torch.equal(after, before) == ("loftq" not in method)
            base.get_submodule(f"model.layers.{index}.{linear.name}").weight.copy_(after)
    assert facts.get("requantised_layers", 0) == ("loftq" in method) * len(packed.shape.blocks) * 7

    with quiet_import():
        from peft import PeftModel

        read = PeftModel.from_pretrained(base, result.folder)
    with torch.no_grad():
        torch.testing.assert_close(read(input_ids=text().ids).logits, logits(result), rtol=1e-4, atol=1e-4)


def test_loftq_begins_nearer_to_the_dense_model(packed: Checkpoint, masked: Checkpoint) -> None:
    def distance(method: str, **more: Any) -> float:
        _, layers, starts = lora.adapted(packed, chosen(method, rank=8, **more), RUNTIME)
        adapter, total = Lora(method=method).recovery.adapter, 0.0
        for name, layer in layers.items():
            prefix, index, base = name.split(".", 3)[0:2], int(name.split(".")[2]), name.split(".", 3)[3]
            assert prefix == ["model", "layers"]
            begun = layer.base_layer.weight + adapter.change(layer)["weight"]
            total += float((masked.block(index)[f"{base}.weight"] - begun).detach().square().sum())
        if starts:
            assert sum(start.errors[-1] for start in starts.values()) == pytest.approx(total, rel=1e-3)
        return total

    assert distance("loftq", loftq_steps=1) < 0.8 * distance("qlora")
    assert distance("loftq", loftq_steps=2) < 0.97 * distance("loftq", loftq_steps=1)
    assert distance("loftq") < 0.99 * distance("loftq", loftq_steps=2)
    assert distance("loftq", packed=True) == pytest.approx(distance("loftq"), rel=1e-6)
    assert distance("dora+loftq") == pytest.approx(distance("loftq"), rel=1e-3)


def test_one_turn_of_loftq_keeps_the_quantiser_s_codes(packed: Checkpoint, writer: CheckpointWriter, seal: Any) -> None:
    facts = lora.run(packed, writer, text(), chosen("loftq", loftq_steps=1), RUNTIME)
    result = seal(writer, packed, pattern="2:4")
    assert (facts["requantised_layers"], len(facts["start_errors"])) == (0, 1)
    for index, block in enumerate(packed.shape.blocks):
        for x in block.linears:
            assert torch.equal(result.base_weight(index, x), packed.base_weight(index, x))
    # The forecast knows that the shards are shared then, and that they are not with more turns.
    linked = [lora.cost(packed.shape, chosen("loftq", loftq_steps=n)).linked_bytes for n in (1, 5)]
    assert linked[0] - linked[1] == sum(packed.shape.shard_bytes())


@pytest.mark.parametrize("quant", ["gptq4-channel", "int8", "int4", "hqq4", "hqq2", "nf4", "nf4-thesis", "gptq3-s"])
def test_loftq_comes_nearer_with_every_turn_in_every_form(
    quant: str, build: Callable[..., Checkpoint], tokens: Callable[..., Any], tmp_path: Path, seal: Any
) -> None:
    source = build("llama", blocks=1)
    target = CheckpointWriter(tmp_path / "coded")
    gptq.run(source, target, tokens(), Gptq(quant=quant, group=32, scale_search=False), RUNTIME)
    coded = seal(target, source)
    made = CheckpointWriter(tmp_path / "made")
    facts = lora.run(coded, made, text(), chosen("loftq", rank=8, steps=1), RUNTIME)
    errors, least = facts["start_errors"], 0.999 if quant != "int8" else 1.0
    assert len(errors) == 5 and errors == sorted(errors, reverse=True)
    assert errors[4] < least * errors[0]
    result = seal(made, coded)
    assert result.shape.blocks == lora.plan(coded.shape, chosen("loftq", rank=8)).blocks


def test_loftq_after_awq_compares_weights_that_were_scaled_alike(
    masked: Checkpoint, tokens: Callable[..., Any], tmp_path: Path, seal: Any
) -> None:
    target = CheckpointWriter(tmp_path / "awq")
    gptq.run(masked, target, tokens(), Gptq(quant="awq4", group=32, scale_search=False), RUNTIME)
    scaled: Checkpoint = seal(target, masked, pattern="2:4")
    model, layers, _ = lora.adapted(scaled, chosen("qlora"), RUNTIME)
    with torch.no_grad():
        for _, _, name, wanted, present in lora.before_and_after(scaled, layers):
            layers[name].base_layer.weight += wanted - present
        # with its errors given back, the quantised model is the dense one
        found = model.eval()(input_ids=text().ids).logits
    torch.testing.assert_close(found, logits(masked), rtol=1e-3, atol=1e-3)


def test_loftq_needs_the_weights_from_before(packed: Checkpoint, writer: CheckpointWriter, tmp_path: Path) -> None:

    alone = tmp_path / "alone"
    shutil.copytree(packed.folder, alone)
    (alone / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="has no dense ancestor in the store"):
        lora.run(Checkpoint.open(alone), writer, text(), chosen("loftq"), RUNTIME)


# --- resuming, distilling -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "die_at"), [("dora", 7), ("rslora+loftq", 8)])
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    method: str, die_at: int, masked: Checkpoint, packed: Checkpoint, tmp_path: Path
) -> None:
    """Steps are saved at 3, 6 and the last, 8; the best of the held-out checks is the one that stays."""
    source = packed if chosen(method).recovery.quantised else masked
    whole, cut = CheckpointWriter(tmp_path / "whole"), CheckpointWriter(tmp_path / "cut")
    facts = lora.run(source, whole, text(), chosen(method), RUNTIME)
    with pytest.raises(KeyboardInterrupt):
        lora.run(source, cut, text(), chosen(method), Runtime(progress=Watcher(die_at)))
    watcher = Watcher()
    again = lora.run(source, CheckpointWriter(cut.folder), text(), chosen(method), Runtime(progress=watcher))
    assert watcher.planned == [("lora", 8 - (die_at - 1) // 3 * 3)]
    assert again["losses"] == facts["losses"]
    assert weights(cut.folder) == weights(whole.folder)


def test_the_uncompressed_model_teaches_beside_packed_weights(
    packed: Checkpoint, writer: CheckpointWriter, seal: Callable[..., Checkpoint]
) -> None:
    facts = lora.run(packed, writer, text(), chosen("qlora+dora", distill=1.0, teacher="streamed"), RUNTIME)
    result = seal(writer, packed, pattern="2:4")
    *_, root = packed.ancestors()
    wanted = logits(root).log_softmax(-1)

    def divergence(checkpoint: Checkpoint) -> float:
        own = logits(checkpoint).log_softmax(-1)
        return float((wanted.exp() * (wanted - own)).sum(-1)[:4, :-1].mean())

    assert facts["losses"][0] == pytest.approx(divergence(packed), rel=1e-3)
    assert divergence(result) < divergence(packed)


# --- plans ----------------------------------------------------------------------------------------------------------


def test_plans_refuse_what_cannot_be_and_name_what_works() -> None:
    def refused(shape: Any, method: str, **more: Any) -> str:
        with pytest.raises(PlanError) as caught:
            lora.plan(shape, Lora(method=method, **more))
        return str(caught.value)

    assert refused(DENSE, "loftq") == (
        "--recover loftq trains on quantised weights, and no quantiser comes before lora. Put gptq before it "
        "(--quant gptq4), or merge into dense weights with --recover lora"
    )
    assert refused(DENSE, "qlora+dora+rslora").endswith("--recover dora+rslora")
    assert refused(PACKED, "ia3").endswith("--recover qlora+ia3 trains beside quantised weights and merges nothing")
    assert "--recover qlora+rslora" in refused(PACKED, "rslora")
    carried = lora.plan(PACKED, Lora(method="qlora+ia3"))
    assert "an adapter lies beside these weights already" in refused(carried, "qlora")
    assert "an adapter lies beside these weights already" in refused(eora.plan(PACKED, Eora()), "qlora")
    assert "qlora" not in refused(carried, "dora")  # where it would not help
    with pytest.raises(PlanError, match="already carries an adapter"):
        eora.plan(carried, Eora())
    assert refused(PACKED, "loftq", rank=200) == "--lora-rank 200: the smallest layer to adapt has rank 192"
    assert refused(PACKED, "qlora", targets="wo").startswith("--lora-targets wo: this model's blocks have")
    lora.plan(PACKED, Lora(method="qlora", rank=200))


def test_an_ia3_adapter_alone_is_seen_by_stages_that_need_dense_weights() -> None:
    beside = (replace(b, linears=tuple(replace(x, adapter_vector="rows") for x in b.linears)) for b in DENSE.blocks)
    with pytest.raises(PlanError, match="this checkpoint carries an adapter beside its weights"):
        gptq.plan(replace(DENSE, blocks=tuple(beside)), Gptq())


def test_remarks_say_where_weights_lie_and_what_the_adapter_fills() -> None:
    pruned = replace(
        PACKED,
        blocks=tuple(
            replace(b, linears=tuple(replace(x, pattern=Pattern(2, 4)) for x in b.linears)) for b in PACKED.blocks
        ),
    )
    first, second = lora.remarks(pruned, Lora(method="qlora"))
    assert "stay packed on the disk and are dense in memory" in first
    assert second == "lora: the 2:4 zeros stay in the packed weights; the adapter beside them is dense"
    said = list(lora.remarks(pruned, Lora(method="qlora+ia3")))
    assert "peft computes ia3 beside dequantised weights, not with GPTQ's kernels" in said[-1]
    assert not any("zeros" in line for line in said)  # its factors fill none


# --- packed while it trains -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", BESIDE)
def test_packed_weights_train_the_same_adapter(method: str, packed: Checkpoint, tmp_path: Path, seal: Any) -> None:
    """And every zero of the 2:4 pattern is one afterwards."""
    losses, trained = {}, {}
    for keep in (False, True):
        writer = CheckpointWriter(tmp_path / str(keep))
        losses[keep] = lora.run(packed, writer, text(), chosen(method, packed=keep, dropout=0.1), RUNTIME)["losses"]
        trained[keep] = load_file(writer.folder / "adapter_model.safetensors")
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)
    for name, tensor in trained[False].items():
        # As a whole: Adam makes a step of a gradient that is all rounding, in single numbers.
        assert float((trained[True][name] - tensor).norm()) <= 1e-3 * float(tensor.norm()) + 1e-5
    result = seal(writer, packed, pattern="2:4")
    for index, block in enumerate(packed.shape.blocks):
        for x in block.linears:
            assert holds(result.base_weight(index, x), Pattern(2, 4))
            assert not bool(result.base_weight(index, x)[packed.base_weight(index, x) == 0].any())


def test_no_dense_weight_stays_in_memory(packed: Checkpoint) -> None:
    model, layers, _ = lora.adapted(packed, chosen("qlora", packed=True), RUNTIME)
    dense, *_ = lora.adapted(packed, chosen("qlora"), RUNTIME)
    quantised = sum(x.weights for block in packed.shape.blocks for x in block.linears if x.grid)
    assert sum(p.numel() for p in dense.parameters()) - sum(p.numel() for p in model.parameters()) == quantised
    layer = next(iter(layers.values())).base_layer
    x = torch.randn(2, 5, layer.in_features, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.ones_like(y) @ layer.weight)


def test_a_packed_layer_is_read_once_to_be_checked_and_once_to_be_wrapped(
    packed: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = list[Any]()

    def counted(checkpoint: Checkpoint, *given: Any) -> Any:
        reads.append(given)
        return read(checkpoint, *given)

    read = Checkpoint._read_packed
    monkeypatch.setattr(Checkpoint, "_read_packed", counted)
    _, layers, _ = lora.adapted(packed, chosen("qlora", packed=True), RUNTIME)
    assert len(reads) == 2 * len(layers)
    layer = next(iter(layers.values())).base_layer
    assert layer.weight is not layer.weight  # and is let go of again


def test_packed_counts_in_the_forecast_and_needs_codes() -> None:
    shape = shape_from_config(PRESETS["llama-2-7b"])
    quantised = gptq.plan(shape, Gptq("nf4"))
    peaks = [
        lora.cost(quantised, Lora(method="qlora", targets="all", packed=keep)).peak_memory_bytes
        for keep in (False, True)
    ]
    # What is not held: the linear layers in 16 bits, but for their 4-bit codes and a scale for every 64 of them.
    weights = sum(x.weights for block in shape.blocks for x in block.linears)
    assert peaks[0] - peaks[1] == pytest.approx(weights * (2 - 0.5), rel=0.1)
    with pytest.raises(PlanError, match="--lora-packed keeps quantised weights packed; give --recover qlora"):
        lora.plan(shape, Lora(packed=True))

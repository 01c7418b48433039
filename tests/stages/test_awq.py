"""AWQ: the folds leave the model as it is, the search is what the paper says, and outlier inputs gain."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.forms import Grid
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.scaling import factors, rescaled, scaled_folders
from edgepress.checkpoints.tokens import TokenBatches
from edgepress.checkpoints.walk import Walk
from edgepress.checkpoints.writer import CheckpointWriter
from edgepress.stages import eora, gptq
from edgepress.stages.options import Eora, Gptq
from edgepress.stages.quantisers import awq
from edgepress.stages.quantisers.awq import Folding
from edgepress.stages.quantisers.codes import fit_grid, nearest

pytestmark = pytest.mark.unit

RUNTIME = Runtime(chunk_tokens=48)
ATTENTION, MLP = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")
GROUPS = (ATTENTION, ("self_attn.o_proj",), MLP, ("mlp.down_proj",))


def outlying(model: Any) -> None:
    """Some channels with large activations, as language models have them."""
    for layer in model.model.layers:
        for norm in ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm"):
            if hasattr(layer, norm):
                getattr(layer, norm).weight[3::16] += 12
        layer.self_attn.v_proj.weight[5::16] *= 12
        layer.mlp.up_proj.weight[7::32] *= 12


@pytest.mark.parametrize(
    ("family", "norm"),
    [
        ("llama", "post_attention_layernorm"),
        ("qwen2", "post_attention_layernorm"),
        ("smollm3", "post_attention_layernorm"),
        ("gemma3", "pre_feedforward_layernorm"),
    ],
)
def test_folds_leave_the_block_as_it_is(
    family: str, norm: str, build: Callable[..., Checkpoint], tokens: Callable[..., TokenBatches]
) -> None:
    """Random factors into every place, of blocks with shared key heads, biases and norms that multiply with 1 + w."""
    generator = torch.Generator().manual_seed(2)
    expected = ("input_layernorm", "self_attn.v_proj", norm, "mlp.up_proj")
    for block in Walk(build(family, blocks=3), tokens(2).chunks(48), RUNTIME):
        was = block.forward(block.inputs[0], {})
        dense = {name: linear.weight.clone() for name, linear in block.linears.items()}
        folding = Folding(block)
        for names, before in zip(GROUPS, expected, strict=True):
            assert folding.before(names) == before
            width = dense[names[0]].shape[1]
            wanted = folding.shared(names, torch.rand(width, generator=generator) * 4 + 0.25)
            found = folding.fold(names, before, wanted)
            assert found is not None
            torch.testing.assert_close(found, wanted)
        assert all(not torch.equal(dense[name], folding.weights[name]) for name in dense)
        torch.testing.assert_close(block.forward(block.inputs[0], {}), was, rtol=1e-4, atol=1e-4)
        block.done()


def test_heads_that_share_a_value_share_its_factor(
    build: Callable[..., Checkpoint], tokens: Callable[..., TokenBatches]
) -> None:
    for block in Walk(build("llama", blocks=3), tokens(2).chunks(48), RUNTIME):
        shared = Folding(block).shared(("self_attn.o_proj",), torch.arange(64.0)).view(4, 16)
        expected = torch.arange(64.0).view(4, 16)
        for pair in (0, 2):  # four heads on two values
            mean = (expected[pair] + expected[pair + 1]) / 2
            assert torch.equal(shared[pair], mean) and torch.equal(shared[pair + 1], mean)
        block.done()


def test_a_fold_that_does_not_hold_is_undone(
    build: Callable[..., Checkpoint], tokens: Callable[..., TokenBatches]
) -> None:
    """A norm between up- and down-projection, as some families have: dividing the rows does not divide the input."""
    for block in Walk(build("llama", blocks=3), tokens(2).chunks(48), RUNTIME):
        down = block.linears["mlp.down_proj"]
        down.register_forward_pre_hook(lambda _, x: (x[0] / x[0].norm(dim=-1, keepdim=True),), prepend=True)
        folding = Folding(block)
        before = {name: parameter.clone() for name, parameter in block.module.named_parameters()}
        assert folding.fold(("mlp.down_proj",), "mlp.up_proj", torch.linspace(0.5, 2, 128)) is None
        assert all(torch.equal(before[name], p) for name, p in block.module.named_parameters())
        assert torch.equal(folding.weights["mlp.up_proj"], before["mlp.up_proj.weight"])
        break


def test_a_fold_is_undone_where_something_else_takes_the_input(
    build: Callable[..., Checkpoint], tokens: Callable[..., TokenBatches]
) -> None:
    """A second path from the norm's output to the block's."""
    for block in Walk(build("llama", blocks=3), tokens(2).chunks(48), RUNTIME):
        norm, mlp = (block.module.get_submodule(name) for name in ("post_attention_layernorm", "mlp"))
        seen: list[Tensor] = []
        norm.register_forward_hook(lambda _, x, y, seen=seen: seen.append(y))
        mlp.register_forward_hook(lambda _, x, y, seen=seen: y + seen[-1].square())
        folding = Folding(block)
        assert folding.before(MLP) == "post_attention_layernorm"
        assert folding.fold(MLP, "post_attention_layernorm", torch.linspace(0.5, 2, 64)) is None
        break


def test_a_norms_factor_is_what_its_file_leaves(
    build: Callable[..., Checkpoint], tokens: Callable[..., TokenBatches], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stored in 16 bits, the vector is rounded; the columns make up for exactly that."""
    monkeypatch.setattr("edgepress.checkpoints.walk.BlockVisit.stored_dtype", torch.bfloat16)
    for block in Walk(build("llama", blocks=3), tokens(2).chunks(48), RUNTIME):
        was = block.forward(block.inputs[0], {})
        wanted = torch.linspace(0.3, 3, 64)
        found = Folding(block).fold(ATTENTION, "input_layernorm", wanted)
        assert found is not None
        assert not torch.equal(found, wanted)
        norm = block.module.get_parameter("input_layernorm.weight")
        assert torch.equal(norm, norm.bfloat16().float())
        torch.testing.assert_close(block.forward(block.inputs[0], {}), was, rtol=1e-4, atol=1e-4)
        break


def test_the_search_takes_the_best_exponent() -> None:
    """Against outputs of the layers themselves, one exponent after the other."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(200, 64, generator=generator) * torch.exp(torch.randn(64, generator=generator))
    weights = [torch.randn(rows, 64, generator=generator) for rows in (32, 16)]
    grid = Grid(4, 32)
    alpha, s = awq.search(weights, X.T @ X, X.abs().sum(0), grid)

    def error(factor: Tensor) -> float:
        total = 0.0
        for W in weights:
            scaled = W * factor
            rounded = nearest(scaled, *fit_grid(scaled, factor, grid, False), grid).weight
            total += float(((X / factor) @ rounded.T - X @ W.T).square().sum())
        return total

    factors = []
    for power in (i / 20 for i in range(20)):
        factor = X.abs().mean(0) ** power
        factors.append(factor / (factor.max() * factor.min()).sqrt())
    errors = [error(factor) for factor in factors]
    best = min(range(20), key=errors.__getitem__)
    assert alpha == best / 20 > 0
    torch.testing.assert_close(s, factors[best])
    assert errors[best] < 0.9 * errors[0]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_models_with_outlying_inputs_gain(
    family: str,
    build: Callable[..., Checkpoint],
    tokens: Callable[..., TokenBatches],
    writer: CheckpointWriter,
    seal: Callable[..., Checkpoint],
) -> None:
    source = build(family, blocks=3, edit=outlying)
    facts = gptq.run(source, writer, tokens(8), Gptq(quant="awq4", group=32), RUNTIME)
    made = seal(writer, source)
    ids = tokens(4, seed=9).ids

    def logits(model: Any) -> Tensor:
        with torch.no_grad():
            found: Tensor = model(input_ids=ids).logits
        return found

    wanted, model = logits(source.model()), source.model()
    for name, linear in model.named_modules():
        if name.endswith("_proj"):
            W = linear.weight.data
            W.copy_(nearest(W, *fit_grid(W, torch.ones(W.shape[1]), Grid(4, 32), True), Grid(4, 32)).weight)
    plain, found = ((logits(m) - wanted).norm() for m in (model, made.model()))
    assert found < 0.9 * plain
    places = {layer["folded_into"] for block in facts["blocks"] for layer in block.values()}
    assert {"input_layernorm", "self_attn.v_proj", "mlp.up_proj"} <= places
    assert all(0 <= layer["alpha"] < 1 for block in facts["blocks"] for layer in block.values())


def test_eora_compares_with_the_dense_weights_scaled_alike(
    build: Callable[..., Checkpoint],
    tokens: Callable[..., TokenBatches],
    writer: CheckpointWriter,
    seal: Callable[..., Checkpoint],
    tmp_path: Path,
) -> None:
    source, ids = build("qwen2", blocks=3, edit=outlying), tokens(8)
    gptq.run(source, writer, ids, Gptq(quant="awq4", group=32), RUNTIME)
    quantised = seal(writer, source)
    for index in range(3):
        dense, present = rescaled(scaled_folders(quantised), index, source.block(index)), quantised.block(index)
        for x in quantised.shape.blocks[index].linears:
            exact = dense[f"{x.name}.weight"]
            assert float((present[f"{x.name}.weight"] - exact).norm() / exact.norm()) < 0.15, x.name
    assert "rows" in {name.rpartition(".")[2] for name in factors(quantised.folder, 0)}
    target = CheckpointWriter(tmp_path / "eora")
    facts = eora.run(quantised, target, ids, Eora(rank=16), RUNTIME)
    assert facts["total"]["error_after"] < 0.5 * facts["total"]["error_before"] < 0.02
    adapted = seal(target, quantised)
    with torch.no_grad():
        wanted, plain, found = (c.model()(input_ids=ids.ids).logits for c in (source, quantised, adapted))
    assert float((found - wanted).norm()) < 0.8 * float((plain - wanted).norm())

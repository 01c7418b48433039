"""Disturbances: their statistics, what they touch and what they leave alone, and brute force on tiny models."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.disturb import Disturbance, find_attention, find_gate
from edgepress.checkpoints.errors import CheckpointError, PlanError
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.shape import BlockShape, LinearShape
from edgepress.eval.perplexity import Protocol, measure
from edgepress.eval.robustness import Plan, measure_robustness, perplexity_under
from edgepress.eval.text import Text, load_text
from tests.models import FAMILIES

pytestmark = pytest.mark.unit

TinyModel = Callable[..., Path]
PROTOCOL = Protocol("windows", 32, 512)
NOISE, MASK = Disturbance("gate-noise", 0.3, seed=5), Disturbance("attention-mask", 0.3, seed=5)


@pytest.fixture(scope="module")
def text() -> Text:
    return load_text("embedded", "evaluate")


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=ids).logits
    return result


def ids(rows: int = 3) -> Tensor:
    return torch.randint(3, 512, (rows, 20), generator=torch.Generator().manual_seed(1))


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


class Mlp(nn.Module):
    """A block of two layers and an attention that passes its input on: enough to see what the hooks do."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.down_proj = nn.Linear(64, 96, bias=False), nn.Linear(96, 64, bias=False)
        self.self_attn = PassAttention()

    SHAPE = BlockShape((LinearShape("gate_proj", 96, 64, "F32"), LinearShape("down_proj", 64, 96, "F32")), ())


class PassAttention(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, str]:
        return x, "weights"


def test_gate_noise_has_the_stated_mean_and_variance_and_nothing_else_changes() -> None:
    block, x = Mlp(), torch.randn(4000, 64)
    seen: list[Tensor] = []
    with NOISE.on_block(block, Mlp.SHAPE, 0):
        watch = block.gate_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        block.gate_proj(x)
        watch.remove()
        assert torch.equal(block.self_attn(x)[0], x)
    noise = seen[0] - x
    count = noise.numel()
    assert abs(float(noise.mean())) < 5 * 0.3 / math.sqrt(count)
    assert float(noise.std()) == pytest.approx(0.3, rel=5 / math.sqrt(2 * count))
    kurtosis = float((noise / noise.std()).pow(4).mean())
    assert kurtosis == pytest.approx(3, abs=5 * math.sqrt(24 / count))  # a normal's, not a uniform's 1.8


def test_output_variance_follows_equation_2_36() -> None:
    block, x = Mlp(), torch.zeros(20000, 64)
    with torch.no_grad(), NOISE.on_block(block, Mlp.SHAPE, 0):
        variance = block.gate_proj(x).var(dim=0)
        expected = 0.3**2 * block.gate_proj.weight.pow(2).sum(dim=1)
    assert torch.allclose(variance, expected, rtol=0.06)


@pytest.mark.parametrize("rescale", [False, True])
def test_masks_zero_the_stated_share_and_keep_the_rest(rescale: bool) -> None:
    block, y = Mlp(), torch.randn(3000, 64)
    with Disturbance("attention-mask", 0.3, rescale=rescale).on_block(block, Mlp.SHAPE, 0):
        masked, other = block.self_attn(y)
    assert other == "weights"
    kept = masked != 0
    share = 1 - float(kept.float().mean())
    assert share == pytest.approx(0.3, abs=5 * math.sqrt(0.21 / y.numel()))
    assert torch.equal(masked[kept], (y / (1 - 0.3) if rescale else y)[kept])


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("kind", ["gate-noise", "attention-mask"])
def test_a_whole_model_of_each_family(tiny_model: TinyModel, family: str, kind: str) -> None:
    checkpoint = Checkpoint.open(tiny_model(family))
    model = checkpoint.model()
    before, installed = logits(model, ids()), hooks(model)

    def disturbed(strength: float, seed: int) -> Tensor:
        with Disturbance(kind, strength, seed).on_model(model, checkpoint.shape):
            return logits(model, ids())

    assert torch.equal(disturbed(0.0, 1), before)  # strength 0 changes nothing, to the bit
    first = disturbed(0.1, 1)
    assert not torch.allclose(first, before, atol=1e-3)
    assert torch.equal(disturbed(0.1, 1), first)
    assert not torch.equal(disturbed(0.1, 2), first)
    assert hooks(model) == installed
    assert torch.equal(logits(model, ids()), before)


def test_the_hooks_go_after_a_pass_that_fails(tiny_model: TinyModel) -> None:
    checkpoint = Checkpoint.open(tiny_model())
    model = checkpoint.model()
    installed = hooks(model)
    context = NOISE.on_model(model, checkpoint.shape)
    context.__enter__()
    assert hooks(model) == installed + len(checkpoint.shape.blocks)
    failure = RuntimeError("in the pass")
    assert not context.__exit__(RuntimeError, failure, None)
    assert hooks(model) == installed


def test_the_global_random_state_stays(tiny_model: TinyModel) -> None:
    checkpoint = Checkpoint.open(tiny_model())
    model, state = checkpoint.model(), torch.get_rng_state()
    for disturbance in (NOISE, MASK):
        with disturbance.on_model(model, checkpoint.shape):
            logits(model, ids())
    assert torch.equal(torch.get_rng_state(), state)


def patched_logits(model: Any, disturbance: Disturbance, batch: Tensor) -> Tensor:
    """Brute force: each block's mlp and attention replaced by written-out versions with the same noise."""
    for index, layer in enumerate(model.model.layers):
        generator = disturbance.generator(index)
        if disturbance.kind == "gate-noise":

            def mlp(x: Tensor, m: Any = layer.mlp, g: torch.Generator = generator) -> Tensor:
                noise = 0.3 * torch.randn(x.shape, generator=g)
                if hasattr(m, "gate_proj"):
                    gate, up = m.gate_proj.weight, m.up_proj.weight
                else:
                    gate, up = m.gate_up_proj.weight.chunk(2)
                inner = F.silu((x + noise) @ gate.T) * (x @ up.T)
                return inner @ m.down_proj.weight.T

            layer.mlp.forward = mlp
        else:

            def attention(
                *args: Any, m: Any = layer.self_attn.forward, g: torch.Generator = generator, **more: Any
            ) -> Any:
                out = m(*args, **more)
                return out[0] * (torch.rand(out[0].shape, generator=g) >= 0.3), *out[1:]

            layer.self_attn.forward = attention
    return logits(model, batch)


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("disturbance", [NOISE, MASK], ids=lambda d: d.kind)
def test_brute_force(tiny_model: TinyModel, family: str, disturbance: Disturbance) -> None:
    checkpoint = Checkpoint.open(tiny_model(family))
    model = checkpoint.model()
    with disturbance.on_model(model, checkpoint.shape):
        ours = logits(model, ids())
    expected = patched_logits(checkpoint.model(), disturbance, ids())
    assert torch.allclose(ours, expected, atol=2e-3, rtol=1e-3)
    assert not torch.allclose(ours, logits(model, ids()), atol=0.05)


@pytest.mark.parametrize("disturbance", [NOISE, MASK], ids=lambda d: d.kind)
def test_perplexity_by_the_walk_has_the_noise_of_a_whole_model(
    tiny_model: TinyModel, text: Text, disturbance: Disturbance
) -> None:
    checkpoint = Checkpoint.open(tiny_model())
    walked = measure(checkpoint, text, PROTOCOL, Runtime(), disturbance).perplexity
    windows = text.token_ids(checkpoint.tokenizer(), 512).view(16, 32)
    model = checkpoint.model()
    with disturbance.on_model(model, checkpoint.shape):
        nll = F.cross_entropy(logits(model, windows)[:, :-1].reshape(-1, 512), windows[:, 1:].reshape(-1))
    assert walked == pytest.approx(math.exp(nll), rel=1e-4)


# --- over strengths and seeds ---------------------------------------------------------------------------------------


def test_mean_and_spread_over_seeds(tiny_model: TinyModel, text: Text) -> None:
    checkpoint = Checkpoint.open(tiny_model())
    quantity = perplexity_under(checkpoint, text, PROTOCOL, Runtime())
    plan = Plan(noise=(0.0, 0.4), mask=(0.2,), seeds=(3, 4, 8))
    result = measure_robustness("perplexity", str(PROTOCOL), quantity, plan)
    plain = measure(checkpoint, text, PROTOCOL, Runtime()).perplexity
    assert result.undisturbed == plain
    still, noisy, masked = result.levels
    assert still.values == (plain,) * 3 and still.spread == 0
    one_by_one = [measure(checkpoint, text, PROTOCOL, Runtime(), Disturbance("gate-noise", 0.4, s)) for s in (3, 4, 8)]
    assert noisy.values == tuple(p.perplexity for p in one_by_one)
    assert noisy.mean == pytest.approx(sum(noisy.values) / 3)
    assert noisy.spread == pytest.approx(statistics.stdev(noisy.values))
    assert (noisy.lowest, noisy.highest) == (min(noisy.values), max(noisy.values))
    assert (masked.kind, masked.strength) == ("attention-mask", 0.2)
    assert len(set(masked.values)) == 3


def test_a_single_seed_has_no_spread() -> None:
    result = measure_robustness("score", "any", lambda d: d.strength if d else 0.5, Plan((0.1,), (), (7,)))
    assert result.levels[0].spread is None and result.levels[0].values == (0.1,)


# --- what cannot be -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Disturbance("heat", 1), "gate-noise and attention-mask"),
        (lambda: Disturbance("gate-noise", -0.1), "standard deviation"),
        (lambda: Disturbance("gate-noise", math.nan), "standard deviation"),
        (lambda: Disturbance("attention-mask", 1.1), "between 0 and 1"),
        (lambda: Disturbance("attention-mask", 1, rescale=True), "nothing to rescale"),
        (lambda: Plan((), ()), "at least one strength"),
        (lambda: Plan(seeds=(1, 1)), "different seeds"),
        (lambda: Plan(mask=(2.0,)), "between 0 and 1"),
    ],
)
def test_what_cannot_be_is_refused(make: Callable[[], object], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        make()


def linears(*shapes: tuple[str, int, int]) -> BlockShape:
    return BlockShape(tuple(LinearShape(name, out, width, "F32") for name, out, width in shapes), ())


@pytest.mark.parametrize(
    ("block", "gate"),
    [
        (linears(("feed_forward.w1", 96, 64), ("feed_forward.w3", 96, 64), ("feed_forward.w2", 64, 96)), "w1"),
        (linears(("attn.c_attn", 192, 64), ("mlp.fc_in", 256, 64), ("mlp.fc_out", 64, 256)), "fc_in"),
        (linears(("mlp.gate", 4, 64), ("mlp.gate_up_proj", 192, 64), ("mlp.down", 64, 96)), "gate_up_proj"),
    ],
)
def test_gates_of_other_names(block: BlockShape, gate: str) -> None:
    assert find_gate(block, 0).name.endswith(gate)


@pytest.mark.parametrize(
    "block",
    [
        linears(("mlp.a", 96, 64), ("mlp.b", 96, 64), ("mlp.c", 64, 96)),
        linears(*((f"mlp.experts.{i}.{n}", *s) for i in range(2) for n, s in (("w1", (96, 64)), ("w2", (64, 96))))),
        linears(("self_attn.q_proj", 64, 64)),
    ],
)
def test_a_gate_that_cannot_be_told_is_an_error_that_lists_the_layers(block: BlockShape) -> None:
    with pytest.raises(CheckpointError, match=f"block 4.*{block.linears[0].name}"):
        find_gate(block, 4)


def test_a_block_without_attention_names_its_children() -> None:
    block = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match=r"block 1.*0 \(Linear\)"):
        find_attention(block, 1)

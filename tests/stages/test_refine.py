"""What `--quant-effort high` tunes, on blocks small enough for finite differences: it never harms."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from edgepress.checkpoints.forms import Grid
from edgepress.checkpoints.packing import dequantise, pack_linear
from edgepress.stages import gptq, refine
from edgepress.stages.options import Gptq
from edgepress.stages.quantisers.gptq import Solution, solve
from edgepress.stages.refine import TunedLinear, TunedNorm

pytestmark = pytest.mark.unit


class Block(nn.Module):
    """Norm, two linear layers with a bend between them, one linear that stays dense, and the way around them."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.up, self.down = nn.Linear(width, inner, bias=False), nn.Linear(inner, width, bias=False)
        self.dense = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x)))) + 0.1 * self.dense(x)


@dataclass
class Visit:
    """What `refine` needs of a block's visit."""

    module: Block
    inputs: list[Tensor]
    stored_dtype: torch.dtype

    def forward(self, states: Tensor, weights: dict[str, Tensor]) -> Tensor:
        return cast(Tensor, functional_call(self.module, weights, (states,)))


@dataclass
class Case:
    """A random block that GPTQ has been through, and what it should give."""

    seed: int = 0
    masked: bool = False
    grid: Grid = field(default_factory=lambda: Grid(4, 32))
    stored: torch.dtype = torch.float32
    width: int = 32
    inner: int = 64
    chunks: tuple[int, ...] = (24, 24, 9)  # tokens

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(self.seed)
        self.dense = Block(self.width, self.inner).requires_grad_(False)
        for parameter in self.dense.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g) * parameter.shape[-1] ** -0.5)
        self.dense.norm.weight.add_(1).copy_(self.dense.norm.weight.to(self.stored))
        mix = torch.randn(self.width, self.width, generator=g)
        inputs = [torch.randn(1, n, self.width, generator=g) @ mix for n in self.chunks]
        self.targets = [self.dense(x) for x in inputs]
        inputs = [x + 0.05 * torch.randn(x.shape, generator=g) for x in inputs]  # what earlier blocks left of them
        module = Block(self.width, self.inner).requires_grad_(False)
        module.load_state_dict(self.dense.state_dict())
        self.visit = Visit(module, inputs, self.stored)
        self.masks: dict[str, Tensor | None] = {"up": None, "down": None}
        options = Gptq(quant=f"gptq{self.grid.bits}", effort="high", symmetric=self.grid.symmetric)
        x = torch.cat([x.flatten(0, 1) for x in inputs])
        features = {"up": module.norm(x), "down": torch.tanh(module.up(module.norm(x)))}
        self.solved: dict[str, Solution] = {}
        for name, X in features.items():
            linear = cast(nn.Linear, getattr(module, name))
            if self.masked:
                mask = torch.rand(linear.weight.shape, generator=g) > 0.4
                self.masks[name] = mask
                linear.weight.mul_(mask)
            self.solved[name] = solve(linear.weight.clone(), X.T @ X, self.masks[name], self.grid, options)

    def refine(self, steps: int = 20) -> dict[str, float]:
        generator = torch.Generator().manual_seed(1)
        visit = cast(Any, self.visit)
        return gptq.refine_block(visit, self.solved, self.masks, self.targets, steps, generator)

    @torch.no_grad()
    def error(self) -> float:
        """Mean over all tokens, by the module itself with the weights that the file's tensors stand for."""
        module = self.visit.module
        for name, s in self.solved.items():
            stored = pack_linear(s.codes, s.scales, s.zeros, self.grid.group, self.grid.bits)
            cast(nn.Linear, getattr(module, name)).weight.copy_(dequantise(stored, self.grid.bits))
        found = torch.cat([module(x)[0] for x in self.visit.inputs]).double()
        wanted = torch.cat([y[0] for y in self.targets]).double()
        return float((((found - wanted) ** 2).sum(1) / (wanted**2).sum(1)).mean())


@given(
    seed=st.integers(0, 10**6),
    masked=st.booleans(),
    bits=st.sampled_from([3, 4, 8]),
    group=st.sampled_from([32, -1]),
    symmetric=st.booleans(),
    stored=st.sampled_from([torch.float32, torch.bfloat16]),
    steps=st.integers(1, 12),
)
@settings(max_examples=16, deadline=None, derandomize=True)
def test_the_error_never_rises_and_everything_but_codes_scales_and_norms_stays(
    seed: int, masked: bool, bits: int, group: int, symmetric: bool, stored: torch.dtype, steps: int
) -> None:
    case = Case(seed, masked, Grid(bits, group, symmetric), stored)
    dense = {name: case.visit.module.state_dict()[name].clone() for name in ("dense.weight", "dense.bias")}
    before, start = case.error(), dict(case.solved)
    zeros = {name: s.zeros.clone() for name, s in start.items()}
    positions = {name: s.position.clone() for name, s in start.items() if s.position is not None}
    state = torch.random.get_rng_state()
    said = case.refine(steps)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert said["error_after"] <= said["error_before"]
    assert said["error_before"] == pytest.approx(before, rel=1e-4)
    assert said["error_after"] == pytest.approx(case.error(), rel=1e-4)  # with what the files will hold
    for name, s in case.solved.items():
        assert torch.equal(s.zeros, zeros[name])
        assert s.codes.dtype == torch.uint8
        assert int(s.codes.max()) < 2**bits
        assert torch.equal(s.scales, s.scales.to(torch.float16).float())
        assert bool((s.scales > 0).all())
        # Adam's steps sum to the reach, so nothing lands further than that from GPTQ's position, and half a code
        reach = 0.5 + refine.ROUNDING_REACH * (1 + 1 / steps) + 1e-4
        moved = (s.codes.float() - positions[name].clamp(0, 2**bits - 1)).abs()
        mask = case.masks[name]
        assert float((moved if mask is None else moved[mask]).max()) <= reach
        if mask is not None:
            every = s.zeros.repeat_interleave(mask.shape[1] // s.zeros.shape[1], 1)
            assert torch.equal(s.codes[~mask].int(), every[~mask])
            assert not s.weight[~mask].any()
    norm = case.visit.module.norm.weight
    assert torch.equal(norm, norm.to(stored).float())
    for name, tensor in dense.items():
        assert torch.equal(case.visit.module.state_dict()[name], tensor)


def test_it_wins_on_average_and_tunes_the_norms() -> None:
    won = []
    for seed in range(4):
        case = Case(seed, masked=seed % 2 == 0, grid=Grid(3, 32), stored=torch.bfloat16, chunks=(64, 64, 64))
        norm = case.visit.module.norm.weight.clone()
        said = case.refine(30)
        won.append(said["error_after"] / said["error_before"])
        assert not torch.equal(case.visit.module.norm.weight, norm)
        assert float((case.visit.module.norm.weight - norm).abs().max()) < 0.1
    assert sum(won) / len(won) < 0.9


@pytest.mark.parametrize("factor", [1.5, float("nan")])
def test_steps_that_harm_leave_everything_as_it_was(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(_: Any, layers: dict[str, TunedLinear], norms: dict[str, TunedNorm], *__: Any) -> None:
        for layer in layers.values():
            layer.position += 3 * torch.randn(layer.position.shape, generator=torch.Generator().manual_seed(0))
            layer.log_change += 0.3
        for norm in norms.values():
            norm.exact *= factor

    monkeypatch.setattr(refine, "_descend", spoil)
    case = Case(3, masked=True)
    start, norm = dict(case.solved), case.visit.module.norm.weight.clone()
    said = case.refine()
    assert said["error_after"] == said["error_before"]
    assert torch.equal(case.visit.module.norm.weight, norm)
    for name, s in case.solved.items():
        assert torch.equal(s.codes, start[name].codes)
        assert torch.equal(s.scales, start[name].scales)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_it_begins_where_gptq_ended(masked: bool, symmetric: bool) -> None:
    case = Case(5, masked, Grid(4, 32, symmetric))
    for name, s in case.solved.items():
        assert s.position is not None
        layer = TunedLinear.start(s.position, s.scales, s.zeros, case.masks[name], case.grid)
        assert torch.equal(layer.codes(), s.codes.float())
        assert torch.equal(layer.rounded_scales(), s.scales)
        assert torch.equal(layer.weight(), s.weight * (case.masks[name] if masked else 1))


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_are_those_of_the_smooth_surrogate(masked: bool) -> None:
    """Central differences in float64 of the loss in which rounding only adds what it added at the start."""
    case = Case(7, masked)
    s, mask = case.solved["up"], case.masks["up"]
    assert s.position is not None
    g = torch.Generator().manual_seed(2)
    layer = TunedLinear.start(s.position, s.scales, s.zeros, mask, case.grid)
    layer.log_change = 0.02 * torch.randn(s.scales.shape, generator=g)
    norm = TunedNorm(1 + 0.3 * torch.randn(32, generator=g), torch.bfloat16, 0.0)
    variables = [layer.position, layer.log_change, norm.exact]
    X, Y = torch.randn(40, 32, generator=g), torch.randn(40, 64, generator=g)
    for variable in variables:
        variable.requires_grad_()
    ((X * norm.weight()) @ layer.weight().T - Y).square().mean().backward()  # type: ignore[no-untyped-call]

    start = [v.detach().double() for v in variables]
    scales, zeros = s.scales.double(), s.zeros.double()
    with torch.no_grad():
        added = [
            layer.codes().double() - start[0],
            layer.rounded_scales().double() - scales * start[1].exp(),
            norm.weight().double() - start[2],
        ]

    def surrogate(position: Tensor, log_change: Tensor, exact: Tensor) -> float:
        step = (scales * log_change.exp() + added[1]).repeat_interleave(32, 1)
        weight = step * (position + added[0] - zeros.repeat_interleave(32, 1)) * (1 if mask is None else mask)
        return float(((X.double() * (exact + added[2])) @ weight.T - Y.double()).square().mean())

    for number, variable in enumerate(variables):
        assert variable.grad is not None
        size = float(variable.grad.abs().max())
        for place in torch.randint(variable.numel(), (24,), generator=g).tolist():
            values = []
            for sign in (1, -1):
                moved = [v.clone() for v in start]
                moved[number].view(-1)[place] += sign * 1e-5
                values.append(surrogate(*moved))
            expected = (values[0] - values[1]) / 2e-5
            assert float(variable.grad.view(-1)[place]) == pytest.approx(expected, rel=1e-3, abs=1e-4 * size)


def test_a_masked_weight_has_no_gradient() -> None:
    case = Case(9, masked=True)
    s, mask = case.solved["down"], case.masks["down"]
    assert s.position is not None and mask is not None
    layer = TunedLinear.start(s.position.requires_grad_(), s.scales, s.zeros, mask, case.grid)
    layer.weight().square().sum().backward()  # type: ignore[no-untyped-call]
    assert s.position.grad is not None
    assert not s.position.grad[~mask].any()
    assert bool((s.position.grad[mask] != 0).any())


# --- norms ----------------------------------------------------------------------------------------------------------


def test_a_norm_s_rate_follows_what_it_multiplies_with() -> None:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    for norm, scale in (
        (LlamaRMSNorm(16), lambda w: w),
        (Gemma3RMSNorm(16), lambda w: 1 + w),
        (nn.LayerNorm(16), lambda w: w),
    ):
        norm.requires_grad_(False).weight.copy_(torch.linspace(-0.2, 0.9, 16))
        rate = TunedNorm.start(norm, torch.float32).rate
        assert rate == pytest.approx(refine.NORM_RATE * float(scale(norm.weight).abs().mean()), rel=1e-3)


def test_error_counts_tokens_not_chunks() -> None:
    case = Case(11, chunks=(40, 2))
    weights = {f"{name}.weight": s.weight for name, s in case.solved.items()}
    assert refine.block_error(cast(Any, case.visit), weights, case.targets) == pytest.approx(case.error(), rel=1e-4)

"""Tune a block's scales, rounding and norms together after GPTQ (`--quant-effort high`).

GPTQ minimises the error of each layer alone, on the layer's own inputs. Here all layers of a block answer for the
block's output. The target is what the block gave before this stage for the states that came to it then, so the
error that earlier blocks left is worked against too. Rounding is learned through the straight-through gradient, as
in SignRound (Cheng et al., arXiv 2309.05516), but from GPTQ's compensated weights instead of the dense ones, and by
Adam: steps by the sign alone move every weight whose gradient is noise, and undid GPTQ's work in the first block.
Zero points, mask, file format and bytes stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.forms import Grid
from edgepress.checkpoints.runtime import Runtime, Silent
from edgepress.checkpoints.walk import BlockVisit, Walk
from edgepress.stages.quantisers.codes import SMALLEST_SCALE

# Chosen on SmolLM2-135M, 4 bits, group 64 (benchmarks/README.md).
ROUNDING_REACH = 0.25  # how far Adam can move a position at most: its rate summed over all steps
SCALE_RATE = 2e-3  # Adam, on the logarithm of a scale
NORM_RATE = 1e-3  # Adam, relative to what the norm multiplies with on average


class Tuned(Protocol):
    """One layer's variables."""

    @property
    def position(self) -> Tensor:
        """(out, in): where between the codes a weight lies; its code is the nearest."""

    def steps(self) -> list[Tensor]:
        """The logarithms of the changes of its scales, which are tuned too."""

    def codes(self) -> Tensor:
        """(out, in), whole numbers in float32."""

    def weight(self) -> Tensor:
        """Effective weight (out, in) with the file's rounding, through which the gradient passes; 0 where masked."""

    def reset(self, codes: Tensor) -> None:
        """Back to these codes and the scales of the start."""


class Tunable(Protocol):
    """A quantised layer that can be tuned: one of a method that says TUNES."""

    def tuned(self, mask: Tensor | None) -> Tuned:
        """Its variables, from the solver's solution; mask (out, in) is True where a weight may live."""

    def settled(self, tuned: Any) -> Any:
        """The layer with what became of them."""


@dataclass
class TunedLinear:
    """The variables of a layer in GPTQ's storage."""

    position: Tensor
    log_change: Tensor  # (out, groups): of the scale
    scales: Tensor  # (out, groups) float32, before the change
    zeros: Tensor  # (out, groups) float32
    mask: Tensor | None  # (out, in)
    grid: Grid

    @classmethod
    def start(cls, position: Tensor, scales: Tensor, zeros: Tensor, mask: Tensor | None, grid: Grid) -> TunedLinear:
        """From GPTQ's solution, whose `position` it takes over and changes in place."""
        return cls(position, torch.zeros_like(scales), scales, zeros.float(), mask, grid)

    def steps(self) -> list[Tensor]:
        return [self.log_change]

    @torch.no_grad()
    def codes(self) -> Tensor:
        """(out, in), whole numbers in float32; a masked weight has its zero point's."""
        nearest = self.position.round().clamp_(0, 2**self.grid.bits - 1)
        if self.mask is None:
            return nearest
        return torch.where(self.mask, nearest, self.zeros.repeat_interleave(self._group, 1))

    def rounded_scales(self) -> Tensor:
        """Scales as the file will hold them: float32 with float16 values; the gradient passes through the rounding."""
        exact = self.scales * self.log_change.exp()
        return straight_through(exact.clamp(min=SMALLEST_SCALE).to(torch.float16).float(), exact)

    def weight(self) -> Tensor:
        """Effective weight (out, in); the gradient passes through the rounding to positions and scales."""
        out, groups = self.scales.shape
        codes = straight_through(self.codes(), self.position)
        levels = codes.view(out, groups, -1) - self.zeros.unsqueeze(-1)
        weight = (self.rounded_scales().unsqueeze(-1) * levels).view_as(self.position)
        return weight if self.mask is None else weight * self.mask

    def reset(self, codes: Tensor) -> None:
        """Back to these codes and the scales of the start."""
        self.position, self.log_change = codes.float(), torch.zeros_like(self.scales)

    @property
    def _group(self) -> int:
        return self.position.shape[1] // self.scales.shape[1]


@dataclass
class TunedNorm:
    """A norm's vector (d,), which the file will hold in another precision."""

    exact: Tensor  # float32
    stored: torch.dtype
    rate: float  # Adam's

    @classmethod
    def start(cls, norm: nn.Module, stored: torch.dtype) -> TunedNorm:
        """From a block's norm."""
        weight = norm.get_parameter("weight").detach()
        return cls(weight.to(torch.float32, copy=True), stored, NORM_RATE * multiplier(norm))

    def weight(self) -> Tensor:
        """Float32 with the values that the file will hold; the gradient passes through the rounding."""
        return straight_through(self.exact.to(self.stored).float(), self.exact)


def multiplier(norm: nn.Module) -> float:
    """What a norm multiplies with on average. Some families multiply with 1 + w instead of w, so the norm is asked."""
    weight = norm.get_parameter("weight").detach()
    signs = torch.ones_like(weight).unsqueeze(0)  # mean 0 and mean square 1: what comes out is the scale
    signs[:, 1::2] = -1
    with torch.no_grad():
        return float(norm(signs).float().abs().mean())


def straight_through(rounded: Tensor, exact: Tensor) -> Tensor:
    """`rounded` to the bit, with the gradient of `exact`."""
    return rounded.detach() + (exact - exact.detach())


class DenseOutputs:
    """What the blocks gave before this stage, for the states that came to them then; one block in memory at a time."""

    def __init__(self, source: Checkpoint, chunks: list[Tensor], runtime: Runtime) -> None:
        self._walk = Walk(source, chunks, replace(runtime, progress=Silent()), last_outputs=True)

    def of(self, index: int) -> Sequence[Tensor]:
        """Outputs (b, L, d) of block `index`, chunk by chunk, in host memory; ask with rising indexes.

        After a resume the blocks before it are run again. No block's weights stay behind.
        """
        with closing(iter(self._walk)) as blocks:
            for block in blocks:
                block.done()
                if block.index == index:
                    break
        return self._walk.states.chunks


def refine(
    block: BlockVisit,
    layers: Mapping[str, Tuned],
    targets: Sequence[Tensor],
    steps: int,
    generator: torch.Generator,
) -> dict[str, float]:
    """Tune `layers` and the block's norms in place; returns the block's relative squared error before and after.

    targets: what the block should give, chunk by chunk as its inputs. Each step takes one chunk. If the error over
    all chunks did not fall, codes, scales and norms are as they were.
    """
    norms = {f"{n}.weight": TunedNorm.start(m, block.stored_dtype) for n, m in norms_of(block.module).items()}
    start = {name: layer.codes().to(torch.uint8) for name, layer in layers.items()}
    before = block_error(block, _weights(block, layers, norms), targets)
    _descend(block, layers, norms, targets, steps, generator)
    after = block_error(block, _weights(block, layers, norms), targets)
    if after < before:
        for name, norm in norms.items():
            block.module.get_parameter(name).data.copy_(norm.weight())
        return {"error_before": before, "error_after": after}
    for name, layer in layers.items():
        layer.reset(start[name])
    return {"error_before": before, "error_after": before}


def norms_of(module: nn.Module) -> dict[str, nn.Module]:
    """The block's norms with a vector to multiply with, by name: all that a family calls a norm in its classes."""
    return {
        name: part
        for name, part in module.named_modules()
        if "norm" in type(part).__name__.lower() and any(n == "weight" for n, _ in part.named_parameters(recurse=False))
    }


def _descend(
    block: BlockVisit,
    layers: Mapping[str, Tuned],
    norms: Mapping[str, TunedNorm],
    targets: Sequence[Tensor],
    steps: int,
    generator: torch.Generator,
) -> None:
    """Adam with a rate that falls to zero, in a function of its own so that its moments are freed on return."""
    groups: list[dict[str, Any]] = [{"params": [x.position for x in layers.values()], "lr": 2 * ROUNDING_REACH / steps}]
    groups += [{"params": [step for x in layers.values() for step in x.steps()], "lr": SCALE_RATE}]
    groups += [{"params": [norm.exact], "lr": norm.rate} for norm in norms.values()]
    variables = [tensor for group in groups for tensor in group["params"]]
    for tensor in variables:
        tensor.requires_grad_()
    adam = torch.optim.Adam(groups, betas=(0.9, 0.95))
    decay = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1 - step / steps)
    order: list[int] = []
    for _ in range(steps):
        if not order:
            order = torch.randperm(len(targets), generator=generator).tolist()
        number = order.pop()
        output = block.forward(block.inputs[number], _weights(block, layers, norms))
        token_errors(output, targets[number]).mean().backward()  # type: ignore[no-untyped-call]
        adam.step()
        adam.zero_grad()
        decay.step()
    for tensor in variables:
        tensor.requires_grad_(False)


def _weights(block: BlockVisit, layers: Mapping[str, Tuned], norms: Mapping[str, TunedNorm]) -> dict[str, Tensor]:
    """The tuned weights by their name in the block, in the precision that it computes in."""
    dtype = next(block.module.parameters()).dtype
    weights = {f"{name}.weight": layer.weight().to(dtype) for name, layer in layers.items()}
    return weights | {name: norm.weight().to(dtype) for name, norm in norms.items()}


def token_errors(output: Tensor, target: Tensor) -> Tensor:
    """Squared error of each token (b, L), relative to the token's own size, which is what the next norm sees."""
    target = target.to(output.device).float()
    return (output.float() - target).square().sum(-1) / target.square().sum(-1).clamp_min(1e-12)


@torch.no_grad()
def block_error(block: BlockVisit, weights: dict[str, Tensor], targets: Sequence[Tensor]) -> float:
    """Mean of `token_errors` over all tokens, with these weights in place of the block's own."""
    total, tokens = 0.0, 0
    for states, target in zip(block.inputs, targets, strict=True):
        errors = token_errors(block.forward(states, weights), target)
        total, tokens = total + float(errors.sum()), tokens + errors.numel()
    return total / tokens

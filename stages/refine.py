"""What GPTQ leaves on the table, block by block: scales, rounding and norms tuned to the dense block's output.

`--quant-effort high` of the gptq stage. GPTQ minimises each layer's error alone and on its own inputs; here
all layers of a block answer for the block's output, against what the uncompressed block gives for the
uncompressed prefix's states, so the error that earlier blocks left is worked against too. Rounding is learned
through the straight-through gradient, as in SignRound (Cheng et al., arXiv 2309.05516), but from GPTQ's
compensated weights instead of the dense ones, and by Adam: steps by the sign alone move every weight whose
gradient is noise, and undid GPTQ's work in the first block. Format, bytes and mask stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from checkpoints.checkpoint import Checkpoint
from checkpoints.runtime import Runtime, Silent
from checkpoints.shape import Grid
from checkpoints.walk import BlockVisit, Walk

# Chosen on SmolLM2-135M, 4 bits, group 64 (benchmarks/README.md).
ROUNDING_REACH = 0.25  # how far Adam can move a position at most: its rate summed over all steps
REFINE_TOKENS = 1024  # in one step; also what goes through a block at once
SCALE_RATE = 2e-3  # Adam, on the logarithm of a scale
NORM_RATE = 1e-3  # Adam, relative to the norm's own mean


@dataclass
class Tuned:
    """One layer's variables. position (out, in): where between the codes a weight lies; its code is the nearest."""

    position: Tensor
    log_change: Tensor  # (out, groups): of the scale
    scales: Tensor  # (out, groups) float32, before the change
    zeros: Tensor  # (out, groups) float32
    mask: Tensor | None  # (out, in)
    grid: Grid

    @classmethod
    def start(cls, position: Tensor, scales: Tensor, zeros: Tensor, mask: Tensor | None, grid: Grid) -> Tuned:
        """From GPTQ's solution."""
        return cls(position.clone(), torch.zeros_like(scales), scales, zeros.float(), mask, grid)

    @torch.no_grad()
    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """Codes (out, in) int32, scales (out, groups), and the weight (out, in) they stand for."""
        return self.codes().to(torch.int32), self.quantised_scales(), self.weight()

    def quantised_scales(self) -> Tensor:
        """Scales as the file will hold them, float16; the gradient passes through the rounding."""
        exact = self.scales * self.log_change.exp()
        return exact + (exact.clamp(min=6.2e-5).to(torch.float16).float() - exact).detach()

    def codes(self) -> Tensor:
        zeros = self.zeros.repeat_interleave(self._group, 1)
        nearest = self.position.detach().round().clamp(0, 2**self.grid.bits - 1)
        return nearest if self.mask is None else torch.where(self.mask, nearest, zeros)

    def weight(self) -> Tensor:
        """Effective weight (out, in); the gradient passes through the rounding to the positions."""
        out, groups = self.scales.shape
        shifted = (self.codes() - self.position).detach() + self.position
        levels = shifted.view(out, groups, -1) - self.zeros.unsqueeze(-1)
        weight = (self.quantised_scales().unsqueeze(-1) * levels).view_as(self.position)
        return weight if self.mask is None else weight * self.mask

    @property
    def _group(self) -> int:
        return self.position.shape[1] // self.scales.shape[1]


class DenseOutputs:
    """The uncompressed blocks' outputs for the uncompressed prefix's states, one block ahead of need at most."""

    def __init__(self, source: Checkpoint, chunks: list[Tensor], runtime: Runtime) -> None:
        quiet = replace(runtime, progress=Silent())
        self._walk = Walk(source, chunks, quiet, last_outputs=True)
        self._blocks = iter(self._walk)

    def of(self, index: int) -> Sequence[Tensor]:
        """Outputs (b, L, d) of block `index`, chunk by chunk. After a resume the blocks before it are run again."""
        for block in self._blocks:
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

    targets: the dense block's outputs, chunk by chunk as the block's inputs. Each step takes one chunk. If the
    error over all chunks did not fall, everything is left as it was.
    """
    norms = {n: p.detach().float().clone() for n, p in block.module.named_parameters() if p.dim() == 1 and "norm" in n}
    before_norms = {name: value.clone() for name, value in norms.items()}
    start = {name: (x.position.clone(), x.log_change.clone()) for name, x in layers.items()}
    before = _error(block, layers, norms, targets)

    positions = [x.position.requires_grad_() for x in layers.values()]
    scales = [x.log_change.requires_grad_() for x in layers.values()]
    for value in norms.values():
        value.requires_grad_()
    groups = [{"params": positions, "lr": 2 * ROUNDING_REACH / steps}]
    groups += [{"params": scales, "lr": SCALE_RATE}]
    groups += [{"params": [value], "lr": NORM_RATE * float(value.detach().abs().mean())} for value in norms.values()]
    smooth = torch.optim.Adam(groups, betas=(0.9, 0.95))
    decay = torch.optim.lr_scheduler.LambdaLR(smooth, lambda step: 1 - step / steps)
    order: list[int] = []
    for _ in range(steps):
        if not order:
            order = torch.randperm(len(targets), generator=generator).tolist()
        number = order.pop()
        loss = _loss(block, layers, norms, block.inputs[number], targets[number])
        loss.backward()  # type: ignore[no-untyped-call]
        smooth.step()
        smooth.zero_grad()
        decay.step()

    for tensor in (*positions, *scales, *norms.values()):
        tensor.requires_grad_(False)
    after = _error(block, layers, norms, targets)
    if not after < before:
        for name, layer in layers.items():
            layer.position, layer.log_change = start[name]
        norms = before_norms
    parameters = dict(block.module.named_parameters())
    for name, value in norms.items():
        parameters[name].data.copy_(value)
    return {"error_before": before, "error_after": min(before, after)}


def _output(block: BlockVisit, layers: Mapping[str, Tuned], norms: Mapping[str, Tensor], states: Tensor) -> Tensor:
    dtype = next(block.module.parameters()).dtype
    weights = {f"{name}.weight": layer.weight().to(dtype) for name, layer in layers.items()}
    return block.forward(states, weights | {name: value.to(dtype) for name, value in norms.items()})


def _loss(
    block: BlockVisit, layers: Mapping[str, Tuned], norms: Mapping[str, Tensor], states: Tensor, target: Tensor
) -> Tensor:
    """Mean over tokens of the squared error relative to the token's own size, which is what the next norm sees."""
    target = target.to(states.device).float()
    difference = _output(block, layers, norms, states).float() - target
    return (difference.square().sum(-1) / target.square().sum(-1).clamp_min(1e-12)).mean()


@torch.no_grad()
def _error(
    block: BlockVisit, layers: Mapping[str, Tuned], norms: Mapping[str, Tensor], targets: Sequence[Tensor]
) -> float:
    losses = [float(_loss(block, layers, norms, x, y)) for x, y in zip(block.inputs, targets, strict=True)]
    return sum(losses) / len(losses)

"""Disturb a model with hooks: noise on the inputs of the MLPs' gates, random masking of attention outputs.

Simulates inexact arithmetic and lossy memory while a model is measured or trained; its weights stay as they are. Each
block draws from a generator of its own, so that a walk (block by block) and a whole model (batch by batch) that see the
same batches in the same order get the same noise. Without a seed torch's global generator is drawn from, which training
saves, resumes and replays where activations are computed again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from edgepress.checkpoints.errors import CheckpointError, PlanError, near
from edgepress.checkpoints.lazy import torch
from edgepress.checkpoints.shape import BlockShape, LinearShape, ModelShape

if TYPE_CHECKING:
    from torch import Tensor, nn

KINDS = ("gate-noise", "attention-mask")
_GATES = ("gate_proj", "w1", "wi_0", "linear_gate", "gate")
FUSED = ("gate_up_proj", "gate_and_up_proj")  # the gate's rows come first, as transformers splits them


@dataclass(frozen=True)
class Disturbance:
    """One kind of disturbance at one strength, drawn from one seed, or from torch's global generator.

    gate-noise: x + e with e ~ N(0, strength^2) before the gate's projection. attention-mask: each element of the
    attention's output is zero with probability `strength`, the others are divided by 1 - strength if `rescale`.
    """

    kind: str
    strength: float
    seed: int | None = 0
    rescale: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise PlanError(
                f"unknown disturbance '{self.kind}'{near(self.kind, KINDS)}; there are {' and '.join(KINDS)}"
            )
        if self.kind == "gate-noise" and not 0 <= self.strength < float("inf"):
            raise PlanError(f"gate-noise {self.strength}: a standard deviation is 0 or more")
        if self.kind == "attention-mask" and not 0 <= self.strength <= 1:
            raise PlanError(f"attention-mask {self.strength}: a probability lies between 0 and 1")
        if self.kind == "attention-mask" and self.rescale and self.strength == 1:
            raise PlanError("attention-mask 1 leaves nothing to rescale; give less than 1, or do not rescale")

    def generator(self, block: int) -> torch.Generator | None:
        if self.seed is None:
            return None
        digest = hashlib.sha256(f"{self.seed} {self.kind} block {block}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    @contextmanager
    def on_block(self, block: nn.Module, shape: BlockShape, index: int) -> Iterator[None]:
        """Disturb every forward pass through one block until the context ends.

        Raises CheckpointError where the block has no gate or attention that could be told by name or shape.
        """
        generator = self.generator(index)
        if self.kind == "gate-noise":
            gate = find_gate(shape, index)
            linear = block.get_submodule(gate.name)
            handle = (
                linear.register_forward_hook(_noise_on_half(self.strength, generator))
                if _leaf(gate) in FUSED
                else linear.register_forward_pre_hook(_noise(self.strength, generator))
            )
        else:
            attention = find_attention(block, index)
            handle = attention.register_forward_hook(_mask(self.strength, self.rescale, generator))
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def on_model(self, model: nn.Module, shape: ModelShape) -> Iterator[None]:
        """The same on every block of a whole model."""
        with ExitStack() as stack:
            for index, block in enumerate(shape.blocks):
                stack.enter_context(self.on_block(model.get_submodule(f"{shape.block_prefix}.{index}"), block, index))
            yield


# --- finding the places -------------------------------------------------------------------------------------------


def find_gate(block: BlockShape, index: int) -> LinearShape:
    """The linear layer whose output goes through the MLP's activation.

    It widens what another layer narrows again. By its usual names among those; else, where there is only one, by
    its shape: a gate and an up-projection of unknown names cannot be told apart.
    """
    outside = [x for x in block.linears if "attn" not in x.name and "attention" not in x.name]
    paired = [x for x in outside if any((y.in_features, y.out_features) == _inner(x) for y in outside if y is not x)]
    widening = [x for x in paired if x.out_features > x.in_features]
    found = [x for x in paired if _leaf(x) in _GATES + FUSED] or (widening if len(widening) == 1 else [])
    if len(found) == 1:
        return found[0]
    raise CheckpointError(
        f"block {index}: the MLP's gate cannot be told; it would be called one of {', '.join(_GATES + FUSED)}, or be "
        f"the MLP's only layer beside its down-projection. The block's linear layers are "
        f"{', '.join(f'{x.name} ({x.out_features} x {x.in_features})' for x in block.linears) or 'none'}"
    )


def _leaf(linear: LinearShape) -> str:
    return linear.name.rpartition(".")[2]


def _inner(linear: LinearShape) -> tuple[int, int]:
    """Width inside the MLP if this is its gate, and width outside."""
    return linear.out_features // (2 if _leaf(linear) in FUSED else 1), linear.in_features


def find_attention(block: nn.Module, index: int) -> nn.Module:
    """The block's one child whose class is an attention."""
    children = list(block.named_children())
    found = [module for _, module in children if "attention" in type(module).__name__.lower()]
    if len(found) != 1:
        raise CheckpointError(
            f"block {index}: exactly one attention is needed whose output can be masked; the block has "
            f"{', '.join(f'{name} ({type(module).__name__})' for name, module in children)}"
        )
    return found[0]


# --- the hooks ----------------------------------------------------------------------------------------------------


def _normal(shape: Sequence[int], like: Tensor, strength: float, generator: torch.Generator | None) -> Tensor:
    # Drawn in host memory and float32 whatever the device and precision are: the same noise everywhere.
    return (torch.randn(tuple(shape), generator=generator) * strength).to(like.device, like.dtype)


def _noise(
    strength: float, generator: torch.Generator | None
) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x = inputs[0]
        return (x + _normal(x.shape, x, strength, generator), *inputs[1:])

    return hook


def _noise_on_half(strength: float, generator: torch.Generator | None) -> Callable[..., Tensor]:
    """For gate and up in one layer: (x + e) Wg = x Wg + e Wg, and x Wu stays free of noise."""

    def hook(linear: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        x, weight = inputs[0], cast("Tensor", linear.weight)
        gate, up = output.chunk(2, dim=-1)
        noise = _normal(x.shape, x, strength, generator)
        return torch.cat([gate + torch.nn.functional.linear(noise, weight[: gate.shape[-1]]), up], dim=-1)

    return hook


def _mask(strength: float, rescale: bool, generator: torch.Generator | None) -> Callable[..., Any]:
    def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        y = output[0] if isinstance(output, tuple) else output
        kept = (torch.rand(tuple(y.shape), generator=generator) >= strength).to(y.device)
        y = torch.where(kept, y / (1 - strength) if rescale else y, torch.zeros((), dtype=y.dtype, device=y.device))
        return (y, *output[1:]) if isinstance(output, tuple) else y

    return hook

"""Scaling the inputs of a block's layers without changing what the block computes.

If what makes an input x gives x / s instead, and the layers that take it hold W s, the block is as before. What
precedes is a norm, found as the module whose very output the layers get; or a layer with only products and sums of
rows in between: the values' projection before the attention's, the up-projection before the down-projection.
Every fold is tried on real states: one that does not give x / s, as with a norm in between, or that changes the
block's result, as where something else takes x, is undone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgepress.checkpoints.walk import BlockVisit
from edgepress.stages.refine import norms_of

# Layer -> those whose last rows may make its inputs, rows scaled for columns scaled.
_BEFORE = {"o_proj": ("v_proj", "qkv_proj"), "down_proj": ("up_proj", "gate_up_proj")}
_TOLERANCE, _COARSE = {torch.float32: 1e-4}, 0.02  # relative; the latter for 16 bits


@dataclass
class Trace:
    """One pass of the block's first states."""

    inputs: dict[str, Tensor]  # of each linear layer (b, L, in)
    outputs: dict[str, Tensor]  # of each norm (b, L, d)
    result: Tensor  # of the block (b, L, d)


@torch.no_grad()
def trace(block: BlockVisit) -> Trace:
    """Raises IndexError without calibration states."""
    seen = Trace({}, {}, torch.empty(0))

    def keep_input(name: str) -> Callable[..., None]:
        return lambda _, inputs: seen.inputs.update({name: inputs[0]})

    def keep_output(name: str) -> Callable[..., None]:
        return lambda _, inputs, output: seen.outputs.update({name: output})

    hooks = [linear.register_forward_pre_hook(keep_input(name)) for name, linear in block.linears.items()]
    hooks += [norm.register_forward_hook(keep_output(name)) for name, norm in norms_of(block.module).items()]
    try:
        seen.result = block.forward(block.inputs[0], {})
    finally:
        for hook in hooks:
            hook.remove()
    return seen


class Folding:
    """A block whose inputs are being scaled. `weights` holds its linear layers in float32, scalings so far included."""

    def __init__(self, block: BlockVisit) -> None:
        self.block, self.trace = block, trace(block)
        self.scaling: dict[str, dict[str, Tensor]] = {name: {} for name in block.linears}  # rows (out,), columns (in,)
        self.weights = {name: linear.weight.to(torch.float32, copy=True) for name, linear in block.linears.items()}

    def before(self, names: tuple[str, ...]) -> str | None:
        """The norm or layer that makes the input which `names` share; None if there is none to fold into."""
        x = self.trace.inputs.get(names[0])
        if x is None:  # the first states did not come by
            return None
        for name, output in self.trace.outputs.items():
            if output is x:
                return name if _offset(self.block.module.get_submodule(name)) is not None else None
        parent, _, leaf = names[0].rpartition(".")
        wanted = [f"{parent}.{maker}" for maker in _BEFORE.get(leaf, ())] if len(names) == 1 else []
        return next((name for name in wanted if name in self.block.linears and self._fits(names[0], name)), None)

    def _fits(self, name: str, before: str) -> bool:
        rows = self._distinct(name)
        return self.block.linears[name].in_features % rows == 0 and self.block.linears[before].out_features >= rows

    def _distinct(self, name: str) -> int:
        """How many rows make the layer's inputs: heads that share a value share its row."""
        if name.rpartition(".")[2] == "o_proj":
            return self.block.model.kv_heads * self.block.model.head_dim
        return self.block.linears[name].in_features

    def shared(self, names: tuple[str, ...], values: Tensor) -> Tensor:
        """values (in,), one for each input, made equal where one row makes several inputs."""
        if names[0].rpartition(".")[2] != "o_proj":
            return values
        by_head = values.view(self.block.model.kv_heads, -1, self.block.model.head_dim)
        return by_head.mean(dim=1, keepdim=True).expand_as(by_head).flatten()

    @torch.no_grad()
    def fold(self, names: tuple[str, ...], before: str, s: Tensor) -> Tensor | None:
        """Divide the input of `names` by s (in,), equal where `shared`, and multiply their columns with it.

        Returns s as the precision of a norm's file leaves it, so that nothing is lost; None if it was undone.
        """
        module = self.block.module.get_submodule(before)
        kept = {name: parameter.detach().clone() for name, parameter in module.named_parameters(recurse=False)}
        if before in self.block.linears:
            rows = self._rows(names, before, s)
            for parameter in module.parameters(recurse=False):
                parameter.div_(rows.unsqueeze(1) if parameter.dim() == 2 else rows)
        else:
            s = _divide_norm(module, s, self.block.stored_dtype)
        for name in names:
            self.block.linears[name].weight.copy_(self.weights[name] * s)
        if not self._gives(names[0], s):
            for name, tensor in kept.items():
                module.get_parameter(name).copy_(tensor)
            for name in names:
                self.block.linears[name].weight.copy_(self.weights[name])
            return None
        for name in names:
            self.weights[name] *= s
            self.scaling[name]["columns"] = s.clone()  # safetensors stores no shared memory
        if before in self.block.linears:
            self.weights[before] /= rows.unsqueeze(1)
            self.scaling[before]["rows"] = 1 / rows
        return s

    def _rows(self, names: tuple[str, ...], before: str, s: Tensor) -> Tensor:
        """What each row of the layer before is divided by: (out,)."""
        if names[0].rpartition(".")[2] == "o_proj":
            s = s.view(self.block.model.kv_heads, -1, self.block.model.head_dim)[:, 0].flatten()
        rows = s.new_ones(self.block.linears[before].out_features)
        rows[len(rows) - len(s) :] = s
        return rows

    def _gives(self, name: str, s: Tensor) -> bool:
        """Whether the layer's input now is x / s, and the block's result what it was: nobody else takes the input."""
        was, now = self.trace, trace(self.block)
        pairs = ((now.inputs[name].float() * s, was.inputs[name]), (now.result.float(), was.result))
        limit = _TOLERANCE.get(was.result.dtype, _COARSE)
        holds = all(float((found - x).norm()) <= limit * float(x.float().norm()) for found, x in pairs)
        self.trace = now if holds else self.trace
        return holds


def _offset(norm: nn.Module) -> float | None:
    """What the norm adds to its vector before it multiplies: 0, in some families 1; None for any other norm."""
    if [name for name, _ in norm.named_parameters(recurse=False)] != ["weight"]:
        return None
    weight = norm.get_parameter("weight").detach()
    signs = torch.ones_like(weight).unsqueeze(0)  # mean 0 and mean square 1: what comes out is the vector
    signs[:, 1::2] = -1
    with torch.no_grad():
        gain = (norm(signs) * signs)[0].float()
    for offset in (0.0, 1.0):
        if torch.allclose(gain, weight.float() + offset, rtol=0.02, atol=0.02):
            return offset
    return None


@torch.no_grad()
def _divide_norm(norm: nn.Module, s: Tensor, stored: torch.dtype) -> Tensor:
    """The norm's vector over s, as its file will hold it, and the s (d,) that this comes to."""
    weight, offset = norm.get_parameter("weight"), _offset(norm) or 0.0
    gain = weight.float() + offset
    divided = (gain / s - offset).to(stored).to(weight.dtype)
    left = divided.float() + offset
    usable = (gain != 0) & (left != 0)
    weight.copy_(torch.where(usable, divided, weight))
    return torch.where(usable, gain / torch.where(usable, left, torch.ones_like(left)), torch.ones_like(s))

"""Round to nearest where the inputs that matter have been given a finer grid.

AWQ (Lin et al., arXiv 2306.00978): the columns of inputs with large activations are multiplied with
s = mean(abs(X))^alpha before rounding, and what precedes the layer is divided by it (equation 4), which costs
nothing at inference. alpha is searched for the least error of the outputs over the calibration tokens; then each
group's range, as in GPTQ's scale search. A zero times s is a zero, so a mask stays. Where nothing precedes that could
be divided, s is 1. The factors are kept beside the shards for whoever compares with the dense weights, as eora does.

Departures: the error is that of the layers themselves, tr(dW H dW^T), not that of the attention they feed; queries'
and keys' ranges are searched too; and where heads share keys and values, inputs made by one row share their s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgepress.checkpoints.forms import Grid
from edgepress.checkpoints.lazy import torch
from edgepress.stages.hessian import output_error
from edgepress.stages.options import Gptq as Options
from edgepress.stages.quantisers import HESSIANS
from edgepress.stages.quantisers.codes import Coded, fit_grid, nearest

if TYPE_CHECKING:
    from torch import Tensor, nn

    from edgepress.checkpoints.walk import BlockVisit

NEEDS = HESSIANS
TUNES = False
POINTS = 20  # values of alpha that are tried, from 0 up


def form(options: Options, masked: bool, bits: int) -> Grid:
    return Grid(bits, options.group, options.symmetric)


@dataclass
class Scaled(Coded):
    error: float  # tr(dW H dW^T) / tr(W H W^T): relative squared error of the layer's output
    alpha: float
    folded: str | None  # the norm or layer that was divided
    factors: dict[str, Tensor]  # rows (out,) and columns (in,) that the dense weight was multiplied with

    def scaling(self) -> dict[str, Tensor]:
        return {side: factor.cpu() for side, factor in self.factors.items()}

    def facts(self) -> dict[str, Any]:
        return {"error": self.error, "alpha": self.alpha, "folded_into": self.folded}


@dataclass
class Inputs:
    """What calibration showed of an input that layers share."""

    hessian: Tensor  # (in, in): X^T X
    size: Tensor  # (in,): sum of abs(X)


def quantise(
    block: BlockVisit, masks: Mapping[str, Tensor | None], forms: Mapping[str, Grid], options: Options
) -> dict[str, Scaled]:
    folding = Folding(block)
    chosen: dict[str, tuple[Tensor, float, str | None]] = {}
    for names, inputs in observed(block).items():
        hessian, alpha, before = inputs.hessian, 0.0, folding.before(names)
        coded = [name for name in names if name in masks]
        if before is not None and coded:
            weights = [folding.weights[name] for name in coded]
            alpha, s = search(weights, hessian, folding.shared(names, inputs.size), forms[coded[0]])
            found = folding.fold(names, before, s) if alpha else None
            if found is None:
                alpha, before = 0.0, None
            else:
                hessian = hessian / (found.unsqueeze(1) * found)
        chosen |= dict.fromkeys(coded, (hessian, alpha, before))
    # Only now: a later fold may have scaled the rows of a layer whose columns were scaled before.
    for name in block.linears.keys() - masks.keys():
        block.linears[name].weight.copy_(folding.weights[name])
    return {
        name: solve(folding.weights[name], *found, folding.scaling[name], forms[name], options)
        for name, found in chosen.items()
    }


def observed(block: BlockVisit) -> dict[tuple[str, ...], Inputs]:
    """Statistics of each distinct input over all calibration tokens."""
    found: dict[tuple[str, ...], Inputs] = {}

    def add(names: tuple[str, ...], x: Tensor) -> None:
        x = x.float()
        if names not in found:
            found[names] = Inputs(x.new_zeros(x.shape[1], x.shape[1]), x.new_zeros(x.shape[1]))
        found[names].hessian.addmm_(x.T, x)
        found[names].size += x.abs().sum(dim=0)

    block.observe(add)
    return found


def search(weights: list[Tensor], hessian: Tensor, size: Tensor, grid: Grid) -> tuple[float, Tensor]:
    """alpha and s (in,) with the least error of the outputs of `weights`, (out, in) each, rounded to nearest.

    size (in,): mean(abs(X)) up to a factor, which does not matter: s is brought to a geometric middle of 1.
    """
    best_alpha, best_s, least = 0.0, torch.ones_like(size), float("inf")
    for alpha in (point / POINTS for point in range(POINTS)):
        s = (size / size.mean().clamp_min(1e-30)).clamp_min(1e-3) ** alpha
        s = s / (s.max() * s.min()).sqrt()
        error = 0.0
        for weight in weights:
            W = weight * s
            off = nearest(W, *fit_grid(W, s, grid, search=False), grid).weight / s - weight
            error += float(((off @ hessian) * off).sum())
        if error < least:
            best_alpha, best_s, least = alpha, s, error
    return best_alpha, best_s


def solve(
    weight: Tensor,
    hessian: Tensor,
    alpha: float,
    before: str | None,
    factors: dict[str, Tensor],
    grid: Grid,
    options: Options,
) -> Scaled:
    """weight (out, in) float32 and hessian (in, in), both scaled already."""
    scales, zeros = fit_grid(weight, hessian.diagonal(), grid, options.scale_search)
    coded = nearest(weight, scales, zeros, grid)
    error = output_error(weight, coded.weight, hessian)
    return Scaled(coded.codes, scales, zeros, grid, error, alpha, before, factors)


# --- folding scales into what precedes --------------------------------------------------------------------------------
# Scaling the inputs of a block's layers without changing what the block computes.
#
# If what makes an input x gives x / s instead, and the layers that take it hold W s, the block is as before. What
# precedes is a norm, found as the module whose very output the layers get; or a layer with only products and sums of
# rows in between: the values' projection before the attention's, the up-projection before the down-projection. Every
# fold is tried on real states: one that does not give x / s, as with a norm in between, or that changes the block's
# result, as where something else takes x, is undone.


# Layer -> those whose last rows may make its inputs, rows scaled for columns scaled.
_BEFORE = {"o_proj": ("v_proj", "qkv_proj"), "down_proj": ("up_proj", "gate_up_proj")}
_TOLERANCE, _COARSE = 1e-4, 0.02  # relative; the latter for 16 bits


@dataclass
class Trace:
    """One pass of the block's first states."""

    inputs: dict[str, Tensor]  # of each linear layer (b, L, in)
    outputs: dict[str, Tensor]  # of each norm (b, L, d)
    result: Tensor  # of the block (b, L, d)


def trace(block: BlockVisit) -> Trace:
    """Raises IndexError without calibration states."""
    from edgepress.stages.refine import norms_of

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

    def shared(self, names: tuple[str, ...], values: Tensor, largest: bool = False) -> Tensor:
        """values (in,), one for each input, made equal where one row makes several inputs: their mean or largest."""
        if names[0].rpartition(".")[2] != "o_proj":
            return values
        by_head = values.view(self.block.model.kv_heads, -1, self.block.model.head_dim)
        joined = by_head.amax(dim=1, keepdim=True) if largest else by_head.mean(dim=1, keepdim=True)
        return joined.expand_as(by_head).flatten()

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
        limit = _TOLERANCE if was.result.dtype == torch.float32 else _COARSE
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


def _divide_norm(norm: nn.Module, s: Tensor, stored: torch.dtype) -> Tensor:
    """The norm's vector over s, as its file will hold it, and the s (d,) that this comes to."""
    weight, offset = norm.get_parameter("weight"), _offset(norm) or 0.0
    gain = weight.float() + offset
    divided = (gain / s - offset).to(stored).to(weight.dtype)
    left = divided.float() + offset
    usable = (gain != 0) & (left != 0)
    weight.copy_(torch.where(usable, divided, weight))
    return torch.where(usable, gain / torch.where(usable, left, torch.ones_like(left)), torch.ones_like(s))

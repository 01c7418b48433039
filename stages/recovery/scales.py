"""A quantised model whose codes stay and whose scales, minima, real zero points and norms are trained end to end.

EfficientQAT (Chen et al., arXiv 2407.11062), section 3.3. Each packed linear layer computes with the weights that its
codes and the rounded scales stand for, and the gradient passes through the rounding, so what is trained is what the
file will hold. All variables are relative to what they change: one learning rate fits them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, autograd, nn

from edgepress.checkpoints.checkpoint import Checkpoint, round_inputs
from edgepress.checkpoints.forms import Grid, RealGrid
from edgepress.checkpoints.packed_linear import PackedLinear
from edgepress.checkpoints.packing import group_of
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.shape import LinearShape
from edgepress.checkpoints.super_blocks import SuperBlocks
from edgepress.stages.refine import multiplier, norms_of, straight_through

# A weight is scale * (level - zero) - least: (out, groups) each, the last two None where a form has none.
Affine = tuple[Tensor, Tensor | None, Tensor | None]


class Variables(Protocol):
    """What is trained of one layer, beside codes that stay."""

    def named(self) -> dict[str, nn.Parameter]:
        """The variables, all 0 at the start."""

    def affine(self) -> Affine:
        """As the file will hold them, in float32; the gradient passes through the rounding to the variables."""

    def sides(self) -> dict[str, Tensor]:
        """The form's sides with what became of them, on the CPU."""


def _zeros(like: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.zeros(like.shape, dtype=torch.float32, device=like.device))


def _half(exact: Tensor) -> Tensor:
    """With float16's values, and the gradient of what was rounded."""
    return straight_through(exact.detach().to(torch.float16).float(), exact)


class GridVariables:
    """GPTQ's grid: the scales; whole zero points stay."""

    def __init__(self, sides: Mapping[str, Tensor], device: torch.device) -> None:
        self._sides = dict(sides)
        self._start = sides["scales"].T.to(device, torch.float32)
        self.scale = _zeros(self._start)

    def named(self) -> dict[str, nn.Parameter]:
        return {"scale": self.scale}

    def affine(self) -> Affine:
        return _half(self._start * self.scale.exp()), None, None

    @torch.no_grad()
    def sides(self) -> dict[str, Tensor]:
        return self._sides | {"scales": self.affine()[0].T.to("cpu", torch.float16).contiguous()}


class RealGridVariables:
    """Scales and real zero points."""

    def __init__(self, sides: Mapping[str, Tensor], top: int, device: torch.device) -> None:
        self._start = sides["scales"].T.to(device, torch.float32)
        self._zero = sides["zeros"].T.to(device, torch.float32)
        self._reach = top / 2  # codes: as far as the outermost weight moves when its scale changes as much
        self.scale, self.zero = _zeros(self._start), _zeros(self._zero)

    def named(self) -> dict[str, nn.Parameter]:
        return {"scale": self.scale, "zero": self.zero}

    def affine(self) -> Affine:
        return _half(self._start * self.scale.exp()), _half(self._zero + self._reach * self.zero), None

    @torch.no_grad()
    def sides(self) -> dict[str, Tensor]:
        scale, zero, _ = self.affine()
        assert zero is not None
        return {name: x.T.to("cpu", torch.float16).contiguous() for name, x in (("scales", scale), ("zeros", zero))}


class SuperBlockVariables:
    """The float16 scale and minimum of a super-block, and the few-bit codes of its groups' scales and minima."""

    def __init__(self, sides: Mapping[str, Tensor], form: SuperBlocks, device: torch.device) -> None:
        self._form, self._sides = form, dict(sides)
        self._d = sides["d"].to(device, torch.float32)
        self.d = _zeros(self._d)
        if form.minimum:
            self._e = sides["e"].to(device, torch.float32)
            self.e = _zeros(self._e)
        if form.scale_bits:
            self._half_range = 2 ** (form.scale_bits - 1)
            self._offset = 0 if form.minimum else self._half_range
            self._scales = sides["scales"].to(device, torch.float32) - self._offset
            self.scales = _zeros(self._scales)
        if form.scale_bits and form.minimum:
            self._minima = sides["minima"].to(device, torch.float32)
            self.minima = _zeros(self._minima)

    def named(self) -> dict[str, nn.Parameter]:
        there = ("d", "e", "scales", "minima")
        return {name: variable for name in there if (variable := getattr(self, name, None)) is not None}

    def _steps(self) -> dict[str, Tensor]:
        """The sides in float32, scales with their sign."""
        found = {"d": _half(self._d * self.d.exp())}
        if self._form.minimum:
            found["e"] = _half(self._e * self.e.exp())
        if self._form.scale_bits:
            half = self._half_range
            exact = self._scales + half * self.scales
            low, high = (1, 2 * half - 1) if self._form.minimum else (-half, half - 1)
            rounded = exact.detach().round().clamp_(low, high)
            # A scale of 0 would take its group away, and its sign is the side of the range.
            sign = torch.where(self._scales < 0, -1.0, 1.0)
            rounded = torch.where(rounded * sign < 1, sign, rounded)
            found["scales"] = straight_through(torch.where(self.scales.detach() == 0, self._scales, rounded), exact)
        if self._form.scale_bits and self._form.minimum:
            exact = self._minima + self._half_range * self.minima
            found["minima"] = straight_through(exact.detach().round().clamp_(0, 2 * self._half_range - 1), exact)
        return found

    def affine(self) -> Affine:
        steps = self._steps()
        groups = self._sides["scales"].shape[1] if self._form.scale_bits else self._d.shape[1]
        each = groups // self._d.shape[1]
        scale = steps["d"].repeat_interleave(each, dim=1)
        if "scales" in steps:
            scale = scale * steps["scales"]
        if not self._form.minimum:
            return scale, None, None
        least = steps["e"].repeat_interleave(each, dim=1)
        return scale, None, least * steps["minima"] if "minima" in steps else least

    @torch.no_grad()
    def sides(self) -> dict[str, Tensor]:
        steps = self._steps()
        if "scales" in steps:
            steps["scales"] = steps["scales"] + self._offset
        kinds = {"d": torch.float16, "e": torch.float16, "scales": torch.uint8, "minima": torch.uint8}
        return self._sides | {name: x.to("cpu", kinds[name]) for name, x in steps.items()}


class ScaledLinear(PackedLinear):
    """A linear layer of fixed codes with trained scales; its weights are made anew whenever it computes."""

    def __init__(
        self, x: LinearShape, stored: Mapping[str, Tensor], bias: nn.Parameter | None, device: torch.device,
        dtypes: tuple[torch.dtype, torch.dtype],
    ) -> None:  # fmt: skip
        """stored: the layer's tensors by the form's kinds; dtypes: of the weights as stored, and as computed with."""
        super().__init__(x.out_features, x.in_features, bias, self._dense)
        form = x.grid
        assert form is not None
        self.form, self.stored_dtype, self.dtype = form, *dtypes
        self.codes, sides = form.split(x.name, stored, x.out_features, x.in_features, ordered=False)
        self._made: tuple[Affine, Tensor] | None = None
        self.kept: Tensor | None = None
        self.order: Tensor | None = None
        self.variables: Variables
        if isinstance(form, Grid):
            self.variables = GridVariables(sides, device)
            self.order = _unordered(sides["order"], form)
            levels = self.codes.short() - (sides["zeros"].T + 1)[:, sides["order"].long()].short()
        elif isinstance(form, RealGrid):
            self.variables = RealGridVariables(sides, 2**form.bits - 1, device)
            levels = self.codes.short()
        else:
            assert isinstance(form, SuperBlocks)
            self.variables = SuperBlockVariables(sides, form, device)
            if form.marks_zeros:
                self.kept = (self.codes < 2**form.bits).to(device)
            levels = self.codes.short().clamp_(max=2**form.bits - 1) - form.middle
        narrow = torch.int8 if int(levels.abs().max()) < 128 else torch.int16
        self.levels = levels.to(device, narrow)  # a plain attribute: no part of what is saved
        self.order = None if self.order is None else self.order.to(device)

    def forward(self, input: Tensor) -> Tensor:
        product: Tensor = _Product.apply(input, *self.variables.affine(), self)
        return product if self.bias is None else product + self.bias

    def stored(self) -> dict[str, Tensor]:
        """The tensors as they are to be stored now, by the form's kinds."""
        return self.form.join(self.codes, self.variables.sides(), self.stored_dtype)

    def _dense(self) -> Tensor:
        with torch.no_grad():
            return self.dense(*self.variables.affine())

    def dense(self, scale: Tensor, zero: Tensor | None, least: Tensor | None) -> Tensor:
        """(out, in) in the precision it computes in, as the stored weights would be; made anew if a scale changed."""
        now: Affine = scale.detach(), None if zero is None else zero.detach(), None if least is None else least.detach()
        # By value: of an optimiser that changes all its variables in one kernel no counter tells.
        if self._made is None or not all(map(_same, self._made[0], now)):
            self._made = now, self._computed(*now)
        return self._made[1]

    @torch.no_grad()
    def _computed(self, scale: Tensor, zero: Tensor | None, least: Tensor | None) -> Tensor:
        # A row's groups side by side, so that nothing need be spread out in memory.
        shape = (self.out_features, scale.shape[1], -1) if self.order is None else (self.out_features, self.in_features)

        def each(x: Tensor) -> Tensor:
            return x.unsqueeze(-1) if self.order is None else x[:, self.order]

        weight = self.levels.float().view(shape)
        if zero is not None:
            weight -= each(zero)
        weight *= each(scale)
        if least is not None:
            weight -= each(least)
        weight = weight.view(self.out_features, self.in_features)
        if self.kept is not None:
            weight *= self.kept
        return weight.to(self.stored_dtype).to(self.dtype)

    def gathered(self, x: Tensor, groups: int) -> Tensor:
        """The sum over each group: (out, in) as (out, groups)."""
        if self.order is not None:
            return x.new_zeros(len(x), groups).index_add_(1, self.order, x)
        return x.view(len(x), groups, -1).sum(dim=-1)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return b is None if a is None else b is not None and torch.equal(a, b)


def _unordered(order: Tensor, form: Grid) -> Tensor | None:
    """The group of each column (in,) where groups do not lie in storage order, in equal parts; else None."""
    columns = len(order)
    even = form.group == -1 or columns % form.group == 0
    return None if even and order.equal(group_of(columns, form.group)) else order.long()


class _Product(autograd.Function):
    @staticmethod
    def forward(
        context: Any, x: Tensor, scale: Tensor, zero: Tensor | None, least: Tensor | None, layer: ScaledLinear
    ) -> Tensor:
        context.layer = layer
        context.save_for_backward(x, scale, zero, least)
        return F.linear(x, layer.dense(scale, zero, least))

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        layer: ScaledLinear = context.layer
        x, scale, zero, least = context.saved_tensors
        wide = (gradient.flatten(0, -2).T @ x.flatten(0, -2)).float()  # of the weights (out, in)
        if layer.kept is not None:
            wide *= layer.kept
        groups = scale.shape[1]
        total = layer.gathered(wide, groups) if zero is not None or least is not None else None
        of_scale = layer.gathered(wide * layer.levels, groups)
        of_zero = of_least = None
        if zero is not None:
            assert total is not None
            of_scale, of_zero = of_scale - zero * total, -scale * total
        if least is not None:
            assert total is not None
            of_least = -total
        back = gradient @ layer.dense(scale, zero, least) if context.needs_input_grad[0] else None
        return back, of_scale, of_zero, of_least, None


class _Norm(nn.Module):
    """A norm's parametrization: its vector plus a trained change, with the file's rounding."""

    def __init__(self, norm: nn.Module, stored: Tensor) -> None:
        super().__init__()
        weight = norm.get_parameter("weight")
        self.start, self.size = stored.to(weight.device, torch.float32, copy=True), multiplier(norm)
        self.stored, self.dtype = stored.dtype, weight.dtype
        self.change = _zeros(weight)

    def exact(self) -> Tensor:
        return self.start + self.size * self.change

    def forward(self, _: Tensor) -> Tensor:
        exact = self.exact()
        return straight_through(exact.detach().to(self.stored).float(), exact).to(self.dtype)


class Tunable(nn.Module):
    """The model in memory with its codes, and beside it the variables: what is saved of a training is these alone."""

    def __init__(self, source: Checkpoint, runtime: Runtime) -> None:
        super().__init__()
        model: Any = source.model(runtime.device, runtime.dtype, packed=True)
        self.layers: dict[int, dict[str, ScaledLinear]] = {}
        self.norms: dict[str, _Norm] = {}
        self.config, self.loss_type = model.config, model.loss_type  # by which the Trainer counts what is predicted
        self._source = source
        found: dict[str, nn.Parameter] = {}
        prefix, shape, vectors = source.shape.block_prefix, source.shape, source.outer()
        for index, block_shape in enumerate(shape.blocks):
            block, stored = model.get_submodule(f"{prefix}.{index}"), source.stored_block(index)
            self.layers[index] = {}
            for x in (x for x in block_shape.linears if x.grid is not None):
                parent, _, leaf = x.name.rpartition(".")
                assert x.grid is not None
                kinds = {kind: stored[f"{x.name}.{kind}"] for kind in x.grid.kinds}
                dtypes = (_DTYPES[x.dtype], runtime.dtype)
                layer = ScaledLinear(x, kinds, block.get_submodule(x.name).bias, runtime.device, dtypes)
                setattr(block.get_submodule(parent), leaf, layer)
                self.layers[index][x.name] = layer
                found |= {f"{prefix}.{index}.{x.name}.{k}": v for k, v in layer.variables.named().items()}
            round_inputs(block, block_shape, shape.activation_bits)
            vectors |= {f"{prefix}.{index}.{t.name}": stored[t.name] for t in block_shape.others}
        for name, norm in norms_of(model).items():
            change = _Norm(norm, vectors[f"{name}.weight"])
            nn.utils.parametrize.register_parametrization(norm, "weight", change, unsafe=True)
            self.norms[f"{name}.weight"] = change
            found[f"{name}.weight"] = change.change
        # Outside the module tree: neither counted, nor saved, nor put into training mode, where dropout would act.
        object.__setattr__(self, "model", model)
        for name, variable in found.items():
            self.register_parameter(name.replace(".", "/"), variable)

    def forward(self, **inputs: Any) -> Any:
        model: Any = self.__dict__["model"]
        return model(**inputs, use_cache=False)

    def block(self, index: int) -> dict[str, Tensor]:
        """The block's tensors as they are to be stored now, names relative to it."""
        within = f"{self._source.shape.block_prefix}.{index}."
        tensors = dict(self._source.stored_block(index))
        for name, layer in self.layers[index].items():
            tensors |= {f"{name}.{kind}": tensor for kind, tensor in layer.stored().items()}
        return tensors | self._stored_norms(within, tensors)

    def outer(self) -> dict[str, Tensor]:
        """What lies outside the blocks, by full name."""
        tensors = dict(self._source.outer())
        return tensors | self._stored_norms("", tensors)

    @torch.no_grad()
    def _stored_norms(self, within: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        changed = {name: norm for name in tensors if (norm := self.norms.get(within + name)) is not None}
        return {name: norm.exact().to("cpu", norm.stored).contiguous() for name, norm in changed.items()}


_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

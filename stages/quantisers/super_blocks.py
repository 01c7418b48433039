"""GPTQ's codes on grids whose scales are codes themselves: llama.cpp's k-quants, and this project's own.

A grid is found before the codes (`fit`): of each group the scale and minimum with the least squared error, weighted by
the Hessian's diagonal, over shrunken ranges, each followed by least squares; then their few-bit codes, and least
squares for the float16 ones above them. GPTQ's solver (stages/quantisers/gptq.py) finds the codes on it. Then the
float16 ones are solved for once more, now against the whole Hessian (`refit`), and the codes found anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from edgepress.checkpoints.errors import NumericsError, PlanError
from edgepress.checkpoints.lazy import torch
from edgepress.checkpoints.super_blocks import GGUF_TYPES, SuperBlocks
from edgepress.stages.hessian import hessians, inverse_factor, live_diagonal, output_error
from edgepress.stages.options import Gptq as Options
from edgepress.stages.quantisers import HESSIANS
from edgepress.stages.quantisers.codes import rows_at_once
from edgepress.stages.quantisers.gptq import in_turn

if TYPE_CHECKING:
    from torch import Tensor

    from edgepress.checkpoints.walk import BlockVisit

NEEDS = HESSIANS
TUNES = True
SHRINKS = 20  # candidates of a group's range, each 2.5 % smaller than the one before
TURNS = 3  # of least squares between a group's codes and its grid


def form(options: Options, masked: bool, bits: int = 0, gguf: str = "") -> SuperBlocks:
    """bits: of a grid of this project; gguf: a type of ggml's. Raises PlanError for what the type has no room for."""
    if options.symmetric:
        raise PlanError(f"--symmetric: {options.quant} says itself whether it has a minimum; leave it out")
    if not gguf:
        if options.group == -1:
            raise PlanError(
                f"{options.quant} has scales of groups under one of the row; for one scale a row alone give "
                "gptq4-channel, else a --group"
            )
        return SuperBlocks(options.quant, bits, options.group)
    wanted = GGUF_TYPES[gguf]
    if masked and wanted.minimum:
        raise PlanError(
            f"{options.quant} has a real minimum, so none of its codes is exactly 0, and GGUF has no place for a mask; "
            "give q3_k or q6_k, which have none, or gptq4-s, which marks the zeros"
        )
    return wanted


@dataclass
class Coded:
    """One layer on a grid of super-blocks."""

    codes: Tensor  # (out, in) uint8
    grid: Steps
    kept: Tensor | None  # (out, in) bool
    form: SuperBlocks
    dtype: torch.dtype  # of the weights, as the file will state it
    position: Tensor | None  # (out, in) float32: the compensated weight in codes, at most half a one away; high effort
    error: float  # tr(dW H dW^T) / tr(W H W^T), as H weighs the tokens
    damping: float
    float64: bool

    @property
    def weight(self) -> Tensor:
        """(out, in) float32, exactly 0 where the mask is."""
        dense = self.form.dense(self.codes, self.grid.sides())
        return dense if self.kept is None else dense * self.kept

    def stored(self) -> dict[str, Tensor]:
        sides = {name: tensor.cpu() for name, tensor in self.grid.sides().items()}
        kept = None if self.kept is None else self.kept.cpu()
        return self.form.write(self.codes.cpu(), sides, kept, self.dtype)

    def scaling(self) -> dict[str, Tensor]:
        return {}

    def facts(self) -> dict[str, Any]:
        return {"error": self.error, "damping": self.damping, "float64": self.float64, "form": self.form.name}

    def tuned(self, mask: Tensor | None) -> TunedSuperBlocks:
        assert self.position is not None
        kept = mask if self.form.exact_zero else None
        grid = self.grid
        return TunedSuperBlocks(self.position, torch.zeros_like(grid.d), torch.zeros_like(grid.e), grid, kept)

    def settled(self, tuned: TunedSuperBlocks) -> Coded:
        with torch.no_grad():
            return replace(self, codes=tuned.codes().to(torch.uint8), grid=tuned.changed(), position=None)


@dataclass
class TunedSuperBlocks:
    """A layer's variables for stages/refine.py. The few-bit scales and minima stay; d and e above them are tuned."""

    position: Tensor  # (out, in): where between the codes a weight lies
    log_d: Tensor  # (out, supers): of the change
    log_e: Tensor
    grid: Steps  # before the change
    mask: Tensor | None  # (out, in)

    def steps(self) -> list[Tensor]:
        return [self.log_d, self.log_e] if self.grid.form.minimum else [self.log_d]

    def codes(self) -> Tensor:
        nearest = self.position.detach().round().clamp_(0, 2**self.grid.form.bits - 1)
        return nearest if self.mask is None else nearest.masked_fill_(~self.mask, self.grid.form.middle)

    def changed(self) -> Steps:
        """d and e as the file will hold them; the gradient passes through the rounding."""
        from edgepress.stages.refine import straight_through

        d, e = self.grid.d * self.log_d.exp(), self.grid.e * self.log_e.exp()
        return replace(self.grid, d=straight_through(_half(d), d), e=straight_through(_half(e, floor=0.0), e))

    def weight(self) -> Tensor:
        from edgepress.stages.refine import straight_through

        scale, least = self.changed().by_group()
        codes = straight_through(self.codes(), self.position).view(*scale.shape, -1)
        weight = (scale.unsqueeze(-1) * codes - least.unsqueeze(-1)).view_as(self.position)
        return weight if self.mask is None else weight * self.mask

    def reset(self, codes: Tensor) -> None:
        self.position, self.log_d, self.log_e = (
            codes.float(), torch.zeros_like(self.log_d), torch.zeros_like(self.log_e)
        )  # fmt: skip


def quantise(
    block: BlockVisit, masks: Mapping[str, Tensor | None], forms: Mapping[str, SuperBlocks], options: Options
) -> dict[str, Coded]:
    solved: dict[str, Coded] = {}
    for names, hessian in hessians(block).items():
        for name in (n for n in names if n in masks):
            weight = block.linears[name].weight.float()
            try:
                solved[name] = solve(weight, hessian, masks[name], forms[name], options, block.stored_dtype)
            except NumericsError as error:
                raise NumericsError(f"{block.name}.{name}: {error}") from None
    return solved


def solve(
    weight: Tensor, hessian: Tensor, mask: Tensor | None, form: SuperBlocks, options: Options, dtype: torch.dtype
) -> Coded:
    """weight (out, in) float32; hessian (in, in) = X^T X; mask (out, in) is True where a weight may live."""
    H, _ = live_diagonal(hessian)
    importance = H.diagonal().clone()
    columns = weight.shape[1]
    order = importance.argsort(descending=True, stable=True) if options.activation_order else torch.arange(columns)
    inverse = order.argsort()
    U, damping, float64 = inverse_factor(H[order][:, order], options.damping, options.shrinkage)
    kept = mask if mask is not None and form.exact_zero else None

    def coded(grid: Steps) -> Coded:
        scale, least = grid.each(columns)
        zero = (least / scale)[:, order]
        keep = kept[:, order] if kept is not None else None
        Q, P = in_turn(weight[:, order], U, scale[:, order], zero, 2**form.bits - 1, keep)
        codes, position = Q[:, inverse], P[:, inverse] if options.effort == "high" else None
        if kept is not None:
            codes = torch.where(kept, codes, codes.new_tensor(form.middle))
        marked = kept if form.masked else None
        found = Coded(codes.to(torch.uint8), grid, marked, form, dtype, position, 0.0, damping, float64)
        found.error = output_error(weight, found.weight, hessian)
        return found

    best = coded(fit(weight, importance, kept, form, options.scale_search))
    for _ in range(2 if options.scale_search else 0):
        again = coded(refit(weight, H, best))
        if again.error >= best.error:
            break
        best = again
    return best


# --- the grid --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Steps:
    """A layer's scales and minima as the form stores them, in float32 and whole numbers."""

    form: SuperBlocks
    d: Tensor  # (out, supers) float32 holding float16 values
    e: Tensor  # the same of the minima; of no use without
    scales: Tensor  # (out, groups) whole numbers in float32, with their sign
    minima: Tensor  # (out, groups)

    def sides(self) -> dict[str, Tensor]:
        """As `SuperBlocks.sides` lists them."""
        form = self.form
        sides = {"d": self.d.to(torch.float16)}
        if form.minimum:
            sides["e"] = self.e.to(torch.float16)
        if form.scale_bits:
            sides["scales"] = (self.scales + (0 if form.minimum else 2 ** (form.scale_bits - 1))).to(torch.uint8)
        if form.scale_bits and form.minimum:
            sides["minima"] = self.minima.to(torch.uint8)
        return sides

    def by_group(self) -> tuple[Tensor, Tensor]:
        """What multiplies a code, and what is taken off, of each group: (out, groups). Never 0, the first."""
        each = self.scales.shape[1] // self.d.shape[1]
        scale = self.d.repeat_interleave(each, dim=1) * self.scales
        if not self.form.minimum:
            return scale, scale * self.form.middle
        return scale, self.e.repeat_interleave(each, dim=1) * self.minima

    def each(self, columns: int) -> tuple[Tensor, Tensor]:
        """The same for each weight: (out, in)."""
        return tuple(x.repeat_interleave(columns // x.shape[1], dim=1) for x in self.by_group())  # type: ignore[return-value]


def fit(weight: Tensor, importance: Tensor, kept: Tensor | None, form: SuperBlocks, search: bool) -> Steps:
    """The grid for rounding: least error weighted by importance (in,), the Hessian's diagonal; kept (out, in)."""
    out, columns = weight.shape
    if (rows := rows_at_once(weight)) < out:  # a row's grid depends on no other row
        some = [slice(start, start + rows) for start in range(0, out, rows)]
        parts = [fit(weight[x], importance, None if kept is None else kept[x], form, search) for x in some]
        of = {x.name: [getattr(part, x.name) for part in parts] for x in fields(Steps) if x.name != "form"}
        return Steps(form, **{name: torch.cat(tensors) for name, tensors in of.items()})
    w = weight.view(out, form.groups(columns), -1)
    h = importance.view(1, w.shape[1], -1).expand_as(w)
    if kept is not None:
        h = h * kept.view_as(w)
    scale, least = (_ranges if form.minimum else _signed)(w, h, form, search)
    each = w.shape[1] // form.supers(columns)

    def above(x: Tensor, top: int) -> Tensor:
        """The float16 of each super-block under which the largest of its groups takes the highest code."""
        largest = x.view(out, -1, each).abs().amax(dim=-1)
        return _half(largest / top if top else largest)

    def codes(x: Tensor, d: Tensor, low: int, high: int) -> Tensor:
        return (x / d.repeat_interleave(each, dim=1).clamp_min(1e-30)).round().clamp_(low, high)

    ones = scale.new_ones(scale.shape)
    if not form.scale_bits:
        # A scale without a code has its own sign, so that the largest weight may lie on either end.
        d = _half(scale)
        return Steps(form, d, _half(least, floor=0.0), ones, ones)
    half = 2 ** (form.scale_bits - 1)
    top = 2 * half - 1 if form.minimum else half - 1
    d, e = above(scale, top), above(least, top) if form.minimum else scale.new_zeros(out, 1)
    sc = codes(scale, d, 1 if form.minimum else -half, top)
    sc = torch.where(sc == 0, torch.where(scale < 0, -1.0, 1.0), sc)
    steps = Steps(form, d, e, sc, codes(least, e, 0, top) if form.minimum else ones)
    if not search:
        return steps
    best, error = steps, _rounding_error(w, h, steps)
    for _ in range(TURNS):
        steps = _refit_rounded(w, h, steps)
        found = _rounding_error(w, h, steps)
        better = (found < error).unsqueeze(1)
        best = replace(best, d=torch.where(better, steps.d, best.d), e=torch.where(better, steps.e, best.e))
        error = torch.minimum(found, error)
    return best


def _half(x: Tensor, floor: float = 6.2e-8) -> Tensor:
    """As the file will hold it. Below float16's smallest number nothing would be left to multiply with."""
    return x.sign() * x.abs().clamp(floor, 65504.0).to(torch.float16).float()


def _rounded(w: Tensor, scale: Tensor, least: Tensor, top: int) -> Tensor:
    """The nearest codes of w (out, groups, group)."""
    return ((w + least.unsqueeze(-1)) / scale.unsqueeze(-1)).round_().clamp_(0, top)


def _ranges(w: Tensor, h: Tensor, form: SuperBlocks, search: bool) -> tuple[Tensor, Tensor]:
    """Scale > 0 and minimum >= 0 of each group: w is near scale q - minimum."""
    top = 2**form.bits - 1
    low, high = w.amin(dim=-1).clamp(max=0), w.amax(dim=-1)
    floor = (high - low).clamp_min(1e-12) * 1e-3
    best_scale, best_least = (high - low).clamp_min(1e-8) / top, -low
    if not search:
        return best_scale, best_least
    best = torch.full_like(best_scale, torch.inf)
    total, first = h.sum(dim=-1), (h * w).sum(dim=-1)
    for step in range(SHRINKS):
        shrink = 1 - 0.025 * step
        scale, least = ((high - low) * shrink / top).clamp_min(1e-8), -low * shrink
        for _ in range(TURNS):
            q = _rounded(w, scale, least, top)
            hq = h * q
            sq, sqq, sqw = hq.sum(dim=-1), (hq * q).sum(dim=-1), (hq * w).sum(dim=-1)
            det = total * sqq - sq * sq
            s = (total * sqw - sq * first) / det.clamp_min(1e-30)
            m = (sq * s - first) / total.clamp_min(1e-30)  # sum h (s q - m - w) = 0
            alone = m < 0  # a minimum above 0 cannot be stored: the best without one
            s = torch.where(alone, sqw / sqq.clamp_min(1e-30), s)
            m = m.clamp_min(0)
            good = (det > 0) & (s > floor / top)
            s, m = torch.where(good, s, scale), torch.where(good, m, least)
            error = (h * (s.unsqueeze(-1) * q - m.unsqueeze(-1) - w).square_()).sum(dim=-1)
            better = error < best
            best_scale, best_least = torch.where(better, s, best_scale), torch.where(better, m, best_least)
            best = torch.where(better, error, best)
            scale, least = s, m
    return best_scale, best_least


def _signed(w: Tensor, h: Tensor, form: SuperBlocks, search: bool) -> tuple[Tensor, Tensor]:
    """Scale of each group, with its sign: w is near scale (q - middle). The minimum is not stored."""
    half, top = form.middle, 2**form.bits - 1
    at = w.abs().argmax(dim=-1, keepdim=True)
    end = w.gather(-1, at).squeeze(-1)  # the weight that is to lie on the code 0, where there is one more
    end = torch.where(end.abs() < 1e-8, torch.full_like(end, 1e-8), end)
    best_scale = -end / half
    if not search:
        return best_scale, torch.zeros_like(best_scale)
    best = torch.full_like(best_scale, torch.inf)
    for sign in (1.0, -1.0):
        for step in range(SHRINKS):
            scale = -sign * end / half * (1.05 - 0.025 * step)
            for _ in range(TURNS):
                q = _rounded(w, scale, scale * half, top) - half
                sqq, sqw = (h * q * q).sum(dim=-1), (h * q * w).sum(dim=-1)
                s = sqw / sqq.clamp_min(1e-30)
                s = torch.where(s.abs() > 1e-3 * scale.abs(), s, scale)
                error = (h * (s.unsqueeze(-1) * q - w).square_()).sum(dim=-1)
                better = error < best
                best_scale, best = torch.where(better, s, best_scale), torch.where(better, error, best)
                scale = s
    return best_scale, torch.zeros_like(best_scale)


def _rounding_error(w: Tensor, h: Tensor, steps: Steps) -> Tensor:
    """Weighted squared error of the nearest codes, of each row: (out,)."""
    scale, least = steps.by_group()
    q = _rounded(w, scale, least, 2**steps.form.bits - 1)
    return (h * (scale.unsqueeze(-1) * q - least.unsqueeze(-1) - w).square_()).sum(dim=(1, 2))


def _refit_rounded(w: Tensor, h: Tensor, steps: Steps) -> Steps:
    """d and e by least squares for the nearest codes, weighted by h, each super-block by itself."""
    form = steps.form
    scale, least = steps.by_group()
    q = _rounded(w, scale, least, 2**form.bits - 1)
    out = len(scale)
    a = (steps.scales.unsqueeze(-1) * (q - form.middle)).view(out, steps.d.shape[1], -1)
    b = steps.minima.unsqueeze(-1).expand_as(q).reshape(a.shape) if form.minimum else torch.zeros_like(a)
    h, w = h.reshape(a.shape), w.reshape(a.shape)
    aa, ab, bb = ((h * x * y).sum(dim=-1) for x, y in ((a, a), (a, b), (b, b)))
    aw, bw = ((h * x * w).sum(dim=-1) for x in (a, b))
    return _stepped(steps, *_two_unknowns(aa, ab, bb, aw, bw, steps))


def _two_unknowns(aa: Tensor, ab: Tensor, bb: Tensor, aw: Tensor, bw: Tensor, steps: Steps) -> tuple[Tensor, Tensor]:
    """d and e of the least error of w ~ d a - e b, where the system has one solution; else e stays."""
    det = aa * bb - ab * ab
    both = det > 1e-6 * aa * bb
    d = torch.where(both, (aw * bb - ab * bw) / det, aw / aa.clamp_min(1e-30) + steps.e * ab / aa.clamp_min(1e-30))
    e = torch.where(both, (ab * aw - aa * bw) / det, steps.e)
    return d, e


def _stepped(steps: Steps, d: Tensor, e: Tensor) -> Steps:
    """The steps with new d and e, where those keep their signs."""
    change = d / steps.d
    d = torch.where((change > 0.5) & (change < 2), d, steps.d)
    e = torch.where(torch.isfinite(e) & (e >= 0), e, steps.e)
    return replace(steps, d=_half(d), e=_half(e, floor=0.0))


def refit(weight: Tensor, H: Tensor, solved: Coded) -> Steps:
    """d and e of the least output error tr(dW H dW^T) for given codes, one super-block after the other.

    Of row w with a and b as w ~ d a - e b within the super-block: the normal equations of (d, e) under H, with the
    error that the others leave.
    """
    steps, form = solved.grid, solved.form
    columns = weight.shape[1]
    kept = torch.ones_like(weight) if solved.kept is None else solved.kept.float()
    group = columns // steps.scales.shape[1]
    a = steps.scales.repeat_interleave(group, dim=1) * (solved.codes.float() - form.middle) * kept
    b = steps.minima.repeat_interleave(group, dim=1) * kept if form.minimum else torch.zeros_like(a)
    d, e = steps.d.clone(), steps.e.clone()
    size = columns // d.shape[1]
    E = weight - solved.weight
    for k in range(d.shape[1]):
        here = slice(k * size, (k + 1) * size)
        a_k, b_k, H_k = a[:, here], b[:, here], H[here]
        target = E[:, here] + d[:, k : k + 1] * a_k - (e[:, k : k + 1] * b_k if form.minimum else 0)
        # H times what is to be explained: this super-block's own part, and the error of the others.
        rest = E.clone()
        rest[:, here] = target
        pull = rest @ H_k.T
        Ha, Hb = a_k @ H_k[:, here], b_k @ H_k[:, here]
        aa, ab, bb = (Ha * a_k).sum(1), (Ha * b_k).sum(1), (Hb * b_k).sum(1)
        aw, bw = (pull * a_k).sum(1), (pull * b_k).sum(1)
        own = replace(steps, d=d[:, k], e=e[:, k] if form.minimum else torch.zeros_like(d[:, k]))
        found = _stepped(own, *_two_unknowns(aa, ab, bb, aw, bw, own))
        d[:, k] = found.d
        if form.minimum:
            e[:, k] = found.e
        E[:, here] = target - d[:, k : k + 1] * a_k + (e[:, k : k + 1] * b_k if form.minimum else 0)
    return replace(steps, d=d, e=e)

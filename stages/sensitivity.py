"""What each linear layer would cost in bytes and in loss at each way to quantise it, in about six forward passes.

The loss of dW is taken to second order: half of sum_r E[g_r^2] (dW H dW^T)_rr over the tokens, with H = X^T X of the
layer's inputs and g the gradient of the text's loss in the layer's outputs: the empirical Fisher information, factored
as in K-FAC (Martens and Grosse, arXiv 1503.05671), of the outputs the diagonal alone. Layers are taken to add up.
dW is that of GPTQ's solver on a sample of the layer's rows, which it solves independently of one another.

What an adapter of rank r would leave of a layer's error is taken from the spectrum of its weighted residual. EoRA (Liu
et al., arXiv 2410.21271, equations 3 to 5) takes the best B A of that rank for dW Q', with H = Q L Q^T and
Q' = Q sqrt(L), so that of the energy sum_i s_i^2 of its singular values those beyond the first r are left (Eckart and
Young): a share sum_{i > r} s_i^2 / sum_i s_i^2. It is taken of all rows, since few rows have few singular values, but
of the way of the fewest bits alone, and holds for the others; the gradients' weights and the adapter's own rounding are
left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from edgepress.checkpoints.checkpoint import Checkpoint, Skeleton
from edgepress.checkpoints.errors import NumericsError
from edgepress.checkpoints.forms import Form, Grid
from edgepress.checkpoints.lazy import torch
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.shape import ModelShape
from edgepress.checkpoints.super_blocks import SuperBlocks
from edgepress.checkpoints.tokens import TokenBatches
from edgepress.checkpoints.walk import Scratch, States
from edgepress.stages import edge
from edgepress.stages.gradients import advance, nll
from edgepress.stages.hessian import inverse_factor, live_diagonal, of_head
from edgepress.stages.options import Gptq as Options
from edgepress.stages.quantisers import codes, form, super_blocks
from edgepress.stages.quantisers.gptq import in_turn
from edgepress.stages.requirements import forward_operations, linears, tokens

if TYPE_CHECKING:
    from torch import Tensor, nn

VERSION = 2
ROWS = 64  # of a layer that are solved; the others are taken to be like them
# Seconds of a processor over those that `operations` alone would take: SmolLM2-135M, 12 ways, 4 windows of 256 tokens.
SLOWDOWN = 4.0
Way = tuple[str, int]  # a quantiser and its group
Layer = tuple[int, str]  # a block and the layer's name in it


@dataclass(frozen=True)
class Sensitivity:
    """By block and layer of each way: nats a token above the model as it is, and the relative error of the outputs."""

    losses: Mapping[Layer, Mapping[Way, float]]
    errors: Mapping[Layer, Mapping[Way, float]]  # tr(dW H dW^T) / tr(W H W^T)
    embedding: Mapping[int, float]  # nats a token by its bits; 0: as it is
    loss: float  # of the calibration windows, as the model is
    blocks: Mapping[int, float] = field(default_factory=dict)  # nats a token without each block that may go
    left: Mapping[Layer, Mapping[int, float]] = field(default_factory=dict)  # share of the loss, by an adapter's rank

    def to_dict(self) -> dict[str, Any]:
        rows = [
            {"block": i, "layer": n, "quant": q, "group": g, "loss": loss, "error": self.errors[i, n][q, g]}
            for (i, n), ways in self.losses.items()
            for (q, g), loss in ways.items()
        ]
        eora = [
            {"block": i, "layer": n, "rank": r, "left": x} for (i, n), own in self.left.items() for r, x in own.items()
        ]
        return {
            "loss": self.loss,
            "embedding": {str(b): x for b, x in self.embedding.items()},
            "blocks": {str(i): x for i, x in self.blocks.items()},
            "eora": eora,
            "layers": rows,
        }

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> Sensitivity:
        losses, errors = dict[Layer, dict[Way, float]](), dict[Layer, dict[Way, float]]()
        for row in facts["layers"]:
            layer, way = (row["block"], row["layer"]), (row["quant"], row["group"])
            losses.setdefault(layer, {})[way] = row["loss"]
            errors.setdefault(layer, {})[way] = row["error"]
        left = dict[Layer, dict[int, float]]()
        for row in facts.get("eora", ()):
            left.setdefault((row["block"], row["layer"]), {})[row["rank"]] = row["left"]
        blocks = {int(i): x for i, x in facts.get("blocks", {}).items()}
        return cls(losses, errors, {int(b): x for b, x in facts["embedding"].items()}, facts["loss"], blocks, left)


def forms_of(shape: ModelShape, options: Options, ways: Sequence[Way]) -> dict[tuple[Way, int], Form]:
    """The form of each way for each width, as the stage gptq fits it to a layer with settings of its own."""
    widths = {x.in_features for block in shape.blocks for x in block.linears}
    found: dict[tuple[Way, int], Form] = {}
    for quant, group in ways:
        wanted = form(replace(options, quant=quant, group=group, layers=""), shape.pattern is not None)
        found |= {((quant, group), width): wanted.fitted({width}) for width in widths}
    return found


def operations(shape: ModelShape, options: Options, ways: Sequence[Way], ranks: Sequence[int] = ()) -> float:
    """Multiply-adds of `measure`: passes forwards and backwards, Hessians and their factors, and the solver's rows."""
    passes = 6 * forward_operations(shape, options)
    solver = (x.in_features**2 * (tokens(options) + 2 * x.in_features + len(ways) * ROWS) for x in linears(shape))
    spectra = (
        x.in_features**2 * 2 * x.out_features + 9 * min(x.in_features, x.out_features) ** 3 for x in linears(shape)
    )
    return passes + float(sum(solver)) + (float(sum(spectra)) if ranks else 0.0)


def measure(
    source: Checkpoint,
    calibration: TokenBatches,
    options: Options,
    ways: Sequence[Way],
    embedding_bits: Sequence[int],
    runtime: Runtime,
    ranks: Sequence[int] = (),
) -> Sensitivity:
    """Of every layer that a way's form holds. ranks: of adapters. Raises NumericsError naming what is not finite."""
    skeleton = Skeleton(source, runtime.device, runtime.dtype)
    chunks = calibration.chunks(runtime.chunk_tokens)
    forms = forms_of(source.shape, options, ways)
    shapes = [(*ids.shape, source.shape.hidden_size) for ids in chunks]
    count = len(skeleton.blocks)
    losses, errors = dict[Layer, dict[Way, float]](), dict[Layer, dict[Way, float]]()
    left = dict[Layer, dict[int, float]]()
    total = sum(ids.shape[0] * (ids.shape[1] - 1) for ids in chunks)
    with Scratch(runtime.spill_bytes) as scratch:
        inputs = [scratch.states(shapes, runtime.dtype)]
        _fill(inputs[0], skeleton, chunks)
        runtime.progress.start("forwards", count)
        for i in range(count):
            inputs.append(scratch.states(shapes, runtime.dtype, like=inputs[-1]))
            with skeleton.block(i) as block:
                advance(skeleton, block, i, inputs[-1])
            runtime.progress.step(block=f"{i + 1}/{count}")
        edges, beside = dict[int, Skeleton](), dict[int, States]()
        for bits in embedding_bits:
            by_head = options.with_embedding(bits).embedding_codes == "gptq"
            hessian = of_head(skeleton, inputs[-1].chunks) if by_head else None
            outer = edge.quantise_outer(source.outer(), bits, hessian, options.damping)[0]
            edges[bits] = Skeleton(_Rounded.like(source, outer), runtime.device, runtime.dtype)
            beside[bits] = scratch.states(shapes, runtime.dtype)
            _fill(beside[bits], edges[bits], chunks)
        runtime.progress.start("forwards with few bits in the embedding", count if edges else 0)
        for i in range(count if edges else 0):
            with skeleton.block(i) as block:
                for states in beside.values():
                    advance(skeleton, block, i, states)
            runtime.progress.step(block=f"{i + 1}/{count}")
        loss, gradients = _head(skeleton, inputs.pop(), chunks)
        embedding = {0: 0.0} | {bits: (_loss(edges[bits], beside[bits], chunks) - loss) / total for bits in edges}
        runtime.progress.start("backwards", count)
        for i in reversed(range(count)):
            with skeleton.block(i) as block:
                seen, gradients = _back(skeleton, block, i, inputs.pop(), gradients)
                for names, (hessian, squares) in seen.items():
                    weights = {name: skeleton.linears(i)[name].weight.detach().float() for name in names}
                    for name, way, loss_of, error in _solved(weights, hessian, squares, forms, options):
                        losses.setdefault((i, name), {})[way] = loss_of / total
                        errors.setdefault((i, name), {})[way] = error
                    if ranks:
                        left |= {(i, n): x for n, x in _spectra(weights, hessian, forms, options, ranks).items()}
            runtime.progress.step(block=f"{count - i}/{count}")
    bad = [f"block {i}, {name}" for (i, name), own in losses.items() if not all(x < math.inf for x in own.values())]
    if bad or not all(abs(x) < math.inf for x in embedding.values()):
        raise NumericsError(f"the predicted loss of {bad[0] if bad else 'the embedding'} is not finite")
    return Sensitivity(dict(sorted(losses.items())), errors, embedding, loss / total, {}, dict(sorted(left.items())))


class _Rounded(Checkpoint):
    """A checkpoint with embedding and head at few bits."""

    rounded: dict[str, Tensor]

    @classmethod
    def like(cls, source: Checkpoint, rounded: dict[str, Tensor]) -> _Rounded:
        made = cls(source.folder, source.manifest)
        made.rounded = rounded
        return made

    def outer(self) -> dict[str, Tensor]:
        return dict(self.rounded)


def _fill(states: States, skeleton: Skeleton, chunks: list[Tensor]) -> None:
    for number, embedded in enumerate(skeleton.embed(chunks)):
        states.write(number, embedded)


def _loss(skeleton: Skeleton, states: States, chunks: list[Tensor]) -> float:
    with skeleton.head() as head, torch.no_grad():
        return sum(
            float(nll(head(row), own))
            for chunk, ids in zip(states.chunks, chunks, strict=True)
            for row, own in zip(torch.split(chunk, 1), torch.split(ids, 1), strict=True)
        )


def _head(skeleton: Skeleton, states: States, chunks: list[Tensor]) -> tuple[float, list[Tensor]]:
    """The summed loss, and its gradient in the last block's outputs."""
    loss, gradients = 0.0, []
    with skeleton.head() as head:
        for chunk, ids in zip(states.chunks, chunks, strict=True):
            leaf = chunk.to(skeleton.device).requires_grad_()
            for row, own in zip(torch.split(leaf, 1), torch.split(ids, 1), strict=True):
                rows_loss = nll(head(row), own)
                torch.autograd.backward(rows_loss)
                loss += float(rows_loss.detach())
            assert leaf.grad is not None
            gradients.append(leaf.grad)
    return loss, gradients


def _back(
    skeleton: Skeleton, block: nn.Module, index: int, states: States, gradients: list[Tensor]
) -> tuple[dict[tuple[str, ...], tuple[Tensor, dict[str, Tensor]]], list[Tensor]]:
    """H (in, in) of each distinct input with E[g^2] (out,) of the layers that share it; the gradient before it."""
    linears = skeleton.linears(index)
    sums, squares, shared = dict[str, Any](), dict[str, Any](), dict[str, list[str]]()
    rows, last, arrived = 0, dict[int, str](), list[Any]()

    def seen(name: str) -> Callable[..., None]:
        def hook(_: Any, inputs: tuple[Any, ...], output: Any) -> None:
            x = inputs[0]
            first = last.setdefault(id(x), name)
            arrived.append(x)  # so that no other tensor takes its place in memory
            if first == name:
                flat = x.detach().reshape(-1, x.shape[-1]).float()
                sums[name] = sums[name].addmm_(flat.T, flat) if name in sums else flat.T @ flat
            if name not in shared.setdefault(first, []):
                shared[first].append(name)
            output.register_hook(lambda g: squares.update({name: squares.get(name, 0) + _squares(g)}))

        return hook

    hooks = [linear.register_forward_hook(seen(name)) for name, linear in linears.items()]
    before = []
    try:
        for chunk, gradient in zip(states.chunks, gradients, strict=True):
            last.clear()
            arrived.clear()
            leaf = chunk.to(skeleton.device).requires_grad_()
            output = skeleton.call(block, skeleton.arguments(index, chunk), leaf)
            torch.autograd.backward(output, gradient)
            assert leaf.grad is not None
            before.append(leaf.grad)
            rows += chunk.shape[0] * chunk.shape[1]
    finally:
        for hook in hooks:
            hook.remove()
    found = {tuple(names): (sums[first], {n: squares[n] / rows for n in names}) for first, names in shared.items()}
    return found, before


def _squares(gradient: Tensor) -> Tensor:
    return gradient.detach().reshape(-1, gradient.shape[-1]).float().square().sum(dim=0)


def _solved(
    weights: Mapping[str, Tensor],
    hessian: Tensor,
    squares: Mapping[str, Tensor],
    forms: Mapping[tuple[Way, int], Form],
    options: Options,
) -> Iterator[tuple[str, Way, float, float]]:
    """Layer, way, half of sum_r E[g_r^2] (dW H dW^T)_rr and the relative error, of layers that share an input."""
    columns = hessian.shape[0]
    # The layers' rows lie in one matrix: neither the search for scales nor the solver lets one row touch another.
    sample = {name: torch.arange(0, len(w), max(1, len(w) // ROWS))[:ROWS] for name, w in weights.items()}
    rows = torch.cat([weights[name][places] for name, places in sample.items()])
    deltas = _residuals(rows, hessian, _fitting(weights, forms), options)
    errors = {own: ((delta @ hessian) * delta).sum(dim=1) for own, delta in deltas}
    whole = ((rows @ hessian) * rows).sum(dim=1)
    start = 0
    for name, places in sample.items():
        here, out = slice(start, start + len(places)), len(weights[name])
        start += len(places)
        for (way, width), own in forms.items():
            if width == columns and own.holds(out, columns):
                error = errors[own][here]
                loss = 0.5 * out / len(places) * float((squares[name][places] * error).sum())
                yield name, way, loss, float(error.sum() / whole[here].sum().clamp_min(1e-30))


def _fitting(weights: Mapping[str, Tensor], forms: Mapping[tuple[Way, int], Form]) -> list[Form]:
    """The forms that hold one of these layers at least, each once."""
    each = [
        own
        for (_, width), own in forms.items()
        if any(own.holds(*w.shape) and width == w.shape[1] for w in weights.values())
    ]
    return list(dict.fromkeys(each))


def _residuals(rows: Tensor, hessian: Tensor, forms: Sequence[Form], options: Options) -> Iterator[tuple[Form, Tensor]]:
    """dW (rows, in) of rows that GPTQ's solver has put into each form."""
    H, _ = live_diagonal(hessian)
    importance = H.diagonal().clone()
    order = importance.argsort(descending=True, stable=True)
    inverse = order.argsort()
    U, _, _ = inverse_factor(H[order][:, order], options.damping, options.shrinkage)
    scaled: dict[Form, tuple[Tensor, Tensor, int]] = {}
    tops: dict[int, list[Form]] = {}
    for own in forms:
        scaled[own] = _grid(rows, importance, own, options)
        tops.setdefault(scaled[own][2], []).append(own)
    for top, several in tops.items():  # codes of as many bits in one turn
        S, Z = (torch.cat([scaled[own][part] for own in several])[:, order] for part in (0, 1))  # type: ignore[misc]
        W = rows.repeat(len(several), 1)[:, order]
        Q, _ = in_turn(W, U, S, Z, top, None)
        delta = (W - S * (Q - Z))[:, inverse]
        yield from zip(several, torch.split(delta, len(rows)), strict=True)


def _spectra(
    weights: Mapping[str, Tensor],
    hessian: Tensor,
    forms: Mapping[tuple[Way, int], Form],
    options: Options,
    ranks: Sequence[int],
) -> dict[str, dict[int, float]]:
    """By layer and rank the share of the error's energy that the best adapter leaves, at the fewest bits."""
    L, Q = torch.linalg.eigh(hessian.double())
    root = Q * L.clamp_min(0).sqrt()  # Q' (in, in)
    found: dict[str, dict[int, float]] = {}
    for name, weight in weights.items():
        if able := _fitting({name: weight}, forms):
            coarsest = min(able, key=lambda own: (own.bits, -own.group))
            ((_, delta),) = _residuals(weight, hessian, [coarsest], options)
            projected = delta.double() @ root
            wide = projected if projected.shape[0] <= projected.shape[1] else projected.T
            energies = torch.linalg.eigvalsh(wide @ wide.T).clamp_min(0).flip(0).cumsum(0)  # of the first 1, 2, ...
            whole = float(energies[-1])
            found[name] = {
                rank: 1 - float(energies[min(rank, len(energies)) - 1]) / whole if whole > 0 else 1.0 for rank in ranks
            }
    return found


def _grid(rows: Tensor, importance: Tensor, own: Form, options: Options) -> tuple[Tensor, Tensor, int]:
    """Scale and zero point of each weight (rows, in), and the highest code."""
    columns = rows.shape[1]
    if isinstance(own, SuperBlocks):
        fitted = own.suited(rows.shape[0], columns, masked=False)
        scale, least = super_blocks.fit(rows, importance, None, fitted, options.scale_search).each(columns)
        return scale, least / scale, 2**fitted.bits - 1
    assert isinstance(own, Grid)
    scales, zeros = codes.fit_grid(rows, importance, own, options.scale_search)
    each = columns // scales.shape[1]
    return scales.repeat_interleave(each, 1), zeros.float().repeat_interleave(each, 1), 2**own.bits - 1

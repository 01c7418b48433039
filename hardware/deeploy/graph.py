"""Operators that at once compute, choose their integer constants, and write themselves into a graph. No torch.

A `Tensor` has an integer value and, while constants are chosen, the real number that it stands for: each operator
computes both. Where an operator rounds to eight bits, the constants of the rounding are fitted to the real numbers of
a calibration text, so that what the kernels lose (cut-off fractions, whole-numbered roots, a softmax that never quite
reaches one) is given back on average, at no cost on the chip. Later calls read the constants that were chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from edgepress.hardware.deeploy import arithmetic
from edgepress.hardware.deeploy.arithmetic import BETWEEN, Array, Ramp, held

_ROWS = 4096  # of calibration tokens that a scale is searched on
_SCORES = 2**18  # of attention that the steps of a softmax are chosen on
_CLIPS = np.linspace(1.0, 0.3, 15)  # parts of the largest value that a scale may reach
_ROOM = 2.0**30  # a product stays below, so that what is added to it fits the register
MASKED = -256  # added to a score, it leaves the smallest eight-bit number whatever the score was


@dataclass(frozen=True)
class Tensor:
    """shape: in the file, (1, ...). value: (texts, tokens, *shape[1:]), where one side may be 1 for all.

    scale: what one step of the value is worth, for all or for each of the last axis. real: None once constants are
    chosen.
    """

    name: str
    shape: tuple[int, ...]
    value: Array
    scale: Array | float = 1.0
    real: Array | None = None


@dataclass(frozen=True)
class Weights:
    """codes (out, in), whole numbers -128 .. 127; scales (out,); real (out, in) and bias (out,) that they stand for."""

    codes: Array
    scales: Array
    real: Array
    bias: Array | None = None


@dataclass(frozen=True)
class Rounding:
    """Constants of a RequantShift, and what a step of its output is worth."""

    factor: Array | float
    addend: Array | float
    shift: int
    scale: Array | float


@dataclass(frozen=True)
class Softmax:
    """Constants of an iSoftmax, and of the RequantShift before it."""

    rounding: Rounding
    log2: int
    b: int
    c: int


@dataclass(frozen=True)
class Node:
    op: str
    inputs: tuple[str, ...]
    output: str
    attributes: dict[str, Any] = field(default_factory=dict)

    @property
    def own(self) -> bool:
        """Whether the operator is Deeploy's own and not one of ONNX."""
        return self.op.startswith("i") or self.op == "RequantShift"


class Graph:
    """chosen: the constants by the operator's name; those that are missing are chosen from the real numbers."""

    def __init__(self, chosen: dict[str, Any]) -> None:
        self.chosen = chosen
        self.nodes: list[Node] = []
        self.constants: dict[str, Array] = {}
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.shapes: dict[str, tuple[int, ...]] = {}

    # --- in and out ------------------------------------------------------------------------------------------------

    def input(self, shape: tuple[int, ...], value: Array, scale: float = 1.0, real: Array | None = None) -> Tensor:
        tensor = Tensor(f"input_{len(self.inputs)}", shape, value, scale, real)
        self.inputs.append(tensor)
        return tensor

    def output(self, x: Tensor) -> None:
        """Make x an output of the graph, the next of its outputs."""
        name = f"output_{len(self.outputs)}"
        for k, node in enumerate(self.nodes):
            inputs = tuple(name if old == x.name else old for old in node.inputs)
            self.nodes[k] = replace(node, inputs=inputs, output=name if node.output == x.name else node.output)
        self.shapes[name] = self.shapes.pop(x.name)
        self.outputs.append(replace(x, name=name))

    def _node(
        self, op: str, inputs: Sequence[Tensor | str], shape: tuple[int, ...], value: Array, **more: Any
    ) -> Tensor:
        attributes = more.pop("attributes", {})
        name = f"{op}_{len(self.nodes)}"
        names = tuple(x if isinstance(x, str) else x.name for x in inputs)
        self.nodes.append(Node(op, names, name, attributes))
        self.shapes[name] = shape
        return Tensor(name, shape, held(value, BETWEEN), **more)

    def _constant(self, values: Array | float) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants[name] = np.asarray(values, dtype=np.float64)
        return name

    def _round(self, x: Tensor, how: Rounding, real: Array | None) -> Tensor:
        value = arithmetic.requantise(x.value, how.factor, how.addend, how.shift, -128, 127)
        inputs: list[Tensor | str] = [x, self._constant(how.factor), self._constant(how.addend)]
        attributes = {"div": 2.0**how.shift, "n_levels_out": 256.0, "signed": 1.0}
        return self._node("RequantShift", inputs, x.shape, value, scale=how.scale, real=real, attributes=attributes)

    # --- what only moves numbers -----------------------------------------------------------------------------------

    def reshape(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        def moved(values: Array) -> Array:
            return values.reshape(*values.shape[:2], *shape[1:])

        real = None if x.real is None else moved(x.real)
        return self._node(
            "Reshape", [x, self._constant(np.array(shape))], shape, moved(x.value), scale=x.scale, real=real
        )

    def transpose(self, x: Tensor) -> Tensor:
        """The last two axes change places."""
        shape = (*x.shape[:-2], x.shape[-1], x.shape[-2])
        order = [*range(len(shape) - 2), len(shape) - 1, len(shape) - 2]
        real = None if x.real is None else np.swapaxes(x.real, -1, -2)
        value = np.swapaxes(x.value, -1, -2)
        return self._node("Transpose", [x], shape, value, scale=x.scale, real=real, attributes={"perm": order})

    def join(self, past: Tensor | None, new: Tensor, slots: int) -> Tensor:
        """Keys or values (1, heads, slots, width): those of earlier tokens, then the new one's.

        past: None where whole texts are computed at once, and each token's earlier ones are beside it.
        """
        heads, width = new.shape[1], new.shape[3]
        if past is not None:
            value = np.concatenate([past.value, new.value], axis=3)
            return self._node(
                "Concat", [past, new], (1, heads, slots, width), value, scale=new.scale, attributes={"axis": -2}
            )

        def beside(values: Array) -> Array:
            return np.swapaxes(values[:, :, :, 0], 1, 2)[:, None]

        real = None if new.real is None else beside(new.real)
        return Tensor("", (1, heads, slots, width), beside(new.value), new.scale, real)

    # --- products --------------------------------------------------------------------------------------------------

    def linear(self, x: Tensor, weights: Weights, name: str, unit: float = 0.0) -> Tensor:
        """x (1, 1, in) times the weights, to eight bits.

        unit: not 0, every output channel has a scale of its own, a whole number of such units.
        """
        shape = (*x.shape[:-1], len(weights.codes))
        total = x.value @ weights.codes.T
        real = None if x.real is None else x.real @ weights.real.T
        if real is not None and weights.bias is not None:
            real = real + weights.bias
        if name not in self.chosen:
            assert real is not None
            bound = 128 * np.abs(weights.codes).sum(axis=1)
            usual = x.scale * weights.scales
            self.chosen[name] = fitted(total, real, usual, bound, unit)
        product = self._node("MatMul", [x, self._constant(weights.codes.T)], shape, total)
        return self._round(product, self.chosen[name], real)

    def matmul(self, x: Tensor, y: Tensor, name: str, used: Array | None = None) -> Tensor:
        """x (..., rows, k) times y (..., k, columns), to eight bits. used: False for rows of y that count nothing."""
        shape = (*x.shape[:-1], y.shape[-1])
        total = (x.value if used is None else x.value * used) @ y.value
        real = None if x.real is None or y.real is None else x.real @ y.real
        if name not in self.chosen:
            assert real is not None
            self.chosen[name] = fitted(total, real, x.scale * y.scale, 8 * np.abs(total).max())
        product = self._node("MatMul", [x, y], shape, total)
        return self._round(product, self.chosen[name], real)

    def counted_in(self, x: Tensor, unit: float) -> Tensor:
        """The same numbers, counted in units of which each channel's scale is a whole number."""
        factors = np.round(x.scale / unit)
        inputs: list[Tensor | str] = [x, self._constant(np.broadcast_to(factors, x.shape))]
        return self._node("Mul", inputs, x.shape, x.value * factors, scale=unit, real=x.real)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        real = None if x.real is None or y.real is None else x.real + y.real
        return self._node("Add", [x, y], x.shape, x.value + y.value, scale=x.scale, real=real)

    # --- functions -------------------------------------------------------------------------------------------------

    def narrowed(self, x: Tensor, name: str, importance: Array | None = None) -> Tensor:
        """A sum of many layers (1, 1, width) to eight bits. importance: weighs the squared errors."""
        # Deeploy would melt Add and RequantShift into an operator for eight-bit terms; a Reshape keeps them apart.
        x = self.reshape(x, (1, x.shape[-1]))
        if name not in self.chosen:
            assert x.real is not None
            self.chosen[name] = fitted(
                x.value,
                x.real,
                x.scale,
                8 * np.abs(x.value).max(),
                importance=None if importance is None else importance[:, :, 0],
            )
        rounded = self._round(x, self.chosen[name], x.real)
        return self.reshape(rounded, (1, 1, x.shape[-1]))

    def rms_norm(self, x: Tensor, weight: Array, eps: float, name: str) -> Tensor:
        real = None
        if x.real is not None:
            real = x.real / np.sqrt(np.mean(x.real**2, axis=-1, keepdims=True) + eps) * weight
        if name not in self.chosen:
            assert real is not None
            self.chosen[name] = _norm_constants(x.value, real)
        factors, shift, scale = self.chosen[name]
        value = arithmetic.rms_norm(x.value, factors, shift)
        attributes = {"D": 2**shift, "n_levels": 256}
        return self._node(
            "iRMSNorm", [x, self._constant(factors)], x.shape, value, scale=scale, real=real, attributes=attributes
        )

    def softmax_of(self, x: Tensor, y: Tensor, mask: Tensor, factor: float, name: str) -> Tensor:
        """softmax(factor * x @ y + mask) over the last axis, 0 .. 255; 0 where masked."""
        shape = (*x.shape[:-1], y.shape[-1])
        total, seen = x.value @ y.value, mask.value == 0
        real = None
        if x.real is not None and y.real is not None:
            scores = np.where(seen, factor * (x.real @ y.real), -np.inf)
            powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
            real = powers / powers.sum(axis=-1, keepdims=True)
        if name not in self.chosen:
            assert real is not None
            bound = x.shape[-1] * 128.0 * 128.0
            self.chosen[name] = _softmax_constants(total, seen, real, factor * float(x.scale) * float(y.scale), bound)
        how: Softmax = self.chosen[name]
        scores8 = self._round(self._node("MatMul", [x, y], shape, total), how.rounding, None)
        masked = self.reshape(self.add(scores8, mask), shape)
        # Rounds nothing and only keeps the eight bits; an addend of 0 would have Deeploy leave it out.
        kept = self._round(masked, Rounding(4.0, 1.0, 2, how.rounding.scale), None)
        value = arithmetic.softmax(kept.value, how.log2, how.b, how.c)
        attributes = {
            "coeffA": [1.0], "coeffB": [float(how.b)], "coeffC": [float(how.c)], "log2": [float(how.log2)],
            "n_levels": [256.0],
        }  # fmt: skip
        return self._node("iSoftmax", [kept], shape, value, scale=1 / 255, real=real, attributes=attributes)

    def gated(self, gate: Tensor, up: Tensor, name: str) -> Tensor:
        """SiLU(gate) * up, to eight bits."""
        real = None
        if gate.real is not None and up.real is not None:
            real = gate.real / (1 + np.exp(-gate.real)) * up.real
        if f"{name}.ramps" not in self.chosen:
            counts = np.bincount((gate.value.astype(np.int64) + 128).ravel(), minlength=256).astype(np.float64)
            self.chosen[f"{name}.ramps"] = arithmetic.sigmoid_ramps(float(gate.scale), counts)
        pieces: tuple[Ramp, ...] = self.chosen[f"{name}.ramps"]
        terms = [
            self._node(
                "iHardswish", [gate], gate.shape, arithmetic.ramps(gate.value, [ramp]),
                attributes={"one_over_six": ramp[0], "three": ramp[1], "six": ramp[2]},
            )
            for ramp in pieces
        ]  # fmt: skip
        silu = terms[0]
        for term in terms[1:]:
            silu = self.add(silu, term)
        product = self._node("Mul", [silu, up], up.shape, silu.value * up.value)
        if name not in self.chosen:
            assert real is not None
            usual = float(gate.scale) * float(up.scale) / arithmetic.RAMPS_TOTAL
            bound = 128.0 * np.abs(arithmetic.ramps(np.arange(-128.0, 128.0), pieces)).max()
            self.chosen[name] = fitted(product.value, real, usual, bound)
        return self._round(product, self.chosen[name], real)


# --- how constants are chosen ----------------------------------------------------------------------------------------


def fitted(
    total: Array,
    real: Array,
    usual: Array | float,
    bound: Array | float,
    unit: float = 0.0,
    importance: Array | None = None,
) -> Rounding:
    """Constants that take whole numbers `total` closest to the real numbers, in eight bits.

    usual: what a step of `total` is worth, (channels,) or one for all. A line is fitted for each channel of `usual`
    where it explains the real numbers at all (least squares), then the scale is searched whose squared error is least.
    bound: the largest that `total` can be, of each channel. unit: not 0, each channel has a scale of its own, a whole
    number of such units. importance: weighs the squared errors.
    """
    channels, each = real.shape[-1], unit > 0
    t, r = (np.broadcast_to(x, real.shape).reshape(-1, channels) for x in (total, real))
    w = np.ones_like(r) if importance is None else np.broadcast_to(importance, real.shape).reshape(-1, channels)
    if len(t) > _ROWS:
        rows = np.linspace(0, len(t) - 1, _ROWS).astype(np.int64)
        t, r, w = t[rows], r[rows], w[rows]
    axis: int | None = 0 if np.ndim(usual) else None
    mean_t, mean_r = t.mean(axis=axis), r.mean(axis=axis)
    spread = ((t - mean_t) ** 2).mean(axis=axis)
    gain = ((t - mean_t) * (r - mean_r)).mean(axis=axis) / np.where(spread > 0, spread, 1.0)
    trusted = (spread > 0) & (gain > 0.5 * usual) & (gain < 2 * usual)
    gain = np.where(trusted, gain, usual)
    offset = mean_r - gain * mean_t
    found = gain * t + offset

    def error(scale: Array) -> Array:
        left = w * (np.clip(np.round(found / scale), -128, 127) * scale - r) ** 2
        return np.asarray(left.mean(axis=0) if each else left.mean())

    top = np.abs(r).max(axis=0 if each else None)
    top = np.maximum(np.asarray(top), 1e-6)
    tried = [top * clip / 127 for clip in _CLIPS]
    errors = np.stack([error(scale) for scale in tried])
    best = errors.argmin(axis=0)
    scale = np.take_along_axis(np.stack(tried), best[None], axis=0)[0]
    if each:
        scale = np.maximum(np.round(scale / unit), 1) * unit
    return rounding(gain / scale, offset / scale, bound, scale if each else float(scale))


def rounding(factor: Array | float, addend: Array | float, bound: Array | float, scale: Array | float) -> Rounding:
    """Whole numbers for a real factor and addend, as fine as the register allows for numbers up to `bound`."""
    largest = float(np.max(np.abs(factor) * np.maximum(bound, 1.0)))
    reach = max(largest, float(np.max(np.abs(addend))), 1.0)
    shift = int(np.clip(np.floor(np.log2(_ROOM / reach)), 1, 24))
    return Rounding(np.round(factor * 2.0**shift), np.round(addend * 2.0**shift), shift, scale)


def _norm_constants(value: Array, real: Array) -> tuple[Array, int, float]:
    """Factors of iRMSNorm, their shift, and what a step of its output is worth."""
    shift, width = 16, real.shape[-1]
    x, r = value.reshape(-1, width), real.reshape(-1, width)
    root = np.floor(np.sqrt(np.floor(np.mean(x * x, axis=-1, keepdims=True)) + 1))
    unit = x / root
    gain = (unit * r).sum(axis=0) / np.maximum((unit**2).sum(axis=0), 1e-9)
    top, best = max(float(np.abs(r).max()), 1e-6), (np.inf, 1.0)
    for clip in _CLIPS:
        scale = top * clip / 127
        found = np.clip(np.round(unit * gain / scale), -128, 127) * scale
        best = min(best, (float(np.mean((found - r) ** 2)), scale))
    return np.clip(np.round(gain / best[1] * 2.0**shift), -(2.0**24), 2.0**24 - 1), shift, best[1]


def _softmax_constants(total: Array, seen: Array, real: Array, unit: float, bound: float) -> Softmax:
    """unit: what a step of `total` is worth. The steps of the softmax are chosen whose probabilities err least."""
    rows = np.linspace(0, total.shape[0] * total.shape[1] - 1, max(1, _SCORES // total[0, 0].size)).astype(np.int64)
    seen, real = np.broadcast_to(seen, total.shape), real.reshape(-1, *real.shape[2:])[rows]
    seen, total = (x.reshape(-1, *x.shape[2:])[rows] for x in (seen, total))
    largest = np.where(seen, total, -np.inf).max(axis=-1) * unit
    best: tuple[float, Softmax | None] = (np.inf, None)
    for log2 in range(3, 21):
        step = np.log(2) / log2
        b, c = arithmetic.exponential(log2)
        for part in (1.0, 0.999, 0.98):
            addend = 127 - float(np.quantile(largest, part)) / step
            how = rounding(unit / step, addend, bound, step)
            scores = arithmetic.requantise(total, how.factor, how.addend, how.shift, -128, 127)
            found = arithmetic.softmax(np.where(seen, scores, -128), log2, b, c) * seen
            found /= np.maximum(found.sum(axis=-1, keepdims=True), 1)  # what is missing on average is given back later
            error = float(np.mean((found - real) ** 2))
            if error < best[0]:
                best = (error, Softmax(how, log2, b, c))
    assert best[1] is not None
    return best[1]

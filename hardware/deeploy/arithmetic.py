"""What the kernels behind Deeploy's integer operators compute, over whole arrays. No torch.

The kernels are those of Deeploy's target Siracusa_w_neureka (pulp-platform/Deeploy, TargetLibraries/PULPOpen and
Generic; pulp-nn; N-EUREKA). Integers are held in float64, which is exact for all that a 32-bit register holds and lets
matrix products run at the speed of BLAS. A number that would not fit the register is an OverflowError.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Ramp = tuple[int, int, int]  # weight, start, width: weight * clip(x + start, 0, width), one operator iHardswish
REGISTER = 2.0**31
RAMPS_TOTAL = 960  # what the ramps of a sigmoid add up to; times two eight-bit numbers it stays below BETWEEN
BETWEEN = 2.0**24  # tensors between operators are float32 in the file, which counts no further


def held(x: Array, limit: float = REGISTER) -> Array:
    """x itself. Raises OverflowError where it holds what a signed register of this size does not."""
    if x.size and not (x.min() >= -limit and x.max() < limit):
        raise OverflowError(f"{np.abs(x).max():,.0f} does not fit {limit:,.0f}")
    return x


def requantise(x: Array, factor: Array | float, addend: Array | float, shift: int, low: int, high: int) -> Array:
    """RequantShift: (x * factor + addend + half) >> shift, kept in low .. high."""
    wide = held(x * factor + addend + 2.0 ** (shift - 1))
    rounded: Array = np.clip(np.floor(wide / 2.0**shift), low, high)
    return rounded


def rms_norm(x: Array, weight: Array, shift: int) -> Array:
    """iRMSNorm over the last axis: each product is divided by a whole-numbered root, rounded to zero, then shifted."""
    mean = np.floor(np.sum(x * x, axis=-1, keepdims=True) / x.shape[-1]) + 1
    root = np.floor(np.sqrt(mean))
    normed: Array = np.clip(np.floor(np.trunc(held(x * weight) / root) / 2.0**shift), -128, 127)
    return normed


def softmax(x: Array, log2: int, b: int, c: int) -> Array:
    """iSoftmax over the last axis, 0 .. 255: halved every `log2` steps below the largest, a parabola between.

    The parabola is I-BERT's (arXiv 2101.01321, section 3.5) without its first coefficient, which cancels out.
    """
    below = np.arange(-255.0, 1.0)  # of eight-bit numbers; looked up, as there are many more of them
    halvings = np.clip(np.floor(-below / log2), 0, 31)
    rest = below + halvings * log2
    table = held(np.floor(((rest + b) ** 2 + c) / 2.0**halvings))
    powers = table[(x - x.max(axis=-1, keepdims=True)).astype(np.int16) + 255]
    shares: Array = np.floor(held(powers * 255, 2 * REGISTER) / powers.sum(axis=-1, keepdims=True))
    return shares


def ramps(x: Array, pieces: Sequence[Ramp]) -> Array:
    """x times a sum of clipped straight lines: as many operators iHardswish, added up."""
    lines = [weight * np.clip(x + start, 0, width) for weight, start, width in pieces]
    return held(x * np.sum(lines, axis=0))


# --- constants that make these functions what a model wants ------------------------------------------------------


def exponential(log2: int) -> tuple[int, int]:
    """b and c of `softmax` that follow 2^(x / log2) closest over one halving, x = -log2 + 1 .. 0."""
    x = np.arange(1 - log2, 1, dtype=np.float64)
    wanted = 2.0 ** (x / log2)
    best = (np.inf, 0, 0)
    for b in range(log2 + 1, 4 * log2 + 2):
        # (x + b)^2 + c proportional to the wanted: c from the two ends, then its neighbours
        middle = (2 * (b - log2) ** 2 - b * b) * -1.0
        for c in {int(np.floor(middle)), int(np.ceil(middle))}:
            found = ((x + b) ** 2 + c) / (b * b + c)
            error = float(np.max(np.abs(found / wanted - 1))) if b * b + c > 0 else np.inf
            best = min(best, (error, b, c))
    return best[1], best[2]


def sigmoid_ramps(step: float, counts: Array, pieces: int = 3, total: int = RAMPS_TOTAL) -> tuple[Ramp, ...]:
    """Ramps whose sum follows total * sigmoid(step * x) for x = -128 .. 127, so that x * sum / total is SiLU.

    counts (256,): how often each x is met; the squared error of SiLU is weighed by them. Starts from straight lines
    between points of the sigmoid and moves each whole number as long as that helps.
    """
    x = np.arange(-128, 128, dtype=np.float64)
    weights = counts / counts.sum() + 1e-4
    wanted = 1 / (1 + np.exp(-step * x))

    def error(candidate: list[Ramp]) -> float:
        if any(width < 1 or weight < 0 for weight, _, width in candidate):
            return np.inf
        found = np.sum([w * np.clip(x + s, 0, width) for w, s, width in candidate], axis=0) / total
        return float(np.sum(weights * (x * (found - wanted)) ** 2))

    best: list[Ramp] = []
    for spread in (0.4, 0.6, 0.8, 1.0, 1.5):
        found = []
        for k in range(pieces):
            half = max(1, round(spread * (1.2 + 1.7 * k) / step))
            share = (0.55, 0.3, 0.15)[k] if pieces == 3 else 1 / pieces
            found.append((max(1, round(total * share / (2 * half))), half, 2 * half))
        found = _descended(found, error)
        best = found if not best or error(found) < error(best) else best
    return tuple(best)


def _descended(start: list[Ramp], error: Callable[[list[Ramp]], float]) -> list[Ramp]:
    """Move one number of one ramp, or both of its ends, by less and less while the error falls."""
    found, lowest, stride = start, error(start), 16
    while stride:
        moved = False
        for k, (a, b, c) in [(k, move) for k in range(len(found)) for move in _MOVES]:
            for by in (-stride, stride):
                weight, begin, width = found[k]
                moved_ramp = (weight + a * by, begin + b * by, width + c * by)
                candidate = [*found[:k], moved_ramp, *found[k + 1 :]]
                if (e := error(candidate)) < lowest:
                    found, lowest, moved = candidate, e, True
        stride = stride if moved else stride // 2
    return found


_MOVES = ((1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 2))

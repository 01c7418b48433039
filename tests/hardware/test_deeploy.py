"""The integer operators of hardware/deeploy against the kernels' C code, read line by line, and the real functions."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edgepress.checkpoints.shape import with_wider_ffn
from edgepress.hardware.deeploy.arithmetic import (
    RAMPS_TOTAL,
    exponential,
    held,
    ramps,
    requantise,
    rms_norm,
    sigmoid_ramps,
    softmax,
)
from edgepress.hardware.deeploy.graph import fitted, rounding
from edgepress.hardware.deeploy.memory import memory_use
from edgepress.hardware.soc import load_soc
from tests.kernels import c_division, c_requant, c_rms_norm, c_softmax

pytestmark = pytest.mark.unit

RANDOM = np.random.default_rng(7)


def int8(*shape: int) -> np.ndarray:
    return RANDOM.integers(-128, 128, shape).astype(np.float64)


def test_requantise_is_the_kernels() -> None:
    x = RANDOM.integers(-(2**15), 2**15, 300).astype(np.float64)
    found = requantise(x, 777.0, -12345.0, 17, -128, 127)
    assert found.tolist() == [c_requant(int(v), 777, -12345, 17) for v in x]
    assert {-128, 127} <= set(found)


@pytest.mark.parametrize("width", [1, 7, 64])
def test_rms_norm_is_the_kernels(width: int) -> None:
    x, weight = int8(20, width), RANDOM.integers(-(2**20), 2**20, width).astype(np.float64)
    x[0] = 0
    found = rms_norm(x, weight, 16)
    assert found.tolist() == [c_rms_norm([int(v) for v in row], [int(w) for w in weight], 16) for row in x]


@pytest.mark.parametrize(("log2", "columns"), [(3, 5), (8, 64), (16, 200)])
def test_softmax_is_the_kernels(log2: int, columns: int) -> None:
    b, c = exponential(log2)
    x = int8(12, columns)
    assert softmax(x, log2, b, c).tolist() == [c_softmax([int(v) for v in row], log2, b, c) for row in x]


@pytest.mark.parametrize("log2", [4, 8, 16])
def test_the_softmax_follows_the_real_one(log2: int) -> None:
    step, (b, c) = math.log(2) / log2, exponential(log2)
    x = np.clip(np.round(RANDOM.normal(0, 2, (200, 24)) / step), -128, 127)
    real = np.exp(x * step) / np.exp(x * step).sum(axis=-1, keepdims=True)
    # rounding down costs up to a step of 1/255 and the shifted parabola a little more
    assert np.abs(softmax(x, log2, b, c) / 255 - real).max() < (0.02 if log2 > 4 else 0.06)


@pytest.mark.parametrize("reach", [3.0, 8.0, 20.0])
def test_three_ramps_make_silu(reach: float) -> None:
    step, x = reach / 128, np.arange(-128.0, 128.0)
    counts = np.exp(-0.5 * (x * step / 1.5) ** 2)
    pieces = sigmoid_ramps(step, counts)
    found, real = step * ramps(x, pieces) / RAMPS_TOTAL, x * step / (1 + np.exp(-x * step))
    error = math.sqrt(float(np.average((found - real) ** 2, weights=counts)))
    hard = x * step * np.clip(x * step + 3, 0, 6) / 6
    assert error < 0.55 * math.sqrt(float(np.average((hard - real) ** 2, weights=counts)))
    assert len(pieces) == 3 and all(isinstance(n, int) for ramp in pieces for n in ramp)


def test_what_outgrows_a_register_is_an_error() -> None:
    assert held(np.array([2.0**31 - 1, -(2.0**31)])).size == 2
    with pytest.raises(OverflowError, match="2,147,483,648"):
        held(np.array([2.0**31]))
    with pytest.raises(OverflowError):
        requantise(np.array([2.0**20]), 2.0**12, 0.0, 8, -128, 127)


def test_a_line_is_fitted_for_each_channel_within_the_register() -> None:
    gain, offset = np.array([0.011, 0.02, 0.3]), np.array([1.0, -2.0, 0.25])
    total = RANDOM.integers(-5000, 5000, (400, 1, 3)).astype(np.float64) * np.array([1, 1, 0.02])
    total = np.round(total)
    real = gain * total + offset
    how = fitted(total, real, gain * 1.1, np.abs(total).max(axis=(0, 1)))
    found = requantise(total, how.factor, how.addend, how.shift, -128, 127) * how.scale
    inside = np.abs(real) < 127 * how.scale
    assert inside.mean() > 0.95
    assert np.abs(found - real)[inside].max() < 0.51 * how.scale
    assert isinstance(how.factor, np.ndarray) and np.all(how.factor == np.round(how.factor))
    assert np.max(np.abs(how.factor) * np.abs(total).max(axis=(0, 1))) < 2**30


def test_each_channels_scale_is_a_whole_number_of_units() -> None:
    real = RANDOM.normal(0, 1, (300, 1, 4)) * np.array([0.1, 1, 5, 20])
    total = np.round(real * 1000)
    how = fitted(total, real, np.full(4, 0.001), np.abs(total).max(axis=(0, 1)), unit=0.003)
    steps = np.asarray(how.scale) / 0.003
    assert np.allclose(steps, np.round(steps)) and steps.min() >= 1 and np.all(np.diff(steps) > 0)


def test_a_channel_that_the_numbers_do_not_explain_keeps_its_usual_line() -> None:
    total = np.zeros((50, 1, 1))
    how = fitted(total, np.full((50, 1, 1), 3.0), np.array([0.5]), 100.0)
    assert requantise(total, how.factor, how.addend, how.shift, -128, 127).flat[0] * how.scale == pytest.approx(3, 0.01)
    assert float(np.asarray(how.factor).flat[0]) / 2**how.shift * how.scale == pytest.approx(0.5, 0.01)


def test_a_rounding_stays_below_the_register() -> None:
    how = rounding(0.37, 11.0, 1e6, 1.0)
    assert how.factor * 1e6 + abs(float(how.addend)) + 2 ** (how.shift - 1) < 2**31
    assert float(how.factor) / 2**how.shift == pytest.approx(0.37, 1e-3)


def test_division_of_c() -> None:
    assert [c_division(*pair) for pair in ((7, 2), (-7, 2), (0, 3))] == [3, -3, 0]


def test_the_weights_bytes_are_what_deeploy_0_2_1_counts(make: object) -> None:
    """stories260K padded to 192 channels, a cache of 64 and of 256 tokens, compiled by Deeploy 0.2.1 (TetrisRandom)."""
    assert callable(make)
    shape = with_wider_ffn(make("stories260k"), 32)
    for context, constant, at_run_time in ((64, 46_504, 43_136), (256, 54_248, 153_728)):
        weights, shared, _ = memory_use(shape, load_soc("siracusa"), context)
        assert weights.parts == {"weights": 278_528}
        assert shared.parts["scales and norms"] == pytest.approx(constant, rel=0.02)
        assert shared.nbytes == pytest.approx(constant + at_run_time, rel=0.1)

"""Quantisers that need no calibration, each against an independent formula or loop."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.forms import Grid
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.tokens import TokenBatches
from edgepress.checkpoints.writer import CheckpointWriter
from edgepress.stages import gptq
from edgepress.stages.options import Gptq
from edgepress.stages.quantisers import hqq
from edgepress.stages.quantisers.codes import fit_grid, nearest

pytestmark = pytest.mark.unit


# --- int8 and int4 ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4])
def test_int_codes_equal_the_thesis_formula(
    bits: int,
    build: Callable[..., Checkpoint],
    tokens: Callable[..., TokenBatches],
    writer: CheckpointWriter,
    seal: Callable[..., Checkpoint],
) -> None:
    """Equation 3.3 of the thesis, row by row in numpy; the scale as float16 holds it."""
    source = build("qwen2", blocks=3)
    gptq.run(source, writer, tokens(1), Gptq(quant=f"int{bits}"), Runtime())
    made = seal(writer, source)
    assert made.shape.grid == Grid(bits, -1, symmetric=True)
    most = 2 ** (bits - 1) - 1
    for index, block in enumerate(made.shape.blocks):
        for x, dense in zip(block.linears, source.shape.blocks[index].linears, strict=True):
            assert x.name == dense.name
            weight = source.base_weight(index, dense).numpy()
            scale = (np.abs(weight).max(axis=1, keepdims=True) / most).astype(np.float16).astype(np.float32)
            q = np.clip(np.rint(weight / scale), -most, most)
            assert np.array_equal(made.base_weight(index, x).numpy(), scale * q), x.name
            assert set(np.abs(q).max(axis=1)) == {most}
        assert torch.equal(made.block(index)["self_attn.q_proj.bias"], source.block(index)["self_attn.q_proj.bias"])


# --- half-quadratic, whole zero points -------------------------------------------------------------------------------


def turns_by_hand(
    groups: list[list[float]], kept: list[list[bool]], scales: list[float], zeros: list[float], top: int
) -> list[float]:
    """The authors' loop over lists of numbers: fixed scale, generalised shrinkage, zero point as a mean."""
    beta, best = 10.0, math.inf
    z = list(zeros)
    for _ in range(20):
        total, number = 0.0, 0
        for g, group in enumerate(groups):
            levels = []
            for w, k in zip(group, kept[g], strict=True):
                number += 1
                if not k:
                    continue
                q = min(max(round(w / scales[g] + z[g]), 0), top)
                error = w - scales[g] * (q - z[g])
                total += abs(error)
                outlier = 0.0
                if error:
                    outlier = math.copysign(max(abs(error) - abs(error) ** (0.7 - 1) / beta, 0.0), error)
                levels.append(q - (w - outlier) / scales[g])
            z[g] = sum(levels) / max(len(levels), 1)
        beta *= 1.01
        if total / number >= best:
            break
        best = total / number
    return z


def outlying(seed: int, size: float = 1.0, out: int = 12, columns: int = 64) -> Tensor:
    """Weights of which some are far out; at `size` 1 the outliers' errors outlast the shrinkage."""
    generator = torch.Generator().manual_seed(seed)
    far = torch.rand(out, columns, generator=generator) < 0.05
    weight = torch.randn(out, columns, generator=generator) + 0.3
    return size * torch.where(far, 4 * weight, weight)


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", [1.0, 0.02])
def test_zero_points_follow_the_published_turns(bits: int, masked: bool, size: float) -> None:
    weight, top = outlying(bits, size), 2**bits - 1
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) > 0.5 if masked else None
    held = weight if mask is None else weight * mask
    grid = Grid(bits, 32)
    scales, zeros = fit_grid(held, torch.ones(64), grid, False)
    kept = torch.ones_like(weight, dtype=torch.bool) if mask is None else mask
    groups = hqq.Groups.of(held, mask, top, 12, 2)
    found = groups.half_quadratic_zeros(scales.unsqueeze(-1), zeros.unsqueeze(-1).float())
    expected = turns_by_hand(
        held.view(-1, 32).tolist(), kept.view(-1, 32).tolist(), scales.flatten().tolist(), zeros.flatten().tolist(), top
    )
    torch.testing.assert_close(found.flatten(), torch.tensor(expected), rtol=1e-4, atol=2e-4)

    solved = hqq.solve_whole(weight, mask, grid)
    assert int(solved.zeros.min()) >= 1 and int(solved.zeros.max()) <= top
    if mask is not None:
        assert bool((solved.weight[~mask] == 0).all())
    # of the integers beside the real zero point, and plain rounding's, none is better for the group
    choices = [zeros, *(f(found.squeeze(-1)).clamp(1, top).int() for f in (torch.floor, torch.ceil))]
    sums = [by_p(nearest(held, scales, zeros, grid).weight - held, kept)]
    for z in choices:
        s = scales_by_hand(held, kept, scales, z, top)
        sums.append(by_p(nearest(held, s, z, grid).weight - held, kept))
    torch.testing.assert_close(by_p(solved.weight - held, kept), torch.stack(sums).amin(dim=0), rtol=1e-3, atol=1e-5)


def by_p(error: Tensor, kept: Tensor) -> Tensor:
    return (error.abs() ** 0.7 * kept).view(12, 2, 32).sum(-1)


def scales_by_hand(held: Tensor, kept: Tensor, scales: Tensor, zeros: Tensor, top: int) -> Tensor:
    """The same turns for the scale, in numpy's float64: least squares on what the shrinkage leaves."""
    w, k = held.view(12, 2, 32).double().numpy(), kept.view(12, 2, 32).numpy()
    s, z, beta, best = scales.double().numpy()[..., None], zeros.numpy()[..., None], 10.0, math.inf
    for _ in range(20):
        level = np.clip(np.rint(w / s + z), 0, top) - z
        error = np.where(k, w - s * level, 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            outlier = np.where(error == 0, 0, np.sign(error) * np.maximum(abs(error) - abs(error) ** -0.3 / beta, 0))
        s = ((w - outlier) * level).sum(-1, keepdims=True) / (level**2).sum(-1, keepdims=True)
        beta *= 1.01
        if abs(error).mean() >= best:
            break
        best = abs(error).mean()
    return torch.from_numpy(s[..., 0]).half().float()


@pytest.mark.parametrize(("bits", "share"), [(4, 0.96), (2, 0.65)])
def test_solved_scales_leave_less_of_gaussian_weights_than_plain_rounding(bits: int, share: float) -> None:
    weight = 0.05 * torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    grid = Grid(bits, 64)
    plain = nearest(weight, *fit_grid(weight, torch.ones(512), grid, False), grid).weight
    found = hqq.solve_whole(weight, None, grid).weight

    def energy(approximation: Tensor) -> float:
        return float((approximation - weight).square().sum() / weight.square().sum())

    assert energy(found) < share * energy(plain)
    if bits == 2:
        assert energy(found) == pytest.approx(0.126, abs=0.003)
        assert energy(plain) == pytest.approx(0.209, abs=0.005)


def test_a_layer_of_zeros_stays_zeros() -> None:
    weight = torch.zeros(4, 64)
    for mask in (None, weight == 1):
        assert bool((hqq.solve_whole(weight, mask, Grid(2, 32)).weight == 0).all())

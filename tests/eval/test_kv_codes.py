"""Codes of keys and values against a loop over single elements."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgepress.checkpoints.errors import NumericsError
from edgepress.checkpoints.kv_format import GROUP, KVFormat
from edgepress.eval.kv_cache import decode_keys, decode_values, encode_keys, encode_values

pytestmark = pytest.mark.unit


def brute(row: list[float], bits: int) -> list[float]:
    """One grid's elements, rounded one by one."""
    least = float(np.float16(min(row)))
    scale = float(np.float16((np.float32(max(row)) - np.float32(min(row))) / np.float32(2**bits - 1)))
    return [least + scale * min(max(round((x - least) / scale), 0), 2**bits - 1) if scale else least for x in row]


@pytest.mark.parametrize("bits", [8, 4])
def test_keys_share_a_grid_by_channel_and_values_by_token(bits: int) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 2, 3, GROUP, 48, generator=generator) * 3 + 5
    keys = decode_keys(encode_keys(x, bits), bits, torch.float32)
    values = decode_values(encode_values(x, bits), bits, torch.float32, 48)
    for b, h, g in ((0, 0, 0), (1, 1, 2)):
        for channel in (0, 17, 47):
            row = x[b, h, g, :, channel].tolist()
            torch.testing.assert_close(keys[b, h, g, :, channel], torch.tensor(brute(row, bits)), rtol=1e-5, atol=1e-5)
        for token in (0, 31):
            first, second = (brute(half.tolist(), bits) for half in x[b, h, g, token].split(24))
            torch.testing.assert_close(values[b, h, g, token], torch.tensor(first + second), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [8, 4])
def test_errors_stay_below_half_a_step_and_bytes_are_those_of_the_format(bits: int) -> None:
    x = torch.randn(1, 3, 2, GROUP, 64, generator=torch.Generator().manual_seed(2))
    keys, values = encode_keys(x, bits), encode_values(x, bits)
    step = (x.amax(-2) - x.amin(-2)) / (2**bits - 1)
    worst = (decode_keys(keys, bits, torch.float32) - x).abs().amax(-2)
    # half a step, and what float16 takes from scale and minimum
    assert bool((worst <= step * 0.5 + x.abs().amax(-2) * 2**-10).all())
    assert sum(t.nbytes for t in (*keys, *values)) == 2 * KVFormat(bits).group_bytes(3, 64)


def test_sixteen_bits_change_nothing() -> None:
    x = torch.randn(1, 1, 2, GROUP, 16)
    assert torch.equal(decode_keys(encode_keys(x, 16), 16, x.dtype), x)
    assert torch.equal(decode_values(encode_values(x, 16), 16, x.dtype, 16), x)


def test_constant_and_tiny_ranges_become_their_minimum() -> None:
    x = torch.full((1, 1, 1, GROUP, 16), 0.75)
    assert torch.equal(decode_keys(encode_keys(x, 4), 4, torch.float32), x)
    x[0, 0, 0, 0, 0] += 1e-7
    assert bool((decode_values(encode_values(x, 4), 4, torch.float32, 16) == 0.75).all())


def test_what_float16_cannot_hold_is_said() -> None:
    with pytest.raises(NumericsError, match="--kv-bits 16"):
        encode_values(torch.full((1, 1, 1, GROUP, 16), 1e6), 8)

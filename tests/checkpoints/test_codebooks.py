"""Codes of a codebook against brute force, and against bitsandbytes where it is installed."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from edgepress.checkpoints.errors import CheckpointError
from edgepress.checkpoints.forms import CODEBOOKS, Codebook
from edgepress.checkpoints.packing import (
    by_kernels,
    codes_of,
    decode,
    dynamic_map,
    encode,
    levels,
    nearest,
    require_known,
    state_of,
)

pytestmark = pytest.mark.unit

NF4, THESIS = CODEBOOKS["nf4"], CODEBOOKS["nf4-thesis"]
BOOKS = pytest.mark.parametrize("codebook", [NF4, THESIS], ids=["nf4", "nf4-thesis"])
SIDES = pytest.mark.parametrize("sides", [(64, 96), (40, 36), (7, 30), (5, 13), (1, 3), (130, 257)])
# bitsandbytes compiles its own code anew for each odd width, for half a minute, and on a CPU (0.50.2) misreads rows of
# a multiple of 16 that is none of 64: rows of such widths are left out.
THEIR_SIDES = pytest.mark.parametrize("sides", [(64, 128), (40, 36), (7, 30), (192, 576), (150, 172)])
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed: pip install bitsandbytes"
)


def random(*shape: int, seed: int = 0, zeros: float = 0.2) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=g) * torch.rand((shape[0], 1), generator=g)
    return weight.masked_fill(torch.rand(shape, generator=g) < zeros, 0.0)


# --- against brute force -------------------------------------------------------------------------------------------


@BOOKS
@SIDES
def test_every_weight_takes_the_nearest_level(codebook: Codebook, sides: tuple[int, int]) -> None:
    weight = random(*sides)
    codes = codes_of(encode(weight, codebook, torch.float32), *sides).flatten().tolist()
    flat = weight.flatten().double().tolist()
    for start in range(0, len(flat), codebook.block):
        block = flat[start : start + codebook.block]
        largest = max(map(abs, block)) or 1.0
        for value, code in zip(block, codes[start : start + codebook.block], strict=True):
            distances = [abs(value / largest - level) for level in codebook.levels]
            assert distances[code] <= min(distances) + 1e-6


@SIDES
def test_double_quantisation_is_what_the_formula_says(sides: tuple[int, int]) -> None:
    """In numpy and float64: mean off, absmax of every 256, nearest of 256 levels; and back."""
    weight = random(*sides)
    stored = encode(weight, NF4, torch.bfloat16)
    flat = np.pad(weight.double().numpy().ravel(), (0, -weight.numel() % 64)).reshape(-1, 64)
    absmax = np.abs(flat).max(axis=1)
    state = state_of(stored)
    assert state["nested_offset"] == pytest.approx(absmax.mean(), rel=1e-6)
    centred = absmax - state["nested_offset"]
    table = dynamic_map().double().numpy()
    for number, start in enumerate(range(0, len(centred), 256)):
        part = centred[start : start + 256]
        scale = np.abs(part).max()
        assert float(stored["weight.nested_absmax"][number]) == pytest.approx(scale, rel=1e-5, abs=1e-7)
        scale = float(stored["weight.nested_absmax"][number])  # near a tie the last bit would decide
        if scale:
            codes = stored["weight.absmax"][start : start + 256].numpy().astype(int)
            distances = np.abs(part[:, None] / scale - table[None])
            assert (distances[np.arange(len(part)), codes] <= distances.min(axis=1) + 1e-6).all()
    scales = (
        table[stored["weight.absmax"].numpy()] * np.repeat(stored["weight.nested_absmax"].numpy(), 256)[: len(flat)]
    )
    codes = codes_of(stored, *sides).numpy().ravel()
    expected = np.array(NF4.levels)[codes] * np.repeat(scales + state["nested_offset"], 64)[: codes.size]
    np.testing.assert_allclose(decode(stored, NF4, *sides).numpy().ravel(), expected, rtol=1e-5, atol=1e-7)


@SIDES
def test_without_double_quantisation_the_largest_weight_of_a_block_is_exact(sides: tuple[int, int]) -> None:
    weight = random(*sides)
    dense = decode(encode(weight, THESIS, torch.float32), THESIS, *sides).flatten()
    for start in range(0, weight.numel(), 64):
        block = weight.flatten()[start : start + 64]
        at = int(block.abs().argmax())
        assert dense[start + at] == block[at]


def test_the_dynamic_map_has_a_finer_step_the_nearer_to_zero() -> None:
    table = dynamic_map().tolist()
    assert len(table) == len(set(table)) == 256 and table == sorted(table)
    positive = [x for x in table if x > 0]
    assert table.count(0.0) == 1 and positive[-1] == 1 and sorted(-x for x in table if x < 0) == positive[:-1]
    for exponent in range(7):  # 2^e values in the decade below 10^(e - 6), evenly spaced
        top = 10.0 ** (exponent - 6)
        decade = [x for x in positive[:-1] if top / 10 < x < top]
        assert len(decade) == 2**exponent
        assert decade == pytest.approx([top * (0.1 + 0.9 * (i + 0.5) / 2**exponent) for i in range(2**exponent)])


# --- zeros ---------------------------------------------------------------------------------------------------------


@given(data=st.data(), name=st.sampled_from(list(CODEBOOKS)), seed=st.integers(0, 10**6))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_mask_is_kept_exactly(data: st.DataObject, name: str, seed: int) -> None:
    """A removed weight has the code of the level 0 and reads 0, whatever lies around it."""
    codebook = CODEBOOKS[name]
    rows, columns = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 70))
    size = data.draw(st.sampled_from([1e-30, 1e-6, 1.0, 1e6]))
    weight = size * random(rows, columns, seed=seed, zeros=data.draw(st.sampled_from([0.0, 0.5, 0.95, 1.0])))
    stored = encode(weight, codebook, torch.bfloat16)
    removed = weight == 0
    assert bool((codes_of(stored, rows, columns)[removed] == codebook.zero).all())
    dense = decode(stored, codebook, rows, columns)
    assert bool((dense[removed] == 0).all()) and bool(dense.isfinite().all())


@BOOKS
def test_a_layer_of_zeros_and_one_of_one_value(codebook: Codebook) -> None:
    assert decode(encode(torch.zeros(3, 70), codebook, torch.float32), codebook, 3, 70).eq(0).all()
    same = torch.full((3, 70), -0.25)
    torch.testing.assert_close(decode(encode(same, codebook, torch.float32), codebook, 3, 70), same)


# --- the note and the tables ------------------------------------------------------------------------------------------


def test_the_note_has_one_length_and_says_what_bitsandbytes_asks_for() -> None:
    for weight in (random(64, 96), 1e-20 * random(5, 13), torch.zeros(2, 2), random(3, 4096 * 8)):
        stored = encode(weight, NF4, torch.bfloat16)
        note = stored["weight.quant_state.bitsandbytes__nf4"]
        assert note.shape == (NF4.state_bytes,)
        assert json.loads(bytes(note.tolist())) == {
            "quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape),
            "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": state_of(stored)["nested_offset"],
        }  # fmt: skip


def test_a_table_that_is_not_the_codebooks_is_named() -> None:
    stored = encode(random(4, 64), NF4, torch.float32)
    require_known("q_proj", stored, NF4)
    for kind in ("weight.quant_map", "weight.nested_quant_map"):
        changed = stored | {kind: stored[kind] + 1e-3}
        with pytest.raises(CheckpointError, match=rf"q_proj\.{kind} does not hold the levels of nf4"):
            require_known("q_proj", changed, NF4)


# What bitsandbytes 0.50.2 made of 37 i mod 101 on a CPU: three blocks that differ in size alone.
WROTE = (
    "04c16e29f3b05d17e29f3c05d18e2af4c16e18e3b05d17e29f3b05d18e2af4c1"
    "6d18e3b04c17e29f3b05d17e2af4c06d18e2a04c16e29f3b05d17e29f3c05d18"
    "e2af4c16e18e3b05d17e29f3b05d18e2af4c16d18e3b04c17e29f3b05d17e2af"
)


def test_codes_are_those_that_bitsandbytes_wrote() -> None:
    i = torch.arange(192)
    stored = encode(((i * 37 % 101 - 50) / 64 * (1 + i // 64)).view(3, 64), NF4, torch.float32)
    assert bytes(stored["weight"].flatten().tolist()).hex() == WROTE
    assert stored["weight.absmax"].tolist() == [0, 127, 255]  # its middle one is 131, 3e-6, where the nearest is 0
    assert (stored["weight.nested_absmax"].tolist(), state_of(stored)["nested_offset"]) == ([0.78125], 1.5625)
    first = [-0.7867431640625, -0.22378231585025787, 0.3467254340648651]
    assert decode(stored, NF4, 3, 64)[0, :3].tolist() == first


# --- against bitsandbytes ------------------------------------------------------------------------------------------


def as_bitsandbytes_writes(weight: Tensor, nested: bool = True) -> dict[str, Tensor]:
    import bitsandbytes.functional as bnb

    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=nested)
    return {"weight": packed} | {f"weight.{kind}": tensor for kind, tensor in state.as_dict(packed=True).items()}


@needs_bitsandbytes
@THEIR_SIDES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_bitsandbytes_reads_the_same_weights_bit_for_bit(sides: tuple[int, int], dtype: torch.dtype) -> None:
    stored = encode(random(*sides).to(dtype), NF4, dtype)
    assert torch.equal(by_kernels(stored, torch.device("cpu"))(), decode(stored, NF4, *sides).to(dtype))


@needs_bitsandbytes
@THEIR_SIDES
def test_what_bitsandbytes_writes_is_read_bit_for_bit(sides: tuple[int, int]) -> None:
    for nested in (256, 0):
        stored = as_bitsandbytes_writes(random(*sides), bool(nested))
        book = Codebook("nf4", NF4.levels, nested=nested)
        assert torch.equal(by_kernels(stored, torch.device("cpu"))(), decode(stored, book, *sides))


@needs_bitsandbytes
@THEIR_SIDES
def test_codes_are_bitsandbytes_own_and_scales_no_further_off(sides: tuple[int, int]) -> None:
    """Its 8-bit codes on a CPU are not always the nearest; all else is the same."""
    weight = random(*sides)
    mine, theirs = encode(weight, NF4, torch.float32), as_bitsandbytes_writes(weight)
    assert mine.keys() == theirs.keys() and state_of(mine) == state_of(theirs)
    for kind in ("weight.quant_map", "weight.nested_quant_map", "weight.nested_absmax"):
        assert torch.equal(mine[kind], theirs[kind]), kind
    differing = codes_of(mine, *sides) != codes_of(theirs, *sides)
    assert int(differing.sum()) <= weight.numel() // 10_000  # ties, which the last bit decides
    absmax = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64).abs().amax(1)

    def off(stored: dict[str, Any]) -> Tensor:
        each = dynamic_map()[stored["weight.absmax"].long()]
        nested = stored["weight.nested_absmax"].repeat_interleave(256)[: each.numel()]
        return (each * nested + state_of(stored)["nested_offset"] - absmax).abs()

    assert bool((off(mine) <= off(theirs) + 1e-6).all())


@needs_bitsandbytes
def test_levels_and_map_are_bitsandbytes_own() -> None:
    import bitsandbytes.functional as bnb

    assert torch.equal(levels(NF4), bnb.get_4bit_type("nf4", "cpu"))
    assert torch.equal(dynamic_map(), bnb.create_dynamic_map())


def test_nearest_takes_the_lower_of_two_as_near() -> None:
    table = torch.tensor([-1.0, 0.0, 0.5, 1.0])
    assert nearest(torch.tensor([-2.0, -0.5, 0.25, 0.26, 0.75, 2.0]), table).tolist() == [0, 0, 1, 2, 2, 3]

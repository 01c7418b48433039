"""Bit streams against Python's integers, and masks against a list of every one there is."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepress.checkpoints import bits as coder
from edgepress.checkpoints.bits import choose_removed, pack_bits, pack_mask, unpack_bits, unpack_mask
from edgepress.checkpoints.packed_sizes import MaskIndex, mask_indexes
from edgepress.checkpoints.shape import Pattern

pytestmark = pytest.mark.unit

EVERY_PATTERN = [Pattern(n, m) for m in range(2, 17) for n in range(1, m)]


def as_number(data: np.ndarray) -> int:
    return int.from_bytes(data.tobytes(), "little")


@given(
    bits=st.integers(1, 64), values=st.lists(st.integers(0, 2**64 - 1), max_size=40), piece=st.sampled_from([8, 2**17])
)
@settings(max_examples=200, deadline=None)
def test_a_stream_is_one_long_number(bits: int, values: list[int], piece: int) -> None:
    values = [value % 2**bits for value in values]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coder, "_PIECE", piece)
        data = pack_bits(np.array(values, np.uint64), bits)
        assert data.dtype == np.uint8
        assert data.size == math.ceil(len(values) * bits / 8)
        assert as_number(data) == sum(value << (bits * i) for i, value in enumerate(values))
        assert unpack_bits(data, bits, len(values)).tolist() == values


def every_mask(pattern: Pattern) -> np.ndarray:
    """Every choice of N of M, in the order in which itertools lists them."""
    chosen = list(combinations(range(pattern.of), pattern.removed))
    masks = np.zeros((len(chosen), pattern.of), bool)
    for row, places in enumerate(chosen):
        masks[row, list(places)] = True
    return masks


@pytest.mark.parametrize("pattern", EVERY_PATTERN, ids=str)
def test_every_mask_there_is_comes_back_in_every_form(pattern: Pattern) -> None:
    masks = every_mask(pattern)
    assert len(masks) == math.comb(pattern.of, pattern.removed)
    forms = list(mask_indexes(pattern))
    assert {form.form for form in forms} == {"bitmap", "positions", "combinations"}
    for form in forms:
        data = pack_mask(masks, form)
        assert data.size == math.ceil(form.total_bits(len(masks)) / 8)
        assert (unpack_mask(data, form, len(masks)) == masks).all()


@pytest.mark.parametrize("pattern", [p for p in EVERY_PATTERN if p.of <= 8], ids=str)
def test_the_numbers_are_those_of_the_combinatorial_number_system(pattern: Pattern) -> None:
    """Sets in colexicographic order: compared by their greatest member, then the next."""
    listed = min(pattern.removed, pattern.of - pattern.removed)
    sets = sorted(combinations(range(pattern.of), listed), key=lambda places: places[::-1])
    masks = np.zeros((len(sets), pattern.of), bool)
    for row, places in enumerate(sets):
        masks[row, list(places)] = True
    removed = masks if listed == pattern.removed else ~masks
    single = next(form for form in mask_indexes(pattern) if form.form == "combinations" and form.groups == 1)
    assert unpack_bits(pack_mask(removed, single), single.bits, len(sets)).tolist() == list(range(len(sets)))
    for joint in [form for form in mask_indexes(pattern) if form.form == "combinations" and form.groups in (2, 5)]:
        words = unpack_bits(pack_mask(removed, joint), joint.bits, -(-len(sets) // joint.groups)).tolist()
        digits = [*range(len(sets)), *[0] * joint.groups]
        assert words == [
            sum(digits[i * joint.groups + k] * len(sets) ** k for k in range(joint.groups)) for i in range(len(words))
        ]


def test_a_bitmap_and_positions_are_what_their_names_say() -> None:
    removed = np.array([[1, 0, 0, 1], [0, 1, 1, 0]], bool)
    assert pack_mask(removed, MaskIndex("bitmap", 2, 4, 4)).tolist() == [0b10010110]
    assert pack_mask(removed, MaskIndex("positions", 2, 4, 2)).tolist() == [0b10_01_11_00]
    # where fewer are kept than removed, the kept ones are listed
    assert pack_mask(np.array([[1, 1, 0, 1]], bool), MaskIndex("positions", 3, 4, 2)).tolist() == [0b10]


@given(seed=st.integers(0, 10**6), of=st.integers(2, 16), rows=st.integers(1, 20), data=st.data())
@settings(max_examples=100, deadline=None)
def test_of_many_zeros_the_first_of_a_group_are_left_out(seed: int, of: int, rows: int, data: st.DataObject) -> None:
    removed = data.draw(st.integers(1, of - 1))
    zero = np.random.default_rng(seed).random((rows, of)) < data.draw(st.sampled_from([0.1, 0.5, 0.9]))
    found = choose_removed(zero, removed)
    for have, chosen in zip(zero, found, strict=True):
        assert np.flatnonzero(chosen).tolist() == np.flatnonzero(have)[:removed].tolist()


@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(3, 7), Pattern(8, 16), Pattern(300, 576)], ids=str)
def test_layers_of_more_than_one_piece(pattern: Pattern, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coder, "_PIECE", 64)
    scores = np.random.default_rng(0).random((1501, pattern.of))
    removed = scores.argsort(axis=1).argsort(axis=1) < pattern.removed
    for form in mask_indexes(pattern):
        data = pack_mask(removed, form)
        assert data.size == math.ceil(form.total_bits(1501) / 8)
        assert (unpack_mask(data, form, 1501) == removed).all()

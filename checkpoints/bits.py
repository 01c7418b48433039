"""Pack integers of any bit width, and masks, into bytes and back, with numpy and without loops over weights.

Bit i of a stream is bit i % 8 of byte i // 8, and a value's lowest bit comes first. What a `MaskIndex` means stands
in `checkpoints/packed_sizes.py`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepress.checkpoints.packed_sizes import MaskIndex

Bytes = NDArray[np.uint8]
Mask = NDArray[np.bool_]
_PIECE = 2**17  # values at once, a multiple of 8: their bits lie a byte each while they are moved


def pack_bits(values: NDArray[Any], bits: int) -> Bytes:
    """values, unsigned and below 2^bits, of any shape, as one stream in row-major order; bits at most 64."""
    flat = values.reshape(-1)
    if bits == 8:
        return flat.astype(np.uint8)
    pieces = [_pack_piece(flat[i : i + _PIECE], bits) for i in range(0, flat.size, _PIECE)]
    return np.concatenate(pieces) if pieces else np.empty(0, np.uint8)


def _pack_piece(values: NDArray[Any], bits: int) -> Bytes:
    wide = values.astype(np.uint8 if bits <= 8 else "<u8").view(np.uint8).reshape(values.size, -1)
    return np.packbits(np.unpackbits(wide, axis=1, count=bits, bitorder="little"), bitorder="little")


def unpack_bits(data: Bytes, bits: int, count: int) -> NDArray[Any]:
    """The inverse: (count,), uint8 for up to 8 bits, else uint64."""
    if bits == 8:
        return data[:count]
    out = np.empty(count, np.uint8 if bits <= 8 else np.uint64)
    for i in range(0, count, _PIECE):
        size = min(_PIECE, count - i)
        part = data[i * bits // 8 : -(-(i + size) * bits // 8)]
        stream = np.unpackbits(part, count=size * bits, bitorder="little").reshape(size, bits)
        narrow = np.packbits(stream, axis=1, bitorder="little")  # (size, bytes of a value)
        if bits > 8:
            wide = np.zeros((size, 8), np.uint8)
            wide[:, : narrow.shape[1]] = narrow
            narrow = wide.view("<u8")
        out[i : i + size] = narrow[:, 0]
    return out


# --- masks ---------------------------------------------------------------------------------------------------------


def choose_removed(zero: Mask, removed: int) -> Mask:
    """The first `removed` zeros of every group, as True: (groups, M). zero (groups, M) says where a zero stands.

    Zeros beyond those stay stored values. A group with fewer is left short; the caller must look.
    """
    chosen = np.empty_like(zero)
    rows = max(1, 2**22 // zero.shape[1])
    for i in range(0, len(zero), rows):
        part = zero[i : i + rows]
        chosen[i : i + rows] = part & (np.cumsum(part, axis=1, dtype=np.int32) <= removed)
    return chosen


def pack_mask(removed: Mask, index: MaskIndex) -> Bytes:
    """removed (groups, M), True at exactly `index.removed` places of each group, in the index's form."""
    if index.form == "bitmap":
        return np.packbits(~removed.reshape(-1), bitorder="little")
    listed = removed if index.lists_removed else ~removed
    if index.form == "positions":
        return pack_bits(np.nonzero(listed)[1], index.bits)
    step = index.groups * _PIECE
    words = [_words(listed[i : i + step], index) for i in range(0, len(listed), step)]
    return pack_bits(np.concatenate(words), index.bits)


def unpack_mask(data: Bytes, index: MaskIndex, groups: int) -> Mask:
    """The inverse of `pack_mask`: (groups, M)."""
    m = index.of
    if index.form == "bitmap":
        bitmap: Mask = np.unpackbits(data, count=groups * m, bitorder="little").reshape(groups, m) == 0
        return bitmap
    if index.form == "positions":
        places = unpack_bits(data, index.bits, groups * index.listed).astype(np.int64).reshape(groups, index.listed)
        listed = np.zeros((groups, m), np.bool_)
        np.put_along_axis(listed, places, True, axis=1)
    else:
        words = unpack_bits(data, index.bits, -(-groups // index.groups)).astype(np.uint64)
        pieces = [_sets(words[i : i + _PIECE], index) for i in range(0, words.size, _PIECE)]
        listed = np.concatenate(pieces)[:groups]
    return listed if index.lists_removed else ~listed


def _words(listed: Mask, index: MaskIndex) -> NDArray[np.uint64]:
    """Each group's number, `index.groups` of them as the digits of one word, the first group the lowest."""
    table = binomials(index.of, index.listed)
    words = -(-len(listed) // index.groups)
    numbers = np.zeros(words * index.groups, np.uint64)  # the last word is filled up with number 0
    seen = np.zeros(len(listed), np.intp)
    for place in range(index.of):
        here = listed[:, place]
        seen += here
        numbers[: len(listed)] += np.where(here, table[place, seen], np.uint64(0))
    digits = numbers.reshape(words, index.groups)
    base = np.uint64(math.comb(index.of, index.listed))
    word = np.zeros(words, np.uint64)
    for digit in reversed(range(index.groups)):
        word = word * base + digits[:, digit]
    return word


def _sets(words: NDArray[np.uint64], index: MaskIndex) -> Mask:
    """The sets that `_words` numbered: (words * groups, M). From the highest place down, a place is in the set if
    the number reaches its binomial."""
    base = np.uint64(math.comb(index.of, index.listed))
    digits = np.empty((words.size, index.groups), np.uint64)
    for digit in range(index.groups):
        words, digits[:, digit] = np.divmod(words, base)
    numbers = digits.reshape(-1)
    table = binomials(index.of, index.listed)
    left = np.full(numbers.size, index.listed, np.intp)
    listed = np.zeros((numbers.size, index.of), np.bool_)
    for place in reversed(range(index.of)):
        value = table[place, left]
        here = (numbers >= value) & (left > 0)
        listed[:, place] = here
        numbers = numbers - np.where(here, value, np.uint64(0))
        left -= here
    return listed


def binomials(m: int, n: int) -> NDArray[np.uint64]:
    """C(place, k) for place below m and k up to n: (m, n + 1)."""
    return np.array([[math.comb(place, k) for k in range(n + 1)] for place in range(m)], np.uint64)

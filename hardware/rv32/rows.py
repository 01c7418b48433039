"""A grid's matrix as it lies in weights.bin, four rows side by side, and back. No torch. `FORMAT.md` describes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepress.checkpoints.bits import choose_removed
from edgepress.hardware.rv32.layout import ROWS, CodeForm

Array = NDArray[Any]


def encode(form: CodeForm, codes: Array, scales: Array, zeros: Array | None) -> bytes:
    """codes (rows, columns), scales (rows, groups) float16, zeros (rows, groups) less one or None without any."""
    columns, groups = codes.shape[1], scales.shape[1]
    units = columns // groups // form.unit
    stored = _by_fours(codes.astype(np.uint8).reshape(len(codes), groups, units, form.unit))
    numbers = np.zeros((*stored.shape[:-1], 0), np.uint8)
    if form.of:
        points = np.full(scales.shape, 2 ** (form.bits - 1) - 1) if zeros is None else zeros
        zero = _by_fours((points + 1).astype(np.int16))[..., None, None] == stored
        numbers, stored = _left_out(form, stored, zero)
    sides = [_by_fours(scales.astype("<f2")).swapaxes(1, 2).copy().view(np.uint8)]
    if zeros is not None:
        sides.append(_by_fours(zeros.astype(np.uint8)).swapaxes(1, 2))
    both = [_bits(numbers, form.set_bits), _bits(stored, form.bits)] if form.of else [_bits(stored, form.bits)]
    packed = _by_units(both)
    return np.concatenate([*sides, packed.reshape(*packed.shape[:2], -1)], axis=-1).tobytes()


def encode_numbers(form: CodeForm, numbers: Array) -> bytes:
    """The kept ones of numbers (rows, columns), given as unsigned integers of their bits."""
    stored = _by_fours(numbers.reshape(len(numbers), 1, -1, form.unit))
    magnitudes = stored & np.array(2 ** (form.bits - 1) - 1, stored.dtype)
    sets, kept = _left_out(form, stored, magnitudes == 0)
    return _by_units([_bits(sets, form.set_bits), np.ascontiguousarray(kept).view(np.uint8)]).tobytes()


def decode_numbers(form: CodeForm, data: bytes, rows: int, columns: int) -> Array:
    """The inverse: (rows, columns), the others 0."""
    units = np.frombuffer(data, np.uint8).reshape(-(-rows // ROWS), columns // form.unit, -1)
    index, per_unit = ROWS * form.index_bytes, form.unit // form.of

    def rows_of(part: Array) -> Array:
        """(fours, units, bytes of four rows) as (fours, 4, units, bytes)."""
        return np.ascontiguousarray(part.reshape(*part.shape[:2], ROWS, -1).swapaxes(1, 2))

    sets = _values(rows_of(units[..., :index]), form.set_bits, per_unit)
    kept = rows_of(units[..., index:]).view(f"<u{form.bits // 8}")
    found = _put_back(form, sets, kept, np.zeros((*sets.shape[:-1], form.unit), kept.dtype))
    return _by_rows(found.reshape(-1, ROWS, columns), rows)


def _by_units(parts: list[Array]) -> Array:
    """Bytes (fours, 4, groups, units, n) of each part, as the parts of a unit lie: (fours, groups, units, all)."""
    return np.concatenate([x.transpose(0, 2, 3, 1, 4).reshape(len(x), *x.shape[2:4], -1) for x in parts], -1)


def _left_out(form: CodeForm, codes: Array, zero: Array) -> tuple[Array, Array]:
    """The numbers of the kept sets (…, groups of the pattern) and their codes. codes, zero: (…, 32).

    Raises ValueError where a group has fewer zeros than its pattern says.
    """
    removed = choose_removed(zero.reshape(-1, form.of), form.of - form.kept)
    if (removed.sum(1) != form.of - form.kept).any():
        raise ValueError(f"groups of {form.of} weights with fewer zeros than {form.of - form.kept}")
    by_mask = {sum(1 << place for place in kept): number for number, kept in enumerate(form.sets)}
    masks, inverse = np.unique(~removed @ (1 << np.arange(form.of, dtype=np.int64)), return_inverse=True)
    numbers = np.array([by_mask[int(mask)] for mask in masks], np.uint8)[inverse]
    kept = codes.reshape(-1, form.of)[~removed]
    return numbers.reshape(*codes.shape[:-1], -1), kept.reshape(*codes.shape[:-1], -1)


def _put_back(form: CodeForm, numbers: Array, kept: Array, codes: Array) -> Array:
    """All codes (…, 32): those kept at their places in `codes`."""
    places = np.array(form.sets)[numbers]  # (…, groups of the pattern, kept)
    groups = codes.reshape(*numbers.shape, form.of)
    np.put_along_axis(groups, places, kept.reshape(places.shape), axis=-1)
    return groups.reshape(codes.shape)


def decode(form: CodeForm, data: bytes, rows: int, columns: int, groups: int, zeros: bool) -> Mapping[str, Array]:
    """The inverse: codes, scales and, where there are any, zeros."""
    units = columns // groups // form.unit
    fours = np.frombuffer(data, np.uint8).reshape(-(-rows // ROWS), groups, -1)
    scales, rest = fours[..., : 2 * ROWS].copy().view("<f2"), fours[..., 2 * ROWS :]
    found = {"scales": _by_rows(scales.swapaxes(1, 2), rows)}
    if zeros:
        found["zeros"], rest = _by_rows(rest[..., :ROWS].swapaxes(1, 2), rows), rest[..., ROWS:]
    split = rest.reshape(len(fours), groups, units, -1)

    def rows_of(part: Array, bits: int, count: int) -> Array:
        return _values(part.reshape(*part.shape[:3], ROWS, -1).transpose(0, 3, 1, 2, 4), bits, count)

    packed = split[..., ROWS * form.index_bytes :]
    if form.of:
        per_unit = form.unit // form.of
        numbers = rows_of(split[..., : ROWS * form.index_bytes], form.set_bits, per_unit)
        middle = np.full((len(fours) * ROWS, groups), 2 ** (form.bits - 1) - 1)
        points = _by_fours(found["zeros"]) if zeros else middle.reshape(-1, ROWS, groups)
        shape = (*numbers.shape[:-1], form.unit)
        empty = np.broadcast_to((points + 1)[..., None, None].astype(np.uint8), shape).copy()
        codes = _put_back(form, numbers, rows_of(packed, form.bits, per_unit * form.kept), empty)
    else:
        codes = rows_of(packed, form.bits, form.unit)
    return found | {"codes": _by_rows(codes.reshape(len(fours), ROWS, columns), rows)}


def _by_fours(x: Array) -> Array:
    """(rows, …) as (fours, 4, …), filled up with zeros."""
    missing = -len(x) % ROWS
    return np.pad(x, [(0, missing), *[(0, 0)] * (x.ndim - 1)]).reshape(-1, ROWS, *x.shape[1:])


def _by_rows(x: Array, rows: int) -> Array:
    return np.ascontiguousarray(x.reshape(-1, *x.shape[2:])[:rows])


def _bits(values: Array, bits: int) -> Array:
    """(…, n) numbers of so many bits as a stream of bytes (…, n x bits / 8, rounded up), the lowest bit first."""
    stream = np.unpackbits(values[..., None], axis=-1, count=bits, bitorder="little")
    return np.packbits(stream.reshape(*values.shape[:-1], -1), axis=-1, bitorder="little")


def _values(data: Array, bits: int, count: int) -> Array:
    """The inverse of `_bits`: (…, count)."""
    stream = np.unpackbits(data, axis=-1, count=count * bits, bitorder="little")
    return np.packbits(stream.reshape(*data.shape[:-1], count, bits), axis=-1, bitorder="little")[..., 0]

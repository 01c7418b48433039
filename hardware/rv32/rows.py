"""A grid's matrix as it lies in weights.bin, four rows side by side, and back. No torch. `FORMAT.md` describes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepress.hardware.rv32.layout import ROWS, CodeForm

Array = NDArray[Any]


def encode(form: CodeForm, codes: Array, scales: Array, zeros: Array | None) -> bytes:
    """codes (rows, columns), scales (rows, groups) float16, zeros (rows, groups) less one or None without any."""
    columns, groups = codes.shape[1], scales.shape[1]
    units = columns // groups // form.unit
    stored = _by_fours(codes.astype(np.uint8).reshape(len(codes), groups, units, form.unit))
    sides = [_by_fours(scales.astype("<f2")).swapaxes(1, 2).copy().view(np.uint8)]
    if zeros is not None:
        sides.append(_by_fours(zeros.astype(np.uint8)).swapaxes(1, 2))
    packed = _bits(stored, form.bits).transpose(0, 2, 3, 1, 4)  # (fours, groups, units, rows, bytes)
    return np.concatenate([*sides, packed.reshape(*packed.shape[:2], -1)], axis=-1).tobytes()


def decode(form: CodeForm, data: bytes, rows: int, columns: int, groups: int, zeros: bool) -> Mapping[str, Array]:
    """The inverse: codes, scales and, where there are any, zeros."""
    units = columns // groups // form.unit
    fours = np.frombuffer(data, np.uint8).reshape(-(-rows // ROWS), groups, -1)
    scales, rest = fours[..., : 2 * ROWS].copy().view("<f2"), fours[..., 2 * ROWS :]
    found = {"scales": _by_rows(scales.swapaxes(1, 2), rows)}
    if zeros:
        found["zeros"], rest = _by_rows(rest[..., :ROWS].swapaxes(1, 2), rows), rest[..., ROWS:]
    packed = rest.reshape(len(fours), groups, units, ROWS, -1).transpose(0, 3, 1, 2, 4)
    codes = _values(packed, form.bits, form.unit)
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

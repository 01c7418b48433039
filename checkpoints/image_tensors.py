"""One layer or tensor between a checkpoint's form and the parts that the packed image holds of it.

The parts are those of `packed_sizes.Record`; a reader needs only the entry that the image's header lists.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgepress.checkpoints.adapter_codes import unpacked
from edgepress.checkpoints.bits import Bytes, Mask, choose_removed, pack_bits, pack_mask, unpack_bits, unpack_mask
from edgepress.checkpoints.config import form_of
from edgepress.checkpoints.errors import CheckpointError
from edgepress.checkpoints.forms import DTYPE_BYTES, Form
from edgepress.checkpoints.packed_sizes import MaskIndex
from edgepress.checkpoints.packing import dequantise_rows
from edgepress.checkpoints.sparsity import parse_sparsity

TORCH_DTYPES = {
    "I64": torch.int64, "F64": torch.float64, "F32": torch.float32, "I32": torch.int32, "BF16": torch.bfloat16,
    "F16": torch.float16, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
Entry = Mapping[str, Any]  # a record as the header lists it
_ROWS = 4096  # of an embedding at once, which would be four times its size in float32


# --- plain tensors -------------------------------------------------------------------------------------------------


def encode_tensor(entry: Entry, tensor: Tensor) -> dict[str, Bytes]:
    """Its bytes, little-endian, row-major. Raises CheckpointError if it is not of the form that the entry says."""
    found = (list(tensor.shape), tensor.dtype)
    if found != (list(entry["shape"]), TORCH_DTYPES[entry["dtype"]]):
        raise CheckpointError(f"{entry['name']} is {found[0]} in {found[1]}, not {entry['shape']} in {entry['dtype']}")
    return {"values": _raw(tensor)}


def decode_tensor(entry: Entry, parts: Mapping[str, Bytes]) -> Tensor:
    return _tensor(parts.get("values", np.empty(0, np.uint8)), entry["dtype"], entry["shape"])


def _raw(tensor: Tensor) -> Bytes:
    raw: Bytes = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return raw


def _tensor(data: NDArray[Any], dtype: str, shape: list[int]) -> Tensor:
    return torch.from_numpy(data.view(np.uint8)).view(TORCH_DTYPES[dtype]).view(shape)


# --- a block's matrices --------------------------------------------------------------------------------------------


def encode_linear(entry: Entry, stored: Mapping[str, Tensor]) -> dict[str, Bytes]:
    """stored: the layer's tensors by their names within it.

    Raises CheckpointError where the layer does not hold its pattern, or is stored in a way that the image has no
    place for.
    """
    form = form_of(entry)
    if form is not None:
        return _encode_codes(entry, form, stored)
    weight = stored["weight"]
    encode_tensor(entry, weight)
    values = _raw(weight).view(f"<u{DTYPE_BYTES[entry['dtype']]}").reshape(entry["shape"])
    # Of dense weights only +0 is left out, so that every sign comes back.
    index, kept = _leave_out(entry, values, lambda: values == 0)
    return index | {"values": kept.view(np.uint8)}


def decode_linear(entry: Entry, parts: Mapping[str, Bytes]) -> dict[str, Tensor]:
    """The layer's tensors as the checkpoint had them, by their names within it."""
    form = form_of(entry)
    if form is not None:
        return _decode_codes(entry, form, parts)
    kept = parts["values"].view(f"<u{DTYPE_BYTES[entry['dtype']]}")
    values = _put_back(entry, parts, kept, np.zeros(entry["shape"], kept.dtype))
    return {"weight": _tensor(values.reshape(-1), entry["dtype"], entry["shape"])}


def _encode_codes(entry: Entry, form: Form, stored: Mapping[str, Tensor]) -> dict[str, Bytes]:
    if "pattern" in entry and not form.exact_zero:
        raise CheckpointError(
            f"{entry['name']} is said to hold {entry['pattern']}, but with {form.unknown} no weight is exactly zero"
        )
    (rows, columns), ordered = entry["shape"], "order" not in entry["parts"]
    codes, sides = form.split(entry["name"], stored, rows, columns, ordered)
    values = codes.numpy()
    index, kept = _leave_out(entry, values, lambda: values == form.zero_codes(sides, rows, columns).numpy())
    parts = index | {"values": pack_bits(kept, form.bits)}
    for name, (_, how) in form.sides(rows, columns, ordered).items():
        parts[name] = _raw(sides[name]) if isinstance(how, str) else pack_bits(sides[name].numpy(), how)
    return parts


def _decode_codes(entry: Entry, form: Form, parts: Mapping[str, Bytes]) -> dict[str, Tensor]:
    (rows, columns), ordered = entry["shape"], "order" not in entry["parts"]
    sides = {}
    for name, (shape, how) in form.sides(rows, columns, ordered).items():
        if isinstance(how, str):
            sides[name] = _tensor(parts[name], how, list(shape))
        else:
            numbers = unpack_bits(parts[name], how, math.prod(shape)).astype(np.int32)
            sides[name] = torch.from_numpy(numbers.reshape(shape))
    empty = form.zero_codes(sides, rows, columns).numpy().astype(np.uint8) if "index" in parts else np.empty(0)
    codes = _put_back(entry, parts, unpack_bits(parts["values"], form.bits, _kept(entry)), empty)
    return form.join(torch.from_numpy(codes), sides, TORCH_DTYPES[entry["dtype"]])


# --- zeros ---------------------------------------------------------------------------------------------------------


def entry_index(entry: Entry) -> MaskIndex | None:
    """The form of a layer's mask, None where all its weights are stored."""
    if "index" not in entry:
        return None
    rows, columns = entry["shape"]
    pattern = parse_sparsity(entry["pattern"]).on(columns, rows)
    form = entry["index"]
    return MaskIndex(form["form"], pattern.removed, pattern.of, form["bits"], form["groups"])


def _kept(entry: Entry) -> int:
    rows, columns = entry["shape"]
    index = entry_index(entry)
    count: int = rows * columns
    return count if index is None else count // index.of * (index.of - index.removed)


def _leave_out(entry: Entry, values: NDArray[Any], zero: Any) -> tuple[dict[str, Bytes], NDArray[Any]]:
    """The index, and the values (out, in) without those it says are removed; `zero` says where a zero stands."""
    index = entry_index(entry)
    if index is None:
        return {}, values.reshape(-1)
    removed: Mask = choose_removed(zero().reshape(-1, index.of), index.removed)
    short = int((removed.sum(axis=1) != index.removed).sum())
    if short:
        raise CheckpointError(
            f"{entry['name']} is said to hold {entry['pattern']}, but {short} of its {len(removed)} groups have fewer "
            "zeros (a zero with a minus sign is not one that can be left out)"
        )
    return {"index": pack_mask(removed, index)}, values.reshape(-1, index.of)[~removed]


def _put_back(entry: Entry, parts: Mapping[str, Bytes], kept: NDArray[Any], empty: NDArray[Any]) -> NDArray[Any]:
    """All values (out, in): the kept ones at their places in `empty`, which holds what a removed weight is."""
    index = entry_index(entry)
    if index is None:
        return kept.reshape(entry["shape"])
    groups = np.ascontiguousarray(empty).reshape(-1, index.of)
    groups[~unpack_mask(parts["index"], index, len(groups))] = kept
    return groups.reshape(entry["shape"])


# --- embeddings and adapters of which codes are stored ----------------------------------------------------------------


def stands_for(packed: Mapping[str, Tensor], entry: Entry) -> Iterator[tuple[int, Tensor]]:
    """The 16- or 32-bit tensor that packed codes stand for, some rows at a time, with the first row's number."""
    base, dtype = entry["name"].removesuffix(".weight"), TORCH_DTYPES[entry["dtype"]]
    codes, scales = packed[f"{base}.codes"], packed[f"{base}.scales"]
    if entry["kind"] == "derived_adapter":
        yield 0, unpacked(codes, scales, dtype)
        return
    minimum = packed[f"{base}.minimum"]
    bits = 8 * codes.shape[1] // entry["shape"][1]
    for row in range(0, entry["shape"][0], _ROWS):
        here = slice(row, row + _ROWS)
        yield row, dequantise_rows(codes[here], scales[here], minimum[here], bits).to(dtype)


def encode_derived(entry: Entry, packed: Mapping[str, Tensor], tensor: Tensor) -> dict[str, Bytes]:
    """No bytes. Raises CheckpointError where the codes do not stand for the tensor, which would be lost."""
    encode_tensor(entry, tensor)
    for row, rows in stands_for(packed, entry):
        if not np.array_equal(_raw(rows), _raw(tensor[row : row + len(rows)])):
            raise CheckpointError(f"{entry['name']} is not what the packed codes beside it stand for")
    return {}


def decode_derived(entry: Entry, packed: Mapping[str, Tensor]) -> Tensor:
    tensor = torch.empty(entry["shape"], dtype=TORCH_DTYPES[entry["dtype"]])
    for row, rows in stands_for(packed, entry):
        tensor[row : row + len(rows)] = rows
    return tensor

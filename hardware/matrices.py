"""The constants that operators read: matrices and norms with their widths, packed and in an engine's slots."""

from __future__ import annotations

from dataclasses import dataclass

from edgepress.checkpoints.forms import DTYPE_BYTES, TensorShape, bytes_of
from edgepress.checkpoints.packed_sizes import value_bits
from edgepress.checkpoints.shape import LinearShape, ModelShape
from edgepress.hardware.footprint import SCALE_BITS


@dataclass(frozen=True)
class Weights:
    """A constant matrix (or a norm's vector: one row) that an operator reads."""

    name: str  # in full, without `.weight`: model.layers.0.self_attn.q_proj
    rows: int  # output features
    columns: int  # input features
    bits: int  # of one weight
    row_bits: int = 0  # scales, zero points and bias of one row
    groups: int = 1  # scales a row
    offsets: bool = False  # zero points (or minima) that differ from row to row
    other_bits: int = 0  # of the matrix as a whole: what its scales take beyond `row_bits`
    integer: bool = (
        True  # whether an engine for integers can multiply the codes: neither levels of a codebook nor real offsets
    )

    @property
    def nbytes(self) -> int:
        """Bytes with codes packed without gaps, scales, zero points and bias included."""
        return bytes_of(self.rows * (self.columns * self.bits + self.row_bits) + self.other_bits)

    def slotted_bytes(self, slot_bits: int, input_block: int) -> int:
        """Bytes with each weight in a slot of `slot_bits`, inputs padded to `input_block`; scales as in `nbytes`."""
        padded = -(-self.columns // input_block) * input_block
        return bytes_of(self.rows * (padded * max(slot_bits, self.bits) + self.row_bits))


def linear_weights(prefix: str, x: LinearShape) -> Weights:
    """A block's linear layer, as stored or quantised."""
    name, bias = f"{prefix}.{x.name}", x.bias * DTYPE_BYTES[x.dtype] * 8
    if x.grid is None:
        return Weights(name, x.out_features, x.in_features, value_bits(x), bias)
    sides = x.grid.side_bits(x.out_features, x.in_features, SCALE_BITS)
    scales, other = divmod(sides, x.out_features)
    integer = x.grid.integer
    groups, offsets = (x.grid.groups(x.in_features), not x.grid.symmetric) if integer else (1, False)
    return Weights(name, x.out_features, x.in_features, value_bits(x), scales + bias, groups, offsets, other, integer)


def adapter_weights(name: str, tensor: TensorShape, packed: bool = False) -> Weights:
    """One of the two matrices of a low-rank adapter, or its 8-bit codes; their scale a rank is no row's."""
    rows, columns = tensor.shape
    return Weights(name.removesuffix(".weight"), rows, columns, 8 if packed else DTYPE_BYTES[tensor.dtype] * 8)


def norm_weights(name: str, tensor: TensorShape, bias: TensorShape | None = None) -> Weights:
    """A norm's vector, as one row, and its bias beside it."""
    extra = 0 if bias is None else bias.nbytes * 8
    return Weights(name.removesuffix(".weight"), 1, tensor.elements, DTYPE_BYTES[tensor.dtype] * 8, extra)


def outer_weights(tensor: TensorShape, shape: ModelShape) -> Weights:
    """Embedding or head, or its packed copy for the edge where the model has one; a bias, where there is one, too."""
    name, (rows, columns) = tensor.name.removesuffix(".weight"), tensor.shape
    bias = next((DTYPE_BYTES[t.dtype] * 8 for t in shape.outer if t.name == f"{name}.bias"), 0)
    if shape.embedding_bits is None:
        return Weights(name, rows, columns, DTYPE_BYTES[tensor.dtype] * 8, bias)
    return Weights(name, rows, columns, shape.embedding_bits, 2 * SCALE_BITS + bias, 1, True)  # scale, minimum a row


def last_part(name: str) -> str:
    """The part of a dotted name after the last dot."""
    return name.rpartition(".")[2]

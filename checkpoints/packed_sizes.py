"""The exact bytes of the packed file, from a shape alone.

`compress pack` writes the image (`checkpoints/image.py` describes the file), and what is counted here is what it
lays out: one table serves both, so the predicted size is the file's. No torch, no weights.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

from edgepress.checkpoints.forms import DTYPE_BYTES, TensorShape, bytes_of
from edgepress.checkpoints.shape import BlockShape, LinearShape, ModelShape, Pattern

PREAMBLE_BYTES = 64
PAGE = 4096  # the data begins at a multiple of this: it can be mapped, and flashed sector by sector
ALIGN = 16  # every part begins at a multiple of this: the widest vector load of the chips in hardware/socs
WORD_BITS = 63  # the widest joint code of several groups; its arithmetic stays within unsigned 64-bit integers


# --- which weights were left out ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class MaskIndex:
    """How the file says which `removed` of every `of` weights are missing.

    bitmap: a bit a weight, 1 where it is kept. positions: the places of the removed weights of a group, or of the
    kept ones where those are fewer, rising, `bits` bits each. combinations: the number of that set in the
    combinatorial number system (Knuth, TAOCP 7.2.1.3), `groups` groups as the digits of one word of `bits` bits.
    """

    form: str
    removed: int
    of: int
    bits: int
    groups: int = 1

    @property
    def listed(self) -> int:
        """Size of the set that positions and combinations name."""
        return min(self.removed, self.of - self.removed)

    @property
    def lists_removed(self) -> bool:
        return self.listed == self.removed

    def total_bits(self, groups: int) -> int:
        """Bits for a layer of this many groups."""
        if self.form == "bitmap":
            return groups * self.of
        if self.form == "positions":
            return groups * self.listed * self.bits
        return -(-groups // self.groups) * self.bits


def mask_indexes(pattern: Pattern) -> Iterator[MaskIndex]:
    """Every form there is for a pattern, the simplest first."""
    n, m = pattern.removed, pattern.of
    yield MaskIndex("bitmap", n, m, m)
    yield MaskIndex("positions", n, m, (m - 1).bit_length())
    if min(n, m - n) > WORD_BITS:  # there are at least 2 to this power sets: too many for a word, or to count
        return
    sets = math.comb(m, n)
    groups = 1
    while (bits := (sets**groups - 1).bit_length()) <= WORD_BITS:
        yield MaskIndex("combinations", n, m, bits, groups)
        groups += 1


def mask_index(linear: LinearShape) -> MaskIndex | None:
    """The smallest form for a layer, of equals the simplest; None where leaving out the zeros does not pay."""
    if linear.pattern is None:
        return None
    pattern = linear.pattern.on(linear.in_features, linear.out_features)
    if not pattern.removed:
        return None
    groups = linear.weights // pattern.of
    best = _smallest_index(pattern, groups)
    saved = (linear.weights - linear.nonzero) * value_bits(linear)
    return best if best.total_bits(groups) < saved or (linear.grid and linear.grid.marks_zeros) else None


@lru_cache(maxsize=1024)
def _smallest_index(pattern: Pattern, groups: int) -> MaskIndex:
    """`compress fit` asks for the same few thousands of times."""
    return min(mask_indexes(pattern), key=lambda index: index.total_bits(groups))


def packed_bits(linear: LinearShape) -> int:
    """Bits of a layer's kept values with their index: codes at the grid's width, dense weights at their own."""
    index = mask_index(linear)
    if index is None:
        return linear.weights * value_bits(linear)
    return linear.nonzero * value_bits(linear) + index.total_bits(linear.weights // index.of)


def value_bits(linear: LinearShape) -> int:
    """Width of one stored weight."""
    return DTYPE_BYTES[linear.dtype] * 8 if linear.grid is None else linear.grid.bits


# --- what lies where ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """One layer or tensor of the image: what a reader must know of it, and its parts in bytes.

    kind: linear (a block's matrix), tensor (stored as it is), adapter, edge (codes of an embedding or head and what
    belongs to them), derived (the 16-bit tensor those codes stand for; it takes no room), and in the same way
    adapter_codes and derived_adapter, of an adapter at 8 bits.
    """

    kind: str
    name: str
    about: Mapping[str, Any]
    parts: tuple[tuple[str, int], ...]


@lru_cache(maxsize=1024)
def block_records(block: BlockShape, ordered: bool = True) -> tuple[Record, ...]:
    """The records of one block, by name. ordered: its groups lie in storage order, so there is no index of them."""
    records = [_linear(x, ordered) for x in block.linears] + [_plain("tensor", t) for t in block.others]
    for x in block.linears:
        records += [_derived("derived_adapter", t) if x.adapter_packed else _plain("adapter", t) for t in x.adapter()]
        records += [_plain("adapter_codes", t) for t in x.packed_adapter()]
        records += [_plain("tensor", t) for t in x.stored() if t.name == f"{x.name}.bias"]
    return tuple(sorted(records, key=lambda record: record.name))


@lru_cache(maxsize=256)
def outer_records(shape: ModelShape) -> tuple[Record, ...]:
    """The records outside the blocks, by name."""
    edge = shape.edge_tensors()
    derived = {t.name.rpartition(".")[0] for t in edge}
    records = [_plain("edge", t) for t in edge]
    for t in shape.outer:
        if t.name.removesuffix(".weight") in derived:
            records.append(_derived("derived", t))
        else:
            records.append(_plain("tensor", t))
    return tuple(sorted(records, key=lambda record: record.name))


def groups_in_order(shape: ModelShape) -> bool:
    """Whether column c belongs to group c // size, as it does unless GPTQ's activation order was left in the file."""
    return not (shape.config.get("quantization_config") or {}).get("desc_act", False)


def _plain(kind: str, t: TensorShape) -> Record:
    return Record(kind, t.name, {"shape": list(t.shape), "dtype": t.dtype}, (("values", t.nbytes),))


def _derived(kind: str, t: TensorShape) -> Record:
    return replace(_plain(kind, t), parts=())


def _linear(x: LinearShape, ordered: bool) -> Record:
    about: dict[str, Any] = {"shape": [x.out_features, x.in_features], "dtype": x.dtype}
    parts = {}
    index = mask_index(x)
    if x.pattern is not None:
        about["pattern"] = str(x.pattern)
    if index is not None:
        about["index"] = {"form": index.form, "bits": index.bits, "groups": index.groups}
        parts["index"] = bytes_of(index.total_bits(x.weights // index.of))
    parts["values"] = bytes_of((x.weights if index is None else x.nonzero) * value_bits(x))
    if x.grid is not None:
        about |= x.grid.about()
        parts |= x.grid.side_parts(x.out_features, x.in_features, ordered)
    return Record("linear", x.name, about, tuple((name, size) for name, size in parts.items() if size))


def place(records: Sequence[Record]) -> tuple[list[dict[str, Any]], int]:
    """The records as the header lists them, each part with its offset and size; and the bytes of all."""
    listed, at = [], 0
    for record in records:
        parts = {}
        for name, size in record.parts:
            parts[name] = [at, size]
            at += aligned(size, ALIGN)
        listed.append({"kind": record.kind, "name": record.name, **record.about, "parts": parts})
    return listed, at


def image_table(shape: ModelShape, documents: Mapping[str, int] | None = None) -> tuple[dict[str, Any], int]:
    """The image's header, and the bytes of the data behind it.

    Blocks of one form share a layout, whose offsets count from the block's own; blocks of the same weights lie in one
    place. documents: sizes of the files that
    travel along (the tokenizer's), by name.
    """
    layouts: list[list[dict[str, Any]]] = []
    blocks, at = list[dict[str, int]](), 0
    ordered = groups_in_order(shape)
    placed: dict[BlockShape, tuple[int, int]] = {}  # layout and bytes of each form of block
    for index, (block, first) in enumerate(zip(shape.blocks, shape.firsts, strict=True)):
        if first < index:  # it runs again: its place is the first one's
            blocks.append(dict(blocks[first]))
            continue
        if block not in placed:
            layout, size = place(block_records(block, ordered))
            if layout not in layouts:
                layouts.append(layout)
            placed[block] = layouts.index(layout), size
        number, size = placed[block]
        blocks.append({"at": at, "layout": number})
        at += size
    records, size = place(outer_records(shape))
    table: dict[str, Any] = {
        "config": dict(shape.config),
        "block_prefix": shape.block_prefix,
        "layouts": layouts,
        "blocks": blocks,
        "outer": {"at": at, "records": records},
    }
    at += size
    if documents:
        table["documents"] = {}
        for name, length in sorted(documents.items()):
            table["documents"][name] = [at, length]
            at += aligned(length, ALIGN)
    return table, at


def header_text(table: Mapping[str, Any]) -> bytes:
    """The header as it stands in the file, without its padding."""
    return json.dumps(table, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def aligned(size: int, to: int) -> int:
    return -(-size // to) * to


def is_head(name: str) -> bool:
    """Whether a matrix outside the blocks is the output head rather than an embedding."""
    return name.removesuffix(".weight").rpartition(".")[2].endswith("head")


# --- sums --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PackedSizes:
    """Bytes of the packed image by part; `header` is everything that is not weights: preamble, table, padding."""

    codes: int  # of the kept weights of quantised layers
    dense_linears: int  # kept weights of the others, at their own width
    mask_index: int
    scales: int
    zero_points: int
    group_order: int
    adapters: int
    embedding: int  # also the head, if the two are tied
    head: int
    norms: int
    biases: int
    header: int

    @property
    def total(self) -> int:
        """The size of model.bin."""
        return sum(asdict(self).values())

    def parts(self) -> dict[str, int]:
        """Parts that are not empty, by a readable name."""
        return {name.replace("_", " "): size for name, size in asdict(self).items() if size}


_SIDES = {
    "index": "mask_index",
    "order": "group_order",
    **dict.fromkeys(("zeros", "e", "minima"), "zero_points"),
}  # all else beside codes is scales


@lru_cache(maxsize=256)
def packed_sizes(shape: ModelShape) -> PackedSizes:
    """Bytes of each part of the image that `compress pack` writes for a model of this shape, without documents.

    Whoever needs them several times may ask again: a shape is counted once.
    """
    sums = dict.fromkeys(PackedSizes.__dataclass_fields__, 0)
    ordered = groups_in_order(shape)
    counted = Counter(shape.own_blocks)
    for records, count in [(outer_records(shape), 1), *((block_records(b, ordered), n) for b, n in counted.items())]:
        for record in records:
            for part, size in record.parts:
                sums[_sum_of(record, part)] += count * size
    table, data = image_table(shape)
    whole = aligned(PREAMBLE_BYTES + len(header_text(table)), PAGE) + data
    return PackedSizes(**sums | {"header": whole - sum(sums.values())})


def _sum_of(record: Record, part: str) -> str:
    """The field of PackedSizes that a part counts in."""
    if record.kind == "linear":
        if part == "values":
            return "codes" if "bits" in record.about else "dense_linears"
        return _SIDES.get(part, "scales")
    if record.kind in ("adapter", "adapter_codes"):
        return "adapters"
    if record.kind == "edge":
        return "head" if is_head(record.name.rpartition(".")[0]) else "embedding"
    if record.name.endswith(".bias"):
        return "biases"
    if len(record.about["shape"]) != 2:
        return "norms"
    return "head" if is_head(record.name) else "embedding"

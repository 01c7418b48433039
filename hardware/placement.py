"""The bytes of every tensor, the memory it lies in, and what must be streamed for every token.

Weights go to the memories with the role weights, in the file's order; a matrix may cross from one to the next,
since it is read by output rows. Activations go to the memories with the role tiles before any KV cache: they are
used at once. What is left over streams from off-chip memory, block by block, in the order of computing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from typing import Any

from edgepress.checkpoints.forms import DTYPE_BYTES, TensorShape, bytes_of
from edgepress.checkpoints.kv_format import KVFormat
from edgepress.checkpoints.packed_sizes import block_records, groups_in_order, outer_records, packed_bits, value_bits
from edgepress.checkpoints.packed_sizes import (
    is_head as is_head,  # what follows the order of computing asks for it here
)
from edgepress.checkpoints.shape import BlockShape, LinearShape, ModelShape
from edgepress.hardware.orders import cache_rule, own_window, window_of
from edgepress.hardware.soc import Layout, Memory, Soc

RESIDENT, STREAMED, HOMELESS = "resident", "streamed", "nowhere"


@dataclass(frozen=True)
class Placed:
    """A tensor's codes or its scales, or the share of them that one memory holds."""

    name: str
    part: str  # as in WeightBytes.parts, or: KV cache, activations
    block: int | None
    memory: str  # empty where no memory has room
    state: str  # RESIDENT, STREAMED or HOMELESS
    offset: int  # bytes from the memory's beginning
    nbytes: int
    read_per_token: int  # bytes that one decoded token reads of it
    written_per_token: int = 0


@dataclass(frozen=True)
class Placement:
    """Every tensor's place, in the order in which they were placed."""

    tensors: tuple[Placed, ...]

    def held(self, memory: str) -> int:
        """Bytes that lie in a memory."""
        return sum(t.nbytes for t in self.tensors if t.memory == memory)

    @property
    def streamed(self) -> tuple[Placed, ...]:
        """What does not stay on the chip, by block, what lies outside the blocks last."""
        away = [t for t in self.tensors if t.state != RESIDENT]
        return tuple(sorted(away, key=lambda t: (t.block is None, t.block or 0)))

    @property
    def streamed_per_token(self) -> int:
        """Bytes that cross the chip's border for one decoded token, in either direction."""
        return sum(t.read_per_token + t.written_per_token for t in self.streamed)

    @property
    def homeless_bytes(self) -> int:
        """Bytes for which not even the off-chip memory has room."""
        return sum(t.nbytes for t in self.tensors if t.state == HOMELESS)

    def per_block(self) -> dict[str, int]:
        """Bytes that one decoded token streams for each block; `outer` is embedding, head and last norm."""
        found: dict[str, int] = {}
        for t in self.streamed:
            key = "outer" if t.block is None else str(t.block)
            found[key] = found.get(key, 0) + t.read_per_token + t.written_per_token
        return found

    def to_dict(self) -> dict[str, Any]:
        return {
            "streamed_bytes_per_token": self.streamed_per_token,
            "streamed_bytes_per_token_by_block": self.per_block(),
            "resident_bytes": sum(t.nbytes for t in self.tensors if t.state == RESIDENT),
            "streamed_bytes": sum(t.nbytes for t in self.tensors if t.state == STREAMED),
            "homeless_bytes": self.homeless_bytes,
            "tensors": [asdict(t) for t in self.tensors],
        }


@dataclass(frozen=True)
class _Item:
    name: str
    part: str
    block: int | None
    nbytes: int
    read: int
    written: int = 0


def place(
    shape: ModelShape, weights: Sequence[TensorBytes], soc: Soc, context: int, kv_bits: int, copies: int, arena: int
) -> Placement:
    """Place weights, KV caches and an arena of `arena` bytes for activations. Sizes in bytes, widths in bits.

    Of the weights, what a token reads whole goes first: an embedding that is no head is read by one row, so
    keeping it outside costs least.
    """
    runs = Counter(shape.firsts)  # a block that runs again is in its place already, and is read once more
    matrices = [
        _Item(
            t.name,
            part.replace("_", " "),
            t.block,
            size,
            (size if t.row_read is None else -(-size // t.shape[0])) * (1 if t.block is None else runs[t.block]),
        )
        for t in weights
        if t.block is None or t.block in runs
        for part, size in chip_parts(t)
    ]
    matrices.sort(key=lambda item: item.read < item.nbytes)  # stable: the order of computing stays
    caches = []
    for index in range(len(shape.blocks)):
        size = kv_block_bytes(shape, index, context, kv_bits)
        one = kv_written_bytes(shape, index, 1, kv_bits)
        # A graph that gives the grown cache out writes it all anew.
        written = one if copies == 1 else size
        caches.append(_Item(f"KV cache {index}", "KV cache", index, copies * size, size, written))
    tiles = [_Item("activations", "activations", None, arena, 0), *caches]
    placed, outside = _fill(matrices, soc.with_role("weights"))
    more, outside_tiles = _fill(tiles, soc.with_role("tiles"))
    streamed, homeless = _fill([*outside, *outside_tiles], soc.with_role("off_chip"), STREAMED)
    nowhere = [_placed(item, "", HOMELESS, 0) for item in homeless]
    return Placement((*placed, *more, *streamed, *nowhere))


def _fill(
    items: Iterable[_Item], memories: tuple[Memory, ...], state: str = RESIDENT
) -> tuple[list[Placed], list[_Item]]:
    """Items laid one behind the other through the memories of a role, and what is left over."""
    placed, left = [], []
    room = {memory.name: memory.capacity_bytes - memory.reserved_bytes for memory in memories}
    at = {memory.name: memory.reserved_bytes for memory in memories}
    for item in items:
        rest = item
        for memory in memories:
            take = min(rest.nbytes, room[memory.name])
            if take <= 0:
                continue
            part = _share(item, take)
            placed.append(_placed(part, memory.name, state, at[memory.name]))
            room[memory.name] -= take
            at[memory.name] += take
            rest = _share(item, rest.nbytes - take)
        if rest.nbytes:
            left.append(rest)
    return placed, left


def _share(item: _Item, nbytes: int) -> _Item:
    """A part of an item, with the part of its traffic."""
    if nbytes == item.nbytes:
        return item
    read, written = (round(x * nbytes / item.nbytes) if item.nbytes else 0 for x in (item.read, item.written))
    return _Item(item.name, item.part, item.block, nbytes, read, written)


def _placed(item: _Item, memory: str, state: str, offset: int) -> Placed:
    return Placed(item.name, item.part, item.block, memory, state, offset, item.nbytes, item.read, item.written)


# --- bytes of tensors -------------------------------------------------------------------------------------------------
# Bytes of a model's parameters, tensor by tensor: in its files, in its packed image, and as a chip stores them.
#
# Arithmetic on a ModelShape; no weights are read. All sizes are in bytes, all widths in bits.


SCALE_BITS = 16  # scales, and the row minimum of a packed embedding, are float16 in the checkpoints

# Codes without gaps, scales and zero points as the checkpoint has them, zeros in full: what `weight_bytes` counts
# without a chip.
PLAIN = Layout("plain", "this project", None, 1, 1, SCALE_BITS, "group", zero_points=True, patterns=False)
PACKED = replace(PLAIN, name="packed", patterns=True)


@dataclass(frozen=True)
class TensorBytes:
    """One matrix or vector with all that belongs to it: scales, zero points, bias."""

    name: str  # in full, without `.weight`: model.layers.0.self_attn.q_proj
    part: str  # a field of WeightBytes
    block: int | None
    shape: tuple[int, ...]
    bits: int  # of one weight
    file_bytes: int  # in the checkpoint's safetensors files, group index and 16-bit copies included
    packed_bytes: int  # in the image of `compress pack`
    codes: int  # on the chip, as are the next two
    scales: int  # with zero points
    bias: int
    row_read: int | None = None  # bytes that a token reads of it; None: all of it

    @property
    def chip_bytes(self) -> int:
        """What it takes in the chip's weight memory."""
        return self.codes + self.scales + self.bias


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of a model's parameters by part.

    A GPTQ file's `g_idx` counts only where its groups do not lie in storage order (desc_act), packed, with the
    scales. A symmetric grid has no zero points: they are all the middle code.
    """

    block_codes: int = 0
    scales_and_zeros: int = 0
    dense_linears: int = 0
    adapters: int = 0
    embedding: int = 0  # also the head, if the two are tied
    head: int = 0
    norms: int = 0
    biases: int = 0

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(asdict(self).values())

    def parts(self) -> dict[str, int]:
        """Parts that are not empty, by a readable name."""
        return {name.replace("_", " "): size for name, size in asdict(self).items() if size}


PARTS = tuple(field.name for field in fields(WeightBytes))


def weight_bytes(shape: ModelShape, layout: Layout = PLAIN) -> WeightBytes:
    """Bytes of each part of the model as a chip with this layout stores them."""
    sums = dict.fromkeys(PARTS, 0)
    ordered = groups_in_order(shape)
    for block, count in _distinct(shape):
        for part, size in _block_parts(block, layout, ordered):
            sums[part] += count * size
    for tensor in outer_table(shape, layout):
        for part, size in chip_parts(tensor):
            sums[part] += size
    return WeightBytes(**sums)


def chip_parts(tensor: TensorBytes) -> Iterator[tuple[str, int]]:
    """The tensor's bytes on the chip by part, empty ones left out."""
    # The scales of an embedding count with it, as they do in the packed image.
    scales = "scales_and_zeros" if tensor.part == "block_codes" else tensor.part
    for part, size in ((tensor.part, tensor.codes), (scales, tensor.scales), ("biases", tensor.bias)):
        if size:
            yield part, size


def tensor_table(shape: ModelShape, layout: Layout = PLAIN) -> list[TensorBytes]:
    """Every matrix and vector of the model in the order of computing, embedding first and head last."""
    outer = outer_table(shape, layout)
    first = [t for t in outer if t.part == "embedding"]
    rows, ordered = [], groups_in_order(shape)
    for index, block in enumerate(shape.blocks):
        prefix = f"{shape.block_prefix}.{index}"
        rows += [replace(t, name=f"{prefix}.{t.name}", block=index) for t in _block_table(block, layout, ordered)]
    return [*first, *rows, *(t for t in outer if t.part != "embedding")]


def kv_cache_bytes(shape: ModelShape, context: int, kv_bits: int) -> int:
    """Keys and values of `context` tokens in every block, no more than a window; with groups, as `CacheRule` says."""
    return sum(kv_block_bytes(shape, index, context, kv_bits) for index in range(len(shape.blocks)))


def kv_block_bytes(shape: ModelShape, block: int, context: int, kv_bits: int) -> int:
    """Keys and values of one block."""
    form = kv_form(shape, block, kv_bits)
    if form is not None:
        return form.capacity_bytes(context, shape.kv_heads, shape.head_dim)
    held = min(context, window_of(shape, block) or context)
    return bytes_of(2 * shape.kv_heads * shape.head_dim * held * kv_bits)


def kv_written_bytes(shape: ModelShape, block: int, tokens: int, kv_bits: int) -> int:
    """What so many new tokens write into one block's cache."""
    form = kv_form(shape, block, kv_bits)
    if form is not None:
        return form.written_bytes(tokens, shape.kv_heads, shape.head_dim)
    return bytes_of(2 * shape.kv_heads * shape.head_dim * tokens * kv_bits)


def kv_form(shape: ModelShape, block: int, kv_bits: int) -> KVFormat | None:
    """How one block's cache is kept where scales, zero points and tokens in full count; None: codes alone."""
    rule = cache_rule(shape)
    if rule is None or not rule.groups:
        return None
    return replace(rule.form, bits=kv_bits).for_layer(own_window(shape, block))


# --- blocks ----------------------------------------------------------------------------------------------------


def _distinct(shape: ModelShape) -> list[tuple[BlockShape, int]]:
    """Blocks that differ, with how often each occurs with weights of its own; most models have one."""
    shape = shared_blocks(shape)
    blocks = {id(block): block for block in shape.blocks}
    counted = Counter(map(id, shape.own_blocks))
    return [(blocks[key], count) for key, count in counted.items()]


def shared_blocks(shape: ModelShape) -> ModelShape:
    """The same shape with equal blocks as one object, so that they can be told apart by identity.

    Hashing a model's hundreds of layers takes longer than all the arithmetic on one block.
    """
    own = {id(block): block for block in shape.blocks}
    if len(own) == 1:
        return shape
    first: dict[BlockShape, BlockShape] = {}
    to_first = {key: first.setdefault(block, block) for key, block in own.items()}
    return replace(shape, blocks=tuple(to_first[id(block)] for block in shape.blocks))


@lru_cache(maxsize=1024)
def _block_table(block: BlockShape, layout: Layout, ordered: bool) -> tuple[TensorBytes, ...]:
    """One block's tensors, by names relative to it."""
    parts = {record.name: dict(record.parts) for record in block_records(block, ordered)}
    packed = {name: sum(sizes.values()) for name, sizes in parts.items()}
    rows = []
    for x in block.linears:
        bias = x.bias * x.out_features * DTYPE_BYTES[x.dtype]
        codes, scales = map(bytes_of, _linear_bits(x, layout))
        scales += parts[x.name].get("order", 0)
        file_bytes = sum(t.nbytes for t in x.stored())
        size = (x.out_features, x.in_features)
        part = "dense_linears" if x.grid is None else "block_codes"
        packed_size = packed[x.name] + packed.get(f"{x.name}.bias", 0)
        row = TensorBytes(x.name, part, None, size, value_bits(x), file_bytes, packed_size, codes, scales, bias)
        rows += [row, *_adapter(x)]
    rows += [_plain(t, "biases" if t.name.endswith(".bias") else "norms") for t in block.others]
    return tuple(rows)


@lru_cache(maxsize=1024)
def _block_parts(block: BlockShape, layout: Layout, ordered: bool) -> tuple[tuple[str, int], ...]:
    return tuple(part for tensor in _block_table(block, layout, ordered) for part in chip_parts(tensor))


def _linear_bits(x: LinearShape, layout: Layout) -> tuple[int, int]:
    """Bits of the codes and of scales with zero points, as the layout stores them.

    A dense layer has no codes to put in slots, and an engine for integers multiplies neither levels of a codebook nor
    codes with real zero points: all keep their width and shape, codes their own scales.
    """
    dense = x.weights * value_bits(x)
    if x.grid is None or not x.grid.integer:
        sides = 0 if x.grid is None else x.grid.side_bits(x.out_features, x.in_features)
        return (min(dense, packed_bits(x)) if layout.patterns else dense), sides
    grid = x.grid if layout.scale_per == "group" else x.grid.by_row()
    codes = _slotted(x.out_features, x.in_features, grid.bits, layout)
    if layout.patterns and layout.slot_bits is None:
        codes = min(codes, packed_bits(x))
    return codes, grid.side_bits(x.out_features, x.in_features, layout.scale_bits, layout.zero_points)


def _slotted(rows: int, columns: int, bits: int, layout: Layout) -> int:
    rows = -(-rows // layout.output_block) * layout.output_block
    columns = -(-columns // layout.input_block) * layout.input_block
    return rows * columns * max(layout.slot_bits or 0, bits)


def _adapter(x: LinearShape) -> Iterator[TensorBytes]:
    """A and B; rounded to 8-bit codes the chip holds those, beside which the files keep their 16-bit copies."""
    for t in x.adapter():
        row = _plain(t, "adapters")
        if x.adapter_packed:
            own = {p.name.rpartition(".")[2]: p.nbytes for p in x.packed_adapter() if p.name.startswith(f"{row.name}.")}
            codes, scales = own["codes"], own["scales"]
            row = replace(
                row,
                bits=8,
                file_bytes=t.nbytes + codes + scales,
                packed_bytes=codes + scales,
                codes=codes,
                scales=scales,
            )
        yield row


def _plain(t: TensorShape, part: str) -> TensorBytes:
    name, bits = t.name.removesuffix(".weight"), DTYPE_BYTES[t.dtype] * 8
    return TensorBytes(name, part, None, t.shape, bits, t.nbytes, t.nbytes, t.nbytes, 0, 0)


# --- embedding, head, last norm --------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def outer_table(shape: ModelShape, layout: Layout) -> tuple[TensorBytes, ...]:
    """What lies outside the blocks. A head, and an embedding tied to it, is a linear layer in the chip's layout."""
    packed = {record.name: sum(size for _, size in record.parts) for record in outer_records(shape)}
    untied = any(len(t.shape) == 2 and is_head(t.name) for t in shape.outer)
    rows = []
    for tensor in shape.outer:
        if len(tensor.shape) != 2:
            rows.append(_plain(tensor, "biases" if tensor.name.endswith(".bias") else "norms"))
            continue
        head = is_head(tensor.name)
        row = _plain(tensor, "head" if head else "embedding")
        copies = [t for t in shape.edge_tensors() if t.name.rpartition(".")[0] == row.name]
        if copies and shape.embedding_bits:
            row = replace(
                row,
                bits=shape.embedding_bits,
                file_bytes=row.file_bytes + sum(t.nbytes for t in copies),
                packed_bytes=sum(packed[t.name] for t in copies),
                codes=_outer_codes(tensor, shape.embedding_bits, layout, multiplied=head or not untied),
                scales=sum(t.nbytes for t in copies if not t.name.endswith(".codes")),
            )
        if not head and untied:
            row = replace(row, row_read=-(-row.chip_bytes // tensor.shape[0]))
        rows.append(row)
    return tuple(rows)


def _outer_codes(tensor: TensorShape, bits: int, layout: Layout, multiplied: bool) -> int:
    rows, columns = tensor.shape
    return bytes_of(_slotted(rows, columns, bits, layout) if multiplied else rows * columns * bits)

"""Where every tensor lies, what of it stays on the chip, and what must come from outside for every token.

Weights go to the memories with the role weights, in the file's order; a matrix may cross from one to the next,
since it is read by output rows. Activations go to the memories with the role tiles before any KV cache: they are
used at once. What is left over streams from off-chip memory, block by block, in the order of computing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from edgepress.checkpoints.shape import ModelShape
from edgepress.hardware.footprint import TensorBytes, chip_parts, kv_block_bytes, kv_written_bytes
from edgepress.hardware.soc import Memory, Soc

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
    matrices = [
        _Item(t.name, part.replace("_", " "), t.block, size, size if t.row_read is None else -(-size // t.shape[0]))
        for t in weights
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

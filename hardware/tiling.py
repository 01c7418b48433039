"""Cut every operator into tiles that fit the working memory (L1), or find the smallest L1 that would do.

A tile is `rows` x `columns` of an operator's result. Layout rules: a sum is never split, so a tile has the full
input width (attention: the full head, or the full context); output channels come in multiples of 32 on
N-EUREKA and of 16 on the cores' matrix product, unless the layer has fewer. What changes from tile to tile has
`tile_buffers` buffers (Deeploy's DBTiler: sum of size x buffers <= level size).
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from edgepress.checkpoints.forms import bytes_of
from edgepress.checkpoints.kv_format import FULL_BITS, GROUP, value_group
from edgepress.checkpoints.memory import size_text
from edgepress.hardware.operators import ACCELERATOR, CORES, ELEMENT_STEPS, Operator
from edgepress.hardware.soc import Soc

CORE_STEP = 16  # output columns of the cores' matrix product: Deeploy TilingExtension, GEMM policy
QUANTISER_BITS = 64  # an int32 scale and an int32 bias for each output channel: pulp-nnx neureka/README.md
_WHOLE_ROW = {"norm", "softmax", "rope"}  # each output needs its whole row


@dataclass(frozen=True)
class Operand:
    """A part of the working set: grows with the tile's rows, its columns, or both; `bits` for each step of these."""

    name: str
    by_rows: bool
    by_columns: bool
    bits: int
    full: int = 0  # so many first columns take full_bits instead, as cached keys in full do
    full_bits: int = 0
    group: int = 1  # so many of the other columns share a grid
    grid_bits: int = 0

    def bytes(self, rows: int, columns: int) -> int:
        """Of a tile with so many rows and columns."""
        across = columns if self.by_columns else 1
        full = min(across, self.full)
        grids = -(-(across - full) // self.group) * self.grid_bits
        return bytes_of((rows if self.by_rows else 1) * (full * self.full_bits + (across - full) * self.bits + grids))


@dataclass(frozen=True)
class Space:
    """What can be tiled how: the extent of the result, the step of its columns, and what a tile needs."""

    rows: int
    columns: int
    step: int
    row_step: int  # tiles with more rows than this have a multiple of it
    repeats: int
    operands: tuple[Operand, ...]
    rule: str  # why a tile cannot be smaller

    def working_set(self, rows: int, columns: int, buffers: int) -> dict[str, int]:
        """Bytes by part. Columns run inside rows: what depends on rows alone stays while the columns stream by."""
        parts = {}
        for x in self.operands:
            size = x.bytes(rows, columns)
            streams = x.by_columns or (x.by_rows and rows < self.rows)
            parts[x.name] = size * (buffers if streams else 1)
        return parts

    def bytes(self, rows: int, columns: int, buffers: int) -> int:
        return sum(self.working_set(rows, columns, buffers).values())


@dataclass(frozen=True)
class Tiling:
    """How an operator is cut. Without a tile (rows 0), `reason` says why and `smallest_bytes` what it would take."""

    operator: str
    engine: str
    rows: int
    columns: int
    row_tiles: int
    column_tiles: int
    tiles: int  # in all, over all repeats (heads), several of which may share L1
    buffers: int
    tile_bytes: int
    parts: Mapping[str, int]
    smallest_bytes: int  # the smallest working memory in which the operator has a tile
    reason: str = ""

    @property
    def fits(self) -> bool:
        return self.rows > 0

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "fits": self.fits}


def engine_of(operator: Operator, soc: Soc) -> str:
    """The engine that computes an operator on this chip.

    A product with constant weights runs on the accelerator if there is one and it takes weights that wide; codes of
    a codebook and codes with real zero points stand for no integers, and the cores multiply what they stand for.
    """
    if operator.engine == CORES or soc.accelerator is None or operator.weights is None or not operator.weights.integer:
        return CORES
    widest = soc.constants.get("weight_bits")
    limit = None if widest is None else widest.high or widest.value
    return ACCELERATOR if limit is None or operator.weights.bits <= limit else CORES


def stored_bytes(operator: Operator, soc: Soc) -> int:
    """Bytes of an operator's weights as the chip's layout stores them, and so as they move."""
    if operator.weights is None or operator.kind != "linear" or soc.layout.slot_bits is None:
        return operator.weight_bytes
    if engine_of(operator, soc) != ACCELERATOR:
        return operator.weight_bytes
    return operator.weights.slotted_bytes(soc.layout.slot_bits, soc.layout.input_block)


def tile(operator: Operator, soc: Soc, *, working_bytes: int | None = None, weights_in_l1: bool = True) -> Tiling:
    """The fewest tiles of an operator that fit the working memory; all of it at once where a chip has no such memory.

    `working_bytes` replaces the chip's L1, for a what-if. With `weights_in_l1` False the accelerator reads its weights
    directly from where they lie, as N-EUREKA does from its own memory, and they take no L1.
    """
    buffers = soc.count("tile_buffers") or 1
    space, engine = space_of(operator, soc, weights_in_l1), engine_of(operator, soc)
    if working_bytes is not None:
        room = working_bytes
    elif soc.working is not None:
        room = soc.working.capacity_bytes
    else:
        return Tiling(operator.label, engine, space.rows, space.columns, 1, 1, 1, 1, 0, {}, 0)
    least = min(space.step, space.columns)
    candidates = list(_row_candidates(space))
    smallest_rows = min(candidates, key=lambda rows: (space.bytes(rows, least, buffers), rows))
    smallest = space.bytes(smallest_rows, least, buffers)
    best: tuple[int, int, int, int] | None = None
    for rows in candidates:
        columns = _most_columns(space, rows, buffers, room)
        if columns:
            row_tiles, column_tiles = -(-space.rows // rows), -(-space.columns // columns)
            key = (row_tiles * column_tiles, row_tiles, rows, columns)
            best = key if best is None or key < best else best
    if best is None:
        parts = space.working_set(smallest_rows, least, buffers)
        listed = ", ".join(f"{name} {size_text(size)}" for name, size in parts.items())
        reason = (
            f"{space.rule}: its smallest tile, {smallest_rows} x {least} with {buffers} buffers, needs "
            f"{size_text(smallest)} ({listed}), more than the {size_text(room)} there are"
        )
        return Tiling(operator.label, engine, 0, 0, 0, 0, 0, buffers, smallest, parts, smallest, reason)
    per_repeat, row_tiles, rows, columns = best
    used = space.bytes(rows, columns, buffers)
    together = min(space.repeats, room // used) if per_repeat == 1 else 1
    tiles = -(-space.repeats // together) * per_repeat
    parts = space.working_set(rows, columns, buffers)
    return Tiling(
        operator.label, engine, rows, columns, row_tiles, per_repeat // row_tiles, tiles, buffers, used, parts, smallest
    )


def tilings(operators: Iterable[Operator], soc: Soc, direct: Container[str] = ()) -> list[Tiling]:
    """Tiles of every operator of a pass, equal operators once (the label is the first one's).

    `direct` holds the names of weights that the accelerator reads where they lie (a memory on its own link).
    """
    found: dict[tuple[Any, ...], Tiling] = {}
    for x in operators:
        weights = None if x.weights is None else replace(x.weights, name="")
        in_l1 = x.weights is None or x.weights.name not in direct
        key = (x.name, x.rows, x.columns, x.depth, x.repeats, len(x.reads), x.activation_bits, x.kv_bits, x.kv_form,
               weights, in_l1)  # fmt: skip
        if key not in found:
            found[key] = tile(x, soc, weights_in_l1=in_l1)
    return list(found.values())


def space_of(operator: Operator, soc: Soc, weights_in_l1: bool = True) -> Space:
    """The tiles that an operator allows, engine and layout rules considered."""
    bits, x = operator.activation_bits, operator
    result = Operand("output tiles", True, True, bits)
    if x.kind == "linear":
        return _linear_space(x, soc, weights_in_l1, result)
    if x.kind == "scores":
        parts = (
            Operand("queries", True, False, x.depth * bits),
            _keys(x),
            result,
        )
        rule = f"a score sums over the whole head of {x.depth}, and keys come by {CORE_STEP}"
        return Space(x.rows, x.columns, CORE_STEP, 1, x.repeats, parts, rule)
    if x.kind == "values":
        parts = (
            Operand("score rows", True, False, x.depth * bits),
            _values(x),
            result,
        )
        rule = f"a weighted value sums over all {x.depth} tokens in view, and columns come by {CORE_STEP}"
        return Space(x.rows, x.columns, CORE_STEP, 1, x.repeats, parts, rule)
    assert x.kind in ELEMENT_STEPS
    inputs = [Operand(f"input tiles {i + 1}", True, True, bits) for i in range(_inputs(x))]
    if x.kind == "norm" and x.weights is not None:
        inputs.append(Operand("norm weights", False, False, x.columns * x.weights.bits))
    elif x.kind == "embedding" and x.weights is not None:
        inputs = [Operand("embedding rows", True, True, x.weights.bits)]
    elif x.kind == "rope":
        inputs.append(Operand("sines and cosines", True, True, bits))
    step = x.columns if x.kind in _WHOLE_ROW else CORE_STEP
    rule = f"{x.kind} needs its whole row of {x.columns}" if x.kind in _WHOLE_ROW else f"columns come by {CORE_STEP}"
    return Space(x.rows, x.columns, step, 1, x.repeats, (*inputs, result), rule)


def _keys(x: Operator) -> Operand:
    """Cached keys, a column each. Those in full are counted first: the tile that holds them needs most."""
    if x.kv_form is None:
        return Operand("key tiles", False, True, x.depth * x.kv_bits)
    full, in_full, grid = x.kv_form.in_full(x.columns), x.depth * FULL_BITS, x.depth * 2 * FULL_BITS
    return Operand("key tiles", False, True, x.depth * x.kv_bits, full, in_full, GROUP, grid)


def _values(x: Operator) -> Operand:
    """Cached values, a channel each, over all tokens in view."""
    if x.kv_form is None:
        return Operand("value tiles", False, True, x.depth * x.kv_bits)
    full = x.kv_form.in_full(x.depth)
    bits = full * FULL_BITS + (x.depth - full) * x.kv_bits
    grid = (x.depth - full) * 2 * FULL_BITS
    return Operand("value tiles", False, True, bits, group=value_group(x.columns), grid_bits=grid)


def _linear_space(x: Operator, soc: Soc, weights_in_l1: bool, result: Operand) -> Space:
    """Weights stream through L1 row by row, unless the accelerator fetches them itself."""
    assert x.weights is not None
    bits, accelerated = x.activation_bits, engine_of(x, soc) == ACCELERATOR
    slot, block = soc.count("weight_slot") or 1, soc.count("weight_input_block") or 1
    padded = -(-x.depth // block) * block if accelerated else x.depth
    width = max(slot, x.weights.bits) if accelerated else x.weights.bits
    step = (soc.count("tile_output_channels") or CORE_STEP) if accelerated else CORE_STEP
    parts = [Operand("input", True, False, x.depth * bits)]
    if weights_in_l1 or not accelerated:
        parts.append(Operand("weight tiles", False, True, padded * width + x.weights.row_bits))
    if accelerated:
        parts.append(Operand("scales and biases", False, True, QUANTISER_BITS))
    rule = f"a tile has the full input width of {x.depth} and output channels by {step}"
    row_step = (soc.count("linear_pixels") or 1) if accelerated else 1
    return Space(x.rows, x.columns, step, row_step, x.repeats, (*parts, result), rule)


def _inputs(x: Operator) -> int:
    """Elements read for each one written: an addition's or a product's two, of the rest one."""
    return 2 if x.kind in ("add", "multiply") and len(x.reads) > 1 else 1


def _row_candidates(space: Space) -> Iterator[int]:
    """Rows worth trying: an even split into 1, 2, 3, ... tiles, above the engine's own step in multiples of it."""
    seen, rows = set(), space.rows
    parts = 1
    while True:
        candidate = -(-rows // parts)
        if space.row_step < candidate < rows:
            candidate = -(-candidate // space.row_step) * space.row_step
        candidate = min(candidate, rows)
        if candidate not in seen:
            seen.add(candidate)
            yield candidate
        if candidate == 1:
            return
        # the least number of tiles with a smaller even split
        parts = -(-rows // (-(-rows // parts) - 1))


def _most_columns(space: Space, rows: int, buffers: int, room: int) -> int:
    """The most columns, a multiple of the step or all, with which a tile of `rows` fits; 0 if not even one fits."""
    if space.bytes(rows, space.columns, buffers) <= room:
        return space.columns
    low, high = 0, -(-space.columns // space.step) - 1  # in steps; the need never falls with more columns
    while low < high:
        middle = (low + high + 1) // 2
        if space.bytes(rows, middle * space.step, buffers) <= room:
            low = middle
        else:
            high = middle - 1
    return low * space.step

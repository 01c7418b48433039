"""Tiles against an exhaustive search, and the smallest L1 against one byte less."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from edgepress.checkpoints.forms import Grid
from edgepress.checkpoints.shape import ModelShape
from edgepress.hardware.operators import Operator, forward
from edgepress.hardware.soc import Soc, load_soc
from edgepress.hardware.tiling import Tiling, engine_of, space_of, stored_bytes, tile, tilings
from tests.models import FAMILIES, tiny_config

pytestmark = pytest.mark.unit
Make = Callable[..., ModelShape]
INT8 = Grid(8, -1, True)


@pytest.fixture(scope="module")
def soc() -> Soc:
    return load_soc("siracusa")


def by_label(shape: ModelShape, tokens: int = 1, context: int = 256) -> dict[str, Operator]:
    return {x.label: x for x in forward(shape, tokens=tokens, context=context)}


def exhaustive(x: Operator, soc: Soc, room: int, direct: bool = False) -> int:
    """The fewest tiles of one repeat over every number of rows and every allowed number of columns; 0 if none fits."""
    space, buffers, best = space_of(x, soc, not direct), soc.count("tile_buffers") or 1, 0
    for rows in range(1, space.rows + 1):
        if rows > space.row_step and rows % space.row_step and rows != space.rows:
            continue
        for columns in {*range(space.step, space.columns, space.step), space.columns}:
            if sum(space.working_set(rows, columns, buffers).values()) <= room:
                tiles = -(-space.rows // rows) * -(-space.columns // columns)
                best = min(best, tiles) if best else tiles
    return best


@pytest.mark.parametrize(("tokens", "context"), [(1, 64), (100, 100), (40, 90)])
@pytest.mark.parametrize("room", [700, 2_000, 9_000, 40_000, 262_144])
def test_fewest_tiles_of_all_that_fit(make: Make, soc: Soc, tokens: int, context: int, room: int) -> None:
    shape = make("stories260k", embedding_bits=8, grid=INT8)
    some_fit = False
    for x in forward(shape, tokens=tokens, context=context)[:22]:
        found, fewest = tile(x, soc, working_bytes=room), exhaustive(x, soc, room)
        assert found.fits == bool(fewest), x.label
        some_fit |= found.fits
        if found.fits:
            assert found.row_tiles * found.column_tiles == fewest, x.label
            assert sum(found.parts.values()) == found.tile_bytes <= room
            assert found.row_tiles * found.rows >= x.rows and found.column_tiles * found.columns >= x.columns
    assert some_fit


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("buffers", [1, 2, 3])
def test_smallest_l1_is_enough_and_one_byte_less_is_not(family: str, buffers: int, make: Make, soc: Soc) -> None:
    constant = replace(soc.constants["tile_buffers"], value=buffers, low=1, high=3)
    soc = replace(soc, constants={**soc.constants, "tile_buffers": constant})
    shape = make(tiny_config(family), embedding_bits=8, grid=INT8, adapter_rank=4)
    for x in forward(shape, tokens=7, context=50):
        least = tile(x, soc).smallest_bytes
        assert tile(x, soc, working_bytes=least).fits, x.label
        less = tile(x, soc, working_bytes=least - 1)
        assert not less.fits and less.smallest_bytes == least, x.label
        assert not exhaustive(x, soc, least - 1)


def test_a_layer_that_no_tile_of_fits(make: Make, soc: Soc) -> None:
    """Llama-3.2-1B's down projection: 32 channels of 8192 inputs, two buffers, and the input: over 256 KiB."""
    down = by_label(make("llama-3.2-1b", grid=Grid(4, -1, True)))["0.down_proj"]
    found = tile(down, soc)
    weights = 2 * 32 * (8192 + 2)  # 4 bit codes in 8 bit slots, a float16 scale a row
    assert not found.fits and found.smallest_bytes == 8192 + weights + 2 * 32 * 8 + 2 * 32
    assert "full input width of 8192 and output channels by 32" in found.reason
    assert "needs 521 KiB" in found.reason and "more than the 256 KiB there are" in found.reason
    assert tile(down, soc, working_bytes=found.smallest_bytes).columns == 32
    assert not tile(down, soc, working_bytes=found.smallest_bytes - 1).fits
    # Read by the accelerator where they lie, the weights take no L1.
    direct = tile(down, soc, weights_in_l1=False)
    assert direct.fits and "weight tiles" not in direct.parts and direct.tiles == 1


def test_attention_of_a_long_context(make: Make, soc: Soc) -> None:
    """A weighted value sums over the whole context: scores of it, and twice 16 columns of values, must fit."""
    found = tile(by_label(make("llama-3.2-1b"), context=8192)["0.weighted values"], soc)
    assert found.smallest_bytes == 8192 + 2 * 16 * 8192 + 2 * 16
    assert not found.fits and "sums over all 8192 tokens in view" in found.reason
    scores = tile(by_label(make("llama-3.2-1b"), context=8192)["0.scores"], soc)
    assert scores.fits and scores.columns % 16 == 0 and scores.column_tiles > 1
    softmax = tile(by_label(make("llama-3.2-1b"), context=131072)["0.softmax"], soc)
    assert not softmax.fits and softmax.smallest_bytes == 2 * 2 * 131072


def test_layout_rules(make: Make, soc: Soc) -> None:
    for x in forward(make("smollm2-135m", embedding_bits=8, grid=INT8), tokens=256, context=256):
        found, whole = tile(x, soc), x.columns
        if found.engine == "accelerator":
            assert found.columns == whole or found.columns % 32 == 0, x.label
            assert found.rows == x.rows or found.rows <= 36 or found.rows % 36 == 0, x.label
        elif x.kind in ("norm", "softmax", "rope"):
            assert found.columns == whole, x.label
        else:
            assert found.columns == whole or found.columns % 16 == 0, x.label


def test_several_heads_share_l1(make: Make, soc: Soc) -> None:
    scores = by_label(make("stories260k"), context=64)["0.scores"]
    found = tile(scores, soc)
    assert found.tiles == 1 and scores.repeats == 8
    three = tile(scores, soc, working_bytes=3 * found.tile_bytes + 1)
    assert three.tiles == 3  # 3 + 3 + 2 heads


def test_wide_weights_and_chips_without_accelerator_use_the_cores(make: Make, soc: Soc) -> None:
    q = by_label(make("stories260k"))["0.q_proj"]  # 32 bit
    assert engine_of(q, soc) == "cores" and stored_bytes(q, soc) == 64 * 64 * 4
    q = by_label(make("stories260k", grid=Grid(4, -1, True)))["0.q_proj"]
    assert engine_of(q, soc) == "accelerator" and stored_bytes(q, soc) == 64 * 32 + 64 * 2
    assert stored_bytes(q, load_soc("siracusa-neureka")) == 64 * 64 + 64 * 2  # slots of 8 bit
    alone = replace(soc, engines=tuple(engine for engine in soc.engines if engine.kind == "cores"))
    assert engine_of(q, alone) == "cores" and stored_bytes(q, alone) == 64 * 32 + 64 * 2


def test_all_operators_at_once(make: Make, soc: Soc) -> None:
    shape = make("smollm2-135m", embedding_bits=8, grid=INT8)
    operators = forward(shape, tokens=16, context=64)
    found = {x.operator: x for x in tilings(operators, soc)}
    assert len(found) == 22  # 19 of a block (equal ones once), embedding, last norm, head
    assert all(isinstance(x, Tiling) and x == tile(by_label(shape, 16, 64)[name], soc) for name, x in found.items())
    direct = {x.operator: x for x in tilings(operators, soc, {"model.layers.0.self_attn.q_proj"})}
    assert "weight tiles" not in direct["0.q_proj"].parts and "weight tiles" in direct["1.q_proj"].parts
    assert found["head"].to_dict()["fits"] is True

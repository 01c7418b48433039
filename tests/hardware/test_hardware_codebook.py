"""Codebooks on a chip: their bytes, who computes them, and what is said of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from edgepress.checkpoints.forms import CODEBOOKS, Codebook, Grid
from edgepress.checkpoints.packed_sizes import packed_sizes
from edgepress.checkpoints.shape import ModelShape, Pattern, with_bits
from edgepress.hardware.check import check
from edgepress.hardware.operators import forward, linear_weights
from edgepress.hardware.placement import PACKED, tensor_table, weight_bytes
from edgepress.hardware.soc import Soc, load_soc, shipped_socs
from edgepress.hardware.tiling import ACCELERATOR, CORES, engine_of

pytestmark = pytest.mark.unit
Make = Callable[..., ModelShape]
NF4, THESIS = CODEBOOKS["nf4"], CODEBOOKS["nf4-thesis"]
SMOLLM2 = [(576, 576)] * 2 + [(192, 576)] * 2 + [(1536, 576)] * 2 + [(576, 1536)]


def test_smollm2_in_nf4(make: Make) -> None:
    found = weight_bytes(make("smollm2-135m", grid=NF4))
    assert found.block_codes == 106_168_320 // 2
    blocks = [rows * columns // 64 for rows, columns in SMOLLM2]
    assert found.scales_and_zeros == 30 * sum(n + 4 * (-(-n // 256) + 1) for n in blocks)
    assert weight_bytes(make("smollm2-135m", grid=THESIS)).scales_and_zeros == 4 * 106_168_320 // 64


@pytest.mark.parametrize("codebook", [NF4, THESIS], ids=lambda book: book.name)
@pytest.mark.parametrize("pattern", [None, Pattern(2, 4), Pattern(1, 8)], ids=str)
@pytest.mark.parametrize("preset", ["stories260k", "smollm2-135m"])
def test_every_way_of_counting_comes_to_the_same(
    make: Make, preset: str, codebook: Codebook, pattern: Pattern | None
) -> None:
    shape = make(preset, grid=codebook, pattern=pattern)
    if pattern and any(x.in_features % pattern.of for block in shape.blocks for x in block.linears):
        shape = make(preset, grid=codebook)
    sizes, found = packed_sizes(shape), weight_bytes(shape, PACKED)
    assert found.block_codes == sizes.codes + sizes.mask_index
    assert found.scales_and_zeros == sizes.scales
    for x in shape.blocks[0].linears:
        row = next(t for t in tensor_table(shape) if t.name.endswith(f"layers.0.{x.name}"))
        assert linear_weights("", x).nbytes == row.codes + row.scales
        assert row.file_bytes == sum(t.nbytes for t in x.stored())
        assert row.bits == 4 and row.part == "block_codes"


@pytest.mark.parametrize("chip", shipped_socs())
def test_the_cores_compute_what_no_engine_of_integers_can(make: Make, chip: str) -> None:
    soc = load_soc(chip)
    by_grid = engines(make("smollm2-135m", grid=Grid(4, 64)), soc)
    by_book = engines(make("smollm2-135m", grid=NF4), soc)
    assert set(by_book.values()) == {CORES}
    assert set(by_grid.values()) == {ACCELERATOR if soc.accelerator else CORES}


def engines(shape: ModelShape, soc: Soc) -> dict[str, str]:
    found = forward(shape, context=16)
    return {x.name: engine_of(x, soc) for x in found if x.weights is not None and "proj" in x.name}


@pytest.mark.parametrize("chip", shipped_socs())
@pytest.mark.parametrize("codebook", [NF4, THESIS], ids=lambda book: book.name)
def test_the_verdict_says_that_levels_are_looked_up(make: Make, chip: str, codebook: Codebook) -> None:
    soc = load_soc(chip)
    verdict = check(make("stories260k", grid=codebook, embedding_bits=8), soc, context=64, timing=True)
    said = [note for note in verdict.notes if note.startswith(f"{codebook.name}: ")]
    assert len(said) == 1 and "not for integers" in said[0] and "--quant gptq4" in said[0]
    assert (f"so {soc.accelerator.name} cannot use them" in said[0]) if soc.accelerator else "cannot" not in said[0]
    grid = check(make("stories260k", grid=Grid(4, 64), embedding_bits=8), soc, context=64, timing=True)
    assert not any("codebook" in note for note in grid.notes)


def test_codes_of_a_codebook_are_put_in_no_slots(make: Make) -> None:
    """N-EUREKA's layout pads inputs and takes 8 bits a weight for integers; these only lie there."""
    layout = load_soc("siracusa-neureka").layout
    shape = make("stories260k", grid=NF4)
    assert weight_bytes(shape, layout).block_codes == weight_bytes(shape).block_codes
    assert weight_bytes(shape, layout).scales_and_zeros == weight_bytes(shape).scales_and_zeros


def test_the_levers_take_integers_of_fewer_bits_and_leave_four_as_they_are(make: Make) -> None:
    shape = make("smollm2-135m", grid=NF4)
    assert with_bits(shape, 4) == shape
    assert {x.grid for block in with_bits(shape, 3).blocks for x in block.linears} == {Grid(3, 64)}
    narrower = replace(Grid(4, 64), bits=3)
    assert with_bits(make("smollm2-135m", grid=Grid(4, 64)), 3).grid == narrower

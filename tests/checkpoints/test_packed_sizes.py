"""Packed bytes against sums made by hand and against every alternative."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import asdict, replace
from itertools import combinations
from typing import Any

import pytest

from edgepress.checkpoints.families import PRESETS, shape_from_config
from edgepress.checkpoints.forms import Grid
from edgepress.checkpoints.packed_sizes import mask_index, mask_indexes, packed_bits, packed_sizes
from edgepress.checkpoints.shape import LinearShape, ModelShape, Pattern, Sparsity, Unstructured

pytestmark = pytest.mark.unit


def layer(pattern: Sparsity | None, grid: Grid | None = None, out: int = 96, columns: int = 720 * 16) -> LinearShape:
    return LinearShape("mlp.up_proj", out, columns, "BF16", pattern=pattern, grid=grid)


def model(preset: str, embedding_bits: int | None = None, **linear: Any) -> ModelShape:
    shape = shape_from_config(PRESETS[preset])
    blocks = tuple(replace(b, linears=tuple(replace(x, **linear) for x in b.linears)) for b in shape.blocks)
    return replace(shape, blocks=blocks, embedding_bits=embedding_bits)


@pytest.mark.parametrize("bits", [3, 4, 8, None])
@pytest.mark.parametrize("pattern", [Pattern(n, m) for m in (2, 3, 4, 5, 8, 12, 16) for n in range(1, m)], ids=str)
def test_the_smallest_of_all_forms_is_taken_and_none_where_nothing_is_saved(pattern: Pattern, bits: int | None) -> None:
    x = layer(pattern, Grid(bits, 32) if bits else None)
    groups, width = x.weights // pattern.of, bits or 16
    masks = sum(1 for _ in combinations(range(pattern.of), pattern.removed))
    few = min(pattern.removed, pattern.of - pattern.removed)
    sizes = [groups * pattern.of, groups * few * math.ceil(math.log2(pattern.of))]
    for joint in range(1, 64):
        word = (masks**joint - 1).bit_length()
        sizes += [math.ceil(groups / joint) * word] if word < 64 else []
    zeros = groups * pattern.removed * width
    dense = x.weights * width
    assert packed_bits(x) == min(dense, dense - zeros + min(sizes))
    assert (mask_index(x) is None) == (min(sizes) >= zeros)


@pytest.mark.parametrize(
    ("pattern", "form", "bits_a_group"),
    [
        ("1:8", "positions", 3),  # as combinations 3 as well: of equals the simpler
        ("2:4", "combinations", 44 / 17),  # bitmap and positions 4, one group alone 3; the limit is log2 6 = 2.585
        ("4:8", "combinations", 43 / 7),  # bitmap 8, one group alone 7
        ("7:8", "positions", 3),
        ("8:16", "combinations", 41 / 3),
        ("1:2", "positions", 1),
    ],
)
def test_known_patterns(pattern: str, form: str, bits_a_group: float) -> None:
    x = layer(Pattern.parse(pattern), columns=17 * 7 * 3 * 16)
    index = mask_index(x)
    assert index is not None
    assert index.form == form
    groups = x.weights // index.of
    assert index.total_bits(groups) == pytest.approx(groups * bits_a_group)


def test_a_fraction_takes_the_bitmap_or_the_list_of_places() -> None:
    half = mask_index(layer(Unstructured(0.5), columns=576))
    assert half is not None
    assert (half.form, half.removed, half.of) == ("bitmap", 288, 576)
    few = mask_index(layer(Unstructured(0.02), columns=576))
    assert few is not None
    assert (few.form, few.listed, few.lists_removed, few.bits) == ("positions", 11, True, 10)
    most = mask_index(layer(Unstructured(0.98), columns=576))
    assert most is not None
    assert (most.form, most.listed, most.lists_removed) == ("positions", 12, False)
    assert mask_index(layer(Unstructured(0.001), columns=576)) is None  # not one weight of a row
    layer_wide = list(mask_indexes(Pattern(44_237, 576 * 1536)))  # too many sets to number, or to count in a test
    assert [x.form for x in layer_wide] == ["bitmap", "positions"]
    wide = list(mask_indexes(Pattern(4, 4096)))
    assert {x.form for x in wide} == {"bitmap", "positions", "combinations"}
    assert {x.form for x in mask_indexes(Pattern(2048, 4096))} == {"bitmap", "positions"}


def test_parts_of_a_quantised_model_by_hand() -> None:
    grid = Grid(4, 64)
    sizes = packed_sizes(model("smollm2-135m", 8, pattern=Pattern(1, 8), grid=grid, adapter_rank=16))
    weights = 106_168_320
    rows = 30 * (2 * 576 * 9 + 2 * 192 * 9 + 2 * 1536 * 9 + 576 * 24)
    assert sizes.codes == weights // 8 * 7 * 4 // 8
    assert sizes.mask_index == weights // 8 * 3 // 8
    assert sizes.scales == rows * 2
    assert sizes.zero_points == rows // 2
    assert sizes.adapters == 30 * 16 * 2 * (2 * 1152 + 2 * 768 + 2 * 2112 + 2112)
    assert sizes.embedding == 49_152 * (576 + 4)
    assert sizes.norms == 61 * 576 * 2
    assert (sizes.dense_linears, sizes.head, sizes.biases, sizes.group_order) == (0, 0, 0, 0)
    assert 0 < sizes.header < 16_384
    assert sizes.total == sum(asdict(sizes).values())
    assert sizes.parts().keys() == {
        "codes", "mask index", "scales", "zero points", "adapters", "embedding", "norms", "header"
    }  # fmt: skip


def test_an_adapter_at_8_bits_by_hand() -> None:
    sixteen = model("smollm2-135m", grid=Grid(4, 64), adapter_rank=16)
    eight = model("smollm2-135m", grid=Grid(4, 64), adapter_rank=16, adapter_packed=True)
    sides = 30 * (2 * 1152 + 2 * 768 + 2 * 2112 + 2112)  # of each layer, rows and columns together
    assert packed_sizes(sixteen).adapters == 16 * sides * 2
    assert packed_sizes(eight).adapters == 16 * sides + 30 * 7 * 2 * 16 * 4
    assert packed_sizes(eight).codes == packed_sizes(sixteen).codes
    assert packed_sizes(eight).total < packed_sizes(sixteen).total


def test_a_symmetric_grid_has_no_zero_points_and_dense_layers_are_dense() -> None:
    asymmetric = packed_sizes(model("stories260k", grid=Grid(8, -1)))
    symmetric = packed_sizes(model("stories260k", grid=Grid(8, -1, symmetric=True)))
    assert symmetric.zero_points == 0 < asymmetric.zero_points == 5 * (64 * 2 + 32 * 2 + 172 * 2 + 64)
    dense = packed_sizes(model("stories260k"))
    assert dense.dense_linears == 4 * 5 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 172)
    assert dense.codes == dense.scales == dense.mask_index == 0


def test_deeper_models_share_their_layout() -> None:
    """The header's length does not grow by a block's description, only by the block's place."""
    shape = model("smollm2-135m", grid=Grid(4, 64))
    twice = replace(shape, blocks=shape.blocks * 2)
    assert packed_sizes(twice).header - packed_sizes(shape).header < 30 * 120 + 4096
    assert packed_sizes(twice).codes == 2 * packed_sizes(shape).codes


def test_sizes_need_no_torch() -> None:
    """The plan of a preset must not wait for torch."""
    code = "import edgepress.checkpoints.packed_sizes, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

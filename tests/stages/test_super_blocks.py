"""Grids whose scales are codes themselves: ggml's own reading of them, the solver's promises, N:M zeros."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.families import PRESETS, shape_from_config
from edgepress.checkpoints.forms import Grid
from edgepress.checkpoints.packed_sizes import mask_index
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.shape import LinearShape, Pattern
from edgepress.checkpoints.super_blocks import GGUF_TYPES, SuperBlocks, ggml_rows
from edgepress.checkpoints.tokens import TokenBatches
from edgepress.checkpoints.writer import CheckpointWriter
from edgepress.stages import gptq
from edgepress.stages.hessian import output_error
from edgepress.stages.options import Gptq
from edgepress.stages.quantisers import codes as plain_codes
from edgepress.stages.quantisers import gptq as plain
from edgepress.stages.quantisers import super_blocks

pytestmark = pytest.mark.unit

ROWS, COLUMNS = 24, 512
OWN = [SuperBlocks(f"gptq{bits}-s", bits, group) for bits in (2, 3, 4, 5) for group in (16, 32, 64)]


@pytest.fixture(scope="module")
def layer() -> tuple[Tensor, Tensor]:
    """A weight (out, in) and the Hessian of correlated inputs of unequal size."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.eye(COLUMNS) + torch.randn(COLUMNS, COLUMNS, generator=generator) / COLUMNS**0.5
    inputs = torch.randn(2048, COLUMNS, generator=generator) @ mix
    inputs = inputs * (0.5 * torch.randn(COLUMNS, generator=generator)).exp()
    return 0.05 * torch.randn(ROWS, COLUMNS, generator=generator), inputs.T @ inputs


def solved(layer: tuple[Tensor, Tensor], form: SuperBlocks, mask: Tensor | None = None, **options: Any) -> Any:
    weight, hessian = layer
    weight = weight if mask is None else weight * mask
    return super_blocks.solve(weight, hessian, mask, form, Gptq(**options), torch.bfloat16)


@pytest.mark.parametrize("form", GGUF_TYPES.values(), ids=lambda form: form.name)
def test_ggml_reads_the_same_weights(form: SuperBlocks, layer: tuple[Tensor, Tensor]) -> None:
    """Against the package gguf, for what the solver makes and for codes of every kind at random."""
    kind = gguf.GGMLQuantizationType[form.name]
    found = solved(layer, form)
    rng = np.random.default_rng(0)
    sides = {name: tensor.numpy() for name, tensor in found.grid.sides().items()}
    random = {
        name: x if x.dtype == np.float16 else rng.integers(0, 2**form.scale_bits, x.shape, dtype=np.uint8)
        for name, x in sides.items()
    }
    drawn = rng.integers(0, 2**form.bits, (ROWS, COLUMNS), dtype=np.uint8)
    for codes, beside in ((found.codes.numpy(), sides), (drawn, random)):
        rows = ggml_rows(form, codes, beside)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        assert rows.shape == (ROWS, COLUMNS // block * size)
        packed = COLUMNS * form.bits // 8 * ROWS + sum(form.side_parts(ROWS, COLUMNS).values())
        assert rows.size == packed, "our bytes of the packed image are ggml's"
        ours = form.dense(torch.from_numpy(codes), {k: torch.from_numpy(v) for k, v in beside.items()})
        np.testing.assert_array_equal(gguf.quants.dequantize(rows, kind), ours.numpy())


@pytest.mark.parametrize("form", [*OWN, *GGUF_TYPES.values()], ids=lambda form: f"{form.name}-g{form.group}")
def test_the_stored_tensors_are_the_weights(form: SuperBlocks, layer: tuple[Tensor, Tensor]) -> None:
    found = solved(layer, form)
    stored = found.stored()
    assert {(n, tuple(t.shape)) for n, t in stored.items()} == {
        (t.name.removeprefix("x."), t.shape) for t in form.tensors("x", ROWS, COLUMNS)
    }
    torch.testing.assert_close(form.read(stored, ROWS, COLUMNS), found.weight, rtol=0, atol=0)
    assert found.error == output_error(layer[0], found.weight, layer[1])
    codes, sides = form.split("x", stored, ROWS, COLUMNS, ordered=True)
    again = form.join(codes, sides, torch.bfloat16)
    assert stored.keys() == again.keys() and all(torch.equal(stored[name], again[name]) for name in stored)
    told = form.noted(bytes(next(t for n, t in stored.items() if n.startswith(form.note)).tolist()))
    assert (told.form, told.rows, told.columns, told.dtype) == (form, ROWS, COLUMNS, "BF16")


@pytest.mark.parametrize(
    ("wanted", "widths", "group"), [(48, {576, 1536}, 48), (48, {512}, 32), (16, {64, 192}, 16), (200, {576}, 64)]
)
def test_a_group_is_as_asked_where_it_divides_every_width(wanted: int, widths: set[int], group: int) -> None:
    fitted = SuperBlocks("gptq4-s", 4, wanted).fitted(widths)
    assert fitted.group == group
    for columns in widths:
        generator = torch.Generator().manual_seed(0)
        weight, inputs = (torch.randn(n, columns, generator=generator) for n in (8, 256))
        found = super_blocks.solve(weight, inputs.T @ inputs, None, fitted, Gptq(quant="gptq4-s"), torch.bfloat16)
        scales, minima = (found.stored()[f"weight.{name}"] for name in ("scales", "minima"))
        assert scales.shape == minima.shape == (8, columns // group)
        torch.testing.assert_close(fitted.read(found.stored(), 8, columns), found.weight, rtol=0, atol=0)


def test_shrinkage_of_1_leaves_every_column_its_own_nearest_code(layer: tuple[Tensor, Tensor]) -> None:
    form = SuperBlocks("gptq4-s", 4, 32)
    shrunk, least = solved(layer, form, shrinkage=1.0), solved(layer, form, shrinkage=0.0)
    scale, minimum = form.steps(shrunk.grid.sides(), COLUMNS)
    scale, minimum = (x.repeat_interleave(32, dim=1) for x in (scale, minimum))
    nearest = ((layer[0] + minimum) / scale).round().clamp(0, 15)
    assert torch.equal(shrunk.codes.float(), nearest)
    assert least.error < solved(layer, form).error < shrunk.error, "the default lies between"


@pytest.mark.parametrize("bits", [3, 4])
def test_the_error_is_below_that_of_plain_groups_with_as_many_bits(bits: int, layer: tuple[Tensor, Tensor]) -> None:
    """A real minimum and 6-bit scales, groups of 32 or 64, against float16 scales and whole zero points."""
    for own, theirs in ((64, 64), (32, 32)):
        form, grid = SuperBlocks("own", bits, own), Grid(bits, theirs)
        plain_bits = sum(grid.side_parts(ROWS, COLUMNS).values())
        assert sum(form.side_parts(ROWS, COLUMNS).values()) < plain_bits
        assert solved(layer, form).error < plain.solve(*layer, None, grid, Gptq()).error


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_K", "Q6_K"])
def test_search_and_solver_each_gain(name: str, layer: tuple[Tensor, Tensor]) -> None:
    form, (weight, hessian) = GGUF_TYPES[name], layer
    searched, quick = solved(layer, form), solved(layer, form, scale_search=False)
    assert searched.error < quick.error
    scale, least = searched.grid.each(COLUMNS)
    nearest = ((weight + least) / scale).round().clamp(0, 2**form.bits - 1)
    assert searched.error < 0.7 * output_error(weight, scale * nearest - least, hessian)


@pytest.mark.parametrize("form", [SuperBlocks("gptq4-s", 4, 32), SuperBlocks("gptq2-s", 2, 16), GGUF_TYPES["Q3_K"]])
def test_removed_weights_are_exactly_zero(form: SuperBlocks, layer: tuple[Tensor, Tensor]) -> None:
    mask = (torch.arange(COLUMNS) % 4 < 2).expand(ROWS, -1).contiguous()
    mask = torch.where(torch.arange(ROWS).unsqueeze(1) % 2 == 0, mask, ~mask)
    own = form.suited(ROWS, COLUMNS, masked=True)
    found = solved(layer, own, mask)
    back = own.read(found.stored(), ROWS, COLUMNS)
    assert bool((back[~mask] == 0).all()) and bool((back[mask] != 0).float().mean() > 0.5)
    torch.testing.assert_close(back, found.weight, rtol=0, atol=0)
    codes, sides = own.split("x", found.stored(), ROWS, COLUMNS, ordered=True)
    assert bool((codes == own.zero_codes(sides, ROWS, COLUMNS))[~mask].all())


def test_marked_zeros_always_have_an_index() -> None:
    """Of 3-bit codes 1:8 would not pay, but a weight without a code must be listed."""
    grids = (Grid(3, 32), SuperBlocks("gptq3-s", 3, 32, masked=True))
    found = [mask_index(LinearShape("x", 64, 64, "BF16", pattern=Pattern(1, 8), grid=grid)) for grid in grids]
    assert found[0] is None and found[1] is not None


@pytest.mark.parametrize("masked", [False, True])
def test_a_search_over_some_rows_at_once_finds_the_same_grid(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, importance = torch.randn(7, 128), torch.rand(128)
    kept = torch.rand(7, 128) > 0.2 if masked else None
    form = SuperBlocks("gptq3-s", 3, 32).suited(7, 128, masked)
    whole = super_blocks.fit(weight, importance, kept, form, True)
    monkeypatch.setattr(plain_codes, "_IN_CACHE", 300)
    parts = super_blocks.fit(weight, importance, kept, form, True)
    for name in ("d", "e", "scales", "minima"):
        assert torch.equal(getattr(whole, name), getattr(parts, name)), name


def test_dead_inputs_and_rows_of_zeros_are_no_trouble(layer: tuple[Tensor, Tensor]) -> None:
    weight, hessian = layer[0].clone(), layer[1].clone()
    weight[3], weight[:, 32:64] = 0, 0
    hessian[5], hessian[:, 5] = 0, 0
    for form in (*OWN, *GGUF_TYPES.values()):
        found = solved((weight, hessian), form)
        assert bool(torch.isfinite(found.weight).all()) and found.weight[3].abs().max() < 1e-5


def test_a_width_without_super_blocks_takes_the_next_type() -> None:
    """As GGUF's own types allow: of 576 columns 256 is no divisor, and 32 is."""
    plan = gptq.plan(shape_from_config(PRESETS["smollm2-135m"]), Gptq(quant="q4_k"))
    names = {x.name.rpartition(".")[2]: x.grid.name for x in plan.blocks[0].linears if isinstance(x.grid, SuperBlocks)}
    assert names == dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"), "Q4_1") | {
        "down_proj": "Q4_K"
    }
    said = " ".join(gptq.remarks(shape_from_config(PRESETS["smollm2-135m"]), Gptq(quant="q4_k")))
    assert "q_proj, self_attn.v_proj take Q4_1" in said and "gptq4-s has super-blocks that do" in said


def test_minima_and_masks_are_refused_where_the_type_has_no_room() -> None:
    for method in ("q2_k", "q4_k", "q5_k"):
        with pytest.raises(PlanError, match=r"give q3_k or q6_k, .* or gptq4-s"):
            super_blocks.form(Gptq(quant=method), masked=True, gguf=method.upper())
    with pytest.raises(PlanError, match="--symmetric"):
        super_blocks.form(Gptq(quant="q6_k", symmetric=True), masked=False, gguf="Q6_K")


@pytest.mark.parametrize("method", ["gptq3-s", "q6_k"])
def test_high_effort_lowers_the_blocks_error(
    method: str, masked: Checkpoint, tokens: Callable[..., TokenBatches], seal: Any, tmp_path: Path
) -> None:
    """The last block's error falls, codes stay codes, and zeros stay zeros."""
    writer = CheckpointWriter(tmp_path / "made")
    facts = gptq.run(masked, writer, tokens(8), Gptq(quant=method, effort="high"), Runtime(chunk_tokens=48))
    refined = [block["refined"] for block in facts["blocks"]]
    assert all(r["error_after"] <= r["error_before"] for r in refined)
    assert any(r["error_after"] < 0.98 * r["error_before"] for r in refined)
    made = seal(writer, masked, pattern="2:4")
    for index, block in enumerate(made.shape.blocks):
        for x in block.linears:
            removed = masked.block(index)[f"{x.name}.weight"] == 0
            assert bool((made.base_weight(index, x)[removed] == 0).all())

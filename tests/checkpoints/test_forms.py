"""Codebooks as a form beside the grid: their levels, what a layer stores, and sizes known from elsewhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import NormalDist

import pytest
import torch
from safetensors.torch import save_file

from edgepress.checkpoints.families import PRESETS, shape_from_config
from edgepress.checkpoints.forms import CODEBOOKS, Grid, TensorShape
from edgepress.checkpoints.packing import encode
from edgepress.checkpoints.shape import LinearShape, ModelShape, safetensors_bytes, with_form

pytestmark = pytest.mark.unit

NF4, THESIS = CODEBOOKS["nf4"], CODEBOOKS["nf4-thesis"]
TORCH = {"U8": torch.uint8, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def test_nf4_levels_are_quantiles_of_the_normal_distribution() -> None:
    """QLoRA, section 3: of 8 negative and 9 positive quantiles, evenly spaced, the zeros are one."""
    tail = (1 - 1 / 32 + 1 - 1 / 30) / 2

    def half(count: int) -> list[float]:
        steps = [tail + (0.5 - tail) * i / (count - 1) for i in range(count - 1)]
        return [NormalDist().inv_cdf(p) for p in steps]

    positive, negative = half(9), half(8)
    levels = sorted([*positive, 0.0, *(-x for x in negative)])
    assert NF4.levels == pytest.approx([x / max(levels) for x in levels], abs=3e-6)
    assert list(NF4.levels) == sorted(NF4.levels)


def test_the_thesis_codebook_is_equation_2_26() -> None:
    positive = [0.0911, 0.1848, 0.2844, 0.3949, 0.5251, 0.6962, 0.8682, 1.0]
    assert list(THESIS.levels) == [*sorted(-x for x in positive if x != 0.8682), 0.0, *positive]
    assert [round(x, 4) for x in NF4.levels[:8]] == list(THESIS.levels[:8])


@pytest.mark.parametrize("name", CODEBOOKS)
def test_each_has_an_exact_zero_and_sixteen_levels(name: str) -> None:
    book = CODEBOOKS[name]
    assert len(book.levels) == len(set(book.levels)) == 2**book.bits
    assert (book.levels[0], book.levels[book.zero], book.levels[-1]) == (-1, 0, 1)


@pytest.mark.parametrize(("rows", "columns"), [(64, 96), (40, 36), (5, 13), (1, 3)])
@pytest.mark.parametrize("codebook", [NF4, THESIS, replace(NF4, nested=0), replace(NF4, block=128)], ids=repr)
def test_a_layer_stores_what_its_shape_says(tmp_path: Path, codebook: object, rows: int, columns: int) -> None:
    assert not isinstance(codebook, Grid) and isinstance(codebook, type(NF4))
    linear = LinearShape("mlp.down_proj", rows, columns, "BF16", bias=True, grid=codebook)
    stored = encode(torch.randn(rows, columns), codebook, torch.bfloat16)
    assert tuple(stored) == tuple(k for k in stored if k in codebook.kinds) and set(stored) == set(codebook.kinds)
    tensors = {f"mlp.down_proj.{kind}": tensor for kind, tensor in stored.items()}
    tensors["mlp.down_proj.bias"] = torch.zeros(rows, dtype=torch.bfloat16)
    assert {t.name: (t.shape, TORCH[t.dtype]) for t in linear.stored()} == {
        name: (tuple(t.shape), t.dtype) for name, t in tensors.items()
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    assert safetensors_bytes(list(linear.stored())) == (tmp_path / "x.safetensors").stat().st_size


def test_bits_of_a_weight_are_those_of_qlora() -> None:
    """Section 3: double quantisation takes the scales from 0.5 bits a weight to 0.127."""
    weights = 4096 * 4096
    assert THESIS.side_bits(4096, 4096) / weights == 0.5
    assert NF4.side_bits(4096, 4096) / weights == pytest.approx(8 / 64 + 32 / (64 * 256), abs=1e-5)


def test_llama_1b_has_the_thesis_model_size() -> None:
    """Its tables 4.1 to 4.5: NF4 1,164 MB, the head among the quantised layers and apart from the embedding; 2,858."""
    shape = shape_from_config(PRESETS["llama-3.2-1b"])
    embedding = next(t for t in shape.outer if len(t.shape) == 2)
    head = LinearShape("lm_head", *embedding.shape, "BF16")  # type: ignore[arg-type]

    def with_head(shape: ModelShape, head: LinearShape) -> ModelShape:
        return replace(shape, outer=(*shape.outer, *head.stored()))

    def own_tables(shape: ModelShape) -> float:
        """MiB of what bitsandbytes' format repeats in every layer: the levels and the note."""
        linears = [*(x for block in shape.blocks for x in block.linears), head]
        return len(linears) * (64 + THESIS.state_bytes) / 2**20

    dense = with_head(shape, head)
    coded = with_head(with_form(shape, THESIS, 0), replace(head, grid=THESIS))
    assert round(dense.model_mib) == 2858
    assert round(coded.model_mib - own_tables(shape)) == 1164
    smaller = with_head(with_form(shape, NF4, 0), replace(head, grid=NF4))
    assert coded.model_mib - smaller.model_mib == pytest.approx(0.373 * 1_235_746_816 / 8 / 2**20, rel=0.01)


def test_a_form_is_put_on_every_layer_that_can_hold_it() -> None:
    shape = shape_from_config(PRESETS["stories260k"])  # a feed-forward of 172: no multiple of 32
    coded, grid = with_form(shape, NF4, 8), with_form(shape, Grid(4, 64), 8)
    assert all(x.grid == NF4 for block in coded.blocks for x in block.linears)
    assert {x.name for block in grid.blocks for x in block.linears if x.grid is None} == {
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    }  # fmt: skip
    assert coded.embedding_bits == grid.embedding_bits == 8
    assert (coded.grid, coded.parameters_total) == (NF4, shape.parameters_total)


def test_both_forms_say_in_words_and_in_the_image_what_they_are() -> None:
    assert (Grid(4, 64).describe(), NF4.describe(), THESIS.describe()) == ("4 bits", "nf4", "nf4-thesis")
    assert Grid(4, 64, True).about() == {"bits": 4, "group": 64, "symmetric": True}
    assert NF4.about() == {"codebook": "nf4", "bits": 4, "block": 64, "nested": 256}
    assert (Grid.loaders, NF4.loaders, THESIS.loaders) == (("gptqmodel", "optimum"), ("bitsandbytes",), ())


def test_model_mib_is_equation_2_55_by_hand() -> None:
    linear = LinearShape("q_proj", 64, 128, "BF16", grid=NF4, adapter_rank=2, adapter_dtype="F32")
    outer = (TensorShape("embed", (10, 64), "BF16"),)
    shape = ModelShape("llama", {}, (replace(_block(), linears=(linear,)),), outer)
    bits = 64 * 128 * 4 + 128 * 8 + 16 * 32 + 1 * 32 + 256 * 32 + 256 * 8  # codes, absmax, tables, note
    bits += 2 * (64 + 128) * 32 + 10 * 64 * 16
    assert shape.model_mib == pytest.approx(bits / (8 * 1024**2))


def _block() -> object:
    return shape_from_config(PRESETS["stories260k"]).blocks[0].__class__((), ())

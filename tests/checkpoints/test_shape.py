"""Counts and bytes against the files that safetensors writes, and the thesis's numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.families import PRESETS, shape_from_config
from edgepress.checkpoints.forms import DTYPE_BYTES, Grid, TensorShape, largest_group
from edgepress.checkpoints.packing import pack_linear
from edgepress.checkpoints.shape import (
    LinearShape,
    ModelShape,
    Pattern,
    Unstructured,
    Within,
    parse_amount,
    parse_sparsity,
    safetensors_bytes,
)

pytestmark = pytest.mark.unit

TORCH = {
    "F64": torch.float64,
    "I64": torch.int64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "U8": torch.uint8,
    "I8": torch.int8,
    "BOOL": torch.bool,
}
NAMES = st.text('abz.09_\u00e9"\\\n', min_size=1, max_size=8)
SHAPES = st.lists(st.integers(0, 12), max_size=3).map(tuple)


@given(st.dictionaries(NAMES, st.tuples(SHAPES, st.sampled_from(sorted(TORCH))), min_size=1, max_size=12))
@settings(max_examples=150, deadline=None)
def test_file_size_is_what_safetensors_writes(tensors: dict[str, tuple[tuple[int, ...], str]]) -> None:
    data = save({n: torch.zeros(s, dtype=TORCH[d]) for n, (s, d) in tensors.items()}, metadata={"format": "pt"})
    assert safetensors_bytes([TensorShape(n, s, d) for n, (s, d) in tensors.items()]) == len(data)


def test_file_size_of_one_awkward_order() -> None:
    """Two types of one width: safetensors puts all bfloat16 before all float16, whatever the names."""
    sizes = {"a": ("F16", 4990), "b": ("BF16", 5), "c": ("F16", 4995), "d": ("BF16", 4000), "e": ("BF16", 90000)}
    for names in ("ab", "abc", "abcd", "abcde", "abe", "ad", "ae", "cde"):
        data = save({n: torch.zeros(sizes[n][1], dtype=TORCH[sizes[n][0]]) for n in names}, metadata={"format": "pt"})
        assert safetensors_bytes([TensorShape(n, (sizes[n][1],), sizes[n][0]) for n in names]) == len(data), names


def test_every_dtype_has_its_width() -> None:
    assert {name: dtype.itemsize for name, dtype in TORCH.items()} == DTYPE_BYTES


@pytest.mark.parametrize(
    ("widths", "wanted", "group"),
    [
        ({576, 1536}, 128, 64),
        ({2048, 8192}, 128, 128),
        ({2048, 8192}, 100, 64),
        ({96}, 1024, 32),
        ({64, 172}, 128, 4),
        ({64, 63}, 32, 1),
        ({64, 63}, -1, -1),
    ],
)
def test_largest_group(widths: set[int], wanted: int, group: int) -> None:
    assert largest_group(widths, wanted) == group
    if wanted != -1:
        powers = [2**i for i in range(20) if 2**i <= wanted]
        assert group == max(p for p in powers if all(width % p == 0 for width in widths))


@pytest.mark.parametrize("text", ["1:8", " 2:4 ", "4:16"])
def test_pattern_reads_what_it_prints(text: str) -> None:
    pattern = parse_sparsity(text)
    assert isinstance(pattern, Pattern)
    assert f"{pattern.removed}:{pattern.of}" == str(pattern) == text.strip()
    assert pattern.on(64) == pattern


@given(st.floats(0, 1, exclude_min=True, exclude_max=True), st.integers(1, 20000))
def test_fraction_survives_the_manifest(fraction: float, width: int) -> None:
    sparsity = Unstructured(fraction)
    again = parse_sparsity(str(sparsity))
    assert again == sparsity
    assert again.on(width) == Pattern(int(fraction * width), width)


@given(st.floats(0, 1, exclude_min=True, exclude_max=True), st.integers(1, 900), st.integers(1, 900))
def test_a_pattern_within_layers_of_one_name(fraction: float, width: int, rows: int) -> None:
    whole = Within(Unstructured(fraction), "gate_proj")
    again = parse_sparsity(str(whole))
    assert again == whole
    assert again.on(width, rows) == Pattern(round(fraction * width * rows), width * rows)
    assert again.covers("mlp.gate_proj") and again.covers("gate_proj")
    assert not again.covers("mlp.up_proj") and not again.covers("mlp.big_gate_proj")
    few = parse_sparsity("2:4 in gate_proj")
    assert (few, few.on(width, rows)) == (Within(Pattern(2, 4), "gate_proj"), Pattern(2, 4))
    assert Pattern(2, 4).covers("anything") and Unstructured(0.5).covers("anything")
    with pytest.raises(PlanError, match="is not an N:M pattern"):
        parse_amount("2:4 in gate_proj")  # which a user does not write


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is not an N:M pattern; write e.g. 1:8"),
        ("2of4", "'2of4' is not an N:M pattern"),
        ("-1:4", "'-1:4' is not"),
        ("1:4:8", "'1:4:8' is not"),
        ("1.5:4", "is not an N:M pattern"),
        ("0:8", "0:8 removes 0 of every 8; N must be at least 1"),
        ("8:8", "8:8 removes 8 of every 8; .* below M"),
        ("9:8", "9:8 removes 9 of every 8"),
    ],
)
def test_impossible_patterns(text: str, message: str) -> None:
    for read in (Pattern.parse, parse_sparsity):
        with pytest.raises(PlanError, match=message):
            read(text)


@pytest.mark.parametrize("text", ["0", "1", "1.0", "-0.5", "50", "nan", "inf"])
def test_impossible_fractions(text: str) -> None:
    with pytest.raises(PlanError, match=f"a fraction of {text} cannot be removed; it must be between 0 and 1"):
        parse_sparsity(text)


# ------------------------------------------------------------------ the thesis, chapter 4


def without(shape: ModelShape, blocks: int) -> ModelShape:
    return replace(shape, blocks=shape.blocks[: len(shape.blocks) - blocks])


def test_llama_3_2_1b_is_the_thesis_s() -> None:
    shape = shape_from_config(PRESETS["llama-3.2-1b"])
    assert round(shape.parameters_total / 1e6, 1) == 1235.8
    assert shape.parameters_total == 1_235_814_400
    assert f"{shape.file_bytes / 2**30:.2f}" == "2.30"
    assert round(without(shape, 2).parameters_total / 1e6, 1) == 1114.2
    assert shape.parameters_nonzero == shape.parameters_total
    assert shape.pattern is None
    assert shape.grid is None


# ------------------------------------------------------------------ one model, every addition


@pytest.fixture
def shape() -> ModelShape:
    return shape_from_config(PRESETS["stories260k"])


def linears(shape: ModelShape, **changes: object) -> ModelShape:
    blocks = tuple(
        replace(block, linears=tuple(replace(x, **changes) for x in block.linears))  # type: ignore[arg-type]
        for block in shape.blocks
    )
    return replace(shape, blocks=blocks)


def test_parameters_by_hand(shape: ModelShape) -> None:
    attention = 64 * 64 + 2 * 32 * 64 + 64 * 64
    block = attention + 3 * 64 * 172 + 2 * 64
    assert shape.parameters_total == 5 * block + 512 * 64 + 64
    pruned = linears(shape, pattern=Pattern(1, 4))
    assert pruned.parameters_total == shape.parameters_total
    assert pruned.parameters_nonzero == shape.parameters_total - 5 * (attention + 3 * 64 * 172) // 4
    assert pruned.pattern == Pattern(1, 4)
    scattered = linears(shape, pattern=Unstructured(0.3))
    gone = 5 * (int(0.3 * 64) * (64 + 32 + 32 + 64 + 172 + 172) + int(0.3 * 172) * 64)
    assert scattered.parameters_nonzero == shape.parameters_total - gone


def test_adapter_and_bias_count(shape: ModelShape) -> None:
    adapted = linears(shape, adapter_rank=3, bias=True)
    sides = [(64, 64), (32, 64), (32, 64), (64, 64), (172, 64), (172, 64), (64, 172)]
    extra = 5 * sum(3 * (outs + ins) + outs for outs, ins in sides)
    assert adapted.parameters_total == shape.parameters_total + extra
    names = [t.name for t in adapted.adapter_tensors()]
    assert names[0] == "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert len(names) == 5 * 7 * 2
    assert adapted.file_bytes - linears(shape, bias=True).file_bytes == safetensors_bytes(adapted.adapter_tensors())


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("group", [32, -1])
def test_quantised_linear_stores_what_packing_makes(tmp_path: Path, bits: int, group: int) -> None:
    linear = LinearShape("mlp.down_proj", 64, 96, "BF16", bias=True, grid=Grid(bits, group))
    groups = linear.grid.groups(96) if linear.grid else 0
    tensors = {
        f"mlp.down_proj.{kind}": tensor
        for kind, tensor in pack_linear(
            torch.zeros(64, 96), torch.ones(64, groups), torch.ones(64, groups), group, bits
        ).items()
    }
    tensors["mlp.down_proj.bias"] = torch.zeros(64, dtype=torch.bfloat16)
    assert {t.name: (t.shape, TORCH[t.dtype]) for t in linear.stored()} == {
        name: (tuple(t.shape), t.dtype) for name, t in tensors.items()
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    assert safetensors_bytes(list(linear.stored())) == (tmp_path / "x.safetensors").stat().st_size


def test_edge_tensors_hold_the_embedding_once(shape: ModelShape) -> None:
    assert shape.edge_tensors() == []
    for bits, width in ((8, 64), (4, 32)):
        edge = replace(shape, embedding_bits=bits)
        assert [(t.name, t.shape, t.dtype) for t in edge.edge_tensors()] == [
            ("model.embed_tokens.codes", (512, width), "U8"),
            ("model.embed_tokens.scales", (512, 1), "F16"),
            ("model.embed_tokens.minimum", (512, 1), "F16"),
        ]
        assert edge.file_bytes == shape.file_bytes + safetensors_bytes(edge.edge_tensors())


def test_numbers_of_the_configuration(shape: ModelShape) -> None:
    assert (shape.hidden_size, shape.vocabulary, shape.heads, shape.kv_heads, shape.head_dim) == (64, 512, 8, 4, 8)
    assert shape.positions == 512
    plain = replace(shape, config={"hidden_size": 64, "num_attention_heads": 4})
    assert (plain.kv_heads, plain.head_dim) == (4, 16)
    with pytest.raises(PlanError, match="llama model states no whole number 'max_position_embeddings'"):
        _ = plain.positions

"""Bytes against counts made by hand, and against brute force."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from edgepress.checkpoints.forms import Grid
from edgepress.checkpoints.kv_format import KVFormat
from edgepress.checkpoints.packed_sizes import packed_sizes
from edgepress.checkpoints.shape import ModelShape, Pattern
from edgepress.hardware.orders import CacheRule, with_cache
from edgepress.hardware.placement import PACKED, kv_block_bytes, kv_cache_bytes, tensor_table, weight_bytes
from edgepress.hardware.soc import load_soc

pytestmark = pytest.mark.unit
Make = Callable[..., ModelShape]

# (out, in) of a block's seven matrices
SMOLLM2 = [(576, 576)] * 2 + [(192, 576)] * 2 + [(1536, 576)] * 2 + [(576, 1536)]
PHI3 = {
    "model_type": "phi3",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}


# --- weights ---------------------------------------------------------------------------------------------------


def test_smollm2_in_16_bit(make: Make) -> None:
    found = weight_bytes(make("smollm2-135m"))
    # q, o 576 x 576; k, v 192 x 576; gate, up, down 1536 x 576; 30 blocks of 2 norms and one last norm
    assert found.dense_linears == 2 * 30 * (2 * 331_776 + 2 * 110_592 + 3 * 884_736) == 212_336_640
    assert found.embedding == 2 * 49_152 * 576 == 56_623_104
    assert found.norms == 2 * 61 * 576 == 70_272
    assert found.total == 2 * 134_515_008
    assert found.parts().keys() == {"dense linears", "embedding", "norms"}  # tied: no head


def test_smollm2_in_4_bit_with_groups(make: Make) -> None:
    found = weight_bytes(make("smollm2-135m", embedding_bits=4, grid=Grid(4, 64)))
    assert found.block_codes == 106_168_320 // 2
    assert found.scales_and_zeros == 1_658_880 * 2 + 1_658_880 // 2  # float16 scale and 4 bit zero point a group
    assert found.embedding == 28_311_552 // 2 + 49_152 * 4  # codes, scale and minimum of each row
    assert found.total == 53_084_160 + 4_147_200 + 14_352_384 + 70_272 == 71_654_016


def test_llama_1b_in_4_bit_is_589_mib(make: Make) -> None:
    found = weight_bytes(make("llama-3.2-1b", embedding_bits=4, grid=Grid(4, -1, symmetric=True)))
    assert found.block_codes == 973_078_528 // 2
    assert found.embedding == 262_668_288 // 2 + 128_256 * 4
    assert round((found.block_codes + 262_668_288 // 2) / 2**20) == 589
    rows = 2048 + 512 + 512 + 2048 + 8192 + 8192 + 2048
    assert found.scales_and_zeros == 16 * rows * 2  # one scale a row, no zero points on a symmetric grid


def test_stories260k_in_8_bit_is_a_quarter_mib(make: Make) -> None:
    found = weight_bytes(make("stories260k", embedding_bits=8, grid=Grid(8, -1)))
    assert found.block_codes == 5 * (2 * 4096 + 2 * 2048 + 3 * 172 * 64) == 226_560
    assert found.scales_and_zeros == 5 * 600 * 3
    assert found.embedding == 512 * 64 + 512 * 4
    assert found.norms == 11 * 64 * 4
    assert found.total == 226_560 + 9_000 + 34_816 + 2_816


def test_micro_llama_blocks_are_deeploys_weight_memory(make: Make) -> None:
    assert weight_bytes(make("microllama", grid=Grid(8, -1))).block_codes == 524_288


def test_untied_head_biases_and_fused_projections_count(make: Make) -> None:
    phi = weight_bytes(make(PHI3))
    assert phi.embedding == phi.head == 2 * 96 * 64
    assert phi.dense_linears == 2 * 2 * (64 * (64 + 2 * 32) + 64 * 64 + 64 * 320 + 160 * 64)
    qwen = weight_bytes(make({**PHI3, "model_type": "qwen2"}))
    assert qwen.biases == 2 * 2 * (64 + 32 + 32)
    assert qwen.total - qwen.biases == phi.total


def test_g_idx_does_not_count_but_every_other_stored_tensor_does(make: Make) -> None:
    shape = make("smollm2-135m", grid=Grid(4, 64))
    stored = [t for index in range(30) for t in shape.block_tensors(index)] + list(shape.outer)
    assert weight_bytes(shape).total == sum(t.nbytes for t in stored if not t.name.endswith("g_idx"))


def test_an_index_of_groups_counts_where_they_are_out_of_order(make: Make) -> None:
    shape = make("smollm2-135m", grid=Grid(4, 64))
    shuffled = replace(shape, config={**shape.config, "quantization_config": {"desc_act": True}})
    # 9 groups of 576 inputs take 4 bits an input, 24 of 1536 take 5
    extra = 30 * (6 * 576 * 4 + 1536 * 5) // 8
    assert weight_bytes(shuffled).total == weight_bytes(shape).total + extra


def test_adapters_count_in_their_own_width(make: Make) -> None:
    found = weight_bytes(make("stories260k", grid=Grid(8, -1), adapter_rank=4))
    assert found.adapters == 2 * 5 * 4 * (128 + 96 + 96 + 128 + 236 + 236 + 236)
    wider = weight_bytes(make("stories260k", grid=Grid(8, -1), adapter_rank=4, adapter_dtype="F32"))
    assert wider.adapters == 2 * found.adapters


def test_packed_counts_kept_values_and_index_only(make: Make) -> None:
    shape = make("smollm2-135m", grid=Grid(4, 64), pattern=Pattern(2, 4))
    dense, packed = weight_bytes(shape), weight_bytes(shape, PACKED)
    # 17 groups of 6 possible masks share 44 bits (6^17 < 2^44), 2.59 a group where a bitmap takes 4
    indexed = 30 * sum(-(-out * columns // 4 // 17) * 44 for out, columns in SMOLLM2)
    assert abs(packed.block_codes - (106_168_320 // 4 * 2 * 4 + indexed) / 8) < 30 * 7
    assert replace(packed, block_codes=dense.block_codes) == dense
    # 1:8 in 4 bit: 7 x 4 and a position of 3 bits, 31 where dense takes 32
    less = weight_bytes(make("smollm2-135m", grid=Grid(4, 64), pattern=Pattern(1, 8)), PACKED)
    assert less.block_codes == 106_168_320 // 8 * 31 // 8
    # 1:16 saves 4 bits a group and the position would take 4: the zeros stay
    same = weight_bytes(make("smollm2-135m", grid=Grid(4, 64), pattern=Pattern(1, 16)), PACKED)
    assert same.block_codes == dense.block_codes


def test_packed_16_bit_layers_and_layers_without_pattern(make: Make) -> None:
    shape = make("smollm2-135m", pattern=Pattern(1, 4))
    assert weight_bytes(shape, PACKED).dense_linears == 106_168_320 // 4 * (3 * 16 + 2) // 8
    plain = make("smollm2-135m")
    assert weight_bytes(plain, PACKED) == weight_bytes(plain)


@pytest.mark.parametrize("pattern", [None, Pattern(1, 8), Pattern(2, 4), Pattern(3, 4)])
@pytest.mark.parametrize("grid", [None, Grid(4, 64), Grid(3, -1), Grid(8, 128, symmetric=True)])
def test_the_packed_layout_is_the_packed_image_less_its_padding(
    make: Make, pattern: Pattern | None, grid: Grid | None
) -> None:
    shape = make("smollm2-135m", embedding_bits=4, grid=grid, pattern=pattern, adapter_rank=4)
    sizes = packed_sizes(shape)
    assert weight_bytes(shape, load_soc("siracusa").layout).total == sizes.total - sizes.header
    table = tensor_table(shape, PACKED)
    assert sum(t.chip_bytes for t in table) == sum(t.packed_bytes for t in table) == sizes.total - sizes.header


def test_file_bytes_of_the_table_are_the_files_less_their_headers(make: Make) -> None:
    for shape in (
        make("smollm2-135m", embedding_bits=4, grid=Grid(4, 64), adapter_rank=4),
        make({**PHI3, "model_type": "qwen2"}),
        make("microllama"),
    ):
        stored = [t for index in range(len(shape.blocks)) for t in shape.block_tensors(index)]
        stored += [*shape.outer, *shape.adapter_tensors(), *shape.edge_tensors()]
        table = tensor_table(shape)
        assert sum(t.file_bytes for t in table) == sum(t.nbytes for t in stored)
        assert len({t.name for t in table}) == len(table)
        assert {t.block for t in table} == {None, *range(len(shape.blocks))}


def test_the_neureka_layout_by_hand(make: Make) -> None:
    """(cout, ceil(cin / 32), 32 B), pulp-nnx; an int32 scale and bias a channel: down's 172 inputs become 192."""
    layout = load_soc("siracusa-neureka").layout
    codes = 5 * (536 * 64 + 64 * 192)
    for grid in (Grid(2, -1), Grid(4, 64), Grid(8, 32)):
        found = weight_bytes(make("stories260k", embedding_bits=4, grid=grid, pattern=Pattern(2, 4)), layout)
        assert found.block_codes == codes
        assert found.scales_and_zeros == 5 * 600 * 8
        assert found.embedding == 512 * 64 + 512 * 4  # tied: it is the head as well, in slots too
    dense = make("stories260k")
    assert weight_bytes(dense, layout) == weight_bytes(dense)


def test_a_lookup_is_not_stored_for_the_accelerator(make: Make) -> None:
    layout = load_soc("siracusa-neureka").layout
    shape = make(PHI3, embedding_bits=4, grid=Grid(4, -1))
    found = weight_bytes(shape, layout)
    assert found.embedding == 96 * 64 // 2 + 96 * 4 and found.head == 96 * 64 + 96 * 4
    rows = {t.part: t for t in tensor_table(shape, layout)}
    assert rows["embedding"].row_read == 64 // 2 + 4 and rows["head"].row_read is None


def test_the_ne16_layout_keeps_the_width_and_pads_to_16(make: Make) -> None:
    found = weight_bytes(make("stories260k", grid=Grid(4, -1)), load_soc("gap9").layout)
    assert found.block_codes == 5 * (536 * 64 + 64 * 176) // 2


# --- KV cache --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_kv_cache_by_brute_force(make: Make, bits: int) -> None:
    for config, blocks, heads, width in (("smollm2-135m", 30, 3, 64), (PHI3, 2, 2, 16), ("microllama", 8, 16, 4)):
        total = 0
        for _block in range(blocks):
            for _token in range(17):
                for _head in range(heads):
                    total += 2 * width * bits  # a key and a value
        assert kv_cache_bytes(make(config), 17, bits) == total // 8


def test_kv_cache_anchors(make: Make) -> None:
    assert kv_cache_bytes(make("microllama"), 128, 8) == 131_072  # Deeploy's graph, one copy
    assert kv_cache_bytes(make("llama-3.2-1b"), 1, 8) == 16 * 1024
    assert kv_cache_bytes(make("llama-3.2-1b"), 1, 5) == 10 * 1024


def test_a_sliding_window_holds_no_more_than_itself(make: Make) -> None:
    gemma = make({**PHI3, "model_type": "gemma2", "head_dim": 16, "sliding_window": 8})
    assert [kv_block_bytes(gemma, index, 64, 8) for index in (0, 1)] == [2 * 32 * 8, 2 * 32 * 64]
    assert kv_cache_bytes(gemma, 4, 8) == 2 * 2 * 32 * 4


# --- a compressed KV cache --------------------------------------------------------------------------------------


def test_groups_are_counted_token_by_token(make: Make) -> None:
    shape = with_cache(make("smollm2-135m"), CacheRule(KVFormat(4, sinks=4), groups=True))
    # While token 100 is computed: 4 sinks and 32 of the open group in full, 2 finished groups of 32 tokens of 4-bit
    # codes, each with two float16 for 64 channels of a key and for 2 x 32 halves of values, in 3 heads.
    one = 36 * 2 * 3 * 64 * 2 + 2 * 3 * (2 * 32 * 64 // 2 + (64 + 64) * 2 * 2)
    assert kv_cache_bytes(shape, 100, 4) == 30 * one
    assert kv_cache_bytes(shape, 20, 4) == 30 * 20 * 2 * 3 * 64 * 2  # nothing is finished yet


def test_eviction_caps_what_every_block_holds(make: Make) -> None:
    gemma = make({**PHI3, "model_type": "gemma2", "head_dim": 16, "sliding_window": 8})
    for window, sinks, expected in ((20, 4, (8, 24)), (5, 1, (6, 6))):
        capped = with_cache(gemma, CacheRule(KVFormat(window=window, sinks=sinks)))
        found = [kv_block_bytes(capped, index, 64, 8) for index in (0, 1)]
        assert found == [2 * 32 * tokens for tokens in expected]
    shape = make("smollm2-135m")
    capped = with_cache(shape, CacheRule(KVFormat(window=60, sinks=4)))
    assert kv_cache_bytes(capped, 1000, 8) == kv_cache_bytes(shape, 64, 8)

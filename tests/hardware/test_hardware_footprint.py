"""Bytes against counts made by hand, and against brute force."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from checkpoints.shape import Grid, ModelShape, Pattern
from hardware.footprint import (
    Operator,
    activation_peak,
    kv_cache_bytes,
    layers,
    peak_alive,
    slotted_bytes,
    weight_bytes,
)

pytestmark = pytest.mark.unit
Make = Callable[..., ModelShape]

MICRO_LLAMA = {  # Deeploy's microLlama: 8 layers, d 64, 16 heads of 4, FFN 256, 524 288 weights in the blocks
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "vocab_size": 256,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
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
    assert weight_bytes(make(MICRO_LLAMA, grid=Grid(8, -1))).block_codes == 524_288


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


def test_adapters_count_in_their_own_width(make: Make) -> None:
    found = weight_bytes(make("stories260k", grid=Grid(8, -1), adapter_rank=4))
    assert found.adapters == 2 * 5 * 4 * (128 + 96 + 96 + 128 + 236 + 236 + 236)
    wider = weight_bytes(make("stories260k", grid=Grid(8, -1), adapter_rank=4, adapter_dtype="F32"))
    assert wider.adapters == 2 * found.adapters


def test_packed_counts_kept_values_and_index_only(make: Make) -> None:
    shape = make("smollm2-135m", grid=Grid(4, 64), pattern=Pattern(2, 4))
    dense, packed = weight_bytes(shape), weight_bytes(shape, packed=True)
    # 17 groups of 6 possible masks share 44 bits (6^17 < 2^44), 2.59 a group where a bitmap takes 4
    indexed = 30 * sum(-(-out * columns // 4 // 17) * 44 for out, columns in SMOLLM2)
    assert abs(packed.block_codes - (106_168_320 // 4 * 2 * 4 + indexed) / 8) < 30 * 7
    assert replace(packed, block_codes=dense.block_codes) == dense
    # 1:8 in 4 bit: 7 x 4 and a position of 3 bits, 31 where dense takes 32
    less = weight_bytes(make("smollm2-135m", grid=Grid(4, 64), pattern=Pattern(1, 8)), packed=True)
    assert less.block_codes == 106_168_320 // 8 * 31 // 8
    # 1:16 saves 4 bits a group and the position would take 4: the zeros stay
    same = weight_bytes(make("smollm2-135m", grid=Grid(4, 64), pattern=Pattern(1, 16)), packed=True)
    assert same.block_codes == dense.block_codes


def test_packed_16_bit_layers_and_layers_without_pattern(make: Make) -> None:
    shape = make("smollm2-135m", pattern=Pattern(1, 4))
    assert weight_bytes(shape, packed=True).dense_linears == 106_168_320 // 4 * (3 * 16 + 2) // 8
    plain = make("smollm2-135m")
    assert weight_bytes(plain, packed=True) == weight_bytes(plain)


def test_slotted_bytes_follow_n_eurekas_1x1_layout(make: Make) -> None:
    # (cout, ceil(cin / 32), 32 B): inputs of 64 stay, down's 172 become 192
    expected = 5 * (536 * 64 + 64 * 192)
    for bits in (2, 4, 8):
        assert slotted_bytes(make("stories260k", grid=Grid(bits, -1)), 8, 32) == expected
    assert slotted_bytes(make("stories260k"), 8, 32) == 0


# --- KV cache --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_kv_cache_by_brute_force(make: Make, bits: int) -> None:
    for config, blocks, heads, width in (("smollm2-135m", 30, 3, 64), (PHI3, 2, 2, 16), (MICRO_LLAMA, 8, 16, 4)):
        total = 0
        for _block in range(blocks):
            for _token in range(17):
                for _head in range(heads):
                    total += 2 * width * bits  # a key and a value
        assert kv_cache_bytes(make(config), 17, bits) == total // 8


def test_kv_cache_anchors(make: Make) -> None:
    assert kv_cache_bytes(make(MICRO_LLAMA), 128, 8) == 131_072  # Deeploy's graph, one copy
    assert kv_cache_bytes(make("llama-3.2-1b"), 1, 8) == 16 * 1024
    assert kv_cache_bytes(make("llama-3.2-1b"), 1, 5) == 10 * 1024


# --- activations -----------------------------------------------------------------------------------------------


def _by_hand(h: int, a: int, kv: int, inner: int, scores: int) -> int:
    """Elements at each step of a block, written down one by one."""
    return max(
        h + h,  # residual, normed
        h + h + a,  # and the query
        h + h + a + kv,  # and the key
        h + h + a + kv + kv,  # and the value, then key and value leave for the cache
        h + a + scores,
        h + scores + a,
        h + a + h,  # mixed and attended
        h + h,  # residual += attended
        h + h,  # second norm
        h + h + inner,
        h + h + inner + inner,
        h + inner + h,  # down
    )


@pytest.mark.parametrize(("tokens", "context"), [(1, 1), (1, 128), (16, 128), (128, 128), (2, 100)])
@pytest.mark.parametrize("bits", [8, 16, 5])
def test_activation_peak_by_hand(make: Make, tokens: int, context: int, bits: int) -> None:
    gemma = {**PHI3, "model_type": "gemma3_text", "head_dim": 48}
    for config, heads, kv_heads, width in ((PHI3, 4, 2, 16), (gemma, 4, 2, 48), (MICRO_LLAMA, 16, 16, 4)):
        shape = make(config)
        h, inner, t = shape.hidden_size, shape.number("intermediate_size"), tokens
        attention, kv, scores = t * heads * width, t * kv_heads * width, heads * t * context
        block = _by_hand(t * h, attention, kv, t * inner, scores)
        last = max(t * h + h, h + shape.vocabulary)
        expected = math.ceil(max(block, last) * bits / 8)
        assert activation_peak(shape, tokens, context, bits).nbytes == expected


def test_peak_names_where_it_is(make: Make) -> None:
    peak = activation_peak(make("stories260k"), 1, 256, 8)
    assert peak.nbytes == 64 + 64 + 8 * 256
    assert peak.operator == "scores and softmax" and set(peak.alive) == {"residual", "q", "scores"}
    logits = activation_peak(make("llama-3.2-1b"), 1, 256, 8)
    assert (logits.nbytes, logits.operator) == (128_256 + 2048, "head")


def _simulated(operators: list[Operator], sizes: dict[str, int], result: str) -> int:
    """Forward, one version of a tensor at a time: alive from its writing to its last reading."""
    versions: dict[str, list[list[int]]] = {}  # name -> [born, last use] of each version
    for step, operator in enumerate(operators):
        for name in operator.reads:
            versions.setdefault(name, [[-1, -1]])[-1][1] = step
        for name in operator.writes:
            versions.setdefault(name, []).append([step, step])
    if result in versions:
        versions[result][-1][1] = len(operators)
    else:
        versions[result] = [[-1, len(operators)]]
    return max(
        sum(size for name, size in sizes.items() if any(born <= step <= last for born, last in versions.get(name, [])))
        for step in range(len(operators))
    )


@pytest.mark.parametrize("seed", range(200))
def test_liveness_against_a_simulation(seed: int) -> None:
    rng = random.Random(seed)
    names = [f"t{i}" for i in range(rng.randint(2, 7))]
    sizes = {name: rng.randint(1, 1000) for name in names}
    operators = [
        Operator(
            str(i),
            tuple(rng.sample(names, rng.randint(0, min(3, len(names))))),
            tuple(rng.sample(names, rng.randint(0, 2))),
        )
        for i in range(rng.randint(1, 12))
    ]
    result = rng.choice(names)
    assert peak_alive(operators, sizes, result)[0] == _simulated(operators, sizes, result)


# --- working sets ----------------------------------------------------------------------------------------------


def test_layers_are_counted_once_a_shape_with_adapters_and_head(make: Make) -> None:
    found = {layer.name: layer.repeats for layer in layers(make("stories260k", grid=Grid(8, -1), adapter_rank=4))}
    assert found["mlp.down_proj"] == found["mlp.down_proj.lora_A"] == 5
    assert found["embed_tokens as head"] == 1
    assert len(found) == 7 * 3 + 1
    assert {layer.name for layer in layers(make(PHI3))} >= {"self_attn.qkv_proj", "mlp.gate_up_proj", "lm_head"}


def test_working_set_by_hand(make: Make) -> None:
    down = next(x for x in layers(make("llama-3.2-1b", grid=Grid(4, 128))) if x.name == "mlp.down_proj")
    # 32 rows of 8192 codes of 4 bit, 64 groups of a 16 bit scale and a 4 bit zero point
    tile = 32 * (8192 // 2 + 64 * 2 + 64 // 2)
    assert down.working_set(32, 2, 8) == {"input vector": 8192, "weight tiles": 2 * tile, "output tiles": 2 * 32}
    assert sum(down.working_set(32, 2, 8).values()) == 280_640
    assert down.largest_tile(280_640, 32, 2, 8) == 32
    assert down.largest_tile(280_639, 32, 2, 8) == 0


def test_largest_tile_is_the_last_multiple_that_fits(make: Make) -> None:
    head = layers(make("smollm2-135m", embedding_bits=4, grid=Grid(4, 64)))[-1]
    # a row is 288 B of codes with 4 B of scale and minimum, 1 B of output: (262 144 - 576) / (2 x 293) = 446.4
    assert head.name == "embed_tokens as head"
    assert head.largest_tile(262_144, 32, 2, 8) == 416
    assert head.largest_tile(262_144, 32, 1, 8) == 864  # 892.7
    assert head.largest_tile(2**40, 32, 2, 8) == 49_152


def test_a_tile_is_never_larger_than_its_layer(make: Make) -> None:
    narrow = replace(layers(make("stories260k", grid=Grid(8, -1)))[0], out_features=20)
    assert narrow.working_set(32, 2, 8) == narrow.working_set(20, 2, 8)
    assert narrow.largest_tile(262_144, 32, 2, 8) == 20


def test_bias_travels_with_its_row(make: Make) -> None:
    with_bias: Any = {**PHI3, "model_type": "qwen2"}
    q, o = (next(x for x in layers(make(with_bias)) if x.name == f"self_attn.{n}_proj") for n in "qo")
    assert q.row_bits - o.row_bits == 16

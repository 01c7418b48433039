"""Operators of a pass against arithmetic on the configuration and against what a real model multiplies."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.families import PRESETS, known_families, shape_from_config
from edgepress.checkpoints.forms import DTYPE_BYTES, Grid, TensorShape
from edgepress.checkpoints.shape import LinearShape, ModelShape
from edgepress.hardware.operators import ACCELERATOR, CORES, forward, weights_read
from edgepress.hardware.orders import window_of
from tests.models import ALL_FAMILIES, FAMILIES, SWITCHES, build_model, tiny_config

pytestmark = pytest.mark.unit
Make = Callable[..., ModelShape]


def macs_of_config(config: dict[str, Any], tokens: int, context: int) -> int:
    """What the papers' formulas give, without the code under test: weights once a token, attention twice T x C x d."""
    hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    linears = hidden * head_dim * (2 * heads + 2 * kv_heads) + 3 * hidden * inner
    attention = 2 * heads * head_dim * tokens * context
    return layers * (tokens * linears + attention) + hidden * config["vocab_size"]


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize(("tokens", "context"), [(1, 1), (1, 256), (64, 64), (16, 200)])
def test_macs_are_those_of_the_configuration(preset: str, tokens: int, context: int) -> None:
    operators = forward(shape_from_config(PRESETS[preset]), tokens=tokens, context=context)
    assert sum(x.macs for x in operators) == macs_of_config(PRESETS[preset], tokens, context)


@pytest.mark.parametrize("family", known_families())
def test_macs_are_those_that_torch_counts(family: str) -> None:
    """Prefill of 11 tokens, then one more with the cache: every matrix product of the real module, and no other."""
    wide = {"sliding_window": 64} if "sliding_window" in ALL_FAMILIES[family] else {}
    layers = {"layer_types": ["full_attention"] * 6} if "layer_types" in ALL_FAMILIES[family] else {}
    model = build_model(family, attn_implementation="eager", **wide, **layers)
    model.set_attn_implementation("eager")
    shape = shape_from_config(tiny_config(family, **wide, **layers))
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        first, counted = _counted(model, input_ids=ids[:, :11], use_cache=True, logits_to_keep=1)
        assert sum(x.macs for x in forward(shape, tokens=11, context=11)) == counted
        _, counted = _counted(model, input_ids=ids[:, 11:], past_key_values=first.past_key_values, logits_to_keep=1)
        assert sum(x.macs for x in forward(shape, tokens=1, context=12)) == counted


def _counted(model: Any, **inputs: Any) -> tuple[Any, int]:
    with FlopCounterMode(display=False, depth=None) as counter:
        found = model(**inputs)
    counts = counter.get_flop_counts()
    tables = sum(sum(v.values()) for k, v in counts.items() if k.endswith("rotary_emb"))  # made once, kept as a table
    return found, (counter.get_total_flops() - tables) // 2


@pytest.mark.parametrize("family", known_families())
@pytest.mark.parametrize("switched", [False, True])
def test_every_tensor_of_the_model_is_read_once(family: str, switched: bool) -> None:
    """Also those that a family has only when told so: biases, norms of queries and keys, norms after a branch."""
    config = tiny_config(family, **dict.fromkeys(SWITCHES, switched))
    shape = shape_from_config(config)
    stored = {t.name: t.nbytes for i in range(len(shape.blocks)) for t in shape.block_tensors(i)}
    stored |= {t.name: t.nbytes for t in shape.outer}
    by_base: Counter[str] = Counter()
    for name, nbytes in stored.items():
        by_base[name.rpartition(".")[0]] += nbytes  # weight and bias together
    assert weights_read(shape) == dict(by_base)
    reads = Counter(x.weights.name for x in forward(shape) if x.weights is not None)
    tied = not any("lm_head" in name for name in stored)
    assert {name: n for name, n in reads.items() if n != 1} == ({"model.embed_tokens": 2} if tied else {})


def test_order_of_a_llama_block() -> None:
    operators = forward(shape_from_config(PRESETS["stories260k"]), tokens=1, context=9)
    assert [x.name for x in operators[:19]] == [
        "embed", "input_layernorm", "q_proj", "k_proj", "v_proj", "rope q", "rope k", "append to KV cache", "scores",
        "softmax", "weighted values", "o_proj", "first residual", "post_attention_layernorm", "gate_proj", "up_proj",
        "silu", "gate x up", "down_proj",
    ]  # fmt: skip
    assert {x.kind for x in operators if x.engine == ACCELERATOR} == {"linear"}
    assert all(x.engine == CORES for x in operators if x.weights is None)
    assert sum(x.kernels for x in operators if x.block == 0 and x.engine == CORES) == 25  # compiled microLlama


def test_each_buffer_is_written_before_it_is_read() -> None:
    for family in known_families():
        known: set[str] = set()
        for x in forward(shape_from_config(tiny_config(family)), tokens=5, context=20):
            assert {b.name for b in x.reads} <= known, (family, x.label)
            known |= {b.name for b in x.writes}


def block_of(family: str, **overrides: Any) -> list[str]:
    shape = shape_from_config(tiny_config(family, **overrides))
    return [x.name for x in forward(shape, context=4) if x.block == 2 and x.kind not in ("scores", "values", "softmax")]


QKV, MLP = ["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj", "silu", "gate x up", "down_proj"]
ROPE, APPEND = ["rope q", "rope k"], ["append to KV cache"]


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        (
            "olmo2",
            [
                *(*QKV, "q_norm", "k_norm", *ROPE, *APPEND, "o_proj", "post_attention_layernorm", "first residual"),
                *(*MLP, "post_feedforward_layernorm", "second residual"),
            ],
        ),
        (  # block 2 slides, so it rotates
            "cohere2",
            ["input_layernorm", *QKV, *ROPE, *APPEND, "o_proj", *MLP, "first residual", "second residual"],
        ),
        (
            "glm4",
            [
                *("input_layernorm", *QKV, *ROPE, *APPEND, "o_proj", "post_self_attn_layernorm", "first residual"),
                *("post_attention_layernorm", "gate_up_proj", *MLP[2:], "post_mlp_layernorm", "second residual"),
            ],
        ),
        (
            "hunyuan_v1_dense",
            [
                *("input_layernorm", *QKV, *ROPE, "query_layernorm", "key_layernorm", *APPEND, "o_proj"),
                *("first residual", "post_attention_layernorm", *MLP, "second residual"),
            ],
        ),
        (
            "bitnet",
            [
                *("input_layernorm", *QKV, *ROPE, *APPEND, "attn_sub_norm", "o_proj", "first residual"),
                *("post_attention_layernorm", "gate_proj", "up_proj", "relu2", "gate x up", "ffn_sub_norm"),
                *("down_proj", "second residual"),
            ],
        ),
        (
            "phi",
            [
                *("input_layernorm", *QKV, *ROPE, *APPEND, "dense", "fc1", "gelu_new", "fc2"),
                *("first residual", "second residual"),
            ],
        ),
    ],
)
def test_orders_that_differ_from_llamas(family: str, expected: list[str]) -> None:
    """As transformers' DecoderLayer.forward of each has it."""
    assert block_of(family) == expected


def test_cohere2_rotates_only_where_it_slides() -> None:
    full = {"layer_types": ["full_attention"] * 6}
    assert "rope q" not in block_of("cohere2", **full) and "rope q" not in block_of("exaone4", **full)


@pytest.mark.parametrize("family", known_families())
def test_norms_come_in_the_order_in_which_the_module_calls_them(family: str) -> None:
    """Every submodule of a block that is a norm or a linear layer, hooked in a real pass."""
    model, called = build_model(family), []
    block = model.model.layers[0]
    for name, module in block.named_modules():
        if isinstance(module, torch.nn.Linear) or "Norm" in type(module).__name__:
            leaf = name.rpartition(".")[2]
            module.register_forward_hook(lambda *_, leaf=leaf: called.append(leaf))
    with torch.no_grad():
        model(torch.arange(3, 9)[None], use_cache=False)
    operators = forward(shape_from_config(tiny_config(family)), tokens=6, context=6)
    ours = [x.name for x in operators if x.block == 0 and x.kind in ("norm", "linear")]
    assert _in_pairs(ours) == _in_pairs(called)


def _in_pairs(names: list[str]) -> list[str]:
    """Gate before up, q before k before v, and so their norms: what does not depend on one another has no order."""
    free = (
        "q_proj",
        "k_proj",
        "v_proj",
        "q_norm",
        "k_norm",
        "query_layernorm",
        "key_layernorm",
        "gate_proj",
        "up_proj",
    )
    ordered, run = [], []
    for name in [*names, ""]:
        if name in free:
            run.append(name)
        else:
            ordered += [*sorted(run), name]
            run = []
    return ordered


def test_families_differ_where_their_shapes_do() -> None:
    def names(family: str) -> list[str]:
        return [x.name for x in forward(shape_from_config(tiny_config(family)), context=4) if x.block in (2, None)]

    assert "q_norm" in names("qwen3") and "q_norm" in names("gemma3_text") and "q_norm" not in names("llama")
    assert "cap scores" in names("gemma2") and "cap logits" in names("gemma2")
    assert names("gemma2").count("scale") == 1 and any("gelu" in name for name in names("gemma2"))
    assert "rope q" not in names("smollm3")  # no_rope_layers is 0 for block 2
    assert [n for n in names("phi3") if n.endswith("proj")] == ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


def test_windows_are_those_of_transformers() -> None:
    for family in FAMILIES:
        config = tiny_config(family)
        shape = shape_from_config(config)
        types = config.get("layer_types")
        for block in range(6):
            sliding = types[block] == "sliding_attention" if types else family in ("mistral", "phi3")
            expected = int(config["sliding_window"]) if sliding else None
            assert window_of(shape, block) == expected, (family, block)
            without = replace(shape, config={k: v for k, v in config.items() if k != "layer_types"})
            if family in ("gemma2",):  # the family's own rule gives what transformers wrote out
                assert window_of(without, block) == expected


def test_a_window_bounds_what_attention_reads() -> None:
    """By brute force: each query sees itself and the 7 before it; the kernel computes the rectangle that holds all."""
    shape = shape_from_config(tiny_config("mistral"))
    for tokens, context in ((1, 5), (1, 30), (6, 30), (30, 30)):
        pairs = {(q, k) for q in range(context - tokens, context) for k in range(context) if q - 8 < k <= q}
        scores = next(x for x in forward(shape, tokens=tokens, context=context) if x.kind == "scores")
        assert scores.needed_macs == 4 * 16 * len(pairs)
        seen = {k for _, k in pairs}
        assert scores.columns == len(seen) and scores.kv_read == len(seen) * 2 * 16


def test_kv_cache_grows_by_the_new_tokens(make: Make) -> None:
    append = next(x for x in forward(make("stories15m"), tokens=3, context=10, kv_bits=4) if x.kind == "append")
    assert append.kv_write == 3 * 2 * 288 // 2 and append.kv_held == 10 * 2 * 288 // 2


def test_bytes_of_quantised_weights_and_adapters(make: Make) -> None:
    shape = make("stories260k", embedding_bits=8, grid=Grid(4, 32), adapter_rank=4)
    read = weights_read(shape)
    q: LinearShape = shape.blocks[0].linears[0]
    assert read["model.layers.0.self_attn.q_proj"] == 64 * (64 // 2) + 64 * 2 * (16 + 4) // 8
    assert read["model.layers.0.self_attn.q_proj.lora_A"] == 4 * 64 * DTYPE_BYTES[q.adapter_dtype]
    assert read["model.embed_tokens"] == 512 * (64 + 4)
    operators = {x.label: x for x in forward(shape, tokens=7, context=7)}
    assert operators["0.q_proj.lora_A"].macs + operators["0.q_proj.lora_B"].macs == 7 * q.adapter_parameters
    assert operators["embed"].weight_bytes == 7 * 68
    assert [b.name for b in operators["0.q_proj.lora_B"].writes] == ["0.q"]


def test_what_cannot_be_is_one_message(make: Make) -> None:
    shape = make("stories260k")
    with pytest.raises(PlanError, match="9 tokens do not fit in a context of 8"):
        forward(shape, tokens=9, context=8)
    with pytest.raises(PlanError, match="both must be at least 1"):
        forward(shape, tokens=0, context=8)
    block = replace(shape.blocks[0], linears=(LinearShape("mlp.experts", 8, 64, "BF16"),))
    with pytest.raises(PlanError, match="linear layers experts of this llama model"):
        forward(replace(shape, blocks=(block,)))


def test_an_unknown_order_is_no_guess(make: Make) -> None:
    """What is left out or comes on top would be a wrong number; the message says so, and names the family."""
    shape = make("stories260k")
    with pytest.raises(
        PlanError, match=r"no verdict: the order of computing of a 'falcon' model .* known are apertus, "
    ):
        forward(replace(shape, family="falcon"))
    block = shape.blocks[0]
    for others, message in (
        (block.others[:1], "lacks post_attention_layernorm"),
        ((*block.others, TensorShape("self_attn.sinks", (8,), "F32")), "has self_attn"),
        ((*block.others, TensorShape("self_attn.q_extra.weight", (8,), "F32")), "has q_extra"),
    ):
        with pytest.raises(PlanError, match=f"a block of this llama model {message}: no order"):
            forward(replace(shape, blocks=(replace(block, others=others),)))
    with pytest.raises(PlanError, match=r"llama block with the linear layers self_attn\.q_proj"):
        forward(replace(shape, blocks=(replace(block, linears=block.linears[:1]),)))


def test_importing_takes_neither_torch_nor_numpy() -> None:
    code = "import sys, edgepress.hardware.timing; print(sorted({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"

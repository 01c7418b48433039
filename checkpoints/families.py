"""A model's shape from its config.json alone, for every supported family.

Everything is arithmetic on the configuration: no torch, no transformers, no weights. The tests hold each
family against the module that transformers builds from the same configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgepress.checkpoints.config import head_dim, kv_heads, setting
from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.forms import TensorShape
from edgepress.checkpoints.shape import BlockShape, LinearShape, ModelShape

# Sizes that a config.json must state to be believed, and those that its family's class may fill in.
_STATED = ("hidden_size", "num_hidden_layers", "num_attention_heads")
_DERIVED = ("intermediate_size", "vocab_size")
_TORCH_TO_SAFETENSORS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}

_TWO_NORMS = ("input_layernorm", "post_attention_layernorm")
_GEMMA_NORMS = (*_TWO_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
_Switch = bool | str  # true, or the setting that says so


@dataclass(frozen=True)
class _Layout:
    """What a block of a family is made of: which linears carry a bias, which norms there are, what is fused."""

    qkv_bias: _Switch = False
    o_bias: _Switch = False
    mlp_bias: _Switch = False
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    o: str = "o_proj"
    mlp: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    norms: tuple[str, ...] = _TWO_NORMS
    norm_goes_if: str = ""  # the second one, by this setting
    norms_come_if: str = ""  # HyperCLOVA X's two, by this setting
    norm_bias: bool = False
    last_norm: str = "norm"  # "" has no weights
    head_norms: tuple[str, ...] = ()  # of queries and keys
    head_norms_if: _Switch = True
    head_norms_over: str = "head"  # head: one for all; all: one over all heads; each: a row or a norm for each head
    sub_norms: bool = False  # BitNet's, before o_proj and down_proj
    activation: tuple[str, ...] = ()  # numbers that the activation function learns or keeps
    head_bias: bool = False


def _biased(attention: str, feed_forward: _Switch = False, **more: Any) -> _Layout:
    return _Layout(attention, attention, feed_forward, **more)


_QK = ("q_norm", "k_norm")
_QK_LAYER = ("q_layernorm", "k_layernorm")
_BRANCH_ENDS = ("post_attention_layernorm", "post_feedforward_layernorm")
_FUSED_MLP, _PLAIN_MLP = ("gate_up_proj", "down_proj"), ("up_proj", "down_proj")
_LLAMA = _biased("attention_bias", "mlp_bias")
_FAMILIES: dict[str, _Layout] = {
    "apertus": _biased(
        "attention_bias",
        mlp=_PLAIN_MLP,
        norms=("attention_layernorm", "feedforward_layernorm"),
        head_norms=_QK,
        activation=("alpha_p", "alpha_n", "beta", "eps"),
    ),
    "arcee": _biased("attention_bias", "mlp_bias", mlp=_PLAIN_MLP),
    "bitnet": _biased("attention_bias", sub_norms=True),
    "cohere": _biased(
        "attention_bias",
        norms=("input_layernorm",),
        head_norms=_QK,
        head_norms_if="use_qk_norm",
        head_norms_over="each",
    ),
    "cohere2": _biased("attention_bias", norms=("input_layernorm",)),
    "cwm": _Layout(mlp_bias="mlp_bias"),
    "ernie4_5": _biased("use_bias", "use_bias"),
    "exaone4": _Layout(norms=_BRANCH_ENDS, head_norms=_QK),
    "gemma": _biased("attention_bias"),
    "gemma2": _biased("attention_bias", norms=_GEMMA_NORMS),
    "gemma3_text": _biased("attention_bias", norms=_GEMMA_NORMS, head_norms=_QK),
    "glm": _Layout("attention_bias", mlp=_FUSED_MLP),
    "glm4": _Layout(
        "attention_bias", mlp=_FUSED_MLP, norms=(*_TWO_NORMS, "post_self_attn_layernorm", "post_mlp_layernorm")
    ),
    "granite": _LLAMA,
    "helium": _Layout("attention_bias", False, "mlp_bias"),
    "hunyuan_v1_dense": _biased("attention_bias", head_norms=("query_layernorm", "key_layernorm")),
    "hyperclovax": _biased("attention_bias", "mlp_bias", norms_come_if="use_post_norm"),
    "internlm3": _LLAMA,
    "iquestcoder": _LLAMA,
    "jais2": _biased("attention_bias", "mlp_bias", mlp=_PLAIN_MLP, norm_bias=True),
    "llama": _LLAMA,
    "ministral": _Layout(),
    "ministral3": _Layout(),
    "mistral": _Layout(),
    "nemotron": _biased("attention_bias", "mlp_bias", mlp=_PLAIN_MLP, norm_bias=True),
    "olmo": _biased("attention_bias", norms=(), last_norm=""),
    "olmo2": _biased("attention_bias", norms=_BRANCH_ENDS, head_norms=_QK, head_norms_over="all"),
    "olmo3": _biased("attention_bias", norms=_BRANCH_ENDS, head_norms=_QK, head_norms_over="all"),
    "persimmon": _Layout(
        True,
        True,
        True,
        qkv=("query_key_value",),
        o="dense",
        mlp=("dense_h_to_4h", "dense_4h_to_h"),
        norm_bias=True,
        last_norm="final_layernorm",
        head_norms=_QK_LAYER,
        head_norms_if="qk_layernorm",
    ),
    "phi": _Layout(
        True,
        True,
        True,
        o="dense",
        mlp=("fc1", "fc2"),
        norms=("input_layernorm",),
        norm_bias=True,
        last_norm="final_layernorm",
        head_norms=_QK_LAYER,
        head_norms_if="qk_layernorm",
        head_bias=True,
    ),
    "phi3": _Layout(qkv=("qkv_proj",), mlp=_FUSED_MLP),
    "qwen2": _Layout(True),
    "qwen3": _biased("attention_bias", head_norms=_QK),
    "seed_oss": _Layout("attention_bias", "attention_out_bias", "mlp_bias"),
    "smollm3": _LLAMA,
    "stablelm": _Layout(
        "use_qkv_bias",
        norm_goes_if="use_parallel_residual",
        norm_bias=True,
        head_norms=_QK_LAYER,
        head_norms_if="qk_layernorm",
        head_norms_over="each",
    ),
    "starcoder2": _biased("use_bias", "use_bias", mlp=("c_fc", "c_proj"), norm_bias=True),
    "vaultgemma": _biased("attention_bias", norms=("input_layernorm", "pre_feedforward_layernorm")),
}


def known_families() -> list[str]:
    return sorted(_FAMILIES)


def shape_from_config(config: Mapping[str, Any]) -> ModelShape:
    """The shape of a dense 16 or 32 bit model.

    Raises PlanError for a family that is not in the table above; a folder with weights needs no table, since
    the files say what they hold.
    """
    family = str(config.get("model_type", ""))
    if family not in _FAMILIES:
        raise PlanError(
            f"the shape of a '{family or 'nameless'}' model cannot be told from its config.json alone; "
            f"known are {', '.join(known_families())}. Give a folder that holds the weights as well."
        )
    layout = _FAMILIES[family]
    bare = config.get("vocab_size") == 0  # blocks alone, between states instead of tokens: no embedding, no head
    sizes = {key: setting(config, key) for key in _DERIVED} | {key: config.get(key) for key in _STATED}
    missing = [
        key
        for key in (*_STATED, *_DERIVED)
        if not (bare and key == "vocab_size") and (not isinstance(sizes[key], int) or sizes[key] <= 0)
    ]
    if missing:
        raise PlanError(f"config.json lacks a positive whole number for {', '.join(missing)}")
    dtype = _TORCH_TO_SAFETENSORS.get(str(config.get("dtype") or config.get("torch_dtype") or "bfloat16"), "BF16")
    hidden, vocabulary = sizes["hidden_size"], sizes["vocab_size"]

    block = _block(config, layout, sizes["intermediate_size"], dtype)
    outer = []
    if layout.last_norm:
        outer += _norm(f"model.{layout.last_norm}", (hidden,), layout.norm_bias, dtype)
    if not bare:
        outer.insert(0, TensorShape("model.embed_tokens.weight", (vocabulary, hidden), dtype))
    if not bare and not setting(config, "tie_word_embeddings"):
        outer.append(TensorShape("lm_head.weight", (vocabulary, hidden), dtype))
    if not bare and layout.head_bias:
        outer.append(TensorShape("lm_head.bias", (vocabulary,), dtype))
    return ModelShape(family, dict(config), (block,) * sizes["num_hidden_layers"], tuple(outer))


def _block(config: Mapping[str, Any], layout: _Layout, inner: int, dtype: str) -> BlockShape:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    own_heads, width = kv_heads(config), head_dim(config)

    def on(switch: _Switch) -> bool:
        return bool(setting(config, switch)) if isinstance(switch, str) else switch

    def linear(name: str, out_features: int, in_features: int, bias: _Switch) -> LinearShape:
        return LinearShape(name, out_features, in_features, dtype, on(bias))

    rows = (heads * width, own_heads * width, own_heads * width)
    qkv = zip(layout.qkv, rows if len(layout.qkv) == 3 else (sum(rows),), strict=True)
    linears = [linear(f"self_attn.{name}", out, hidden, layout.qkv_bias) for name, out in qkv]
    linears.append(linear(f"self_attn.{layout.o}", hidden, heads * width, layout.o_bias))
    *ups, down = layout.mlp
    fused = 2 if "gate_up_proj" in ups else 1
    linears += [linear(f"mlp.{name}", fused * inner, hidden, layout.mlp_bias) for name in ups]
    linears.append(linear(f"mlp.{down}", hidden, inner, layout.mlp_bias))

    others: list[TensorShape] = []
    names = layout.norms
    if layout.norm_goes_if and setting(config, layout.norm_goes_if):
        names = names[:1]
    if layout.norms_come_if and setting(config, layout.norms_come_if):
        names = (*names, "post_norm1", "post_norm2")
    for name in names:
        others += _norm(name, (hidden,), layout.norm_bias, dtype)
    if on(layout.head_norms_if):
        for name, count in zip(layout.head_norms, (heads, own_heads), strict=bool(layout.head_norms)):
            others += _head_norm(f"self_attn.{name}", layout, count, width, dtype)
    if layout.sub_norms:
        others += _norm("self_attn.attn_sub_norm", (hidden,), False, dtype)
        others += _norm("mlp.ffn_sub_norm", (inner,), False, dtype)
    for name in layout.activation:
        others.append(TensorShape(f"mlp.act_fn.{name}", (1,) if name.startswith("alpha") else (), dtype))
    return BlockShape(tuple(linears), tuple(others))


def _norm(name: str, shape: tuple[int, ...], bias: bool, dtype: str) -> list[TensorShape]:
    return [TensorShape(f"{name}.{kind}", shape, dtype) for kind in (("weight", "bias") if bias else ("weight",))]


def _head_norm(name: str, layout: _Layout, heads: int, width: int, dtype: str) -> list[TensorShape]:
    if layout.head_norms_over == "all":
        return _norm(name, (heads * width,), layout.norm_bias, dtype)
    if layout.head_norms_over == "head":
        return _norm(name, (width,), layout.norm_bias, dtype)
    if layout.norm_bias:  # StableLM: a norm of its own for each head, without a bias
        return [TensorShape(f"{name}.norms.{i}.weight", (width,), dtype) for i in range(heads)]
    return _norm(name, (heads, width), False, dtype)


def _llama(
    hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
        **more,
    }


# Configurations as published with the models: meta-llama's, HuggingFaceTB's SmolLM2, TinyLlama's, Qwen's, google's
# Gemma 3, karpathy/tinyllamas; microllama is the blocks of Deeploy's test model
# (DeeployTest/Tests/Models/microLlama), which has neither embedding nor head. Enough to plan without downloading
# anything. A model tuned for chats has the shape of its base.
_LLAMA_3: dict[str, Any] = {"max_position_embeddings": 131072, "rope_theta": 500000.0}
_QWEN_2: dict[str, Any] = {"model_type": "qwen2", "max_position_embeddings": 32768, "rope_theta": 1000000.0}
_QWEN_3: dict[str, Any] = {**_QWEN_2, "model_type": "qwen3", "max_position_embeddings": 40960, "head_dim": 128}
_GEMMA_3: dict[str, Any] = {
    "model_type": "gemma3_text", "max_position_embeddings": 32768, "head_dim": 256, "query_pre_attn_scalar": 256,
    "sliding_window": 512, "hidden_activation": "gelu_pytorch_tanh",
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": _llama(2048, 8192, 16, 32, 8, 128256, head_dim=64, max_position_embeddings=131072),
    "llama-3.2-3b": _llama(3072, 8192, 28, 24, 8, 128256, head_dim=128, **_LLAMA_3),
    "llama-3.1-8b": _llama(4096, 14336, 32, 32, 8, 128256, max_position_embeddings=131072, tie_word_embeddings=False),
    "llama-3-8b": _llama(4096, 14336, 32, 32, 8, 128256, max_position_embeddings=8192, tie_word_embeddings=False),
    "llama-7b": _llama(4096, 11008, 32, 32, 32, 32000, max_position_embeddings=2048, tie_word_embeddings=False),
    "llama-65b": _llama(8192, 22016, 80, 64, 64, 32000, max_position_embeddings=2048, tie_word_embeddings=False),
    "llama-2-7b": _llama(4096, 11008, 32, 32, 32, 32000, max_position_embeddings=4096, tie_word_embeddings=False),
    "llama-2-70b": _llama(8192, 28672, 80, 64, 8, 32000, max_position_embeddings=4096, tie_word_embeddings=False),
    "smollm2-135m": _llama(576, 1536, 30, 9, 3, 49152, max_position_embeddings=8192),
    "smollm2-360m": _llama(960, 2560, 32, 15, 5, 49152, max_position_embeddings=8192),
    "smollm2-1.7b": _llama(2048, 8192, 24, 32, 32, 49152, max_position_embeddings=8192),
    "tinyllama-1.1b": _llama(2048, 5632, 22, 32, 4, 32000, max_position_embeddings=2048, tie_word_embeddings=False),
    "qwen2.5-0.5b": _llama(896, 4864, 24, 14, 2, 151936, **_QWEN_2),
    "qwen2.5-1.5b": _llama(1536, 8960, 28, 12, 2, 151936, **_QWEN_2),
    "qwen2.5-3b": _llama(2048, 11008, 36, 16, 2, 151936, **_QWEN_2),
    "qwen3-0.6b": _llama(1024, 3072, 28, 16, 8, 151936, **_QWEN_3),
    "qwen3-1.7b": _llama(2048, 6144, 28, 16, 8, 151936, **_QWEN_3),
    "qwen3-4b": _llama(2560, 9728, 36, 32, 8, 151936, **_QWEN_3),
    "gemma-3-270m": _llama(640, 2048, 18, 4, 1, 262144, **_GEMMA_3),
    "gemma-3-1b": _llama(1152, 6912, 26, 4, 1, 262144, **_GEMMA_3),
    "stories15m": _llama(288, 768, 6, 6, 6, 32000, max_position_embeddings=256, dtype="float32"),
    "stories260k": _llama(64, 172, 5, 8, 4, 512, max_position_embeddings=512, dtype="float32"),
    "microllama": _llama(64, 256, 8, 16, 16, 0, max_position_embeddings=256, dtype="float32"),
}
PRESETS["llama-3.2-1b-instruct"] = PRESETS["llama-3.2-1b"]  # the same shape with other weights
PRESETS["gemma-3-1b-instruct"] = PRESETS["gemma-3-1b"]

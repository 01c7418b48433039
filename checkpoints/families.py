"""A model's shape from its `config.json` alone, for the families whose layout is known here.

Everything is arithmetic on the configuration: no torch, no transformers, no weights. The tests hold each
family against the module that transformers builds from the same configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from checkpoints.errors import PlanError
from checkpoints.forms import TensorShape
from checkpoints.shape import BlockShape, LinearShape, ModelShape

_TORCH_TO_SAFETENSORS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}

# What distinguishes the families: which linears carry a bias, and which settings for it they heed at all; which
# norms a block has; what is fused; whether the head is tied where the configuration is silent.
_LLAMA_NORMS = ("input_layernorm", "post_attention_layernorm")
_GEMMA_NORMS = (*_LLAMA_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"may_bias": ("attention_bias", "mlp_bias")},
    "mistral": {},
    "smollm3": {"may_bias": ("attention_bias", "mlp_bias"), "tied": True},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"may_bias": ("attention_bias",), "head_norms": True},
    "gemma2": {"may_bias": ("attention_bias",), "norms": _GEMMA_NORMS, "tied": True},
    "gemma3_text": {"may_bias": ("attention_bias",), "norms": _GEMMA_NORMS, "head_norms": True, "tied": True},
    "phi3": {"fused": True},
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
    traits = _FAMILIES[family]
    bare = config.get("vocab_size") == 0  # blocks alone, between states instead of tokens: no embedding, no head
    wanted = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    missing = [
        key for key in (wanted[:-1] if bare else wanted) if not isinstance(config.get(key), int) or config[key] <= 0
    ]
    if missing:
        raise PlanError(f"config.json lacks a positive whole number for {', '.join(missing)}")
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or hidden // heads
    inner = config["intermediate_size"]
    dtype = _TORCH_TO_SAFETENSORS.get(str(config.get("dtype") or config.get("torch_dtype") or "bfloat16"), "BF16")

    def linear(name: str, out_features: int, in_features: int, bias: bool = False) -> LinearShape:
        return LinearShape(name, out_features, in_features, dtype, bias)

    may_bias = traits.get("may_bias", ())
    any_bias = "attention_bias" in may_bias and bool(config.get("attention_bias", False))
    qkv_bias = any_bias or bool(traits.get("qkv_bias"))
    mlp_bias = "mlp_bias" in may_bias and bool(config.get("mlp_bias", False))
    linears: tuple[LinearShape, ...]
    if traits.get("fused"):
        linears = (
            linear("self_attn.qkv_proj", (heads + 2 * kv_heads) * head_dim, hidden),
            linear("self_attn.o_proj", hidden, heads * head_dim),
            linear("mlp.gate_up_proj", 2 * inner, hidden),
            linear("mlp.down_proj", hidden, inner),
        )
    else:
        linears = (
            linear("self_attn.q_proj", heads * head_dim, hidden, qkv_bias),
            linear("self_attn.k_proj", kv_heads * head_dim, hidden, qkv_bias),
            linear("self_attn.v_proj", kv_heads * head_dim, hidden, qkv_bias),
            linear("self_attn.o_proj", hidden, heads * head_dim, any_bias),
            linear("mlp.gate_proj", inner, hidden, mlp_bias),
            linear("mlp.up_proj", inner, hidden, mlp_bias),
            linear("mlp.down_proj", hidden, inner, mlp_bias),
        )
    others = [TensorShape(f"{norm}.weight", (hidden,), dtype) for norm in traits.get("norms", _LLAMA_NORMS)]
    if traits.get("head_norms"):
        others += [TensorShape(f"self_attn.{name}.weight", (head_dim,), dtype) for name in ("q_norm", "k_norm")]
    block = BlockShape(linears, tuple(others))

    outer = [TensorShape("model.norm.weight", (hidden,), dtype)]
    if not bare:
        outer.insert(0, TensorShape("model.embed_tokens.weight", (config["vocab_size"], hidden), dtype))
    if not bare and not config.get("tie_word_embeddings", bool(traits.get("tied"))):
        outer.append(TensorShape("lm_head.weight", (config["vocab_size"], hidden), dtype))
    return ModelShape(family, dict(config), (block,) * config["num_hidden_layers"], tuple(outer))


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


# Configurations as published with the models: meta-llama's, HuggingFaceTB/SmolLM2-135M, karpathy/tinyllamas;
# microllama is the blocks of Deeploy's test model (DeeployTest/Tests/Models/microLlama), which has neither embedding
# nor head. Enough to plan without downloading anything.
PRESETS: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": _llama(2048, 8192, 16, 32, 8, 128256, head_dim=64, max_position_embeddings=131072),
    "llama-3.1-8b": _llama(4096, 14336, 32, 32, 8, 128256, max_position_embeddings=131072, tie_word_embeddings=False),
    "llama-3-8b": _llama(4096, 14336, 32, 32, 8, 128256, max_position_embeddings=8192, tie_word_embeddings=False),
    "llama-2-7b": _llama(4096, 11008, 32, 32, 32, 32000, max_position_embeddings=4096, tie_word_embeddings=False),
    "llama-2-70b": _llama(8192, 28672, 80, 64, 8, 32000, max_position_embeddings=4096, tie_word_embeddings=False),
    "smollm2-135m": _llama(576, 1536, 30, 9, 3, 49152, max_position_embeddings=8192),
    "stories15m": _llama(288, 768, 6, 6, 6, 32000, max_position_embeddings=256, dtype="float32"),
    "stories260k": _llama(64, 172, 5, 8, 4, 512, max_position_embeddings=512, dtype="float32"),
    "microllama": _llama(64, 256, 8, 16, 16, 0, max_position_embeddings=256, dtype="float32"),
}
PRESETS["llama-3.2-1b-instruct"] = PRESETS["llama-3.2-1b"]  # the same shape with other weights

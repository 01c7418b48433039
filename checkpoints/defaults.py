"""What transformers' configuration classes fill in where a config.json is silent, family by family. No torch.

The tests compare every entry with the class itself, keys left out one at a time and all at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SIZES = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size",
    "vocab_size", "max_position_embeddings",
)  # fmt: skip


def _family(*sizes: int | None, **more: Any) -> dict[str, Any]:
    """Sizes in the order of _SIZES. None: the class derives it from the others (see kv_heads and head_dim)."""
    stated = dict(zip(_SIZES, sizes, strict=True)) | more
    activation = {} if "hidden_activation" in more else {"hidden_act": "silu"}
    return {"tie_word_embeddings": False, **activation, **stated}


_GEMMA2: dict[str, Any] = {
    "tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 4096,
    "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
}  # fmt: skip
_COHERE: dict[str, Any] = {"tie_word_embeddings": True, "logit_scale": 0.0625}
_QWEN = {"sliding_window": 4096, "max_window_layers": 28}
_HALF = {"partial_rotary_factor": 0.5}
DEFAULTS: dict[str, dict[str, Any]] = {
    "apertus": _family(4096, 32, 32, None, None, 14336, 131072, 65536, hidden_act="xielu"),
    "arcee": _family(2560, 32, 32, None, None, 18432, 32000, 4096, hidden_act="relu2"),
    "bitnet": _family(2560, 30, 20, 5, None, 6912, 128256, 2048, hidden_act="relu2"),
    "cohere": _family(8192, 40, 64, None, None, 22528, 256000, 8192, **_COHERE),
    "cohere2": _family(8192, 40, 64, None, None, 22528, 256000, 8192, sliding_window=4096, **_COHERE),
    "cwm": _family(6144, 64, 48, 8, 128, 21504, 128256, 131072, sliding_window=8192),
    "ernie4_5": _family(1024, 18, 16, 2, 128, 3072, 103424, 131072, tie_word_embeddings=True),
    "exaone4": _family(4096, 32, 32, 32, None, 16384, 102400, 2048, sliding_window=4096, sliding_window_pattern=4),
    "gemma": _family(
        3072, 28, 16, 16, 256, 24576, 256000, 8192, tie_word_embeddings=True, hidden_act="gelu_pytorch_tanh"
    ),
    "gemma2": _family(2304, 26, 8, 4, 256, 9216, 256000, 8192, **_GEMMA2),
    "gemma3_text": _family(
        2304, 26, 8, 4, 256, 9216, 262208, 131072,
        **_GEMMA2 | {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "glm": _family(4096, 40, 32, 2, 128, 13696, 151552, 131072, attention_bias=True, **_HALF),
    "glm4": _family(4096, 40, 32, 2, 128, 13696, 151552, 131072, attention_bias=True, **_HALF),
    "granite": _family(4096, 32, 32, None, None, 11008, 32000, 2048),
    "helium": _family(2560, 24, 20, 20, 128, 7040, 48000, 4096),
    "hunyuan_v1_dense": _family(4096, 32, 32, None, None, 11008, 290943, 2048),
    "hyperclovax": _family(4096, 32, 32, None, None, 11008, 32000, 2048, use_post_norm=True),
    "internlm3": _family(4096, 48, 32, 2, 128, 10240, 128512, 32768),
    "iquestcoder": _family(5120, 80, 40, 8, 128, 27648, 76800, 131072),
    "jais2": _family(
        3328, 32, 26, None, None, 26624, 150272, 8192, hidden_act="relu2", attention_bias=True, mlp_bias=True
    ),
    "llama": _family(4096, 32, 32, None, None, 11008, 32000, 2048),
    "ministral": _family(4096, 32, 32, 8, None, 14336, 32000, 131072, sliding_window=4096),
    "ministral3": _family(4096, 34, 32, 8, 128, 14336, 131072, 262144),
    "mistral": _family(4096, 32, 32, 8, None, 14336, 32000, 131072, sliding_window=4096),
    "nemotron": _family(6144, 32, 48, None, None, 24576, 256000, 4096, hidden_act="relu2", **_HALF),
    "olmo": _family(4096, 32, 32, None, None, 11008, 50304, 2048),
    "olmo2": _family(4096, 32, 32, None, None, 11008, 50304, 2048),
    "olmo3": _family(4096, 32, 32, None, None, 11008, 50304, 2048, sliding_window=4096),
    "persimmon": _family(
        4096, 36, 64, None, None, 16384, 262144, 16384, hidden_act="relu2", qk_layernorm=True, **_HALF
    ),
    "phi": _family(2048, 24, 32, None, None, 8192, 51200, 2048, hidden_act="gelu_new", **_HALF),
    "phi3": _family(3072, 32, 32, None, None, 8192, 32064, 4096),
    "qwen2": _family(4096, 32, 32, 32, None, 22016, 151936, 32768, **_QWEN),
    "qwen3": _family(4096, 32, 32, 32, 128, 22016, 151936, 32768, **_QWEN),
    "seed_oss": _family(4096, 64, 80, 8, 128, 27648, 155136, 524288, attention_bias=True),
    "smollm3": _family(
        2048, 36, 16, 4, None, 11008, 128256, 32768, tie_word_embeddings=True, no_rope_layer_interval=4
    ),
    "stablelm": _family(2560, 32, 32, 32, None, 6912, 50304, 4096, partial_rotary_factor=0.25),
    "starcoder2": _family(
        3072, 30, 24, 2, None, 12288, 49152, 4096,
        tie_word_embeddings=True, hidden_act="gelu_pytorch_tanh", use_bias=True,
    ),
    "vaultgemma": _family(2304, 26, 8, 4, 256, 9216, 256000, 8192, **_GEMMA2),
}  # fmt: skip
_ALSO_NAMED = {"internlm3": {"attention_bias": "qkv_bias", "mlp_bias": "bias"}}

# Families whose modules take no notice of such a key: all heads have their own keys and values; heads share out the
# hidden size.
_NO_KV_HEADS = {"persimmon"}
_NO_HEAD_DIM = {"persimmon", "stablelm"}
# Where a block's attention slides, if no `layer_types` says so. A period of n leaves every n-th block full.
_ALL_SLIDE = {"mistral", "ministral3", "phi3", "starcoder2"}  # whatever `layer_types` says
_PERIODS = {"cohere2": 4, "exaone4": 4, "gemma2": 2, "gemma3_text": 6, "olmo3": 4, "vaultgemma": 2}
_PERIOD_STATED = {"cohere2", "exaone4", "gemma3_text"}  # may be set with `sliding_window_pattern`
_TYPED = {"cwm", "ministral", "qwen2", "qwen3", "smollm3", *_PERIODS}  # heed `layer_types`


def setting(config: Mapping[str, Any], key: str) -> Any:
    """What the configuration states, null included, else what the family's class fills in; None for unknown ones."""
    if key in config:
        return config[key]
    family = str(config.get("model_type", ""))
    other = _ALSO_NAMED.get(family, {}).get(key)
    return config[other] if other and other in config else DEFAULTS.get(family, {}).get(key)


def kv_heads(config: Mapping[str, Any]) -> int:
    heads = setting(config, "num_attention_heads")
    return int(heads if config.get("model_type") in _NO_KV_HEADS else setting(config, "num_key_value_heads") or heads)


def head_dim(config: Mapping[str, Any]) -> int:
    own = None if config.get("model_type") in _NO_HEAD_DIM else setting(config, "head_dim")
    return int(own or setting(config, "hidden_size") // setting(config, "num_attention_heads"))


def rotary_width(config: Mapping[str, Any]) -> int:
    """Of a head's channels those that a rotary embedding turns."""
    stated = config.get("rope_parameters")
    part = stated.get("partial_rotary_factor") if isinstance(stated, Mapping) else None
    part = part or setting(config, "partial_rotary_factor") or 1.0
    return int(head_dim(config) * part)


def has_rope(config: Mapping[str, Any], block: int, blocks: int) -> bool:
    """Whether a block rotates queries and keys: some families leave certain blocks as they are."""
    family = config.get("model_type")
    if family == "cohere2":
        return slides(config, block, blocks)
    if family == "exaone4":
        return setting(config, "sliding_window") is None or slides(config, block, blocks)
    if family != "smollm3":
        return True
    stated = config.get("no_rope_layers")  # despite its name, 1 where there is rope
    if stated and len(stated) == blocks:
        return bool(stated[block])
    return (block + 1) % int(setting(config, "no_rope_layer_interval")) != 0


def slides(config: Mapping[str, Any], block: int, blocks: int) -> bool:
    """Whether a block's queries see no more than the sliding window.

    After depth pruning without a list that says so for each block, the rule is applied to the blocks that are left.
    """
    family = str(config.get("model_type", ""))
    if family in ("qwen2", "qwen3") and not config.get("use_sliding_window"):
        return False
    if not setting(config, "sliding_window"):
        return False
    if family in _ALL_SLIDE:
        return True
    if family not in _TYPED:
        return False
    types = config.get("layer_types")
    if types and len(types) == blocks:
        return bool(types[block] == "sliding_attention")
    if family in _PERIODS:
        period = (config.get("sliding_window_pattern") if family in _PERIOD_STATED else None) or _PERIODS[family]
        return (block + 1) % int(period) != 0
    if family == "cwm":
        return block % 4 != 0
    if family == "smollm3":
        return bool(config.get("use_sliding_window")) and not has_rope(config, block, blocks)
    return family == "ministral" or block >= int(setting(config, "max_window_layers"))

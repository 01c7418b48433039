"""Read a model's config.json, fill in what its family leaves out, and refuse by name what is not supported."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepress.checkpoints.documents import CONFIG_BYTES, parse_json, read_small
from edgepress.checkpoints.errors import CheckpointError
from edgepress.checkpoints.forms import BEFORE, Codebook, Form, Grid, RealGrid
from edgepress.checkpoints.manifest import require_own_links
from edgepress.checkpoints.quiet import quiet_import, readable
from edgepress.checkpoints.super_blocks import SuperBlocks

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# What a mixture of experts states, and the model types that are one where a configuration leaves the number out.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_EXPERT_TYPES = re.compile(r"moe|mixtral|dbrx|gpt_oss|deepseek_v[2-9]|llama4|jamba|phimoe")
_COUNTS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size",
    "vocab_size", "max_position_embeddings", "sliding_window",
)  # fmt: skip
# Families of GPT-2's and Bloom's time state their depth under another name, and keep weights another way round.
_OLD_DEPTHS = ("n_layer", "n_layers", "num_layers", "decoder_layers")


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json. Raises CheckpointError if there is none, or it states what is not supported."""
    path = folder / "config.json"
    require_own_links(folder)
    if not path.is_file():
        beside = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
        if "adapter_config.json" in beside:
            raise CheckpointError(
                f"{folder} is an adapter in PEFT's format, not a model. Give the model's folder: the one the adapter "
                "was made for, or one with the adapter merged"
            )
        raise CheckpointError(
            f"{folder} is not a model folder: it has no config.json"
            + (f" (it holds {', '.join(beside[:8])}{' …' if len(beside) > 8 else ''})" if beside else "")
        )
    config = parse_json(read_small(path, CONFIG_BYTES), str(path))
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} does not hold a configuration")
    require_supported(config, str(path))
    for key in _COUNTS:
        value = config.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31):
            raise CheckpointError(f"{path} states {key} = {json.dumps(value)[:60]}, which is no number of anything")
    return config


def require_supported(config: Mapping[str, Any], where: str) -> None:
    """Raise CheckpointError in one sentence for a kind of model that nothing here can compress."""
    family = str(config.get("model_type") or "nameless")
    inner = {
        str(part.get("model_type") or key.removesuffix("_config")): key
        for key, part in config.items()
        if key in ("text_config", "llm_config", "language_config", "thinker_config") and isinstance(part, Mapping)
    }
    parts = [key for key in config if key.endswith("_config") and re.match(r"vision|audio|vq|image|speech", key)]
    if inner or parts:
        what = next((f"its language model alone, the '{name}' that {key} describes" for name, key in inner.items()), "")
        raise CheckpointError(
            f"{where}: multimodal models ('{family}') are not supported; give {what or 'its language model alone'}, "
            "saved as a folder of its own with save_pretrained"
        )
    counts = [config[key] for key in _EXPERTS if isinstance(config.get(key), int)]
    experts = max(counts) > 1 if counts else bool(_EXPERT_TYPES.search(family))
    if experts and config.get("is_moe") is not False:
        raise CheckpointError(
            f"{where}: mixtures of experts ('{family}') are not supported; give a dense model, whose blocks have one "
            "feed-forward part each"
        )
    if config.get("is_encoder_decoder"):
        raise CheckpointError(
            f"{where}: models with an encoder and a decoder ('{family}') are not supported; give a causal language "
            "model, a decoder alone"
        )
    if isinstance(config.get("num_hidden_layers"), int):
        return
    if old := [key for key in _OLD_DEPTHS if key in config]:
        raise CheckpointError(
            f"{where}: the family '{family}' is not supported: it states its depth as {old[0]}, as GPT-2 and Bloom do; "
            "families built like LLaMA are, which state num_hidden_layers"
        )
    raise CheckpointError(f"{where} states no num_hidden_layers, the number of its blocks")


def tied(config: Mapping[str, Any]) -> bool:
    """Whether the head is the embedding."""
    return bool(setting(config, "tie_word_embeddings"))


# --- what it says of quantised weights ----------------------------------------------------------------------------

FORMS: tuple[type[Form], ...] = (Grid, RealGrid, Codebook, SuperBlocks)
# Where other tools say that weights are quantised.
_FOREIGN = {"quantization": "'mlx'", "compression_config": "'compressed-tensors'", "quant_config": "another tool"}


def form_of(about: Mapping[str, Any]) -> Form | None:
    """The form that a layer's entry in an image tells of; None where its weights are dense."""
    return next((found for form in FORMS if (found := form.from_about(about))), None)


def stated_form(config: Mapping[str, Any]) -> Form | None:
    """How config.json says the weights are stored; None if they are dense.

    Which layers that is true of, the files tell; of a codebook each layer's own note tells the blocks. Raises
    CheckpointError naming the field whose meaning would be lost here.
    """
    quantization = config.get("quantization_config")
    if not quantization:
        if foreign := [key for key in _FOREIGN if config.get(key)]:
            raise CheckpointError(f"the weights are quantised by {_FOREIGN[foreign[0]]} ({foreign[0]}). {BEFORE}")
        return None
    if not isinstance(quantization, Mapping):
        raise CheckpointError(f"quantization_config is {json.dumps(quantization)[:60]}, not a set of fields. {BEFORE}")
    for form in FORMS:
        if found := form.from_config(quantization):
            return found
    raise CheckpointError(
        f"the weights are quantised by '{quantization.get('quant_method')}'; only GPTQ's format, bitsandbytes' nf4 and "
        f"what this project writes can be read back. {BEFORE}"
    )


# --- what configurations leave out ------------------------------------------------------------------------------------
# What transformers' configuration classes fill in where a config.json is silent, family by family. No torch.
#
# The tests compare every entry with the class itself, keys left out one at a time and all at once.


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


# --- as transformers reads it ----------------------------------------------------------------------------------------


def hf_config(folder: Path) -> PreTrainedConfig:
    """The folder's config.json as transformers reads it. Raises CheckpointError naming the fields that it refuses."""
    from transformers import AutoConfig

    with readable(f"transformers does not know the model in {folder}, or not its config.json"):
        try:
            config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:
            if not (fields := _refused_fields(folder)):
                raise
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise CheckpointError(f"{folder / 'config.json'} states {' and '.join(fields)}: {reason}") from None
    return config


def _refused_fields(folder: Path) -> list[str]:
    """The fields of config.json, each with its value, without any one of which transformers would read it."""
    from transformers import CONFIG_MAPPING

    stated = read_config(folder)
    family = str(stated.get("model_type"))
    if family not in CONFIG_MAPPING:
        return []
    found = []
    for key in stated:
        try:
            with quiet_import():
                CONFIG_MAPPING[family].from_dict({k: v for k, v in stated.items() if k != key})
        except Exception:  # another field is wrong, or this one is needed
            continue
        found.append(f"{key} = {json.dumps(stated[key])[:80]}")
    return found


# --- adapter_config.json ----------------------------------------------------------------------------------------------
# An adapter's description in PEFT's own words.


def peft_config(rank: int, alpha: float, linears: Iterable[str], dora: bool = False) -> dict[str, Any]:
    """adapter_config.json for low-rank adapters on these linear layers, named relative to their block."""
    with quiet_import():
        from peft import LoraConfig

    config = LoraConfig(
        r=rank,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
        lora_dropout=0.0,
        target_modules=last_parts(linears),
        task_type="CAUSAL_LM",
        use_dora=dora,
    )
    return described(config)


def ia3_config(linears: Iterable[str], feedforward: Iterable[str]) -> dict[str, Any]:
    """The same for IA3's vectors; those of the layers in `feedforward` scale the input."""
    with quiet_import():
        from peft import IA3Config

    names = {"target_modules": last_parts(linears), "feedforward_modules": last_parts(feedforward)}
    return described(IA3Config(**names, task_type="CAUSAL_LM"))


def described(config: Any) -> dict[str, Any]:
    """A PEFT configuration as adapter_config.json says it, without what only training needs and where it was."""
    found = config.to_dict() | {"inference_mode": True, "base_model_name_or_path": None}
    if "lora_dropout" in found:
        found["lora_dropout"] = 0.0
    return {key: sorted(value) if isinstance(value, set) else value for key, value in found.items()}


def last_parts(names: Iterable[str]) -> list[str]:
    """The parts of dotted names after the last dot, each once."""
    return sorted({name.rpartition(".")[2] for name in names})


# What says where an adapter comes from or how it was trained, but not what it computes.
_HISTORY = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "init_lora_weights", "lora_alpha", "lora_dropout",
    "peft_version", "revision", "r", "target_modules", "task_type", "use_rslora",
}  # fmt: skip


def beyond_plain(config: Mapping[str, Any], ranks: Mapping[str, int], dora: bool = False) -> list[str]:
    """What an adapter_config.json asks for beyond plain LoRA on these layers (name -> rank), one item each.

    Plain is what `peft_config` writes: x A^T B^T lora_alpha / r, with one r and one lora_alpha for all layers, and with
    DoRA a magnitude in each of them. lora_alpha / sqrt(r), as in rsLoRA, is one scale too.
    """
    rank = config.get("r")
    plain = peft_config(max(ranks.values()), 1.0, ranks, dora)
    faults = [f"r is {rank}, but A has rank {found}" for found in sorted(set(ranks.values()) - {rank})]
    for key in sorted(config.keys() - _HISTORY):
        # Empty, None and False all say "not asked for"; a newer peft may have settings that this one does not know.
        if (config[key] or None) != (plain.get(key) or None):
            faults.append(f"{key} {config[key]}")
    return faults

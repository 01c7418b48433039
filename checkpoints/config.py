"""A model's config.json: read, refused by name where it states what is not supported, and what it says of codes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgepress.checkpoints.defaults import setting
from edgepress.checkpoints.documents import CONFIG_BYTES, parse_json, read_small
from edgepress.checkpoints.errors import CheckpointError
from edgepress.checkpoints.forms import CODEBOOK_METHOD, CODEBOOKS, REAL_METHOD, Form, Grid, RealGrid
from edgepress.checkpoints.manifest import require_own_links

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

# Fields of `quantization_config` for GPTQ that tell how the codes were found, or how to run them: not what they stand
# for. Which layers are quantised and which group a column belongs to is read from the files.
_HARMLESS = {
    "quant_method", "method", "bits", "group_size", "sym", "desc_act", "static_groups", "damp_percent",
    "damp_auto_increment", "true_sequential", "act_group_aware", "tokenizer", "dataset", "meta", "backend",
    "model_seqlen", "model_name_or_path", "model_file_base_name", "block_name_to_quantize", "batch_size",
    "module_name_preceding_first_block", "pad_token_id", "max_input_length", "cache_block_outputs", "use_exllama",
    "use_cuda_fp16", "exllama_config", "disable_exllama", "is_marlin_format", "modules_in_block_to_quantize",
    "modules_to_not_convert", "pack_impl", "device", "telemetry", "offload_to_disk", "offload_to_disk_path", "mse",
    "fallback", "version", "quantizer", "parallel_packing", "gc_mode", "compute_device_filter", "hessian", "v2",
    "v2_alpha", "v2_memory_device", "failsafe", "gptaq", "mock_quantization", "calibration_data_device",
    "wait_for_submodule_finalizers", "auto_forward_data_parallel", "dense_vram_strategy",
    "dense_vram_strategy_devices", "moe_vram_strategy", "moe_vram_strategy_devices", "moe",
}  # fmt: skip
# Where other tools say that weights are quantised.
_FOREIGN = {"quantization": "'mlx'", "compression_config": "'compressed-tensors'", "quant_config": "another tool"}
_BEFORE = "Give the checkpoint from before quantisation"


def stated_form(config: Mapping[str, Any]) -> Form | None:
    """How config.json says the weights are stored; None if they are dense.

    Which layers that is true of, the files tell; of a codebook each layer's own note tells the blocks. Raises
    CheckpointError naming the field whose meaning would be lost here.
    """
    quantization = config.get("quantization_config")
    if not quantization:
        if foreign := [key for key in _FOREIGN if config.get(key)]:
            raise CheckpointError(f"the weights are quantised by {_FOREIGN[foreign[0]]} ({foreign[0]}). {_BEFORE}")
        return None
    if not isinstance(quantization, Mapping):
        raise CheckpointError(f"quantization_config is {json.dumps(quantization)[:60]}, not a set of fields. {_BEFORE}")
    method = quantization.get("quant_method")
    if method == "gptq":
        _require_readable(quantization)
        return Grid(_bits(quantization), _group(quantization), bool(quantization.get("sym", False)))
    if method == REAL_METHOD:
        return RealGrid(_bits(quantization), _group(quantization))
    if (
        method == "bitsandbytes"
        and quantization.get("load_in_4bit")
        and not quantization.get("load_in_8bit")
        and quantization.get("bnb_4bit_quant_type") == "nf4"
    ):
        return CODEBOOKS["nf4"]
    if method == CODEBOOK_METHOD and quantization.get("codebook") in CODEBOOKS:
        return CODEBOOKS[quantization["codebook"]]
    raise CheckpointError(
        f"the weights are quantised by '{method}'; only GPTQ's format, bitsandbytes' nf4 and what this project writes "
        f"can be read back. {_BEFORE}"
    )


def _require_readable(quantization: Mapping[str, Any]) -> None:
    """Raise CheckpointError at a field of GPTQ's format that changes what the codes stand for."""
    for name in ("checkpoint_format", "format"):
        if (stated := str(quantization.get(name) or "gptq")) != "gptq":
            why = " (it stores zero points as they are, version 1 one less)" if stated == "gptq_v2" else ""
            raise CheckpointError(
                f"the weights are stored in {name} '{stated}'{why}; GPTQ's version 1, 'gptq', can be read. Save the "
                "model again in that format, or give the checkpoint from before quantisation"
            )
    if (word := str(quantization.get("pack_dtype") or "int32").removeprefix("torch.")) != "int32":
        raise CheckpointError(f"the codes are packed in words of {word} (pack_dtype); int32 can be read. {_BEFORE}")
    if quantization.get("lm_head"):
        raise CheckpointError(f"the head is quantised as well (lm_head), which cannot be read. {_BEFORE}")
    dynamic = quantization.get("dynamic") or {}
    if not isinstance(dynamic, Mapping) or any(dynamic.values()):
        raise CheckpointError(
            f"single layers have settings of their own (dynamic: {json.dumps(dynamic)[:80]}), which cannot be read; "
            f"layers that are left out are fine. {_BEFORE}"
        )
    unknown = sorted(
        key
        for key, value in quantization.items()
        if key not in _HARMLESS | {"checkpoint_format", "format", "pack_dtype", "lm_head", "dynamic"} and value
    )
    if unknown:
        raise CheckpointError(
            f"quantization_config has {', '.join(unknown)}, and what that changes is not known here. {_BEFORE}"
        )


def _bits(quantization: Mapping[str, Any]) -> int:
    bits = quantization.get("bits")
    if isinstance(bits, bool) or not isinstance(bits, int) or bits not in (2, 3, 4, 8):
        raise CheckpointError(
            f"quantization_config says bits {bits!r}; codes of 2, 3, 4 or 8 bits can be read. {_BEFORE}"
        )
    return bits


def _group(quantization: Mapping[str, Any]) -> int:
    group = quantization.get("group_size")
    if isinstance(group, bool) or not isinstance(group, int) or (group < 1 and group != -1):
        raise CheckpointError(
            f"quantization_config says group_size {group!r}; a positive whole number or -1, the whole row, can be "
            f"read. {_BEFORE}"
        )
    return group

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
from edgepress.checkpoints.forms import BEFORE, Codebook, Form, Grid, RealGrid
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

FORMS: tuple[type[Form], ...] = (Grid, RealGrid, Codebook)
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

"""Tiny models with random weights, saved as Hugging Face folders: small enough for every test, odd enough to tell.

Weights are large and norms far from one unless asked otherwise, so that attention is sharp and a wrong mask, position
or layer shows in the logits. Attention windows (8) are shorter than the sequences that tests use.
"""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY = 512
WINDOW = 8
SPECIAL = ["<pad>", "<s>", "</s>"]

_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "float32",
}
_MIXED = ["full_attention", "sliding_attention", "sliding_attention"] * 2
# The families that every test of blocks and their order takes, for how different they are.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": WINDOW},
    "smollm3": {"no_rope_layers": [1, 1, 0, 1, 0, 1]},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": _MIXED},
    "qwen3": {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": _MIXED},
    "gemma2": {"sliding_window": WINDOW},
    "gemma3_text": {"sliding_window": WINDOW, "layer_types": _MIXED},
    "phi3": {"sliding_window": WINDOW},
}
# All that the product supports, as README lists them; `...` leaves a key out, for families that refuse it.
_MULTI_HEAD: dict[str, Any] = {"num_key_value_heads": ..., "head_dim": ...}
ALL_FAMILIES: dict[str, dict[str, Any]] = FAMILIES | {
    "apertus": {},
    "arcee": {},
    "bitnet": {},
    "cohere": {"use_qk_norm": True},
    "cohere2": {"sliding_window": WINDOW, "layer_types": _MIXED},
    "cwm": {"sliding_window": WINDOW},
    "diffllama": {},
    "doge": {},
    "ernie4_5": {},
    "exaone4": {"sliding_window": WINDOW, "layer_types": _MIXED},
    "falcon": _MULTI_HEAD | {"ffn_hidden_size": 128, "alibi": True},
    "gemma": {},
    "glm": {},
    "glm4": {},
    "gpt_neox": {"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.25}},
    "granite": {"residual_multiplier": 0.5, "embedding_multiplier": 2.0, "logits_scaling": 2.0},
    "granite_swa": {"sliding_window": WINDOW, "layer_types": _MIXED},
    "helium": {},
    "hunyuan_v1_dense": {},
    "hyperclovax": {},
    "internlm3": {},
    "iquestcoder": {},
    "jais2": {},
    "lfm2": {},
    "ministral": {"sliding_window": WINDOW, "layer_types": _MIXED},
    "ministral3": {"sliding_window": WINDOW},
    "nanochat": {},
    "nemotron": {},
    "olmo": {"clip_qkv": 4.0},
    "olmo2": {},
    "olmo3": {"sliding_window": WINDOW, "layer_types": _MIXED},
    "persimmon": _MULTI_HEAD,
    "phi": {},
    "seed_oss": {},
    "stablelm": _MULTI_HEAD | {"num_key_value_heads": 2},
    "starcoder2": {"sliding_window": WINDOW},
    "vaultgemma": {"sliding_window": WINDOW},
}

# Every switch that some family has for what its blocks are made of.
BIASES = ("attention_bias", "attention_out_bias", "mlp_bias", "use_bias", "use_qkv_bias")
SWITCHES = (*BIASES, "qk_layernorm", "use_qk_norm", "use_parallel_residual", "use_post_norm")


def family_config(family: str, **overrides: Any) -> dict[str, Any]:
    """The settings that make a tiny model of a family; an override of `...` leaves the family's default."""
    stated = _SIZES | ALL_FAMILIES[family] | overrides
    return {key: value for key, value in stated.items() if value is not ...}


def tiny_config(family: str, **overrides: Any) -> dict[str, Any]:
    """A tiny model's configuration in full, as transformers would write it."""
    config = AutoConfig.for_model(family, **family_config(family, **overrides))
    return dict(config.to_dict())


def sharp(model: PreTrainedModel) -> None:
    """Large weights and norms far from one, by the seed and the parameters' order alone."""
    generator = torch.Generator().manual_seed(torch.initial_seed())
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name or (parameter.dim() == 1 and not name.endswith("bias")):
            parameter.add_(0.2 * noise)
        else:
            parameter.copy_(0.15 * noise)


def uneven(model: PreTrainedModel) -> None:
    """What transformers draws, with norms and biases that do something and blocks that differ in weight."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
        elif "layers" in name:
            parameter.mul_(float(torch.rand(()) + 0.5))


def as_drawn(model: PreTrainedModel) -> None:
    """What transformers draws."""


def build_model(
    family: str = "llama", seed: int = 0, weights: Callable[[Any], None] = sharp, **overrides: Any
) -> PreTrainedModel:
    """A tiny model; `weights` is called with what transformers draws and changes it in place."""
    config = AutoConfig.for_model(family, **family_config(family, **overrides))
    dtype = config.dtype
    with torch.random.fork_rng(devices=[]), torch.no_grad():  # both draw from the global generator
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        weights(model)
    return model.to(dtype).eval()


@cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and the first merges that English prose gives: exactly 512 ids, no text unknown."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([pydoc_data.topics.topics[name] for name in ("for", "try", "with", "while")], trainer)
    assert core.get_vocab_size() == VOCABULARY
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def save_tiny(folder: Path, family: str = "llama", seed: int = 0, **how: Any) -> Path:
    """Save a tiny model, made as by `build_model`, with the tokenizer."""
    build_model(family, seed, **how).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder

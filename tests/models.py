"""Tiny models with random weights, saved as Hugging Face folders: small enough for every test, odd enough to tell.

Weights are large and norms far from one, so that attention is sharp and a wrong mask, position or layer shows in
the logits. Attention windows (8) are shorter than the sequences that tests use.
"""

from __future__ import annotations

import pydoc_data.topics
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


def tiny_config(family: str, **overrides: Any) -> dict[str, Any]:
    """A tiny model's configuration in full, as transformers would write it."""
    config = AutoConfig.for_model(family, **(_SIZES | FAMILIES[family] | overrides))
    return dict(config.to_dict())


def build_model(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    config = AutoConfig.for_model(family, **(_SIZES | FAMILIES[family] | overrides))
    with torch.random.fork_rng():  # transformers fills the weights from the global generator
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.add_(0.2 * noise)
            else:
                parameter.copy_(0.15 * noise)
    return model.eval()


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


def save_tiny(folder: Path, family: str = "llama", seed: int = 0, **overrides: Any) -> Path:
    build_model(family, seed, **overrides).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder

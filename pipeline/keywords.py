"""The keywords of `edgepress.compress` and `edgepress.evaluate`: the commands' flags, spelled as names in Python.

`--lora-samples 80` is `lora_samples=80`. They are written out for editors and type checkers;
tests/pipeline/test_api.py holds them to the option fields that the flags are made of, where what each means is told.
"""

from __future__ import annotations

import keyword
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict


def keyword_of(flag: str, name: str) -> str:
    """The keyword of a flag; its field's `name` where Python has a use of its own for the word."""
    word = flag.removeprefix("--").replace("-", "_")
    return name if keyword.iskeyword(word) else word


class CompressOptions(TypedDict, total=False):
    """What a run may be told; see `compress --help`."""

    data: str | Path
    text: str | Path
    protocol: str
    window: int
    tokens: int
    seed: int
    device: str
    dtype: str
    soc: str
    homotopic: int
    spill_mib: int
    # stage vocabulary
    trim_vocabulary: str | Path
    vocabulary_size: int
    # stage pad
    pad_ffn: int
    # stage depth
    depth: int
    layers: str
    metric: str
    protect_first: int
    protect_last: int
    rerank: bool
    depth_samples: int
    depth_length: int
    # stage wanda
    wanda: str
    wanda_samples: int
    wanda_length: int
    prune: str
    # stage lora
    lora_rank: int
    lora_alpha: int
    lora_dropout: float
    lora_targets: str
    lora_data: str | Path
    lora_samples: int
    lora_length: int
    lora_batch: int
    lora_micro_batch: int
    lora_steps: int
    lora_epochs: int
    lora_lr: float
    lora_checkpointing: bool
    lora_save_steps: int
    lora_held_out: int
    lora_patience: int
    distill: float
    distill_teacher: str
    recover: str
    lora_loss: str
    lora_packing: str
    lora_schedule: str
    lora_warmup: float
    lora_weight_decay: float
    train_noise: float
    train_mask: float
    lora_packed: bool
    loftq_steps: int
    distill_hidden: float
    # stage gptq
    quant: str
    group: int
    symmetric: bool
    activation_order: bool
    scale_search: bool
    damping: float
    quant_effort: str
    quant_steps: int
    quant_embeddings: int
    embedding_codes: str
    activation_bits: int
    quant_samples: int
    quant_length: int
    quant_layers: str
    smooth: bool
    hessian_shrinkage: float
    guidance: float
    # stage tune
    tune: int
    tune_lr: float
    tune_distill: float
    tune_data: str | Path
    tune_samples: int
    tune_length: int
    tune_batch: int
    tune_micro_batch: int
    tune_save_steps: int
    tune_held_out: int
    tune_patience: int
    # stage eora
    eora: int
    eora_against: str
    eora_bits: int
    eora_samples: int
    eora_length: int
    eora_shrinkage: float


class EvaluateOptions(TypedDict, total=False):
    """What a measurement may be told; see `compress eval --help`."""

    limit: int
    sources: str | Sequence[str]
    answers: str
    chat: bool
    new_tokens: int
    batch_tokens: int
    shots: int
    text: str | Path
    protocol: str
    window: int
    tokens: int
    kv_bits: int
    kv_window: int
    kv_sinks: int
    sbert: str
    reply_tokens: int
    top_p: float
    temperature: float
    speed_prompt: int
    speed_tokens: int
    repeats: int
    kernels: bool
    noise: str
    mask: str
    seeds: int
    robust_task: str

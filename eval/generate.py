"""Continuations of one prompt by a checkpoint's effective dense weights, greedy or sampled."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import PlanError, TextError
from edgepress.checkpoints.kv_format import KVFormat
from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.tokens import require_known
from edgepress.eval.chat import in_template
from edgepress.eval.decoding import end_tokens
from edgepress.eval.subject import Subject


@dataclass(frozen=True)
class Decoding:
    tokens: int = 60  # new ones at most
    temperature: float = 0.0  # 0: the likeliest token at each step
    seed: int = 0
    chat: bool = False  # the prompt is a user's turn in the tokenizer's chat template
    kv: KVFormat = field(default_factory=KVFormat)

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise PlanError(f"--tokens {self.tokens}: at least 1")
        if not 0 <= self.temperature < math.inf:
            raise PlanError(f"--temperature {self.temperature}: 0 (greedy) or more")

    def __str__(self) -> str:
        how = f"temperature {self.temperature:g}, seed {self.seed}" if self.temperature else "greedy"
        cache = "" if self.kv.plain else f", {self.kv}"
        return f"{how}, at most {self.tokens} new tokens{', chat template' if self.chat else ''}{cache}"


@dataclass(frozen=True)
class Continuation:
    prompt: str  # as the tokenizer gives it back
    text: str  # what follows
    tokens: int
    ended: bool  # by a token that ends the text, not by the limit
    seconds: float  # without loading


@torch.no_grad()
def continue_prompt(checkpoint: Checkpoint, prompt: str, decoding: Decoding, device: torch.device) -> Continuation:
    """At most decoding.tokens new tokens after the prompt, in the checkpoint's stored precision.

    Sampling draws from a generator of its own: the same seed, the same noise for every checkpoint. Raises TextError
    for an empty prompt, PlanError where a chat template is asked for and there is none.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    from edgepress.eval.kv_cache import on_model

    subject = Subject(checkpoint, Runtime(device, checkpoint.stored_dtype))
    tokenizer: Any = subject.tokenizer
    ids = _prompt_ids(checkpoint, tokenizer, prompt, decoding.chat).to(device)
    model: Any = subject.model
    ends = end_tokens(subject)
    # A configuration of our own: the folder's sampling and penalties would change what is compared.
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=decoding.tokens, do_sample=False, pad_token_id=ends[0] if ends else 0, eos_token_id=ends or None
    )
    processors = LogitsProcessorList([GumbelNoise(decoding)] if decoding.temperature else [])
    with on_model(model, checkpoint.shape, decoding.kv, torch.zeros(1, dtype=torch.long)) as cache:
        began = time.perf_counter()
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            logits_processor=processors,
            past_key_values=cache,
        )[0].tolist()
        seconds = time.perf_counter() - began
    new = output[ids.shape[1] :]
    ended = bool(new) and new[-1] in ends
    asked, whole = (str(tokenizer.decode(t, skip_special_tokens=True)) for t in (output[: ids.shape[1]], output))
    # Decoded alone, the new tokens would lose the space that some tokenizers put before a word.
    text = whole[len(asked) :] if whole.startswith(asked) else str(tokenizer.decode(new, skip_special_tokens=True))
    return Continuation(asked, text, len(new) - ended, ended, seconds)


class GumbelNoise:
    """Makes the likeliest token a sample of softmax(scores / temperature), as argmax(scores / T + Gumbel noise) is.

    transformers' own sampling draws from torch's global generator.
    """

    def __init__(self, decoding: Decoding) -> None:
        self._temperature = decoding.temperature
        self._generator = torch.Generator().manual_seed(decoding.seed)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores (b, vocabulary) are logits."""
        uniform = torch.rand(scores.shape, generator=self._generator, dtype=torch.float64)
        noise = -torch.log(-torch.log(uniform.clamp_min(torch.finfo(torch.float64).tiny)))
        return scores.double() / self._temperature + noise.to(scores.device)


def _prompt_ids(checkpoint: Checkpoint, tokenizer: Any, prompt: str, chat: bool) -> Tensor:
    """The prompt's token ids (1, L)."""
    if chat:
        turn = [{"role": "user", "content": prompt}]
        prompt = in_template(tokenizer, [turn], checkpoint.folder, "--chat", answer_next=True)[0]
    ids: Tensor = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat)["input_ids"]
    if not ids.numel():
        raise TextError("the prompt is empty; give at least one word to continue")
    require_known(ids, checkpoint.shape.vocabulary, checkpoint.name)
    return ids.long()


def same_words(text: str, other: str) -> int:
    """How many words two texts share from their beginning."""
    pairs = zip(text.split(), other.split(), strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(text.split()), len(other.split())))

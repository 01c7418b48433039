"""Text from a checkpoint, by its effective dense weights."""

from __future__ import annotations

from typing import Any

import torch

from checkpoints.checkpoint import Checkpoint


@torch.no_grad()
def continue_greedily(checkpoint: Checkpoint, prompt: str, tokens: int, device: torch.device) -> str:
    """The prompt and at most `tokens` new tokens, each the most likely one."""
    tokenizer = checkpoint.tokenizer()
    model: Any = checkpoint.model(device)
    inputs = tokenizer(prompt, return_tensors="pt").to(device)
    output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    text = tokenizer.decode(output[0], skip_special_tokens=True)
    return str(text)

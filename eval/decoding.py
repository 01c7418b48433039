"""Greedy decoding of many prompts at once that reads and computes no more than each of them needs.

Prompts are padded on the left; the padding is masked, and positions count from the first real token, so a sequence's
logits are those it has alone, up to rounding. A row enters the batch about where its prompt begins and leaves it when
its answer ends: neither padding nor finished answers take much arithmetic.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from edgepress.checkpoints.kv_format import PLAIN, KVFormat
from edgepress.eval.subject import Subject

# Times at which the rows of a batch may enter. Each costs one more reading of the weights, about a step of decoding.
ENTRIES = 8


def end_tokens(subject: Subject) -> list[int]:
    """Every token that ends an answer: the tokenizer's, the configuration's and the generation settings'."""
    wanted: list[Any] = [subject.tokenizer.eos_token_id, getattr(subject.model.config, "eos_token_id", None)]
    path = subject.checkpoint.folder / "generation_config.json"
    if path.is_file():
        wanted.append(json.loads(path.read_text()).get("eos_token_id"))
    flat = {token for item in wanted for token in (item if isinstance(item, list) else [item])}
    return sorted(token for token in flat if token is not None)


@torch.no_grad()
def greedy(subject: Subject, prompts: Sequence[list[int]], new_tokens: int, kv: KVFormat = PLAIN) -> list[list[int]]:
    """1 to new_tokens tokens after each prompt, the likeliest at each step, in one batch; the end mark is left off.

    Settings of the checkpoint's own (sampling, penalties) stay out. What the padding holds does not matter, so a
    tokenizer needs no pad token. kv: each token sees those before it as they come out of such a cache.
    """
    device = subject.runtime.device
    ends = end_tokens(subject)
    rows = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # the prompt of each row
    ids, mask = (t.to(device) for t in padded_left([prompts[i] for i in rows]))
    cache, logits = _compressed(subject, ids, mask, kv) if not kv.plain else prefill(subject.model, ids, mask)
    logits[:, ends] = -torch.inf  # an answer has at least one token
    replies: list[list[int]] = [[] for _ in prompts]
    while True:
        tokens = logits.argmax(-1)
        going = []
        for row, token in enumerate(tokens.tolist()):
            if token not in ends:
                replies[rows[row]].append(token)
                if len(replies[rows[row]]) < new_tokens:
                    going.append(row)
        if not going:
            return replies
        if len(going) < len(rows):  # a copy of the cache, which the next step makes anyway to append its column
            kept = torch.tensor(going, device=device)
            cache.batch_select_indices(kept)
            rows, mask, tokens = [rows[row] for row in going], mask[kept], tokens[kept]
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        logits = _last_logits(subject.model, tokens[:, None], mask, cache)


def prefill(model: Any, ids: Tensor, mask: Tensor) -> tuple[Any, Tensor]:
    """The cache of keys and values of all prompts, and the logits (b, vocabulary) after their last tokens.

    ids and mask (b, L) as `padded_left` makes them, the longest prompt first. The columns go through the model in at
    most ENTRIES pieces, each without the rows whose prompts begin after it. A row that enters gets another row's
    cache as its padding: the mask hides it.
    """
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    begins = (mask == 0).sum(-1).tolist()
    width, step = ids.shape[1], -(-len(begins) // ENTRIES)
    logits, present = torch.empty(0), 0
    for start, stop in pairwise([*sorted(set(begins[::step])), width]):
        count = sum(begin < stop for begin in begins)
        if present and count > present:
            cache.batch_select_indices(torch.arange(count, device=ids.device).clamp(max=present - 1))
        logits = _last_logits(model, ids[:count, start:stop], mask[:count, :stop], cache)
        present = count
    return cache, logits


def _compressed(subject: Subject, ids: Tensor, mask: Tensor, kv: KVFormat) -> tuple[Any, Tensor]:
    """As `prefill`, with all rows in one piece: a compressed cache takes its prompts at once."""
    from edgepress.eval.kv_cache import on_model

    with on_model(subject.model, subject.checkpoint.shape, kv, (mask == 0).sum(-1)) as cache:
        return cache, _last_logits(subject.model, ids, mask, cache)


def _last_logits(model: Any, ids: Tensor, mask: Tensor, cache: Any) -> Tensor:
    """Float32 logits (b, vocabulary) after the last of the columns ids (b, new); mask (b, cached + new)."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    out = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    logits: Tensor = out.logits[:, -1].float()
    return logits


def padded_left(prompts: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both (prompts, longest) int64."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask

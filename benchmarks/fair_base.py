"""A copy of a model that computes the same and whose weights lie otherwise: the fair base for comparing quantisers.

The packaged SmolLM2 was stored in Q4_1, so groups of 32 neighbours find its old lattice again and look better than they
are on a model that never was quantised. Here the channels of the residual stream, of every feed-forward and of every
head's values are shuffled, consistently, so that no group of neighbours is an old one.

    python -m benchmarks.fair_base shuffled          # writes the folder `shuffled`, and says how far logits differ
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from edgepress.pipeline.store import open_model


@torch.no_grad()
def shuffle(model: nn.Module, generator: torch.Generator) -> None:
    """Shuffle the channels of a LLaMA-like causal model in place; its logits stay, up to rounding."""
    hidden = torch.randperm(model.config.hidden_size, generator=generator)
    decoder = model.model
    decoder.embed_tokens.weight.copy_(decoder.embed_tokens.weight[:, hidden])
    if not model.config.tie_word_embeddings:
        model.lm_head.weight.copy_(model.lm_head.weight[:, hidden])
    _reorder(decoder.norm.weight, hidden)
    head = decoder.layers[0].self_attn.head_dim
    for block in decoder.layers:
        attention, mlp = block.self_attn, block.mlp
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            _reorder(norm.weight, hidden)
        inner = torch.randperm(mlp.up_proj.weight.shape[0], generator=generator)
        groups = attention.v_proj.weight.shape[0] // head
        # Values alone: the place of a query's or key's dimension is the speed at which it turns.
        orders = [torch.randperm(head, generator=generator) + head * i for i in range(groups)]
        heads = attention.o_proj.weight.shape[1] // head
        shared = heads // groups
        outs = [orders[h // shared] % head + head * h for h in range(heads)]
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            linear.weight.copy_(linear.weight[:, hidden])
        for linear in (attention.o_proj, mlp.down_proj):
            linear.weight.copy_(linear.weight[hidden])
        for linear in (mlp.gate_proj, mlp.up_proj):
            linear.weight.copy_(linear.weight[inner])
        mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, inner])
        attention.v_proj.weight.copy_(attention.v_proj.weight[torch.cat(orders)])
        attention.o_proj.weight.copy_(attention.o_proj.weight[:, torch.cat(outs)])


def _reorder(vector: Tensor, order: Tensor) -> None:
    vector.copy_(vector[order])


def main(folder: Path) -> None:
    source = open_model(None)
    before, after = source.model().float(), source.model().float()
    shuffle(after, torch.Generator().manual_seed(0))
    ids = torch.randint(0, source.shape.vocabulary, (1, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        apart = float((before(ids).logits - after(ids).logits).abs().max())
    after.to(torch.bfloat16).save_pretrained(folder)
    source.tokenizer().save_pretrained(folder)
    print(f"{folder}: largest difference of a logit {apart:.1e}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "shuffled"))

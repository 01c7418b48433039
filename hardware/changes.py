"""Changes that make a model smaller, applied to its shape: what each stage or setting would leave."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from checkpoints.forms import Grid
from checkpoints.shape import BlockShape, LinearShape, ModelShape, largest_group
from checkpoints.sparsity import Pattern
from hardware.needs import Request
from hardware.soc import Soc

State = tuple[ModelShape, Request]

WORD = 32  # GPTQ's file format takes layers whose sides are both multiples of it; the others stay dense
GROUP = 128  # as `--group`
LEAST_VOCABULARY = 260  # 256 bytes and a few special tokens: a byte-level tokenizer cannot be cut further
LEAST_CONTEXT = 16


@dataclass(frozen=True)
class Lever:
    """One thing that can give, with its steps from the mildest to the strongest."""

    name: str
    now: str
    steps: Sequence[Any]
    apply: Callable[[State, Any], State]
    words: str  # of a step, as an option of this project where there is one

    def how(self, step: Any) -> str:
        return self.words.format(step)


def levers(shape: ModelShape, soc: Soc, request: Request) -> list[Lever]:
    """What can still give in this model on this chip; a lever without steps is left out."""
    linears = [x for block in shape.blocks for x in block.linears]
    bits = {x.grid.bits for x in linears if x.grid}
    width = max(bits, default=16)
    count, vocabulary = len(shape.blocks), shape.vocabulary
    rank = max((x.adapter_rank for x in linears), default=0)
    channel = "-channel" if soc.layout.scale_per == "channel" else ""
    patterns = [p for p in (Pattern(1, 4), Pattern(2, 4), Pattern(3, 4)) if soc.layout.patterns and not shape.pattern]
    copies = shape.embedding_bits or 16
    tokens = request.context
    found = [
        Lever("weight bits", f"{width} bit", _below(width, 8, 4, 3), _bits(channel), f"--quant gptq{{}}{channel}"),
        Lever("embedding bits", f"{copies} bit", _below(copies, 8, 4), _embedding, "--quant-embeddings {}"),
        Lever("N:M pattern", str(shape.pattern or "none"), patterns, _pattern, "--wanda {}"),
        Lever(
            "vocabulary", f"{vocabulary} tokens", _down(vocabulary, LEAST_VOCABULARY), _vocabulary, "vocabulary of {}"
        ),
        Lever("layers", f"{count} blocks", _down(count, 1), _layers, f"{{}} of {count} blocks"),
        Lever("context", f"{tokens} tokens", _down(tokens, LEAST_CONTEXT), _context, "--context {}"),
        Lever("KV precision", f"{request.kv_bits} bit", _below(request.kv_bits, 8, 4), _kv, "--kv-bits {}"),
        Lever("prefill chunk", f"{request.chunk} tokens", _down(request.chunk, 1), _chunk, "--prefill-chunk {}"),
        Lever("adapter rank", f"rank {rank}", _down(rank, 0), _rank, "adapters of rank {}"),
    ]
    if not any(len(t.shape) == 2 for t in shape.outer):
        found = [lever for lever in found if lever.name not in ("embedding bits", "vocabulary")]
    return [lever for lever in found if lever.steps]


def _below(now: int, *widths: int) -> Sequence[int]:
    return [width for width in widths if width < now]


def _down(now: int, least: int) -> Sequence[int]:
    return range(now - 1, least - 1, -1)


# --- each change ---------------------------------------------------------------------------------------------------


def quantised(shape: ModelShape, bits: int, group: int = GROUP) -> ModelShape:
    """As the stage gptq leaves the shape: a grid on every layer that its file format holds and that is wider."""
    fitting = [x for block in shape.blocks for x in block.linears if _packable(x)]
    chosen = largest_group({x.in_features for x in fitting}, group) if fitting else group

    def on(x: LinearShape) -> LinearShape:
        if not _packable(x) or (x.grid is not None and x.grid.bits <= bits):
            return x
        kept = x.grid if isinstance(x.grid, Grid) else Grid(bits, chosen)
        return replace(x, grid=replace(kept, bits=bits))

    return with_linears(shape, on)


def with_linears(shape: ModelShape, change: Callable[[LinearShape], LinearShape]) -> ModelShape:
    """Every linear layer changed; blocks that were one object stay one."""
    made: dict[int, BlockShape] = {}
    for block in shape.blocks:
        if id(block) not in made:
            made[id(block)] = replace(block, linears=tuple(map(change, block.linears)))
    return replace(shape, blocks=tuple(made[id(block)] for block in shape.blocks))


def with_vocabulary(shape: ModelShape, tokens: int) -> ModelShape:
    """The shape with a vocabulary of so many tokens."""
    outer = tuple(replace(t, shape=(tokens, t.shape[1])) if len(t.shape) == 2 else t for t in shape.outer)
    return replace(shape, outer=outer, config={**shape.config, "vocab_size": tokens})


def with_blocks(shape: ModelShape, count: int) -> ModelShape:
    """The first `count` blocks, with every list of the configuration that has an entry a block cut alike.

    Which blocks go is for a ranking to say; their bytes are the same where the blocks are alike.
    """
    old = len(shape.blocks)
    config = {k: v[:count] if isinstance(v, list) and len(v) == old else v for k, v in shape.config.items()}
    return replace(shape, blocks=shape.blocks[:count], config={**config, "num_hidden_layers": count})


def _packable(x: LinearShape) -> bool:
    return x.out_features % WORD == 0 and x.in_features % WORD == 0


def _bits(channel: str) -> Callable[[State, int], State]:
    return lambda state, bits: (quantised(state[0], bits, -1 if channel else GROUP), state[1])


def _embedding(state: State, bits: int) -> State:
    return replace(state[0], embedding_bits=bits), state[1]


def _pattern(state: State, pattern: Pattern) -> State:
    def on(x: LinearShape) -> LinearShape:
        return x if x.in_features % pattern.of else replace(x, pattern=pattern)

    return with_linears(state[0], on), state[1]


def _vocabulary(state: State, tokens: int) -> State:
    return with_vocabulary(state[0], tokens), state[1]


def _layers(state: State, count: int) -> State:
    return with_blocks(state[0], count), state[1]


def _context(state: State, context: int) -> State:
    chunk = state[1].prefill_chunk
    return state[0], replace(state[1], context=context, prefill_chunk=None if chunk is None else min(chunk, context))


def _kv(state: State, bits: int) -> State:
    return state[0], replace(state[1], kv_bits=bits)


def _chunk(state: State, chunk: int) -> State:
    return state[0], replace(state[1], prefill_chunk=min(chunk, state[1].context))


def _rank(state: State, rank: int) -> State:
    def on(x: LinearShape) -> LinearShape:
        left = min(rank, x.adapter_rank)
        return replace(x, adapter_rank=left, adapter_vector=x.adapter_vector if left or not x.adapter_rank else "")

    return with_linears(state[0], on), state[1]

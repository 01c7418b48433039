"""Changes that make a model smaller, applied to its shape: what each stage or setting would leave.

Each is named by the options that make it, and only what the stages' own plans accept is offered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from edgepress.checkpoints.forms import Grid
from edgepress.checkpoints.reshape import each_linear, with_bits, with_blocks, with_pattern, with_vocabulary
from edgepress.checkpoints.shape import LinearShape, ModelShape
from edgepress.checkpoints.sparsity import Pattern
from edgepress.hardware.needs import Request
from edgepress.hardware.soc import Soc

State = tuple[ModelShape, Request]

GROUP = 128  # as `--group`
LEAST_VOCABULARY = 260  # 256 bytes and a few special tokens: a byte-level tokenizer cannot be cut further
LEAST_CONTEXT = 16
PROTECTED = (4, 2)  # first and last blocks, as `--protect-first` and `--protect-last`


@dataclass(frozen=True)
class Lever:
    """One thing that can give, with its steps from the mildest to the strongest."""

    name: str
    now: str
    steps: Sequence[Any]
    apply: Callable[[State, Any], State]
    words: Callable[[Any], str] | str  # of a step, as options of this project where there are some
    needs: str = ""  # another lever that must be pulled with it

    def how(self, step: Any) -> str:
        return self.words.format(step) if isinstance(self.words, str) else self.words(step)


def levers(shape: ModelShape, soc: Soc, request: Request) -> list[Lever]:
    """What can still give in this model on this chip; a lever without steps is left out."""
    linears = [x for block in shape.blocks for x in block.linears]
    width = max((x.grid.bits for x in linears if x.grid), default=16)
    count, vocabulary = len(shape.blocks), shape.vocabulary
    rank = max((x.adapter_rank for x in linears), default=0)
    channel = "-channel" if soc.layout.scale_per == "channel" else ""
    divisible = all(x.in_features % 4 == 0 for x in linears)
    patterns = [Pattern(n, 4) for n in (1, 2, 3)] if soc.layout.patterns and not shape.pattern and divisible else []
    # Below 4 bits the stage has groups alone. A layer that its file format cannot hold stays as it is.
    stored = any(Grid(4, GROUP).holds(x.out_features, x.in_features) for x in linears)
    bits = _below(width, *((8, 4) if channel else (8, 4, 3))) if stored else []
    copies = shape.embedding_bits or 16
    tokens = request.context
    found = [
        Lever("weight bits", f"{width} bit", bits, _bits(channel), f"--quant gptq{{}}{channel}"),
        # The stage that packs the embedding is the one that quantises.
        Lever(
            "embedding bits", f"{copies} bit", _below(copies, 8, 4), _embedding, "--quant-embeddings {}",
            "" if shape.grid else "weight bits",
        ),
        Lever("N:M pattern", str(shape.pattern or "none"), patterns, _pattern, "--wanda {}"),
        Lever(
            "vocabulary", f"{vocabulary} tokens", _down(vocabulary, LEAST_VOCABULARY), _vocabulary,
            "--vocabulary-size {}",
        ),
        Lever("layers", f"{count} blocks", _down(count, 1), _layers, _removing(count)),
        Lever("context", f"{tokens} tokens", _down(tokens, LEAST_CONTEXT), _context, _shorter(request)),
        Lever("KV precision", f"{request.kv_bits} bit", _below(request.kv_bits, 8, 4), _kv, "--kv-bits {}"),
        Lever("prefill chunk", f"{request.chunk} tokens", _down(request.chunk, 1), _chunk, "--prefill-chunk {}"),
        Lever("adapter rank", f"rank {rank}", _down(rank, 0), _rank, "adapters of rank {}"),
    ]  # fmt: skip
    if not any(len(t.shape) == 2 for t in shape.outer):
        found = [lever for lever in found if lever.name not in ("embedding bits", "vocabulary")]
    there = {lever.name for lever in found if lever.steps}
    return [lever for lever in found if lever.steps and lever.needs in {"", *there}]


_OF_CHECK = ("--context ", "--kv-bits ", "--prefill-chunk ", "adapters ")


def recipe_options(words: Iterable[str], shape: ModelShape) -> str:
    """Options of `compress` that make these steps of a shape and nothing else; those of `check` are left out."""
    wanted = [word for word in words if not word.startswith(_OF_CHECK)]
    given = {word.partition(" ")[0] for word in wanted}
    if shape.embedding_bits and "--quant" in given and "--quant-embeddings" not in given:
        wanted.append(f"--quant-embeddings {shape.embedding_bits}")
    others = [f"{flag} {none}" for flag, none in (("--depth", 0), ("--wanda", "none"), ("--quant", "none"))
              if flag not in given]  # fmt: skip
    return " ".join([*wanted, *others, "--skip lora,eora"])


def stage_group(soc: Soc, bits: int) -> int:
    """The group that suits a chip: a scale for each row where it has no others and the stage makes such codes."""
    return -1 if soc.layout.scale_per == "channel" and bits != 3 else GROUP


def _removing(count: int) -> Callable[[int], str]:
    """The options of the stage depth that leave so many of `count` blocks."""

    def words(left: int) -> str:
        first = min(PROTECTED[0], left)
        last = min(PROTECTED[1], left - first)
        protected = "" if (first, last) == PROTECTED else f" --protect-first {first} --protect-last {last}"
        return f"--depth {count - left}{protected}"

    return words


def _shorter(request: Request) -> Callable[[int], str]:
    def words(context: int) -> str:
        cut = request.prefill_chunk is not None and request.prefill_chunk > context
        return f"--context {context}" + (f" --prefill-chunk {context}" if cut else "")

    return words


def _below(now: int, *widths: int) -> Sequence[int]:
    return [width for width in widths if width < now]


def _down(now: int, least: int) -> Sequence[int]:
    return range(now - 1, least - 1, -1)


# --- each change ---------------------------------------------------------------------------------------------------


def _bits(channel: str) -> Callable[[State, int], State]:
    return lambda state, bits: (with_bits(state[0], bits, -1 if channel else GROUP), state[1])


def _embedding(state: State, bits: int) -> State:
    return replace(state[0], embedding_bits=bits), state[1]


def _pattern(state: State, pattern: Pattern) -> State:
    return with_pattern(state[0], pattern), state[1]


def _vocabulary(state: State, tokens: int) -> State:
    return with_vocabulary(state[0], tokens), state[1]


def _layers(state: State, count: int) -> State:
    return with_blocks(state[0], range(count)), state[1]


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

    return each_linear(state[0], on), state[1]

"""The changes that make a model smaller on a chip, what each is worth, and the smallest that is enough.

Nothing is guessed: each candidate is a changed shape or setting, planned anew with `needs`. Which change hurts the
model's quality least is not judged here; `compress fit` searches with a proxy of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any

from edgepress.checkpoints.forms import Grid
from edgepress.checkpoints.shape import (
    LinearShape,
    ModelShape,
    Pattern,
    each_linear,
    with_bits,
    with_blocks,
    with_pattern,
    with_vocabulary,
)
from edgepress.hardware.needs import Needs, Request, needs
from edgepress.hardware.soc import Soc

# --- changes ----------------------------------------------------------------------------------------------------------
# Changes that make a model smaller, applied to its shape: what each stage or setting would leave.
#
# Each is named by the options that make it, and only what the stages' own plans accept is offered.


State = tuple[ModelShape, Request]

GROUP = 32  # as `--group`
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


# --- levers -----------------------------------------------------------------------------------------------------------


# Where more than two levers must be pulled, all are pulled and then eased in this order, so that what is named first
# is left as far as it can be: what costs most quality, by the tables of the papers behind the stages.
_EASED_FIRST = (
    "N:M pattern", "layers", "weight bits", "vocabulary", "context", "KV precision", "embedding bits", "adapter rank",
    "prefill chunk",
)  # fmt: skip
_COARSE = 6  # steps of a long lever that are tried together with every step of another


@dataclass(frozen=True)
class Worth:
    """One lever alone: the most it can save, and the mildest step that is enough, if one is."""

    lever: str
    now: str
    furthest: str
    saved_bytes: int
    enough: str | None


@dataclass(frozen=True)
class Levers:
    """Levers by the bytes they can save, and the smallest change that fits."""

    ranked: tuple[Worth, ...]
    smallest: tuple[str, ...]  # steps in words; empty where nothing is enough
    spread: tuple[str, ...]  # another way: every lever pulled, then eased; empty where it is the same
    needs_then: dict[str, int]  # bytes by role after the smallest change, or with every lever at its end
    missing_then: dict[str, int]  # bytes by role that are missing even then
    options: str = ""  # of `compress`, that make the smallest change and nothing else
    options_for: str = ""  # what the options of stages must be given to, if it is not this model

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def find_levers(shape: ModelShape, soc: Soc, request: Request) -> Levers:
    """Rank the levers of a model that does not fit, and find the smallest change that makes it fit.

    Smallest is: the fewest levers; among those, the least bytes given up. Above two levers: a change of which no part
    can be eased alone.
    """
    search = _Search(soc, (shape, request), levers(shape, soc, request))
    ranked = sorted((search.worth(lever) for lever in search.all), key=lambda x: -x.saved_bytes)
    chosen = search.smallest()
    spread = [] if chosen is None else search.eased([(x, x.steps[-1]) for x in search.all])
    after = search.planned(chosen if chosen is not None else [(x, x.steps[-1]) for x in search.all])
    by_role, missing = after.by_role(), after.short(soc)
    steps = tuple(lever.how(step) for lever, step in chosen or ())
    others = tuple(lever.how(step) for lever, step in spread)
    spread_words = others if set(others) != set(steps) else ()
    options = recipe_options(steps, shape) if steps else ""
    return Levers(tuple(ranked), steps, spread_words, by_role, missing, options, _options_for(shape))


def _options_for(shape: ModelShape) -> str:
    if shape.grid is not None:
        return "the model from before it was quantised"
    adapted = any(x.adapted for block in shape.blocks for x in block.linears)
    return "the model without its adapter" if adapted else ""


Choice = list[tuple[Lever, Any]]


class _Search:
    def __init__(self, soc: Soc, start: State, found: list[Lever]) -> None:
        self.soc, self.start, self.all = soc, start, found
        self.before = sum(self.planned([]).by_role().values())

    def planned(self, choice: Choice) -> Needs:
        """Needs after a choice of steps."""
        state = self.start
        for lever, step in choice:
            state = lever.apply(state, step)
        return needs(state[0], self.soc, state[1])

    def fits(self, choice: Choice) -> bool:
        """Whether a choice that the stages can carry out makes the model fit."""
        pulled = {"", *(lever.name for lever, _ in choice)}
        if any(lever.needs not in pulled for lever, _ in choice):
            return False
        return not self.planned(choice).short(self.soc)

    def saved(self, choice: Choice) -> int:
        return self.before - sum(self.planned(choice).by_role().values())

    def worth(self, lever: Lever) -> Worth:
        furthest = lever.steps[-1]
        step = self.mildest(lever, [])
        enough = None if step is None else lever.how(step)
        return Worth(lever.name, lever.now, lever.how(furthest), self.saved([(lever, furthest)]), enough)

    def mildest(self, lever: Lever, others: Choice) -> Any | None:
        """The mildest step that fits together with other steps; each step needs no more than the one before."""
        steps = lever.steps
        if not self.fits([*others, (lever, steps[-1])]):
            return None
        low, high = 0, len(steps) - 1
        while low < high:
            middle = (low + high) // 2
            if self.fits([*others, (lever, steps[middle])]):
                high = middle
            else:
                low = middle + 1
        return steps[low]

    def smallest(self) -> Choice | None:
        everything: Choice = [(lever, lever.steps[-1]) for lever in self.all]
        if not everything or not self.fits(everything):
            return None
        for candidates in (self.singles(), self.pairs()):
            fitting = [(self.saved(choice), place, choice) for place, choice in enumerate(candidates)]
            if fitting:
                return min(fitting, key=lambda entry: entry[:2])[2]
        return self.eased(everything)

    def singles(self) -> Iterator[Choice]:
        for lever in self.all:
            step = self.mildest(lever, [])
            if step is not None:
                yield [(lever, step)]

    def pairs(self) -> Iterator[Choice]:
        for one, other in combinations(self.all, 2):
            if not self.fits([(one, one.steps[-1]), (other, other.steps[-1])]):
                continue
            # The longer lever is bisected against a few steps of the shorter.
            short, long = sorted((one, other), key=lambda lever: len(lever.steps))
            for step in _coarse(short.steps):
                found = self.mildest(long, [(short, step)])
                if found is not None:
                    yield [(short, step), (long, found)]

    def eased(self, choice: Choice) -> Choice:
        """Every lever at its end, then each in turn let back as far as the rest allows.

        Twice: what another needed may be free to go once that is gone.
        """
        for name in _EASED_FIRST * 2:
            held = next((entry for entry in choice if entry[0].name == name), None)
            if held is None:
                continue
            others = [entry for entry in choice if entry[0].name != name]
            if self.fits(others):
                choice = others
                continue
            step = self.mildest(held[0], others)
            choice = [(held[0], step) if entry is held else entry for entry in choice]
        return choice


def _coarse(steps: Sequence[Any]) -> list[Any]:
    if len(steps) <= _COARSE:
        return list(steps)
    places = {round(i * (len(steps) - 1) / (_COARSE - 1)) for i in range(_COARSE)}
    return [steps[place] for place in sorted(places)]

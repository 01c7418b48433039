"""What would have to give for a model to fit: every lever's worth, and the smallest change that is enough.

Nothing is guessed: each candidate is a changed shape or setting, planned anew with `needs`. Which change hurts the
model's quality least is not judged here; `compress fit` searches with a proxy of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from edgepress.checkpoints.shape import ModelShape
from edgepress.hardware.changes import Lever, State, levers, recipe_options
from edgepress.hardware.needs import Needs, Request, needs
from edgepress.hardware.soc import Soc

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

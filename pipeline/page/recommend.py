"""Which checkpoint to take, and whether the bytes of each stage paid: by the rules below, from measured numbers alone.

Take: among the checkpoints under the budget the one of least perplexity, the smaller where two are equal. The budget is
the chip's memory for weights; a checkpoint is under it where the chip's verdict says that it fits, or, where its files
are not here to judge, where its packed bytes are no more than that memory. With none under the budget: the knee.

Knee: of the front (checkpoints that no other beats in both bytes and quality), the one farthest below the straight line
from its first to its last, in bytes and mean loss (log of the perplexity), both scaled to 0..1 between these two. The
criterion of Satopaa et al., "Finding a 'Kneedle' in a Haystack", ICDCSW 2011, section III, for discrete points.

Paid: a stage that changes bytes is compared with what the study has at equal or fewer bytes and does not share the
stage run. Where one of those is better, its bytes did not pay; where there are some and none is better, they paid;
where there is none, its price stands as it is, in perplexity for each MiB.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from edgepress.checkpoints.errors import PlanError
from edgepress.eval.results import Difference, compare
from edgepress.pipeline.page.read import SOURCE, Choice, Configuration, StageRun, Study

Rule = Literal["budget", "knee", "alone", "no knee", "nothing", "beaten"]
_MIB = 2**20


@dataclass(frozen=True)
class Taken:
    """The checkpoint to take."""

    choice: Choice
    rule: Rule
    among: tuple[Choice, ...]  # those under the budget, or the front

    @property
    def run(self) -> StageRun:
        return self.choice.run


def take(study: Study, room: int, fits: Mapping[str, bool]) -> Taken | None:
    """room: bytes of the budget; fits: the chip's verdict by fingerprint, where one was made.

    None where nothing was measured alike with a finite perplexity.
    """
    choices = study.comparable
    if not choices:
        return None
    if all(c.run.stage == SOURCE for c in choices):
        return Taken(choices[0], "nothing", tuple(choices))
    under = [c for c in choices if fits.get(c.run.fingerprint, study.size(c.run) <= room)]
    if under:
        return Taken(min(under, key=lambda c: (study.quality(c.run), study.size(c.run))), "budget", tuple(under))
    front = study.front
    compressed = [c for c in front if c.run.stage != SOURCE]
    if not compressed:
        return Taken(front[0], "beaten", tuple(front))
    if len(compressed) == 1:
        return Taken(compressed[0], "alone", tuple(front))
    place = knee([(study.size(c.run), _loss(study, c.run)) for c in front])
    if place is None:
        return Taken(compressed[0], "no knee", tuple(front))
    return Taken(front[place], "knee", tuple(front))


def knee(points: Sequence[tuple[float, float]]) -> int | None:
    """The place of the point farthest below the chord, the first of equals; None where none lies below it.

    points: (bytes, loss) of a front, the smallest first.
    """
    (left, top), (right, bottom) = points[0], points[-1]
    if right == left or top == bottom:
        return None
    below = [1 - (x - left) / (right - left) - (y - bottom) / (top - bottom) for x, y in points]
    place = max(range(len(points)), key=lambda i: below[i])
    return place if below[place] > 1e-9 else None


def _loss(study: Study, run: StageRun) -> float:
    return study.quality(run) if study.by_bits else math.log(run.perplexity)


def chain_of(study: Study, choice: Choice) -> Configuration:
    """The configuration that a choice is of; with all the stages of a run, those after the choice too."""
    if study.kind == "run":
        return study.configurations[0]
    return next(c for c in study.configurations if c.name == choice.name and c.result is choice.run)


# --- whether bytes paid -----------------------------------------------------------------------------------------------


Outcome = Literal["paid", "did not pay", "price", "cost nothing", "changed nothing"]


@dataclass(frozen=True)
class Worth:
    """What a stage run did to bytes and quality, and what the study has instead."""

    before: StageRun
    after: StageRun
    nbytes: int  # after less before
    change: float  # of quality; more is worse
    outcome: Outcome
    rival: Choice | None = None  # the best other checkpoint of at most its bytes
    rivals: int = 0
    difference: Difference | None = None  # window by window, where both were evaluated

    @property
    def per_mib(self) -> float | None:
        """Perplexity given up or won for each MiB, where one was exchanged for the other."""
        return abs(self.change) / (abs(self.nbytes) / _MIB) if self.nbytes * self.change < 0 else None


def worth(study: Study, before: StageRun, after: StageRun) -> Worth | None:
    """None where the two were measured in different ways or one has no finite perplexity."""
    nbytes, change = study.size(after) - study.size(before), study.quality(after) - study.quality(before)
    if before.measured != after.measured or not math.isfinite(change):
        return None
    others = _others(study, after)
    at_most = [c for c in others if study.size(c.run) <= study.size(after)]
    best = min(at_most, key=lambda c: (study.quality(c.run), study.size(c.run)), default=None)
    better = best if best is not None and study.quality(best.run) < study.quality(after) else None
    if nbytes == 0 and change == 0:
        outcome: Outcome = "changed nothing"
    elif nbytes <= 0 and change <= 0:
        outcome = "cost nothing"
    elif nbytes >= 0 and change >= 0:
        outcome = "did not pay"  # what it started from is no larger and no worse
    elif better is not None:
        outcome = "did not pay"
    else:
        # Those within the bytes that a stage started from are rivals of its parent, not of what it added.
        at_most = [c for c in at_most if nbytes < 0 or study.size(c.run) > study.size(before)]
        best = min(at_most, key=lambda c: (study.quality(c.run), study.size(c.run)), default=None)
        outcome = "paid" if at_most else "price"
    shown = best if nbytes * change < 0 else None
    return Worth(before, after, nbytes, change, outcome, shown, len(at_most), difference(study, before, after))


def _others(study: Study, run: StageRun) -> list[Choice]:
    """The comparable candidates that are neither on the way to a stage run nor made from it."""
    through = [c for c in study.configurations if any(r.fingerprint == run.fingerprint for r in c.runs)]
    kin = {r.fingerprint for c in through for r in c.runs[: 1 + _place(c, run)]}
    made_from = {r.fingerprint for c in through for r in c.runs[_place(c, run) :]}
    return [c for c in study.comparable if c.run.measured == run.measured and c.run.fingerprint not in kin | made_from]


def _place(configuration: Configuration, run: StageRun) -> int:
    return next(i for i, r in enumerate(configuration.runs) if r.fingerprint == run.fingerprint)


def difference(study: Study, a: StageRun, b: StageRun) -> Difference | None:
    """Of b's perplexity from a's, paired window by window; None where `compress eval` did not measure both alike."""
    one, two = (study.evaluated.get(run.fingerprint, {}).get("perplexity") for run in (a, b))
    if one is None or two is None or a.fingerprint == b.fingerprint:
        return None
    try:
        return next((d for d in compare(one, two) if d.metric == "perplexity"), None)
    except PlanError:  # other windows, another protocol, or no loss for each window
        return None

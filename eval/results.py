"""Numbers with their uncertainty, and paired comparisons of two checkpoints.

No torch here. Intervals are 95 %: Wilson's for proportions, the percentile bootstrap over items for other means
and for perplexity, whose items are windows or rows.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgepress.checkpoints.errors import NumericsError, PlanError

Transform = Literal["mean", "exp"]
RESAMPLES = 2000
_NUMBERS = ("value", "low", "high")  # nan where there is none


@dataclass(frozen=True)
class Score:
    """One number. unit '%' means that value, low and high are fractions of one, shown times 100."""

    metric: str
    value: float
    low: float
    high: float
    n: int  # items behind it
    interval: str  # how low and high were found, in words; empty where there is none
    protocol: str = ""  # what must be the same for two numbers of this name to be comparable
    higher_is_better: bool = True
    unit: str = ""
    # value = transform(sum(values) / sum(weights)); all empty where the number is not a mean over items
    ids: tuple[str, ...] = ()
    values: tuple[float, ...] = ()
    weights: tuple[float, ...] = ()
    transform: Transform = "mean"


@dataclass(frozen=True)
class Result:
    """What a task gives: its main score first, and whatever else is worth reading."""

    task: str
    scores: tuple[Score, ...]
    seconds: float
    details: dict[str, Any] = field(default_factory=dict)

    def to_dict(self, items: bool = False) -> dict[str, Any]:
        """As JSON, where a number that was not measured is null; items: with the value of each item."""
        data = asdict(self)
        for score in data["scores"]:
            score |= {name: None if math.isnan(score[name]) else score[name] for name in _NUMBERS}
            if not items:
                for name in ("ids", "values", "weights"):
                    del score[name]
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Result:
        scores = []
        for score in data["scores"]:
            lists = {name: tuple(score.get(name, ())) for name in ("ids", "values", "weights")}
            numbers = {name: math.nan if score[name] is None else score[name] for name in _NUMBERS}
            scores.append(Score(**(score | lists | numbers)))
        return cls(**(data | {"scores": tuple(scores)}))


def not_measured(metric: str, reason: str, higher_is_better: bool = True) -> Score:
    """A number that cannot be had here, and why: it has its place in the table all the same."""
    return Score(metric, math.nan, math.nan, math.nan, 0, "", f"{metric} not measured: {reason}", higher_is_better)


def proportion(metric: str, ids: Sequence[str], hits: Sequence[float], protocol: str) -> Score:
    """The share of items that hold (values 0 or 1), with Wilson's interval: right for few hits and few items too."""
    from scipy.stats import binomtest  # takes a second to import

    n, p = len(hits), sum(hits) / len(hits)
    found = binomtest(round(sum(hits)), n).proportion_ci(method="wilson")
    return Score(
        metric,
        p,
        min(p, float(found.low)),  # rounding must not put the value outside its interval
        max(p, float(found.high)),
        n,
        f"95 %, Wilson over {n} items",
        protocol,
        unit="%",
        ids=tuple(ids),
        values=tuple(map(float, hits)),
        weights=(1.0,) * n,
    )


def mean(
    metric: str,
    ids: Sequence[str],
    values: Sequence[float],
    protocol: str,
    *,
    weights: Sequence[float] | None = None,
    transform: Transform = "mean",
    higher_is_better: bool = True,
    unit: str = "",
    of: str = "items",
) -> Score:
    """transform(sum(values) / sum(weights)) with the percentile bootstrap over items."""
    parts = tuple(map(float, weights)) if weights is not None else (1.0,) * len(values)
    low, high = bootstrap(values, parts, transform)
    return Score(
        metric,
        combine(values, parts, transform),
        low,
        high,
        len(values),
        f"95 %, bootstrap over {len(values)} {of}",
        protocol,
        higher_is_better,
        unit,
        tuple(ids),
        tuple(map(float, values)),
        parts,
        transform,
    )


def combine(values: Sequence[float], weights: Sequence[float], transform: Transform) -> float:
    ratio = math.fsum(values) / math.fsum(weights)
    return exp_of(ratio) if transform == "exp" else ratio


def exp_of(loss: float) -> float:
    """Perplexity of a mean loss in nats. Raises NumericsError where it is no number or above the largest float."""
    if not math.isfinite(loss) or loss > math.log(sys.float_info.max):
        raise NumericsError(f"the mean loss is {loss:.4g} nats a token, of which there is no finite perplexity")
    return math.exp(loss)


def resampled(
    values: Sequence[float], weights: Sequence[float], transform: Transform, seed: int = 0
) -> NDArray[np.float64]:
    """The statistic (RESAMPLES,) on samples drawn from the items with replacement; one seed, one sequence of draws.

    Two sets of values over the same items, resampled with the same seed, are paired.
    """
    # Not scipy.stats.bootstrap: it refuses a single item, and its sums round otherwise, so that results
    # kept from before would differ in their last digit.
    v, w = np.asarray(values, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    generator = np.random.default_rng(seed)
    statistics = np.empty(RESAMPLES)
    for k in range(RESAMPLES):
        drawn = generator.integers(len(v), size=len(v))
        statistics[k] = v[drawn].sum() / w[drawn].sum()
    return np.exp(statistics) if transform == "exp" else statistics


def bootstrap(values: Sequence[float], weights: Sequence[float], transform: Transform) -> tuple[float, float]:
    """The 95 % percentile interval."""
    low, high = np.quantile(resampled(values, weights, transform), [0.025, 0.975])
    return float(low), float(high)


# --- paired comparison ------------------------------------------------------------------------------------------------
# Whether two checkpoints differ by more than noise, item by item; no torch.
#
# Both answered the same items, so what is resampled or tested is the difference on each item, which is far less noisy
# than two separate intervals.


@dataclass(frozen=True)
class Difference:
    task: str
    metric: str
    a: float
    b: float
    low: float  # of b - a, 95 %
    high: float
    p: float  # two-sided; nan where the test gives an interval only
    test: str
    n: int
    within_noise: bool
    b_is_better: bool  # of the values measured, noise or not
    protocol: str
    unit: str

    @property
    def difference(self) -> float:
        return self.b - self.a

    def to_dict(self) -> dict[str, Any]:
        data = asdict(self) | {"difference": self.difference}
        return data | {"p": None if math.isnan(self.p) else self.p}


def compare(a: Result, b: Result) -> list[Difference]:
    """One difference for each metric that both results have.

    Metrics without a value for each item (a corpus's BLEU, sizes) stay out beside metrics that have them. Raises
    PlanError where the results are not of the same items or were not measured the same way.
    """
    others = {score.metric: score for score in b.scores}
    shared = [(score, others[score.metric]) for score in a.scores if score.metric in others]
    paired = [(one, two) for one, two in shared if one.values or two.values]
    differences = [_difference(a.task, one, two) for one, two in paired or shared]
    if not differences:
        raise PlanError(f"{a.task}: the two have no metric in common")
    return differences


def _difference(task: str, a: Score, b: Score) -> Difference:
    if a.protocol != b.protocol:
        raise PlanError(f"{task}, {a.metric}: measured by different protocols: '{a.protocol}' and '{b.protocol}'")
    if not a.values or not b.values:
        raise PlanError(f"{task}, {a.metric}: no value for each item is kept, so the two cannot be paired")
    if a.ids != b.ids:
        shared = len(set(a.ids) & set(b.ids))
        raise PlanError(
            f"{task}, {a.metric}: not the same items ({len(a.ids)} and {len(b.ids)}, {shared} in common): other "
            "questions, another text, or a tokenizer that splits it otherwise"
        )
    draws = resampled(b.values, b.weights, b.transform) - resampled(a.values, a.weights, a.transform)
    low, high = map(float, np.quantile(draws, [0.025, 0.975]))
    if set(a.values) | set(b.values) <= {0.0, 1.0}:
        p, test = mcnemar(a.values, b.values), "exact McNemar"
        noise = p >= 0.05
    else:
        p, test = math.nan, "paired bootstrap"
        noise = low <= 0 <= high
    better = b.value > a.value if a.higher_is_better else b.value < a.value
    return Difference(task, a.metric, a.value, b.value, low, high, p, test, a.n, noise, better, a.protocol, a.unit)


def mcnemar(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Two-sided exact p of the items on which exactly one of the two is right, against a fair coin."""
    only_a = sum(x > y for x, y in zip(a, b, strict=True))
    only_b = sum(y > x for x, y in zip(a, b, strict=True))
    if only_a == only_b:
        return 1.0
    from scipy.stats import binomtest  # takes a second to import

    return float(binomtest(only_a, only_a + only_b).pvalue)

"""A measured number with its uncertainty, and the item by item values that a paired comparison needs.

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

from edgepress.checkpoints.errors import NumericsError

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

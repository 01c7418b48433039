"""Whether two checkpoints differ by more than noise, item by item; no torch.

Both answered the same items, so what is resampled or tested is the difference on each item, which is far less noisy
than two separate intervals.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from edgepress.checkpoints.errors import PlanError
from edgepress.eval.results import Result, Score, resampled


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

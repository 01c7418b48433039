"""Intervals and paired tests against formulas of their own and against brute force."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from edgepress.checkpoints.errors import PlanError
from edgepress.eval.results import Result, Score, bootstrap, compare, mcnemar, mean, proportion

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(("hits", "n"), [(0, 5), (1, 5), (5, 5), (37, 1000), (500, 1000), (1, 1)])
def test_wilson_s_interval_ends_where_the_share_is_196_of_its_own_errors_away(hits: int, n: int) -> None:
    score = proportion("accuracy", [str(i) for i in range(n)], [1] * hits + [0] * (n - hits), "p")
    z, p = 1.959963984540054, hits / n
    ends = np.roots([1 + z**2 / n, -2 * p - z**2 / n, p**2])  # (p - x)^2 = z^2 x (1 - x) / n
    assert (score.low, score.high) == pytest.approx((ends.min(), ends.max()), abs=1e-7)
    assert score.low <= score.value <= score.high


def test_bootstrap_of_a_weighted_mean_agrees_with_the_delta_method() -> None:
    generator = np.random.default_rng(3)
    weights = generator.integers(20, 60, size=400).astype(float)
    values = weights * 3.0 + generator.normal(0, 20, size=400)
    score = mean("perplexity", [str(i) for i in range(400)], list(values), "p", weights=list(weights), transform="exp")
    ratio = values.sum() / weights.sum()
    error = math.sqrt(((values - ratio * weights) ** 2).sum()) / weights.sum()
    assert score.value == pytest.approx(math.exp(ratio), rel=1e-12)
    assert math.log(score.low) == pytest.approx(ratio - 1.96 * error, abs=0.25 * error)
    assert math.log(score.high) == pytest.approx(ratio + 1.96 * error, abs=0.25 * error)


def test_bootstrap_draws_the_distribution_that_enumeration_gives() -> None:
    values = [0.0, 1.0, 5.0]
    every = sorted(sum(draw) / 3 for draw in itertools.product(values, repeat=3))
    low, high = bootstrap(values, [1.0] * 3, "mean")
    assert low == pytest.approx(every[0]) and high == pytest.approx(every[-1])  # 1 of 27 is above 2.5 %
    assert bootstrap(values, [1.0] * 3, "mean") == (low, high)  # the same draws each time


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (0, 6), (3, 9), (10, 10), (40, 70)])
def test_mcnemar_is_the_exact_binomial_test(only_a: int, only_b: int) -> None:
    a = (1.0,) * (only_a + 5) + (0.0,) * (only_b + 7)
    b = (0.0,) * only_a + (1.0,) * 5 + (1.0,) * only_b + (0.0,) * 7
    n, fewer = only_a + only_b, min(only_a, only_b)
    expected = min(1.0, 2 * sum(math.comb(n, k) for k in range(fewer + 1)) / 2**n)
    assert mcnemar(a, b) == pytest.approx(expected)


def results(a: list[float], b: list[float]) -> tuple[Result, Result]:
    ids = [str(i) for i in range(len(a))]
    one, two = (Result("task", (mean("loss", ids, v, "p", higher_is_better=False),), 1.0) for v in (a, b))
    return one, two


def test_a_small_but_steady_difference_is_found_by_pairing_though_intervals_overlap() -> None:
    generator = np.random.default_rng(0)
    a = list(generator.normal(10, 3, size=200))
    one, two = results(a, [x - 0.2 + e for x, e in zip(a, generator.normal(0, 0.1, size=200), strict=True)])
    assert one.scores[0].low < two.scores[0].value < one.scores[0].high
    (found,) = compare(one, two)
    assert not found.within_noise and found.b_is_better
    assert found.low < -0.2 < found.high and found.high < 0


def test_noise_is_called_noise() -> None:
    generator = np.random.default_rng(1)
    one, two = results(list(generator.normal(10, 3, size=50)), list(generator.normal(10, 3, size=50)))
    (found,) = compare(one, two)
    assert found.within_noise and found.low < 0 < found.high


def test_right_and_wrong_are_tested_by_mcnemar() -> None:
    ids = [str(i) for i in range(40)]
    a = Result("t", (proportion("acc", ids, [1] * 30 + [0] * 10, "p"),), 1.0)
    b = Result("t", (proportion("acc", ids, [1] * 20 + [0] * 20, "p"),), 1.0)
    (found,) = compare(a, b)
    assert found.test == "exact McNemar" and found.p == pytest.approx(2 / 2**10)
    assert not found.within_noise and not found.b_is_better
    assert found.difference == pytest.approx(-0.25)
    assert compare(a, a)[0].within_noise


def test_what_cannot_be_paired_says_why() -> None:
    ids = ["1", "2"]
    score = proportion("acc", ids, [1, 0], "5-shot")
    a = Result("t", (score,), 1.0)
    with pytest.raises(PlanError, match=r"'5-shot' and '0-shot'"):
        compare(a, Result("t", (replace(score, protocol="0-shot"),), 1.0))
    with pytest.raises(PlanError, match="1 in common"):
        compare(a, Result("t", (replace(score, ids=("2", "3")),), 1.0))
    bare = Score("acc", 0.5, math.nan, math.nan, 2, "", "5-shot")
    with pytest.raises(PlanError, match="no value for each item"):
        compare(a, Result("t", (bare,), 1.0))
    with pytest.raises(PlanError, match="no metric in common"):
        compare(a, Result("t", (replace(score, metric="f1"),), 1.0))


def test_a_result_goes_through_json_and_back() -> None:
    one, _ = results([1.0, 2.0], [1.0, 3.0])
    assert Result.from_dict(one.to_dict(items=True)) == one
    assert "values" not in one.to_dict()["scores"][0]

"""Intervals against loops, closed forms, scipy and published tables; and by how often they cover the truth."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq

from bias_audit.stats import bootstrap_ratios, newcombe, wilson

Array = npt.NDArray[Any]


def naive_bootstrap(
    numerator: Array, denominator: Array, strata: Array, *, resamples: int, level: float, seed: int
) -> tuple[float, float]:
    """One hypothesis, one resample at a time, one image at a time."""
    rng = np.random.default_rng(seed)
    by_stratum = [[i for i, s in enumerate(strata) if s == stratum] for stratum in sorted(set(strata.tolist()))]
    draws = []
    for _ in range(resamples):
        chosen = [int(i) for members in by_stratum for i in rng.choice(members, len(members), replace=True)]
        below = sum(denominator[i] for i in chosen)
        if below:
            draws.append(sum(numerator[i] for i in chosen) / below)
    low, high = np.percentile(draws, [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)


@pytest.mark.parametrize("level", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("case", ["mean", "ratio", "members"])
def test_bootstrap_is_the_loop_over_resamples(level: float, case: str) -> None:
    rng = np.random.default_rng(3)
    strata = np.array(["a"] * 8 + ["b"] * 16)
    numerator = np.where(strata == "a", 0.0, 1.0) + rng.exponential(1, 24)
    denominator = {
        "mean": np.ones(24),
        "ratio": rng.uniform(0.1, 1, 24),
        "members": (np.arange(24) % 3 == 0).astype(float),
    }[case]
    numerator = np.where(denominator > 0, numerator, 0)
    found = bootstrap_ratios(numerator[:, None], denominator[:, None], strata, seed=0, level=level, resamples=20000)
    assert found.value[0] == pytest.approx(math.fsum(numerator) / math.fsum(denominator), rel=1e-12)
    low, high = naive_bootstrap(numerator, denominator, strata, resamples=4000, level=level, seed=1)
    # Two Monte Carlo estimates of the same quantiles.
    spread = 0.08 * naive_width_at_95(numerator, denominator, strata)
    assert found.low[0] == pytest.approx(low, abs=spread)
    assert found.high[0] == pytest.approx(high, abs=spread)


def naive_width_at_95(numerator: Array, denominator: Array, strata: Array) -> float:
    low, high = naive_bootstrap(numerator, denominator, strata, resamples=1000, level=0.95, seed=2)
    return high - low


def test_scipy_agrees_on_a_mean() -> None:
    sample = np.random.default_rng(0).gamma(2, 1, 40)
    peer = scipy.stats.bootstrap(
        (sample,), np.mean, method="percentile", n_resamples=20000, rng=np.random.default_rng(1), vectorized=True
    ).confidence_interval
    found = bootstrap_ratios(sample[:, None], np.ones((40, 1)), np.zeros(40), seed=0, resamples=20000)
    assert found.value[0] == pytest.approx(sample.mean(), rel=1e-12)
    width = peer.high - peer.low
    assert found.low[0] == pytest.approx(peer.low, abs=0.03 * width)
    assert found.high[0] == pytest.approx(peer.high, abs=0.03 * width)


@pytest.mark.parametrize("kind", ["mean", "ratio"])
def test_intervals_cover_the_truth_as_often_as_they_say(kind: str) -> None:
    rng = np.random.default_rng(11)
    simulations, n = 300, 40
    # One simulation is one hypothesis; what is drawn for each is independent.
    denominators = np.ones((n, simulations)) if kind == "mean" else rng.uniform(0.2, 1, (n, simulations))
    numerators = denominators * 2 + rng.normal(0, 1, (n, simulations))
    found = bootstrap_ratios(numerators, denominators, np.zeros(n), seed=0, resamples=400)
    assert 0.90 <= ((found.low <= 2) & (found.high >= 2)).mean() <= 0.99
    # And they are not wide for nothing: a value three standard errors off is mostly left out.
    off = 2 + 3 / math.sqrt(n) / denominators.mean()
    assert (found.high < off).mean() > 0.75
    half = bootstrap_ratios(numerators, denominators, np.zeros(n), seed=0, resamples=400, level=0.5)
    assert 0.40 <= ((half.low <= 2) & (half.high >= 2)).mean() <= 0.58


def test_strata_keep_their_size_in_every_resample() -> None:
    strata = np.repeat(["doctor", "nurse", "only one"], [4, 9, 1])
    constant = np.where(strata == "doctor", 1.0, np.where(strata == "nurse", 5.0, -2.0))[:, None]
    within = bootstrap_ratios(constant, np.ones_like(constant), strata, seed=0)
    assert within.low[0] == within.value[0] == within.high[0] == (4 * 1 + 9 * 5 - 2) / 14
    across = bootstrap_ratios(constant, np.ones_like(constant), np.zeros(14), seed=0)
    assert across.value[0] == within.value[0] and across.high[0] - across.low[0] > 1


def test_a_group_of_fixed_size_varies_by_its_values_only() -> None:
    """A group that is a stratum of its own gets the same interval as if the others were not there."""
    rng = np.random.default_rng(5)
    values, strata = rng.normal(0, 1, 30), np.repeat([0, 1], [12, 18])
    members = (strata == 0).astype(float)
    whole = bootstrap_ratios((values * members)[:, None], members[:, None], strata, seed=0, resamples=20000)
    alone = bootstrap_ratios(values[:12, None], np.ones((12, 1)), np.zeros(12), seed=1, resamples=20000)
    assert whole.value[0] == pytest.approx(alone.value[0], rel=1e-12)
    width = alone.high[0] - alone.low[0]
    assert whole.low[0] == pytest.approx(alone.low[0], abs=0.04 * width)
    assert whole.high[0] == pytest.approx(alone.high[0], abs=0.04 * width)


def test_a_ratio_is_that_of_the_sums_and_not_the_mean_of_the_ratios() -> None:
    numerators, denominators = np.array([[1.0], [1.0]]), np.array([[0.01], [1.99]])
    found = bootstrap_ratios(numerators, denominators, np.zeros(2), seed=0)
    assert found.value[0] == pytest.approx(1)
    # The resamples hold the first twice, both, or the second twice.
    assert found.low[0] == pytest.approx(1 / 1.99) and found.high[0] == pytest.approx(1 / 0.01)


def test_a_hypothesis_without_images_is_nan_and_silent() -> None:
    numerators = np.array([[0.0, 1.0], [0.0, 3.0]])
    denominators = np.array([[0.0, 1.0], [0.0, 1.0]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = bootstrap_ratios(numerators, denominators, np.zeros(2), seed=0)
        nothing = bootstrap_ratios(numerators[:, :1], denominators[:, :1], np.zeros(2), seed=0)
    assert np.isnan([found.value[0], found.low[0], found.high[0]]).all()
    assert (found.value[1], found.low[1], found.high[1]) == (2, 1, 3)
    assert np.isnan([*nothing.value, *nothing.low, *nothing.high]).all()


def test_resamples_that_miss_a_small_hypothesis_say_nothing() -> None:
    denominators = np.zeros((5, 1))
    denominators[2] = 1
    found = bootstrap_ratios(denominators * 7, denominators, np.zeros(5), seed=0)
    assert (found.value[0], found.low[0], found.high[0]) == (7, 7, 7)


def test_the_seed_decides_and_the_global_generator_is_left_alone() -> None:
    values = np.random.default_rng(0).normal(0, 1, (20, 3))
    before = np.random.get_state()[1].tolist()  # noqa: NPY002
    first, again, other = (
        bootstrap_ratios(values, np.ones_like(values), np.zeros(20), seed=seed, resamples=200) for seed in (4, 4, 5)
    )
    assert np.array_equal(first.low, again.low) and np.array_equal(first.high, again.high)
    assert np.array_equal(first.value, other.value)
    assert (first.low != other.low).all() and (first.high != other.high).all()
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002


@given(seed=st.integers(0, 2**32 - 1), order=st.permutations(range(5)))
@settings(max_examples=25, deadline=None)
def test_hypotheses_do_not_depend_on_each_other(seed: int, order: list[int]) -> None:
    rng = np.random.default_rng(seed)
    numerators, denominators = rng.normal(0, 1, (12, 5)), rng.uniform(0.5, 1, (12, 5))
    denominators[:, 3] = numerators[:, 3] = 0
    strata = rng.integers(0, 3, 12)
    found = bootstrap_ratios(numerators, denominators, strata, seed=1, resamples=100)
    turned = bootstrap_ratios(numerators[:, order], denominators[:, order], strata, seed=1, resamples=100)
    for one, two in zip(found, turned, strict=True):
        np.testing.assert_allclose(two, one[order], rtol=1e-9, atol=1e-12)
    alone = bootstrap_ratios(numerators[:, [2]], denominators[:, [2]], strata, seed=1, resamples=100)
    np.testing.assert_allclose([alone.low[0], alone.high[0]], [found.low[2], found.high[2]], rtol=1e-9, atol=1e-12)
    # Percentiles of ratios lie within the ratios of the single images.
    ratios = numerators[:, 2] / denominators[:, 2]
    assert ratios.min() - 1e-9 <= found.low[2] <= found.high[2] <= ratios.max() + 1e-9


def z_of(level: float) -> float:
    return float(scipy.stats.norm.ppf((1 + level) / 2))


def wilson_by_formula(successes: int, n: int, level: float) -> tuple[float, float]:
    z, p = z_of(level), successes / n
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return centre - half, centre + half


def wilson_by_inversion(successes: int, n: int, level: float) -> tuple[float, float]:
    """The proportions that a score test just does not reject."""
    z, p = z_of(level), successes / n

    def excess(q: float) -> float:
        return (p - q) ** 2 - z**2 * q * (1 - q) / n

    # 0 and 1 are themselves roots where none or all succeed: step over them.
    low = 0.0 if successes == 0 else brentq(excess, 0, min(p, 1 - 1e-12), xtol=1e-14)
    high = 1.0 if successes == n else brentq(excess, max(p, 1e-12), 1, xtol=1e-14)
    return float(low), float(high)


@pytest.mark.parametrize("level", [0.5, 0.95, 0.99, 1 - 0.05 / 3])
@pytest.mark.parametrize(("successes", "n"), [(0, 1), (1, 1), (0, 20), (20, 20), (3, 10), (81, 263), (500, 1000)])
def test_wilson_is_its_formula_and_the_inverted_score_test(successes: int, n: int, level: float) -> None:
    value, low, high = wilson(successes, n, level)
    assert value == successes / n
    assert (low, high) == pytest.approx(wilson_by_formula(successes, n, level), abs=1e-12)
    assert (low, high) == pytest.approx(wilson_by_inversion(successes, n, level), abs=1e-9)
    peer = scipy.stats.binomtest(successes, n).proportion_ci(level, "wilson")
    assert (low, high) == pytest.approx((peer.low, peer.high), abs=1e-12)


def test_wilson_has_a_width_where_all_succeed_and_is_nan_without_trials() -> None:
    z = z_of(0.95)
    assert wilson(10, 10) == pytest.approx((1, 10 / (10 + z**2), 1))
    assert wilson(0, 10) == pytest.approx((0, 0, z**2 / (10 + z**2)))
    assert all(math.isnan(x) for x in wilson(0, 0))


@given(n=st.integers(1, 300), share=st.floats(0, 1), level=st.floats(0.5, 0.999))
@settings(max_examples=60, deadline=None)
def test_wilson_holds_its_value_lies_in_0_1_and_mirrors(n: int, share: float, level: float) -> None:
    successes = round(share * n)
    value, low, high = wilson(successes, n, level)
    assert 0 <= low <= value + 1e-12 and value - 1e-12 <= high <= 1
    assert wilson(n - successes, n, level) == pytest.approx((1 - value, 1 - high, 1 - low), abs=1e-12)


# Newcombe, Statistics in Medicine 17 (1998) 873-890, Table II, method 10, examples (a) to (h).
TABLE = [
    ((56, 70), (48, 80), 0.0524, 0.3339),
    ((9, 10), (3, 10), 0.1705, 0.8090),
    ((6, 7), (2, 7), 0.0582, 0.8062),
    ((5, 56), (0, 29), -0.0381, 0.1926),
    ((0, 10), (0, 20), -0.1611, 0.2775),
    ((0, 10), (0, 10), -0.2775, 0.2775),
    ((10, 10), (0, 20), 0.6791, 1.0),
    ((10, 10), (0, 10), 0.6075, 1.0),
]


@pytest.mark.parametrize(("first", "second", "low", "high"), TABLE)
def test_newcombe_is_his_table(first: tuple[int, int], second: tuple[int, int], low: float, high: float) -> None:
    found = newcombe(first, second)
    assert found[0] == pytest.approx(first[0] / first[1] - second[0] / second[1])
    assert found[1:] == pytest.approx((low, high), abs=5.01e-5)


counts = st.integers(1, 200).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@given(first=counts, second=counts, level=st.sampled_from([0.8, 0.95, 1 - 0.05 / 3]))
@settings(max_examples=80, deadline=None)
def test_newcombe_is_made_of_inverted_score_tests(
    first: tuple[int, int], second: tuple[int, int], level: float
) -> None:
    p, q = first[0] / first[1], second[0] / second[1]
    (p_low, p_high), (q_low, q_high) = wilson_by_inversion(*first, level), wilson_by_inversion(*second, level)
    low = p - q - math.sqrt((p - p_low) ** 2 + (q_high - q) ** 2)
    high = p - q + math.sqrt((p_high - p) ** 2 + (q - q_low) ** 2)
    assert newcombe(first, second, level) == pytest.approx((p - q, low, high), abs=1e-7)
    value, turned_low, turned_high = newcombe(second, first, level)
    assert (value, turned_low, turned_high) == pytest.approx((q - p, -high, -low), abs=1e-7)


def test_newcombe_covers_the_difference_as_often_as_it_says() -> None:
    """Exactly, over all outcomes of 30 and 25 trials: no simulation."""
    covered, p, q = 0.0, 0.85, 0.6
    for x in range(31):
        for y in range(26):
            _, low, high = newcombe((x, 30), (y, 25))
            if low <= p - q <= high:
                covered += float(scipy.stats.binom.pmf(x, 30, p) * scipy.stats.binom.pmf(y, 25, q))
    assert 0.93 <= covered <= 0.98


def test_newcombe_without_trials_is_nan() -> None:
    for first, second in (((0, 0), (3, 4)), ((3, 4), (0, 0))):
        assert all(math.isnan(x) for x in newcombe(first, second))

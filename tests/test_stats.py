"""Intervals against loops, closed forms, scipy and published tables; and by how often they cover the truth."""

from __future__ import annotations

import math
import tracemalloc
import warnings
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq

from bias_audit import stats
from bias_audit.stats import LEAST_FOR_BCA, bootstrap_columns, bootstrap_ratios, newcombe, permutation_test, wilson

Array = npt.NDArray[Any]


def naive_interval(
    numerator: Array, denominator: Array, strata: Array, *, resamples: int, level: float, seed: int
) -> tuple[float, float]:
    """The expanded BCa interval of one hypothesis, one resample at a time, one image at a time."""
    rng = np.random.default_rng(seed)
    by_stratum = [[i for i, s in enumerate(strata) if s == stratum] for stratum in sorted(set(strata.tolist()))]
    value = sum(numerator) / sum(denominator)
    draws = []
    for _ in range(resamples):
        chosen = [int(i) for members in by_stratum for i in rng.choice(members, len(members), replace=True)]
        below = sum(denominator[i] for i in chosen)
        if below:
            draws.append(sum(numerator[i] for i in chosen) / below)
    # The jackknife leaves out one image; the rest of its stratum stands for the whole of it.
    cubes = squares = 0.0
    for members in by_stratum:
        size, left_out = len(members), []
        for out in members:
            weight = np.ones(len(numerator))
            weight[members] = size / (size - 1)
            weight[out] = 0
            left_out.append((weight @ numerator) / (weight @ denominator))
        influence = [(size - 1) * (np.mean(left_out) - x) for x in left_out]
        cubes += sum(u**3 for u in influence) / size**3
        squares += sum(u**2 for u in influence) / size**2
    acceleration = cubes / (6 * squares**1.5)
    used = [i for i in range(len(numerator)) if denominator[i] > 0]
    filled = sum(len(set(used) & set(members)) / len(members) for members in by_stratum)
    freedom = len(used) - max(1.0, filled)
    z = math.sqrt(len(used) / freedom) * scipy.stats.t.ppf((1 + level) / 2, freedom)
    shift = scipy.stats.norm.ppf(np.mean([(d < value) + (d == value) / 2 for d in draws]))
    shares = [
        scipy.stats.norm.cdf(shift + (shift + end) / (1 - acceleration * (shift + end)))
        if len(used) >= LEAST_FOR_BCA
        else scipy.stats.norm.cdf(end)
        for end in (-z, z)
    ]
    low, high = np.percentile(draws, [100 * share for share in shares])
    return float(low), float(high)


@pytest.mark.parametrize("level", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("case", ["mean", "ratio", "members", "few members"])
def test_bootstrap_is_the_loop_over_resamples(level: float, case: str) -> None:
    rng = np.random.default_rng(3)
    strata = np.array(["a"] * 8 + ["b"] * 16)
    numerator = np.where(strata == "a", 0.0, 1.0) + rng.exponential(1, 24) ** 1.5
    denominator = {
        "mean": np.ones(24),
        "ratio": rng.uniform(0.1, 1, 24),
        "members": (np.arange(24) % 2 == 0).astype(float),
        "few members": (np.arange(24) % 3 == 0).astype(float),
    }[case]
    numerator = np.where(denominator > 0, numerator, 0)
    found = bootstrap_ratios(numerator[:, None], denominator[:, None], strata, seed=0, level=level, resamples=20000)
    assert found.value[0] == pytest.approx(math.fsum(numerator) / math.fsum(denominator), rel=1e-12)
    low, high = naive_interval(numerator, denominator, strata, resamples=4000, level=level, seed=1)
    # Two Monte Carlo estimates of the same quantiles, and two kinds of jackknife.
    low_95, high_95 = naive_interval(numerator, denominator, strata, resamples=1000, level=0.95, seed=2)
    spread = 0.06 * (high_95 - low_95)
    assert found.low[0] == pytest.approx(low, abs=spread)
    assert found.high[0] == pytest.approx(high, abs=spread)


def expanded(level: float, n: int, freedom: int) -> float:
    """The level at which an interval without expansion is as wide as the expanded one at `level`."""
    z = math.sqrt(n / freedom) * scipy.stats.t.ppf((1 + level) / 2, freedom)
    return float(2 * scipy.stats.norm.cdf(z) - 1)


def peer_interval(data: tuple[Array, ...], statistic: Any, level: float, **how: Any) -> tuple[float, float]:
    found = scipy.stats.bootstrap(
        data, statistic, confidence_level=level, n_resamples=20000, rng=np.random.default_rng(1), batch=2000, **how
    ).confidence_interval
    return float(found.low), float(found.high)


SAMPLES = {
    "normal": np.random.default_rng(0).normal(2, 1, 40),
    "skewed": np.random.default_rng(1).lognormal(0, 1.2, 40),
    "skewed down": -np.random.default_rng(2).gamma(0.5, 1, 25),
    "hits": (np.arange(40) % 8 == 0).astype(float),
    "ten": np.random.default_rng(3).exponential(1, 10),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_scipy_agrees_on_a_mean(name: str) -> None:
    sample = SAMPLES[name]
    n = len(sample)
    found = bootstrap_ratios(sample[:, None], np.ones((n, 1)), np.zeros(n), seed=0, resamples=20000)
    low, high = peer_interval((sample,), np.mean, expanded(0.95, n, n - 1), method="BCa", vectorized=True)
    width = high - low
    assert found.value[0] == pytest.approx(sample.mean(), rel=1e-12)
    assert found.low[0] == pytest.approx(low, abs=0.03 * width)
    assert found.high[0] == pytest.approx(high, abs=0.03 * width)
    # What skewness does to the interval is more than the tolerance.
    if name.startswith("skewed"):
        plain = peer_interval((sample,), np.mean, expanded(0.95, n, n - 1), method="percentile", vectorized=True)
        assert max(abs(plain[0] - low), abs(plain[1] - high)) > 0.06 * width


def test_scipy_agrees_on_a_ratio_and_on_strata() -> None:
    rng = np.random.default_rng(4)
    below = rng.gamma(2, 1, 40)
    above = below * rng.lognormal(0, 0.7, 40)
    found = bootstrap_ratios(above[:, None], below[:, None], np.zeros(40), seed=0, resamples=20000)
    low, high = peer_interval(
        (above, below), lambda a, b, axis: a.sum(axis) / b.sum(axis), expanded(0.95, 40, 39), paired=True, method="BCa"
    )
    assert (found.low[0], found.high[0]) == pytest.approx((low, high), abs=0.03 * (high - low))

    first, second = rng.lognormal(0, 1.2, 30), 20 + rng.normal(0, 1, 15)
    found = bootstrap_ratios(
        np.concatenate([first, second])[:, None], np.ones((45, 1)), np.repeat([0, 1], [30, 15]), seed=0, resamples=20000
    )
    low, high = peer_interval(
        (first, second),
        lambda a, b, axis: (a.sum(axis) + b.sum(axis)) / 45,
        expanded(0.95, 45, 43),
        method="BCa",
    )
    assert (found.low[0], found.high[0]) == pytest.approx((low, high), abs=0.03 * (high - low))


def test_of_fewer_than_ten_images_skewness_is_not_corrected() -> None:
    sample = SAMPLES["ten"][:9]
    found = bootstrap_ratios(sample[:, None], np.ones((9, 1)), np.zeros(9), seed=0, resamples=20000)
    level = expanded(0.95, 9, 8)
    low, high = peer_interval((sample,), np.mean, level, method="percentile", vectorized=True)
    assert (found.low[0], found.high[0]) == pytest.approx((low, high), abs=0.03 * (high - low))
    corrected = peer_interval((sample,), np.mean, level, method="BCa", vectorized=True)
    assert corrected[1] - high > 0.04 * (high - low)


def test_a_correction_that_would_leave_the_value_outside_is_not_made() -> None:
    """The draws' median lies further from the value than a narrow interval reaches."""
    sample = np.random.default_rng(0).lognormal(0, 3, 12)
    found = bootstrap_ratios(sample[:, None], np.ones((12, 1)), np.zeros(12), seed=0, level=0.05, resamples=20000)
    level = expanded(0.05, 12, 11)
    low, high = peer_interval((sample,), np.mean, level, method="percentile", vectorized=True)
    corrected = peer_interval((sample,), np.mean, level, method="BCa", vectorized=True)
    whole = bootstrap_ratios(sample[:, None], np.ones((12, 1)), np.zeros(12), seed=0)
    spread = 0.01 * (whole.high[0] - whole.low[0])
    # The percentile interval, drawn out to the value.
    assert high < sample.mean() < corrected[0] - spread and abs(low - corrected[0]) > 2 * spread
    assert found.low[0] == pytest.approx(low, abs=spread)
    assert found.high[0] == found.value[0] == pytest.approx(sample.mean(), rel=1e-12)


@pytest.mark.parametrize("kind", ["mean", "ratio", "skewed"])
def test_intervals_cover_the_truth_as_often_as_they_say(kind: str) -> None:
    rng = np.random.default_rng(11)
    simulations, n = 1500, 20
    # One simulation is one hypothesis; what is drawn for each is independent.
    denominators = rng.uniform(0.2, 1, (n, simulations)) if kind == "ratio" else np.ones((n, simulations))
    noise = rng.exponential(1, (n, simulations)) - 1 if kind == "skewed" else rng.normal(0, 1, (n, simulations))
    numerators = denominators * 2 + noise
    found = bootstrap_ratios(numerators, denominators, np.zeros(n), seed=0, resamples=1000)
    above, below = (found.low > 2).mean(), (found.high < 2).mean()
    # A standard error of these shares is 0.006; without expansion a normal mean is missed in 0.075.
    assert 0.03 < above + below < (0.085 if kind == "skewed" else 0.067)
    # Without correction the skewed mean is missed in 0.01 above and in 0.07 below.
    assert above > 0.012 and below < (0.062 if kind == "skewed" else 0.04)
    # And they are not wide for nothing: a value four standard errors off is mostly left out.
    off = 2 + 4 / math.sqrt(n) / denominators.mean()
    assert (found.high < off).mean() > 0.75
    half = bootstrap_ratios(numerators, denominators, np.zeros(n), seed=0, resamples=1000, level=0.5)
    assert 0.44 <= ((half.low <= 2) & (half.high >= 2)).mean() <= 0.56


def test_strata_cost_the_intervals_no_coverage() -> None:
    """Five strata of four, whose own bootstrap variance is a quarter too small; and a few images of a large stratum."""
    rng, simulations = np.random.default_rng(12), 1500
    strata = np.repeat(np.arange(5), 4)
    values = rng.normal(0, 1, (20, simulations)) + 3 * strata[:, None]
    full = bootstrap_ratios(values, np.ones_like(values), strata, seed=0, resamples=1000)
    assert 0.92 < ((full.low <= 6) & (full.high >= 6)).mean() < 0.97

    members = rng.random((80, simulations)) < 0.2
    values = rng.normal(6, 1, (80, simulations)) * members
    few = bootstrap_ratios(values, members, np.arange(80) % 8, seed=0, resamples=1000)
    assert 0.92 < ((few.low <= 6) & (few.high >= 6)).mean() < 0.97


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
    assert (found.value[1], found.low[1], found.high[1]) == (2, pytest.approx(1), pytest.approx(3))
    assert np.isnan([*nothing.value, *nothing.low, *nothing.high]).all()


@pytest.mark.parametrize("shape", [(0, 3), (5, 0), (0, 0)])
def test_no_images_or_no_hypotheses_are_no_error(shape: tuple[int, int]) -> None:
    nothing, strata = np.zeros(shape), np.zeros(shape[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = bootstrap_ratios(nothing, nothing, strata, seed=0)
        tested = permutation_test(nothing, nothing > 0, strata, seed=0, permutations=9)
    for numbers in (*found, *tested):
        assert numbers.shape == shape[1:] and np.isnan(numbers).all()


def test_resamples_that_miss_a_small_hypothesis_say_nothing() -> None:
    denominators = np.zeros((5, 1))
    denominators[2] = 1
    found = bootstrap_ratios(denominators * 7, denominators, np.zeros(5), seed=0)
    assert (found.value[0], found.low[0], found.high[0]) == (7, 7, 7)


def test_resamples_that_miss_a_hypothesis_in_several_strata_say_nothing_either() -> None:
    members = np.zeros((20, 1))
    members[[0, 10]] = 1
    values = np.where(np.arange(20) < 10, 0.3, 3.7)[:, None] * members
    found = bootstrap_ratios(values, members, np.repeat([0, 1], 10), seed=0)
    assert found.value[0] == pytest.approx(2)
    assert (found.low[0], found.high[0]) == pytest.approx((0.3, 3.7), rel=1e-6)


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
        np.testing.assert_allclose(two, one[order], rtol=1e-6, atol=1e-6)
    alone = bootstrap_ratios(numerators[:, [2]], denominators[:, [2]], strata, seed=1, resamples=100)
    np.testing.assert_allclose([alone.low[0], alone.high[0]], [found.low[2], found.high[2]], rtol=1e-6, atol=1e-6)
    # Percentiles of ratios lie within the ratios of the single images.
    ratios = numerators[:, 2] / denominators[:, 2]
    assert ratios.min() - 1e-6 <= found.low[2] <= found.high[2] <= ratios.max() + 1e-6


def test_single_precision_costs_nothing_that_shows() -> None:
    """Against the same resamples in double precision, with values whose sums dwarf their differences."""
    rng, sizes = np.random.default_rng(8), (50, 30, 120)
    strata = np.repeat(range(3), sizes)
    below = rng.uniform(0.5, 1, (200, 4))
    above = below * 1e4 + rng.lognormal(0, 1, (200, 4)) * np.array([1, 1e-3, 1e3, 1e-4])
    found = bootstrap_ratios(above, below, strata, seed=5, resamples=2000)
    counts = stats._counts(sizes, 2000, np.random.default_rng(5)).T.astype(np.float64)
    draws = (counts @ above) / (counts @ below)
    z = math.sqrt(200 / 197) * scipy.stats.t.ppf(0.975, 197)
    for h in range(4):
        residual = above[:, h] - found.value[h] * below[:, h]
        residual -= np.array([residual[strata == s].mean() for s in strata])
        a = (residual**3).sum() / (residual**2).sum() ** 1.5 / 6
        # A draw may come as close to the value as rounding does.
        off = (draws[:, h] - found.value[h]) / (math.sqrt((residual**2).sum()) / below[:, h].sum())
        shift = scipy.stats.norm.ppf(((off < -1e-4) + (np.abs(off) <= 1e-4) / 2).mean())
        shares = [scipy.stats.norm.cdf(shift + (shift + e) / (1 - a * (shift + e))) for e in (-z, z)]
        low, high = np.quantile(draws[:, h], shares)
        assert (found.low[h], found.high[h]) == pytest.approx((low, high), rel=0, abs=2e-5 * (high - low))


def test_counts_draw_each_image_of_a_stratum_alike() -> None:
    counts = stats._counts((1, 4, 20), 3000, np.random.default_rng(0)).T
    assert (counts[:, :1] == 1).all() and (counts[:, 1:5].sum(1) == 4).all() and (counts[:, 5:].sum(1) == 20).all()
    # Each count is binomial: mean 1 and variance 1 - 1 / size, here with five standard errors.
    for columns, size in ((counts[:, 1:5], 4), (counts[:, 5:], 20)):
        assert columns.mean(0) == pytest.approx(1, abs=5 / math.sqrt(3000))
        assert columns.var(0) == pytest.approx(1 - 1 / size, abs=0.2)
        assert np.corrcoef(columns.T)[0, 1:] == pytest.approx(-1 / (size - 1), abs=0.1)


def test_subsets_are_what_zeros_outside_them_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole strata, neighbours or not, parts of strata, strata of one image, no image; in parts as well."""
    rng, n = np.random.default_rng(4), 90
    strata = rng.permutation(np.r_[np.arange(80) % 7, 100 + np.arange(10)])
    x, y = rng.lognormal(0, 1, (n, 3)), rng.uniform(0.5, 1, (n, 3))
    x[strata == 3], y[strata == 3] = 0, 0
    subsets = np.stack(
        [
            np.ones(n, dtype=bool),
            strata == 2,
            np.isin(strata, [1, 5, 6]),
            rng.random(n) < 0.4,
            strata >= 100,
            strata == 104,
            strata == 3,
            np.zeros(n, dtype=bool),
        ],
        axis=1,
    )
    zeroed = [np.concatenate([np.where(s[:, None], of, 0) for s in subsets.T], axis=1) for of in (x, y)]
    expected = bootstrap_ratios(*zeroed, strata, seed=3, resamples=400)
    for block, most in ((stats._BLOCK, stats._MOST_DRAWS), (n * 2, 400 * 2)):
        monkeypatch.setattr(stats, "_BLOCK", block)
        monkeypatch.setattr(stats, "_MOST_DRAWS", most)
        found = bootstrap_ratios(x, y, strata, seed=3, resamples=400, subsets=subsets)
        for one, two in zip(expected, found, strict=True):
            np.testing.assert_allclose(one, two, rtol=2e-6, atol=1e-6)
    assert np.isfinite(expected.low[:15]).all() and np.isnan(expected.value[-6:]).all()


def test_large_sets_are_drawn_in_parts_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    values, strata = rng.normal(0, 1, (60, 4)), np.arange(60) % 3
    members = rng.random((60, 4)) < 0.3
    whole = bootstrap_ratios(values, np.ones_like(values), strata, seed=2, resamples=501)
    tested = permutation_test(values, members, strata, seed=2, permutations=501)
    monkeypatch.setattr(stats, "_BLOCK", 60 * 50)
    parts = bootstrap_ratios(values, np.ones_like(values), strata, seed=2, resamples=501)
    for one, two in zip(whole, parts, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-6, atol=1e-6)
    assert np.array_equal(tested.p, permutation_test(values, members, strata, seed=2, permutations=501).p)


def test_strata_of_one_image_are_drawn_from_together() -> None:
    """One by one they could not vary: an audit set with one image a class would look certain of everything."""
    values = np.random.default_rng(0).normal(0, 1, (30, 1))
    together = bootstrap_ratios(values, np.ones((30, 1)), np.zeros(30), seed=0)
    alone = bootstrap_ratios(values, np.ones((30, 1)), np.arange(30), seed=0)
    assert alone.high[0] - alone.low[0] > 0.3
    assert np.array_equal(np.concatenate(alone), np.concatenate(together))
    # Larger strata keep their size: the two kinds differ by 100, which never shows.
    mixed = np.concatenate([values, values + 100])
    found = bootstrap_ratios(mixed, np.ones((60, 1)), np.r_[np.arange(30), np.full(30, -7)], seed=0)
    assert 0.2 < found.high[0] - found.low[0] < 2


skewed = st.lists(st.sampled_from([0.0, 0.0, 0.0, 1.0, 1.5, -2.0, 100.0]), min_size=2, max_size=25)


@given(values=skewed, level=st.sampled_from([0.3, 0.8, 0.95, 0.999]))
@settings(max_examples=100, deadline=None)
def test_an_interval_holds_its_value_and_lies_within_the_data(values: list[float], level: float) -> None:
    column = np.array(values)[:, None]
    n = len(values)
    found = bootstrap_ratios(column, np.ones((n, 1)), np.zeros(n), seed=0, level=level, resamples=200)
    assert found.value[0] == pytest.approx(np.mean(values))
    assert min(values) - 1e-5 <= found.low[0] <= found.value[0] <= found.high[0] <= max(values) + 1e-5
    if len(set(values)) == 1:
        assert found.low[0] == found.value[0] == found.high[0]
    # One value among many others that are all the same is drawn or not: seldom drawn is not never.
    turned = bootstrap_ratios(-column, np.ones((n, 1)), np.zeros(n), seed=0, level=level, resamples=200)
    assert (-turned.high[0], -turned.low[0]) == pytest.approx((found.low[0], found.high[0]), abs=1e-4)


@pytest.mark.parametrize("constant", [0.1, 1 / 3, 1e8 + 0.1, 1e-30])
def test_a_constant_has_an_interval_of_no_width(constant: float) -> None:
    rng = np.random.default_rng(0)
    below = rng.uniform(0.1, 3, (77, 1))
    for under in (np.ones((77, 1)), below):
        found = bootstrap_ratios(constant * under, under, np.arange(77) % 5, seed=0, resamples=300)
        assert found.low[0] == found.value[0] == found.high[0] == pytest.approx(constant, rel=1e-12)


def test_constants_that_cancel_leave_no_rounding_error_that_looks_like_variation() -> None:
    strata = np.arange(60) % 2
    values = np.where(strata == 0, 0.1, -0.1)[:, None] + np.array([[0.0, 1e-9]])
    found = bootstrap_ratios(values, np.ones((60, 2)), strata, seed=0, resamples=300)
    assert found.value[0] == pytest.approx(0, abs=1e-15)
    assert (found.low == found.value).all() and (found.high == found.value).all()


# Permutation tests.


def naive_difference(values: Array, members: Array, strata: Array) -> float:
    """The mean of the strata's differences by the weights that the docstring names."""
    above = below = 0.0
    for s in set(strata.tolist()):
        inside, outside = values[(strata == s) & members], values[(strata == s) & ~members]
        if len(inside) and len(outside):
            weight = len(inside) * len(outside) / (len(inside) + len(outside))
            above += weight * (inside.mean() - outside.mean())
            below += weight
    return above / below


def exact_p(values: Array, members: Array, strata: Array, alternative: str) -> float:
    """Over every way to choose as many members in each stratum."""
    observed = naive_difference(values, members, strata)
    ways = [
        [set(c) for c in combinations(np.flatnonzero(strata == s), int(members[strata == s].sum()))]
        for s in sorted(set(strata.tolist()))
    ]
    reached = 0
    for chosen in product(*ways):
        drawn = naive_difference(values, np.isin(np.arange(len(values)), list(set().union(*chosen))), strata)
        statistic, least = (drawn, observed) if alternative == "greater" else (abs(drawn), abs(observed))
        reached += statistic >= least - 1e-12
    return reached / math.prod(map(len, ways))


@pytest.mark.parametrize("alternative", ["two-sided", "greater"])
@pytest.mark.parametrize("seed", range(4))
def test_permutations_are_those_within_strata(alternative: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    strata = np.array([0, 1, 0, 1, 0, 1, 1, 0, 1, 2])
    members = np.array([1, 0, 1, 1, 0, 0, 1, 0, 0, 1], dtype=bool)
    # Whole numbers tie, and the strata differ by more than the members.
    values = rng.integers(0, 4, 10) + 10.0 * strata + members
    found = permutation_test(
        values[:, None], members[:, None], strata, seed=seed, alternative=alternative, permutations=8000
    )
    assert found.difference[0] == pytest.approx(naive_difference(values, members, strata), rel=1e-12)
    p = exact_p(values, members, strata, alternative)
    assert found.p[0] == pytest.approx(p, abs=4.5 * math.sqrt(p * (1 - p) / 8000) + 1 / 8000)


@pytest.mark.parametrize("alternative", ["two-sided", "greater"])
def test_scipy_agrees_on_a_permutation_test(alternative: Any) -> None:
    rng = np.random.default_rng(5)
    # As many members as others: the permutations are symmetric, and both ways of being two-sided are the same.
    values, members = rng.exponential(1, (24, 3)), np.arange(24)[:, None] % 2 == np.zeros((1, 3))
    values[:, 1] += 0.7 * members[:, 1]
    values[:, 2] -= 0.7 * members[:, 2]
    found = permutation_test(values, members, np.zeros(24), seed=0, alternative=alternative, permutations=9999)
    for h in range(3):
        inside, outside = values[members[:, h], h], values[~members[:, h], h]
        peer = scipy.stats.permutation_test(
            (inside, outside),
            lambda a, b, axis: a.mean(axis) - b.mean(axis),
            alternative=alternative,
            n_resamples=9999,
            rng=np.random.default_rng(1),
        )
        assert found.difference[h] == pytest.approx(peer.statistic, rel=1e-12)
        assert found.p[h] == pytest.approx(peer.pvalue, abs=4.5 * math.sqrt(0.5 / 9999))


def test_p_values_are_uniform_where_nothing_differs_and_least_where_all_does() -> None:
    rng = np.random.default_rng(3)
    members = rng.random((60, 400)) < 0.3
    strata = np.arange(60) % 2
    values = rng.exponential(1, (60, 400)) + strata[:, None]
    clean = permutation_test(values, members, strata, seed=0, permutations=499).p
    for share in (0.05, 0.2, 0.5, 0.8):
        assert (clean <= share).mean() == pytest.approx(share, abs=0.08)
    planted = permutation_test(values + 5 * members, members, strata, seed=0, permutations=499).p
    assert (planted == 1 / 500).mean() > 0.95


def test_strata_explain_a_difference_that_is_theirs() -> None:
    """Members are mostly of one class, and the classes differ: only without strata does it look like theirs."""
    rng = np.random.default_rng(0)
    strata = np.repeat([0, 1], 50)
    members = (rng.random(100) < np.where(strata == 0, 0.1, 0.8))[:, None]
    values = (3.0 * strata + rng.normal(0, 1, 100))[:, None]
    assert permutation_test(values, members, np.zeros(100), seed=0, permutations=999).p[0] == 1 / 1000
    within = permutation_test(values, members, strata, seed=0, permutations=999)
    assert within.p[0] > 0.05 and abs(within.difference[0]) < 1


def test_where_nothing_can_be_compared_a_permutation_test_is_nan() -> None:
    values = np.array([[1.0, 1, 1, 7], [2, 2, 2, 7], [4, 4, 4, 7], [8, 8, 8, 7]])
    members = np.array([[False, True, True, True], [False, True, True, False]] * 2)
    members[:, 2] = [True, True, False, False]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = permutation_test(values, members, np.array(["a", "a", "b", "b"]), seed=0, permutations=99)
    # Nobody, everybody, nobody beside others in their stratum; and values that are all the same.
    assert np.isnan(found.difference[:3]).all() and np.isnan(found.p[:3]).all()
    assert found.difference[3] == 0 and found.p[3] == 1
    # The mean of thirty times 0.1 is not 0.1.
    constant = permutation_test(np.full((30, 1), 0.1), np.arange(30)[:, None] < 7, np.zeros(30), seed=0)
    assert constant.difference[0] == 0 and constant.p[0] == 1


def test_one_sided_means_greater() -> None:
    members = np.arange(40)[:, None] < np.array([[15, 15]])
    values = np.where(members, [[1.0, -1.0]], 0.0) + np.random.default_rng(0).normal(0, 0.1, (40, 2))
    found = permutation_test(values, members, np.zeros(40), seed=0, alternative="greater", permutations=199)
    assert found.p.tolist() == [1 / 200, 1]
    both = permutation_test(values, members, np.zeros(40), seed=0, permutations=199)
    assert both.p.tolist() == [1 / 200, 1 / 200]


def test_permutations_follow_their_seed_and_no_other_hypothesis() -> None:
    rng = np.random.default_rng(0)
    values, members = rng.normal(0, 1, (30, 4)), rng.random((30, 4)) < 0.4
    before = np.random.get_state()[1].tolist()  # noqa: NPY002
    first, again, other = (
        permutation_test(values, members, np.zeros(30), seed=seed, permutations=99).p for seed in (4, 4, 5)
    )
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    alone = permutation_test(values[:, [2]], members[:, [2]], np.zeros(30), seed=4, permutations=99)
    assert alone.p[0] == first[2]
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002


# Proportions.


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


def test_a_hypothesis_more_takes_four_bytes_of_each_image() -> None:
    """What is worked out in float64, and what is drawn, is made and let go in blocks."""
    n = 100_000
    strata = np.arange(n) % 4
    subsets = strata[:, None] == np.arange(4)

    def peak(hypotheses: int) -> int:
        values = np.random.default_rng(0).random((n, hypotheses), dtype=np.float32)

        def columns(images: Array, some: slice) -> tuple[Array, Array]:
            return values[images, some], np.broadcast_to(np.float32(1), (len(images), some.stop - some.start))

        tracemalloc.start()
        # More resamples than one block holds.
        bootstrap_columns(columns, hypotheses, strata, seed=0, resamples=60, subsets=subsets)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    assert peak(48) - peak(24) < 24 * n * 5


def test_columns_made_when_needed_are_those_given_at_once() -> None:
    """With more images than are worked out at once, in strata that no order of theirs follows."""
    rng = np.random.default_rng(0)
    values, weights = rng.random((7_000, 40)), rng.random((7_000, 40))[:, rng.integers(0, 5, 40)]
    strata, asked = rng.integers(0, 3, 7_000), []

    def columns(images: Array, some: slice) -> tuple[Array, Array]:
        asked.append(some)
        return values[images, some], weights[images, some]

    found = bootstrap_columns(columns, 40, strata, seed=0, resamples=300)
    assert len(asked) > 1
    for one in (0, 17, 39):
        alone = bootstrap_ratios(values[:, [one]], weights[:, [one]], strata, seed=0, resamples=300)
        np.testing.assert_allclose([of[one] for of in found], np.ravel(alone), rtol=1e-6)


# The benchmark of all this.


def test_the_benchmark_writes_what_it_measured(tmp_path: Path) -> None:
    from benchmarks.statistics import LARGE, NUMBERS, PEER, SIZES, main

    measured = main(["--rounds", "1", "--scale", "0.01", "--threads", "1", "--out", str(tmp_path)])
    assert {LARGE, PEER} < {s.contender for s in measured.series}
    assert all(x is not None and x > 0 for s in measured.series for x in s.seconds)
    assert len(measured.coverage) == 2 * len(NUMBERS) * len(SIZES)
    assert all(0 <= c.above + c.below <= c.intervals == 40 for c in measured.coverage)
    # Whatever its kind, an interval of normal numbers holds the mean more often than not.
    assert all(c.above + c.below < 15 for c in measured.coverage if c.numbers == "normal")
    page, raw = (next(tmp_path.glob(f"statistics-*.{ending}")).read_text() for ending in ("md", "json"))
    assert raw.count('"contender"') == len(measured.series)
    assert page.count("\n| normal |") == len(SIZES) and LARGE in page

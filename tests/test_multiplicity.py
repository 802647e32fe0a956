"""p-values against the normal distribution, corrections against scipy, definitions and simulations."""

from __future__ import annotations

import math
import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from bias_audit.multiplicity import exceedance_p, holm, samples_to_settle

NAN = float("nan")
p_values = st.lists(st.floats(0, 1), max_size=7)


@pytest.mark.parametrize("value", [-2.0, 0.0, 0.3, 1.7])
@pytest.mark.parametrize("error", [0.01, 0.4, 3.0])
@pytest.mark.parametrize("limit", [-1.0, 0.1, 0.3])
def test_exceedance_is_the_tail_of_the_normal_distribution(value: float, error: float, limit: float) -> None:
    reach = scipy.stats.norm.ppf(0.975) * error
    bound = value - reach if value > limit else value + reach
    expected = scipy.stats.norm.sf((value - limit) / error)
    assert exceedance_p(value, bound, limit) == pytest.approx(expected, rel=1e-9, abs=1e-300)


def test_exceedance_agrees_with_the_interval() -> None:
    """Below 0.025 where the lower bound lies above the limit, above 0.975 where the upper one lies below."""
    value, low, high = 0.4, 0.1, 0.5
    assert exceedance_p(value, low, low) == pytest.approx(0.025, rel=1e-12)
    assert exceedance_p(value, low, low - 0.01) < 0.025 < exceedance_p(value, low, low + 0.01)
    assert exceedance_p(value, high, high) == pytest.approx(0.975, rel=1e-12)
    # The interval reaches further down than up, so as far below its value less is certain.
    assert exceedance_p(value, low, value - 0.05) > 1 - exceedance_p(value, high, value + 0.05)
    assert exceedance_p(value, low, value) == exceedance_p(value, high, value) == 0.5


@given(value=st.floats(-5, 5), reach=st.floats(0.01, 5), limit=st.floats(-5, 5))
@settings(max_examples=50, deadline=None)
def test_exceedance_and_its_opposite_share_all_chance(value: float, reach: float, limit: float) -> None:
    bound = value - reach if value > limit else value + reach
    above, below = exceedance_p(value, bound, limit), exceedance_p(-value, -bound, -limit)
    assert above + below == pytest.approx(1)
    assert (above < 0.5) == (value > limit) or abs(value - limit) < 1e-12


def test_an_interval_of_no_width_leaves_no_doubt() -> None:
    assert exceedance_p(0.2, 0.2, 0.1) == 0
    assert exceedance_p(0.1, 0.1, 0.1) == 1
    assert exceedance_p(0.05, 0.05, 0.1) == 1


def test_far_from_the_limit_p_is_small_and_not_0() -> None:
    assert 0 < exceedance_p(20, 20 - 1.96, 0) < 1e-80


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("number", [NAN, math.inf, -math.inf])
def test_what_is_no_number_is_never_compared(place: int, number: float) -> None:
    numbers = [0.2, 0.1, 0.1]
    numbers[place] = number
    with pytest.raises(ValueError, match="expected finite numbers"):
        exceedance_p(*numbers)


def naive_holm(ps: list[float]) -> list[float]:
    """By the closure principle: a hypothesis falls if each intersection that holds it does, by Bonferroni."""
    m = len(ps)
    closed = []
    for i in range(m):
        others = [j for j in range(m) if j != i]
        sets = [(i, *rest) for size in range(m) for rest in combinations(others, size)]
        closed.append(max(min(1.0, len(s) * min(ps[j] for j in s)) for s in sets))
    return closed


@given(ps=p_values)
@settings(max_examples=80, deadline=None)
def test_holm_is_the_closure_of_bonferroni(ps: list[float]) -> None:
    assert list(holm(ps)) == pytest.approx(naive_holm(ps), rel=1e-12, abs=0)


@given(ps=p_values, data=st.data())
@settings(max_examples=50, deadline=None)
def test_corrections_go_with_their_p_values(ps: list[float], data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(ps))))
    found = holm(ps)
    assert list(holm([ps[i] for i in order])) == [found[i] for i in order]
    assert all(p <= q <= 1 for p, q in zip(ps, found, strict=True))


def test_one_p_value_stays_and_none_gives_none() -> None:
    assert holm([0.03]) == (0.03,)
    assert holm([]) == ()


@pytest.mark.parametrize("wrong", [NAN, -0.01, 1.01, math.inf])
def test_what_is_no_p_value_is_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match=r"expected p-values between 0 and 1, got"):
        holm([0.5, wrong])


def test_holm_seldom_raises_a_false_alarm_and_finds_what_is_there() -> None:
    rng = np.random.default_rng(0)
    families, hypotheses = 1000, 20
    z = rng.normal(size=(families, hypotheses))
    plain = scipy.stats.norm.sf(z)
    alarms = np.array([min(holm(row)) <= 0.05 for row in plain.tolist()])
    assert alarms.mean() < 0.07
    # Uncorrected, most families of 20 raise one.
    assert (plain.min(1) <= 0.05).mean() > 0.5
    planted = scipy.stats.norm.sf(z + 5 * (np.arange(hypotheses) < 2))
    found = np.array([holm(row) for row in planted.tolist()]) <= 0.05
    assert found[:, :2].mean() > 0.95 and found[:, 2:].any(1).mean() < 0.07


@pytest.mark.parametrize(
    ("low", "high", "limit", "expected"),
    [
        (0.0, 0.4, 0.1, 400),
        (0.1, 0.4, 0.1, 100),
        (0.15, 0.4, 0.1, 25),
        # Below the limit it is the upper bound that counts.
        (0.1, 0.5, 0.3, 900),
        (0.19, 0.21, 0.1, 1),
    ],
)
def test_samples_to_settle_shrink_the_side_that_faces_the_limit(
    low: float, high: float, limit: float, expected: int
) -> None:
    # The last place of a quotient may lift a whole number by one.
    assert samples_to_settle(0.2, low, high, limit, 100) in (expected, expected + 1)


@given(value=st.floats(-1, 1), side=st.floats(0.01, 1), limit=st.floats(-1, 1), n=st.integers(2, 10**6))
@settings(max_examples=80, deadline=None)
def test_so_many_samples_settle_and_fewer_do_not(value: float, side: float, limit: float, n: int) -> None:
    needed = samples_to_settle(value, value - side, value + side, limit, n)
    distance = abs(value - limit)
    if needed is None:
        assert distance <= side / 999
    else:
        assert side * math.sqrt(n / needed) <= distance * (1 + 1e-9)
        assert needed <= 2 or side * math.sqrt(n / (needed - 1)) >= distance * (1 - 1e-9)


def test_nobody_gathers_a_million_times_the_images() -> None:
    assert samples_to_settle(0.1, 0.0, 0.2, 0.1, 100) is None
    assert samples_to_settle(0.1001, 0.0, 0.2, 0.1, 100) is None
    assert samples_to_settle(0.2, 0.2, 0.2, 0.2, 100) is None
    # But somebody may gather a quarter of them.
    assert samples_to_settle(0.1002, 0.0002, 0.2002, 0.1, 100) == pytest.approx(25_000_000, rel=1e-6)


def test_the_gate_may_import_it() -> None:
    code = "import sys, bias_audit.multiplicity; print(*({'numpy', 'scipy', 'torch', 'pydantic'} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == ""

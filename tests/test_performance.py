"""What is right for whom, recomputed in loops, beside fairlearn and SciPy; planted differences beside absent ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from cell_by_cell import SUBJECTS, Key, Z, by_key, cells_of, key
from fairlearn.metrics import demographic_parity_difference, equalized_odds_difference
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from scipy.stats import norm

from bias_audit.evidence.association import Alignment
from bias_audit.evidence.fairness import by_alignment, outcome_divergence, rate_differences
from bias_audit.evidence.performance import performance
from bias_audit.evidence.proportions import largest_difference, mean_proportion, minus
from bias_audit.stats import newcombe, wilson
from bias_audit.terms import Estimate, Subjects

BINARY = Subjects((), (("gender", ("female", "male")),), ("doctor", "nurse"))


def wilson_loop(hits: int, n: int, z: float = Z) -> tuple[float, float, float]:
    p = hits / n
    centre, half = (
        (p + z**2 / 2 / n) / (1 + z**2 / n),
        z * math.sqrt(p * (1 - p) / n + (z / 2 / n) ** 2) / (1 + z**2 / n),
    )
    return p, centre - half, centre + half


def gap_loop(counts: list[tuple[int, int]]) -> tuple[float, float, float]:
    """The widest difference, and how far apart any two may be; with Bonferroni over the pairs."""
    pairs = list(combinations(counts, 2))
    z = float(norm.ppf(1 - 0.025 / len(pairs)))
    differences, lows, highs = [], [], []
    for pair in pairs:
        worst, best = sorted(pair, key=lambda c: (c[0] / c[1], c))
        (p, p_low, p_high), (q, q_low, q_high) = wilson_loop(*best, z), wilson_loop(*worst, z)
        differences.append(p - q)
        lows.append(p - q - math.hypot(p - p_low, q_high - q))
        # Either may turn out to be the better one.
        highs += [p - q + math.hypot(p_high - p, q - q_low), q - p + math.hypot(p - p_low, q_high - q)]
    return max(differences), max(lows), max(highs)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_performance_is_the_loop_over_cells(seed: int) -> None:
    n = 120
    rng = np.random.default_rng(seed)
    labels, correct = rng.integers(0, 2, n), rng.random(n) < 0.7
    attributes = np.stack([rng.choice(["female", "male", ""], n), rng.choice(["a", "b", "c"], n)], axis=1)
    found = by_key(performance(correct, labels, attributes, SUBJECTS, np.ones(n, dtype=bool)))
    counts = {
        cell: (sum(bool(correct[i]) for i in images), len(images))
        for cell, images in cells_of(labels.tolist(), attributes).items()
    }
    expected: dict[Key, tuple[tuple[float, float, float], int]] = {
        ("accuracy", None, class_name, group, None): (wilson_loop(*count), count[1])
        for (class_name, group), count in counts.items()
    }
    for name, values in SUBJECTS.attributes:
        groups = [counts[c, f"{name}={v}"] for c in ("doctor", "nurse") for v in values]
        bounds = [wilson_loop(*count) for count in groups]
        worst = (min(b[0] for b in bounds), min(b[1] for b in bounds), min(b[2] for b in bounds))
        expected["worst_group_accuracy", None, None, name, None] = (worst, min(m for _, m in groups))
        for c in (None, "doctor", "nurse"):
            compared = [counts[c, f"{name}={v}"] for v in values]
            expected["accuracy_gap", None, c, name, None] = (gap_loop(compared), min(m for _, m in compared))
    assert found.keys() == expected.keys()
    for cell, (interval, count) in expected.items():
        e = found[cell]
        assert (e.value, e.low, e.high) == pytest.approx(interval, abs=1e-9) and (e.n, e.reason) == (count, "")


def table(cells: dict[tuple[int, str, str], tuple[int, int]]) -> tuple[Any, Any, Any]:
    """`correct`, `labels` and `attributes` with (right, all) images per (label, gender, site)."""
    rows = [(i < right, *cell) for cell, (right, n) in cells.items() for i in range(n)]
    correct, labels, genders, sites = zip(*rows, strict=True)
    return np.array(correct), np.array(labels), np.stack([genders, sites], axis=1)


@pytest.mark.parametrize(("right", "there"), [(20, True), (38, False)])
def test_a_planted_gap_is_found_and_an_absent_one_is_not(right: int, there: bool) -> None:
    correct, labels, attributes = table(
        {
            (0, "female", "a"): (right, 40),
            (0, "male", "b"): (38, 40),
            (1, "female", "b"): (30, 40),
            (1, "male", "a"): (30, 40),
        }
    )
    found = by_key(performance(correct, labels, attributes, SUBJECTS, np.ones(160, dtype=bool)))
    gap = found["accuracy_gap", None, "doctor", "gender", None]
    assert gap.low is not None and (gap.low > 0.1) == there and gap.value == pytest.approx((38 - right) / 40)
    clean = found["accuracy_gap", None, "nurse", "gender", None]
    assert clean.value == 0 and clean.low is not None and clean.low < 0 < (clean.high or 0)
    worst = found["worst_group_accuracy", None, None, "gender", None]
    assert worst.value == pytest.approx(min(right, 30) / 40) and worst.n == 40


def test_a_gap_does_not_change_with_the_direction() -> None:
    one = table({(0, "female", "a"): (10, 40), (0, "male", "a"): (36, 40)})
    two = table({(0, "female", "a"): (36, 40), (0, "male", "a"): (10, 40)})
    gaps = [
        by_key(performance(*case, SUBJECTS, np.ones(80, dtype=bool)))["accuracy_gap", None, "doctor", "gender", None]
        for case in (one, two)
    ]
    assert gaps[0] == gaps[1] and gaps[0].value == pytest.approx(26 / 40)


def test_an_empty_group_leaves_gap_and_worst_group_unmeasured_for_a_reason() -> None:
    correct, labels, attributes = table(
        {(0, "female", "a"): (9, 10), (0, "male", "b"): (5, 10), (1, "female", "b"): (8, 10), (1, "", "a"): (1, 10)}
    )
    found = by_key(performance(correct, labels, attributes, SUBJECTS, np.ones(40, dtype=bool)))
    assert ("accuracy", None, "nurse", "gender=male", None) not in found
    assert found["accuracy_gap", None, "doctor", "gender", None].measured
    gap = found["accuracy_gap", None, "nurse", "gender", None]
    assert (gap.value, gap.low, gap.high, gap.n, gap.reason) == (None, None, None, 0, "no image where gender=male")
    worst = found["worst_group_accuracy", None, None, "gender", None]
    assert (worst.value, worst.n, worst.reason) == (None, 0, "a class x gender group has no image")
    # Site "c" is on no image at all; the images without a gender count for the class and not for a gender.
    assert found["accuracy_gap", None, None, "site", None].reason == "no image where site=c"
    assert found["accuracy", None, "nurse", None, None].n == 20
    assert found["accuracy", None, None, "gender=female", None].n == 20


def test_an_attribute_of_one_value_has_no_gap() -> None:
    subjects = Subjects(SUBJECTS.regions, (("gender", ("female",)),), SUBJECTS.classes)
    correct, labels, attributes = table({(0, "female", "a"): (9, 10), (1, "female", "b"): (3, 10)})
    found = by_key(performance(correct, labels, attributes[:, :1], subjects, np.ones(20, dtype=bool)))
    for class_name in (None, "doctor", "nurse"):
        gap = found["accuracy_gap", None, class_name, "gender", None]
        assert (gap.value, gap.n, gap.reason) == (None, 0, "gender has one value only")
    assert found["worst_group_accuracy", None, None, "gender", None].value == pytest.approx(0.3)


def test_a_group_with_an_image_without_a_decision_is_unmeasured() -> None:
    correct, labels, attributes = table(
        {(0, "female", "a"): (9, 10), (0, "male", "b"): (5, 10), (1, "female", "b"): (8, 10), (1, "male", "c"): (0, 10)}
    )
    # A single image of nurses who are men.
    decided = np.arange(40) != np.flatnonzero((labels == 1) & (attributes[:, 0] == "male"))[3]
    found = by_key(performance(correct, labels, attributes, SUBJECTS, decided))
    everyone = by_key(performance(correct, labels, attributes, SUBJECTS, np.ones(40, dtype=bool)))
    assert found.keys() == everyone.keys()  # what cannot be measured is said, not passed over
    some = found["accuracy", None, "doctor", "gender=female", None]
    assert (some.value, some.n) == (pytest.approx(9 / 10), 10)
    for name in (
        ("accuracy", None, "nurse", "gender=male", None),
        ("accuracy_gap", None, "nurse", "gender", None),
        ("worst_group_accuracy", None, None, "gender", None),
    ):
        assert everyone[name].measured
        assert (found[name].value, found[name].low, found[name].n) == (None, None, 0)
        assert "an image for which the model's output is not finite" in found[name].reason
    assert found["accuracy_gap", None, "doctor", "gender", None].measured
    nobody = performance(correct, labels, attributes, SUBJECTS, np.zeros(40, dtype=bool))
    assert {key(e) for e in nobody} == everyone.keys() and not any(e.measured for e in nobody)
    assert all(e.reason and e.n == 0 and e.value is None for e in nobody)


def test_a_gap_is_as_wide_as_its_rarest_value_leaves_open() -> None:
    """The pair that looks widest need not be the one that may be furthest apart."""
    common, alike, rare = (900, 1000), (940, 1000), (10, 11)
    value, low, high = largest_difference(combinations((common, alike, rare), 2))
    assert value == pytest.approx(0.04) and low > -0.01
    level = 1 - 0.05 / 3
    assert high > newcombe(alike, common, level)[2] + 0.1  # what the pair itself leaves open
    assert high == pytest.approx(newcombe(alike, rare, level)[2])
    # The rare value looks better here, and may be much worse.
    assert largest_difference([((95, 100), (10, 10))])[2] == pytest.approx(-newcombe((10, 10), (95, 100))[1])


def test_largest_differences_lie_in_their_interval_as_often_as_said() -> None:
    rng = np.random.default_rng(0)
    rates, sizes = np.array([0.9, 0.8, 0.8, 0.85]), np.array([60, 25, 40, 30])
    truth = 0.1
    inside = 0
    for _ in range(300):
        counts = [(int(k), int(n)) for k, n in zip(rng.binomial(sizes, rates), sizes, strict=True)]
        _, low, high = largest_difference(combinations(counts, 2))
        inside += low <= truth <= high
    assert inside >= 0.95 * 300


# --- where the attribute goes with the label, and where it conflicts ---

GOES = Alignment("gender", ("male", "female", ""))


def columns(cells: dict[tuple[int, str], tuple[int, int]]) -> tuple[Any, Any, Any]:
    """`correct`, `labels`, `values` with (right, all) images per (label, gender)."""
    rows = [(i < right, *cell) for cell, (right, n) in cells.items() for i in range(n)]
    correct, labels, values = zip(*rows, strict=True)
    return np.array(correct), np.array(labels), np.array(values)


def aligned(cells: dict[tuple[int, str], tuple[int, int]], alignment: Alignment = GOES) -> dict[Key, Estimate]:
    correct, labels, values = columns(cells)
    return by_key(by_alignment(correct, np.ones(len(labels), dtype=bool), labels, values, alignment, SUBJECTS))


def test_alignment_is_the_loop_over_classes() -> None:
    cells = {(0, "male"): (18, 20), (0, "female"): (12, 30), (1, "male"): (3, 10), (1, "female"): (38, 40)}
    # Patients have no value that goes with them; of one doctor the gender is unknown.
    found = aligned({**cells, (2, "male"): (1, 9), (0, ""): (0, 1)})
    assert {k[2] for k in found} == {None, "doctor", "nurse"}
    gaps = []
    for class_name, with_it, against in (("doctor", (18, 20), (12, 30)), ("nurse", (38, 40), (3, 10))):
        for metric, count in (("aligned_accuracy", with_it), ("conflicting_accuracy", against)):
            e = found[metric, None, class_name, "gender", None]
            assert (e.value, e.low, e.high, e.n) == pytest.approx((*wilson_loop(*count), count[1]))
        e = found["alignment_gap", None, class_name, "gender", None]
        assert (e.value, e.low, e.high) == pytest.approx(newcombe(with_it, against)) and e.n == min(
            with_it[1], against[1]
        )
        gaps.append(e)
    over_all = found["alignment_gap", None, None, "gender", None]
    sides = [wilson_loop(*count) for count in ((18, 20), (38, 40), (12, 30), (3, 10))]
    down = math.sqrt(sum((p - lo) ** 2 for p, lo, _ in sides[:2]) + sum((hi - p) ** 2 for p, _, hi in sides[2:])) / 2
    up = math.sqrt(sum((hi - p) ** 2 for p, _, hi in sides[:2]) + sum((p - lo) ** 2 for p, lo, _ in sides[2:])) / 2
    mean = (gaps[0].value + gaps[1].value) / 2
    assert (over_all.value, over_all.low, over_all.high) == pytest.approx((mean, mean - down, mean + up))
    assert over_all.n == min(20 + 40, 30 + 10)
    accuracy = found["aligned_accuracy", None, None, "gender", None]
    assert accuracy.value == pytest.approx((18 / 20 + 38 / 40) / 2) and accuracy.n == 60


def test_a_hard_class_is_no_cue() -> None:
    """Doctors are hard and mostly aligned, nurses easy and mostly conflicting, and gender matters to neither."""
    found = aligned({(0, "male"): (50, 100), (0, "female"): (5, 10), (1, "male"): (90, 100), (1, "female"): (9, 10)})
    over_all = found["alignment_gap", None, None, "gender", None]
    assert over_all.value == pytest.approx(0) and over_all.low is not None and over_all.low < 0 < (over_all.high or 0)
    # Counted by image, aligned ones would be right in 59 of 110 cases and conflicting ones in 95.


@pytest.mark.parametrize(("conflicting", "there"), [(20, True), (38, False)])
def test_a_planted_cue_opens_a_gap_and_an_ignored_one_does_not(conflicting: int, there: bool) -> None:
    found = aligned(
        {(0, "male"): (38, 40), (0, "female"): (conflicting, 40), (1, "male"): (38, 40), (1, "female"): (38, 40)}
    )
    low = found["alignment_gap", None, None, "gender", None].low
    assert low is not None and (low > 0.1) == there
    clean = found["alignment_gap", None, "nurse", "gender", None]
    assert clean.value == 0 and clean.low is not None and clean.low < 0


def test_alignment_without_images_of_a_kind_is_unmeasured_for_a_reason() -> None:
    found = aligned({(0, "male"): (9, 10), (1, "male"): (3, 10), (1, "female"): (8, 10)})
    gap = found["alignment_gap", None, "doctor", "gender", None]
    assert (gap.value, gap.low, gap.n, gap.reason) == (None, None, 0, "no image of class doctor has another gender")
    assert not found["conflicting_accuracy", None, "doctor", "gender", None].measured
    assert found["aligned_accuracy", None, "doctor", "gender", None].value == pytest.approx(0.9)
    # Over all classes only nurses count, of whom there are both.
    assert found["aligned_accuracy", None, None, "gender", None].value == pytest.approx(0.8)
    assert found["alignment_gap", None, None, "gender", None].value == pytest.approx(0.5)
    nobody = aligned({(0, "male"): (9, 10), (1, "female"): (3, 10)})
    reason = "no class has images with the gender that goes with it and images with another"
    for metric in ("aligned_accuracy", "conflicting_accuracy", "alignment_gap"):
        e = nobody[metric, None, None, "gender", None]
        assert (e.value, e.n, e.reason) == (None, 0, reason)


def test_alignment_with_an_image_without_a_decision_is_unmeasured() -> None:
    correct, labels, values = columns({(0, "male"): (9, 10), (0, "female"): (5, 10), (0, ""): (1, 1)})
    for undecided, measured in ((0, False), (20, True)):  # the last has no gender, so it is in neither kind
        found = by_alignment(correct, np.arange(21) != undecided, labels, values, GOES, SUBJECTS)
        assert [e.measured for e in found] == [measured] * 6
        assert all(measured or "not finite" in e.reason for e in found)


def test_of_one_class_the_mean_gap_is_newcombe_s() -> None:
    assert minus(mean_proportion([(56, 70)]), mean_proportion([(48, 80)])) == pytest.approx(
        newcombe((56, 70), (48, 80))
    )
    assert mean_proportion([(9, 10)]) == pytest.approx(wilson(9, 10))
    _, low, high = mean_proportion([(5, 5)] * 4)
    assert high == 1 and 0.7 < low < 0.9  # all right, and yet not certain


def test_a_mean_gap_lies_in_its_interval_as_often_as_said() -> None:
    rng = np.random.default_rng(1)
    rates = np.array([[0.95, 0.7], [0.9, 0.9], [0.99, 0.8]])
    sizes = np.array([[40, 12], [15, 15], [30, 8]])
    inside = 0
    for _ in range(400):
        hits = rng.binomial(sizes, rates)
        one, two = (
            mean_proportion([(int(k), int(n)) for k, n in zip(hits[:, side], sizes[:, side], strict=True)])
            for side in (0, 1)
        )
        _, low, high = minus(one, two)
        inside += low <= (rates[:, 0] - rates[:, 1]).mean() <= high
    assert 0.93 * 400 <= inside <= 0.995 * 400


# --- equalized odds and demographic parity ---


def drawn(n: int, classes: int, seed: int, values: Sequence[str] = ("female", "male")) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, classes, n), rng.integers(0, classes, n), rng.choice(values, n)


@given(seed=st.integers(0, 2**32 - 1))
@example(seed=20958)  # two equal rates
@settings(max_examples=30, deadline=None)
def test_two_classes_give_fairlearn_s_differences(seed: int) -> None:
    labels, predictions, values = drawn(40, 2, seed)
    found = by_key(rate_differences(labels, predictions, "gender", values, BINARY))
    cells = {(c, v) for c, v in zip(labels.tolist(), values.tolist(), strict=True)}
    parity = demographic_parity_difference(labels, predictions, sensitive_features=values)
    for name in (None, "doctor", "nurse"):
        e = found["demographic_parity_difference", None, name, "gender", None]
        assert e.value == pytest.approx(parity) and e.low is not None and e.low <= e.value <= (e.high or 0)
        e = found["equalized_odds_difference", None, name, "gender", None]
        assert e.measured == (len(cells) == 4)
        if e.measured:
            assert e.value == pytest.approx(equalized_odds_difference(labels, predictions, sensitive_features=values))
            # One class is the rest of the other, so that over both nothing more is compared than for one.
            over_all = found["equalized_odds_difference", None, None, "gender", None]
            assert (e.low, e.high) == pytest.approx((over_all.low, over_all.high))
            # Two rates were looked at, so each is held to 97.5 %.
            assert e.high is not None and e.high >= newcombe(*_tpr(labels, predictions, values), 0.975)[2] - 1e-12


def _tpr(labels: Any, predictions: Any, values: Any) -> list[tuple[int, int]]:
    counts = []
    for value in ("female", "male"):
        members = (labels == 1) & (values == value)
        counts.append((int((predictions[members] == 1).sum()), int(members.sum())))
    return sorted(counts, key=lambda c: (c[0] / c[1], c), reverse=True)


@pytest.mark.parametrize("seed", [0, 1])
def test_more_classes_give_the_largest_of_one_against_the_rest(seed: int) -> None:
    labels, predictions, values = drawn(300, 3, seed, ("a", "b", "c", ""))
    found = by_key(rate_differences(labels, predictions, "site", values, SUBJECTS))
    known = values != ""
    for metric, peer in (
        ("equalized_odds_difference", equalized_odds_difference),
        ("demographic_parity_difference", demographic_parity_difference),
    ):
        each = [peer(labels[known] == c, predictions[known] == c, sensitive_features=values[known]) for c in range(3)]
        for name, expected in zip((None, *SUBJECTS.classes), (max(each), *each), strict=True):
            assert found[metric, None, name, "site", None].value == pytest.approx(expected)
    sizes = [int(((labels == c) & (values == v)).sum()) for c in range(3) for v in "abc"]
    assert found["equalized_odds_difference", None, None, "site", None].n == min(sizes)


def test_a_rate_of_no_images_is_no_rate() -> None:
    labels = np.array([0, 0, 0, 1, 1])
    predictions = np.array([0, 1, 0, 1, 1])
    values = np.array(["female", "male", "female", "male", "male"])  # no nurse is a woman
    assert equalized_odds_difference(labels, predictions, sensitive_features=values) == 1.0  # of nothing at all
    found = by_key(rate_differences(labels, predictions, "gender", values, BINARY))
    for name in (None, "doctor", "nurse"):
        e = found["equalized_odds_difference", None, name, "gender", None]
        assert (e.value, e.low, e.high, e.n) == (None, None, None, 0)
        assert e.reason.startswith("no image of") and e.reason.endswith("where gender=female")
    assert found["equalized_odds_difference", None, "nurse", "gender", None].reason.startswith(
        "no image of class nurse"
    )
    assert found["demographic_parity_difference", None, None, "gender", None].value == pytest.approx(1 - 0)


def test_differences_that_cannot_be_taken_say_why() -> None:
    labels, predictions, values = drawn(30, 2, 0)
    one_value = Subjects((), (("gender", ("female",)),), BINARY.classes)
    cases = [
        (labels, predictions, np.full(30, "female"), one_value, "gender has one value only"),
        (labels, predictions, np.full(30, ""), BINARY, "no image has a value of gender"),
        (labels, np.where(np.arange(30) == 4, -1, predictions), values, BINARY, "not finite"),
    ]
    for *columns_, subjects, reason in cases:
        estimates = (
            *rate_differences(columns_[0], columns_[1], "gender", columns_[2], subjects),
            *outcome_divergence(columns_[0], columns_[1], "gender", columns_[2], subjects, seed=0),
        )
        assert {e.metric for e in estimates} == {
            "equalized_odds_difference",
            "demographic_parity_difference",
            "outcome_divergence",
        }
        assert all(reason in e.reason and e.value is None and e.low is None for e in estimates)
    alone = by_key(rate_differences(np.zeros(30, dtype=int), np.zeros(30, dtype=int), "gender", values, BINARY))
    odds = alone["equalized_odds_difference", None, None, "gender", None]
    assert (odds.value, odds.reason) == (None, "no image of a class other than doctor where gender=female")
    parity = alone["demographic_parity_difference", None, None, "gender", None]
    assert parity.value == 0 and parity.high is not None and parity.high > 0.1  # of so few images


@pytest.mark.parametrize(("shift", "there"), [(0.4, True), (0.0, False)])
def test_planted_odds_are_found_and_absent_ones_are_not(shift: float, there: bool) -> None:
    rng = np.random.default_rng(2)
    labels, values = np.arange(800) % 2, np.where(np.arange(800) % 4 < 2, "female", "male")
    # Women who are doctors are taken for nurses more often.
    wrong = rng.random(800) < 0.1 + shift * ((labels == 0) & (values == "female"))
    found = by_key(rate_differences(labels, np.where(wrong, 1 - labels, labels), "gender", values, BINARY))
    for metric in ("equalized_odds_difference", "demographic_parity_difference"):
        low = found[metric, None, None, "gender", None].low
        assert low is not None and (low > 0.1) == there and (low > 0) == there


# --- outcome divergence ---


def test_divergence_of_many_images_is_scipy_s() -> None:
    """The outcomes are right, or the class it is mistaken for."""
    labels, predictions, values = drawn(60_000, 3, 3, ("a", "b", "c"))
    predictions = np.where((values == "a") & (labels == 1), 1, predictions)
    found = by_key(outcome_divergence(labels, predictions, "site", values, SUBJECTS, seed=0))
    for c, name in ((None, None), *enumerate(SUBJECTS.classes)):
        spread = []
        for value in ("a", "b", "c"):
            outcomes = [
                -1 if p == t else p
                for t, p, v in zip(labels.tolist(), predictions.tolist(), values.tolist(), strict=True)
                if v == value and c in (None, t)
            ]
            spread.append([outcomes.count(k) / len(outcomes) for k in (-1, 0, 1, 2)])
        expected = max(jensenshannon(p, q, base=2) ** 2 for p, q in combinations(spread, 2))
        e = found["outcome_divergence", None, name, "site", None]
        assert e.value == pytest.approx(expected, abs=5e-4)
        assert e.low is not None and e.low <= e.value <= (e.high or 0)
    nurses = found["outcome_divergence", None, "nurse", "site", None]
    doctors = found["outcome_divergence", None, "doctor", "site", None]
    assert nurses.low is not None and nurses.low > 0.3 and doctors.low == 0 and (doctors.high or 1) < 0.001


@pytest.mark.parametrize("sizes", [(40, 40), (60, 30)])
def test_chance_is_not_taken_for_divergence(sizes: tuple[int, int]) -> None:
    """Of samples of one and the same distribution, the plain divergence is never 0."""
    rng = np.random.default_rng(0)
    values = np.repeat(["female", "male"], sizes)
    labels = np.zeros(sum(sizes), dtype=int)
    subjects = Subjects((), (("gender", ("female", "male")),), ("a", "b", "c", "d"))
    plain, corrected, shown = [], [], 0
    for seed in range(100):
        predictions = rng.choice(4, sum(sizes), p=[0.5, 0.3, 0.1, 0.1])
        e = outcome_divergence(labels, predictions, "gender", values, subjects, seed=seed)[0]
        spread = [np.bincount(predictions[values == v], minlength=4) for v in ("female", "male")]
        plain.append(jensenshannon(*spread, base=2) ** 2)
        assert e.value is not None and e.low is not None
        corrected.append(e.value)
        shown += e.low > 0
    # Of a chi-squared number of three degrees of freedom less its mean, 0.31 of the mean is left above 0.
    assert np.mean(corrected) < 0.5 * np.mean(plain) and shown <= 5


def test_what_differs_is_measured_without_the_excess_of_few_images() -> None:
    rng = np.random.default_rng(6)
    shares = ([0.6, 0.2, 0.1, 0.1], [0.1, 0.2, 0.2, 0.5])
    truth = jensenshannon(*shares, base=2) ** 2
    labels, values = np.zeros(60, dtype=int), np.repeat(["female", "male"], 30)
    subjects = Subjects((), (("gender", ("female", "male")),), ("a", "b", "c", "d"))
    plain, corrected = [], []
    for _ in range(400):
        predictions = np.concatenate([rng.choice(4, 30, p=p) for p in shares])
        spread = [np.bincount(predictions[values == v], minlength=4) for v in ("female", "male")]
        plain.append(jensenshannon(*spread, base=2) ** 2)
        corrected.append(outcome_divergence(labels, predictions, "gender", values, subjects, seed=0)[0].value)
    assert np.mean(plain) - truth > 0.02 and abs(np.mean(corrected) - truth) < 0.25 * (np.mean(plain) - truth)


def test_a_divergence_lies_in_its_interval_as_often_as_said() -> None:
    rng = np.random.default_rng(5)
    shares = ([0.9, 0.1], [0.6, 0.4])
    truth = jensenshannon(*shares, base=2) ** 2
    labels, values = np.zeros(140, dtype=int), np.repeat(["female", "male"], (100, 40))
    inside = 0
    for seed in range(200):
        predictions = np.concatenate([rng.choice(2, n, p=p) for n, p in zip((100, 40), shares, strict=True)])
        e = outcome_divergence(labels, predictions, "gender", values, BINARY, seed=seed)[0]
        assert e.low is not None and e.high is not None
        inside += e.low <= truth <= e.high
    assert 0.9 * 200 <= inside <= 0.99 * 200


def test_where_all_are_right_divergence_is_nought_and_not_certain() -> None:
    for n in (1, 10, 1000):
        labels, values = np.zeros(2 * n, dtype=int), np.repeat(["female", "male"], n)
        e = outcome_divergence(labels, labels, "gender", values, BINARY, seed=0)[0]
        assert (e.value, e.low, e.n) == (0, 0, n) and e.high is not None
        assert 0 < e.high <= 1 and (n == 1000) == (e.high < 0.01)


# --- right for the wrong reason ---


@pytest.mark.parametrize("seed", [0, 1])
def test_wrong_reasons_are_the_loop_over_correct_images(seed: int) -> None:
    n = 90
    rng = np.random.default_rng(seed)
    labels, correct = rng.integers(0, 2, n), rng.random(n) < 0.7
    attributes = np.stack([rng.choice(["female", "male", ""], n), rng.choice(["a", "b"], n)], axis=1)
    enriched, valid = rng.random(n) < 0.6, rng.random(n) < 0.8
    decided = np.ones(n, dtype=bool)
    found = {
        k: e
        for k, e in by_key(
            performance(correct, labels, attributes, SUBJECTS, decided, object_enriched=enriched, object_valid=valid)
        ).items()
        if k[0] == "wrong_reason_rate"
    }
    cells = {c: i for c, i in cells_of(labels.tolist(), attributes).items() if None in c}
    assert {(k[2], k[3]) for k in found} == set(cells)  # by class and by group, not by both
    for (class_name, group), images in cells.items():
        counted = [i for i in images if correct[i] and valid[i]]
        e = found["wrong_reason_rate", None, class_name, group, None]
        assert (e.value, e.low, e.high, e.n) == pytest.approx(
            (*wilson_loop(sum(not enriched[i] for i in counted), len(counted)), len(counted))
        )


def test_without_a_correct_image_or_a_map_there_is_no_reason_to_be_wrong() -> None:
    n = 20
    labels, attributes = np.arange(n) % 2, np.full((n, 2), "")
    yes, no = np.ones(n, dtype=bool), np.zeros(n, dtype=bool)
    for correct, valid in ((no, yes), (yes, no), (labels == 0, labels == 1)):
        found = performance(correct, labels, attributes, SUBJECTS, yes, object_enriched=yes, object_valid=valid)
        rates = [e for e in found if e.metric == "wrong_reason_rate"]
        assert [e.class_name for e in rates] == [None, "doctor", "nurse"]
        assert all((e.value, e.n, e.reason) == (None, 0, rates[0].reason) and e.reason for e in rates)
    assert not [e for e in performance(yes, labels, attributes, SUBJECTS, yes) if e.metric == "wrong_reason_rate"]


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=8, deadline=None)
def test_the_order_of_the_images_is_of_no_account(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels, predictions, values = drawn(50, 2, seed, ("female", "male", ""))
    enriched, valid, order = rng.random(50) < 0.5, rng.random(50) < 0.9, rng.permutation(50)

    def of(i: Any) -> tuple[Estimate, ...]:
        return performance(
            labels[i] == predictions[i],
            labels[i],
            values[i][:, None],
            BINARY,
            np.ones(50, dtype=bool),
            predictions=predictions[i],
            alignments=(Alignment("gender", ("male", "female")),),
            object_enriched=enriched[i],
            object_valid=valid[i],
        )

    assert of(np.arange(50)) == of(order)

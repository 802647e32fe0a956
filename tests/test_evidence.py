"""Estimates recomputed cell by cell in loops over images; planted differences beside absent ones."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from cell_by_cell import SUBJECTS, Attributes, Key, Z, by_key, cells_of, key
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm as normal
from scipy.stats import t as student

from bias_audit.evidence.attention import attention
from bias_audit.evidence.performance import performance
from bias_audit.records.samples import SampleScores
from bias_audit.terms import REMAINDER, Estimate

METRICS = ("energy_share", "enrichment", "pointing_game", "iou", "relevance_rank_accuracy")
METHODS = ("gradcam", "hirescam")


def numbers(estimates: Iterable[Estimate]) -> npt.NDArray[np.float64]:
    """Value and bounds `(E, 3)`, NaN where nothing was measured."""
    return np.array([(e.value, e.low, e.high) for e in estimates], dtype=np.float64)


def make_scores(n: int, seed: int = 0, *, missing: float = 0.2, silent: float = 0.1, classes: int = 2) -> SampleScores:
    """Random scores in which some images lack a region and some maps are silent, by method."""
    rng = np.random.default_rng(seed)
    regions = (*(name for name, _ in SUBJECTS.regions), REMAINDER)
    areas = rng.uniform(0.05, 0.5, (n, len(regions))).astype(np.float32)
    areas[rng.random(areas.shape) < missing] = np.nan
    values = rng.uniform(0, 1, (len(METRICS), len(METHODS), n, len(regions))).astype(np.float32)
    values[1] = values[0] / areas
    values[:, rng.random((len(METHODS), n)) < silent] = np.nan
    values[:, :, np.isnan(areas)] = np.nan
    labels = rng.integers(0, classes, n)
    return SampleScores(
        metrics=METRICS,
        methods=METHODS,
        regions=regions,
        ids=tuple(f"image {i}" for i in range(n)),
        labels=labels,
        predictions=rng.integers(0, classes, n),
        margin=rng.normal(0, 1, n).astype(np.float32),
        areas=areas,
        values=values,
        maps=rng.random((len(METHODS), n, 2, 2)).astype(np.float16),
        magnitude=np.ones((len(METHODS), n), dtype=np.float32),
    )


def make_attributes(n: int, seed: int = 0) -> Attributes:
    """Gender, now and then unknown, and a site that is "a" or "b" and never "c"."""
    rng = np.random.default_rng(seed + 1000)
    return np.stack([rng.choice(["female", "male", ""], n, p=[0.5, 0.3, 0.2]), rng.choice(["a", "b"], n)], axis=1)


def loop_value(scores: SampleScores, metric: str, m: int, r: int, images: list[int]) -> tuple[float | None, int]:
    """The estimate's value and count from the images of a cell."""
    k = METRICS.index(metric)
    valid = [i for i in images if not math.isnan(scores.values[k, m, i, r])]
    if not valid:
        return None, 0
    above = [float(scores.values[k, m, i, r]) for i in valid]
    if metric != "enrichment":
        return math.fsum(above) / len(valid), len(valid)
    areas = [float(scores.areas[i, r]) for i in valid]
    shares = [a * area for a, area in zip(above, areas, strict=True)]
    return math.fsum(shares) / math.fsum(areas), len(valid)


@pytest.mark.parametrize("seed", [0, 1])
def test_attention_is_the_loop_over_cells_and_nothing_more(seed: int) -> None:
    scores, attributes = make_scores(41, seed), make_attributes(41, seed)
    found = by_key(attention(scores, attributes, SUBJECTS, seed=0))
    expected: dict[Key, tuple[float | None, int]] = {}
    for (class_name, group), images in cells_of(scores.labels.tolist(), attributes).items():
        for m, method in enumerate(METHODS):
            for r, region in enumerate(scores.regions):
                for metric in METRICS if group is None else ("energy_share", "enrichment"):
                    expected[metric, region, class_name, group, method] = loop_value(scores, metric, m, r, images)
                if group is None:
                    shown = [i for i in images if scores.areas[i, r] > 0]
                    loud = [i for i in shown if not math.isnan(scores.values[0, m, i, r])]
                    expected["coverage", region, class_name, None, method] = (len(loud) / len(shown), len(shown))
    assert found.keys() == expected.keys()
    assert {k[2] for k in found} == {None, "doctor", "nurse"}  # nobody is a patient, no image is from site c
    assert {k[3] for k in found} == {None, "gender=female", "gender=male", "site=a", "site=b"}
    for name, (value, n) in expected.items():
        e = found[name]
        assert e.n == n and e.value == pytest.approx(value, rel=1e-5)
        if n == 1 and e.metric != "coverage":
            # Drawn again and again, one image would give an interval of no width, which looks certain.
            assert (e.low, e.high, e.reason) == (None, None, "one image gives no interval") and not e.measured
        else:
            assert e.low is not None and e.high is not None and e.low <= e.value <= e.high and e.reason == ""


def test_enrichment_is_the_ratio_of_means_and_not_ruled_by_a_tiny_region() -> None:
    scores = make_scores(2, missing=0, silent=0)
    scores.areas[:, 1] = [0.001, 0.399]
    scores.values[0, :, :, 1] = [0.1, 0.4]
    scores.values[1] = scores.values[0] / scores.areas
    e = by_key(attention(scores, make_attributes(2), SUBJECTS, seed=0))["enrichment", "hair", None, None, "gradcam"]
    assert e.value == pytest.approx((0.1 + 0.4) / (0.001 + 0.399), rel=1e-5)  # the mean of the ratios is 50


def test_intervals_of_a_cell_are_those_of_a_loop_that_draws_within_class_and_group() -> None:
    n = 48
    scores, attributes = make_scores(n, 7), make_attributes(n, 7)
    female = attributes[:, 0] == "female"
    # The classes differ widely: an interval that let their numbers vary would be several times as wide.
    shares = scores.values[0, 0, :, 1]
    shares[:] = np.where(np.isnan(shares), np.nan, 0.05 * shares + 0.9 * scores.labels)
    e = by_key(attention(scores, attributes, SUBJECTS, seed=3))[
        "energy_share", "hair", None, "gender=female", "gradcam"
    ]
    rng = np.random.default_rng(99)
    strata = [
        [i for i in range(n) if female[i] and scores.labels[i] == c and not math.isnan(shares[i])] for c in (0, 1)
    ]
    # Which of a stratum's images are silent varies too, as in the tool.
    silent = [sum(1 for i in range(n) if female[i] and scores.labels[i] == c) - len(strata[c]) for c in (0, 1)]
    means = []
    for _ in range(4000):
        chosen = []
        for members, others in zip(strata, silent, strict=True):
            drawn = rng.integers(0, len(members) + others, len(members) + others)
            chosen += [shares[members[j]] for j in drawn if j < len(members)]
        means.append(np.mean(chosen))
    n_valid = sum(map(len, strata))
    freedom = n_valid - sum(len(valid) / (len(valid) + others) for valid, others in zip(strata, silent, strict=True))
    reach = math.sqrt(n_valid / freedom) * student.ppf(0.975, freedom)
    low, high = np.percentile(means, [100 * normal.cdf(-reach), 100 * normal.cdf(reach)])
    # The tool's correction for skewness moves both bounds a little.
    assert e.low == pytest.approx(low, abs=0.08 * (high - low)) and e.high == pytest.approx(
        high, abs=0.08 * (high - low)
    )


@pytest.mark.parametrize("n", [1, 2])
def test_one_image_has_a_value_and_no_interval(n: int) -> None:
    scores = make_scores(30, 3, missing=0, silent=0)
    alone = [i for i in range(30) if scores.labels[i] == 0][:n]
    others = [i for i in range(30) if i not in alone and scores.labels[i] == 0]
    scores.values[:, 1, others] = np.nan
    then = replace(scores, values=scores.values * np.float32(0.5))
    found = by_key(attention(scores, make_attributes(30), SUBJECTS, seed=0, reference=then))
    for metric in (*METRICS, "energy_share_gain"):
        e = found[metric, "hair", "doctor", None, "hirescam"]
        assert e.n == n and e.value is not None and e.measured == (n > 1) == (e.reason == "")
        assert found[metric, "hair", "doctor", None, "gradcam"].measured
    coverage = found["coverage", "hair", "doctor", None, "hirescam"]
    assert coverage.measured and coverage.n == n + len(others)


def test_an_audit_set_without_attributes_has_classes_only() -> None:
    subjects = replace(SUBJECTS, attributes=())
    scores = make_scores(9)
    found = attention(scores, np.empty((9, 0), dtype=np.str_), subjects, seed=0)
    assert {e.group for e in found} == {None} and {e.class_name for e in found} == {None, "doctor", "nurse"}


def test_silent_maps_are_unmeasured_for_a_reason_and_uncovered() -> None:
    scores, attributes = make_scores(30, missing=0, silent=0), make_attributes(30)
    scores.values[:, 1] = np.nan
    found = by_key(attention(scores, attributes, SUBJECTS, seed=0))
    for (metric, region, class_name, group, method), e in found.items():
        if metric == "coverage":
            shown = 30 if class_name is None else int((scores.labels == SUBJECTS.classes.index(class_name)).sum())
            assert e.n == shown and e.value == (1 if method == "gradcam" else 0)
            assert (e.low, e.high) == pytest.approx(
                (shown / (shown + Z**2), 1) if method == "gradcam" else (0, Z**2 / (shown + Z**2)), abs=1e-9
            )
        elif method == "hirescam":
            assert (e.value, e.low, e.high, e.n) == (None, None, None, 0) and not e.measured
            assert e.reason == f"no image with {region} and a heatmap that is not silent"
        else:
            assert e.measured and e.reason == "" and (group is None or e.n > 0)


def test_a_region_on_no_image_of_a_class_is_unmeasured_there_only() -> None:
    scores, attributes = make_scores(30, missing=0, silent=0), make_attributes(30)
    nurses = scores.labels == 1
    scores.areas[nurses, 1] = np.nan
    scores.values[:, :, nurses, 1] = np.nan
    found = by_key(attention(scores, attributes, SUBJECTS, seed=0))
    absent = found["coverage", "hair", "nurse", None, "gradcam"]
    assert (absent.value, absent.n, absent.reason) == (None, 0, "no image shows hair")
    unmeasured = {(k[1], k[2]) for k, e in found.items() if not e.measured}
    assert unmeasured == {("hair", "nurse")}
    assert found["energy_share", "hair", None, None, "gradcam"].n == int((~nurses).sum())


def test_gain_is_paired_by_image() -> None:
    now, attributes = make_scores(40, 1, silent=0.3), make_attributes(40)
    then = make_scores(40, 2, silent=0.3)
    then = replace(then, labels=now.labels)
    plain = by_key(attention(now, attributes, SUBJECTS, seed=0))
    found = by_key(attention(now, attributes, SUBJECTS, seed=0, reference=then))
    gains = {k: e for k, e in found.items() if k[0] == "energy_share_gain"}
    assert found.keys() - gains.keys() == plain.keys()
    assert {k[1:] for k in gains} == {
        (r, c, None, m) for r in now.regions for c in (None, "doctor", "nurse") for m in METHODS
    }
    for (_, region, class_name, _, method), e in gains.items():
        m, r = METHODS.index(method or ""), now.regions.index(region or "")
        changes = [
            float(now.values[0, m, i, r]) - float(then.values[0, m, i, r])
            for i in range(40)
            if class_name is None or SUBJECTS.classes[now.labels[i]] == class_name
        ]
        both = [c for c in changes if not math.isnan(c)]
        assert e.n == len(both) and e.value == pytest.approx(math.fsum(both) / len(both), abs=1e-6)


@pytest.mark.parametrize("planted", [0.0, 0.125])
def test_a_gain_shared_by_all_images_is_found_to_the_digit(planted: float) -> None:
    """However much the images differ from each other: they are compared with themselves."""
    then = make_scores(30, 4)
    now = replace(then, values=then.values + np.float32(planted))
    found = attention(now, make_attributes(30), SUBJECTS, seed=0, reference=then)
    gains = [e for e in found if e.metric == "energy_share_gain"]
    assert len(gains) == 3 * 3 * 2
    for e in gains:
        assert (e.value, e.low, e.high) == pytest.approx((planted,) * 3, abs=1e-6)


@pytest.mark.parametrize(("planted", "found"), [(3.0, True), (1.0, False)])
def test_attention_above_chance_is_told_from_chance(planted: float, found: bool) -> None:
    scores, attributes = make_scores(60, 5, missing=0, silent=0), make_attributes(60)
    noise = np.random.default_rng(0).normal(1, 0.3, (len(METHODS), 60)).clip(0.1)
    scores.areas[:, 1] = 0.1
    scores.values[0, :, :, 1] = planted * 0.1 * noise
    scores.values[1] = scores.values[0] / scores.areas
    for method in METHODS:
        e = by_key(attention(scores, attributes, SUBJECTS, seed=0))["enrichment", "hair", None, None, method]
        assert e.low is not None and e.high is not None
        assert (e.low > 1) == found and e.high > 1 and (found or e.low < 1)


def test_the_seed_moves_the_bounds_and_nothing_else() -> None:
    scores, attributes = make_scores(25), make_attributes(25)
    first, again, other = (attention(scores, attributes, SUBJECTS, seed=s) for s in (0, 0, 1))
    assert first == again
    assert [replace(e, low=None, high=None) for e in first] == [replace(e, low=None, high=None) for e in other]
    assert sum(a.low != b.low for a, b in zip(first, other, strict=True)) > len(first) / 3


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=8, deadline=None)
def test_the_order_of_the_images_is_of_no_account(seed: int) -> None:
    scores, attributes = make_scores(20, seed), make_attributes(20, seed)
    order = np.random.default_rng(seed).permutation(20)
    turned = replace(
        scores,
        ids=tuple(scores.ids[i] for i in order),
        labels=scores.labels[order],
        predictions=scores.predictions[order],
        areas=scores.areas[order],
        values=scores.values[:, :, order],
    )
    one = attention(scores, attributes, SUBJECTS, seed=0, reference=scores)
    two = attention(turned, attributes[order], SUBJECTS, seed=0, reference=turned)
    assert [(key(e), e.n, e.reason) for e in one] == [(key(e), e.n, e.reason) for e in two]
    np.testing.assert_allclose(numbers(one)[:, 0], numbers(two)[:, 0], rtol=1e-9, atol=1e-12)
    decided = scores.predictions >= 0
    assert performance(scores.correct, scores.labels, attributes, SUBJECTS, decided) == performance(
        turned.correct, turned.labels, attributes[order], SUBJECTS, decided
    )


@given(seed=st.integers(0, 2**32 - 1), order=st.permutations(range(3)))
@settings(max_examples=8, deadline=None)
def test_regions_in_another_order_give_the_same_estimates(seed: int, order: list[int]) -> None:
    scores, attributes = make_scores(20, seed), make_attributes(20, seed)
    turned = replace(
        scores,
        regions=tuple(scores.regions[r] for r in order),
        areas=scores.areas[:, order],
        values=scores.values[..., order],
    )
    one = by_key(attention(scores, attributes, SUBJECTS, seed=0))
    two = by_key(attention(turned, attributes, SUBJECTS, seed=0))
    assert {k: (e.n, e.reason) for k, e in one.items()} == {k: (e.n, e.reason) for k, e in two.items()}
    np.testing.assert_allclose(numbers(one.values()), numbers([two[k] for k in one]), rtol=1e-9, atol=1e-12)


@given(seed=st.integers(0, 2**32 - 1), names=st.permutations(["female", "male"]))
@settings(max_examples=8, deadline=None)
def test_renaming_values_renames_groups(seed: int, names: list[str]) -> None:
    scores, attributes = make_scores(20, seed), make_attributes(20, seed)
    rename = {"female": names[0], "male": names[1], "": ""}
    renamed = attributes.copy()
    renamed[:, 0] = [rename[value] for value in attributes[:, 0]]
    decided = np.ones(20, dtype=bool)
    one = by_key(performance(scores.correct, scores.labels, attributes, SUBJECTS, decided))
    two = by_key(performance(scores.correct, scores.labels, renamed, SUBJECTS, decided))
    compared = 0
    for (metric, region, class_name, group, method), e in one.items():
        if metric == "accuracy" and group is not None and group.startswith("gender="):
            group = f"gender={rename[group.removeprefix('gender=')]}"
        assert replace(e, group=group, reason="") == replace(two[metric, region, class_name, group, method], reason="")
        compared += 1
    assert compared == len(two)

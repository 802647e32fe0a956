"""Estimates of interventions against loops over images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import stats

from bias_audit.evidence.association import Alignment
from bias_audit.evidence.changes import Change
from bias_audit.evidence.effects import EFFECTS, Effects, effects
from bias_audit.evidence.intervention import intervention_estimates
from bias_audit.evidence.removal import FILLS
from bias_audit.terms import INTERVENTION_METRICS, Estimate, Subjects

Numbers = dict[tuple[str, str | None, str | None, str | None, str | None], tuple[float | None, int]]
CLASSES = ("doctor", "nurse", "other")
SUBJECTS = Subjects(
    regions=(("coat", "object"), ("hair", "spurious"), ("mark", "spurious")),
    attributes=(("gender", ("f", "m")), ("age", ("old", "young", "?"))),
    classes=CLASSES,
)
BY_USER = ("age",)
ALIGNMENTS = (Alignment("gender", ("m", "f", "")), Alignment("age", ("old", "young", "?")))
CHANGES = (
    Change("none"),
    *(Change(kind, r) for r in (1, 2) for kind in ("removal", "control", "control")),  # type: ignore[arg-type]
    *(Change(kind, r, detail=f) for r in (1, 2) for f in FILLS for kind in ("fill", "fill_control")),  # type: ignore[arg-type]
    *(Change(kind, r, 0) for r in (1, 2) for kind in ("swap", "swap_control")),  # type: ignore[arg-type]
    Change("swap", attribute=1),
    *(Change(kind) for kind in ("noise_rest", "noise_object") for _ in range(3)),  # type: ignore[arg-type]
)


class Case:
    """Invented logits of 60 images under every change, some of which were not made or gave no number."""

    def __init__(self, seed: int, classes: int, missing: float = 0.08, count: int = 60) -> None:
        rng = np.random.default_rng(seed)
        logits = rng.normal(0, 2, (count, 1, classes)) + rng.normal(0, 1, (count, len(CHANGES), classes))
        logits[rng.random(logits.shape[:2]) < missing] = np.nan
        odd = rng.random(logits.shape) < missing / 10
        logits[odd] = rng.choice([np.nan, np.inf, -np.inf], odd.sum())
        self.logits = logits.astype(np.float32)
        self.classes = max(2, classes)
        self.labels = rng.integers(0, self.classes, count)
        self.scores = rng.normal(0, 1, logits.shape[:2]).astype(np.float32)
        self.attributes = np.stack([rng.choice([*vs, ""], count) for _, vs in SUBJECTS.attributes], axis=1)
        self.wanted = np.array(
            [
                [
                    "" if not own else rng.choice([v for v in vs if v != own])
                    for own, (_, vs) in zip(row, SUBJECTS.attributes, strict=True)
                ]
                for row in self.attributes
            ]
        )
        self.subjects = replace(SUBJECTS, classes=CLASSES[: self.classes])
        self.alignments = tuple(replace(a, value_of_class=a.value_of_class[: self.classes]) for a in ALIGNMENTS)

    def found(self) -> Effects:
        logits, scores, labels = (torch.from_numpy(x) for x in (self.logits, self.scores, self.labels))
        return Effects(*(x.numpy() for x in effects(logits, scores, labels, CHANGES)))

    def estimates(self, seed: int = 0) -> tuple[Estimate, ...]:
        return intervention_estimates(
            self.found(), self.labels, self.attributes, self.wanted, self.subjects, self.alignments,
            by_user=BY_USER, seed=seed,
        )  # fmt: skip


def decision(row: npt.NDArray[np.float32]) -> int | None:
    """The class decided for, None where an output is no number."""
    values = [float(x) for x in row]
    if not all(math.isfinite(x) for x in values):
        return None
    if len(values) == 1:
        return 1 if values[0] > 0 else 0
    return values.index(max(values))


def margin(row: npt.NDArray[np.float32], of: int) -> float:
    values = [float(x) for x in row]
    if len(values) == 1:
        return values[0] if of else -values[0]
    return values[of] - max(x for i, x in enumerate(values) if i != of)


def places(*names: Any, detail: str = "") -> list[int]:
    """Where a change is on the list, by kind, region and attribute."""
    wanted = (*names, *(-1, -1)[len(names) - 1 :], detail)
    return [v for v, c in enumerate(CHANGES) if (c.kind, c.region, c.attribute, c.detail) == wanted]


def moved(case: Case, i: int, kind: str, region: int, detail: str = "") -> list[float] | None:
    """What a change does to image i: the mean over those alike of effect, fall of score and margin, and flip."""
    clean = decision(case.logits[i, 0])
    found = []
    for v in places(kind, region, detail=detail):
        changed = decision(case.logits[i, v])
        if clean is not None and changed is not None:
            fall = margin(case.logits[i, 0], clean) - margin(case.logits[i, v], clean)
            found.append([abs(fall), float(case.scores[i, 0] - case.scores[i, v]), fall, float(changed != clean)])
    return [sum(column) / len(column) for column in zip(*found, strict=True)] if found else None


def mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def by_loops(case: Case) -> Numbers:
    """Every estimate's value and count."""
    count, found = len(case.labels), Numbers()
    of_class = {None: range(count)} | {
        name: [i for i in range(count) if case.labels[i] == c] for c, name in enumerate(case.subjects.classes)
    }
    groups = [(None, None, None)] + [
        (f"{name}={value}", a, value) for a, (name, values) in enumerate(case.subjects.attributes) for value in values
    ]
    for r, region in ((1, "hair"), (2, "mark")):
        gone = [moved(case, i, "removal", r) for i in range(count)]
        control = [moved(case, i, "control", r) for i in range(count)]
        for (class_name, images), (group, a, value) in product(of_class.items(), groups):
            cell = [i for i in images if a is None or case.attributes[i, a] == value]
            if not cell:
                continue
            used = [(i, gone[i], control[i]) for i in cell if gone[i] is not None and control[i] is not None]
            total = sum(margin(case.logits[i, 0], decision(case.logits[i, 0])) for i, _, _ in used)  # type: ignore[arg-type]
            for e, name in enumerate(EFFECTS):
                own = [x[e] for _, _, x in used]  # type: ignore[index]
                beyond = [g[e] - x[e] for _, g, x in used]  # type: ignore[index]
                for metric, values in ((f"removal_{name}", beyond), (f"control_{name}", own)):
                    number = mean(values) if name != "effect" else sum(values) / total if used else None
                    found[metric, region, class_name, group, None] = number, len(used)
        for fill, (metric, kind) in product(FILLS, (("fill_flips", "fill"), ("fill_control_flips", "fill_control"))):
            flips = [x[3] for i in range(count) if (x := moved(case, i, kind, r, fill)) is not None]
            found[metric, region, None, None, fill] = mean(flips), len(flips)
    for region, a, attribute in (("hair", 0, "gender"), ("mark", 0, "gender"), (None, 1, "age")):
        r = {"hair": 1, "mark": 2, None: -1}[region]
        of_value = case.alignments[a].value_of_class
        for class_name, images in of_class.items():
            if not images:
                continue
            flips, aligned_right, conflicting_right, follows = [], [], [], []
            for i in images:
                y, own, other = int(case.labels[i]), case.attributes[i, a], case.wanted[i, a]
                (v,) = places("swap", r, a)
                (u,) = places("swap_control", r, a) if region else [0]
                clean, swapped, control = (decision(case.logits[i, k]) for k in (0, v, u))
                if clean is None or swapped is None or control is None:
                    continue
                flips.append((swapped != clean) - (control != clean))
                partner = of_value[y]
                if partner and partner in (own, other):
                    aligned, conflicting, cue = (control, swapped, other) if own == partner else (swapped, control, own)
                    aligned_right.append(aligned == y)
                    conflicting_right.append(conflicting == y)
                    follows.append(conflicting != aligned and of_value[conflicting] == cue)
            found["swap_flips", region, class_name, attribute, None] = mean(flips), len(flips)
            gap = [x - z for x, z in zip(aligned_right, conflicting_right, strict=True)]
            for metric, values in (
                ("swap_aligned_accuracy", aligned_right),
                ("swap_conflicting_accuracy", conflicting_right),
                ("swap_gap", gap),
                ("swap_follows", follows),
            ):
                found[metric, region, class_name, attribute, None] = mean(values), len(values)
    for (r, region), (a, (attribute, _)) in product(((1, "hair"), (2, "mark")), enumerate(case.subjects.attributes)):
        for class_name, number in contrasts_by_loops(case, r, a).items():
            found["removal_contrast", region, class_name, attribute, None] = number
    trials: dict[str, list[float]] = {"noise_rest": [], "noise_object": []}
    for i in range(count):
        hits = {
            kind: [d == case.labels[i] for v in places(kind) if (d := decision(case.logits[i, v])) is not None]
            for kind in trials
        }
        if all(hits.values()):
            for kind, values in hits.items():
                trials[kind].append(sum(values) / len(values))
    core, spurious = (mean(values) or 0.0 for values in trials.values())
    n = len(trials["noise_rest"])
    # arXiv 2201.10766, equation 1: the difference over twice the distance of the mean to the nearer end.
    middle = (core + spurious) / 2
    found["core_accuracy", None, None, None, None] = core, n
    found["spurious_accuracy", None, None, None, None] = spurious, n
    found["relative_foreground_sensitivity", None, None, None, None] = (
        (core - spurious) / (2 * min(middle, 1 - middle)), n
    )  # fmt: skip
    return found


def contrasts_by_loops(case: Case, region: int, attribute: int) -> dict[str | None, tuple[float | None, int]]:
    """Per class, and over all, half the difference of what is lost with and without the class's value, over margins."""
    of_value, names = case.alignments[attribute].value_of_class, case.subjects.classes
    lost: dict[int, tuple[list[float], list[float]]] = {
        y: ([], []) for y in sorted(set(case.labels.tolist())) if of_value[y]
    }
    margins: dict[int, list[float]] = {y: [] for y in lost}
    for i, y in enumerate(case.labels.tolist()):
        clean, own = decision(case.logits[i, 0]), case.attributes[i, attribute]
        if clean is None or not own or not of_value[y]:
            continue
        falls = [
            [margin(case.logits[i, 0], y) - margin(case.logits[i, v], y) for v in places(kind, region)
             if decision(case.logits[i, v]) is not None]
            for kind in ("removal", "control")
        ]  # fmt: skip
        if all(falls):
            gone, beside = (sum(fall) / len(fall) for fall in falls)
            lost[y][own != of_value[y]].append(gone - beside)
            margins[y].append(margin(case.logits[i, 0], clean))
    halves = {y: (sum(a) / len(a) - sum(b) / len(b)) / 2 for y, (a, b) in lost.items() if a and b}
    found: dict[str | None, tuple[float | None, int]] = {}
    for class_name, classes in ((None, list(halves)), *((names[y], [y]) for y in lost)):
        every = [m for y in classes for m in margins[y]]
        n = min(sum(len(lost[y][k]) for y in classes) for k in (0, 1)) if classes else 0
        value = mean([halves[y] for y in classes if y in halves]) if n > 1 else None
        found[class_name] = (None if value is None else value / (sum(every) / len(every))), n
    return found


@pytest.mark.parametrize("classes", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_every_estimate_is_that_of_a_loop_over_images(seed: int, classes: int) -> None:
    case = Case(seed, classes)
    expected, found = by_loops(case), case.estimates()
    assert len(found) == len({(e.metric, e.region, e.class_name, e.group, e.method) for e in found})
    assert {(e.metric, e.region, e.class_name, e.group, e.method) for e in found} == set(expected)
    assert {e.metric for e in found} == set(INTERVENTION_METRICS) - {"region_probe_gain"}
    for e in found:
        value, n = expected[e.metric, e.region, e.class_name, e.group, e.method]
        assert e.n == n, e
        assert (e.value is None) == (value is None), e
        if value is not None:
            assert e.value == pytest.approx(value, rel=1e-4, abs=1e-5), e
        # A share has an interval even of one image; a mean has not.
        shares = e.metric.endswith(("_flips", "_accuracy", "_gap", "_follows"))
        if n > (0 if shares else 1):
            assert e.measured and e.low <= e.value <= e.high and e.reason == "", e  # type: ignore[operator]
        else:
            assert e.reason and e.low is None and e.high is None, e


def test_intervals_of_shares_are_wilsons_and_newcombes() -> None:
    # One control an image: every share is of whole images.
    case = Case(1, 2)
    (v, u) = places("control", 1)
    case.logits[:, u] = case.logits[:, v]
    found, control = case.found(), {}
    for e in case.estimates():
        if e.region == "hair" and e.group is None and e.metric in ("control_flips", "removal_flips"):
            control[e.metric, e.class_name] = e
    s = 0
    for c, class_name in ((None, None), (0, "doctor"), (1, "nurse")):
        known = np.isfinite(found.removal[3, :, s]) & np.isfinite(found.control[3, :, s])
        known &= True if c is None else case.labels == c
        n, first, second = int(known.sum()), *(int(x[3, known, s].sum()) for x in (found.removal, found.control))
        one, other = (stats.binomtest(k, n).proportion_ci(method="wilson") for k in (first, second))
        e = control["control_flips", class_name]
        assert (e.low, e.high) == pytest.approx((other.low, other.high))
        e, (p, q) = control["removal_flips", class_name], (first / n, second / n)
        # Newcombe 1998, method 10: the distances to the ends that face each other, at right angles.
        assert e.low == pytest.approx(p - q - math.hypot(p - one.low, other.high - q))
        assert e.high == pytest.approx(p - q + math.hypot(one.high - p, q - other.low))


def test_what_never_happens_has_an_interval_too() -> None:
    case = Case(3, 2, missing=0)
    case.logits[:] = case.logits[:, :1]
    for e in case.estimates():
        if e.metric in ("removal_flips", "swap_flips", "swap_gap", "swap_follows", "fill_flips", "control_flips"):
            assert e.value == 0 and (e.n < 2 or e.high > 0.01), e  # type: ignore[operator]
        if e.metric in ("removal_effect", "removal_score"):
            assert e.value == pytest.approx(0, abs=2) and e.reason == ("" if e.n > 1 else "one image gives no interval")
        if e.metric == "removal_effect":
            assert (e.value, e.low) == (0, 0 if e.n > 1 else None)


@pytest.mark.parametrize(
    ("core", "spurious", "expected"),
    # Noise off the object, noise on it: 1 where all hangs on the object, -1 where all hangs on the rest.
    [([1, 1, 0, 0], [0, 0, 0, 0], 1.0), ([1, 1, 1, 1], [1, 1, 0, 0], 1.0), ([0, 0, 0, 0], [1, 1, 0, 0], -1.0),
     ([1, 0, 1, 0], [0, 1, 0, 1], 0.0), ([1, 1, 1, 0], [1, 0, 0, 0], 0.5)],
)  # fmt: skip
def test_relative_foreground_sensitivity(core: list[int], spurious: list[int], expected: float) -> None:
    found = sensitivity(np.tile([core, spurious], 10))
    e = found["relative_foreground_sensitivity"]
    assert e.value == pytest.approx(expected) and e.n == 40
    if e.measured:
        assert -1 - 1e-9 <= e.low <= e.value <= e.high <= 1 + 1e-9  # type: ignore[operator]
    assert found["core_accuracy"].value == np.mean(core) and found["spurious_accuracy"].value == np.mean(spurious)
    assert found["core_accuracy"].measured and found["spurious_accuracy"].measured
    # Chance hits of either side make an interval.
    assert (expected in (-1.0, 1.0)) != e.measured


def sensitivity(right: npt.NDArray[Any]) -> dict[str, Estimate]:
    """The estimates of noise where each image is `right` `(2, N)` of the time."""
    n = right.shape[1]
    subjects = Subjects((("coat", "object"),), (), ("a", "b"))
    nothing, flat = np.full((4, n, 0), np.nan), np.full((3, n, 0), np.nan)
    swaps = np.full((n, 0, 1), -1)
    found = Effects(
        nothing, nothing, np.ones(n), flat, flat, swaps, swaps, right.astype(np.float32), np.zeros(n, int), nothing[:2]
    )
    table = np.empty((n, 0), dtype=np.str_)
    every = intervention_estimates(found, np.zeros(n, np.int64), table, table, subjects, (), seed=0)
    return {e.metric: e for e in every}


def test_noise_of_no_image_of_one_and_of_all_alike_is_said_to_be_so() -> None:
    for n, reason in ((0, "no image with an object and a place beside it"), (1, "one image gives no interval")):
        for e in sensitivity(np.ones((2, n))).values():
            assert not e.measured and e.n == n and e.reason == reason
    alike = sensitivity(np.ones((2, 30)))
    assert alike["core_accuracy"].low == pytest.approx(stats.binomtest(30, 30).proportion_ci(method="wilson").low)
    e = alike["relative_foreground_sensitivity"]
    assert e.value is None and "all images are right, or none" in e.reason
    # The trials of one image go together: 10 images with three equal trials are as uncertain as 10 images.
    few = sensitivity(np.array([[1, 0] * 5, [0, 0, 0, 0, 0, 0, 0, 0, 0, 1]]))
    assert few["core_accuracy"].high - few["core_accuracy"].low > 0.5  # type: ignore[operator]


def test_controls_are_taken_off_image_by_image() -> None:
    """A change that moves every image, wherever it is made, is no effect of the region."""
    case = Case(5, 2, missing=0)
    anywhere, own = np.array([1.5, -1.5]), np.array([0.7, -0.7])
    case.logits[:] = np.where((case.logits[:, :1, :1] > case.logits[:, :1, 1:]), 4, -4) * np.array([1, -1])
    for v, change in enumerate(CHANGES):
        if change.kind in ("removal", "control"):
            sign = np.sign(case.logits[:, 0, :1])
            case.logits[:, v] -= sign * (anywhere + (own if change == Change("removal", 1) else 0))
    case.scores[:] = case.logits[:, :, 0] - case.logits[:, :, 1]
    of = {(e.metric, e.region): e for e in case.estimates() if e.class_name is None and e.group is None}
    assert of["removal_effect", "hair"].value == pytest.approx(1.4 / 8, rel=1e-5)
    assert of["control_effect", "hair"].value == pytest.approx(3.0 / 8, rel=1e-5)
    assert of["removal_effect", "mark"].value == pytest.approx(0, abs=1e-6)
    assert of["removal_margin", "hair"].value == pytest.approx(1.4, rel=1e-5)
    assert of["removal_margin", "hair"].low == pytest.approx(1.4, rel=1e-5)


def test_without_anything_to_remove_or_swap_there_is_noise_only() -> None:
    plain = (Change("none"), *(Change(kind) for kind in ("noise_rest", "noise_object") for _ in range(3)))  # type: ignore[arg-type]
    logits = torch.randn(9, len(plain), 2, generator=torch.Generator().manual_seed(0))
    found = Effects(*(x.numpy() for x in effects(logits, logits[:, :, 0], torch.zeros(9, dtype=torch.long), plain)))
    assert found.removal.shape == found.control.shape == (4, 9, 0) and found.swapped.shape == (9, 0, 1)
    subjects, table = Subjects((("coat", "object"),), (), ("a", "b")), np.empty((9, 0), dtype=np.str_)
    every = intervention_estimates(found, np.zeros(9, np.int64), table, table, subjects, (), seed=0)
    assert [e.metric for e in every] == ["core_accuracy", "spurious_accuracy", "relative_foreground_sensitivity"]


def test_the_fields_of_effects_are_in_the_order_in_which_they_are_made() -> None:
    case = Case(0, 3)
    found = case.found()
    shapes = {f.name: getattr(found, f.name).shape for f in fields(Effects)}
    assert shapes == {
        "removal": (4, 60, 2), "control": (4, 60, 2), "margin": (60,), "fill": (3, 60, 2), "fill_control": (3, 60, 2),
        "swapped": (60, 2, 3), "swap_control": (60, 2, 3), "noise": (2, 60), "decisions": (60,),
        "label_fall": (2, 60, 2),
    }  # fmt: skip
    assert (found.swapped[:, 0, 2] == -1).all() and (found.swapped[:, 1, :2] == -1).all()

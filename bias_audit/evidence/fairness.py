"""Evidence (c), continued: what becomes of images with different values of an attribute.

Enters: labels, predictions, the values of one attribute, and which value goes with which class. Leaves: `Estimate`s of
accuracy where they agree and where they conflict, of the differences between the rates at which classes are predicted,
and of the divergence between outcomes.

A rate of no images is no rate: what would need one is unmeasured, and says which images are missing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import rel_entr

from bias_audit.evidence.association import Alignment
from bias_audit.evidence.proportions import Count, Numbers, largest_difference, mean_proportion, minus
from bias_audit.evidence.tables import Counts, Floats, bounds, codes_of, crosstab, resample
from bias_audit.terms import Estimate, Subjects

NOT_FINITE = "for which the model's output is not finite"


def by_alignment(
    correct: npt.NDArray[np.bool_],
    decided: npt.NDArray[np.bool_],
    labels: npt.NDArray[np.int64],
    values: npt.NDArray[np.str_],
    alignment: Alignment,
    subjects: Subjects,
) -> tuple[Estimate, ...]:
    """`aligned_accuracy`, `conflicting_accuracy`, and their difference `alignment_gap`, of one attribute.

    An image is aligned if it has the value that goes with its class, and conflicting if it has another; classes with
    which no value goes are left out. Aligned and conflicting images differ in how many there are of each class, so over
    all classes each is the mean over the classes that have both kinds, and not the share of images: otherwise a class
    that is hard would look like a cue.

    The interval of a difference is Newcombe's within a class, and its generalisation to sums over all classes (see
    `mean_proportion`). `n` is the number of images, of a difference that of the smaller kind.

    Args:
        correct, decided: bool `(N,)`; a class with an image that is not decided is unmeasured.
        labels, values: class indices `(N,)` and the attribute's values as text `(N,)`, "" where unknown.
        alignment: which value goes with which class.
        subjects: the names of the classes.

    Example:
        >>> subjects = Subjects((), (("gender", ("f", "m")),), ("doctor", "nurse"))
        >>> labels, values = np.repeat([0, 1], 40), np.tile(np.repeat(["m", "f"], 20), 2)
        >>> correct = (labels == 1) | (values == "m") | (np.arange(80) % 4 == 0)  # most women are no doctors to it
        >>> goes = Alignment("gender", ("m", "f"))
        >>> for e in by_alignment(correct, np.ones(80, dtype=bool), labels, values, goes, subjects)[:3]:
        ...     print(e)
        aligned_accuracy by gender: 1.000 [0.886, 1.000], n = 40
        conflicting_accuracy by gender: 0.625 [0.519, 0.734], n = 40
        alignment_gap by gender: 0.375 [0.217, 0.481], n = 40
    """
    attribute = alignment.attribute
    rows: list[tuple[str | None, list[Count], list[Count]]] = []
    undecided = ""
    for c, (class_name, value) in enumerate(zip(subjects.classes, alignment.value_of_class, strict=True)):
        members = (labels == c) & (values != "")
        if value and (labels == c).any():
            if not decided[members].all():
                undecided = f"an image {NOT_FINITE}"
            aligned, conflicting = (
                (int(correct[kind].sum()), int(kind.sum()))
                for kind in (members & (values == value), members & (values != value))
            )
            rows.append((class_name, [aligned], [conflicting]))
    both = [(first[0], second[0]) for _, first, second in rows if first[0][1] and second[0][1]]
    rows.insert(0, (None, [first for first, _ in both], [second for _, second in both]))
    return tuple(e for row in rows for e in _alignment_estimates(attribute, *row, undecided))


def _alignment_estimates(
    attribute: str, class_name: str | None, aligned: list[Count], conflicting: list[Count], undecided: str
) -> list[Estimate]:
    found, missing = [], ""
    kinds = (
        ("aligned", aligned, f"the {attribute} that goes with it"),
        ("conflicting", conflicting, f"another {attribute}"),
    )
    for kind, counts, shown in kinds:
        reason = undecided
        if not reason and not sum(n for _, n in counts):
            reason = f"no image of class {class_name} has {shown}"
            if class_name is None:
                reason = f"no class has images with the {attribute} that goes with it and images with another"
            missing = reason
        numbers: Numbers = (None, None, None) if reason else mean_proportion(counts)
        n = sum(n for _, n in counts)
        found.append(Estimate(f"{kind}_accuracy", *numbers, n, None, class_name, attribute, None, reason))
    reason = undecided or missing
    gap: Numbers = (None, None, None) if reason else minus(mean_proportion(aligned), mean_proportion(conflicting))
    n = min(sum(n for _, n in counts) for _, counts, _ in kinds)
    found.append(Estimate("alignment_gap", *gap, n, None, class_name, attribute, None, reason))
    return found


def rate_differences(
    labels: npt.NDArray[np.int64],
    predictions: npt.NDArray[np.int64],
    attribute: str,
    values: npt.NDArray[np.str_],
    subjects: Subjects,
) -> tuple[Estimate, ...]:
    """`equalized_odds_difference` and `demographic_parity_difference` of one attribute, over all and for each class.

    Of a class against the rest, the demographic parity difference is the largest difference between two values' shares
    of images that are predicted as the class. The equalized odds difference is the largest between two values' true
    positive rates or false positive rates (Hardt et al., arXiv 1610.02413, definition 2.1). Over all classes it is the
    largest of the classes'. Of two classes either says the same, and what is measured is fairlearn's
    `equalized_odds_difference` and `demographic_parity_difference`, but for groups without an image: there fairlearn
    takes the rate to be 0, and here nothing is measured.

    Intervals are corrected for having chosen the largest (see `largest_difference`). `n` is the number of images in the
    smallest group whose rate is compared.

    Args:
        labels, predictions: class indices `(N,)`; a prediction of -1 is none, and nothing is measured.
        attribute, values: its name, and its values as text `(N,)`; images without a value ("") are left out.
        subjects: the names of classes and values.

    Example:
        >>> subjects = Subjects((), (("gender", ("f", "m")),), ("doctor", "nurse"))
        >>> labels, values = np.repeat([0, 1], 40), np.tile(np.repeat(["m", "f"], 20), 2)
        >>> predictions = np.where(values == "f", 1, labels)  # women are no doctors to it
        >>> print(rate_differences(labels, predictions, "gender", values, subjects)[0])
        equalized_odds_difference by gender: 1.000 [0.716, 1.000], n = 20
    """
    names = subjects.values_of(attribute)
    codes = codes_of(values, names)
    known = codes >= 0
    labels, predictions, codes = labels[known], predictions[known], codes[known]
    reason = _not_comparable(attribute, names, predictions)
    present = np.unique(labels).tolist()
    if reason:
        named = [None, *(subjects.classes[c] for c in present)]
        metrics = ("equalized_odds_difference", "demographic_parity_difference")
        return tuple(_unmeasured(metric, attribute, name, reason) for metric in metrics for name in named)
    met = sorted({*present, *predictions.tolist()})
    shape = (len(names), met[-1] + 1)
    right = labels == predictions
    of_class, taken = crosstab(codes, labels, shape), crosstab(codes, predictions, shape)
    hits, size = crosstab(codes[right], labels[right], shape), np.bincount(codes, minlength=len(names))
    odds = {}
    for c in present:
        name = subjects.classes[c]
        odds[c] = [
            _Rate(f"of class {name} ", hits[:, c], of_class[:, c]),
            _Rate(f"of a class other than {name} ", taken[:, c] - hits[:, c], size - of_class[:, c]),
        ]
    parity = {c: [_Rate("", taken[:, c], size)] for c in met}
    found = []
    for metric, rates in (("equalized_odds_difference", odds), ("demographic_parity_difference", parity)):
        # Of two classes one is the rest of the other: to compare both would be to compare each twice.
        compared = present[:1] if len(met) == 2 else list(rates)
        over_all = [rate for c in compared for rate in rates[c]]
        found.append(_difference(metric, attribute, None, names, over_all))
        found += [_difference(metric, attribute, subjects.classes[c], names, rates[c]) for c in present]
    return tuple(found)


@dataclass(frozen=True)
class _Rate:
    """Of how many images, and how many among them, of each value `(V,)`; `of` says which images."""

    of: str
    hits: Counts
    sizes: Counts

    @property
    def counts(self) -> list[Count]:
        return list(zip(self.hits.tolist(), self.sizes.tolist(), strict=True))


def _difference(
    metric: str, attribute: str, class_name: str | None, names: tuple[str, ...], rates: list[_Rate]
) -> Estimate:
    for rate in rates:
        if not rate.sizes.all():
            empty = names[int(rate.sizes.argmin())]
            return _unmeasured(metric, attribute, class_name, f"no image {rate.of}where {attribute}={empty}")
    numbers = largest_difference([pair for rate in rates for pair in combinations(rate.counts, 2)])
    n = min(int(rate.sizes.min()) for rate in rates)
    return Estimate(metric, *numbers, n, None, class_name, attribute)


def outcome_divergence(
    labels: npt.NDArray[np.int64],
    predictions: npt.NDArray[np.int64],
    attribute: str,
    values: npt.NDArray[np.str_],
    subjects: Subjects,
    *,
    seed: int,
) -> tuple[Estimate, ...]:
    """`outcome_divergence` of one attribute, over all and within each class: how differently two values fare.

    An image's outcome is to be right, or to be mistaken for a class. The divergence of two values is Jensen and
    Shannon's, in bits, of how their images spread over the outcomes: 0 alike, 1 without a common outcome; of more than
    two values it is that of the pair that differs most. After arXiv 1803.09797, where the outcomes are
    correct, incorrect and neither.

    The divergence of few images is too large: chance alone makes them differ. Its expected excess, to second order, is
    taken off, and nothing below 0 is left. The interval comes from resampled counts, with the excess taken off twice,
    for the sample and for the resample; and at a higher level where several pairs were compared (Bonferroni). `n` is
    the number of images of the rarest value.

    Args and what is not measured: as `rate_differences`; `seed` is that of the resampling.

    Example:
        >>> subjects = Subjects((), (("gender", ("f", "m")),), ("doctor", "nurse"))
        >>> labels, values = np.repeat([0, 1], 40), np.tile(np.repeat(["m", "f"], 20), 2)
        >>> predictions = np.where(values == "f", 1, labels)  # women are no doctors to it
        >>> over_all, doctors, nurses = outcome_divergence(labels, predictions, "gender", values, subjects, seed=0)
        >>> doctors.value, nurses.value
        (1.0, 0.0)
    """
    names = subjects.values_of(attribute)
    codes = codes_of(values, names)
    known = codes >= 0
    labels, predictions, codes = labels[known], predictions[known], codes[known]
    reason = _not_comparable(attribute, names, predictions)
    present = np.unique(labels).tolist()
    found = []
    for c in (None, *present):
        class_name = None if c is None else subjects.classes[c]
        members = np.ones_like(known[known]) if c is None else labels == c
        size = np.bincount(codes[members], minlength=len(names))
        because = reason
        if not because and not size.all():
            because = (
                f"no image {f'of class {class_name} ' if class_name else ''}where {attribute}={names[size.argmin()]}"
            )
        if because:
            found.append(_unmeasured("outcome_divergence", attribute, class_name, because))
            continue
        outcomes = np.where(predictions == labels, -1, predictions)[members]
        kinds, which = np.unique(outcomes, return_inverse=True)
        counts = crosstab(codes[members], which, (len(names), max(len(kinds), 2)))
        found.append(
            Estimate("outcome_divergence", *_divergence(counts, seed), int(size.min()), None, class_name, attribute)
        )
    return tuple(found)


def _divergence(counts: Counts, seed: int) -> tuple[float, float, float]:
    """The largest divergence between two rows of `(V, outcomes)`, with its interval."""
    drawn = np.stack([resample(row, (seed, v)) for v, row in enumerate(counts)], axis=1)
    pairs = list(combinations(range(len(counts)), 2))
    found = []
    for i, j in pairs:
        excess = _excess(counts[i], counts[j])
        value = max(0.0, float(_jensen_shannon(counts[i], counts[j])) - excess)
        draws = np.maximum(0, _jensen_shannon(drawn[:, i], drawn[:, j]) - 2 * excess)
        low, high = bounds(draws, value, 1 - 0.05 / len(pairs)) or (value, value)
        found.append((value, low, high))
    value, low, high = (max(bound) for bound in zip(*found, strict=True))
    return value, low, high


def _jensen_shannon(one: npt.NDArray[Any], two: npt.NDArray[Any]) -> Floats:
    """The divergence of counts `(..., outcomes)`, in bits."""
    p, q = one / one.sum(axis=-1, keepdims=True), two / two.sum(axis=-1, keepdims=True)
    mixed = (p + q) / 2
    bits: Floats = (rel_entr(p, mixed) + rel_entr(q, mixed)).sum(axis=-1) / (2 * math.log(2))
    return bits


def _excess(one: Counts, two: Counts) -> float:
    """By how many bits the divergence of two samples is expected to exceed that of what they were drawn from.

    The entropy of a sample falls short by half its outcomes, less one, per image (Miller 1955); that of the mixture by
    half the sum of its shares' variances over the shares.
    """
    p, q = one / one.sum(), two / two.sum()
    mixed, variance = (p + q) / 2, (p * (1 - p) / one.sum() + q * (1 - q) / two.sum()) / 4
    own = ((one > 0).sum() - 1) / one.sum() + ((two > 0).sum() - 1) / two.sum()
    shared = (variance[mixed > 0] / mixed[mixed > 0]).sum()
    return float((own / 4 - shared / 2) / math.log(2))


def _not_comparable(attribute: str, names: tuple[str, ...], predictions: npt.NDArray[np.int64]) -> str:
    """Why the values of an attribute cannot be compared on these images, "" if they can."""
    if not len(predictions):
        return f"no image has a value of {attribute}"
    if len(names) < 2:
        return f"{attribute} has one value only"
    return f"an image {NOT_FINITE}" if (predictions < 0).any() else ""


def _unmeasured(metric: str, attribute: str, class_name: str | None, reason: str) -> Estimate:
    return Estimate(metric, None, None, None, 0, None, class_name, attribute, None, reason)

"""Evidence (d): whether label and attribute go together in the data, and whether the model makes more of it.

Enters: the labels and attributes of the training set and of the audit set, the predictions, and features. Leaves:
`Estimate`s of association in either set, of bias amplification and of how well an attribute can be read from features;
and `Alignment`s, which say what value goes with which class.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bias_audit.data.metadata import Metadata
from bias_audit.evidence.tables import Counts, Floats, bounds, codes_of, crosstab, draws_for, resample
from bias_audit.stats import bootstrap_ratios
from bias_audit.terms import Estimate, Subjects


@dataclass(frozen=True)
class Alignment:
    """Of one attribute, which of its values goes with each class in the training data: "" where none does.

    `value_of_class` is in the order of the classes.
    """

    attribute: str
    value_of_class: tuple[str, ...]


@dataclass(frozen=True)
class _Table:
    """Samples by class and value `(C, V)`, of those whose value is known; classes without a name are in it too."""

    attribute: str
    values: tuple[str, ...]
    counts: Counts

    @property
    def n(self) -> int:
        return int(self.counts.sum())


def association(data: Metadata, subjects: Subjects, *, seed: int, audited: bool = False) -> tuple[Estimate, ...]:
    """`cramers_v` of each attribute with the label, and `npmi` of each class with each value.

    `cramers_v` (0 to 1: one tells the other) is corrected for its bias, by which it would be above 0 in small samples
    of independent labels: Bergsma, Journal of the Korean Statistical Society 42 (2013). `npmi` (-1: never
    together, 0: independent, 1: only together) is the normalised pointwise mutual information: Bouma, Proceedings of
    GSCL (2009).

    The interval of `cramers_v` comes from resampled tables. In each the squared association is too large by the bias of
    the sample and by that of the resample, so Bergsma's correction is taken twice. That of `npmi` comes from the shares
    that the counts leave possible. Samples whose value is unknown are left out; `n` counts the others.

    Args:
        data: the training set's; or with `audited` the audit set's, of which the metrics are called `audit_cramers_v`
            and `audit_npmi`.
        subjects: the audit set's names; attributes that `data` lacks are unmeasured, others that it has are left out.
        seed: of the resampling.

    Example:
        >>> subjects = Subjects((), (("gender", ("female", "male")),), ("doctor", "nurse"))
        >>> data = Metadata.of([0] * 50 + [1] * 50, {"gender": ["male"] * 40 + ["female"] * 60})
        >>> v, *npmi = association(data, subjects, seed=0)
        >>> v.metric, round(v.value, 2), len(npmi)
        ('cramers_v', 0.81, 4)
    """
    prefix, whose = ("audit_", "audit set") if audited else ("", "training data")
    found: list[Estimate] = []
    for attribute, values in subjects.attributes:
        table = _table(data, attribute, subjects)
        missing = _missing(data, table, whose)
        if missing:
            found.append(Estimate(f"{prefix}cramers_v", None, None, None, table.n, group=attribute, reason=missing))
            continue
        found.append(_cramers_v(f"{prefix}cramers_v", table, whose, seed))
        npmi, npmi_drawn = _npmi(table.counts), _npmi_draws(table.counts, seed)
        for c, class_name in enumerate(subjects.classes):
            for v, value in enumerate(table.values):
                if value in values:
                    one = _npmi_estimate(float(npmi[c, v]), npmi_drawn[:, c, v])
                    reason = "" if one[0] is not None else _why_no_npmi(table, c, v, class_name, whose)
                    found.append(
                        Estimate(f"{prefix}npmi", *one, table.n, None, class_name, f"{attribute}={value}", None, reason)
                    )
    return tuple(found)


def alignments(
    training: Metadata | None, subjects: Subjects, seed: int, *, least: float = 0.1
) -> tuple[Alignment, ...]:
    """Which value goes with which class, of each attribute that is shown to go with the label in the training data.

    It is shown if the whole interval of `cramers_v` lies above `least`. The value that goes with a class is the one of
    the largest `npmi` whose interval lies above 0; a class may have none.

    Example:
        >>> subjects = Subjects((), (("gender", ("female", "male")),), ("doctor", "nurse"))
        >>> data = Metadata.of([0] * 50 + [1] * 50, {"gender": ["male"] * 40 + ["female"] * 60})
        >>> alignments(data, subjects, seed=0)
        (Alignment(attribute='gender', value_of_class=('male', 'female')),)
    """
    if training is None:
        return ()
    estimates = association(training, subjects, seed=seed)
    found = []
    for attribute, values in subjects.attributes:
        v = next(e for e in estimates if e.metric == "cramers_v" and e.group == attribute)
        if v.low is not None and v.low > least:
            shown = {
                (e.class_name, e.group): e.value
                for e in estimates
                if e.metric == "npmi" and e.value is not None and e.low is not None and e.low > 0
            }
            found.append(Alignment(attribute, tuple(_goes_with(c, attribute, values, shown) for c in subjects.classes)))
    return tuple(found)


def _goes_with(
    class_name: str, attribute: str, values: tuple[str, ...], npmi: dict[tuple[str | None, str | None], float]
) -> str:
    candidates = [value for value in values if (class_name, f"{attribute}={value}") in npmi]
    return max(candidates, key=lambda value: npmi[class_name, f"{attribute}={value}"], default="")


def bias_amplification(
    training: Metadata,
    labels: npt.NDArray[np.int64],
    attributes: npt.NDArray[np.str_],
    predictions: npt.NDArray[np.int64],
    subjects: Subjects,
    *,
    seed: int,
) -> tuple[Estimate, ...]:
    """`bias_amplification` of each attribute: by how much the model leans further where the training data lean.

    For a value a and a class t, it is the share of the images with a that are predicted as t, less the share that are
    t; counted as positive where a and t occur together more often in the training data than if they were independent,
    as negative where less often, and as 0 where exactly as often; averaged over all pairs. 0: the predictions are
    spread over the values as the labels are; positive: the training data's association is made stronger. From -1 to 1.

    This is the direction attribute to task of arXiv 2102.12594, in which both shares are of the same
    images. The direction task to attribute needs a model that predicts the attribute, which an audited model does not.

    Intervals are bootstrapped over images, within class and value.

    Args:
        training: labels and attributes of the training set.
        labels, predictions: class indices of the audit set `(N,)`; a prediction of -1 is none.
        attributes: text `(N, A)` in the order of `subjects.attributes`; images without a value are left out.
        subjects: the audit set's names.
        seed: of the bootstrap.

    Example:
        >>> subjects = Subjects((), (("gender", ("f", "m")),), ("doctor", "nurse"))
        >>> training = Metadata.of([0] * 10 + [1] * 10, {"gender": ["m"] * 8 + ["f"] * 11 + ["m"]})
        >>> labels, values = np.repeat([0, 1], 40), np.tile(np.repeat(["m", "f"], 20), 2)
        >>> predictions = np.where(values == "f", 1, labels)  # women are no doctors to it
        >>> round(bias_amplification(training, labels, values[:, None], predictions, subjects, seed=0)[0].value, 3)
        0.25
    """
    found = []
    for column, (attribute, _) in enumerate(subjects.attributes):
        values = attributes[:, column]
        known = values != ""
        found.append(
            _amplification(training, attribute, labels[known], values[known], predictions[known], subjects, seed)
        )
    return tuple(found)


def _amplification(
    training: Metadata,
    attribute: str,
    labels: npt.NDArray[np.int64],
    values: npt.NDArray[np.str_],
    predictions: npt.NDArray[np.int64],
    subjects: Subjects,
    seed: int,
) -> Estimate:
    table = _table(training, attribute, subjects)
    reason = _missing(training, table, "training data")
    if not len(labels):
        reason = f"no image of the audit set has a value of {attribute}"
    elif (predictions < 0).any():
        reason = "an image for which the model's output is not finite"
    if reason:
        return Estimate("bias_amplification", None, None, None, 0, group=attribute, reason=reason)
    classes = max(len(table.counts), int(predictions.max()) + 1, int(labels.max()) + 1)
    counts = np.zeros((classes, len(table.values)))
    counts[: len(table.counts)] = table.counts
    # In whole numbers, so that exact independence is seen as such.
    together = counts * table.n
    lean = np.sign(together - counts.sum(axis=1, keepdims=True) * counts.sum(axis=0, keepdims=True))
    of_value = codes_of(values, table.values)
    present, size = np.unique(of_value, return_counts=True)
    share = 1 / size[np.searchsorted(present, of_value)]
    # A class gains an image by a prediction and loses one by a label; each value weighs the same.
    leaned = (lean[predictions, of_value] - lean[labels, of_value]) * share / (len(present) * classes)
    strata = labels * len(table.values) + of_value
    whole = np.full(len(labels), 1 / len(labels))
    value, low, high = bootstrap_ratios(leaned[:, None], whole[:, None], strata, seed=seed)
    n = len(labels)
    if n == 1:
        one = float(value[0])
        return Estimate("bias_amplification", one, None, None, n, group=attribute, reason="one image gives no interval")
    return Estimate("bias_amplification", float(value[0]), float(low[0]), float(high[0]), n, group=attribute)


def _table(data: Metadata, attribute: str, subjects: Subjects) -> _Table:
    """The samples whose value is known; the audit set's values come first, then others that the data have."""
    if attribute not in data.names:
        return _Table(attribute, (), np.zeros((len(subjects.classes), 0), dtype=np.int64))
    column = data.column(attribute)
    audited = subjects.values_of(attribute)
    values = (*audited, *sorted(set(column.tolist()) - set(audited) - {""}))
    codes = codes_of(column, values)
    known = codes >= 0
    classes = max(len(subjects.classes), int(data.labels.max(initial=0)) + 1)
    return _Table(attribute, values, crosstab(data.labels[known], codes[known], (classes, len(values))))


def _missing(data: Metadata, table: _Table, whose: str) -> str:
    """Why nothing can be said of the attribute, "" where something can."""
    if table.attribute not in data.names:
        return f"the {whose} has no attribute {table.attribute!r}; it has {', '.join(data.names) or 'none'}"
    return "" if table.n else f"no sample of the {whose} has a value of {table.attribute}"


def _cramers_v(metric: str, table: _Table, whose: str, seed: int) -> Estimate:
    occupied = table.counts[table.counts.any(axis=1)][:, table.counts.any(axis=0)]
    classes, values = occupied.shape
    n, reason = table.n, ""
    if classes < 2:
        reason = f"the {whose} has one class only"
    elif values < 2:
        reason = f"{table.attribute} has one value only in the {whose}"
    elif n < 2 * max(classes, values):
        reason = f"{n} samples of {classes} classes and {values} values are too few"
    if reason:
        return Estimate(metric, None, None, None, n, group=table.attribute, reason=reason)
    value = float(_corrected_v(table.counts.astype(np.float64), classes, values, 1))
    drawn = _corrected_v(resample(table.counts, seed), classes, values, 2)
    low, high = bounds(drawn, value) or (value, value)
    return Estimate(metric, value, low, high, n, group=table.attribute)


def _corrected_v(tables: Floats, classes: int, values: int, times: int) -> Floats:
    """Cramér's V of each table `(..., C, V)`, with Bergsma's correction of the squared association and of the most that
    it can be taken so many times."""
    n = tables.sum(axis=(-2, -1))
    squared = _phi_squared(tables) - times * (classes - 1) * (values - 1) / (n - 1)
    most = min(classes, values) - 1 - times * (min(classes, values) - 1) ** 2 / (n - 1)
    v: Floats = np.sqrt(np.clip(squared / most, 0, 1))
    return v


def _phi_squared(tables: Floats) -> Floats:
    """Pearson's chi-squared over the number of samples, of each table `(..., C, V)`."""
    rows, columns = tables.sum(axis=-1, keepdims=True), tables.sum(axis=-2, keepdims=True)
    n = rows.sum(axis=-2, keepdims=True)
    # The sum of p^2 / (row share x column share), less 1; a class or value that is in no sample adds nothing.
    squared = np.divide(tables**2, rows * columns, out=np.zeros_like(tables), where=rows * columns > 0)
    phi: Floats = squared.sum(axis=(-2, -1)) - (n[..., 0, 0] > 0)
    return phi


def _npmi(counts: Counts) -> Floats:
    """Of each cell of `(C, V)`; NaN where its class or its value is in no sample, or both are in every sample."""
    n, rows, columns = counts.sum(), counts.sum(axis=1, keepdims=True), counts.sum(axis=0, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        npmi = np.log(counts * (n / (rows * columns))) / -np.log(counts / n)
    # The limit for a pair that never occurs.
    never = (counts == 0) & (rows > 0) & (columns > 0)
    return np.where(never, -1.0, np.where(np.isfinite(npmi), npmi, np.nan))


def _npmi_draws(counts: Counts, seed: int) -> Floats:
    """What each cell's `npmi` may be, given the counts: `(R, C, V)`.

    For each cell the samples are of its class and value, of its class only, of its value only, or of neither. The four
    shares are drawn from their posterior under Jeffreys' prior, half a sample each. Resampling would not do: it
    never draws a pair of which there is no sample.
    """
    n, rows, columns = counts.sum(), counts.sum(axis=1, keepdims=True), counts.sum(axis=0, keepdims=True)
    four = np.stack([counts, rows - counts, columns - counts, n - rows - columns + counts])
    gamma = np.random.default_rng(seed).standard_gamma(four + 0.5, size=(draws_for(four.size), *four.shape))
    total = gamma.sum(axis=1)
    both, of_class, of_value = gamma[:, 0], gamma[:, 0] + gamma[:, 1], gamma[:, 0] + gamma[:, 2]
    draws: Floats = np.log(both * total / (of_class * of_value)) / -np.log(both / total)
    return draws


def _npmi_estimate(value: float, drawn: Floats) -> tuple[float | None, float | None, float | None]:
    interval = bounds(drawn, value) if np.isfinite(value) else None
    return (value, *interval) if interval else (None, None, None)


def _why_no_npmi(table: _Table, c: int, v: int, class_name: str, whose: str) -> str:
    if not table.counts[c].any():
        return f"the {whose} has no sample of class {class_name}"
    if not table.counts[:, v].any():
        return f"the {whose} has no sample where {table.attribute}={table.values[v]}"
    return f"every sample of the {whose} is of class {class_name} and {table.attribute}={table.values[v]}"

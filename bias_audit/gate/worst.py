"""Which images weigh most in an estimate, so that a person can look at them first.

Enters: a run, an audit of it and an `Estimate`. Leaves: the ids of a few images, those first that weigh most.

Neither torch nor Lightning is imported here.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

from bias_audit.gate.columns import SampleColumns
from bias_audit.records.errors import RecordError
from bias_audit.records.runs import Run
from bias_audit.terms import GROUP_METRICS, Estimate


class WorstImages:
    """The images of a run that weigh most in its estimates; each audit's arrays are read once.

    Example:
        >>> WorstImages(run).of(3, run.audits[3].estimate("accuracy"), 5)  # doctest: +SKIP
        ('img_0412.png', 'img_0087.png')
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._columns = cache(lambda index: SampleColumns.of_run(run, index))
        self._scores = cache(run.scores)
        self._table = cache(run.sample_table)
        self._aligned = cache(self._align)

    def of(
        self, index: int, e: Estimate, count: int, too_low: bool = False, before: SampleColumns | None = None
    ) -> tuple[str, ...]:
        """Ids of at most `count` images of audit `index` that weigh most in an estimate, the heaviest first.

        Of a share and of what a removal does those with the largest, or the smallest where it is `too_low`; of accuracy
        and what is made of it those that are misclassified most clearly, of the worst group where groups are compared;
        of coverage those without a heatmap. Where a number is no sum over images, those with most of the heatmap in the
        region. () where nothing of this can be read.

        Args:
            index: of the audit, counted from 0.
            e: one of its estimates.
            count: at least 1.
            too_low: whether there is too little of it, rather than too much.
            before: of the baseline: what weighs is then how much worse than there an image is.
        """
        if e.region is None and e.metric not in GROUP_METRICS:
            return ()
        try:
            weights = self._weights(index, e, too_low, before)
            known, rows = self._aligned(index)
            table, right = self._table(), self._columns(index).correct[known]
        except RecordError:
            # The outcome does not hang on it.
            return ()
        weights = weights[known]
        if e.region is None and e.group in self._values:
            # Of compared groups, of all classes together, of one class or of each, the one that is right least often.
            names = self.run.manifest.subjects.classes
            classes = names if e.metric == "worst_group_accuracy" else (e.class_name,)
            groups = [self._members(rows, name, e.group, v) for name in classes for v in self._values[e.group]]
            members = min((g for g in groups if g.any()), key=lambda g: right[g].mean(), default=np.zeros_like(right))
        else:
            attribute, _, value = (e.group or "").partition("=")
            members = self._members(rows, e.class_name, attribute if value else None, value)
        (heavy,) = (members & np.isfinite(weights)).nonzero()
        heavy = heavy[np.argsort(-weights[heavy], kind="stable")[:count]]
        return tuple(table.ids[i] for i in rows[heavy])

    @property
    def _values(self) -> dict[str, tuple[str, ...]]:
        return dict(self.run.manifest.subjects.attributes)

    def _members(
        self, rows: npt.NDArray[np.int64], class_name: str | None, attribute: str | None, value: str
    ) -> npt.NDArray[np.bool_]:
        """Which `rows` of the table are of a class and have an attribute's value; None is any."""
        table, subjects = self._table(), self.run.manifest.subjects
        members = np.ones(len(rows), dtype=bool)
        if class_name in subjects.classes:
            members &= table.labels[rows] == subjects.classes.index(class_name)
        if attribute in self._values:
            members &= table.attributes[rows, list(self._values).index(attribute)] == value
        return members

    def _align(self, index: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The samples of an audit that the table has, and their rows in it."""
        ids, listed = self._columns(index).ids, self._table().ids
        if ids == listed:
            every = np.arange(len(ids))
            return every, every
        place = {name: i for i, name in enumerate(listed)}
        known = [i for i, name in enumerate(ids) if name in place]
        return np.array(known, dtype=np.int64), np.array([place[ids[i]] for i in known], dtype=np.int64)

    def _weights(self, index: int, e: Estimate, too_low: bool, before: SampleColumns | None) -> npt.NDArray[np.float64]:
        """How much each image weighs, `(N,)`, NaN where it does not."""
        columns = self._columns(index)
        if e.region is None:
            scores = self._scores(index)
            wrong = ~scores.correct
            if before is not None:
                was_right = {name for name, right in zip(before.ids, before.correct, strict=True) if right}
                wrong &= np.array([name in was_right for name in scores.ids])
            return np.where(wrong, -scores.margin.astype(np.float64), np.nan)
        found, nothing = columns.of(e), np.full(len(columns.ids), np.nan)
        share = Estimate("energy_share", 0.0, 0.0, 0.0, 0, e.region, method=e.method or columns.methods[0])
        if e.metric == "coverage":
            covered = columns.of(share)
            return nothing if covered is None else np.where(np.isfinite(covered.values), np.nan, 1.0)
        if found is None:
            found, too_low, before = columns.of(share), False, None
        if found is None:
            return nothing
        of_before = None if before is None else before.of(e)
        if before is None or of_before is None:
            return -found.values if too_low else np.where(found.values > 0, found.values, np.nan)
        known = dict(zip(before.ids, of_before.values, strict=True))
        change = found.values - np.array([known.get(name, np.nan) for name in columns.ids])
        worse: npt.NDArray[np.float64] = -change if too_low else change
        return worse

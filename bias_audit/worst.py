"""Which images weigh most in an estimate, so that a person can look at them first.

Enters: a run, an audit of it and an `Estimate`. Leaves: the ids of a few images, those first that weigh most.

Neither torch nor Lightning is imported here.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

from bias_audit.pairing import SampleColumns
from bias_audit.records import RecordError, Run
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
        self._annotations = cache(run.annotations)

    def of(self, index: int, e: Estimate, count: int, too_low: bool = False) -> tuple[str, ...]:
        """Ids of at most `count` images of audit `index` that weigh most in an estimate, the heaviest first.

        Of a share and of what a removal does those with the largest, or the smallest where it is `too_low`; of accuracy
        and what is made of it those that are misclassified most clearly. Where a number is no sum over images, those
        with most of the heatmap in the region. () where nothing of this can be read.

        Args:
            index: of the audit, counted from 0.
            e: one of its estimates.
            count: at least 1.
            too_low: whether there is too little of it, rather than too much.
        """
        if e.region is None and e.metric not in GROUP_METRICS:
            return ()
        try:
            weights, annotations = self._weights(index, e, too_low), self._annotations()
        except RecordError:
            # The outcome does not hang on it.
            return ()
        members = np.isfinite(weights)
        if e.class_name is not None:
            members &= annotations.labels == self.run.manifest.subjects.classes.index(e.class_name)
        attribute, _, value = (e.group or "").partition("=")
        if value:
            column = [name for name, _ in self.run.manifest.subjects.attributes].index(attribute)
            members &= annotations.attributes[:, column] == value
        (rows,) = members.nonzero()
        heaviest = rows[np.argsort(-weights[rows], kind="stable")[:count]]
        return tuple(annotations.ids[i] for i in heaviest)

    def _weights(self, index: int, e: Estimate, too_low: bool) -> npt.NDArray[np.float64]:
        """How much each image weighs, `(N,)`, NaN where it does not."""
        if e.region is None:
            scores = self._scores(index)
            return np.where(scores.correct, np.nan, -scores.margin.astype(np.float64))
        columns = self._columns(index)
        found = columns.of(e)
        if found is None:
            share = Estimate("energy_share", 0.0, 0.0, 0.0, 0, e.region, method=e.method or columns.methods[0])
            found = columns.of(share)
        if found is None:
            return np.full(len(columns.ids), np.nan)
        return -found.values if too_low else np.where(found.values > 0, found.values, np.nan)

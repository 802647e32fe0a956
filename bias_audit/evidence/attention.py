"""Evidence (a): where the heatmaps' energy lies.

Enters: the scores of every sample, and those of the step-0 model where there are any. Leaves: `Estimate`s per metric,
method, region, class and group. Attention is not reliance: what follows from it is for `verdicts` to say.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import numpy.typing as npt

from bias_audit.evidence.cells import Cell, cells
from bias_audit.records.samples import SampleScores
from bias_audit.stats import Indices, bootstrap_columns, wilson
from bias_audit.terms import BY_GROUP_METRICS, OWN, Estimate, Subjects

_GAIN = "energy_share_gain"

Numbers = tuple[float | None, float | None, float | None]


def attention(
    scores: SampleScores,
    attributes: npt.NDArray[np.str_],
    subjects: Subjects,
    *,
    seed: int,
    reference: SampleScores | None = None,
) -> tuple[Estimate, ...]:
    """Mean energy share, pointing game, IoU and rank accuracy, enrichment, gain since step 0, and coverage.

    Enrichment is the mean share over the mean area, not the mean of their ratios, which the few images where a region
    is tiny would rule. `energy_share_gain` is the mean, over images, of the share minus the same image's share at the
    reference. Coverage is the share of the images showing a region whose map is not silent. A metric of the user's own
    that is infinite on an image has no mean.

    `attributes` is `(N, A)` text in the order of `subjects.attributes`.
    """
    metrics = (*scores.metrics, _GAIN) if reference is not None else scores.metrics
    found: list[Estimate] = []
    all_cells = list(cells(scores.labels, attributes, subjects))
    for attribute, group in groupby(all_cells, key=lambda cell: cell.attribute):
        wanted = metrics if attribute is None else [metric for metric in metrics if metric in BY_GROUP_METRICS]
        found += _estimates(list(group), _Columns.of(scores, reference, wanted), seed)
    for cell in all_cells:
        if cell.attribute is None:
            found += _coverage(cell, scores)
    return tuple(found)


@dataclass(frozen=True)
class _Columns:
    """H per-image quantities, each a numerator over a denominator, both 0 where it is not valid.

    `names` are the metric, method and region of each; `places` `(3, H)` where these are in the scores, and `before`
    where the share is in those of the reference, of a gain. They are made of the scores when they are needed: all
    columns of many images take more room than the scores.
    """

    names: list[tuple[str, str, str]]
    scores: SampleScores
    reference: SampleScores | None
    places: npt.NDArray[np.int64]
    before: npt.NDArray[np.int64]

    @classmethod
    def of(cls, scores: SampleScores, reference: SampleScores | None, metrics: Sequence[str]) -> _Columns:
        names = [
            (metric, method, region) for method in scores.methods for region in scores.regions for metric in metrics
        ]
        shares = [("energy_share" if m == _GAIN else m, method, region) for m, method, region in names]
        before = np.zeros((3, 0), dtype=np.int64) if reference is None else _places(reference, shares)
        return cls(names, scores, reference, _places(scores, shares), before)

    def __call__(self, images: Indices, some: slice) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float32]]:
        """Numerators and denominators `(n, h)` of some images and columns."""
        values = self._values(images, some)
        weighted = np.array([metric == "enrichment" for metric, _, _ in self.names[some]])[:, None]
        areas = self.scores.areas[images, self.places[2, some, None]]
        weights = np.where(weighted, areas, np.float32(1))
        valid = np.isfinite(values)
        return np.where(valid, values * weights, 0).T, np.where(valid, weights, 0).T

    def _values(self, images: Indices, some: slice) -> npt.NDArray[np.float64]:
        metric, method, region = self.places[:, some, None]
        values: npt.NDArray[np.float64] = self.scores.values[metric, method, images, region].astype(np.float64)
        gained = [i for i, (name, _, _) in enumerate(self.names[some]) if name == _GAIN]
        if self.reference is not None and gained:
            metric, method, region = self.before[:, some, None][:, gained]
            values[gained] -= self.reference.values[metric, method, images, region]
        return values

    def counts(self, subsets: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """How many images of each subset `(N, C)` are valid, `(C, H)`, and on how many of all a column is infinite.

        Infinite is what a metric of the user's own may be.
        """
        everyone = np.arange(len(subsets))
        valid = np.empty((subsets.shape[1], len(self.names)), dtype=np.int64)
        infinite = np.empty(len(self.names), dtype=np.int64)
        for column in range(len(self.names)):
            this = slice(column, column + 1)
            shown = self(everyone, this)[1] > 0
            valid[:, column] = np.count_nonzero(subsets & shown, axis=0)
            infinite[column] = np.isinf(self._values(everyone, this)).sum()
        return valid, infinite


def _places(scores: SampleScores, names: list[tuple[str, str, str]]) -> npt.NDArray[np.int64]:
    """Where the metric, method and region of each name are among the scores, `(3, H)`."""
    axes = (scores.metrics, scores.methods, scores.regions)
    return np.array(
        [[axis.index(name) for name in of] for axis, of in zip(axes, zip(*names, strict=True), strict=True)]
    )


def _estimates(group: list[Cell], columns: _Columns, seed: int) -> Iterator[Estimate]:
    """The estimates of cells that share their strata, from one set of resamples."""
    pairs = [(cell, name) for cell in group for name in columns.names]
    subsets = np.stack([cell.members for cell in group], axis=1)
    counts, infinite = columns.counts(subsets)
    # Of a thousand classes most may have one image, of which there is no interval.
    several = subsets.sum(0) > 1
    numbers_of = np.full((3, len(group), len(columns.names)), np.nan)
    if several.any():
        found = bootstrap_columns(columns, len(columns.names), group[0].strata, seed=seed, subsets=subsets[:, several])
        numbers_of[:, several] = np.reshape(found, (3, -1, len(columns.names)))
    with np.errstate(invalid="ignore"):
        for place in np.flatnonzero(~several):
            numerators, denominators = columns(np.flatnonzero(subsets[:, place]), slice(None))
            numbers_of[0, place] = (numerators / denominators)[0]
    value, low, high = numbers_of.reshape(3, -1)
    for i, (cell, (metric, method, region)) in enumerate(pairs):
        n = int(counts.flat[i])
        numbers: Numbers = (float(value[i]), float(low[i]), float(high[i])) if n else (None, None, None)
        reason = "" if n else f"no image with {region} and a heatmap that is not silent"
        column = i % len(columns.names)
        of_hits = metric == "pointing_game" or metric.startswith(OWN)
        if of_hits and n > 1 and value[i] in (0.0, 1.0) and low[i] == high[i]:
            # Resampling images that all hit, or all miss, gives no width either.
            numbers = wilson(round(float(value[i]) * n), n)
        if infinite[column]:
            # Without these images it would look better, or worse, than it is.
            numbers, reason = (None, None, None), f"infinite on {infinite[column]} of the audited images"
        if n == 1:
            # Resampling one image gives it again: an interval of no width, which would look certain.
            numbers, reason = (float(value[i]), None, None), "one image gives no interval"
        yield _estimate(metric, numbers, n, region, cell, method, reason)


def _coverage(cell: Cell, scores: SampleScores) -> Iterator[Estimate]:
    for method in scores.methods:
        for r, region in enumerate(scores.regions):
            shown = cell.members & (scores.areas[:, r] > 0)
            valid = shown & np.isfinite(scores.of("energy_share", method, region))
            n = int(shown.sum())
            numbers: Numbers = wilson(int(valid.sum()), n) if n else (None, None, None)
            reason = "" if n else f"no image shows {region}"
            yield _estimate("coverage", numbers, n, region, cell, method, reason)


def _estimate(metric: str, numbers: Numbers, n: int, region: str, cell: Cell, method: str, reason: str) -> Estimate:
    value, low, high = numbers
    return Estimate(metric, value, low, high, n, region, cell.class_name, cell.group, method, reason)

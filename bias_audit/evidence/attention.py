"""Evidence (a): where the heatmaps' energy lies.

Enters: the scores of every sample, and those of the step-0 model where there are any. Leaves: `Estimate`s per metric,
method, region, class and group. Attention is not reliance: what follows from it is for `verdict` to say.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import numpy.typing as npt

from bias_audit.evidence.cells import Cell, cells
from bias_audit.records.results import SampleScores
from bias_audit.stats import bootstrap_ratios, wilson
from bias_audit.terms import OWN, Estimate, Subjects

# Where the energy lies is broken down to class x group; how well a map locates, to the class.
_BY_GROUP = ("energy_share", "enrichment")

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
    columns = _Columns.of(scores, reference)
    found: list[Estimate] = []
    all_cells = list(cells(scores.labels, attributes, subjects))
    for attribute, group in groupby(all_cells, key=lambda cell: cell.attribute):
        if attribute is not None:
            # Cells without an attribute come first: what only these need is let go.
            columns = columns.by_group()
        found += _estimates(list(group), columns, seed)
    for cell in all_cells:
        if cell.attribute is None:
            found += _coverage(cell, scores)
    return tuple(found)


@dataclass(frozen=True)
class _Columns:
    """H per-image quantities, each a numerator over a denominator `(N, H)`, both 0 where it is not valid.

    `names` are the metric, method and region of each. They are most of what is held of many images: a denominator is 1
    or an area, and loses nothing as float32. `infinite` `(H,)` counts the images where it is infinite, which a metric
    of the user's own may be.
    """

    names: list[tuple[str, str, str]]
    infinite: npt.NDArray[np.int64]
    numerators: npt.NDArray[np.float64]
    denominators: npt.NDArray[np.float32]

    @classmethod
    def of(cls, scores: SampleScores, reference: SampleScores | None) -> _Columns:
        metrics = (*scores.metrics, "energy_share_gain") if reference is not None else scores.metrics
        names = [
            (metric, method, region) for method in scores.methods for region in scores.regions for metric in metrics
        ]
        shape = len(scores.ids), len(names)
        numerators, denominators = np.empty(shape), np.empty(shape, dtype=np.float32)
        infinite = np.zeros(len(names), dtype=np.int64)
        for column, (metric, method, region) in enumerate(names):
            if metric == "energy_share_gain" and reference is not None:
                values = scores.of("energy_share", method, region).astype(np.float64)
                values -= reference.of("energy_share", method, region)
            else:
                values = scores.of(metric, method, region).astype(np.float64)
            weight = scores.areas[:, scores.regions.index(region)] if metric == "enrichment" else np.float32(1)
            infinite[column] = np.isinf(values).sum()
            valid = np.isfinite(values)
            numerators[:, column] = np.where(valid, values * weight, 0)
            denominators[:, column] = np.where(valid, weight, 0)
        return cls(names, infinite, numerators, denominators)

    def by_group(self) -> _Columns:
        """Those that are broken down to groups."""
        kept = [i for i, (metric, _, _) in enumerate(self.names) if metric in _BY_GROUP]
        if len(kept) == len(self.names):
            return self
        names = [self.names[i] for i in kept]
        return _Columns(names, self.infinite[kept], self.numerators[:, kept], self.denominators[:, kept])


def _estimates(group: list[Cell], columns: _Columns, seed: int) -> Iterator[Estimate]:
    """The estimates of cells that share their strata, from one set of resamples."""
    pairs = [(cell, name) for cell in group for name in columns.names]
    numerators, denominators = columns.numerators, columns.denominators
    subsets = np.stack([cell.members for cell in group], axis=1)
    valid = denominators > 0
    counts = np.concatenate([valid[cell.members].sum(0) for cell in group])
    # Of a thousand classes most may have one image, of which there is no interval.
    several = subsets.sum(0) > 1
    numbers_of = np.full((3, len(group), len(columns.names)), np.nan)
    if several.any():
        found = bootstrap_ratios(numerators, denominators, group[0].strata, seed=seed, subsets=subsets[:, several])
        numbers_of[:, several] = np.reshape(found, (3, -1, len(columns.names)))
    with np.errstate(invalid="ignore"):
        for place in np.flatnonzero(~several):
            alone = subsets[:, place]
            numbers_of[0, place] = (numerators[alone] / denominators[alone])[0]
    value, low, high = numbers_of.reshape(3, -1)
    for i, (cell, (metric, method, region)) in enumerate(pairs):
        n = int(counts[i])
        numbers: Numbers = (float(value[i]), float(low[i]), float(high[i])) if n else (None, None, None)
        reason = "" if n else f"no image with {region} and a heatmap that is not silent"
        column = i % len(columns.names)
        of_hits = metric == "pointing_game" or metric.startswith(OWN)
        if of_hits and n > 1 and value[i] in (0.0, 1.0) and low[i] == high[i]:
            # Resampling images that all hit, or all miss, gives no width either.
            numbers = wilson(round(float(value[i]) * n), n)
        if columns.infinite[column]:
            # Without these images it would look better, or worse, than it is.
            numbers, reason = (None, None, None), f"infinite on {columns.infinite[column]} of the audited images"
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

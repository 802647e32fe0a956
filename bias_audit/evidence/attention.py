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
from bias_audit.records import SampleScores
from bias_audit.stats import bootstrap_ratios, wilson
from bias_audit.terms import Estimate, Subjects

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
    reference. Coverage is the share of the images showing a region whose map is not silent.

    `attributes` is `(N, A)` text in the order of `subjects.attributes`.
    """
    columns = list(_columns(scores, reference))
    found: list[Estimate] = []
    all_cells = list(cells(scores.labels, attributes, subjects))
    for _, group in groupby(all_cells, key=lambda cell: cell.attribute):
        found += _estimates(list(group), columns, seed)
    for cell in all_cells:
        if cell.attribute is None:
            found += _coverage(cell, scores)
    return tuple(found)


@dataclass(frozen=True)
class _Column:
    """One per-image quantity as numerator and denominator `(N,)`, both 0 where it is not valid."""

    metric: str
    method: str
    region: str
    numerator: npt.NDArray[np.float64]
    denominator: npt.NDArray[np.float64]


def _columns(scores: SampleScores, reference: SampleScores | None) -> Iterator[_Column]:
    for method in scores.methods:
        for r, region in enumerate(scores.regions):
            for metric in scores.metrics:
                values = scores.of(metric, method, region).astype(np.float64)
                valid = np.isfinite(values)
                weight = scores.areas[:, r].astype(np.float64) if metric == "enrichment" else np.ones(len(values))
                yield _Column(metric, method, region, np.where(valid, values * weight, 0), np.where(valid, weight, 0))
            if reference is not None:
                gain = scores.of("energy_share", method, region).astype(np.float64)
                gain = gain - reference.of("energy_share", method, region)
                valid = np.isfinite(gain)
                yield _Column("energy_share_gain", method, region, np.where(valid, gain, 0), valid.astype(np.float64))


def _estimates(group: list[Cell], columns: list[_Column], seed: int) -> Iterator[Estimate]:
    """The estimates of cells that share their strata, from one set of resamples."""
    of_cell = [c for c in columns if group[0].attribute is None or c.metric in _BY_GROUP]
    pairs = [(cell, c) for cell in group for c in of_cell]
    numerators = np.stack([c.numerator for c in of_cell], axis=1)
    denominators = np.stack([c.denominator for c in of_cell], axis=1)
    subsets = np.stack([cell.members for cell in group], axis=1)
    counts = np.concatenate([(denominators[cell.members] > 0).sum(0) for cell in group])
    # Of a thousand classes most may have one image, of which there is no interval.
    several = subsets.sum(0) > 1
    numbers_of = np.full((3, len(group), len(of_cell)), np.nan)
    if several.any():
        found = bootstrap_ratios(numerators, denominators, group[0].strata, seed=seed, subsets=subsets[:, several])
        numbers_of[:, several] = np.reshape(found, (3, -1, len(of_cell)))
    with np.errstate(invalid="ignore"):
        for place in np.flatnonzero(~several):
            alone = subsets[:, place]
            numbers_of[0, place] = (numerators[alone] / denominators[alone])[0]
    value, low, high = numbers_of.reshape(3, -1)
    for i, (cell, c) in enumerate(pairs):
        n = int(counts[i])
        numbers: Numbers = (float(value[i]), float(low[i]), float(high[i])) if n else (None, None, None)
        reason = "" if n else f"no image with {c.region} and a heatmap that is not silent"
        if c.metric == "pointing_game" and n > 1 and value[i] in (0.0, 1.0):
            # Resampling images that all hit, or all miss, gives no width either.
            numbers = wilson(round(float(value[i]) * n), n)
        if n == 1:
            # Resampling one image gives it again: an interval of no width, which would look certain.
            numbers, reason = (float(value[i]), None, None), "one image gives no interval"
        yield _estimate(c.metric, numbers, n, c.region, cell, c.method, reason)


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

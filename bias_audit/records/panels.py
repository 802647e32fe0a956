"""Which of the audited images to show: the same few at every audit, and the worst.

Enters: the images' labels and attributes, or the scores of one audit. Leaves: rows of the samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from bias_audit.terms import Subjects

if TYPE_CHECKING:
    from bias_audit.records.samples import SampleScores, SampleSheet

# How many samples a dashboard shows of each kind.
PANEL = WORST = 8


class Looked(NamedTuple):
    """A sample's row, and the region with the largest share of its heatmap."""

    row: int
    region: str
    share: float


def most_looked(scores: SampleScores, regions: Sequence[str], count: int) -> list[Looked]:
    """The samples with the largest energy share on one of `regions` by the first method, the largest first.

    Those whose heatmap has nothing there are left out.
    """
    if not regions or not scores.ids:
        return []
    shares = np.stack([scores.of("energy_share", scores.methods[0], region) for region in regions], axis=1)
    shares = np.where(np.isfinite(shares), shares, 0)
    order = np.argsort(-shares.max(axis=1), kind="stable")[:count]
    found = [Looked(int(i), regions[int(shares[i].argmax())], float(shares[i].max())) for i in order]
    return [looked for looked in found if looked.share > 0]


def fixed_panel(sheet: SampleSheet, count: int) -> list[int]:
    """The same `count` samples at every audit: in turn one from each label x attributes cell."""
    seen: dict[tuple[str, ...], int] = {}
    turns = []
    for index, (label, values) in enumerate(zip(sheet.labels, sheet.attributes, strict=True)):
        cell = (str(label), *map(str, values))
        turns.append((seen.setdefault(cell, 0), cell, index))
        seen[cell] += 1
    return [index for _, _, index in sorted(turns)[:count]]


def worst(scores: SampleScores, subjects: Subjects, count: int) -> list[int]:
    """The samples with most of the heatmap on a spurious region; with least on the objects where nothing is spurious.

    Those without a score, or with nothing of the heatmap there, come in neither.
    """
    spurious = subjects.regions_with("spurious")
    if spurious:
        return [looked.row for looked in most_looked(scores, spurious, count)]
    objects = subjects.regions_with("object")
    if not objects:
        return []
    shares = np.array([scores.of("energy_share", scores.methods[0], name) for name in objects])
    order = np.argsort(np.nansum(shares, axis=0), kind="stable")
    return [int(i) for i in order if np.isfinite(shares[:, i]).any()][:count]

"""Images of a recorded run whose heatmaps lie where no region explains them: what is to be annotated next.

Enters: a `Run`. Leaves: `Lead`s, the most telling first.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain, zip_longest

import numpy as np
import numpy.typing as npt

from bias_audit.evidence.clusters import ClassClusters, Cluster, ranked, spray
from bias_audit.records.runs import Run
from bias_audit.records.samples import SampleScores
from bias_audit.terms import REMAINDER

Floats = npt.NDArray[np.float64]

# By so much more of a heatmap's energy the remainder is looked at more than usual.
MORE = 0.1


@dataclass(frozen=True)
class Lead:
    """An image whose heatmap lies where no region explains it; `why` names the cluster, or how far beyond chance."""

    file: str
    why: str


def unexplained(run: Run) -> tuple[Lead, ...]:
    """The images of a run's last audit whose heatmaps lie where no region explains them, the most telling first.

    A heatmap is unexplained if the remainder, which no region covers, has more of its energy than its area alone would
    give, or a tenth more than is usual in its class (the median). Those come from the most to the least such energy.
    They take turns with the clusters of heatmaps that stand apart within their class (see `spray`), each from its
    centre outwards, less those clusters that regions explain: by the same measure, with the mean over the cluster and
    that over the rest of its class. A run without any region has clusters only, all of them unexplained.

    The maps are those of the first method that the run recorded.

    Raises:
        ValueError: the run has no audit.
        RecordError: its records cannot be read.

    Example:
        >>> from bias_audit.records.runs import read_run
        >>> unexplained(read_run("runs/today"))[0]  # doctest: +SKIP
        Lead(file='0001.jpg', why='cluster 2 of nurse')
    """
    scores, table, subjects = run.scores(run.place_of(-1)), run.sample_table(), run.manifest.subjects
    at = {name: i for i, name in enumerate(table.ids)}
    attributes = table.attributes[[at[name] for name in scores.ids]]
    found = spray(scores.maps[0], scores.labels, scores.correct, attributes, subjects, seed=run.manifest.seed)
    by_name = {one.class_name: one for one in found}
    excess, share = _remainders(scores)
    told = [c for c in ranked(found) if not subjects.regions or _beyond(scores, by_name[c.class_name], c)]
    groups = [
        [Lead(scores.ids[i], f"cluster {c.number} of {c.class_name}") for i in _from_centre(by_name[c.class_name], c)]
        for c in told
    ]
    if subjects.regions:
        most = [int(i) for i in np.argsort(-excess, kind="stable") if excess[i] > 0]
        groups.append([Lead(scores.ids[i], f"remainder has {100 * share[i]:.0f} % of the heatmap") for i in most])
    first: dict[str, Lead] = {}
    for lead in chain.from_iterable(zip_longest(*groups)):
        if lead is not None:
            first.setdefault(lead.file, lead)
    return tuple(first.values())


def _remainders(scores: SampleScores) -> tuple[Floats, Floats]:
    """Of each heatmap how much more of its energy the remainder has than explained, and its share; 0 where unknown."""
    share, area = _share_and_area(scores)
    excess = np.zeros_like(share)
    for label in np.unique(scores.labels):
        mine = np.flatnonzero((scores.labels == label) & np.isfinite(share))
        if len(mine):
            excess[mine] = share[mine] - np.minimum(area[mine], np.median(share[mine]) + MORE)
    return excess, np.nan_to_num(share)


def _beyond(scores: SampleScores, one: ClassClusters, cluster: Cluster) -> bool:
    """Whether the remainder has more of a cluster's energy than its area gives, or than of the rest of its class."""
    share, area = _share_and_area(scores)
    others = np.setdiff1d(one.samples, cluster.members)
    here, elsewhere = (np.nanmean(share[rows]) for rows in (cluster.members, others))
    return bool(here > min(np.nanmean(area[cluster.members]), elsewhere + MORE))


def _share_and_area(scores: SampleScores) -> tuple[Floats, Floats]:
    """Of the remainder, by the first method; NaN where a heatmap is silent."""
    share = scores.of("energy_share", scores.methods[0], REMAINDER).astype(np.float64)
    return share, scores.areas[:, scores.regions.index(REMAINDER)].astype(np.float64)


def _from_centre(one: ClassClusters, cluster: Cluster) -> list[int]:
    """The members of a cluster, those nearest to its centre first."""
    here = one.cluster == cluster.number
    distance = np.linalg.norm(one.points[here] - one.points[here].mean(axis=0), axis=1)
    return [int(i) for i in one.samples[here][np.argsort(distance, kind="stable")]]

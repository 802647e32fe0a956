"""Clusters of heatmaps for the page: cues that nobody annotated.

Enters: a `Run`. Leaves: `Grouped`, with a `ClassCard` per class: its maps as points, and of each cluster the mean map,
the nearest images and what departs in it from the rest of the class.

scikit-learn is imported only where there is something to cluster. It draws from generators of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from PIL import Image

from bias_audit.overlays import heat_colours
from bias_audit.records.pictures import opened
from bias_audit.records.runs import Run
from bias_audit.report.pages import data_uri
from bias_audit.report.series import method_name, thin
from bias_audit.report.svg import svg

if TYPE_CHECKING:
    from bias_audit.evidence.clusters import ClassClusters, Cluster
    from bias_audit.report.clusters import RunClusters

# More images than this are not clustered for the page, which is drawn anew after each audit.
MOST_SAMPLES = 1000
# As many maps of a class as `evidence.clusters.FEWEST` asks for; that module cannot be asked without scikit-learn.
FEWEST_IMAGES = 40
MOST_CLASSES, MOST_POINTS, MOST_CLUSTERS, MOST_NEAREST = 4, 150, 12, 3
_SIDE, _THUMBNAIL = 168, 72
_HUES = ("blue", "vermillion", "green", "purple", "orange", "sky", "ink", "grey")
_SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right", "triangle-left")
_GLYPHS = ("●", "■", "▲", "◆", "✚", "▼", "▶", "◀")


@dataclass(frozen=True)
class ClusterCard:
    """One cluster; `glyph` and `hue` are those of its points, the pictures are data URIs, "" where not disclosed."""

    number: int
    glyph: str
    hue: str
    size: int
    mean_map: str
    nearest: tuple[tuple[str, str], ...]
    accuracy: str
    departure: str


@dataclass(frozen=True)
class ClassCard:
    """One class: its points, and its clusters."""

    name: str
    about: str
    points: Markup
    clusters: tuple[ClusterCard, ...]


@dataclass(frozen=True)
class Grouped:
    """The clusters of one audit's maps by one method; `notes` say what is not shown, and why."""

    method: str
    step: int
    classes: tuple[ClassCard, ...]
    notes: tuple[str, ...]


def grouped(run: Run, *, thumbnails: bool = True) -> Grouped | None:
    """Cluster the heatmaps of the last audit by the first method; None before the first audit.

    Those classes come first whose clusters tell most. Without `thumbnails` the nearest images are named, not shown.

    Raises:
        RecordError: the audit's arrays or the samples cannot be read.

    Example:
        >>> from bias_audit.records.runs import read_run
        >>> [card.name for card in grouped(read_run("runs/today")).classes]  # doctest: +SKIP
        ['doctor', 'nurse']
    """
    if not run.audits:
        return None
    method, step, count = method_name(run.manifest.methods[0]), run.audits[-1].step, run.manifest.samples_audited
    if count > MOST_SAMPLES:
        why = f"{count:,} images are more than the {MOST_SAMPLES:,} that are clustered for a page"
        return Grouped(method, step, (), (f"{why}: run `bias-audit clusters`.",))
    if not run.has_scores(-1):
        return Grouped(method, step, (), ("Not clustered: the heatmaps of this audit were dropped.",))
    if max(np.bincount(run.sample_table().labels), default=0) < FEWEST_IMAGES:
        return Grouped(method, step, (), (f"Not clustered: no class has {FEWEST_IMAGES} images.",))
    from threadpoolctl import threadpool_limits

    from bias_audit.report.clusters import in_order, run_clusters

    # Threads of OpenMP that wait for cores that training keeps busy make this a hundred times slower, and training too.
    # The number is the calling thread's own: what another thread computes is not changed.
    with threadpool_limits(1, user_api="openmp"):
        try:
            found = run_clusters(run)
        except ValueError as error:
            # Maps with a sign are no shares of anything, so they are not clustered; the message says so.
            return Grouped(method, step, (), (f"Not clustered: {error}.",))
        order = in_order(found.classes)
        cards: list[ClassCard] = []
        left = MOST_CLUSTERS
        for one in order[:MOST_CLASSES]:
            if left > 0:
                cards.append(_class_card(len(cards), one, found, left, thumbnails))
                left -= len(one.clusters)
    notes = [f"{len(order) - len(cards)} more classes are in `bias-audit clusters`."] if len(order) > len(cards) else []
    bare = [f"{one.class_name}: {one.reason}" for one in found.classes if not one.clusters]
    if bare:
        more = f"; {len(bare) - MOST_CLASSES} more" if len(bare) > MOST_CLASSES else ""
        notes.append(f"Not clustered: {'; '.join(bare[:MOST_CLASSES])}{more}.")
    return Grouped(method, step, tuple(cards), tuple(notes))


def _class_card(number: int, one: ClassClusters, found: RunClusters, most: int, thumbnails: bool) -> ClassCard:
    count = len(one.clusters)
    kind = "one cluster: no group of them stands apart" if count == 1 else f"{count} clusters"
    silent = f", {one.silent} more are silent" if one.silent else ""
    shown = one.clusters[: max(1, most)]
    return ClassCard(
        one.class_name,
        f"{len(one.samples)} heatmaps{silent}; {kind}"
        + (f", {len(shown)} of them shown" if len(shown) < count else ""),
        _points(f"cluster-{number}", one, found.seed),
        tuple(_cluster_card(cluster, found, thumbnails) for cluster in shown),
    )


def _cluster_card(cluster: Cluster, found: RunClusters, thumbnails: bool) -> ClusterCard:
    accuracy, departure, at = cluster.accuracy, cluster.departure, cluster.number - 1
    nearest = tuple(
        (found.ids[i], _small(found.thumbnails[i]) if thumbnails else "") for i in cluster.nearest[:MOST_NEAREST]
    )
    return ClusterCard(
        cluster.number,
        _GLYPHS[at],
        _HUES[at],
        len(cluster.members),
        _heat(cluster.mean_map),
        nearest,
        f"{accuracy.value:.2f} [{accuracy.low:.2f}, {accuracy.high:.2f}]",
        str(departure) if departure is not None else "",
    )


def _points(key: str, one: ClassClusters, seed: int) -> Markup:
    """The maps of a class as points: those of like maps are near each other."""
    from bias_audit.evidence.clusters import layout

    shown = thin(len(one.samples), MOST_POINTS)
    places = layout(one.points[shown], seed)
    rows = [
        {"x": round(float(x), 2), "y": round(float(y), 2), "c": int(one.cluster[i])}
        for (x, y), i in zip(places, shown, strict=True)
    ]
    numbers = [cluster.number for cluster in one.clusters]
    place: dict[str, Any] = {"type": "quantitative", "axis": None, "scale": {"zero": False, "padding": 8}}
    looks = {"color": [f"var(--{hue})" for hue in _HUES], "shape": list(_SHAPES)}
    encoding = {
        channel: {
            "field": "c",
            "type": "nominal",
            "legend": None,
            "scale": {"domain": numbers, "range": many[: len(numbers)]},
        }
        for channel, many in looks.items()
    }
    spec = {
        "data": {"values": rows},
        "width": _SIDE,
        "height": _SIDE,
        "mark": {"type": "point", "filled": True, "size": 22, "opacity": 0.75},
        "encoding": {"x": {"field": "x", **place}, "y": {"field": "y", **place}, **encoding},
    }
    return svg(key, spec, left=2, right=2, top=2, bottom=2)


def _heat(mean_map: npt.NDArray[np.float64]) -> str:
    """A map as a PNG of its own resolution, as a data URI."""
    levels = mean_map / mean_map.max()
    return data_uri(Image.fromarray(np.rint(heat_colours(levels)).astype(np.uint8)), "PNG")


def _small(picture: bytes) -> str:
    """A thumbnail as small as it is shown, as a data URI."""
    with opened(picture) as image:
        image.thumbnail((_THUMBNAIL, _THUMBNAIL))
        return data_uri(image.convert("RGB"), "JPEG")

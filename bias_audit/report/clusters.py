"""Clusters of heatmaps in a recorded run, and a picture of them.

Enters: a `Run`. Leaves: `RunClusters`, and one PNG or SVG file with a row per class: its maps as points, and per
cluster the mean map and the images nearest to its centre.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import vl_convert

from bias_audit.atomic import write_whole
from bias_audit.evidence.clusters import ClassClusters, Cluster, layout, ranked, spray
from bias_audit.records.runs import Run
from bias_audit.report.series import method_name, thin
from bias_audit.report.svg import legible

MOST_CLASSES, MOST_POINTS = 8, 500
_SIDE, _THUMBNAILS = 150, 3
# Okabe and Ito's colours, which people who confuse red and green can tell apart; shapes say the same.
_HUES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#7f7f7f")
_SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right", "triangle-left")


@dataclass(frozen=True)
class RunClusters:
    """The clusters of one audit's heatmaps by one method; `ids` and `thumbnails` are those of the samples clustered."""

    step: int
    method: str
    ids: tuple[str, ...]
    thumbnails: tuple[bytes, ...]
    classes: tuple[ClassClusters, ...]
    seed: int


def run_clusters(run: Run, *, audit: int = -1, method: str | None = None) -> RunClusters:
    """Cluster the heatmaps that an audit recorded, by `spray`; no image is explained anew.

    Args:
        audit: index of the audit, in order of time; -1 is the last.
        method: name of the explanation method; by default the first that the run recorded.

    Raises:
        ValueError: there is no such audit, or the run did not record the method.
        RecordError: the audit's arrays or the samples cannot be read.

    Example:
        >>> from bias_audit.records.runs import read_run
        >>> run_clusters(read_run("runs/today"), audit=0).classes  # doctest: +SKIP
    """
    place, methods = run.place_of(audit), run.manifest.methods
    method = methods[0] if method is None else method
    if method not in methods:
        raise ValueError(f"{run.path}: no maps by {method!r} were recorded: expected one of {', '.join(methods)}")
    scores, sheet = run.scores(place), run.sheet()
    at = {name: i for i, name in enumerate(sheet.ids)}
    rows = [at[name] for name in scores.ids]
    maps, seed = scores.maps[scores.methods.index(method)], run.manifest.seed
    classes = spray(maps, scores.labels, scores.correct, sheet.attributes[rows], run.manifest.subjects, seed=seed)
    thumbnails = tuple(sheet.thumbnails[row] for row in rows)
    return RunClusters(run.audits[place].step, method, scores.ids, thumbnails, classes, seed)


def draw_clusters(path: str | Path, found: RunClusters) -> int:
    """Write the picture to `path`, and return how many classes are in it.

    At most `MOST_CLASSES` are drawn: those with the most telling clusters, then those that are one cluster.

    Args:
        path: ends in `.png` or `.svg`.

    Raises:
        ValueError: another ending, or no class that could be clustered.
        OSError: the file cannot be written.

    Example:
        >>> draw_clusters("clusters.png", run_clusters(run))  # doctest: +SKIP
        2
    """
    path = Path(path)
    if path.suffix not in (".png", ".svg"):
        raise ValueError(f"{path}: expected a name that ends in .png or .svg")
    drawn = in_order(found.classes)[:MOST_CLASSES]
    if not drawn:
        reasons = "; ".join(f"{one.class_name}: {one.reason}" for one in found.classes)
        raise ValueError(f"no class could be clustered, so there is nothing to draw: {reasons}")
    spec = {
        "title": {"text": f"{method_name(found.method)} at step {found.step}", "fontSize": 14, "offset": 12},
        "vconcat": [_row(one, found) for one in drawn],
        "padding": 12,
        "spacing": 24,
        "background": "white",
        "config": {
            "aria": False,
            "view": {"stroke": "#cccccc"},
            "title": {"anchor": "start", "fontSize": 12, "subtitleFontSize": 11},
        },
    }
    if path.suffix == ".svg":
        write_whole(path, vl_convert.vegalite_to_svg(legible(spec)).encode())
    else:
        write_whole(path, vl_convert.vegalite_to_png(legible(spec), scale=2))
    return len(drawn)


def in_order(classes: Sequence[ClassClusters]) -> list[ClassClusters]:
    """The classes that have clusters: those with the most telling ones first, then those that are one cluster."""
    order = [cluster.class_name for cluster in ranked(classes)]
    found = [one for one in classes if one.clusters]
    return sorted(found, key=lambda one: order.index(one.class_name) if one.class_name in order else len(order))


def _row(one: ClassClusters, found: RunClusters) -> dict[str, Any]:
    return {
        "hconcat": [_points(one, found.seed), *(_panel(cluster, found.thumbnails) for cluster in one.clusters)],
        "resolve": {"scale": {"color": "independent", "shape": "independent"}},
        "spacing": 18,
    }


def _points(one: ClassClusters, seed: int) -> dict[str, Any]:
    shown = thin(len(one.samples), MOST_POINTS)
    places = layout(one.points[shown], seed)
    rows = [{"x": float(x), "y": float(y), "c": int(one.cluster[i])} for (x, y), i in zip(places, shown, strict=True)]
    numbers = [cluster.number for cluster in one.clusters]
    place = {"type": "quantitative", "axis": None, "scale": {"zero": False, "padding": 8}}
    kind = "one cluster" if len(numbers) == 1 else f"{len(numbers)} clusters"
    return {
        "title": {"text": one.class_name, "subtitle": f"{len(one.samples)} heatmaps, {kind}"},
        "width": _SIDE,
        "height": _SIDE,
        "data": {"values": rows},
        "mark": {"type": "point", "filled": True, "size": 24, "opacity": 0.7},
        "encoding": {
            "x": {"field": "x", **place},
            "y": {"field": "y", **place},
            "color": {
                "field": "c", "type": "nominal", "legend": None,
                "scale": {"domain": numbers, "range": list(_HUES[: len(numbers)])},
            },
            "shape": {
                "field": "c", "type": "nominal", "legend": None,
                "scale": {"domain": numbers, "range": list(_SHAPES[: len(numbers)])},
            },
        },
    }  # fmt: skip


def _panel(cluster: Cluster, thumbnails: Sequence[bytes]) -> dict[str, Any]:
    """The mean map over the nearest images, under a title in the cluster's colour."""
    hue = _HUES[cluster.number - 1]
    heat = cluster.mean_map / cluster.mean_map.max()
    cells = [{"x": x, "y": y, "v": round(float(heat[y, x]), 3)} for y, x in np.ndindex(*heat.shape)]
    side = _SIDE / _THUMBNAILS
    pictures = [
        {"i": i, "u": "data:image/jpeg;base64," + base64.b64encode(thumbnails[sample]).decode()}
        for i, sample in enumerate(cluster.nearest[:_THUMBNAILS])
    ]
    step = {"type": "ordinal", "axis": None}
    title = f"{cluster.number}: {len(cluster.members)} images"
    scheme = {"scheme": "inferno", "domain": [0, 1]}
    mean_map = {
        "title": {"text": title, "subtitle": _caption(cluster), "color": hue},
        "width": _SIDE,
        "height": _SIDE,
        "data": {"values": cells},
        "mark": "rect",
        "encoding": {
            "x": {"field": "x", **step},
            "y": {"field": "y", **step},
            "color": {"field": "v", "type": "quantitative", "legend": None, "scale": scheme},
        },
    }  # fmt: skip
    nearest = {
        "width": _SIDE,
        "height": side,
        "view": {"stroke": None},
        "data": {"values": pictures},
        "mark": {"type": "image", "width": side - 4, "height": side - 4},
        "encoding": {
            "x": {"field": "i", "type": "quantitative", "axis": None, "scale": {"domain": [-0.5, _THUMBNAILS - 0.5]}},
            "url": {"field": "u", "type": "nominal"},
        },
    }
    return {"vconcat": [mean_map, nearest], "spacing": 4}


def _caption(cluster: Cluster) -> list[str]:
    accuracy, departure = cluster.accuracy, cluster.departure
    lines = [f"accuracy {accuracy.value:.2f} [{accuracy.low:.2f}, {accuracy.high:.2f}]"]
    if departure is not None:
        lines += [departure.what, f"{100 * departure.here:.0f} % here, {100 * departure.elsewhere:.0f} % elsewhere"]
    return lines

"""Prepare the samples of a run for the page's viewer: what it needs to replay training, and no more.

Enters: a `Run`. Leaves: one JSON-ready mapping with thumbnails, region outlines and, per audit, quantised heatmaps and
scores, small enough for one page; where that needs fewer samples or audits than were recorded, the choice is the same
every time and its counts are in the mapping.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from bias_audit.records import Run, SampleScores, SampleSheet
from bias_audit.report.charts import method_name, region_styles, thin

# Characters the viewer's data may take; the charts and tables of 50 audits take less than the rest of 5 MB.
BUDGET = 3_900_000
FEWEST_SAMPLES = 48
# Maps of more cells a side are averaged down: tiles are small, and the records keep the map itself.
MOST_CELLS = 16
# What a share of 1 is stored as; one more means "no valid score".
SHARE_UNIT, NO_SHARE = 65534, 65535


def viewer_data(run: Run, *, thumbnails: bool = True) -> dict[str, Any] | None:
    """What the page's viewer shows, or None for a run without audits or samples.

    Raises:
        RecordError: the sample sheet or an audit's arrays cannot be read.
    """
    if not run.audits:
        return None
    sheet, last = run.sheet(), run.scores(len(run.audits) - 1)
    if not sheet.ids:
        return None
    subjects = run.manifest.subjects
    spurious = [last.regions.index(r) for r in subjects.regions_with("spurious")]
    cells = len(last.methods) * min(MOST_CELLS, last.maps.shape[2]) * min(MOST_CELLS, last.maps.shape[3])
    per_frame = _characters(cells + last.values[0, :, 0].size * 2 + len(last.methods) * 4 + 6)
    frames = thin(len(run.audits), max(2, BUDGET // (FEWEST_SAMPLES * per_frame)))

    at = {name: i for i, name in enumerate(last.ids)}
    samples: list[dict[str, Any]] = []
    left = BUDGET
    for row in _order(sheet, last, at, spurious):
        areas = last.areas[at[sheet.ids[row]]] if sheet.ids[row] in at else np.full(len(last.regions), np.nan)
        sample = _sample(sheet, row, areas, thumbnails)
        left -= len(str(sample)) + len(frames) * per_frame
        if left < 0 and samples:
            break
        samples.append(sample)
    ids = [sample["id"] for sample in samples]
    styles = region_styles(subjects)
    roles = dict(subjects.regions)
    return {
        "run": run.manifest.run_id,
        "available": len(sheet.ids),
        "audits": len(run.audits),
        "averaged": max(last.maps.shape[2:]) > MOST_CELLS,
        "classes": subjects.classes,
        "attributes": [{"name": name, "values": values} for name, values in subjects.attributes],
        "regions": [{"name": r, "role": roles.get(r, ""), "hue": styles[r].hue} for r in last.regions],
        "methods": [method_name(m) for m in last.methods],
        "samples": samples,
        "frames": [_frame(run, index, ids) for index in frames],
    }


def _characters(size: int) -> int:
    """The length of `size` bytes in base64."""
    return -(-size // 3) * 4


def _order(sheet: SampleSheet, last: SampleScores, at: dict[str, int], spurious: list[int]) -> Iterator[int]:
    """Every sample once, such that any beginning holds the worst and, beside them, some of every kind.

    Two by spurious share at the last audit, then one from the next label x attributes x correct cell, and so on.
    """
    shares = np.nan_to_num(last.values[last.metrics.index("energy_share")][:, :, spurious]).sum(-1).max(0)
    worst = sorted(range(len(sheet.ids)), key=lambda i: -shares[at[sheet.ids[i]]] if sheet.ids[i] in at else 1.0)
    cells: dict[tuple[object, ...], list[int]] = {}
    for i, name in enumerate(sheet.ids):
        right = bool(last.correct[at[name]]) if name in at else None
        cells.setdefault((int(sheet.labels[i]), *sheet.attributes[i].tolist(), right), []).append(i)
    depth = max(len(cell) for cell in cells.values())
    mixed = [cell[k] for k in range(depth) for cell in cells.values() if k < len(cell)]
    seen: set[int] = set()
    queues = iter(worst), iter(mixed)
    while len(seen) < len(sheet.ids):
        for queue in (queues[0], queues[0], queues[1]):
            for i in queue:
                if i not in seen:
                    seen.add(i)
                    yield i
                    break


def _sample(sheet: SampleSheet, row: int, areas: npt.NDArray[np.float32], thumbnails: bool) -> dict[str, Any]:
    picture = sheet.thumbnails[row]
    with Image.open(io.BytesIO(picture)) as image:
        width, height = image.size
    return {
        "id": sheet.ids[row],
        "label": int(sheet.labels[row]),
        "attributes": sheet.attributes[row].tolist(),
        "size": [width, height],
        # Masks are padded to the largest thumbnail: a sample's own part is the top left.
        "outlines": [outline(mask[:height, :width]) for mask in sheet.masks[row]],
        "areas": [None if np.isnan(a) else round(float(a), 5) for a in areas],
        "image": base64.b64encode(picture).decode() if thumbnails else "",
    }


def outline(mask: npt.NDArray[np.bool_]) -> str:
    """The edges of a mask `(h, w)` as an SVG path along its pixels, "" for an empty mask.

    Example:
        >>> outline(np.array([[0, 1], [0, 1]], dtype=bool))
        'M1 0H2V2H1Z'
    """
    padded = np.pad(mask, 1)
    # A grid point is a corner where an odd number of its four pixels is set. Along a row, and along a column, an edge
    # begins at one corner and ends at the next, so each corner has one partner in its row and one in its column.
    corners = padded[:-1, :-1] ^ padded[1:, :-1] ^ padded[:-1, 1:] ^ padded[1:, 1:]
    ys, xs = np.nonzero(corners)
    order = np.lexsort((ys, xs))
    in_column = np.empty(len(xs), dtype=np.int64)
    in_column[order] = order[np.arange(len(xs)) ^ 1]
    x, y, below = xs.tolist(), ys.tolist(), in_column.tolist()
    parts: list[str] = []
    left = [True] * len(x)
    for start in range(len(x)):
        if not left[start]:
            continue
        parts.append(f"M{x[start]} {y[start]}")
        here = start
        while True:
            beside = here ^ 1
            left[here] = left[beside] = False
            parts.append(f"H{x[beside]}")
            here = below[beside]
            if here == start:
                break
            parts.append(f"V{y[here]}")
        parts.append("Z")
    return "".join(parts)


def _frame(run: Run, index: int, ids: list[str]) -> dict[str, Any]:
    """One audit's maps and scores of the samples `ids`; what a sample lacks at this audit is blank."""
    audit, scores = run.audits[index], run.scores(index)
    at = {name: i for i, name in enumerate(scores.ids)}
    rows = np.array([at.get(name, -1) for name in ids])
    absent = rows < 0
    maps = np.nan_to_num(scores.maps[:, rows].astype(np.float32))
    maps[:, absent] = 0
    codes = np.rint(_coarse(maps) * 255).clip(0, 255).astype(np.uint8)
    shares = scores.values[scores.metrics.index("energy_share")][:, rows]
    shares = np.where(np.isnan(shares) | absent[:, None], NO_SHARE / SHARE_UNIT, np.clip(shares, 0, 1))
    magnitude = np.where(absent, np.nan, scores.magnitude[:, rows]).astype("<f4")
    return {
        "step": audit.step,
        "epoch": audit.epoch,
        "weights": audit.weights,
        "size": list(codes.shape[2:]),
        "maps": [_base64(m) for m in codes],
        "shares": _base64(np.rint(shares * SHARE_UNIT).astype("<u2")),
        "magnitude": _base64(magnitude),
        "typical": [_typical(m) for m in scores.magnitude],
        "margin": _base64(np.where(absent, np.nan, scores.margin[rows]).astype("<f4")),
        "predicted": _base64(np.where(absent, -1, scores.predictions[rows]).astype("<i2")),
    }


def _coarse(maps: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Maps `(M, N, h, w)` of at most `MOST_CELLS` cells a side, each the mean of those it stands for."""
    for axis in (2, 3):
        if (cells := maps.shape[axis]) > MOST_CELLS:
            edges = np.arange(MOST_CELLS + 1) * cells // MOST_CELLS
            counts = np.diff(edges).reshape([-1 if a == axis else 1 for a in range(4)])
            maps = np.add.reduceat(maps, edges[:-1], axis) / counts
    return maps


def _typical(magnitude: npt.NDArray[np.float32]) -> float | None:
    """The median strength of the maps that are not silent."""
    loud = magnitude[np.isfinite(magnitude) & (magnitude > 0)]
    return float(np.median(loud)) if loud.size else None


def _base64(array: npt.NDArray[Any]) -> str:
    return base64.b64encode(array.tobytes()).decode()

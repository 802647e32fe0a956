"""Prepare the samples of a run for the page's viewer: what it needs to replay training, and no more.

Enters: a `Run`. Leaves: `ViewerData`: one compressed text with thumbnails, region outlines and, per audit, quantised
heatmaps and scores, small enough for one page; where that needs fewer samples or audits than were recorded, the choice
is the same every time and the counts are told.

The text is base64 of a gzip file: the length of a JSON header as four bytes, the header, and the arrays and pictures
that it gives the places of. Numbers are short floats (the upper half of a float32, as bfloat16), their high bytes first
and then their low ones.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from bias_audit.records.panels import most_looked
from bias_audit.records.pictures import opened
from bias_audit.records.results import AuditSummary
from bias_audit.records.runs import Run
from bias_audit.records.samples import ChangedPictures, SampleScores, SampleSheet
from bias_audit.report.series import method_name, region_styles, thin

# Bytes that the viewer's data may take before base64; charts and tables of 50 audits take less than the rest of 5 MB.
BUDGET = 3_200_000
FEWEST_SAMPLES = 48
# More audits than this are thinned: the page must be drawn while the training makes the next.
MOST_FRAMES = 200
# Maps of more cells a side are averaged down: tiles are small, and the records keep the map itself.
MOST_CELLS = 16
# Heatmaps have so many steps from none to their largest value, which is finer than the eye tells apart over a picture.
LEVELS = 63
# Bytes of all thumbnails, beyond which they are made smaller.
THUMBNAIL_BYTES, SMALL_SIDE = 900_000, 96
MOST_CHANGED = 160
# What compression leaves of a quantised heatmap's cell, a short float, and a letter of an outline.
_CELL, _SHORT, _LETTER = 0.68, 1.15, 0.3


@dataclass(frozen=True)
class ViewerData:
    """What the page's viewer shows, and how much of the run that is; `text` is for the viewer only."""

    text: str
    samples: int
    samples_available: int
    audits: int
    audits_available: int
    audits_dropped: int
    averaged: bool


def viewer_data(run: Run, *, thumbnails: bool = True) -> ViewerData | None:
    """What the page's viewer shows, or None for a run without samples or without an audit that still has its scores.

    Raises:
        RecordError: the sample sheet or an audit's arrays cannot be read.
    """
    if not any(map(run.has_scores, range(len(run.audits)))):
        return None
    sheet = run.sheet()
    if not sheet.ids:
        return None
    large = sum(map(len, sheet.thumbnails)) > THUMBNAIL_BYTES

    @cache
    def picture(row: int) -> bytes:
        # Of many samples few are shown: the others' pictures stay as they are.
        whole = sheet.thumbnails[row] if thumbnails else b""
        return _smaller(whole) if large and whole else whole

    found, taken, expected = _packed(run, sheet, picture, 1.0)
    # How well heatmaps compress is known once it is done: smooth ones take half of what noise does.
    if taken > BUDGET or (taken < 0.9 * BUDGET and found.samples < found.samples_available):
        found, _, _ = _packed(run, sheet, picture, 1.05 * taken / expected)
    return found


def _packed(
    run: Run, sheet: SampleSheet, picture: Callable[[int], bytes], scale: float
) -> tuple[ViewerData, int, float]:
    """As many samples and audits as fit if heatmaps take `scale` times what is usual; the bytes they take, and should.

    Of each row of the sheet a picture, empty where none may be disclosed.
    """
    held = [i for i in range(len(run.audits)) if run.has_scores(i)]
    last, subjects = run.scores(held[-1]), run.manifest.subjects
    cells = len(last.methods) * min(MOST_CELLS, last.maps.shape[2]) * min(MOST_CELLS, last.maps.shape[3])
    per_frame = scale * (cells * _CELL + _SHORT * (last.values[0, :, 0].size + len(last.methods) + 2))
    most = max(2, min(MOST_FRAMES, int(BUDGET / (FEWEST_SAMPLES * per_frame))))
    frames = [held[place] for place in replayed([run.audits[i] for i in held], most)]
    changed = _most_telling(run.changed()) if any(map(picture, range(len(sheet.ids)))) else []
    latest_effects = next((s for s in map(run.scores, reversed(frames)) if s.effects.size), last)

    at = {name: i for i, name in enumerate(last.ids)}
    chosen: list[dict[str, Any]] = []
    rows: list[int] = []
    expected = float(sum(len(picture) for *_, picture in changed))
    for row in _order(sheet, last, latest_effects, subjects.regions_with("spurious")):
        areas = last.areas[at[sheet.ids[row]]] if sheet.ids[row] in at else np.full(len(last.regions), np.nan)
        sample = _sample(sheet, row, areas)
        takes = len(picture(row)) + len(str(sample)) * _LETTER + len(frames) * per_frame
        if chosen and expected + takes > BUDGET:
            break
        expected += takes
        chosen.append(sample)
        rows.append(row)
    ids = [sample["id"] for sample in chosen]
    blocks = Blocks()
    styles, roles = region_styles(subjects), dict(subjects.regions)
    images = [blocks.add(picture(row)) if picture(row) else None for row in rows]
    header = {
        "classes": subjects.classes,
        "attributes": [{"name": name, "values": values} for name, values in subjects.attributes],
        "regions": [{"name": r, "role": roles.get(r, ""), "hue": styles[r].hue} for r in last.regions],
        "methods": [method_name(m) for m in last.methods],
        "levels": LEVELS,
        "samples": [sample | {"image": image} for sample, image in zip(chosen, images, strict=True)],
        "changed": [
            {
                "sample": ids.index(name),
                "kind": kind,
                "region": region,
                "attribute": attribute,
                "value": value,
                "decision": decision,
                "fall": fall,
                "step": step,
                "image": blocks.add(picture),
            }
            for name, kind, region, attribute, value, decision, fall, step, picture in changed
            if name in ids
        ],
        "frames": [_frame(run, index, ids, blocks) for index in frames],
    }
    content = blocks.packed(header)
    averaged = max(last.maps.shape[2:]) > MOST_CELLS
    shown = ViewerData(
        base64.b64encode(content).decode(),
        len(chosen),
        len(sheet.ids),
        len(frames),
        len(held),
        len(run.audits) - len(held),
        averaged,
    )
    return shown, len(content), expected


def replayed(audits: Sequence[AuditSummary], most: int) -> list[int]:
    """The places of at most `most` audits: the first, the last, some at which a verdict changed, others between them.

    Those at which one changed take half of the room at most; the others are evenly spaced.

    Example:
        >>> from bias_audit.records.runs import read_run
        >>> replayed(read_run("runs/today").audits, 8)  # doctest: +SKIP
        [0, 333, 400, 667, 1000]
    """
    half = (most - 2) // 2
    if len(audits) <= most or half < 2:
        return thin(len(audits), most)
    verdicts = [[(f.kind, f.name, f.verdict) for f in audit.judgement.findings] for audit in audits]
    changed = [i for i in range(1, len(audits)) if verdicts[i] != verdicts[i - 1]]
    kept = {changed[i] for i in thin(len(changed), half)}
    return sorted(kept.union(thin(len(audits), most - len(kept))))


class Blocks:
    """Byte strings one after the other, known by their place and length."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._length = 0

    def add(self, content: bytes) -> tuple[int, int]:
        place = self._length, len(content)
        self._parts.append(content)
        self._length += len(content)
        return place

    def add_shorts(self, values: npt.NDArray[np.floating[Any]]) -> tuple[int, int]:
        # Half a step more before the lower bits are cut off: that rounds to the nearest.
        bits = np.ascontiguousarray(values, dtype="<f4").view("<u4") + np.uint32(0x8000)
        shorts = np.where(np.isnan(values), 0x7FC0, bits >> 16).astype(">u2")
        return self.add(np.ascontiguousarray(shorts.ravel().view(np.uint8).reshape(-1, 2).T).tobytes())

    def packed(self, header: Mapping[str, Any]) -> bytes:
        text = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
        # No time in it: the same run gives the same page.
        return gzip.compress(b"".join((struct.pack("<I", len(text)), text, *self._parts)), mtime=0)


def _most_telling(changed: ChangedPictures | None) -> list[tuple[str, str, str, str, str, int, float, int, bytes]]:
    """At most MOST_CHANGED pictures, as many of each change; they come with the most telling of each first."""
    if changed is None or not changed.ids:
        return []
    kinds = list(zip(changed.kinds, changed.regions, changed.attributes, strict=True))
    each = max(1, MOST_CHANGED // len(set(kinds)))
    taken = dict.fromkeys(kinds, 0)
    found = []
    for i, kind in enumerate(kinds):
        taken[kind] += 1
        if taken[kind] <= each:
            decided = int(changed.decisions[i]), round(float(changed.falls[i]), 4), changed.step
            found.append((changed.ids[i], *kind, changed.values[i], *decided, _smaller(changed.pictures[i])))
    return found


def _smaller(picture: bytes) -> bytes:
    with opened(picture) as image:
        if max(image.size) <= SMALL_SIDE:
            return picture
        image.thumbnail((SMALL_SIDE, SMALL_SIDE))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=75)
    return buffer.getvalue()


def _order(
    sheet: SampleSheet, last: SampleScores, latest_effects: SampleScores, spurious: Sequence[str]
) -> Iterator[int]:
    """Every sample once, such that any beginning holds the worst and, beside them, some of every kind.

    One by its share on a spurious region at the last audit, one by the effect of an intervention, then one from the
    next label x attributes x correct cell, and so on.
    """
    at = {name: i for i, name in enumerate(last.ids)}
    rows = {name: i for i, name in enumerate(sheet.ids)}
    worst = (last.ids[looked.row] for looked in most_looked(last, spurious, len(last.ids)))
    queues = [iter([rows[name] for name in worst if name in rows])]
    if latest_effects.effects.size:
        effects = np.nan_to_num(latest_effects.effects[latest_effects.effect_metrics.index("removal_margin")]).max(-1)
        effect_of = dict(zip(latest_effects.ids, effects.tolist(), strict=True))
        queues.append(iter(sorted(range(len(sheet.ids)), key=lambda i: -effect_of.get(sheet.ids[i], 0.0))))
    cells: dict[tuple[object, ...], list[int]] = {}
    for i, name in enumerate(sheet.ids):
        right = bool(last.correct[at[name]]) if name in at else None
        cells.setdefault((int(sheet.labels[i]), *sheet.attributes[i].tolist(), right), []).append(i)
    depth = max(len(cell) for cell in cells.values())
    queues.append(iter([cell[k] for k in range(depth) for cell in cells.values() if k < len(cell)]))
    seen: set[int] = set()
    while len(seen) < len(sheet.ids):
        for queue in queues:
            for i in queue:
                if i not in seen:
                    seen.add(i)
                    yield i
                    break


def _sample(sheet: SampleSheet, row: int, areas: npt.NDArray[np.float32]) -> dict[str, Any]:
    with opened(sheet.thumbnails[row]) as image:
        width, height = image.size
    return {
        "id": sheet.ids[row],
        "label": int(sheet.labels[row]),
        "attributes": sheet.attributes[row].tolist(),
        "size": [width, height],
        # Masks are padded to the largest thumbnail: a sample's own part is the top left.
        "outlines": [outline(mask[:height, :width]) for mask in sheet.masks[row]],
        "areas": [None if np.isnan(a) else round(float(a), 5) for a in areas],
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


def _frame(run: Run, index: int, ids: list[str], blocks: Blocks) -> dict[str, Any]:
    """One audit's maps and scores of the samples `ids`; what a sample lacks at this audit is blank."""
    audit, scores = run.audits[index], run.scores(index)
    at = {name: i for i, name in enumerate(scores.ids)}
    rows = np.array([at.get(name, -1) for name in ids])
    absent = rows < 0
    maps = np.nan_to_num(scores.maps[:, rows].astype(np.float32))
    maps[:, absent] = 0
    codes = np.rint(_coarse(maps) * LEVELS).clip(0, LEVELS).astype(np.uint8)
    shares = scores.values[scores.metrics.index("energy_share")][:, rows]
    effects: npt.NDArray[np.float32] | None = None
    if scores.effects.size:
        effects = scores.effects[scores.effect_metrics.index("removal_margin"), rows]
        effects = np.where(absent[:, None], np.nan, effects)
    return {
        "step": audit.step,
        "epoch": audit.epoch,
        "weights": audit.weights,
        "size": list(codes.shape[2:]),
        "maps": [blocks.add(m.tobytes()) for m in codes],
        "shares": blocks.add_shorts(np.where(absent[:, None], np.nan, shares)),
        "magnitude": blocks.add_shorts(np.where(absent, np.nan, scores.magnitude[:, rows])),
        "typical": [_typical(m) for m in scores.magnitude],
        "margin": blocks.add_shorts(np.where(absent, np.nan, scores.margin[rows])),
        "predicted": blocks.add(np.where(absent, -1, scores.predictions[rows]).astype("<i2").tobytes()),
        "effects": None if effects is None else blocks.add_shorts(effects),
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

"""Turn a comparison of two runs into one self-contained HTML page.

Enters: a `Comparison`. Leaves: a page that needs neither network, server nor script: what changed in the verdicts and
in the numbers, with intervals, and the images whose heatmaps moved most.

torch is not imported here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from bias_audit.atomic import write_whole
from bias_audit.gate.compare import QUESTIONS, Comparison, Difference, Side
from bias_audit.headlines import is_headline
from bias_audit.overlays import overlay
from bias_audit.records.pictures import opened, outlined
from bias_audit.records.samples import SampleScores, SampleSheet
from bias_audit.report.numbers import interval, minus, signed
from bias_audit.report.pages import content_security_policy, data_uri, resource, template
from bias_audit.report.series import method_name
from bias_audit.report.svg import svg
from bias_audit.terms import OWN, REGION_METRICS
from bias_audit.verdicts.findings import Finding

MOST_IMAGES, MOST_ROWS, MOST_DRAWN = 24, 400, 14
_SIDE = 176
# Of the leading numbers of each of the `QUESTIONS`, and of metrics of the user's own.
_UNITS = (
    "enrichment (× share of area)",
    "share of the decisions, or of their margin",
    "share of the images",
    "Cramér’s V (1 = determined)",
    "",
    "",
)
_WIDTH, _ROW, _SIDES_PAD = 350, 44, 16
_STATES = ("changed", "uncertain", "open", "unknown")
_SIDES = ("A", "B")


@dataclass(frozen=True)
class _Row:
    """One difference as text."""

    subject: str
    before: str
    after: str
    change: str
    n: str
    state: str


@dataclass(frozen=True)
class _Section:
    """One question: a drawing of its leading numbers, the same as rows, and all of its differences."""

    title: str
    unit: str
    drawing: Markup
    leading: tuple[_Row, ...]
    every: tuple[_Row, ...]
    left_out: int


@dataclass(frozen=True)
class _Half:
    """One run's heatmap over an image; `picture` is a data URI."""

    picture: str
    share: str
    decided: str
    right: bool


@dataclass(frozen=True)
class _Pair:
    """One image under both runs, and the spurious region whose share moved most on it."""

    name: str
    label: str
    region: str
    change: str
    a: _Half
    b: _Half


def write_comparison(path: str | Path, found: Comparison, *, thumbnails: bool = True) -> Path:
    """Write the page to `path` and return it; readers never see half a page. `thumbnails` as of `render_comparison`.

    Raises:
        RecordError: samples or arrays cannot be read.
        OSError: the page cannot be written.

    Example:
        >>> write_comparison("compare.html", compare_runs(before, after))  # doctest: +SKIP
        PosixPath('compare.html')
    """
    path = Path(path)
    write_whole(path, render_comparison(found, thumbnails=thumbnails).encode("utf-8", "backslashreplace"))
    return path


def render_comparison(found: Comparison, *, thumbnails: bool = True) -> str:
    """The comparison as one HTML page; without `thumbnails` the heatmaps lie over bare outlines of the regions.

    Raises:
        RecordError: samples or arrays cannot be read.
    """
    pairs = _pairs(found, thumbnails)
    style = "\n".join(resource(name) for name in ("page.css", "compare.css"))
    first, second = _names(found)
    return template("compare.html.j2").render(
        content_security_policy=content_security_policy(style),
        css=Markup(style),
        found=found,
        sides=(("A", first, _facts(found.a)), ("B", second, _facts(found.b))),
        verdicts=sorted(found.verdicts, key=lambda change: not change.changed),
        changed=sum(change.changed for change in found.verdicts),
        sections=_sections(found),
        unpaired=any(d.pairs is None and d.state != "unknown" for d in found.differences),
        pairs=pairs,
        method=method_name(_method(found) or ""),
        no_pairs=_why_no_pairs(found),
    )


def _names(found: Comparison) -> tuple[str, str]:
    """The directories that a reader knows the runs by, and their ids where these are alike."""
    folders = [side.run.path.resolve() for side in (found.a, found.b)]
    a, b = (path.parent.name if path.name == "bias_audit" else path.name for path in folders)
    return (a, b) if a != b else (f"{a} ({found.a.run.manifest.run_id})", f"{b} ({found.b.run.manifest.run_id})")


def _facts(side: Side) -> tuple[tuple[str, str], ...]:
    m = side.run.manifest
    return (
        ("Run", m.run_id),
        ("Model", m.model),
        ("Layer", m.layer),
        ("Methods", ", ".join(method_name(method) for method in m.methods)),
        ("Audit", f"step {side.audit.step}, epoch {side.audit.epoch}, {side.audit.weights} weights"),
        ("Samples audited", f"{m.samples_audited} of {m.samples_available}"),
        ("Data fingerprint", m.fingerprint[:12]),
        ("Policy", str(side.audit.judgement.outcome)),
    )


def _sections(found: Comparison) -> list[_Section]:
    """The questions that have differences; each finding's first evidence leads beside the headlines."""
    first = {_subject(f) for change in found.verdicts for f in (change.before, change.after) if f is not None}
    sections = []
    own = tuple({d.before.metric for d in found.differences if d.before.metric.startswith(OWN)})
    for number, (title, metrics) in enumerate((*QUESTIONS, ("And by metrics of your own?", own))):
        mine = [d for d in found.differences if d.before.metric in metrics]
        if not mine:
            continue
        leading = [
            d
            for d in mine
            # All on one axis: of the heatmaps' metrics only enrichment.
            if (is_headline(d.before) or d.before.metric == "cramers_v" or d.before.subject in first)
            and (d.before.metric == "enrichment" or d.before.metric not in REGION_METRICS)
        ]
        drawn = [d for d in leading if d.state != "unknown"][:MOST_DRAWN]
        unit = _UNITS[number]
        drawing = _dumbbells(f"d{number}", drawn, unit) if drawn else Markup("")
        every = sorted(mine, key=lambda d: _STATES.index(d.state))
        rows = tuple(map(_row, every[:MOST_ROWS]))
        sections.append(_Section(title, unit, drawing, tuple(map(_row, leading)), rows, len(every) - len(rows)))
    return sections


def _subject(finding: Finding) -> str:
    return finding.evidence[0].subject if finding.evidence else ""


def _dumbbells(key: str, differences: Sequence[Difference], unit: str) -> Markup:
    """A and B of each difference on a line of its own, each with its interval."""
    enriched = unit.startswith("enrichment")
    names = [d.subject.removeprefix("enrichment on ") if enriched else d.subject for d in differences]
    # A row is 1 high: its name in the upper part, A and B below it, apart from each other.
    rows = [
        {"row": i + place, "s": side, "x": e.value, "low": e.low, "high": e.high}
        for i, d in enumerate(differences)
        for place, side, e in ((0.52, "A", d.before), (0.78, "B", d.after))
    ]
    lines = [{"row": i + 0.1, "text": name} for i, name in enumerate(names)]
    values = [e for d in differences for e in (d.before, d.after)]
    domain = [min([0.0, *(e.low or 0.0 for e in values)]), 1.04 * max([0.1, *(e.high or 0.0 for e in values)])]
    x = {"type": "quantitative", "scale": {"domain": domain, "nice": False}}
    titled = {"field": "x", **x, "axis": {"title": unit, "tickCount": 5}}
    scale = {"domain": [0, len(differences)], "reverse": True, "nice": False}
    # Names are marks of their own: as labels of the axis, two that read alike would share a line.
    y = {"field": "row", "type": "quantitative", "axis": None, "scale": scale}
    hues = {"domain": list(_SIDES), "range": ["var(--blue)", "var(--vermillion)"]}
    colour = {"field": "s", "type": "nominal", "scale": hues, "legend": None}
    shape = {"field": "s", "scale": {"domain": list(_SIDES), "range": ["circle", "diamond"]}, "legend": None}
    fill = {"domain": list(_SIDES), "range": ["var(--paper)", "var(--vermillion)"]}
    # The page's font may be wider than the one that the library measures with.
    limit = 0.85 * _WIDTH
    text = {"type": "text", "align": "left", "baseline": "top", "limit": limit, "fontSize": 11, "color": "var(--ink)"}
    layers: list[dict[str, Any]] = [
        {
            "data": {"values": [{"x": 1.0 if enriched else 0.0}]},
            "mark": {"type": "rule", "color": "var(--muted)", "strokeDash": [3, 3]},
            "encoding": {"x": titled},
        },
        {
            "mark": {"type": "rule", "strokeWidth": 1.5, "clip": True},
            "encoding": {
                "x": {**titled, "field": "low"},
                "x2": {"field": "high"},
                "y": y,
                "color": colour,
            },
        },
        {
            "mark": {"type": "point", "size": 42, "opacity": 1, "strokeWidth": 1.5},
            "encoding": {
                "x": titled,
                "y": y,
                "shape": shape,
                "stroke": colour,
                "fill": {"field": "s", "scale": fill, "legend": None},
            },
        },
        {
            "data": {"values": lines},
            "mark": text,
            "encoding": {"x": {"value": 0}, "y": y, "text": {"field": "text"}},
        },
    ]
    spec = {"layer": layers, "data": {"values": rows}, "width": _WIDTH, "height": _ROW * len(differences)}
    return svg(key, spec, left=_SIDES_PAD, right=_SIDES_PAD, top=4, bottom=40)


def _row(d: Difference) -> _Row:
    c = d.change
    change = signed(c, 3)
    n = f"{min(d.before.n, d.after.n)}*" if d.pairs is None else str(d.pairs)
    why = c.reason if d.state == "unknown" else ""
    return _Row(d.subject, interval(d.before), interval(d.after), change, n, why or d.state)


def _method(found: Comparison) -> str | None:
    """The first method that both runs explain by."""
    others = found.b.run.manifest.methods
    return next((m for m in found.a.run.manifest.methods if m in others), None)


def _regions(found: Comparison) -> tuple[str, ...]:
    of_a, of_b = (side.run.manifest.subjects.regions_with("spurious") for side in (found.a, found.b))
    return tuple(region for region in of_a if region in of_b)


def _why_no_pairs(found: Comparison) -> str:
    if not found.shared:
        return "No image is known to be the same in both runs."
    if not found.same_maps or _method(found) is None:
        return "The heatmaps of the two runs do not explain the same thing."
    if not all(side.run.has_scores(side.index) for side in (found.a, found.b)):
        return "The heatmaps of one of the two audits were dropped."
    return "" if _regions(found) else "The runs share no spurious region."


def _pairs(found: Comparison, thumbnails: bool) -> list[_Pair]:
    """The images whose share on a spurious region moved most, the largest change first."""
    method = _method(found)
    if method is None or _why_no_pairs(found):
        return []
    regions = _regions(found)
    of = tuple(side.run.scores(side.index) for side in (found.a, found.b))
    places = [{name: i for i, name in enumerate(scores.ids)} for scores in of]
    names = [name for name in found.shared if all(name in place for place in places)]
    rows = [[place[name] for name in names] for place in places]
    shares = [
        np.stack([scores.of("energy_share", method, region)[row] for region in regions], axis=1)
        for scores, row in zip(of, rows, strict=True)
    ]
    moved = np.abs(shares[1] - shares[0])
    moved = np.where(np.isfinite(moved), moved, -1)
    order = [i for i in np.argsort(-moved.max(axis=1), kind="stable") if moved[i].max() > 0][:MOST_IMAGES]
    sheets = tuple(side.run.sheet() for side in (found.a, found.b))
    sheets = sheets if thumbnails else tuple(map(outlined, sheets))
    pairs = []
    for i in order:
        r = int(moved[i].argmax())
        halves = [
            _half(side, scores, sheet, method, rows[k][i], float(shares[k][i, r]))
            for k, (side, scores, sheet) in enumerate(zip((found.a, found.b), of, sheets, strict=True))
        ]
        change = minus(f"{float(shares[1][i, r] - shares[0][i, r]):+.2f}")
        label = found.a.run.manifest.subjects.classes[of[0].labels[rows[0][i]]]
        pairs.append(_Pair(names[i], label, regions[r], change, *halves))
    return pairs


def _half(side: Side, scores: SampleScores, sheet: SampleSheet, method: str, row: int, share: float) -> _Half:
    decided = int(scores.predictions[row])
    picture = opened(sheet.thumbnails[sheet.ids.index(scores.ids[row])]).convert("RGB")
    drawn = overlay(picture, scores.maps[scores.methods.index(method), row].astype(np.float32))
    drawn.thumbnail((_SIDE, _SIDE))
    uri = data_uri(drawn, "JPEG", quality=72)
    return _Half(uri, f"{share:.2f}", side.run.manifest.subjects.class_name(decided), bool(scores.correct[row]))

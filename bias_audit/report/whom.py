"""For whom the model looks at a spurious region: by class and by group, at the last audit and over time.

Enters: a `History`. Leaves: a chart of intervals for each region, and small charts that share their scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bias_audit.report.history import History, references
from bias_audit.report.marks import (
    HEIGHT,
    MOST_ROWS,
    WIDTH,
    Chart,
    Panels,
    Question,
    cell,
    domain_of,
    domain_of_estimates,
    small,
    table,
)
from bias_audit.report.series import SHAPES, Series, method_name, region_styles
from bias_audit.report.svg import svg, swatch
from bias_audit.terms import Estimate
from bias_audit.verdicts.explainers import explainers

# Those that show most are drawn.
MOST_SUBSETS, MOST_PANELS, MOST_REGIONS = 10, 12, 4


def for_whom(history: History) -> Question:
    """Enrichment of each spurious region by class and by group."""
    charts, spurious = [], history.subjects.regions_with("spurious")
    for number, region in enumerate(spurious[:MOST_REGIONS]):
        mine = [e for e in history.last if e.metric == "enrichment" and e.region == region and e.measured]
        if any(e.class_name or e.group for e in mine):
            charts.append(_forest(f"whom-{number}", region, mine, history))
    left = len(spurious) - MOST_REGIONS
    return Question(
        "For whom?",
        f"Enrichment of each spurious region at the last audit (step {history.steps[-1]}), by class and by group."
        + (f" {left} more region{'s are' if left > 1 else ' is'} in the records." if left > 0 else ""),
        tuple(charts),
        _panels(history) if charts and len(set(history.steps)) > 1 else None,
    )


def _panels(history: History) -> Panels | None:
    """Enrichment of the spurious regions over time, one small chart for each class and each group."""
    doubtful = {known.method for known in explainers(tuple(history.last), history.policy) if known.fit is False}
    method = next((m for m in history.methods if m not in doubtful), history.methods[0])
    regions, styles = history.subjects.regions_with("spurious")[:MOST_REGIONS], region_styles(history.subjects)
    several = len(history.subjects.attributes) > 1
    subsets: list[tuple[str, str | None, str | None]] = [(name, name, None) for name in history.subjects.classes]
    subsets += [
        (f"{attribute}: {value}" if several else value, None, f"{attribute}={value}")
        for attribute, values in history.subjects.attributes
        for value in values
    ]
    series_of = [
        (
            name,
            [
                Series(r, styles[r], history.of("enrichment", region=r, class_name=c, group=g, method=method))
                for r in regions
            ],
        )
        for name, c, g in subsets
    ]
    known = [(name, series) for name, series in series_of if any(s.last is not None for s in series)]
    if not known:
        return None
    # Those with most at the last audit are kept, in the order of classes and groups.
    most = sorted(range(len(known)), key=lambda i: -max(s.last or 0.0 for s in known[i][1]))[:MOST_PANELS]
    drawn = [known[i] for i in sorted(most)]
    lines = [1.0, history.policy.tolerance.enrichment]
    domain = domain_of([r for _, series in drawn for s in series for r in s.readings], lines)
    measured = [(name, s) for name, series in drawn for s in series if s.last is not None]
    flat = [Series(f"{name}, {s.name}", s.style, s.readings) for name, s in measured]
    columns, rows, cut = table(flat, history.steps)
    left = f"{len(drawn)} of {len(known)} classes and groups, those with most at the last audit." * (
        len(drawn) < len(known)
    )
    keys = [(swatch(styles[r]), r) for r in regions] + [("┆", references(history))]
    return Panels(
        f"Over time, by class and by group ({method_name(method)})",
        " ".join(filter(None, ("Enrichment (× share of area) against the training step, on one scale.", left, cut))),
        tuple(keys),
        tuple(
            small(f"panel-{i}", name, series, history.steps, lines, domain) for i, (name, series) in enumerate(drawn)
        ),
        columns,
        rows,
    )


def _forest(key: str, region: str, estimates: Sequence[Estimate], history: History) -> Chart:
    """Intervals of all images, each class, each group and both, one above the other."""
    several = len(history.subjects.attributes) > 1

    def subset(e: Estimate) -> str:
        group = e.group if several or e.class_name is None else (e.group or "").partition("=")[2]
        return " × ".join(x for x in (e.class_name, group) if x) or "all images"

    methods = [m for m in history.methods if any(e.method == m for e in estimates)]
    depth = {subset(e): (e.class_name is not None) + (e.group is not None) for e in estimates}
    largest: dict[str, float] = {}
    for e in estimates:
        largest[subset(e)] = max(largest.get(subset(e), 0.0), e.value or 0.0)
    kept = sorted(depth, key=lambda name: (depth[name], -largest[name]))[:MOST_SUBSETS]
    drawn = sorted((name for name in depth if name in kept), key=depth.__getitem__)
    hue = f"var(--{region_styles(history.subjects)[region].hue})"
    tolerance = history.policy.tolerance.enrichment
    low, high = domain_of_estimates(estimates, [1.0, tolerance])
    rows = [
        {"s": e.method, "row": subset(e), "x": e.value, "low": e.low, "high": e.high}
        for e in estimates
        if e.method in methods and subset(e) in drawn
    ]
    x = {"type": "quantitative", "scale": {"domain": [low, high], "nice": False}, "axis": {"tickCount": 5}}
    title = {"title": "enrichment (× share of area)"}
    axis = {"domain": False, "ticks": False, "labelLimit": 116, "labelColor": "var(--ink)"}
    y = {"field": "row", "type": "nominal", "sort": drawn, "title": None, "axis": axis}
    offset = {"field": "s", "scale": {"paddingOuter": 0.6}, "sort": methods}
    # The region's own colour throughout; methods differ by shape, and by being filled or hollow.
    shapes = [SHAPES[i % len(SHAPES)] for i in range(len(methods))]
    fills = [hue if i % 2 == 0 else "var(--paper)" for i in range(len(methods))]
    by_method = {
        "shape": {"field": "s", "scale": {"domain": methods, "range": shapes}, "legend": None},
        "fill": {"field": "s", "scale": {"domain": methods, "range": fills}, "legend": None},
    }
    layers: list[dict[str, Any]] = [
        {
            "data": {"values": [{"x": at} for at in sorted({1.0, tolerance})]},
            "mark": {"type": "rule", "color": "var(--muted)", "strokeDash": [3, 3]},
            "encoding": {"x": {"field": "x", **x}},
        },
        {
            "mark": {"type": "rule", "clip": True, "strokeWidth": 1.5, "color": hue},
            "encoding": {"x": {"field": "low", **x, **title}, "x2": {"field": "high"}, "y": y, "yOffset": offset},
        },
        {
            "mark": {"type": "point", "size": 32, "opacity": 1, "stroke": hue, "strokeWidth": 1.5},
            "encoding": {"x": {"field": "x", **x, **title}, "y": y, "yOffset": offset, **by_method},
        },
    ]
    caption = f"{len(drawn)} of {len(depth)} subsets drawn, the largest." if len(drawn) < len(depth) else ""
    glyphs = ("●", "□", "▲", "◇", "✚", "▽")
    keys = [(glyphs[i % len(glyphs)], method_name(m)) for i, m in enumerate(methods)]
    keys.append(("┆", references(history)))
    cells = {(subset(e), e.method): e for e in estimates}
    return Chart(
        f"Attention to {region}",
        caption,
        tuple(keys),
        svg(
            key,
            {"layer": layers, "data": {"values": rows}, "width": WIDTH, "height": max(HEIGHT, 26 * len(drawn))},
            left=132,
            right=32,
            top=10,
            bottom=40,
        ),
        ("images", *(method_name(m) for m in methods)),
        tuple((name, *(cell(cells.get((name, m))) for m in methods)) for name in list(depth)[:MOST_ROWS]),
    )

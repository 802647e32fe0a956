"""Draw an audited run as static charts: one chart a question, every number with its interval.

Enters: a `Run`. Leaves: `Question`s, each with its charts as inline SVG and the numbers behind them as a table.

The SVG takes its colours from the page's CSS variables, so that it follows the reader's light or dark theme.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import vl_convert
from markupsafe import Markup

from bias_audit.policy import Policy, Rule
from bias_audit.records import Run
from bias_audit.terms import REMAINDER, Estimate, Role, Subjects

# A longer history is thinned evenly: a chart has a few hundred pixels, and nobody reads a thousand rows.
MOST_POINTS, MOST_ROWS, MOST_SERIES, MOST_SUBSETS = 200, 50, 6, 10

WIDTH, HEIGHT = 208, 150
LABEL_PX = 12
METHOD_NAMES = {"gradcam": "Grad-CAM", "hirescam": "HiResCAM"}

_HUES_OF_ROLE: dict[Role, tuple[str, ...]] = {
    "object": ("green", "blue", "sky"),
    "spurious": ("vermillion", "purple", "orange"),
    "context": ("sky", "orange", "blue"),
}
_HUES = ("blue", "vermillion", "green", "purple", "orange", "sky")
_DASHES = ((1, 0), (6, 3), (2, 2), (8, 3, 2, 3), (4, 2), (1, 3))
_SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down")


@dataclass(frozen=True)
class Chart:
    """One chart: its SVG, what its marks mean where no label says so, and the same numbers as a table."""

    title: str
    caption: str
    keys: tuple[tuple[str, str], ...]
    svg: Markup
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Question:
    """What a reader asks, how to read the answer, and the charts that answer it."""

    title: str
    text: str
    charts: tuple[Chart, ...]


@dataclass(frozen=True)
class Style:
    """How a series is told from the others: by hue, dash and point shape at once."""

    hue: str
    dash: tuple[int, ...]
    shape: str


@dataclass(frozen=True)
class _Series:
    name: str
    style: Style
    estimates: tuple[Estimate | None, ...]

    @property
    def last(self) -> float | None:
        return _last_value(self.estimates)


@dataclass(frozen=True)
class _Line:
    """A horizontal reference, such as a limit of the policy."""

    at: float
    label: str


def thin(count: int, most: int) -> list[int]:
    """At most `most` of the indices `0 .. count - 1`, evenly spaced, the first and the last among them.

    Example:
        >>> thin(7, 4)
        [0, 2, 4, 6]
    """
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def region_styles(subjects: Subjects) -> dict[str, Style]:
    """A style for each region and the remainder: solid for objects, dashed for spurious ones, dotted for the rest."""
    styles: dict[str, Style] = {}
    used: dict[Role, int] = {}
    for name, role in subjects.regions:
        rank = used[role] = used.get(role, -1) + 1
        hues = _HUES_OF_ROLE[role]
        dash = {"object": _DASHES[0], "spurious": _DASHES[(1, 3, 4)[rank % 3]], "context": _DASHES[2]}[role]
        styles[name] = Style(hues[rank % len(hues)], dash, _SHAPES[len(styles) % len(_SHAPES)])
    styles[REMAINDER] = Style("grey", _DASHES[5], "circle")
    return styles


def method_name(method: str) -> str:
    """The explanation method as papers write it."""
    return METHOD_NAMES.get(method, method)


def draw(run: Run) -> tuple[Question, ...]:
    """The questions that the run's estimates can answer, in the order in which a reviewer asks them."""
    if not run.audits:
        return ()
    history = _History(run)
    questions = (_attention(history), _for_whom(history), _share(history), _performance(history))
    return tuple(question for question in questions if question.charts)


class _History:
    """A run's estimates by name, one for each audit that is drawn."""

    def __init__(self, run: Run) -> None:
        self.subjects, self.policy, self.methods = run.manifest.subjects, run.manifest.policy, run.manifest.methods
        audits = [run.audits[i] for i in thin(len(run.audits), MOST_POINTS)]
        self.steps = [audit.step for audit in audits]
        self._index = [
            {(e.metric, e.region, e.class_name, e.group, e.method): e for e in audit.estimates} for audit in audits
        ]
        self.last = self._index[-1].values()

    def of(
        self,
        metric: str,
        *,
        region: str | None = None,
        class_name: str | None = None,
        group: str | None = None,
        method: str | None = None,
    ) -> tuple[Estimate | None, ...]:
        key = (metric, region, class_name, group, method)
        return tuple(index.get(key) for index in self._index)


def _attention(history: _History) -> Question:
    references = [_Line(1.0, "chance"), _Line(history.policy.tolerance.enrichment, "tolerance")]
    return Question(
        "Where does the model look, and since when?",
        "Enrichment: a region's share of the heatmap over its share of the image. 1 is what area alone gives.",
        _region_charts(history, "enrichment", "enrichment (× share of area)", references),
    )


def _share(history: _History) -> Question:
    return Question(
        "How much of the heatmap is it?",
        "Energy share: the part of the heatmap that falls on a region; the remainder is what no region covers.",
        _region_charts(history, "energy_share", "share of the heatmap", []),
    )


def _region_charts(history: _History, metric: str, unit: str, references: list[_Line]) -> tuple[Chart, ...]:
    styles = region_styles(history.subjects)
    order: dict[Role | None, int] = {"spurious": 0, "object": 1, "context": 2, None: 3}
    roles: dict[str, Role | None] = {**dict(history.subjects.regions), REMAINDER: None}
    regions = sorted(roles, key=lambda name: order[roles[name]])
    series_of = {
        method: [_Series(r, styles[r], history.of(metric, region=r, method=method)) for r in regions]
        for method in history.methods
    }
    lines_of = {
        method: references
        + [
            line
            for rule, line in _limits(history.policy, metric)
            if rule.class_name is None and rule.method in (None, method)
        ]
        for method in history.methods
    }
    # One scale for all methods: they are there to be compared.
    domain = _domain(
        [e for many in series_of.values() for s in many for e in s.estimates],
        [line.at for many in lines_of.values() for line in many],
    )
    return tuple(
        _over_time(f"{metric}-{i}", method_name(method), unit, series_of[method], history, lines_of[method], domain)
        for i, method in enumerate(history.methods)
        if any(s.last is not None for s in series_of[method])
    )


def _for_whom(history: _History) -> Question:
    charts = []
    for number, region in enumerate(history.subjects.regions_with("spurious")):
        mine = [e for e in history.last if e.metric == "enrichment" and e.region == region and e.measured]
        if any(e.class_name or e.group for e in mine):
            charts.append(_forest(f"whom-{number}", region, mine, history))
    return Question(
        "For whom?",
        f"Enrichment of each spurious region at the last audit (step {history.steps[-1]}), by class and by group.",
        tuple(charts),
    )


def _performance(history: _History) -> Question:
    charts = []
    for number, (attribute, values) in enumerate(history.subjects.attributes):
        groups = [(value, history.of("accuracy", group=f"{attribute}={value}")) for value in values]
        overall = _Series("overall", Style("grey", _DASHES[5], "circle"), history.of("accuracy"))
        lines = [
            line
            for rule, line in _limits(history.policy, "accuracy")
            if rule.class_name is None and (rule.group or attribute).partition("=")[0] == attribute
        ]
        series = [*_named(groups), overall]
        title = f"Accuracy by {attribute}"
        charts.append(_over_time(f"accuracy-{number}", title, "accuracy", series, history, lines, (0.0, 1.0)))
        classes = [
            (name, history.of("accuracy_gap", class_name=name, group=attribute)) for name in history.subjects.classes
        ]
        # Of many classes those with the largest gap are drawn; the table has them all.
        gaps = _named(sorted(classes, key=lambda item: -(_last_value(item[1]) or 0.0)))
        lines = [_Line(history.policy.tolerance.accuracy_gap, "tolerance")]
        lines += [line for rule, line in _limits(history.policy, "accuracy_gap") if rule.group == attribute]
        domain = _domain([e for s in gaps for e in s.estimates], [line.at for line in lines])
        unit = "best minus worst group"
        title = f"Accuracy gap by {attribute}, within each class"
        charts.append(_over_time(f"gap-{number}", title, unit, gaps, history, lines, domain))
    attributes = [name for name, _ in history.subjects.attributes]
    worst = _named([(name, history.of("worst_group_accuracy", group=name)) for name in attributes])
    lines = [line for _, line in _limits(history.policy, "worst_group_accuracy")]
    charts.append(_over_time("worst", "Accuracy of the worst group", "accuracy", worst, history, lines, (0.0, 1.0)))
    return Question(
        "Does it matter?",
        "Accuracy by group. A gap beyond the tolerance, together with attention to a spurious region, is reliance.",
        tuple(chart for chart in charts if chart.rows),
    )


def _named(items: Iterable[tuple[str, tuple[Estimate | None, ...]]]) -> list[_Series]:
    return [
        _Series(name, Style(_HUES[i % len(_HUES)], _DASHES[i % len(_DASHES)], _SHAPES[i % len(_SHAPES)]), estimates)
        for i, (name, estimates) in enumerate(items)
    ]


def _last_value(estimates: Sequence[Estimate | None]) -> float | None:
    return next((e.value for e in reversed(estimates) if e is not None and e.measured), None)


def _limits(policy: Policy, metric: str) -> list[tuple[Rule, _Line]]:
    """The limits that rules set for a metric."""
    return [
        (rule, _Line(at, f"{sign} {at:g} {rule.region or rule.group or ''}".rstrip()))
        for rule in policy.rules
        if rule.metric == metric
        for sign, at in (("≤", rule.max), ("≥", rule.min))
        if at is not None
    ]


def _domain(estimates: Iterable[Estimate | None], references: Iterable[float]) -> tuple[float, float]:
    """From 0 to what shows every value; intervals that reach far beyond are cut: they would flatten the rest."""
    measured = [e for e in estimates if e is not None and e.measured]
    values = [e.value for e in measured if e.value is not None] + list(references)
    highest, widest = max(values, default=0.0), max((e.high for e in measured if e.high is not None), default=0.0)
    return min([0.0, *values]), 1.05 * max(1.12 * highest, min(widest, 1.6 * highest)) or 1.0


def _over_time(
    key: str,
    title: str,
    unit: str,
    series: Sequence[_Series],
    history: _History,
    lines: Sequence[_Line],
    domain: tuple[float, float],
) -> Chart:
    series = [s for s in series if s.last is not None]
    drawn, steps = series[:MOST_SERIES], history.steps
    single = len(set(steps)) == 1
    rows = [
        {
            "s": f"s{i}",
            # With one audit the intervals stand side by side instead of on top of each other.
            "x": step + ((i + 1) / (len(drawn) + 1) - 0.5 if single else 0.0),
            "y": e.value if e is not None and e.measured else None,
            "low": e.low if e is not None and e.measured else None,
            "high": e.high if e is not None and e.measured else None,
        }
        for i, s in enumerate(drawn)
        for step, e in zip(steps, s.estimates, strict=True)
    ]
    x_domain = [steps[0] - 1, steps[0] + 1] if single else [min(steps), max(steps)]
    merged: dict[float, str] = {}
    for line in dict.fromkeys(lines):
        merged[line.at] = f"{merged[line.at]}, {line.label}" if line.at in merged else line.label
    # Series and limits are named in one column, so that no name covers another or a line.
    names = [(s.last or 0.0, s.name, f"var(--ink-{s.style.hue})") for s in drawn]
    names += [(at, text, "var(--muted)") for at, text in merged.items()]
    places = _spread([at for at, _, _ in names], domain)
    labels = [{"at": at, "text": text, "hue": hue} for at, (_, text, hue) in zip(places, names, strict=True)]

    x = {"field": "x", "type": "quantitative", "scale": {"domain": x_domain, "nice": False}}
    axis: dict[str, Any] = {"title": "training step", "tickCount": 4, "tickMinStep": 1, "format": "~s", "grid": False}
    if single:
        axis |= {"values": [steps[0]], "format": "d"}
    x_axis = {**x, "axis": axis}
    scale = {"domain": list(domain), "nice": False, "zero": False}
    # Above the axis rather than along it: short lines of type are read, turned ones are not.
    upright = {"titleAngle": 0, "titleAlign": "left", "titleBaseline": "bottom", "titleX": 0, "titleY": -8}
    y = {"field": "y", "type": "quantitative", "scale": scale, "axis": {"title": unit, "tickCount": 5, **upright}}
    at = {"field": "at", "type": "quantitative", "scale": scale}
    interval = {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}, **_color(drawn)}
    layers: list[dict[str, Any]] = [
        {
            "data": {"values": [{"at": at} for at in merged]},
            "mark": {"type": "rule", "color": "var(--muted)", "strokeDash": [3, 3], "clip": True},
            "encoding": {"y": at},
        },
        {
            "mark": {"type": "line", "clip": True, "strokeWidth": 1.75},
            "encoding": {"x": x_axis, "y": y, **_look(drawn)},
        },
    ]
    if single:
        layers.append({"mark": {"type": "rule", "clip": True, "strokeWidth": 1.5}, "encoding": interval})
    else:
        layers.insert(1, {"mark": {"type": "area", "clip": True, "opacity": 0.16}, "encoding": interval})
    if len(steps) <= 12:
        shape = {"field": "s", "scale": _scale(drawn, [s.style.shape for s in drawn]), "legend": None}
        layers.append(
            {
                "mark": {"type": "point", "filled": True, "size": 30, "opacity": 1},
                "encoding": {"x": x, "y": y, "shape": shape, **_color(drawn)},
            }
        )
    layers.append(
        {
            "data": {"values": labels},
            "mark": {"type": "text", "align": "left", "baseline": "middle", "dx": 7, "limit": 118, "fontSize": 11},
            "encoding": {
                "x": {"datum": x_domain[1], "type": "quantitative"},
                "y": at,
                "text": {"field": "text"},
                "color": {"field": "hue", "type": "nominal", "scale": None},
            },
        }
    )
    caption = "" if len(drawn) == len(series) else f"{len(drawn)} of {len(series)} series drawn; all are in the table."
    shown = thin(len(steps), MOST_ROWS)
    return Chart(
        title,
        caption,
        (),
        _svg(
            key,
            {"layer": layers, "data": {"values": rows}, "width": WIDTH, "height": HEIGHT},
            left=36,
            right=128,
            top=26,
        ),
        ("step", *(s.name for s in series)),
        tuple((str(steps[k]), *(_cell(s.estimates[k]) for s in series)) for k in shown) if series else (),
    )


def _forest(key: str, region: str, estimates: Sequence[Estimate], history: _History) -> Chart:
    """Intervals of all images, each class, each group and both, one above the other."""
    several = len(history.subjects.attributes) > 1

    def subset(e: Estimate) -> str:
        group = e.group if several or e.class_name is None else (e.group or "").partition("=")[2]
        return " × ".join(x for x in (e.class_name, group) if x) or "all images"

    methods = [m for m in history.methods if any(e.method == m for e in estimates)]
    depth = {subset(e): (e.class_name is not None) + (e.group is not None) for e in estimates}
    largest = {name: max(e.value or 0.0 for e in estimates if subset(e) == name) for name in depth}
    kept = sorted(depth, key=lambda name: (depth[name], -largest[name]))[:MOST_SUBSETS]
    drawn = sorted((name for name in depth if name in kept), key=depth.__getitem__)
    hue = f"var(--{region_styles(history.subjects)[region].hue})"
    tolerance = history.policy.tolerance.enrichment
    low, high = _domain(estimates, [1.0, tolerance])
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
    shapes = [_SHAPES[i % len(_SHAPES)] for i in range(len(methods))]
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
    keys.append(("┆", "1 = chance" if tolerance == 1 else f"1 = chance; {tolerance:g} = tolerance"))
    cells = {(subset(e), e.method): e for e in estimates}
    return Chart(
        f"Attention to {region}",
        caption,
        tuple(keys),
        _svg(
            key,
            {"layer": layers, "data": {"values": rows}, "width": WIDTH, "height": max(HEIGHT, 26 * len(drawn))},
            left=132,
            right=32,
            top=10,
        ),
        ("images", *(method_name(m) for m in methods)),
        tuple((name, *(_cell(cells.get((name, m))) for m in methods)) for name in list(depth)[:MOST_ROWS]),
    )


def _scale(series: Sequence[_Series], values: Sequence[Any]) -> dict[str, Any]:
    return {"domain": [f"s{i}" for i in range(len(series))], "range": list(values)}


def _color(series: Sequence[_Series]) -> dict[str, Any]:
    hues = [f"var(--{s.style.hue})" for s in series]
    return {"color": {"field": "s", "type": "nominal", "scale": _scale(series, hues), "legend": None}}


def _look(series: Sequence[_Series]) -> dict[str, Any]:
    dashes = _scale(series, [list(s.style.dash) for s in series])
    return {**_color(series), "strokeDash": {"field": "s", "type": "nominal", "scale": dashes, "legend": None}}


def _spread(values: Sequence[float], domain: tuple[float, float]) -> list[float]:
    """Heights for labels that would stand at `values`, moved apart until none covers another."""
    gap = (domain[1] - domain[0]) * LABEL_PX / HEIGHT
    order = sorted(range(len(values)), key=lambda i: values[i])
    places = [min(max(values[i], domain[0]), domain[1]) for i in order]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    ceiling = domain[1]
    for i in reversed(range(len(places))):
        places[i] = min(places[i], ceiling)
        ceiling = places[i] - gap
    spread = [0.0] * len(values)
    for place, i in zip(places, order, strict=True):
        spread[i] = place
    return spread


def _cell(e: Estimate | None) -> str:
    if e is None or not e.measured:
        return "–"
    return f"{e.value:.2f} [{e.low:.2f}, {e.high:.2f}], n = {e.n}".replace("-", "−")


def _svg(key: str, spec: dict[str, Any], *, left: int, right: int, top: int) -> Markup:
    axis = {
        "labelColor": "var(--muted)",
        "titleColor": "var(--muted)",
        "titleFontWeight": "normal",
        "domainColor": "var(--axis)",
        "tickColor": "var(--axis)",
        "gridColor": "var(--grid)",
        "labelFontSize": 11,
        "titleFontSize": 11,
        "titlePadding": 6,
        "labelFlush": False,
    }
    invalid = {"invalid": "break-paths-show-domains"}
    config = {
        "aria": False,
        "background": None,
        # Only measured with this; the page's own font takes over, as `_inline` leaves none in the SVG.
        "font": "sans-serif",
        "view": {"stroke": None},
        "axis": axis,
        "line": invalid,
        "area": invalid,
    }
    # A fixed frame instead of a fitted one: plots of one row are then equally large, whatever their labels.
    frame = {"autosize": "none", "padding": {"left": left, "top": top, "right": right, "bottom": 40}}
    svg = vl_convert.vegalite_to_svg({**spec, **frame, "config": config})
    return Markup(_inline(svg, key))


def _inline(svg: str, key: str) -> str:
    """The SVG fit to stand in a page beside others: as wide as its place, with its own ids and no needless bytes."""
    # The library counts clip paths over the life of the process; renumbered, equal charts are equal bytes.
    for number, name in enumerate(re.findall(r' id="([^"]+)"', svg)):
        svg = svg.replace(f' id="{name}"', f' id="{key}-{number}"').replace(f"url(#{name})", f"url(#{key}-{number})")
    svg = re.sub(r' (role|aria-\w+|class|pointer-events|font-family|xmlns(:xlink)?)="[^"]*"', "", svg)
    svg = re.sub(r'<path d="[^"]*" display="none"/>|<path d="M0,0h0v0h0Z"/>', "", svg)
    svg = re.sub(r' (transform|d)="([^"]*)"', lambda m: f' {m[1]}="{_rounded(m[2])}"', svg)
    return re.sub(r'<svg version="1.1" width="\d+" height="\d+"', '<svg class="plot" aria-hidden="true"', svg, count=1)


def _rounded(numbers: str) -> str:
    return re.sub(r"\d+\.\d{3,}", lambda m: f"{float(m[0]):.2f}".rstrip("0").rstrip("."), numbers)

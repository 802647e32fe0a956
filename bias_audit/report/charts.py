"""The questions that a reviewer asks of a run over time, each answered by charts with every number's interval.

Enters: a `Run`. Leaves: `Question`s, each with its charts as inline SVG and the numbers behind them as tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bias_audit.findings import explainers
from bias_audit.policies.policy import Policy, Rule
from bias_audit.records.history import Onset, onsets
from bias_audit.records.runs import Run
from bias_audit.report.marks import (
    DASHES,
    HEIGHT,
    MOST_EVENTS,
    MOST_ROWS,
    SHAPES,
    WIDTH,
    Chart,
    Event,
    Line,
    Panels,
    Reading,
    Series,
    Style,
    cell,
    domain_of,
    domain_of_estimates,
    last_value,
    method_name,
    named,
    over_time,
    region_styles,
    small,
    svg,
    swatch,
    table,
    thin,
)
from bias_audit.terms import OWN, REMAINDER, Estimate, Role, Verdict

__all__ = ["MOST_ROWS", "Question", "draw", "method_name", "region_styles", "thin"]

# A longer history is thinned evenly; of many subsets, panels and attributes those that show most are drawn.
MOST_POINTS, MOST_SUBSETS, MOST_PANELS, MOST_ATTRIBUTES, MOST_REGIONS = 200, 10, 12, 4, 4


@dataclass(frozen=True)
class Question:
    """What a reader asks, how to read the answer, and the charts that answer it."""

    title: str
    text: str
    charts: tuple[Chart, ...]
    panels: Panels | None = None


def draw(run: Run) -> tuple[Question, ...]:
    """The questions that the run's estimates can answer, in the order in which a reviewer asks them.

    Example:
        >>> from bias_audit.records.runs import read_run
        >>> [question.title for question in draw(read_run("runs/today"))]  # doctest: +SKIP
        ['Where does the model look, and since when?', ...]
    """
    if not run.audits:
        return ()
    history = _History(run)
    questions = (
        _attention(history),
        _interventions(history),
        _performance(history),
        _for_whom(history),
        _share(history),
        _own(history),
    )
    return tuple(question for question in questions if question.charts)


class _History:
    """A run's estimates by name, one for each audit that is drawn, and when what it is alarmed about set in."""

    def __init__(self, run: Run) -> None:
        self.subjects, self.policy, self.methods = run.manifest.subjects, run.manifest.policy, run.manifest.methods
        self._audits, self._drawn = run.audits, thin(len(run.audits), MOST_POINTS)
        self.steps = [run.audits[i].step for i in self._drawn]
        self._index = [
            {(e.metric, e.region, e.class_name, e.group, e.method): e for e in run.audits[i].estimates}
            for i in self._drawn
        ]
        self.last = self._index[-1].values()
        self._onsets = [onset for onset in onsets(run.audits) if onset.since is not None and len(onset.steps) > 1]
        # The most lines of text that stand above any chart, so that charts side by side leave the same room.
        subjects = [("region", list(self.subjects.regions_with("spurious")))]
        subjects += [("attribute", [attribute]) for attribute, _ in self.subjects.attributes]
        self.above = min(MOST_EVENTS, max(len(self.events(kind, names)) for kind, names in subjects))

    def of(
        self,
        metric: str,
        *,
        region: str | None = None,
        class_name: str | None = None,
        group: str | None = None,
        method: str | None = None,
    ) -> tuple[Reading | None, ...]:
        """The estimate of exactly these names at each audit that is drawn."""
        key = (metric, region, class_name, group, method)
        return tuple(
            self._reading(i, index[key]) if key in index else None
            for i, index in zip(self._drawn, self._index, strict=True)
        )

    def _reading(self, audit: int, e: Estimate) -> Reading:
        return Reading(self._audits[audit].step, self._audits[max(0, audit - e.age)].step, e)

    def events(self, kind: str, names: Sequence[str]) -> tuple[Event, ...]:
        """Since when the model relies, or is suspected to rely, on each of these; what set in together is one event."""
        found: dict[tuple[int, Verdict], list[Onset]] = {}
        for onset in self._onsets:
            if onset.kind == kind and onset.name in names and onset.since is not None:
                found.setdefault((onset.since, onset.verdict), []).append(onset)
        words = {Verdict.RELIANCE: "reliance on", Verdict.SUSPECTED: "suspicion of"}
        return tuple(
            Event(since, f"{words[verdict]} {', '.join(onset.name for onset in together)} since {since}")
            for (since, verdict), together in sorted(found.items())
        )


def _attention(history: _History) -> Question:
    references = [Line(1.0, "chance"), Line(history.policy.tolerance.enrichment, "tolerance")]
    return Question(
        "Where does the model look, and since when?",
        "Enrichment: a region’s share of the heatmap over its share of the image. 1 is what area alone gives. An "
        "upright line marks the step since which the verdict stands.",
        _region_charts(history, "enrichment", "enrichment (× share of area)", references, marked=True),
    )


def _share(history: _History) -> Question:
    return Question(
        "How much of the heatmap is it?",
        "Energy share: the part of the heatmap that falls on a region; the remainder is what no region covers.",
        _region_charts(history, "energy_share", "share of the heatmap", [], marked=False),
    )


def _own(history: _History) -> Question:
    """Of each metric of the user's own what it is on each region, by each explanation method."""
    metrics = dict.fromkeys(e.metric for e in history.last if e.metric.startswith(OWN) and e.region and e.method)
    charts = (chart for metric in metrics for chart in _region_charts(history, metric, metric, [], marked=False))
    return Question("And by metrics of your own?", "What the plan’s own metrics say of each region.", tuple(charts))


def _region_charts(
    history: _History, metric: str, unit: str, references: list[Line], marked: bool
) -> tuple[Chart, ...]:
    styles = region_styles(history.subjects)
    order: dict[Role | None, int] = {"spurious": 0, "object": 1, "context": 2, None: 3}
    roles: dict[str, Role | None] = {**dict(history.subjects.regions), REMAINDER: None}
    regions = sorted(roles, key=lambda name: order[roles[name]])
    series_of = {
        method: [Series(r, styles[r], history.of(metric, region=r, method=method)) for r in regions]
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
    domain = domain_of(
        [reading for many in series_of.values() for s in many for reading in s.readings],
        [line.at for many in lines_of.values() for line in many],
    )
    events = history.events("region", regions) if marked else ()
    return tuple(
        over_time(
            f"{metric}-{i}",
            method_name(method),
            unit,
            series_of[method],
            history.steps,
            lines_of[method],
            domain,
            events,
            history.above if marked else 0,
        )
        for i, method in enumerate(history.methods)
        if any(s.last is not None for s in series_of[method])
    )


def _interventions(history: _History) -> Question:
    """What removing regions and swapping cues changed, as often as that was tried."""
    spurious, tolerance = history.subjects.regions_with("spurious"), history.policy.tolerance
    styles = region_styles(history.subjects)

    def by_region(metric: str, group: str | None = None) -> list[Series]:
        return [Series(r, styles[r], history.of(metric, region=r, group=group)) for r in spurious]

    charts = [
        _chart(
            history,
            "removal_flips",
            "Decisions that change without a region",
            "share of decisions beyond control",
            by_region("removal_flips"),
            [Line(tolerance.removal_flips, "tolerance")],
            history.events("region", spurious),
        ),
        _chart(
            history,
            "removal_effect",
            "How far the decision moves without a region",
            "share of the margin beyond control",
            by_region("removal_effect"),
            [],
            history.events("region", spurious),
        ),
    ]
    for number, (attribute, _) in enumerate(history.subjects.attributes[:MOST_ATTRIBUTES]):
        events = history.events("attribute", [attribute])
        charts.append(
            _chart(
                history,
                "removal_contrast",
                f"What regions say of {attribute}",
                "share of the margin",
                by_region("removal_contrast", attribute),
                [Line(tolerance.removal_contrast, "tolerance")],
                events,
                f"contrast-{number}",
                attribute,
            )
        )
        # Which value goes with which class may be unknown: then all that is known is whether decisions change.
        for metric, title, unit in (
            ("swap_gap", f"Accuracy lost when {attribute} is swapped", "accuracy with minus against the class"),
            ("swap_flips", f"Decisions that change when {attribute} is swapped", "share of decisions beyond control"),
        ):
            whole = Series("whole cue", Style("blue", DASHES[0], SHAPES[3]), history.of(metric, group=attribute))
            swapped = [whole, *by_region(metric, attribute)]
            if any(s.last is not None for s in swapped):
                limit = [Line(tolerance.swap_gap, "tolerance")]
                key = f"swap-{number}"
                charts.append(_chart(history, metric, title, unit, swapped, limit, events, key, attribute))
                break
    return Question(
        "Does the decision hang on it?",
        "Regions are in-painted, cues swapped, on some of the images and at some of the audits. Points are "
        "measurements, lines lead from one to the next. “Beyond control”: less what the same change does elsewhere.",
        tuple(chart for chart in charts if chart.rows),
    )


def _chart(
    history: _History,
    metric: str,
    title: str,
    unit: str,
    series: Sequence[Series],
    lines: Sequence[Line],
    events: Sequence[Event],
    key: str | None = None,
    attribute: str | None = None,
) -> Chart:
    """A chart of one metric over time with the limits that rules set for it; `attribute` is what it is about."""
    limits = [
        line
        for rule, line in _limits(history.policy, metric)
        if rule.class_name is None and (attribute is None or (rule.group or attribute).partition("=")[0] == attribute)
    ]
    lines = [*lines, *limits]
    domain = domain_of([r for s in series for r in s.readings], [line.at for line in lines])
    return over_time(key or metric, title, unit, series, history.steps, lines, domain, events, history.above)


def _performance(history: _History) -> Question:
    charts = []
    attributes = history.subjects.attributes
    tolerance = Line(history.policy.tolerance.accuracy_gap, "tolerance")
    for number, (attribute, values) in enumerate(attributes[:MOST_ATTRIBUTES]):
        groups = [(value, history.of("accuracy", group=f"{attribute}={value}")) for value in values]
        overall = Series("overall", Style("grey", DASHES[5], "circle"), history.of("accuracy"))
        lines = [
            line
            for rule, line in _limits(history.policy, "accuracy")
            if rule.class_name is None and (rule.group or attribute).partition("=")[0] == attribute
        ]
        title, series, steps = f"Accuracy by {attribute}", [*named(groups), overall], history.steps
        key, whole = f"accuracy-{number}", (0.0, 1.0)
        charts.append(over_time(key, title, "accuracy", series, steps, lines, whole, above=history.above))
        events = history.events("attribute", [attribute])
        classes = [
            (name, history.of("accuracy_gap", class_name=name, group=attribute)) for name in history.subjects.classes
        ]
        # Of many classes those with the largest gap come first.
        gaps = named(sorted(classes, key=lambda item: -(last_value(item[1]) or 0.0)))
        title, unit = f"Accuracy gap by {attribute}, within each class", "best minus worst group"
        key = f"gap-{number}"
        charts.append(_chart(history, "accuracy_gap", title, unit, gaps, [tolerance], events, key, attribute))
        over_all = named(
            [
                (name, history.of(metric, group=attribute))
                for name, metric in (
                    ("agree − disagree", "alignment_gap"),
                    ("equalized odds", "equalized_odds_difference"),
                    ("best − worst", "accuracy_gap"),
                )
            ]
        )
        title, unit = f"Gaps by {attribute}, over all classes", "difference of rates"
        lines = [tolerance, *(line for _, line in _limits(history.policy, "alignment_gap"))]
        key = f"gaps-{number}"
        charts.append(
            _chart(history, "equalized_odds_difference", title, unit, over_all, lines, events, key, attribute)
        )
    worst = named([(name, history.of("worst_group_accuracy", group=name)) for name, _ in attributes])
    lines = [line for _, line in _limits(history.policy, "worst_group_accuracy")]
    title = "Accuracy of the worst group"
    steps, whole = history.steps, (0.0, 1.0)
    charts.append(over_time("worst", title, "accuracy", worst, steps, lines, whole, above=history.above))
    left = len(attributes) - MOST_ATTRIBUTES
    return Question(
        "Does it matter?",
        "Accuracy by group. A gap beyond the tolerance, together with attention to a spurious region, is reliance. "
        "“Agree − disagree”: accuracy where group and class go together as in the training data, minus where not."
        + (f" {left} more attribute{'s are' if left > 1 else ' is'} in the records." if left > 0 else ""),
        tuple(chart for chart in charts if chart.rows),
    )


def _for_whom(history: _History) -> Question:
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


def _panels(history: _History) -> Panels | None:
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
    keys = [(swatch(styles[r]), r) for r in regions] + [("┆", _references(history))]
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


def _limits(policy: Policy, metric: str) -> list[tuple[Rule, Line]]:
    """The limits that rules set for a metric."""
    return [
        (rule, Line(at, f"{sign} {at:g} {rule.region or rule.group or ''}".rstrip()))
        for rule in policy.rules
        if rule.metric == metric
        for sign, at in (("≤", rule.upper), ("≥", rule.lower))
        if at is not None
    ]


def _references(history: _History) -> str:
    tolerance = history.policy.tolerance.enrichment
    return "1 = chance" if tolerance == 1 else f"1 = chance; {tolerance:g} = tolerance"


def _forest(key: str, region: str, estimates: Sequence[Estimate], history: _History) -> Chart:
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
    keys.append(("┆", _references(history)))
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

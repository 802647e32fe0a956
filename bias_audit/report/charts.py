"""The questions that a reviewer asks of a run over time, each answered by charts with every number's interval.

Enters: a `Run`. Leaves: `Question`s, each with its charts as inline SVG and the numbers behind them as tables.
"""

from __future__ import annotations

from bias_audit.records.runs import Run
from bias_audit.report.history import History, chart_of, limits_of
from bias_audit.report.marks import Chart, Question, domain_of, over_time
from bias_audit.report.series import DASHES, SHAPES, Line, Series, Style, last_value, method_name, named, region_styles
from bias_audit.report.whom import for_whom
from bias_audit.terms import OWN, REMAINDER, Role

# The rest is counted.
MOST_ATTRIBUTES = 4


def draw(run: Run) -> tuple[Question, ...]:
    """The questions that the run's estimates can answer, in the order in which a reviewer asks them.

    Example:
        >>> from bias_audit.records.runs import read_run
        >>> [question.title for question in draw(read_run("runs/today"))]  # doctest: +SKIP
        ['Where does the model look, and since when?', ...]
    """
    if not run.audits:
        return ()
    history = History(run)
    questions = (
        _attention(history),
        _interventions(history),
        _performance(history),
        for_whom(history),
        _share(history),
        _own(history),
    )
    return tuple(question for question in questions if question.charts)


def _attention(history: History) -> Question:
    references = [Line(1.0, "chance"), Line(history.policy.tolerance.enrichment, "tolerance")]
    return Question(
        "Where does the model look, and since when?",
        "Enrichment: a region’s share of the heatmap over its share of the image. 1 is what area alone gives. An "
        "upright line marks the step since which the verdict stands.",
        _region_charts(history, "enrichment", "enrichment (× share of area)", references, marked=True),
    )


def _share(history: History) -> Question:
    return Question(
        "How much of the heatmap is it?",
        "Energy share: the part of the heatmap that falls on a region; the remainder is what no region covers.",
        _region_charts(history, "energy_share", "share of the heatmap", [], marked=False),
    )


def _own(history: History) -> Question:
    """Of each metric of the user's own what it is on each region, by each explanation method."""
    metrics = dict.fromkeys(e.metric for e in history.last if e.metric.startswith(OWN) and e.region and e.method)
    charts = (chart for metric in metrics for chart in _region_charts(history, metric, metric, [], marked=False))
    return Question("And by metrics of your own?", "What the plan’s own metrics say of each region.", tuple(charts))


def _region_charts(history: History, metric: str, unit: str, references: list[Line], marked: bool) -> tuple[Chart, ...]:
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
            for rule, line in limits_of(history.policy, metric)
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


def _interventions(history: History) -> Question:
    """What removing regions and swapping cues changed, as often as that was tried."""
    spurious, tolerance = history.subjects.regions_with("spurious"), history.policy.tolerance
    styles = region_styles(history.subjects)

    def by_region(metric: str, group: str | None = None) -> list[Series]:
        return [Series(r, styles[r], history.of(metric, region=r, group=group)) for r in spurious]

    charts = [
        chart_of(
            history,
            "removal_flips",
            "Decisions that change without a region",
            "share of decisions beyond control",
            by_region("removal_flips"),
            [Line(tolerance.removal_flips, "tolerance")],
            history.events("region", spurious),
        ),
        chart_of(
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
            chart_of(
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
                charts.append(chart_of(history, metric, title, unit, swapped, limit, events, key, attribute))
                break
    return Question(
        "Does the decision hang on it?",
        "Regions are in-painted, cues swapped, on some of the images and at some of the audits. Points are "
        "measurements, lines lead from one to the next. “Beyond control”: less what the same change does elsewhere.",
        tuple(chart for chart in charts if chart.rows),
    )


def _performance(history: History) -> Question:
    charts = []
    attributes = history.subjects.attributes
    tolerance = Line(history.policy.tolerance.accuracy_gap, "tolerance")
    for number, (attribute, values) in enumerate(attributes[:MOST_ATTRIBUTES]):
        groups = [(value, history.of("accuracy", group=f"{attribute}={value}")) for value in values]
        overall = Series("overall", Style("grey", DASHES[5], "circle"), history.of("accuracy"))
        lines = [
            line
            for rule, line in limits_of(history.policy, "accuracy")
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
        charts.append(chart_of(history, "accuracy_gap", title, unit, gaps, [tolerance], events, key, attribute))
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
        lines = [tolerance, *(line for _, line in limits_of(history.policy, "alignment_gap"))]
        key = f"gaps-{number}"
        charts.append(
            chart_of(history, "equalized_odds_difference", title, unit, over_all, lines, events, key, attribute)
        )
    worst = named([(name, history.of("worst_group_accuracy", group=name)) for name, _ in attributes])
    lines = [line for _, line in limits_of(history.policy, "worst_group_accuracy")]
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

"""A run's estimates over time, as charts take them.

Enters: a `Run`. Leaves: of each number a `Reading` for each audit that is drawn, when what is alarming set in, and the
limits that the policy sets.
"""

from __future__ import annotations

from collections.abc import Sequence

from bias_audit.policies.policy import Policy, Rule
from bias_audit.records.history import Onset, onsets
from bias_audit.records.runs import Run
from bias_audit.report.marks import MOST_EVENTS, Chart, domain_of, over_time
from bias_audit.report.series import Event, Line, Reading, Series, thin
from bias_audit.terms import Estimate, Verdict

# A longer history is thinned evenly.
MOST_POINTS = 200


class History:
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


def chart_of(
    history: History,
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
        for rule, line in limits_of(history.policy, metric)
        if rule.class_name is None and (attribute is None or (rule.group or attribute).partition("=")[0] == attribute)
    ]
    lines = [*lines, *limits]
    domain = domain_of([r for s in series for r in s.readings], [line.at for line in lines])
    return over_time(key or metric, title, unit, series, history.steps, lines, domain, events, history.above)


def limits_of(policy: Policy, metric: str) -> list[tuple[Rule, Line]]:
    """The limits that rules set for a metric."""
    return [
        (rule, Line(at, f"{sign} {at:g} {rule.region or rule.group or ''}".rstrip()))
        for rule in policy.rules
        if rule.metric == metric
        for sign, at in (("≤", rule.upper), ("≥", rule.lower))
        if at is not None
    ]


def references(history: History) -> str:
    """What the broken lines in a chart of enrichment stand for."""
    tolerance = history.policy.tolerance.enrichment
    return "1 = chance" if tolerance == 1 else f"1 = chance; {tolerance:g} = tolerance"

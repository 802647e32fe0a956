"""Since when a model relies on a cue, where that is heading, and what stopping before it would have cost.

Enters: a run's audits in order of time. Leaves: an `Onset` per region and attribute that was judged.

Standard library and pydantic only: whoever reads records can say this.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from bias_audit.records.results import AuditSummary
from bias_audit.terms import Estimate, Verdict
from bias_audit.verdicts.findings import Finding
from bias_audit.wording import readable

_ALARMS = (Verdict.RELIANCE, Verdict.SUSPECTED)


@dataclass(frozen=True)
class Change:
    """A difference with its 95 % interval; all None where it could not be measured, and `reason` says why."""

    value: float | None
    low: float | None
    high: float | None
    reason: str = ""

    @property
    def direction(self) -> Literal["up", "down", "open", "unknown"]:
        """ "up" or "down" where the whole interval lies on that side of 0, "open" where it does not exclude 0."""
        if self.low is None or self.high is None:
            return "unknown"
        return "up" if self.low > 0 else "down" if self.high < 0 else "open"


@dataclass(frozen=True)
class Onset:
    """When the verdict on one region or attribute set in, and what went with it.

    `steps` and `verdicts` are those of the trained model's audits, in order of time; the last one is `verdict`. Where
    it is reliance or suspicion, `since` is the step at which it set in: the first audit from which none said otherwise.
    (One that was inconclusive says nothing.) `trend` is the change of `leading`, the estimate that leads the evidence
    of the last finding, along a straight line from the first to the last step at which it was measured. `before` is the
    step of the last audit before `since` that shows no such reliance or suspicion, `verdict_before` what it said, None
    without one. `cost` is the accuracy of the last audit minus that at `before`.
    """

    kind: Literal["region", "attribute"]
    name: str
    steps: tuple[int, ...]
    verdicts: tuple[Verdict, ...]
    since: int | None
    leading: Estimate | None
    trend: Change
    before: int | None
    verdict_before: Verdict | None
    cost: Change

    @property
    def verdict(self) -> Verdict:
        """What the last audit says."""
        return self.verdicts[-1]

    def __str__(self) -> str:
        return " ".join(filter(None, (self._say_onset(), self._say_trend(), self._say_stopping())))

    def _say_onset(self) -> str:
        about = f"{self.kind.capitalize()} {self.name}"
        if self.since is None:
            return f"{about}: {self.verdict} at the last of {len(self.steps)} audits, step {self.steps[-1]}."
        what = "reliance" if self.verdict is Verdict.RELIANCE else "suspicion"
        return f"{about}: {what} since step {self.since} of {self.steps[-1]}."

    def _say_trend(self) -> str:
        t = self.trend
        if self.leading is None or t.value is None:
            return ""
        verb = {"up": "rises", "down": "falls"}.get(t.direction, "shows no trend")
        name = readable(self.leading.subject)
        return f"Over the run {name} {verb}: {t.value:+.2f} [{t.low:+.2f}, {t.high:+.2f}]."

    def _say_stopping(self) -> str:
        if self.since is None:
            return ""
        if self.before is None:
            return "No earlier audit is known to be free of it: stopping early is not shown to avoid it."
        stopping = f"Stopping at step {self.before} ({self.verdict_before})"
        c = self.cost
        if c.value is None or c.low is None or c.high is None:
            return f"{stopping} would have avoided it, at a cost in accuracy that is unknown: {c.reason}."
        sign, verb = (100, "cost") if c.value >= 0 else (-100, "gained")
        low, high = sorted((sign * c.low, sign * c.high))
        return f"{stopping} would have {verb} {sign * c.value:.1f} points of accuracy [{low:.1f}, {high:.1f}]."


def onsets(audits: Sequence[AuditSummary]) -> tuple[Onset, ...]:
    """One `Onset` for each region and attribute of the last audit, in its order; none without an audit in training.

    The audit with trigger "reference" is of an untrained model and left out. Verdicts are those recorded.

    The trend is the least-squares line through the measured values against the step, as the difference between its two
    ends; its interval carries the estimates' own intervals through that sum, as if they were independent. So does the
    interval of the cost with those of the two accuracies (Newcombe, Statistics in Medicine 17, 1998, method 10). The
    audits share their images, so most of their errors are alike and cancel: both intervals are rather too wide. A line
    does not show a turn in between.

    Args:
        audits: of one run, in order of time, such as `Run.audits`.

    Example:
        >>> from bias_audit.verdicts.judgement import Judgement
        >>> def audit(step, verdict):
        ...     finding = Finding("region", "hair", Verdict(verdict), "", (), (Verdict(verdict),))
        ...     accuracy = Estimate("accuracy", 0.8 + step / 10000, 0.75, 0.9, 100)
        ...     return AuditSummary(step, 0, "raw", "", 1.0, (accuracy,), Judgement((finding,), ()))
        >>> (hair,) = onsets([audit(100, "cleared"), audit(200, "reliance"), audit(300, "reliance")])
        >>> print(hair)
        Region hair: reliance since step 200 of 300. Stopping at step 100 (cleared) would have cost 2.0 points of
        accuracy [-10.0, 11.2].
    """
    trained = [audit for audit in audits if not audit.is_reference]
    if not trained:
        return ()
    return tuple(_onset(finding, trained) for finding in trained[-1].judgement.findings)


def _onset(last: Finding, trained: Sequence[AuditSummary]) -> Onset:
    judged = [
        (audit, finding.verdict)
        for audit in trained
        for finding in audit.judgement.findings
        if (finding.kind, finding.name) == (last.kind, last.name)
    ]
    audits, verdicts = [audit for audit, _ in judged], [verdict for _, verdict in judged]
    first = _set_in(verdicts)
    known = [i for i, verdict in enumerate(verdicts[:first]) if verdict is not Verdict.INCONCLUSIVE]
    before = known[-1] if first is not None and known else None
    leading = last.evidence[0] if last.evidence else None
    return Onset(
        last.kind,
        last.name,
        tuple(audit.step for audit in audits),
        tuple(verdicts),
        None if first is None else audits[first].step,
        leading,
        _trend(audits, leading),
        None if before is None else audits[before].step,
        None if before is None else verdicts[before],
        Change(None, None, None, "there is no earlier state") if before is None else _cost(audits[before], audits[-1]),
    )


def _set_in(verdicts: Sequence[Verdict]) -> int | None:
    """Where the last verdict, if it is an alarm, first stood without being contradicted since."""
    last = verdicts[-1]
    if last not in _ALARMS:
        return None
    # Reliance is more than suspicion: what is suspected now, and was relied on between, has been suspected throughout.
    its = (last, Verdict.RELIANCE)
    first = len(verdicts) - 1
    for i in reversed(range(len(verdicts))):
        if verdicts[i] in its:
            first = i
        elif verdicts[i] is not Verdict.INCONCLUSIVE:
            break
    return first


def _same(audit: AuditSummary, e: Estimate) -> Estimate | None:
    """The audit's estimate of the same name, None where it has none, or none of its own."""
    try:
        found = audit.estimate(e.metric, region=e.region, class_name=e.class_name, group=e.group, method=e.method)
    except KeyError:
        return None
    # One that is carried on from an earlier audit is the same measurement again.
    return found if found.measured and found.age == 0 else None


def _trend(audits: Sequence[AuditSummary], leading: Estimate | None) -> Change:
    if leading is None:
        return Change(None, None, None, "the finding has no evidence")
    found = [(audit.step, _same(audit, leading)) for audit in audits]
    measured = [(step, e.value, e.low, e.high) for step, e in found if e is not None]
    steps = [step for step, *_ in measured]
    if len(set(steps)) < 2:
        return Change(None, None, None, f"{leading.subject} was measured at fewer than two steps")
    # The line's rise is a weighted sum of the values, and so is its error.
    centre, span = fmean(steps), max(steps) - min(steps)
    spread = sum((step - centre) ** 2 for step in steps)
    value = below = above = 0.0
    for step, middle, low, high in measured:
        weight = span * (step - centre) / spread
        assert middle is not None and low is not None and high is not None
        value += weight * middle
        down, up = (middle - low, high - middle) if weight > 0 else (high - middle, middle - low)
        below, above = math.hypot(below, weight * down), math.hypot(above, weight * up)
    return Change(value, value - below, value + above)


def _cost(before: AuditSummary, last: AuditSummary) -> Change:
    accuracy = Estimate("accuracy", None, None, None, 0)
    early, late = _same(before, accuracy), _same(last, accuracy)
    if early is None or late is None:
        step = before.step if early is None else last.step
        return Change(None, None, None, f"accuracy was not measured at step {step}")
    assert early.value is not None and early.low is not None and early.high is not None
    assert late.value is not None and late.low is not None and late.high is not None
    value = late.value - early.value
    below = math.hypot(late.value - late.low, early.high - early.value)
    above = math.hypot(late.high - late.value, early.value - early.low)
    return Change(value, value - below, value + above)

"""Judge measured estimates: whether a policy's rules hold.

Enters: `Estimate`s (numbers with their interval and count), the `Subjects` they are about, and a `Policy`.
Leaves: a `Judgement`: the `Finding`s that follow, and one `Check` per rule and estimate or finding.

Neither torch nor NumPy is imported: the gate judges anew, and must start in a blink.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from bias_audit.policies.policy import EACH, Op, Policy, Rule
from bias_audit.terms import (
    COMPARING_METRICS,
    EXPLAINER_METRICS,
    OWN,
    ROLES,
    Estimate,
    Outcome,
    Subjects,
    Verdict,
    is_of_maps,
)
from bias_audit.verdicts.explainers import Explainer, explainers, not_listened_to
from bias_audit.verdicts.findings import Finding, find


@dataclass(frozen=True)
class Check:
    """One rule applied to one estimate or finding; `step` is that of the audit, where several are judged together."""

    rule: str
    subject: str
    outcome: Outcome
    severity: Literal["error", "warn"]
    message: str
    estimate: Estimate | None = None
    limit: float | None = None
    step: int | None = None


@dataclass(frozen=True)
class Judgement:
    """Findings and checks of one audit under one policy; `outcome` is what the gate returns."""

    findings: tuple[Finding, ...]
    checks: tuple[Check, ...]

    @property
    def outcome(self) -> Outcome:
        """Violated if any rule of severity `error` is; else inconclusive if any such rule is; else held."""
        outcomes = {check.outcome for check in self.checks if check.severity == "error"}
        if Outcome.VIOLATED in outcomes:
            return Outcome.VIOLATED
        # A policy whose rules matched nothing has shown nothing.
        return Outcome.HELD if outcomes == {Outcome.HELD} else Outcome.INCONCLUSIVE

    def finding(self, check: Check) -> Finding | None:
        """The finding that a check of a rule on `verdict` is about; None of other checks."""
        return next((finding for finding in self.findings if finding.subject == check.subject), None)

    @property
    def violations(self) -> tuple[Check, ...]:
        """The violated checks of severity `error`."""
        return tuple(c for c in self.checks if c.severity == "error" and c.outcome is Outcome.VIOLATED)


def judge(estimates: Sequence[Estimate], subjects: Subjects, policy: Policy, methods: Sequence[str] = ()) -> Judgement:
    """Findings and rule outcomes for one audit's estimates.

    A rule that asks for no more than `max_regression` gives no check here: that takes a baseline, which the gate has.

    Args:
        estimates: of one audit.
        subjects: the names of regions, attributes and classes.
        policy: the rules, and the tolerances by which findings are judged.
        methods: the explanation methods that an estimate of a region is expected of; by default those that have one.

    Raises:
        ValueError: a rule names a region, class or attribute that the audit set does not have.

    Example:
        >>> policy = Policy.model_validate({"rules": [{"metric": "accuracy", "min": 0.8}]})
        >>> judged = judge([Estimate("accuracy", 0.9, 0.75, 0.96, 40)], Subjects((), (), ("a", "b")), policy)
        >>> print(judged.outcome, "-", judged.checks[0].message)
        inconclusive - accuracy: 0.900 [0.750, 0.960], n = 40; the interval reaches below the minimum 0.8
    """
    policy.check_names(subjects)
    findings = find(estimates, subjects, policy)
    checks = tuple(
        check for rule in policy.rules for check in _apply(rule, estimates, findings, subjects, policy, methods)
    )
    return Judgement(findings, checks)


def _apply(
    rule: Rule,
    estimates: Sequence[Estimate],
    findings: Sequence[Finding],
    subjects: Subjects,
    policy: Policy,
    methods: Sequence[str],
) -> list[Check]:
    if rule.metric == "verdict":
        if rule.region is not None:
            kind, names = "region", _regions(rule, subjects)
        else:
            known = tuple(name for name, _ in subjects.attributes)
            kind, names = "attribute", known if rule.group == EACH else (rule.group,)
        checks = [_check_verdict(rule, f) for f in findings if f.kind == kind and f.name in names]
        if rule.group == EACH and not names:
            return []
    elif rule.threshold is None:
        return []
    else:
        found = matched(rule, estimates, subjects)
        # What an unfit method says is left out where another speaks of the same, unless the rule asks for it.
        of_maps = explainers(estimates, policy) if is_of_maps(rule.metric) else ()
        unfit = [x.method for x in of_maps if x.fit is False and rule.method is None]
        doubtful = {x.method: x for x in of_maps if not x.fit}
        silent = not_listened_to(found, unfit)
        least = least_samples(rule, policy)
        checks = [_check_limit(rule, e, least, doubtful.get(e.method or "")) for e in found if e not in silent]
        checks += unrecorded(rule, found, subjects, methods)
    return checks or [nothing_recorded(rule)]


def matched(rule: Rule, estimates: Sequence[Estimate], subjects: Subjects) -> tuple[Estimate, ...]:
    """The estimates that a rule on numbers is about, those of unfit explanation methods among them.

    Example:
        >>> rule = Rule.model_validate({"metric": "accuracy", "class": "each", "min": 0.8})
        >>> estimates = [Estimate("accuracy", 0.9, 0.8, 1.0, 40, class_name=name) for name in ("a", "b", None)]
        >>> [e.class_name for e in matched(rule, estimates, Subjects((), (), ("a", "b")))]
        ['a', 'b']
    """
    wanted = _Wanted(rule, subjects)
    return tuple(e for e in estimates if wanted.matches(e))


def unrecorded(
    rule: Rule, estimates: Sequence[Estimate], subjects: Subjects, methods: Sequence[str] = ()
) -> list[Check]:
    """A check for each class, group and method that a rule on numbers is about and has no estimate for.

    Where it has none at all that is `nothing_recorded`, and this list is empty.
    """
    found = matched(rule, estimates, subjects)
    missing = _Wanted(rule, subjects).missing(found, methods) if found else []
    return [_check_missing(rule, *names) for names in missing]


def least_samples(rule: Rule, policy: Policy) -> int:
    """How many images a rule on numbers needs; the fitness of a method is measured on a small sample on purpose."""
    return rule.min_samples or (1 if rule.metric in EXPLAINER_METRICS else policy.min_samples)


def nothing_recorded(rule: Rule) -> Check:
    """The check of a rule for which an audit has no estimate."""
    message = f"{rule.title}: no estimate of this kind was recorded, so nothing is shown"
    return Check(rule.title, rule.title, Outcome.INCONCLUSIVE, rule.severity, message)


def _regions(rule: Rule, subjects: Subjects) -> tuple[str | None, ...]:
    return subjects.regions_with(rule.region) if rule.region in ROLES else (rule.region,)


# Region, class, group and method.
_Names = tuple[str | None, str | None, str | None, str | None]


class _Wanted:
    """Which estimates a rule is about."""

    def __init__(self, rule: Rule, subjects: Subjects) -> None:
        self.rule, self.regions = rule, set(_regions(rule, subjects))
        self.classes = subjects.classes if rule.class_name == EACH else (rule.class_name,)
        self.groups: set[str | None] = {rule.group}
        # Whether a metric of the user's own compares the values is for the user to know.
        each_value = rule.metric not in COMPARING_METRICS and not rule.metric.startswith(OWN)
        if rule.group is not None and "=" not in rule.group and each_value:
            self.groups = {f"{rule.group}={value}" for value in subjects.values_of(rule.group)}

    def missing(self, found: Sequence[Estimate], methods: Sequence[str]) -> list[_Names]:
        """Region, class, group and method of what the rule is about and nothing was recorded for."""
        of_maps = is_of_maps(self.rule.metric) and any(e.method for e in found)
        by_method = of_maps and self.rule.method is None and methods
        there = {(e.region, e.class_name, e.group, e.method if by_method else None) for e in found}
        return [
            names
            for region in sorted(self.regions, key=str)
            for class_name in self.classes
            for group in sorted(self.groups, key=str)
            for method in (methods if by_method else (None,))
            if (names := (region, class_name, group, method)) not in there
        ]

    def matches(self, e: Estimate) -> bool:
        class_fits = e.class_name is not None if self.rule.class_name == EACH else e.class_name == self.rule.class_name
        return (
            e.metric == self.rule.metric
            and e.region in self.regions
            and e.group in self.groups
            and class_fits
            and self.rule.method in (None, e.method)
        )


def _check_missing(
    rule: Rule, region: str | None, class_name: str | None, group: str | None, method: str | None
) -> Check:
    reason = "it was not recorded" if method else "the audit set has no image"
    nothing = Estimate(rule.metric, None, None, None, 0, region, class_name, group, method, reason=reason)
    return Check(rule.title, nothing.subject, Outcome.INCONCLUSIVE, rule.severity, str(nothing), nothing)


def _check_limit(rule: Rule, e: Estimate, min_samples: int, doubtful: Explainer | None) -> Check:
    def check(outcome: Outcome, why: str, limit: float | None = None) -> Check:
        return Check(rule.title, e.subject, outcome, rule.severity, f"{e}; {why}", e, limit)

    if not e.measured:
        return check(Outcome.INCONCLUSIVE, "nothing to compare")
    if doubtful is not None:
        return check(Outcome.INCONCLUSIVE, doubtful.doubt)
    assert e.value is not None and e.low is not None and e.high is not None
    if e.n < min_samples:
        return check(Outcome.INCONCLUSIVE, f"fewer images than min_samples = {min_samples}")
    low, high = (e.value, e.value) if rule.on == "point" else (e.low, e.high)
    assert isinstance(rule.threshold, float) and rule.op is not None
    limit, within = rule.threshold, _WITHIN[rule.op]
    worst, best = (high, low) if rule.op in ("<", "<=") else (low, high)
    side, name = ("above", "maximum") if rule.op in ("<", "<=") else ("below", "minimum")
    if not within(best, limit):
        return check(Outcome.VIOLATED, f"{side} the {name} {limit:g}", limit)
    if not within(worst, limit):
        reach = "beyond" if side == "above" else side
        return check(Outcome.INCONCLUSIVE, f"the interval reaches {reach} the {name} {limit:g}", limit)
    return check(Outcome.HELD, "within the limit", limit)


_WITHIN: dict[Op, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


def _check_verdict(rule: Rule, finding: Finding) -> Check:
    if finding.verdict in rule.forbidden:
        outcome = Outcome.VIOLATED
    elif {*rule.forbidden, Verdict.INCONCLUSIVE} & set(finding.possible):
        outcome = Outcome.INCONCLUSIVE
    else:
        outcome = Outcome.HELD
    message = f"{finding.subject}: {finding.verdict}. {finding.sentence}"
    return Check(
        rule.title, finding.subject, outcome, rule.severity, message, finding.evidence[0] if finding.evidence else None
    )

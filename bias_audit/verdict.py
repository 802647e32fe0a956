"""Judge measured estimates: what a model relies on, and whether a policy's rules hold.

Enters: `Estimate`s (numbers with their interval and count), the `Subjects` they are about, and a `Policy`.
Leaves: `Finding`s, one per spurious region and per attribute, and a `Judgement` with one `Check` per rule and estimate.

Neither torch nor NumPy is imported: the gate judges anew, and must start in a blink.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from bias_audit.policy import Policy, Rule
from bias_audit.terms import EXPLAINER_METRICS, REGION_METRICS, ROLES, Estimate, Outcome, Subjects, Verdict


@dataclass(frozen=True)
class Finding:
    """The verdict on one spurious region or one attribute, with the sentence a person needs and its evidence.

    `possible` are the verdicts that the evidence does not rule out: one, or several where something is unknown. An
    unknown need not matter: a region that may or may not be looked at is not relied on if accuracy does not differ.
    """

    kind: Literal["region", "attribute"]
    name: str
    verdict: Verdict
    sentence: str
    evidence: tuple[Estimate, ...]
    possible: tuple[Verdict, ...]
    samples_to_settle: int | None = None


@dataclass(frozen=True)
class Check:
    """One rule applied to one estimate or finding."""

    rule: str
    subject: str
    outcome: Outcome
    severity: Literal["error", "warn"]
    message: str
    estimate: Estimate | None = None
    limit: float | None = None


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

    @property
    def violations(self) -> tuple[Check, ...]:
        """The violated checks of severity `error`."""
        return tuple(c for c in self.checks if c.severity == "error" and c.outcome is Outcome.VIOLATED)


@dataclass(frozen=True)
class Explainer:
    """Whether an explanation method's maps depend on the model's weights, and so are evidence of what it learned.

    `fit` is True, False (the method is unfit), or None where `similarity`, to maps with random weights, leaves it open.
    """

    method: str
    fit: bool | None
    similarity: Estimate

    @property
    def doubt(self) -> str:
        """Why its maps are no evidence."""
        if not self.similarity.measured:
            reason = self.similarity.reason or "it was not measured"
            return f"whether the {self.method} maps depend on the model's weights is unknown: {reason}"
        alike = f"their rank correlation with maps of random weights is {_interval(self.similarity)}"
        if self.fit is None:
            return f"whether the {self.method} maps depend on the model's weights is open: {alike}"
        return f"the {self.method} maps are unfit as evidence: {alike}"


def explainers(estimates: Iterable[Estimate], policy: Policy) -> tuple[Explainer, ...]:
    """The explanation methods whose fitness was measured: fit if the whole interval lies within the tolerance."""
    limit, found = policy.tolerance.randomisation_similarity, []
    for e in estimates:
        if e.metric == "randomisation_similarity" and e.method is not None:
            fit = None
            if e.low is not None and e.high is not None and e.measured:
                fit = True if e.high <= limit else False if e.low > limit else None
            found.append(Explainer(e.method, fit, e))
    return tuple(found)


def judge(estimates: Sequence[Estimate], subjects: Subjects, policy: Policy) -> Judgement:
    """Findings and rule outcomes for one audit's estimates.

    Raises:
        ValueError: a rule names a region, class or attribute that the audit set does not have.
    """
    policy.check_names(subjects)
    findings = tuple(_find(estimates, subjects, policy))
    checks = tuple(check for rule in policy.rules for check in _apply(rule, estimates, findings, subjects, policy))
    return Judgement(findings, checks)


def _find(estimates: Sequence[Estimate], subjects: Subjects, policy: Policy) -> Iterable[Finding]:
    regions = subjects.regions_with("spurious")
    looks = {region: _attention(estimates, region, subjects, policy) for region in regions}
    gaps = {attribute: _performance(estimates, attribute, subjects, policy) for attribute, _ in subjects.attributes}
    gap = _strongest(gaps.values())
    for region in regions:
        yield _region_finding(region, looks[region], gap)
    look = _strongest(looks.values())
    for attribute, _ in subjects.attributes:
        yield _attribute_finding(attribute, gaps[attribute], look)


@dataclass(frozen=True)
class _Answer:
    """Whether one kind of evidence is there: yes, no, or unknown (None), and the estimate that says so.

    `annotated` is False where the audit set has nothing that could answer.
    """

    there: bool | None
    estimate: Estimate | None
    reason: str = ""
    settle: int | None = None
    annotated: bool = True


def _attention(estimates: Sequence[Estimate], region: str, subjects: Subjects, policy: Policy) -> _Answer:
    mine = [e for e in estimates if e.metric == "enrichment" and e.region == region and e.group is None]
    doubtful = {
        x.method: x for x in explainers(estimates, policy) if not x.fit and any(e.method == x.method for e in mine)
    }
    fit = [e for e in mine if e.method not in doubtful]
    answer = _exceeds(
        fit, policy.tolerance.enrichment, policy.min_samples, f"attention to {region}", _absent(estimates, subjects)
    )
    # An unfit method is no witness: the others speak without it. One that may be fit may have seen what they did not.
    silenced = list(doubtful.values()) if not fit else [x for x in doubtful.values() if x.fit is None]
    if answer.there or not silenced or (fit and answer.there is None):
        return answer
    return _Answer(None, silenced[0].similarity, "; ".join(x.doubt for x in silenced))


def _performance(estimates: Sequence[Estimate], attribute: str, subjects: Subjects, policy: Policy) -> _Answer:
    mine = [e for e in estimates if e.metric == "accuracy_gap" and e.group == attribute and e.class_name is not None]
    return _exceeds(
        mine,
        policy.tolerance.accuracy_gap,
        policy.min_samples,
        f"accuracy by {attribute}",
        _absent(estimates, subjects),
    )


def _absent(estimates: Sequence[Estimate], subjects: Subjects) -> tuple[str, ...]:
    """The classes of which the audit set shows no image, where estimates are by class at all."""
    present = {e.class_name for e in estimates if e.metric == "accuracy"}
    return tuple(name for name in subjects.classes if name not in present) if present else ()


def _exceeds(estimates: list[Estimate], limit: float, min_samples: int, what: str, absent: tuple[str, ...]) -> _Answer:
    """Yes if any interval lies above the limit, no if all lie within it, else unknown."""
    usable = [e for e in estimates if e.measured and e.n >= min_samples]
    above = [e for e in usable if e.low is not None and e.low > limit]
    if above:
        return _Answer(True, max(above, key=_by_value))
    thin = [e for e in estimates if e not in usable]
    undecided = [e for e in usable if e.high is not None and e.high > limit]
    if not estimates:
        return _Answer(None, None, f"{what} was not measured")
    if thin:
        short = min(thin, key=lambda e: (e.n, *_by_value(e)))
        because = short.reason or f"{short.n} valid images, {min_samples} needed"
        return _Answer(None, short, f"{_readable(short)}: {because}", max(min_samples, short.n))
    if absent:
        return _Answer(None, max(usable, key=_by_value), f"{what}: the audit set has no image of {', '.join(absent)}")
    if undecided:
        widest = max(undecided, key=_by_value)
        return _Answer(
            None,
            widest,
            f"{_readable(widest)} is {_interval(widest)}, which leaves open whether it exceeds {limit:g}",
            _samples_to_settle(widest, limit),
        )
    return _Answer(False, max(usable, key=_by_value))


def _samples_to_settle(estimate: Estimate, limit: float) -> int | None:
    """Images at which the interval would no longer reach the limit, its width shrinking with the square root of n."""
    assert estimate.value is not None and estimate.low is not None and estimate.high is not None
    distance = abs(estimate.value - limit)
    side = estimate.high - estimate.value if estimate.value < limit else estimate.value - estimate.low
    if distance <= side / 1000:
        # A million times the images: nobody gathers them.
        return None
    return math.ceil(estimate.n * (side / distance) ** 2)


def _strongest(answers: Iterable[_Answer]) -> _Answer:
    """Of several answers the one that counts: any yes, else any unknown, else a no."""
    ranked = sorted(answers, key=lambda a: {True: 0, None: 1, False: 2}[a.there])
    if not ranked:
        return _Answer(None, None, "no attribute is annotated, so no groups can be compared", annotated=False)
    return ranked[0]


def _region_verdict(look: bool, gap: bool) -> Verdict:
    if look:
        return Verdict.RELIANCE if gap else Verdict.SUSPECTED
    # Accuracy differs, and by what is not shown: the heatmaps may miss this region.
    return Verdict.INCONCLUSIVE if gap else Verdict.CLEARED


def _attribute_verdict(look: bool, gap: bool) -> Verdict:
    if gap:
        return Verdict.RELIANCE if look else Verdict.SUSPECTED
    return Verdict.CLEARED


def _possible(table: Callable[[bool, bool], Verdict], look: _Answer, gap: _Answer) -> tuple[Verdict, ...]:
    """What the table gives for each way in which what is unknown may turn out."""
    ways = [(True, False) if answer.there is None else (answer.there,) for answer in (look, gap)]
    found = {table(one, other) for one in ways[0] for other in ways[1]}
    return tuple(verdict for verdict in Verdict if verdict in found)


def _region_finding(region: str, look: _Answer, gap: _Answer) -> Finding:
    seen, differs = _say_attention(region, look), _say_performance(gap)
    possible = _possible(_region_verdict, look, gap)
    verdict = possible[0] if len(possible) == 1 else Verdict.INCONCLUSIVE
    if look.there and not gap.annotated:
        verdict, sentence = Verdict.SUSPECTED, f"{seen}; whether it decides anything is unknown: {gap.reason}."
    elif len(possible) > 1:
        ruled_out = "" if Verdict.RELIANCE in possible else f" Reliance is ruled out: {differs}."
        sentence = _open_question(look, gap) + (ruled_out if gap.there is False else "")
    elif verdict is Verdict.SUSPECTED:
        sentence = f"{seen}, but {differs}: looking there is not shown to decide anything."
    elif verdict is Verdict.INCONCLUSIVE:
        sentence = f"{seen}, yet {differs}: the heatmaps do not show what the accuracy shows."
    else:
        sentence = f"{seen}, and {differs}."
    return _finding("region", region, verdict, sentence, possible, look, gap)


def _attribute_finding(attribute: str, gap: _Answer, look: _Answer) -> Finding:
    differs = _say_performance(gap)
    region = look.estimate.region if look.estimate else None
    seen = _say_attention(region or "a spurious region", look)
    if gap.there and look.there:
        verdict, sentence = Verdict.RELIANCE, f"{_capital(differs)}; {_uncapital(seen)}."
    elif gap.there:
        verdict = Verdict.SUSPECTED
        sentence = f"{_capital(differs)}; no annotated spurious region is shown to draw the heatmaps."
    elif gap.there is False:
        verdict, sentence = Verdict.CLEARED, f"{_capital(differs)}."
    else:
        verdict, sentence = Verdict.INCONCLUSIVE, f"{_capital(gap.reason)}."
    return _finding("attribute", attribute, verdict, sentence, _possible(_attribute_verdict, look, gap), gap, look)


def _finding(
    kind: Literal["region", "attribute"],
    name: str,
    verdict: Verdict,
    sentence: str,
    possible: tuple[Verdict, ...],
    *answers: _Answer,
) -> Finding:
    settle = [a.settle for a in answers if a.there is None and a.settle is not None]
    return Finding(
        kind,
        name,
        verdict,
        sentence,
        tuple(a.estimate for a in answers if a.estimate is not None),
        possible,
        max(settle) if settle and verdict is Verdict.INCONCLUSIVE else None,
    )


def _open_question(look: _Answer, gap: _Answer) -> str:
    reasons = [a.reason for a in (look, gap) if a.there is None]
    return f"{_capital('; '.join(reasons))}."


def _say_attention(region: str, look: _Answer) -> str:
    if look.estimate is None or not look.estimate.measured:
        return f"Attention to {region} was not measured"
    for_class = f"For class {look.estimate.class_name} the" if look.estimate.class_name else "The"
    times = f"{_interval(look.estimate)} times the share its area would ({look.estimate.method})"
    return f"{for_class} heatmaps give {region} {'' if look.there else 'at most '}{times}"


def _say_performance(gap: _Answer) -> str:
    if gap.estimate is None or not gap.estimate.measured:
        return "accuracy by group was not measured"
    e = gap.estimate
    where = f"within class {e.class_name} " if e.class_name else ""
    size = "" if gap.there else "at most "
    return f"{where}accuracy differs by {e.group} by {size}{_interval(e)}"


def _readable(e: Estimate) -> str:
    return e.subject.replace("_", " ")


def _interval(e: Estimate) -> str:
    return f"{e.value:.2f} [{e.low:.2f}, {e.high:.2f}]"


def _by_value(e: Estimate) -> tuple[float, str, int]:
    """By value, and where values are equal in an order that does not depend on that of the estimates."""
    return -math.inf if e.value is None else e.value, e.subject, e.n


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _uncapital(text: str) -> str:
    return text[:1].lower() + text[1:]


def _apply(
    rule: Rule, estimates: Sequence[Estimate], findings: Sequence[Finding], subjects: Subjects, policy: Policy
) -> list[Check]:
    regions = subjects.regions_with(rule.region) if rule.region in ROLES else (rule.region,)
    if rule.metric == "verdict":
        kind, names = ("region", regions) if rule.region is not None else ("attribute", (rule.group,))
        checks = [_check_verdict(rule, f) for f in findings if f.kind == kind and f.name in names]
    else:
        wanted = _Wanted(rule, regions, subjects)
        # The fitness of a method is measured on a small sample on purpose.
        min_samples = rule.min_samples or (1 if rule.metric in EXPLAINER_METRICS else policy.min_samples)
        found = [e for e in estimates if wanted.matches(e)]
        checks = [
            _check_limit(rule, e, min_samples, x) for e, x in _witnesses(rule, found, explainers(estimates, policy))
        ]
        if found:
            checks += [_check_missing(rule, *names) for names in wanted.missing(found)]
    if checks:
        return checks
    message = f"{rule.title}: no estimate of this kind was recorded, so nothing is shown"
    return [Check(rule.title, rule.title, Outcome.INCONCLUSIVE, rule.severity, message)]


class _Wanted:
    """Which estimates a rule is about."""

    def __init__(self, rule: Rule, regions: Iterable[str | None], subjects: Subjects) -> None:
        self.rule, self.regions = rule, set(regions)
        self.classes = subjects.classes if rule.class_name == "each" else (rule.class_name,)
        self.groups: set[str | None] = {rule.group}
        each_value = rule.metric not in ("accuracy_gap", "worst_group_accuracy")
        if rule.group is not None and "=" not in rule.group and each_value:
            self.groups = {f"{rule.group}={value}" for value in subjects.values_of(rule.group)}

    def missing(self, found: Sequence[Estimate]) -> list[tuple[str | None, str | None, str | None]]:
        """Region, class and group of what the rule is about and nothing was recorded for."""
        there = {(e.region, e.class_name, e.group) for e in found}
        return [
            (region, class_name, group)
            for region in sorted(self.regions, key=str)
            for class_name in self.classes
            for group in sorted(self.groups, key=str)
            if (region, class_name, group) not in there
        ]

    def matches(self, e: Estimate) -> bool:
        class_fits = (
            e.class_name is not None if self.rule.class_name == "each" else e.class_name == self.rule.class_name
        )
        return (
            e.metric == self.rule.metric
            and e.region in self.regions
            and e.group in self.groups
            and class_fits
            and self.rule.method in (None, e.method)
        )


def _check_missing(rule: Rule, region: str | None, class_name: str | None, group: str | None) -> Check:
    nothing = Estimate(rule.metric, None, None, None, 0, region, class_name, group, reason="the audit set has no image")
    return Check(rule.title, nothing.subject, Outcome.INCONCLUSIVE, rule.severity, str(nothing), nothing)


def _witnesses(
    rule: Rule, found: Sequence[Estimate], known: Sequence[Explainer]
) -> Iterator[tuple[Estimate, Explainer | None]]:
    """The estimates that a rule is checked on, each with its explanation method where that is not shown to be fit.

    What an unfit method says is left out where another method speaks of the same, unless the rule asks for it.
    """
    doubtful = {x.method: x for x in known if not x.fit} if rule.metric in REGION_METRICS else {}
    unfit = {method for method, x in doubtful.items() if x.fit is False}
    heard = {(e.region, e.class_name, e.group) for e in found if e.method not in unfit}
    for e in found:
        if rule.method is not None or e.method not in unfit or (e.region, e.class_name, e.group) not in heard:
            yield e, doubtful.get(e.method) if e.method is not None else None


def _check_limit(rule: Rule, e: Estimate, min_samples: int, doubtful: Explainer | None) -> Check:
    def check(outcome: Outcome, why: str, limit: float | None = None) -> Check:
        return Check(rule.title, e.subject, outcome, rule.severity, f"{e}; {why}", e, limit)

    if not e.measured:
        return check(Outcome.INCONCLUSIVE, "nothing to compare")
    if doubtful is not None:
        return check(Outcome.INCONCLUSIVE, doubtful.doubt)
    assert e.low is not None and e.high is not None
    if e.n < min_samples:
        return check(Outcome.INCONCLUSIVE, f"fewer images than min_samples = {min_samples}")
    if rule.max is not None and e.low > rule.max:
        return check(Outcome.VIOLATED, f"above the maximum {rule.max:g}", rule.max)
    if rule.min is not None and e.high < rule.min:
        return check(Outcome.VIOLATED, f"below the minimum {rule.min:g}", rule.min)
    if rule.max is not None and e.high > rule.max:
        return check(Outcome.INCONCLUSIVE, f"the interval reaches beyond the maximum {rule.max:g}", rule.max)
    if rule.min is not None and e.low < rule.min:
        return check(Outcome.INCONCLUSIVE, f"the interval reaches below the minimum {rule.min:g}", rule.min)
    return check(Outcome.HELD, "within the limit", rule.max if rule.max is not None else rule.min)


def _check_verdict(rule: Rule, finding: Finding) -> Check:
    if finding.verdict in rule.forbid:
        outcome = Outcome.VIOLATED
    elif {*rule.forbid, Verdict.INCONCLUSIVE} & set(finding.possible):
        outcome = Outcome.INCONCLUSIVE
    else:
        outcome = Outcome.HELD
    subject = f"verdict on {finding.kind} {finding.name}"
    message = f"{subject}: {finding.verdict}. {finding.sentence}"
    return Check(
        rule.title, subject, outcome, rule.severity, message, finding.evidence[0] if finding.evidence else None
    )

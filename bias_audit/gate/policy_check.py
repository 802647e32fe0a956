"""What a policy asks, in sentences, and what it finds in a run.

Enters: a `PolicyFile`, and perhaps a `Run` and a `Baseline`. Leaves: a `PolicyReport` with one `Explained` per rule.

Neither torch nor Lightning is imported here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bias_audit.gate.baseline import Baseline
from bias_audit.gate.gate import run_gate
from bias_audit.gate.result import GateResult
from bias_audit.policies.file import PolicyFile
from bias_audit.policies.policy import EACH, Rule
from bias_audit.records.results import AuditSummary
from bias_audit.records.runs import Run
from bias_audit.terms import (
    COMPARING_METRICS,
    EXPLAINER_METRICS,
    INTERVENTION_METRICS,
    OWN,
    ROLES,
    Estimate,
    Outcome,
    Subjects,
    is_of_maps,
)
from bias_audit.verdicts.judgement import Check, matched
from bias_audit.wording import readable

# So many estimates that a rule might have meant are named.
MOST_NAMED = 5
_OPS = {"<": "below", "<=": "at most", ">": "above", ">=": "at least"}
_AUDITS = {
    "last": "",
    "best": "in the audit of the best checkpoint",
    "every": "in every audit of the trained model",
    "checkpoint": "in the audit of the checkpoint that the gate is given",
}
# What it takes for a metric to be measured at all; of a family the first whose name begins so.
_NEEDS = (
    (
        ("cramers_v", "npmi", "bias_amplification"),
        "give the callback the labels and attributes of the training set, as `training`",
    ),
    (("audit_", "probe_"), "give the audit set attributes"),
    (EXPLAINER_METRICS, "the explanation methods were not tested: `fitness_samples` is 0"),
    (("swap_",), "no image was swapped: give the plan `swaps`, or the audit set attributes and spurious regions"),
    (("region_probe", "removal_contrast"), "give the audit set attributes and spurious regions"),
    (INTERVENTION_METRICS, "nothing was removed: no region is spurious, or `intervention_samples` is 0"),
    (("aligned_", "conflicting_", "alignment_"), "which value goes with which class is not known: give `training`"),
)


@dataclass(frozen=True)
class Explained:
    """One rule: what it asks in a sentence, and what it finds.

    `checks` are what the gate would say of it; () without a run. `nothing` says why nothing in the run matches.
    """

    rule: Rule
    line: int | None
    sentence: str
    checks: tuple[Check, ...] = ()
    nothing: str = ""

    @property
    def outcome(self) -> Outcome | None:
        """What would become of the rule as a whole; None without a run."""
        outcomes = {check.outcome for check in self.checks}
        order = (Outcome.VIOLATED, Outcome.INCONCLUSIVE, Outcome.HELD)
        return next((outcome for outcome in order if outcome in outcomes), None)


@dataclass(frozen=True)
class PolicyReport:
    """Each rule of a policy explained; `result` is what the gate would say of the run, None without one."""

    policy: PolicyFile
    rules: tuple[Explained, ...]
    result: GateResult | None

    @property
    def exit_code(self) -> int:
        """3 where the run leaves a rule undecided, or is itself in doubt; else 0, also where a rule is violated."""
        if self.result is None:
            return 0
        outcomes = {rule.outcome for rule in self.rules}
        # A rule on each spurious region of a run without any asks nothing, but one rule must have found something.
        return 3 if Outcome.INCONCLUSIVE in outcomes or outcomes == {None} or self.result.doubts else 0


def check_policy(policy: PolicyFile, run: Run | None = None, baseline: Baseline | None = None) -> PolicyReport:
    """Explain a policy's rules, by themselves or on what a run recorded.

    Raises:
        ValueError: a rule names a region, class, attribute or method that the run does not have; the message names the
            file, the line and the key. Or the baseline is of another data set, layer or method.

    Example:
        >>> from bias_audit.policies.file import read_policy
        >>> report = check_policy(read_policy({"rules": [{"metric": "accuracy", "class": "each", "min": 0.8}]}))
        >>> report.rules[0].sentence
        'accuracy of each class must be at least 0.8'
    """
    rules = policy.policy.rules
    lines = [policy.line_of(rule.title) for rule in rules]
    if run is None:
        explained = (Explained(rule, line, in_words(rule)) for rule, line in zip(rules, lines, strict=True))
        return PolicyReport(policy, tuple(explained), None)
    manifest = run.manifest
    result = run_gate(run, policy, baseline=baseline)
    of_rule: dict[str, list[Check]] = {rule.title: [] for rule in rules}
    for found in result.checks:
        of_rule[found.check.rule].append(found.check)
    return PolicyReport(
        policy,
        tuple(
            Explained(
                rule,
                line,
                in_words(rule),
                tuple(of_rule[rule.title]),
                "" if result.audit is None else why_nothing(rule, result.audit, manifest.subjects),
            )
            for rule, line in zip(rules, lines, strict=True)
        ),
        result,
    )


def in_words(rule: Rule) -> str:
    """What a rule asks, as a sentence without its full stop.

    Example:
        >>> limit = {"region": "spurious", "op": "<=", "threshold": 1.5, "max_regression": 0.1, "at": "every"}
        >>> in_words(Rule.model_validate({"metric": "enrichment", **limit}))
        'enrichment on each spurious region, by each explanation method that is fit, must be at most 1.5, and no more
        than 0.1 higher than in the baseline, in every audit of the trained model'
    """
    parts = [_subject(rule), _limit(rule)]
    if rule.on == "point":
        parts.append("by the measured value alone, whatever its interval")
    if _AUDITS[rule.at]:
        parts.append(_AUDITS[rule.at])
    if rule.min_samples is not None:
        parts.append(f"on at least {rule.min_samples} images")
    said = f"{parts[0]}{',' if ',' in parts[0] else ''} {parts[1]}"
    return ", ".join((said, *parts[2:]))


def _subject(rule: Rule) -> str:
    each = f"each {rule.region} region" if rule.region in ROLES else rule.region
    if rule.metric == "verdict":
        on = each if rule.region is not None else "each attribute" if rule.group == EACH else f"attribute {rule.group}"
        return f"the verdict on {on}"
    words = [readable(rule.metric)]
    words += [f"on {each}"] if rule.region is not None else []
    if rule.class_name is not None:
        words.append("of each class" if rule.class_name == EACH else f"of class {rule.class_name}")
    if rule.group is not None:
        attribute, _, value = rule.group.partition("=")
        if rule.metric in COMPARING_METRICS or (rule.metric.startswith(OWN) and not value):
            words.append(f"by {attribute}")
        else:
            words.append(f"where {attribute} is {value}" if value else f"for each value of {attribute}")
    said = " ".join(words)
    if rule.method is not None:
        return f"{said}, by {rule.method}"
    return f"{said}, by each explanation method that is fit" if is_of_maps(rule.metric) else said


def _limit(rule: Rule) -> str:
    limits = []
    if isinstance(rule.threshold, tuple):
        verdicts = " or ".join(rule.threshold)
        limits.append(f"must not be {verdicts}" if rule.op == "!=" else f"must be {verdicts}")
    elif rule.threshold is not None and rule.op is not None:
        limits.append(f"must be {_OPS[rule.op]} {rule.threshold:g}")
    if rule.max_regression is not None:
        way = "higher" if rule.op in ("<", "<=") else "lower"
        most = f"no more than {rule.max_regression:g} {way} than in the baseline"
        limits.append(f"and {most}" if limits else f"must be {most}")
    return ", ".join(limits)


def why_nothing(rule: Rule, audit: AuditSummary, subjects: Subjects) -> str:
    """Why a rule matches nothing in an audit; "" where it does."""
    if rule.region in ROLES and not subjects.regions_with(rule.region):
        return f"the audit set has no {rule.region} region"
    if rule.group is not None and not subjects.attributes:
        return "the audit set has no attributes"
    if rule.metric == "verdict" or matched(rule, audit.estimates, subjects):
        return ""
    recorded = [e for e in audit.estimates if e.metric == rule.metric]
    if recorded:
        return f"{rule.metric} was recorded for other things: {_named(recorded)}"
    needs = next((needs for names, needs in _NEEDS if rule.metric.startswith(tuple(names))), "")
    return f"{rule.metric} was not measured at all{': ' if needs else ''}{needs}"


def _named(estimates: Sequence[Estimate]) -> str:
    names = list(dict.fromkeys(e.subject.removeprefix(e.metric).strip() or "over all" for e in estimates))
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more

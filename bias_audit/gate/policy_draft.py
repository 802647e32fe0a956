"""A policy to begin with, made from a run.

Enters: a `Run`. Leaves: YAML text with a rule for each thing that a release hangs on, what was measured of it beside
it, and the rules that this run cannot decide commented out, each with its reason.

Standard library, pydantic and PyYAML only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic import ValidationError

from bias_audit.multiplicity import samples_to_settle
from bias_audit.policies.policy import EACH, Policy, Rule
from bias_audit.records.errors import RecordError
from bias_audit.records.results import AuditSummary
from bias_audit.records.runs import Run
from bias_audit.terms import Estimate, Outcome, Subjects
from bias_audit.verdicts.findings import Finding
from bias_audit.verdicts.judgement import Check, Judgement, judge
from bias_audit.wording import one_line

# A comment is for a glance; names may be of any length.
MOST = 200
MOST_MEASURED = 12


@dataclass(frozen=True)
class _Proposed:
    """A rule that may go into the policy, under a heading; `always` says that it stays where nothing is decided."""

    heading: str
    rule: Rule
    always: bool = False


def draft_policy(run: Run) -> str:
    """A commented policy in YAML, from the last audit of a trained model.

    Rules on verdicts always stand. Other rules stand where the run decides them: those that it violates say so. What is
    undecided is commented out with the reason, and so are rules on a baseline, for which the gate needs one.

    Raises:
        RecordError: the run has no audit of a trained model.

    Example:
        >>> from bias_audit.records.runs import read_run
        >>> print(draft_policy(read_run("runs/today")))  # doctest: +SKIP
        # What an audit must show before a model is released.
        ...
    """
    trained = [run.audits[i] for i in run.trained]
    if not trained:
        raise RecordError(f"{run.path}: no audit of a trained model was recorded: there is nothing to make a policy of")
    audit, manifest = trained[-1], run.manifest
    tolerance, least = manifest.policy.tolerance, manifest.policy.min_samples
    proposed = _distinct(_proposed(audit, manifest.subjects, manifest.policy))
    policy = Policy(rules=tuple(p.rule for p in proposed), tolerance=tolerance, min_samples=least)
    judgement = judge(audit.estimates, manifest.subjects, policy)
    lines = [*_head(run, audit), "", f"min_samples: {least}", *_tolerance(policy), "", "rules:"]
    heading = ""
    for p in proposed:
        if p.heading != heading:
            heading = p.heading
            lines += ["", f"  # {heading}"]
        lines += _entry(p, [c for c in judgement.checks if c.rule == p.rule.title], judgement)
    return "\n".join(lines) + "\n"


def _distinct(found: Iterable[tuple[str, dict[str, Any], bool]]) -> list[_Proposed]:
    """Those that a policy can hold: a name such as `a=b` for an attribute cannot be written in a rule."""
    kept: dict[str, _Proposed] = {}
    for heading, content, always in found:
        try:
            rule = Rule.model_validate(content)
        except ValidationError:
            continue
        kept.setdefault(rule.title, _Proposed(heading, rule, always))
    return list(kept.values())


def _proposed(audit: AuditSummary, subjects: Subjects, policy: Policy) -> Iterator[tuple[str, dict[str, Any], bool]]:
    tolerance = policy.tolerance
    attributes = [name for name, _ in subjects.attributes]
    spurious = subjects.regions_with("spurious")

    def at_most(limit: float, metric: str, **names: str) -> dict[str, Any]:
        return {"metric": metric, **names, "op": "<=", "threshold": limit}

    what = "What all the evidence together says of each spurious region and each attribute."
    on: list[dict[str, Any]] = [{"region": "spurious"}] if spurious else []
    on += [{"group": EACH}] if attributes else []
    for verdict, severity in (("reliance", {}), ("suspected", {"severity": "warn"})):
        for its in on:
            yield what, {"metric": "verdict", **its, "op": "!=", "threshold": verdict, **severity}, True

    what = "Where the model looks: 1 is what a region's area alone gives."
    for region in spurious:
        yield what, at_most(tolerance.enrichment, "enrichment", region=region), False
    for region in subjects.regions_with("object"):
        yield what, {"metric": "enrichment", "region": region, "op": ">=", "threshold": tolerance.enrichment}, False

    what = "Whether the decision depends on a region or on an attribute's value."
    for region in spurious:
        yield what, at_most(tolerance.removal_flips, "removal_flips", region=region), False
    for attribute in attributes:
        for region in spurious:
            contrast = {"region": region, "group": attribute}
            yield what, at_most(tolerance.removal_contrast, "removal_contrast", **contrast), False
        for swapped in dict.fromkeys(e.region for e in audit.estimates if e.metric == "swap_gap"):
            its = {"group": attribute} | ({"region": swapped} if swapped is not None else {})
            yield what, at_most(tolerance.swap_gap, "swap_gap", **its), False

    what = "For whom it is wrong. The limits on accuracy are what this run shows: raise them as far as you need."
    of_each = [{}, {"class": EACH}, *({"group": a} for a in attributes)]
    for names in of_each:
        metric = "worst_group_accuracy" if "group" in names else "accuracy"
        classes = subjects.classes if "class" in names else (None,)
        low = _lowest(audit, metric, classes, names.get("group"))
        if low is not None:
            yield what, {"metric": metric, **names, "op": ">=", "threshold": low}, False
    for attribute in attributes:
        # Within each class: over all of them gaps of opposite sign cancel.
        yield what, at_most(tolerance.accuracy_gap, "accuracy_gap", group=attribute, **{"class": EACH}), False

    what = "How far attribute and label go together in the training data, as Cramér's V."
    for attribute in attributes:
        yield what, at_most(tolerance.association, "cramers_v", group=attribute), False

    what = "Whether the explanations are evidence: how alike they are to those of random weights."
    for method in dict.fromkeys(e.method for e in audit.estimates if e.metric == "randomisation_similarity"):
        if method is not None:
            limit = tolerance.randomisation_similarity
            yield what, at_most(limit, "randomisation_similarity", method=method), False

    what = "No worse than a baseline: `bias-audit baseline update RUN_DIR`, then `bias-audit gate --baseline FILE`."
    yield what, {"metric": "accuracy", "op": ">=", "max_regression": 0.02}, False
    for region in spurious:
        yield what, {"metric": "enrichment", "region": region, "op": "<=", "max_regression": 0.1}, False


def _lowest(audit: AuditSummary, metric: str, classes: Sequence[str | None], group: str | None) -> float | None:
    """The lowest bound of the estimates in whole percent; None where one of them was not measured."""
    found = [e for e in audit.estimates if (e.metric, e.group) == (metric, group) and e.class_name in classes]
    lows = [e.low for e in found if e.measured and e.low is not None]
    return math.floor(100 * min(lows)) / 100 if lows and len(lows) == len(found) else None


def _head(run: Run, audit: AuditSummary) -> Iterator[str]:
    manifest = run.manifest
    subjects = manifest.subjects
    yield "# What an audit must show before a model is released. Made by `bias-audit policy init` from"
    yield _comment(
        f"run {manifest.run_id}, step {audit.step}: {manifest.model}, layer {manifest.layer}, "
        f"{manifest.samples_audited} images."
    )
    yield "#"
    yield _comment("Regions: " + (", ".join(f"{name} ({role})" for name, role in subjects.regions) or "none"))
    yield _comment("Classes: " + ", ".join(subjects.classes))
    said = (f"{name} ({', '.join(values)})" for name, values in subjects.attributes)
    yield _comment("Attributes: " + (", ".join(said) or "none"))
    yield _comment("Methods: " + ", ".join(manifest.methods))
    yield "#"
    yield "# A rule is violated only if the whole 95 % interval lies beyond its threshold, held only if it lies within,"
    yield "# and inconclusive otherwise, which is no pass. The comments say what was measured in that run."
    yield "# `bias-audit policy check FILE RUN_DIR` explains the rules; `bias-audit policy schema` is for editors."


def _tolerance(policy: Policy) -> Iterator[str]:
    """By what the findings are judged, where it is not the default."""
    changed = {key: value for key, value in policy.tolerance if value != getattr(Policy().tolerance, key)}
    if changed:
        yield "tolerance:"
        yield from (f"  {key}: {_scalar(value)}" for key, value in changed.items())


def _entry(p: _Proposed, checks: Sequence[Check], judgement: Judgement) -> Iterator[str]:
    """The rule in YAML under what was measured of it; as a comment where nothing is decided."""
    outcomes = {check.outcome for check in checks}
    undecided = Outcome.INCONCLUSIVE in outcomes and Outcome.VIOLATED not in outcomes
    if p.rule.max_regression is not None:
        off = "the gate is given no baseline unless you name one"
    elif undecided and not p.always:
        off = next(_why(p.rule, check) for check in checks if check.outcome is Outcome.INCONCLUSIVE)
    else:
        off = ""
    yield ""
    for check in checks[:MOST_MEASURED]:
        yield _comment(_measured(check, judgement.finding(check)), indent=2)
    if len(checks) > MOST_MEASURED:
        yield _comment(f"and {len(checks) - MOST_MEASURED} more", indent=2)
    if off:
        yield _comment(f"Off, because {off}:", indent=2)
    hash_ = "# " if off else ""
    content = p.rule.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    for i, (key, value) in enumerate(content.items()):
        # A verdict alone is written as itself.
        value = value[0] if isinstance(value, list) and len(value) == 1 else value
        yield f"  {hash_}{'- ' if i == 0 else '  '}{key}: {_scalar(value)}"


def _measured(check: Check, finding: Finding | None) -> str:
    if finding is not None:
        # Why it is so takes a paragraph; `policy check` has it.
        said = f"{finding.subject}: {finding.verdict}"
    else:
        said = str(check.estimate) if check.estimate is not None else check.message
    return said if check.outcome is Outcome.HELD else f"{check.outcome.capitalize()}: {said}"


def _why(rule: Rule, check: Check) -> str:
    """Why a rule is undecided, and how many images would settle it."""
    e = check.estimate
    if e is None:
        return "this run recorded no estimate of this kind"
    if not e.measured:
        return f"it was not measured ({e.reason or 'no valid image'})"
    why = check.message.removeprefix(f"{e}; ")
    needed = _needed(rule, e)
    return f"{why}; about {needed} images would settle it" if needed is not None else why


def _needed(rule: Rule, e: Estimate) -> int | None:
    if not isinstance(rule.threshold, float) or e.value is None or e.low is None or e.high is None:
        return None
    needed = samples_to_settle(e.value, e.low, e.high, rule.threshold, e.n)
    return needed if needed is not None and needed > e.n else None


def _comment(words: str, indent: int = 0) -> str:
    """One line of comment, whatever the words hold."""
    plain = one_line(words)
    return f"{' ' * indent}# {plain if len(plain) <= MOST else plain[: MOST - 1] + '…'}"


def _scalar(value: object) -> str:
    """A value as YAML on one line."""
    if isinstance(value, list):
        return f"[{', '.join(map(_scalar, value))}]"
    if not isinstance(value, str):
        # Not repr: YAML takes 1e-05 for text.
        return str(yaml.safe_dump(value)).split("\n")[0]
    # Plain only where it reads back as it is: `no` would be a truth value.
    if value.isidentifier() and value.isascii() and yaml.safe_load(value) == value:
        return value
    return str(yaml.safe_dump(value, default_style='"', width=math.inf, allow_unicode=True)).rstrip("\n")

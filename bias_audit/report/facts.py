"""What a reviewer must know before anything else: the answers in brief, and what was audited with what.

Enters: a `Run`. Leaves: short answers and facts as pairs of text.

Standard library only, beside this package's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from bias_audit.records.history import onsets
from bias_audit.records.manifest import RegionCount
from bias_audit.records.results import AuditSummary
from bias_audit.records.runs import Run
from bias_audit.report.numbers import interval
from bias_audit.report.series import method_name
from bias_audit.terms import INTERVENTION_METRICS, Estimate, Verdict
from bias_audit.verdicts.explainers import explainers
from bias_audit.verdicts.findings import Finding

# A line is read at a glance; what does not fit is among the findings.
MOST_NAMED = 3

_ALARMS = (Verdict.RELIANCE, Verdict.SUSPECTED)
# The plainest first: what the decision does, then what accuracy does. With each its tolerance.
_MATTERS = {
    "swap_gap": ("swap_gap", "swapping {what} costs {number} points {interval} of accuracy"),
    "removal_flips": ("removal_flips", "without {region} {number} % {interval} of the decisions change"),
    "removal_contrast": (
        "removal_contrast",
        "what {region} says of {group} is {number} % {interval} of the margin",
    ),
    "swap_flips": ("swap_gap", "swapping {what} changes {number} % {interval} of the decisions"),
    "alignment_gap": ("accuracy_gap", "accuracy is {number} points {interval} lower where {group} and class disagree"),
    "accuracy_gap": ("accuracy_gap", "accuracy differs by {group} by {number} points {interval}"),
}


def glance(run: Run) -> tuple[tuple[str, str], ...]:
    """Where, since when, for whom, and whether it matters, each in a line; nothing before the first audit in training.

    Example:
        >>> from bias_audit.records.runs import read_run
        >>> glance(read_run("runs/today"))[0]  # doctest: +SKIP
        ('Where', 'Reliance on region hair')
    """
    if not run.audits or run.audits[-1].trigger == "reference" or not run.audits[-1].judgement.findings:
        return ()
    return (
        ("Where", _where(run.audits[-1].judgement.findings)),
        ("Since when", _since(run)),
        ("For whom", _for_whom(run)),
        ("Does it matter", _matters(run)),
    )


def facts(run: Run) -> tuple[tuple[str, str], ...]:
    """What was audited, with what, and how far the last audit can be trusted."""
    m = run.manifest
    fixed = (
        ("Model", m.model),
        ("Layer", m.layer),
        ("Methods", ", ".join(method_name(method) for method in m.methods)),
        ("Target", m.target),
        ("Sign", m.sign),
        ("Samples audited", f"{m.samples_audited} of {m.samples_available}"),
        *([("Regions", _regions(m.annotated))] if m.annotated else []),
        ("Data fingerprint", m.fingerprint[:12]),
        ("Seed", str(m.seed)),
        ("Tool", m.tool),
    )
    if not run.audits:
        return fixed
    last = run.audits[-1]
    number = f"{len(run.audits)} audit{'s' if len(run.audits) > 1 else ''}"
    return (
        ("Last audit", f"step {last.step}, epoch {last.epoch} ({number})"),
        ("Weights", last.weights),
        ("Trigger", last.trigger),
        ("Coverage", _coverage(last)),
        ("Explanations", _fitness(run)),
        ("Interventions", _interventions(run)),
        *fixed,
        ("Recorded", last.created),
    )


def step_of(run: Run, e: Estimate) -> int | None:
    """The step at which an estimate of the last audit was measured; None where no audit of the run is that old."""
    at = len(run.audits) - 1 - e.age
    return run.audits[at].step if at >= 0 else None


def _regions(annotated: Sequence[RegionCount]) -> str:
    """On how many images they are, and as what."""
    told = [str(one) for one in annotated if one.boxed or one.absent]
    return _sentence(told, capital=False) or "each on every image, as an outline"


def _where(findings: Sequence[Finding]) -> str:
    words = {
        Verdict.RELIANCE: "reliance on",
        Verdict.SUSPECTED: "suspicion of",
        Verdict.INCONCLUSIVE: "open for",
        Verdict.CLEARED: "cleared:",
    }
    alarmed = any(f.verdict in _ALARMS for f in findings)
    said = [
        f"{words[verdict]} {_listed([f'{f.kind} {f.name}' for f in findings if f.verdict is verdict])}"
        for verdict in (_ALARMS if alarmed else (Verdict.INCONCLUSIVE, Verdict.CLEARED))
        if any(f.verdict is verdict for f in findings)
    ]
    return ("" if alarmed else "No reliance is shown; ") + _sentence(said, capital=alarmed)


def _since(run: Run) -> str:
    trained = [audit for audit in run.audits if not audit.is_reference]
    found = [onset for onset in onsets(run.audits) if onset.since is not None]
    if not found:
        return "–"
    if len(trained) < 2:
        return f"Unknown: step {trained[-1].step} is the only audit in training"
    found.sort(key=lambda onset: (_ALARMS.index(onset.verdict), onset.since))
    first = trained[0].step
    said = [
        f"{onset.name} since step {onset.since}" + (", the first audit" if onset.since == first else "")
        for onset in found[:MOST_NAMED]
    ]
    return _sentence([*said, *_more(len(found))]) + f" (now {trained[-1].step})"


def _for_whom(run: Run) -> str:
    last, least = run.audits[-1], run.manifest.policy.min_samples
    said = []
    groups = [
        e for e in last.estimates if e.metric == "accuracy" and "=" in (e.group or "") and e.measured and e.n >= least
    ]
    if groups:
        lowest = min(groups, key=lambda e: e.value or 0.0)
        over_all = next((e for e in last.estimates if e.metric == "accuracy" and not (e.class_name or e.group)), None)
        whom = f"for class {lowest.class_name} " if lowest.class_name else ""
        beside = f", {over_all.value:.2f} over all" if over_all is not None and over_all.measured else ""
        said.append(f"accuracy is lowest {whom}where {lowest.group}: {interval(lowest, 2)}{beside}")
    else:
        said.append("no accuracy by group was measured")
    alarmed = [f.name for f in last.judgement.findings if f.kind == "region" and f.verdict in _ALARMS]
    unfit = {known.method for known in explainers(last.estimates, run.manifest.policy) if known.fit is not True}
    looks = [
        e
        for e in last.estimates
        if e.metric == "enrichment" and e.region in alarmed and e.method not in unfit and e.measured and e.n >= least
        if e.class_name is not None and e.group is None
    ]
    if looks:
        most = max(looks, key=lambda e: e.value or 0.0)
        said.append(
            f"{most.region} is looked at most in class {most.class_name}: {interval(most, 2)} times its area "
            f"({method_name(most.method or '')})"
        )
    return _sentence(said)


def _matters(run: Run) -> str:
    last = run.audits[-1]
    alarmed = [f for f in last.judgement.findings if f.verdict in _ALARMS]
    if not alarmed:
        return "No reliance is shown to matter"
    found: list[str] = []
    for finding in alarmed:
        # A region and an attribute may rest on the same estimate: it is said once.
        found += [said for said in _consequences(finding, run) if said not in found][:1]
    if not found:
        return "Unknown: no removal, no swap and no accuracy by group shows it"
    return _sentence(found[:2])


def _consequences(finding: Finding, run: Run) -> Iterator[str]:
    """What among the evidence of a finding lies beyond its tolerance, the plainest first."""
    tolerance = run.manifest.policy.tolerance
    for metric, (limit, text) in _MATTERS.items():
        for e in finding.evidence:
            if e.metric == metric and e.measured and e.low is not None and e.low > getattr(tolerance, limit):
                said = text.format(
                    region=e.region,
                    group=e.group,
                    what=f"{e.group} in {e.region}" if e.region else e.group,
                    number=f"{100 * (e.value or 0.0):.0f}",
                    interval=f"[{100 * e.low:.0f}, {100 * (e.high or 0.0):.0f}]",
                )
                said += f" in class {e.class_name}" if e.class_name else ""
                step = step_of(run, e) if e.age else None
                yield said + (f" (as at step {step})" if step is not None else "")


def _fitness(run: Run) -> str:
    known = explainers(run.audits[-1].estimates, run.manifest.policy)
    if not known:
        return "fitness not tested"
    words = {True: "fit", False: "unfit", None: "fitness unknown"}
    said = ", ".join(f"{method_name(x.method)} {words[x.fit]}" for x in known)
    steps = {step_of(run, x.similarity) for x in known} - {None}
    return said + (f" (step {min(step for step in steps if step is not None)})" if steps else "")


def _interventions(run: Run) -> str:
    """How old the interventions are that the last audit rests on."""
    tried = [e for e in run.audits[-1].estimates if e.metric in INTERVENTION_METRICS and e.n > 0]
    if not tried:
        return "none made"
    youngest = min(tried, key=lambda e: e.age)
    if not youngest.age:
        return "made at this audit"
    step, age = step_of(run, youngest), youngest.age
    return (f"of step {step}, " if step is not None else "") + f"{age} audit{'' if age == 1 else 's'} ago"


def _coverage(audit: AuditSummary) -> str:
    """The least share of images on which a region could be scored, and where that was."""
    covered = [
        e
        for e in audit.estimates
        if e.metric == "coverage" and e.class_name is None and e.group is None and e.value is not None
    ]
    if not covered:
        return "–"
    least = min(covered, key=lambda e: e.value if e.value is not None else math.inf)
    where = "" if (least.value or 0) >= 1 else f", least on {least.region} ({method_name(least.method or '')})"
    return f"{100 * (least.value or 0):.0f} % of images scored{where}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join([*names[:MOST_NAMED], *_more(len(names))])


def _more(count: int) -> list[str]:
    return [f"{count - MOST_NAMED} more"] if count > MOST_NAMED else []


def _sentence(parts: Sequence[str], *, capital: bool = True) -> str:
    text = "; ".join(parts)
    return text[:1].upper() + text[1:] if capital else text

"""What the last audit concludes, as the page's headline and tables.

Enters: a `Run`. Leaves: the outcome with its reason, and rows: of findings, of checks, of explanation methods.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from bias_audit.policies.policy import Rule
from bias_audit.records.history import onsets
from bias_audit.records.results import AuditSummary
from bias_audit.records.runs import Run
from bias_audit.report.facts import step_of
from bias_audit.report.numbers import interval
from bias_audit.report.series import method_name, thin
from bias_audit.terms import Outcome, Verdict
from bias_audit.verdicts.explainers import explainers
from bias_audit.verdicts.findings import Finding
from bias_audit.verdicts.judgement import Check

MOST_MARKS = 30
_VERDICT_RANK = {Verdict.RELIANCE: 0, Verdict.SUSPECTED: 1, Verdict.INCONCLUSIVE: 2, Verdict.CLEARED: 3}
_OUTCOME_RANK = {Outcome.VIOLATED: 0, Outcome.INCONCLUSIVE: 1, Outcome.HELD: 2}


@dataclass(frozen=True)
class Headline:
    """How the last audit came out, why, and since when."""

    outcome: Outcome
    reason: str
    since: str


@dataclass(frozen=True)
class FindingRow:
    """A finding, since when it stands, and how it came about.

    `drawn` is on how many images the region is, where it is not on all, or as boxes; else "". `onset` is when it set
    in, where it is heading, and what stopping earlier would have cost; "" unless it set in. `history` has step and
    verdict of each audit (thinned), None where the audit did not judge this.
    """

    finding: Finding
    since: str
    drawn: str
    onset: str
    history: tuple[tuple[int, Verdict | None], ...]


@dataclass(frozen=True)
class ExplainerRow:
    """Whether a method is fit, and its tests in words; `like` is the outcome whose sign and colour it shares."""

    method: str
    state: str
    like: Outcome
    similarity: str
    occlusion: str
    insertion: str
    deletion: str
    step: str


@dataclass(frozen=True)
class CheckRow:
    """A check; `why` it is inconclusive, less what the other columns say."""

    check: Check
    measured: str
    limit: str
    n: str
    why: str


def headline(run: Run) -> Headline:
    """The outcome of the last audit, with the first thing that made it so."""
    if not run.audits:
        return Headline(Outcome.INCONCLUSIVE, "No audit has been recorded yet, so nothing is shown.", "")
    last = run.audits[-1]
    outcome, since = last.judgement.outcome, _since(run.audits, lambda audit: audit.judgement.outcome)
    if last.trigger == "reference":
        return Headline(Outcome.INCONCLUSIVE, "Only the model before training has been audited so far.", "")
    if run.failed and outcome is Outcome.HELD:
        return Headline(Outcome.INCONCLUSIVE, f"The policy held at step {last.step}, but {run.failed}.", "")
    binding = [check for check in last.judgement.checks if check.severity == "error"]
    if outcome is Outcome.HELD:
        reason = "The one binding check holds" if len(binding) == 1 else f"All {len(binding)} binding checks hold"
        warned = sum(c.severity == "warn" and c.outcome is Outcome.VIOLATED for c in last.judgement.checks)
        reason += f"; {warned} of severity “warn” {'does' if warned == 1 else 'do'} not." if warned else "."
    else:
        first = next((check for check in binding if check.outcome is outcome), None)
        reason = first.message if first else "The policy has no rule of severity “error”, so nothing is shown."
    return Headline(outcome, reason[:1].upper() + reason[1:], since)


def _since(audits: Sequence[AuditSummary], state: Callable[[AuditSummary], object]) -> str:
    """Since which step the state is as it is now; "" after a single audit."""
    if len(audits) < 2:
        return ""
    now = state(audits[-1])
    streak = next((k for k, audit in enumerate(reversed(audits)) if state(audit) != now), len(audits))
    if streak == len(audits):
        return f"at every audit since step {audits[0].step}"
    return f"since step {audits[-streak].step}: {streak} of {len(audits)} audits"


def finding_rows(run: Run) -> list[FindingRow]:
    """The findings of the last audit, the gravest first."""
    if not run.audits:
        return []
    marks = [run.audits[i] for i in thin(len(run.audits), MOST_MARKS)] if len(run.audits) > 1 else []
    rows = []
    known = {(onset.kind, onset.name): onset for onset in onsets(run.audits)}
    for finding in sorted(run.audits[-1].judgement.findings, key=lambda f: _VERDICT_RANK[f.verdict]):
        verdict = partial(_verdict, finding.kind, finding.name)
        onset = known.get((finding.kind, finding.name))
        said = "" if onset is None or onset.since is None or len(onset.steps) < 2 else str(onset)
        marked = tuple((a.step, verdict(a)) for a in marks)
        counted = run.manifest.caveats.get(finding.name, "") if finding.kind == "region" else ""
        rows.append(FindingRow(finding, _since(run.audits, verdict), counted, said, marked))
    return rows


def _verdict(kind: str, name: str, audit: AuditSummary) -> Verdict | None:
    return next((f.verdict for f in audit.judgement.findings if (f.kind, f.name) == (kind, name)), None)


def check_rows(run: Run) -> list[CheckRow]:
    """The checks of the last audit: those that bind first, and of these what is violated."""
    if not run.audits:
        return []
    judgement = run.audits[-1].judgement
    rules = {rule.title: rule for rule in run.manifest.policy.rules}
    verdicts = {f.subject: f.verdict for f in judgement.findings}
    rows = []
    for check in sorted(judgement.checks, key=lambda c: (c.severity != "error", _OUTCOME_RANK[c.outcome])):
        # A run may have been gone on with under another policy than the one that its last audit was judged by.
        rule, e, verdict = rules.get(check.rule), check.estimate, verdicts.get(check.subject)
        why = check.message.removeprefix(f"{check.subject}: {verdict}. ").removeprefix(f"{e}; ")
        # A verdict weighs several estimates: no one of their counts is its own.
        n = str(e.n) if e and verdict is None else "–"
        rows.append(
            CheckRow(
                check,
                str(verdict) if verdict else interval(e),
                "" if rule is None else _limit(rule),
                n,
                why if check.outcome is Outcome.INCONCLUSIVE else "",
            )
        )
    return rows


def _limit(rule: Rule) -> str:
    return rule.limit.replace("<=", "≤").replace(">=", "≥").replace("!=", "not").replace("== ", "")


def explainer_rows(run: Run) -> list[ExplainerRow]:
    """Whether each explanation method is fit at the last audit; nothing where that was not tested."""
    if not run.audits:
        return []
    estimates, rows = run.audits[-1].estimates, []
    states = {True: ("fit", Outcome.HELD), False: ("unfit", Outcome.VIOLATED), None: ("unknown", Outcome.INCONCLUSIVE)}
    for known in explainers(estimates, run.manifest.policy):
        of = {e.metric: e for e in estimates if e.method == known.method and e.region is None}
        state, like = states[known.fit]
        step = step_of(run, known.similarity)
        rows.append(
            ExplainerRow(
                method_name(known.method),
                state,
                like,
                interval(known.similarity),
                interval(of.get("occlusion_correlation")),
                interval(of.get("insertion_gain")),
                interval(of.get("deletion_gain")),
                "–" if step is None else str(step),
            )
        )
    return rows

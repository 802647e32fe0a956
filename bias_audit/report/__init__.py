"""Turn a recorded run into one self-contained HTML page for a reviewer.

Enters: a `Run`, or the path of a run directory. Leaves: `report.html`, which needs neither network nor server and says
whether there is a problem, where, since when, for whom, whether it matters, and which images show it.

torch is not imported here: a report can be made where the records are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from markupsafe import Markup

from bias_audit.findings import Finding, explainers
from bias_audit.headlines import caveats
from bias_audit.policies.policy import Rule
from bias_audit.records.history import onsets
from bias_audit.records.results import AuditSummary
from bias_audit.records.runs import Run, read_run, write_whole
from bias_audit.report.association import association_tables
from bias_audit.report.charts import draw
from bias_audit.report.facts import facts, glance, step_of
from bias_audit.report.groups import grouped
from bias_audit.report.marks import method_name, thin
from bias_audit.report.pages import content_security_policy, resource, template
from bias_audit.report.samples import viewer_data
from bias_audit.terms import Estimate, Outcome, Verdict
from bias_audit.verdict import Check

__all__ = ["REPORT", "render", "write_report"]

REPORT = "report.html"
MOST_MARKS = 30
MOST_HELD_SHOWN = 8

_VERDICT_RANK = {Verdict.RELIANCE: 0, Verdict.SUSPECTED: 1, Verdict.INCONCLUSIVE: 2, Verdict.CLEARED: 3}
_OUTCOME_RANK = {Outcome.VIOLATED: 0, Outcome.INCONCLUSIVE: 1, Outcome.HELD: 2}


def write_report(run: Run | str | Path, *, thumbnails: bool = True) -> Path:
    """Write `report.html` into the run's directory; readers never see half a page.

    Args:
        run: a run that was read, or the path of a run directory or of one above the only one.
        thumbnails: as of `render`.

    Raises:
        RecordError: there is no readable run directory.
        OSError: the page cannot be written.

    Example:
        >>> write_report("runs/seed-0")  # doctest: +SKIP
        PosixPath('runs/seed-0/bias_audit/report.html')
    """
    run = run if isinstance(run, Run) else read_run(run)
    target = run.path / REPORT
    # A file name that is not text stays legible; it must not cost the reader the page.
    write_whole(target, render(run, thumbnails=thumbnails).encode("utf-8", "backslashreplace"))
    return target


def render(run: Run, *, thumbnails: bool = True) -> str:
    """The run as one HTML page; without `thumbnails` the heatmaps lie over bare outlines and no picture is disclosed.

    Raises:
        RecordError: the samples or an audit's arrays cannot be read.
    """
    script, style = resource("pictures.js") + resource("viewer.js"), resource("page.css")
    thumbnails = thumbnails and bool(run.manifest.thumbnails)
    return template("page.html.j2").render(
        content_security_policy=content_security_policy(style, script),
        # Both are this package's own files; they must reach the page unchanged, or their hashes forbid them.
        css=Markup(style),
        script=Markup(script),
        manifest=run.manifest,
        run=run,
        last=run.audits[-1] if run.audits else None,
        headline=_headline(run),
        glance=glance(run),
        facts=facts(run),
        findings=_findings(run),
        checks=_checks(run),
        explainers=_explainers(run),
        questions=draw(run),
        associations=association_tables(run),
        grouped=grouped(run, thumbnails=thumbnails),
        viewer=viewer_data(run, thumbnails=thumbnails),
        pictures=thumbnails,
        most_held_shown=MOST_HELD_SHOWN,
    )


@dataclass(frozen=True)
class _Headline:
    outcome: Outcome
    reason: str
    since: str


@dataclass(frozen=True)
class _FindingRow:
    finding: Finding
    since: str
    # On how many images the region is, where it is not on all, or as boxes; else "".
    drawn: str
    # When it set in, where it is heading, and what stopping earlier would have cost; "" unless it set in.
    onset: str
    # Verdict and step of each audit (thinned), None where the audit did not judge this.
    history: tuple[tuple[int, Verdict | None], ...]


@dataclass(frozen=True)
class _ExplainerRow:
    method: str
    state: str
    # The outcome whose sign and colour it shares.
    like: Outcome
    similarity: str
    occlusion: str
    insertion: str
    deletion: str
    step: str


@dataclass(frozen=True)
class _CheckRow:
    check: Check
    measured: str
    limit: str
    n: str
    # Why it is inconclusive; what the other columns say is not said again.
    why: str


def _headline(run: Run) -> _Headline:
    if not run.audits:
        return _Headline(Outcome.INCONCLUSIVE, "No audit has been recorded yet, so nothing is shown.", "")
    last = run.audits[-1]
    outcome, since = last.judgement.outcome, _since(run.audits, lambda audit: audit.judgement.outcome)
    if last.trigger == "reference":
        return _Headline(Outcome.INCONCLUSIVE, "Only the model before training has been audited so far.", "")
    if run.failed and outcome is Outcome.HELD:
        return _Headline(Outcome.INCONCLUSIVE, f"The policy held at step {last.step}, but {run.failed}.", "")
    binding = [check for check in last.judgement.checks if check.severity == "error"]
    if outcome is Outcome.HELD:
        reason = "The one binding check holds" if len(binding) == 1 else f"All {len(binding)} binding checks hold"
        warned = sum(c.severity == "warn" and c.outcome is Outcome.VIOLATED for c in last.judgement.checks)
        reason += f"; {warned} of severity “warn” {'does' if warned == 1 else 'do'} not." if warned else "."
    else:
        first = next((check for check in binding if check.outcome is outcome), None)
        reason = first.message if first else "The policy has no rule of severity “error”, so nothing is shown."
    return _Headline(outcome, reason[:1].upper() + reason[1:], since)


def _since(audits: Sequence[AuditSummary], state: Callable[[AuditSummary], object]) -> str:
    """Since which step the state is as it is now; "" after a single audit."""
    if len(audits) < 2:
        return ""
    now = state(audits[-1])
    streak = next((k for k, audit in enumerate(reversed(audits)) if state(audit) != now), len(audits))
    if streak == len(audits):
        return f"at every audit since step {audits[0].step}"
    return f"since step {audits[-streak].step}: {streak} of {len(audits)} audits"


def _findings(run: Run) -> list[_FindingRow]:
    if not run.audits:
        return []
    marks = [run.audits[i] for i in thin(len(run.audits), MOST_MARKS)] if len(run.audits) > 1 else []
    rows = []
    known = {(onset.kind, onset.name): onset for onset in onsets(run.audits)}
    drawn = {one.region: " ".join(caveats([one])) for one in run.manifest.annotated}
    for finding in sorted(run.audits[-1].judgement.findings, key=lambda f: _VERDICT_RANK[f.verdict]):
        verdict = partial(_verdict, finding.kind, finding.name)
        onset = known.get((finding.kind, finding.name))
        said = "" if onset is None or onset.since is None or len(onset.steps) < 2 else str(onset)
        marked = tuple((a.step, verdict(a)) for a in marks)
        counted = drawn.get(finding.name, "") if finding.kind == "region" else ""
        rows.append(_FindingRow(finding, _since(run.audits, verdict), counted, said, marked))
    return rows


def _verdict(kind: str, name: str, audit: AuditSummary) -> Verdict | None:
    return next((f.verdict for f in audit.judgement.findings if (f.kind, f.name) == (kind, name)), None)


def _checks(run: Run) -> list[_CheckRow]:
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
            _CheckRow(
                check,
                str(verdict) if verdict else _interval(e),
                "" if rule is None else _limit(rule),
                n,
                why if check.outcome is Outcome.INCONCLUSIVE else "",
            )
        )
    return rows


def _limit(rule: Rule) -> str:
    return rule.limit.replace("<=", "≤").replace(">=", "≥").replace("!=", "not").replace("== ", "")


def _explainers(run: Run) -> list[_ExplainerRow]:
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
            _ExplainerRow(
                method_name(known.method),
                state,
                like,
                _interval(known.similarity),
                _interval(of.get("occlusion_correlation")),
                _interval(of.get("insertion_gain")),
                _interval(of.get("deletion_gain")),
                "–" if step is None else str(step),
            )
        )
    return rows


def _interval(e: Estimate | None) -> str:
    if e is None or not e.measured:
        return "–"
    return f"{e.value:.3f} [{e.low:.3f}, {e.high:.3f}]".replace("-", "−")

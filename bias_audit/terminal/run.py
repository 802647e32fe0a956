"""One audit of a run, for a person at a terminal: `bias-audit show`.

Enters: a console, a `Run` and the place of an audit in it. Leaves: its verdicts, how its leading numbers came about,
when they set in, and its worst samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

from bias_audit.headlines import headlines
from bias_audit.records.history import onsets
from bias_audit.records.results import AuditSummary
from bias_audit.records.runs import Run
from bias_audit.terminal.findings import audit_line, findings_table, print_onsets, short_interval
from bias_audit.terminal.pictures import print_samples
from bias_audit.terminal.text import COUNT, MOST_ROWS, NAME, OUTCOME_STYLES, WORD, text, wide_table
from bias_audit.terms import Estimate
from bias_audit.wording import readable

_BARS = "▁▂▃▄▅▆▇█"
MOST_BARS = 40
# A scale that ends lower would make noise look like a rise.
LEAST_SCALE = 0.1


def print_run(console: Console, run: Run, index: int, pictures: int) -> None:
    """One audit of a run: verdicts, how its leading numbers came about, when they set in, and the worst samples.

    Args:
        index: of the audit, counted from 0; -1 is the last.
        pictures: how many samples to draw: those with most of the heatmap on a spurious region.

    Raises:
        ValueError: there is no such audit.
        RecordError: the samples or the audit's arrays cannot be read.
    """
    index = run.place_of(index)
    audit, past = run.audits[index], run.audits[: index + 1]
    console.print(text(f"{run.manifest.model}, layer {run.manifest.layer}: {run.path}", "bold"))
    console.print(findings_table(audit.judgement))
    shown_first = leading(audit)
    console.print(_course_table(past, shown_first))
    for e in shown_first:
        if not e.measured:
            console.print(text(readable(str(e)), "yellow"))
    console.print(audit_line(audit))
    for caveat in run.manifest.caveats.values():
        console.print(text(caveat, "yellow"))
    print_onsets(console, onsets(past))
    for doubt in _doubts(run, index):
        console.print(text(doubt, "yellow"))
    outcome = audit.judgement.outcome
    said = "before training: nothing follows" if audit.is_reference else f"policy {outcome}"
    console.print(text(f"bias-audit show: {said}", OUTCOME_STYLES[outcome] if not audit.is_reference else ""))
    if pictures:
        print_samples(console, run, index, pictures)


def sparkline(values: Sequence[float | None], low: float, high: float) -> str:
    """Values as bars on a scale from `low` to `high`, a dot where there is none.

    Example:
        >>> sparkline([0.0, None, 0.5, 1.0], 0.0, 1.0)
        '▁·▅█'
    """
    bars = [None if v is None else min(max((v - low) / (high - low), 0.0), 1.0) for v in values]
    return "".join("·" if bar is None else _BARS[round(7 * bar)] for bar in bars)


def _doubts(run: Run, index: int) -> Iterable[str]:
    if index < len(run.audits) - 1:
        yield f"{len(run.audits) - 1 - index} later audits are not in this."
        return
    yield from (f"Inconclusive: {reason}." for reason in run.unfinished)


def leading(audit: AuditSummary) -> tuple[Estimate, ...]:
    """The headlines, and what leads the evidence of each finding."""
    leading = [finding.evidence[0] for finding in audit.judgement.findings if finding.evidence]
    return tuple(dict.fromkeys((*headlines(audit.estimates), *leading)))


def _course_table(audits: Sequence[AuditSummary], leading: Sequence[Estimate]) -> Table:
    """How each leading number came about: a bar for each audit, the first and the last value."""
    shown = audits[-MOST_BARS:]
    span = f"step {shown[0].step}" + (f" to {shown[-1].step}" if len(shown) > 1 else "")
    left = f", the last {len(shown)} of {len(audits)} audits" if len(shown) < len(audits) else ""
    table = wide_table(f"Over time: {span}{left}", what=NAME, course=WORD, first=COUNT, last=COUNT, n=COUNT)
    rows = [(e, _course(e, shown)) for e in leading[:MOST_ROWS]]
    for e, values in rows:
        # Bars of one metric share a scale from 0 on: what hardly moves must not look as if it did.
        of_metric = [v for other, course in rows if other.metric == e.metric for v in course if v is not None]
        bars = sparkline(values, min([0.0, *of_metric]), max([LEAST_SCALE, *of_metric]))
        ago = f", {e.age} audit{'' if e.age == 1 else 's'} ago" if e.age else ""
        first = next((f"{v:z.2f}" for v in values if v is not None), "–")
        table.add_row(text(readable(e.subject)), bars, first, short_interval(e) + ago, str(e.n))
    if len(leading) > MOST_ROWS:
        table.caption = f"{MOST_ROWS} of {len(leading)}; the report has all."
    return table


def _course(e: Estimate, audits: Sequence[AuditSummary]) -> list[float | None]:
    """The values of one estimate; one that is carried on from an earlier audit is the same measurement again."""
    own = [next((x for x in audit.estimates if x.subject == e.subject), None) for audit in audits]
    return [x.value if x is not None and x.measured and x.age == 0 else None for x in own]

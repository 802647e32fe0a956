"""What the gate and `show` both print of an audit: its findings, when it was made, and since when something is so."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bias_audit.records.history import Onset
from bias_audit.records.results import AuditSummary
from bias_audit.terminal.text import NAME, VERDICT_STYLES, WORD, text, wide_table
from bias_audit.terms import Estimate
from bias_audit.verdicts.judgement import Judgement
from bias_audit.wording import interval


def audit_line(audit: AuditSummary) -> Text:
    """When an audit was made, and of which weights."""
    return text(f"Audit at step {audit.step}, epoch {audit.epoch}, {audit.weights} weights.")


def print_onsets(console: Console, history: Sequence[Onset]) -> None:
    """A line for each region and attribute since when the model relies on it, or is suspected to."""
    for onset in history:
        if onset.since is not None and len(onset.steps) > 1:
            console.print(text(onset))


def findings_table(judgement: Judgement) -> Table:
    """A row for each finding: its verdict, and why."""
    table = wide_table("Findings", about=NAME, verdict=WORD, why={"ratio": 1})
    for finding in judgement.findings:
        sentence = finding.sentence
        if finding.samples_to_settle is not None:
            sentence += f" About {finding.samples_to_settle} images of that kind would settle it."
        verdict = text(finding.verdict, VERDICT_STYLES[finding.verdict])
        table.add_row(text(f"{finding.kind} {finding.name}"), verdict, text(sentence))
    return table


def short_interval(e: Estimate) -> str:
    """Value and interval to two digits."""
    return interval(e, digits=2)

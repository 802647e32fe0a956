"""What the gate found, for a person at a terminal.

Enters: a console and a `GateResult`. Leaves: what each check measured, what to do, and the outcome on the last line.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from bias_audit.gate.result import GateResult
from bias_audit.gate.rows import Row, State, advice, blocking, outcome_words, rows, tally
from bias_audit.terminal.findings import audit_line, findings_table, print_onsets
from bias_audit.terminal.text import COUNT, MOST_LETTERS, OUTCOME_STYLES, WORD, stacked, text, wide_table
from bias_audit.wording import shortened

_ROW_STYLES: dict[State, str] = {
    "violated": "bold red",
    "warning": "red",
    "inconclusive": "yellow",
    "held": "green",
}
MOST_CHECKS = 100
# From so many columns on each thing that is said of a check has its own.
WIDE = 110


def print_gate(console: Console, result: GateResult) -> None:
    """What the gate found: what each check measured, then a line on what to do and one with the outcome."""
    found = rows(result)
    if result.judgement is not None and result.judgement.findings:
        console.print(findings_table(result.judgement))
    if found:
        console.print(_checks_table(found, console.width))
        for row in found[:MOST_CHECKS]:
            if row.worst:
                # On a line of their own, whole: an id is there to be copied.
                console.print(text(f"images: {', '.join(row.worst)} ({row.check.subject})"), soft_wrap=True)
    if result.audit is not None:
        console.print(audit_line(result.audit).append(f" {tally(result)}."))
    print_onsets(console, result.onsets)
    for caveat in result.caveats:
        console.print(text(caveat, "yellow"))
    for doubt in result.doubts:
        console.print(text(f"Inconclusive: {doubt}.", "yellow"))
    if advice(result):
        console.print(text(advice(result)))
    console.print(text(f"bias-audit gate: {outcome_words(result)}{_because(result)}", OUTCOME_STYLES[result.outcome]))


def _because(result: GateResult) -> str:
    """The first thing that stands in the way, in the words of its check."""
    rows = blocking(result)
    if not rows:
        return ""
    more = f" (and {len(rows) - 1} more)" if len(rows) > 1 else ""
    return f": {shortened(rows[0].check.message, 6 * MOST_LETTERS)}{more}"


def _checks_table(found: Sequence[Row], width: int) -> Table:
    """A line for each check; on a narrow terminal what belongs together is stacked."""
    wide = width >= WIDE
    if wide:
        columns = {
            "rule": {"ratio": 2},
            "on": {"ratio": 3},
            "measured": {"max_width": 30},
            "must be": {"max_width": 16},
        }
        columns |= {"n": COUNT, "since step": COUNT, "outcome": WORD}
    else:
        columns = {"rule, and on what": {"ratio": 1}, "measured, must be, n": {"max_width": 22}, "outcome": WORD}
    table = wide_table("Rules", **columns)
    table.show_lines = not wide
    for row in found[:MOST_CHECKS]:
        outcome, since = text(row.label, _ROW_STYLES[row.state]), "" if row.since is None else str(row.since)
        rule, on, measured, limit = (
            text(shortened(x, MOST_LETTERS)) for x in (row.check.rule, row.check.subject, row.measured, row.limit)
        )
        more = [shortened(row.reason, 3 * MOST_LETTERS)] if row.state == "inconclusive" else []
        notes = [text(note, "dim") for note in more]
        if wide:
            table.add_row(rule, stacked(on, *notes), measured, limit, row.n, since, outcome)
        else:
            # A rule without a subject of its own is its subject.
            named = [rule] if row.check.subject == row.check.rule else [rule, on]
            count = [text(f"n = {row.n}")] if row.n != "–" else []
            when = [text(f"since {since}")] if since else []
            table.add_row(stacked(*named, *notes), stacked(measured, limit, *count), stacked(outcome, *when))
    if len(found) > MOST_CHECKS:
        table.caption = f"{MOST_CHECKS} of {len(found)}, those first that are not held; --format json has all."
    return table

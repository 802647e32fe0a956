"""What changed from one run to another, as tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bias_audit.terminal.findings import short_interval
from bias_audit.terminal.run import leading
from bias_audit.terminal.text import COUNT, MOST_ROWS, NAME, VERDICT_STYLES, WORD, text, wide_table

if TYPE_CHECKING:
    from bias_audit.gate.compare import Comparison, Difference


def print_comparison(console: Console, found: Comparison) -> None:
    """What changed from run A to run B: verdicts first, then the numbers that lead, then how many others changed."""
    for letter, side in (("A", found.a), ("B", found.b)):
        console.print(text(f"{letter}: {side.run.path}, step {side.audit.step}, {side.run.manifest.model}"))
    for note in found.notes:
        console.print(text(note))
    if found.verdicts:
        console.print(_verdicts_table(found))
    first = {e.subject for side in (found.a, found.b) for e in leading(side.audit)}
    order = ("changed", "uncertain", "open", "unknown")
    rows = sorted((d for d in found.differences if d.before.subject in first), key=lambda d: order.index(d.state))
    if rows:
        console.print(_differences_table(rows[:MOST_ROWS]))
    if any(d.pairs is None and d.state != "unknown" for d in rows):
        console.print(text("* from the two intervals, as if of different images; rather too wide where they are not."))
    for d in rows:
        if d.state == "unknown":
            console.print(text(d.change.reason.replace("_", " "), "yellow"))
    console.print(text(found))


def _verdicts_table(found: Comparison) -> Table:
    table = wide_table("Verdicts", about=NAME, A=WORD, B=WORD, why_in_B={"ratio": 1})
    for change in sorted(found.verdicts, key=lambda change: not change.changed):
        words = [
            text(f.verdict, VERDICT_STYLES[f.verdict]) if f is not None else text("not judged")
            for f in (change.before, change.after)
        ]
        after = change.after.sentence if change.after is not None else ""
        name = text(f"{change.kind} {change.name}")
        table.add_row(name, words[0], Text("→ " if change.changed else "  ") + words[1], text(after))
    return table


def _differences_table(rows: Sequence[Difference]) -> Table:
    table = wide_table("Leading numbers", what={"ratio": 1}, A=COUNT, B=COUNT, difference=COUNT, n=COUNT, state=WORD)
    for d in rows:
        c = d.change
        difference = "–" if c.value is None else f"{c.value:+z.2f} [{c.low:+z.2f}, {c.high:+z.2f}]"
        n = str(min(d.before.n, d.after.n)) + "*" if d.pairs is None else f"{d.pairs} "
        style = {"changed": "bold", "uncertain": "", "open": "dim", "unknown": "yellow"}[d.state]
        table.add_row(
            text(d.subject), short_interval(d.before), short_interval(d.after), difference, n, d.state, style=style
        )
    return table

"""The console, and what is put on it: text from data made safe and short, and tables as wide as the console.

Enters: any value. Leaves: a `Text` or a line that is never read as markup and does not steer the terminal; a `Table`.
"""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bias_audit.terms import Outcome, Verdict
from bias_audit.wording import one_line

OUTCOME_STYLES = {Outcome.HELD: "green", Outcome.VIOLATED: "bold red", Outcome.INCONCLUSIVE: "yellow"}
VERDICT_STYLES = {
    Verdict.RELIANCE: "bold red",
    Verdict.SUSPECTED: "yellow",
    Verdict.CLEARED: "green",
    Verdict.INCONCLUSIVE: "yellow",
}
MOST_ROWS = 40
# A name may be of any length; the JSON has the whole.
MOST_LETTERS = 200


def console(colours: bool = False) -> Console:
    """The console for standard output; with `colours` they are written to a file or a pipe as well."""
    if sys.stdout.isatty():
        return Console()
    # A log file has no width; 80 columns would break every row.
    return Console(width=140, force_terminal=True, color_system="truecolor") if colours else Console(width=140)


def text(value: object, style: str = "") -> Text:
    """Any text on one line, without markup and control characters.

    Example:
        >>> text("[red]a\\nb").plain
        '[red]a b'
    """
    return Text(one_line(value), style=style)


def wide_table(title: str, **columns: dict[str, Any]) -> Table:
    """An empty table; `columns` are their names, with spaces as underscores, and Rich's options for each."""
    table = Table(title=text(title), title_justify="left", expand=True)
    for name, options in columns.items():
        table.add_column(name.replace("_", " "), **{"overflow": "fold"} | options)
    return table


NAME: dict[str, Any] = {"max_width": 48}
WORD: dict[str, Any] = {"no_wrap": True}
COUNT: dict[str, Any] = {"justify": "right", "no_wrap": True}


def stacked(*lines: Text) -> Text:
    """Lines of one cell."""
    return Text("\n").join(lines)

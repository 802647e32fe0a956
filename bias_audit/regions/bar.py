"""How far a command over many images is, for who waits for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from bias_audit.progress import Progress, silent


@contextmanager
def bar(title: str, unit: str) -> Iterator[Progress]:
    """A progress bar on standard error, gone at the end; none where that is no terminal."""
    screen = Console(stderr=True)
    if not screen.is_terminal:
        # A bar that is disabled still ends its line, by some versions of rich.
        yield silent
        return
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn())
    with Bars(*columns, console=screen, transient=True) as bars:
        task = bars.add_task(title, total=None)
        yield lambda done, of: bars.update(task, completed=done, total=of)

"""What a progress bar says of the audits: one that is under way, and in a line what the last one found.

Enters: the Trainer's progress bar, and each `AuditResult`. Leaves: lines, and a bar while an audit runs.

Lightning's two bars are told by the names of their classes, as there are two packages of them. Another bar gets its
lines through its own `print`, and shows no audit under way; a disabled one, and a Trainer without one, get nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from bias_audit.callbacks.scalars import in_words
from bias_audit.callbacks.sinks import Session
from bias_audit.callbacks.trainer import kinds_of
from bias_audit.progress import Progress, silent
from bias_audit.records.results import AuditResult
from bias_audit.wording import one_line

UNDER_WAY = "Bias audit"


class ProgressBarSink:
    """A line of `bar` after each audit but the one before training, from which nothing follows."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self.name = type(bar).__name__

    def start(self, session: Session) -> None:
        """Remember what to call the audits."""
        self._prefix = session.name

    def write(self, result: AuditResult) -> None:
        """Print the line."""
        if not result.is_reference and _is_on(self._bar):
            _print(self._bar, f"{self._prefix}, {in_words(result)}")

    def fail(self, step: int, reason: str) -> None:
        """Nothing: a warning says so."""

    def end(self, error: str = "") -> None:
        """Nothing: the bar is the Trainer's."""


def under_way(bar: Any) -> AbstractContextManager[Progress]:
    """Shows the progress of one audit next to `bar`, and takes it away at the end; what is entered takes the counts.

    A Rich bar that is not on the screen, as before training without a sanity check, shows nothing.

    Example:
        >>> with under_way(trainer.progress_bar_callback) as progress:  # doctest: +SKIP
        ...     auditor.run(model, progress=progress)
    """
    if bar is not None and _is_on(bar):
        kinds = kinds_of(bar)
        if "TQDMProgressBar" in kinds:
            return _on_tqdm()
        if "RichProgressBar" in kinds and bar.progress is not None and bar.progress.live.is_started:
            return _on_rich(bar.progress)
    return nullcontext(silent)


@contextmanager
def _on_tqdm() -> Iterator[Progress]:
    from tqdm.auto import tqdm

    # `disable=None` is tqdm's word for "unless this is a file", which would keep every state of the bar.
    with tqdm(desc=UNDER_WAY, unit=" images", leave=False, disable=None, dynamic_ncols=True, file=sys.stdout) as shown:

        def show(done: int, of: int) -> None:
            shown.n, shown.total = done, of
            shown.refresh()

        yield show


@contextmanager
def _on_rich(progress: Any) -> Iterator[Progress]:
    # Used again at each audit and never removed: Lightning finds its own tasks by their place in the list.
    found = [task.id for task in progress.tasks if task.description == UNDER_WAY]
    task = found[0] if found else progress.add_task(UNDER_WAY, total=1, visible=False)
    progress.reset(task, visible=False)

    def show(done: int, of: int) -> None:
        progress.update(task, completed=done, total=of, visible=True)
        progress.refresh()

    try:
        yield show
    finally:
        progress.update(task, visible=False)
        progress.refresh()


def _print(bar: Any, words: str) -> None:
    line = _encodable(one_line(words))
    kinds = kinds_of(bar)
    if "RichProgressBar" in kinds:
        import rich

        rich.get_console().print(line, markup=False, highlight=False, emoji=False, soft_wrap=True)
    elif "TQDMProgressBar" in kinds:
        from tqdm.auto import tqdm

        tqdm.write(line, file=sys.stdout)
    else:
        bar.print(line)


def _encodable(line: str) -> str:
    """The line as the terminal can show it: a log file of another encoding would raise."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return line.encode(encoding, "replace").decode(encoding)


def _is_on(bar: Any) -> bool:
    return bool(getattr(bar, "is_enabled", True))

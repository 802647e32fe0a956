"""Where results go.

Enters: a `Session` once, then an `AuditResult` per audit. Leaves: files, a dashboard, whatever a sink makes of them. A
sink is any object with the methods of `Sink`; one that fails is reported once and then left out, and neither training
nor the other sinks notice.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from bias_audit.records.errors import RecordError
from bias_audit.records.manifest import Manifest
from bias_audit.records.pictures import shareable
from bias_audit.records.results import AuditResult
from bias_audit.records.samples import SampleSheet
from bias_audit.records.writing import RunDirectory
from bias_audit.redaction import without_secrets
from bias_audit.rng import preserved_rng


@dataclass(frozen=True)
class Session:
    """What every sink is told before the first audit.

    `name` prefixes metrics and names the run directory `path`. `sheet` is what may be shown: outlines in place of
    pictures where these are not to leave the run directory (`Manifest.thumbnails`). `resumed_from` is the run directory
    that this one goes on from at `resumed_step`. `keep` is of how many audits it keeps the scores, None for all.
    """

    name: str
    path: Path
    manifest: Manifest
    sheet: SampleSheet
    resumed_from: Path | None = None
    resumed_step: int = 0
    keep: int | None = None


class Sink(Protocol):
    """A place results go to; called on rank 0 only, in this order."""

    def start(self, session: Session) -> None:
        """Before the first audit."""

    def write(self, result: AuditResult) -> None:
        """After each audit."""

    def fail(self, step: int, reason: str) -> None:
        """Instead of `write`, where an audit could not be made."""

    def end(self, error: str = "") -> None:
        """After training; `error` is what it broke off with, "" where it did not."""


class RunDirectorySink:
    """The records: whole after every audit."""

    def __init__(self) -> None:
        self._directory: RunDirectory | None = None

    @property
    def directory(self) -> RunDirectory:
        """The directory that is written; after `start`."""
        assert self._directory is not None
        return self._directory

    def start(self, session: Session) -> None:
        """Make the directory, or go on with the one that training resumed from."""
        if session.resumed_from is None:
            self._directory = RunDirectory.create(session.path, session.manifest, session.sheet, keep=session.keep)
        else:
            self._directory = RunDirectory.resume(
                session.path,
                session.resumed_from,
                session.manifest,
                session.sheet,
                session.resumed_step,
                keep=session.keep,
            )

    def write(self, result: AuditResult) -> None:
        """Append the audit."""
        self.directory.append(result)

    def fail(self, step: int, reason: str) -> None:
        """Record that an audit could not be made."""
        self.directory.fail(step, reason)

    def best(self, step: int) -> None:
        """Record the step of the best checkpoint so far."""
        self.directory.best(step)

    def end(self, error: str = "") -> None:
        """Record that training is over."""
        self.directory.end(error)


class FanOut:
    """Several sinks as one; a sink that raises is named in one warning and not called again.

    One that only shows what is recorded (`of_records`) goes without a word once the records have failed. With
    `on_error="raise"` the exception goes through instead, unless training has broken off with another. Where pictures
    are to stay in the run directory, no other sink gets any.
    """

    def __init__(self, sinks: Sequence[Sink], on_error: str) -> None:
        self._sinks = list(sinks)
        self._on_error = on_error
        self._open = self._bare = False
        self._recorded = True

    def start(self, session: Session) -> None:
        """Start every sink."""
        self._open = True
        self._bare = session.manifest.thumbnails == "local"
        shared = replace(session, sheet=shareable(session.sheet, session.manifest))
        self._each(
            lambda sink: sink.start(session if isinstance(sink, RunDirectorySink) else shared),
            set_up=True,
        )

    def write(self, result: AuditResult) -> None:
        """Give every sink the result."""
        self._open = True
        shared = replace(result, changed=None) if self._bare else result
        self._each(lambda sink: sink.write(result if isinstance(sink, RunDirectorySink) else shared))

    def fail(self, step: int, reason: str) -> None:
        """Tell every sink that an audit could not be made."""
        self._open = True
        self._each(lambda sink: sink.fail(step, reason))

    def best(self, step: int) -> None:
        """Tell the records at which step the best checkpoint so far was saved."""
        self._each(lambda sink: sink.best(step) if isinstance(sink, RunDirectorySink) else None)

    def end(self, error: str = "") -> None:
        """End every sink; nothing where nothing has come since the last end, as in a stage that audits nothing."""
        if not self._open:
            return
        self._open = False
        # What training broke off with is not to be hidden by what breaks after it.
        self._each(lambda sink: sink.end(error), may_raise=not error)

    def _each(self, call: Callable[[Sink], None], *, set_up: bool = False, may_raise: bool = True) -> None:
        for sink in tuple(self._sinks):
            try:
                # MLflow before 3 draws a file's name from Python's global generator; training draws as without it.
                with preserved_rng():
                    call(sink)
            except Exception as error:
                self._sinks.remove(sink)
                self._recorded = self._recorded and not isinstance(sink, RunDirectorySink)
                # A run that cannot be gone on with is a mistake in the set-up: its old records would pass for new ones.
                mistaken = set_up and isinstance(sink, RunDirectorySink) and isinstance(error, RecordError)
                if (self._on_error == "raise" and may_raise) or mistaken:
                    raise
                if getattr(sink, "of_records", False) and not self._recorded:
                    continue
                warnings.warn(
                    f"bias-audit: {name_of(sink)} failed and is left out from now on; training goes on: "
                    + without_secrets(str(error)),
                    RuntimeWarning,
                    stacklevel=2,
                )


def name_of(sink: Sink) -> str:
    """What a person calls the sink: its `name` where it has one, else its class."""
    return str(getattr(sink, "name", type(sink).__name__))

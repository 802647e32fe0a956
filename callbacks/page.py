"""The page `report.html`, kept up to date while training runs.

Enters: word that an audit has been recorded. Leaves: the page, drawn anew from the records by a process of its own.
"""

from __future__ import annotations

from bias_audit.callbacks.aside import Aside
from bias_audit.callbacks.sinks import Session
from bias_audit.records.files import REPORT
from bias_audit.records.results import AuditResult
from bias_audit.report.follow import END


class ReportSink:
    """Keeps `report.html` up to date; it follows an audit within seconds, and is complete when training has ended.

    It shows what the run directory records: without records there is no page.
    """

    of_records = True

    def start(self, session: Session) -> None:
        """Remember where."""
        self._aside = Aside("bias_audit.report.follow", str(session.path))
        if not session.manifest.thumbnails:
            # The page of a run that is gone on with may show pictures, and the next may come in hours.
            (session.path / REPORT).unlink(missing_ok=True)

    def write(self, result: AuditResult) -> None:
        """Have the page drawn."""
        self._aside.tell("audited")

    def fail(self, step: int, reason: str) -> None:
        """Have the page drawn, which says so."""
        self._aside.tell("failed")

    def end(self, error: str = "") -> None:
        """Wait until the page is drawn for the last time: it stops reloading itself."""
        self._aside.end(END)

"""The page `report.html`, kept up to date while training runs.

Enters: word that an audit has been recorded. Leaves: the page, drawn anew from the records by a process of its own: to
draw it takes a second of Python, which on a thread would be a second that the training waits for the interpreter.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

import bias_audit
from bias_audit.callbacks.sinks import Session
from bias_audit.records import AuditResult
from bias_audit.report.follow import END

# A page that hangs must not keep a training that is over from ending.
PATIENCE_S = 120.0


class ReportSink:
    """Keeps `report.html` up to date; it follows an audit within seconds, and is complete when training has ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None

    def start(self, session: Session) -> None:
        """Remember where."""
        self._path = session.path

    def write(self, result: AuditResult) -> None:
        """Have the page drawn."""
        self._ask()

    def fail(self, step: int, reason: str) -> None:
        """Have the page drawn, which says so."""
        self._ask()

    def end(self, error: str = "") -> None:
        """Wait until the page is drawn for the last time: it stops reloading itself.

        Raises:
            RuntimeError: it could not be drawn.
        """
        self._ask(END)
        process, errors, self._process, self._errors = self._process, self._errors, None, None
        assert process is not None and process.stdin is not None and errors is not None
        with errors:
            try:
                code = process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise RuntimeError(f"the page was not drawn within {PATIENCE_S:.0f} seconds after training") from None
            finally:
                process.stdin.close()
            if code:
                raise RuntimeError(_said(errors))

    def _ask(self, line: str = "") -> None:
        if self._process is None:
            self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process
            self._process = _follower(self._path, self._errors)
        assert self._process.stdin is not None and self._errors is not None
        try:
            self._process.stdin.write(f"{line}\n".encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            self._process.wait()
            with self._errors:
                raise RuntimeError(_said(self._errors)) from None


def _follower(path: Path, errors: IO[bytes]) -> subprocess.Popen[bytes]:
    # The package may be found by what this process did to its path; the training's directory is not searched.
    found = [str(Path(bias_audit.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    surroundings = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, found)), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "bias_audit.report.follow", str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=errors,
        env=surroundings,
    )


def _said(errors: IO[bytes]) -> str:
    errors.seek(0)
    lines = errors.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "the process that draws the page was killed"

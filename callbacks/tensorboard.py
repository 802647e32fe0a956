"""Pictures and verdicts in TensorBoard.

Enters: Lightning's TensorBoardLogger and each `AuditResult`. Leaves, in the logger's event file: per audit one picture
of a fixed panel of samples, so that the step slider replays training, one of the worst, and the verdicts as text.
Scalars come by `LoggerSink`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bias_audit.callbacks.grids import grid, listing
from bias_audit.callbacks.scalars import in_words
from bias_audit.callbacks.sinks import Session
from bias_audit.records.panels import PANEL, WORST, fixed_panel, worst
from bias_audit.records.results import AuditResult
from bias_audit.wording import one_line


class TensorBoardSink:
    """Writes to the event file of `logger`; `name` is what a person calls it."""

    def __init__(self, logger: Any) -> None:
        self._logger = logger
        self.name = "TensorBoard"

    def start(self, session: Session) -> None:
        """Open the event file and choose the panel."""
        self._session = session
        self._panel = fixed_panel(session.sheet, PANEL)
        # The logger makes its writer when first asked for it, which must not happen on two threads at once.
        _ = self._logger.experiment

    def write(self, result: AuditResult) -> None:
        """Add one audit's pictures and text."""
        # Not kept from the start: the logger may close its writer after one stage and go on in the next.
        writer, session = self._logger.experiment, self._session
        chosen = {"panel": self._panel, "worst": worst(result.scores, session.manifest.subjects, WORST)}
        for kind, indices in chosen.items():
            if indices:
                picture = np.asarray(grid(session, result.scores, indices))
                writer.add_image(f"{session.name}/overlays/{kind}", picture, result.step, dataformats="HWC")
        lines = [in_words(result)]
        if not result.is_reference:
            lines += [f"{f.name}: {f.verdict}. {f.sentence}" for f in result.judgement.findings]
        for kind, indices in chosen.items():
            lines += ["", f"overlays/{kind}:", *listing(session, result.scores, indices)]
        writer.add_text(f"{session.name}/verdicts", _as_it_is(lines), result.step)

    def fail(self, step: int, reason: str) -> None:
        """Say that an audit could not be made."""
        said = _as_it_is([f"step {step}: no audit, {reason}"])
        self._logger.experiment.add_text(f"{self._session.name}/verdicts", said, step)

    def end(self, error: str = "") -> None:
        """Write what is still in memory; the event file is the logger's to close."""
        self._logger.experiment.flush()


def _as_it_is(lines: list[str]) -> str:
    """Text that TensorBoard, which reads Markdown, shows letter by letter: four spaces in front make it a listing."""
    return "\n".join(f"    {one_line(line)}" for line in lines)

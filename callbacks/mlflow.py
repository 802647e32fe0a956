"""Results in MLflow.

Enters: Lightning's MLFlowLogger and each `AuditResult`. Leaves, in the logger's run: the scalars, per audit one picture
of a fixed panel of samples and one of the worst, a tag that says how things stand, and at the end the run directory
with its page as artifacts.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bias_audit.callbacks.grids import grid
from bias_audit.callbacks.scalars import in_words, scalars
from bias_audit.callbacks.sinks import Session
from bias_audit.records.files import AUDITS, PREVIOUS
from bias_audit.records.panels import PANEL, WORST, fixed_panel, worst
from bias_audit.records.results import AuditResult
from bias_audit.records.runs import read_run
from bias_audit.report.shared import write_shared
from bias_audit.wording import one_line

# MLflow refuses a longer name of a metric. Longer tags it cuts, and more metrics it sends in parts.
MOST_LETTERS = 250


class MlflowSink:
    """Writes to the run of `logger`; `name` is what a person calls it."""

    def __init__(self, logger: Any) -> None:
        self._logger = logger
        self.name = "MLflow"

    def start(self, session: Session) -> None:
        """Make the run, if the logger has none yet, and choose the panel."""
        self._session = session
        self._panel = fixed_panel(session.sheet, PANEL)
        _ = self._logger.run_id

    def write(self, result: AuditResult) -> None:
        """Log one audit's scalars, pictures and tag."""
        session, run = self._session, self._logger.run_id
        # What was not measured is left out: MLflow's page of a run does not open where a metric's last value is NaN.
        measured = {metric_key(k): v for k, v in scalars(result, session.name).items() if math.isfinite(v)}
        self._logger.log_metrics(measured, step=result.step)
        subjects = session.manifest.subjects
        chosen = {"panel": self._panel, "worst": worst(result.scores, subjects, WORST)}
        for kind, indices in chosen.items():
            if indices:
                picture = grid(session, result.scores, indices)
                self._logger.experiment.log_image(
                    run, picture, key=metric_key(f"{session.name}/overlays/{kind}"), step=result.step
                )
        self._tag(in_words(result))

    def fail(self, step: int, reason: str) -> None:
        """Say in the tag that an audit could not be made."""
        self._tag(f"step {step}: no audit, {reason}")

    def end(self, error: str = "") -> None:
        """Upload the run directory with its page; where no picture may leave it, only its records, without theirs."""
        path = self._session.path
        if self._session.manifest.thumbnails is True:
            self._upload(path.iterdir())
            return
        with TemporaryDirectory(prefix="bias-audit-") as folder:
            write_shared(read_run(path), Path(folder))
            # Whatever else lies in the run directory may show pictures.
            self._upload((path / AUDITS, path / "audits", *Path(folder).iterdir()))

    def _upload(self, items: Iterable[Path]) -> None:
        name = metric_key(self._session.name)
        for item in sorted(items):
            if item.is_dir() and item.name != PREVIOUS:
                self._logger.experiment.log_artifacts(self._logger.run_id, str(item), f"{name}/{item.name}")
            elif item.is_file():
                self._logger.experiment.log_artifact(self._logger.run_id, str(item), name)

    def _tag(self, words: str) -> None:
        key = metric_key(self._session.name)
        self._logger.experiment.set_tag(self._logger.run_id, key, one_line(words))


def metric_key(name: str) -> str:
    """A metric's name as MLflow takes it: one slash; where characters are lost, with a digest of the whole name.

    A store of files cannot hold `a/b` beside `a/b/c`. Lightning's logger would drop the characters that MLflow does not
    take, and two classes could become one.

    Example:
        >>> metric_key("bias_audit/accuracy/gender=female")
        'bias_audit/accuracy.gender.female'
        >>> metric_key("bias_audit/accuracy/nurse, trainee")
        'bias_audit/accuracy.nurse_ trainee-32f0bfb9'
    """
    prefix, slash, rest = name.partition("/")
    whole = prefix + slash + re.sub("[/=]", ".", rest)
    key = re.sub("[^a-zA-Z0-9_/. -]", "_", whole)
    if key == whole and len(key) <= MOST_LETTERS:
        return key
    digest = f"-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return key[: MOST_LETTERS - len(digest)] + digest

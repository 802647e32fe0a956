"""What a training that goes on from a checkpoint takes along from the audits before it.

Enters: the run directory that the checkpoint names, and the step at which it was saved. Leaves: an `Earlier`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bias_audit.records.files import PREVIOUS
from bias_audit.records.results import AuditSummary
from bias_audit.records.runs import read_run
from bias_audit.records.samples import SampleScores


@dataclass(frozen=True)
class Earlier:
    """The run that is gone on with at `step`.

    `reference` are the scores of its audit before training, `previous` is its last audit up to the step; None where it
    has none.
    """

    path: Path
    step: int
    run_id: str
    reference: SampleScores | None = None
    previous: AuditSummary | None = None


def earlier_run(path: Path, step: int, run_id: str) -> Earlier:
    """Read the run at `path`; where another training has taken its place since, the one of that id set aside in it.

    Raises:
        RecordError: there is no such run, or it cannot be read.
    """
    run = read_run(path)
    if run_id and run.manifest.run_id != run_id:
        run = read_run(run.path / PREVIOUS / run_id)
    reference = run.scores(0) if run.audits and run.audits[0].trigger == "reference" else None
    previous = next((a for a in reversed(run.audits) if a.step <= step and a.trigger != "end"), None)
    return Earlier(run.path, step, run.manifest.run_id, reference, previous)

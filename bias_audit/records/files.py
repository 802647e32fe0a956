"""Where the files of a run lie, and how a run is found.

Enters: the path of a run directory, or of one above it. Leaves: the run directory's path.

    manifest.json    what was audited and how; checksummed
    samples.npz      ids, labels, attributes, thumbnails and region masks of the audited images
    audits.jsonl     one line per audit, each with its checksum and its predecessor's: estimates, findings, checks
    audits/*.npz     per audit the heatmaps at their own resolution and every score of every sample
    changed.npz      what the last interventions made of some images, to be looked at; absent before the first
    report.html      the page, drawn from the records
    wandb.json       which W&B run has them, and how many of the audits
    previous/        the runs that were here before, each a run directory
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from bias_audit.records.errors import MissingEvidenceError, RecordError

MANIFEST, SAMPLES, AUDITS, PREVIOUS = "manifest.json", "samples.npz", "audits.jsonl", "previous"
ARRAYS = "audits"
CHANGED = "changed.npz"
REPORT, WANDB = "report.html", "wandb.json"
# What is a run's own: whatever else lies in the folder is somebody's, and stays.
OWN = (SAMPLES, AUDITS, ARRAYS, CHANGED, REPORT, WANDB)
# The folder in which a W&B run keeps a copy of the records, so that it can be judged wherever it is copied to.
COPIES = "bias_audit_records"


def find_run(path: str | Path) -> Path:
    """The run directory at `path`, or the only one below it.

    Raises:
        RecordError: there is none, or more than one.
    """
    root = Path(path)
    if not root.is_dir():
        raise RecordError(f"{root}: no such directory: give a run directory (it holds {MANIFEST}) or one above it")
    found = sorted(_manifests(root))
    if not found:
        raise MissingEvidenceError(
            f"{root}: no {MANIFEST} here or below: no audit was recorded, or this is another directory"
        )
    if len(found) > 1:
        names = ", ".join(str(p) for p in found[:5]) + (" ..." if len(found) > 5 else "")
        raise RecordError(f"{root}: holds {len(found)} run directories ({names}): name one of them")
    return found[0]


def _manifests(root: Path) -> Iterator[Path]:
    # A run directory keeps its predecessors inside itself: what lies below a manifest is not searched, and neither is
    # `previous` while a new run has yet to write its manifest. A W&B run beside it holds the same once more.
    for folder, below, files in os.walk(root):
        below[:] = [] if MANIFEST in files else [name for name in below if name not in (PREVIOUS, COPIES)]
        if MANIFEST in files:
            yield Path(folder)

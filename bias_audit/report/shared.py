"""What may leave a run directory whose pictures are to stay.

Enters: a `Run`. Leaves: those of its files that hold pictures, without a pixel of them; the lines and the arrays of its
audits hold none and go with them as they are.

torch is not imported here.
"""

from __future__ import annotations

from pathlib import Path

from bias_audit.atomic import write_whole
from bias_audit.records.arrays import sheet_bytes
from bias_audit.records.files import MANIFEST, REPORT, SAMPLES
from bias_audit.records.log import manifest_bytes
from bias_audit.records.pictures import outlined
from bias_audit.records.runs import Run
from bias_audit.report.page import render


def write_shared(run: Run, folder: Path) -> None:
    """Write to `folder` the samples as outlines, the manifest, which says so, and the page.

    Raises:
        RecordError: the samples or an audit's arrays cannot be read.
        OSError: `folder` cannot be written.

    Example:
        >>> write_shared(run, Path("shared"))  # doctest: +SKIP
    """
    write_whole(folder / SAMPLES, sheet_bytes(outlined(run.sheet())))
    write_whole(folder / MANIFEST, manifest_bytes(run.manifest.model_copy(update={"thumbnails": False})))
    write_whole(folder / REPORT, render(run, thumbnails=False).encode("utf-8", "backslashreplace"))

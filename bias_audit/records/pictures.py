"""The pictures that a run holds: opened with care, and without a pixel of them where they are to stay.

Enters: the JPEG bytes of a record, which may come from anywhere, or a `SampleSheet`. Leaves: a picture, or the sheet
with outlines in place of pictures.
"""

from __future__ import annotations

import io
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from bias_audit.records.errors import RecordError

if TYPE_CHECKING:
    from bias_audit.records.manifest import Manifest
    from bias_audit.records.samples import SampleSheet

# No record holds a picture of more pixels a side; a larger one is refused before it is decoded.
MOST_SIDE = 1024


def opened(thumbnail: bytes) -> Image.Image:
    """The picture that a record holds as `thumbnail`, of which no more than the header has been read.

    Raises:
        RecordError: it is no JPEG, or larger than any that is recorded.
    """
    try:
        picture = Image.open(io.BytesIO(thumbnail), formats=("JPEG",))
    except Exception as error:
        # Damaged files make Pillow raise SyntaxError, EOFError, struct.error and others.
        raise RecordError(f"a recorded picture cannot be read ({error}): record the run again") from error
    if max(picture.size) > MOST_SIDE:
        size = f"{picture.width} x {picture.height}"
        raise RecordError(f"a recorded picture has {size} pixels, expected at most {MOST_SIDE} a side: it was changed")
    return picture


def outlined(sheet: SampleSheet) -> SampleSheet:
    """The same samples with no pixel of their pictures: in place of each the outlines of its regions on blank paper.

    Raises:
        RecordError: a picture cannot be read, or is larger than any that is recorded.

    Example:
        >>> outlined(run.sheet()).thumbnails  # doctest: +SKIP
    """
    blanks = []
    for thumbnail, masks in zip(sheet.thumbnails, sheet.masks, strict=True):
        width, height = opened(thumbnail).size
        inside = np.pad(masks[:, :height, :width], ((0, 0), (1, 1), (1, 1)))
        eroded = inside[:, :-2, 1:-1] & inside[:, 2:, 1:-1] & inside[:, 1:-1, :-2] & inside[:, 1:-1, 2:]
        edges = (inside[:, 1:-1, 1:-1] & ~eroded).any(axis=0)
        buffer = io.BytesIO()
        Image.fromarray(np.where(edges, np.uint8(96), np.uint8(224))).save(buffer, "JPEG", quality=60, optimize=True)
        blanks.append(buffer.getvalue())
    return replace(sheet, thumbnails=tuple(blanks))


def shareable(sheet: SampleSheet, manifest: Manifest) -> SampleSheet:
    """The samples as they may leave the run directory: without their pictures where these are to stay."""
    return outlined(sheet) if manifest.thumbnails == "local" else sheet

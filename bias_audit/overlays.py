"""A heatmap drawn over its image, and which images to look at first.

Enters: a picture and a map at the layer's resolution, or the scores of all samples. Leaves: one picture, or `Looked`.

torch is not imported here: overlays are drawn where the records are.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from bias_audit.records.results import Manifest, RecordError, SampleScores, SampleSheet
from bias_audit.terms import Subjects

SIDE = 256
# No record holds a picture of more pixels a side; a larger one is refused before it is decoded.
MOST_SIDE = 1024
# How many samples a dashboard shows of each kind.
PANEL = WORST = 8
# Black through violet and orange to pale yellow, lightness rising evenly: readable in grey and without red and green.
_STOPS = np.array([[0, 0, 4], [66, 10, 104], [147, 38, 103], [221, 81, 58], [252, 165, 10], [252, 255, 164]])


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


def overlay(picture: Image.Image, heat: npt.NDArray[np.float32], opacity: float = 0.65) -> Image.Image:
    """`heat` `(h, w)`, 0 to 1, over `picture`, enlarged by a whole factor to about SIDE pixels; no heat, no cover."""
    factor = max(1, round(SIDE / max(picture.size)))
    size = (picture.width * factor, picture.height * factor)
    codes = np.rint(255 * np.clip(np.nan_to_num(heat), 0, 1)).astype(np.uint8)
    levels = Image.fromarray(codes).resize(size, Image.Resampling.BILINEAR)
    cover = levels.point([round(opacity * level) for level in range(256)])
    levels.putpalette(_PALETTE)
    return Image.composite(levels.convert("RGB"), picture.resize(size, Image.Resampling.BICUBIC), cover)


def heat_colours(levels: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """The colours `(h, w, 3)`, 0 to 255, of `levels` `(h, w)`, 0 to 1."""
    ends = np.linspace(0, 1, len(_STOPS))
    return np.stack([np.interp(levels, ends, _STOPS[:, channel]) for channel in range(3)], axis=-1)


_PALETTE = np.rint(heat_colours(np.linspace(0, 1, 256)[None])).astype(np.uint8).tobytes()


class Looked(NamedTuple):
    """A sample's row, and the region with the largest share of its heatmap."""

    row: int
    region: str
    share: float


def most_looked(scores: SampleScores, regions: Sequence[str], count: int) -> list[Looked]:
    """The samples with the largest energy share on one of `regions` by the first method, the largest first.

    Those whose heatmap has nothing there are left out.
    """
    if not regions or not scores.ids:
        return []
    shares = np.stack([scores.of("energy_share", scores.methods[0], region) for region in regions], axis=1)
    shares = np.where(np.isfinite(shares), shares, 0)
    order = np.argsort(-shares.max(axis=1), kind="stable")[:count]
    found = [Looked(int(i), regions[int(shares[i].argmax())], float(shares[i].max())) for i in order]
    return [looked for looked in found if looked.share > 0]


def fixed_panel(sheet: SampleSheet, count: int) -> list[int]:
    """The same `count` samples at every audit: in turn one from each label x attributes cell."""
    seen: dict[tuple[str, ...], int] = {}
    turns = []
    for index, (label, values) in enumerate(zip(sheet.labels, sheet.attributes, strict=True)):
        cell = (str(label), *map(str, values))
        turns.append((seen.setdefault(cell, 0), cell, index))
        seen[cell] += 1
    return [index for _, _, index in sorted(turns)[:count]]


def worst(scores: SampleScores, subjects: Subjects, count: int) -> list[int]:
    """The samples with the most energy on spurious regions; with the least on objects where nothing is spurious.

    Those without a score come in neither.
    """
    names, direction = subjects.regions_with("spurious"), 1
    if not names:
        names, direction = subjects.regions_with("object"), -1
    if not names:
        return []
    shares = np.array([scores.of("energy_share", scores.methods[0], name) for name in names])
    order = np.argsort(-direction * np.nansum(shares, axis=0), kind="stable")
    return [int(i) for i in order if np.isfinite(shares[:, i]).any()][:count]

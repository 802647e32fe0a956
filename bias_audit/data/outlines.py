"""Outlines as masks of an image's pixels, and back.

Enters: a `Box`, `Polygons`, `Runs` or `Painted` picture and the image's size. Leaves: a bool `(H, W)` mask; or of a
mask its runs, its rings or its box.

What a file can ask for is bounded before any memory is taken for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import assert_never

import cv2
import numpy as np
import numpy.typing as npt
import pycocotools.mask
from PIL import Image

from bias_audit.data.annotations import Box, Outline, Painted, Polygons, Runs

Mask = npt.NDArray[np.bool_]

# A larger picture is refused before it is decoded, and so are outlines that are together longer than this: what reads
# them takes memory in proportion, and a file of a few bytes can ask for any number.
MOST_PIXELS = 1 << 27
MOST_OUTLINE = 1 << 22
# Formats for which Pillow starts a program that draws them, whatever the file is called.
PROGRAMS = ("EPS",)


class WrongSize(ValueError):
    """What is drawn is not of the size of its image."""


def mask_of(outline: Outline, size: tuple[int, int]) -> Mask:
    """The pixels of an image of `size` (height, width) that lie in an outline, bool `(H, W)`.

    Raises:
        ValueError: it cannot be drawn, or is not for an image of this size; does not say which.

    Example:
        >>> int(mask_of(Box(1, 1, 3, 4), (6, 6)).sum())
        6
    """
    if isinstance(outline, Box):
        return _boxed(outline, size)
    if isinstance(outline, Polygons):
        return _within(outline.rings, size)
    if isinstance(outline, Runs):
        return _unrolled(outline, size)
    if isinstance(outline, Painted):
        return _painted(outline, size)
    assert_never(outline)


def union(outlines: Iterable[Outline], size: tuple[int, int]) -> Mask:
    """The pixels that lie in any of the outlines.

    Raises:
        ValueError: as `mask_of`.
    """
    mask = np.zeros(size, dtype=np.bool_)
    for outline in outlines:
        mask |= mask_of(outline, size)
    return mask


def runs_of(mask: Mask) -> Runs:
    """A mask `(H, W)` as COCO's compressed runs.

    Example:
        >>> runs_of(np.eye(2, dtype=bool)).size
        (2, 2)
    """
    encoded = pycocotools.mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return Runs(encoded["counts"].decode(), mask.shape)


def rings_of(mask: Mask) -> Polygons:
    """A mask's outer outlines along the edges of its pixels: drawn again they cover the same pixels, its holes too.

    Example:
        >>> mask = np.zeros((6, 6), dtype=bool)
        >>> mask[1:4, 1:4] = True
        >>> rings_of(mask).rings
        ((1.0, 1.0, 1.0, 4.0, 4.0, 4.0, 4.0, 1.0),)
    """
    if not mask.any():
        return Polygons(())
    around = box_of(mask)
    left, top = int(around.left), int(around.top)
    part = mask[top : int(around.bottom), left : int(around.right)]
    # On a grid of twice the resolution the corners and edges of pixels have places of their own, and OpenCV, which
    # follows the outermost places of what is set, follows these.
    grid = np.zeros((2 * part.shape[0] + 1, 2 * part.shape[1] + 1), dtype=np.uint8)
    for row in range(3):
        for column in range(3):
            grid[row : row + 2 * part.shape[0] : 2, column : column + 2 * part.shape[1] : 2] |= part
    found, _ = cv2.findContours(grid, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    rings = (contour.reshape(-1, 2) / 2 + (left, top) for contour in found)
    return Polygons(tuple(tuple(ring.reshape(-1).tolist()) for ring in rings))


def box_of(mask: Mask) -> Box:
    """The smallest box around a mask that is not empty.

    Raises:
        ValueError: it is empty.
    """
    if not mask.any():
        raise ValueError("an empty mask has no box")
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return Box(float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))


def picture(path: Path) -> Image.Image:
    """The pixels as they are stored: masks are drawn on those, so a rotation in EXIF is not applied.

    Raises:
        ValueError: it does not decode, or has too many pixels; says which file.
    """
    try:
        Image.init()
        with Image.open(path, formats=[name for name in Image.OPEN if name not in PROGRAMS]) as found:
            if found.width * found.height > MOST_PIXELS:
                raise ValueError(
                    f"has {found.width} x {found.height} pixels, at most {MOST_PIXELS} are decoded: make it smaller"
                )
            found.load()
            return found
    # Damaged files make PIL raise SyntaxError, EOFError, struct.error, zlib.error and DecompressionBombError too.
    except Exception as error:
        raise ValueError(f"{path}: {error}: replace the file, or remove its row") from error


def _boxed(box: Box, size: tuple[int, int]) -> Mask:
    """The pixels whose centres lie in it: on its left and upper edge too, on the other two not."""
    rows, columns = np.arange(size[0]) + 0.5, np.arange(size[1]) + 0.5
    mask: Mask = ((box.top <= rows) & (rows < box.bottom))[:, None] & ((box.left <= columns) & (columns < box.right))
    return mask


def _within(rings: Sequence[Sequence[float]], size: tuple[int, int]) -> Mask:
    if any(len(ring) % 2 for ring in rings):
        raise ValueError("a polygon has an odd number of coordinates: expected x1, y1, x2, y2, ...")
    # Two points enclose nothing, but pycocotools would take their four numbers for a box.
    drawn = [list(ring) for ring in rings if len(ring) >= 6]
    if not drawn:
        return np.zeros(size, dtype=np.bool_)
    length = sum(_length(np.array(ring).reshape(-1, 2)) for ring in drawn)
    if not length <= MOST_OUTLINE:
        raise ValueError(
            f"polygons have edges of {length:.0f} pixels in all, expected at most {MOST_OUTLINE}: draw them simpler"
        )
    merged = pycocotools.mask.merge(pycocotools.mask.frPyObjects(drawn, *size))
    return _unrolled(Runs(merged["counts"].decode(), size), size)


def _length(corners: npt.NDArray[np.float64]) -> float:
    """The length of a closed outline as pixels are counted along it."""
    return float(np.abs(corners - np.roll(corners, 1, axis=0)).max(axis=1).sum())


def _unrolled(runs: Runs, size: tuple[int, int]) -> Mask:
    """Not by pycocotools: where the runs are too short it leaves what was in memory in the mask (`decode`) or never
    returns (`merge`)."""
    counts = _expanded(runs.counts) if isinstance(runs.counts, str) else runs.counts
    if tuple(runs.size) != tuple(size) or sum(counts) != size[0] * size[1] or min(counts) < 0:
        raise WrongSize(
            f"an RLE of size {tuple(runs.size)} with runs over {sum(counts)} pixels does not fit the image's "
            f"{tuple(size)}: export the annotations again"
        )
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(size[::-1]).T


def _expanded(counts: str) -> list[int]:
    """The run lengths in COCO's compressed text: little-endian groups of 5 bits; from the fourth run on, differences
    to the run before the last."""
    runs: list[int] = []
    value = shift = 0
    for character in counts:
        digit = ord(character) - 48
        if not 0 <= digit < 64:
            raise ValueError(f"an RLE holds the character {character!r}: export the annotations again")
        value |= (digit & 31) << shift
        shift += 5
        if shift > 60:
            raise ValueError("an RLE holds a number that no run has: export the annotations again")
        if not digit & 32:
            if digit & 16:
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError("an RLE ends within a number: export the annotations again")
    return runs


def _painted(painted: Painted, size: tuple[int, int]) -> Mask:
    found = picture(painted.path)
    if "A" in found.getbands():
        raise ValueError(f"{painted.path}: a mask has no transparency: save it as black and white")
    if (found.height, found.width) != tuple(size):
        raise WrongSize(
            f"{painted.path}: is {found.height} x {found.width} pixels (height x width), its image is {size[0]} x "
            f"{size[1]}: a mask has the size of its image"
        )
    if isinstance(painted.colour, int):
        if found.mode not in ("1", "L", "P"):
            raise ValueError(f"{painted.path}: expected one channel, got the mode {found.mode!r}: save it as indices")
        mask: Mask = np.asarray(found) == painted.colour
        return mask
    # An index says nothing of its colour: tools sort palettes as they like, and 0 may well be white.
    values = np.asarray(found.convert("RGB") if found.mode == "P" or painted.colour is not None else found)
    values = values.reshape(*values.shape[:2], -1)
    if painted.colour is not None:
        mask = (values == np.array(painted.colour, dtype=np.uint8)).all(axis=2)
        return mask
    mask = np.logical_or.reduce(values, axis=2)
    return mask

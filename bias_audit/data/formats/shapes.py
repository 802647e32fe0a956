"""What several formats share: numbers as shapes, masks as parts of an image, and images put together.

Enters: numbers and names as a file gives them. Leaves: outlines and `Annotations`, checked; of outlines and images what
a file is to hold.

What is wrong raises a `ValueError` that says what and what to do, but not where: the reader knows the place.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bias_audit.data.annotations import AnnotatedImage, Annotations, Box, Complaints, Outline, Polygons, Runs
from bias_audit.data.files import leaves, size_of
from bias_audit.data.outlines import MOST_PIXELS, Mask, box_of, mask_of, rings_of, runs_of

# A damaged coordinate must not reach what takes memory in proportion to it.
MOST_COORDINATE = 1e6
# Formats that hold shares of the width and height lose the last digits of a number: what is left is on no edge.
DIGITS = 6
# Corners of the polygon that stands for an ellipse.
CORNERS = 64


def number(value: str | None, name: str) -> float:
    """A number as text.

    Raises:
        ValueError: it is not there, is none, or is not finite.

    Example:
        >>> number(" 2.5", "xmin")
        2.5
    """
    try:
        found = float(value or "")
    except ValueError as error:
        raise ValueError(f"{name} is {value!r}: expected a number") from error
    if not math.isfinite(found):
        raise ValueError(f"{name} is {value!r}: expected a number")
    return found


def whole(value: str | None, name: str) -> int:
    """A whole number as text.

    Raises:
        ValueError: it is none.
    """
    found = number(value, name)
    if found != int(found):
        raise ValueError(f"{name} is {value!r}: expected a whole number")
    return int(found)


def box(left: float, top: float, right: float, bottom: float) -> Box:
    """A box by its edges.

    Raises:
        ValueError: it encloses nothing, or lies beyond all images.

    Example:
        >>> box(4, 0, 2, 3)
        Traceback (most recent call last):
        ...
        ValueError: a box has its left edge at 4 and its right edge at 2: exchange them, or remove it
    """
    _check((left, top, right, bottom))
    for low, high, names in ((left, right, ("left", "right")), (top, bottom, ("upper", "lower"))):
        if not low < high:
            raise ValueError(
                f"a box has its {names[0]} edge at {low:g} and its {names[1]} edge at {high:g}: exchange them, or "
                "remove it"
            )
    return Box(*(round(float(edge), DIGITS) for edge in (left, top, right, bottom)))


def polygon(*rings: Sequence[float]) -> Polygons:
    """Rings `x1, y1, x2, y2, ...` as one outline.

    Raises:
        ValueError: one has fewer than three corners, or lies beyond all images.
    """
    for ring in rings:
        if len(ring) < 6 or len(ring) % 2:
            raise ValueError(f"a polygon has {len(ring)} coordinates: expected x and y of three corners or more")
        _check(ring)
    return Polygons(tuple(tuple(round(float(value), DIGITS) for value in ring) for ring in rings))


def ellipse(x: float, y: float, across: float, down: float, degrees: float = 0.0) -> Polygons:
    """An ellipse by its centre, half its width and half its height, turned clockwise, as a polygon.

    Raises:
        ValueError: it encloses nothing, or lies beyond all images.
    """
    if not (across > 0 and down > 0):
        raise ValueError(f"an ellipse has the radii {across:g} and {down:g}: expected more than 0, or remove it")
    _check((x, y, across, down))
    angles = 2 * np.pi * np.arange(CORNERS) / CORNERS
    corners = np.stack([x + across * np.cos(angles), y + down * np.sin(angles)], axis=1)
    return polygon(_turned(corners, (x, y), degrees))


def turned(found: Box, degrees: float, about: tuple[float, float]) -> Polygons:
    """A box turned clockwise about a point.

    Example:
        >>> turned(Box(0, 0, 2, 1), 90, (0, 0)).rings[0]
        (0.0, 0.0, 0.0, 2.0, -1.0, 2.0, -1.0, 0.0)
    """
    corners = np.array(
        [(found.left, found.top), (found.right, found.top), (found.right, found.bottom), (found.left, found.bottom)]
    )
    return polygon(_turned(corners, about, degrees))


def size(height: int, width: int) -> tuple[int, int]:
    """An image's size.

    Raises:
        ValueError: it has no pixels, or too many.
    """
    if height < 1 or width < 1 or height * width > MOST_PIXELS:
        raise ValueError(f"has {width} x {height} pixels: expected 1 to {MOST_PIXELS}: correct its size")
    return height, width


def placed(part: Mask, top: int, left: int, size: tuple[int, int]) -> Runs:
    """A part of an image's mask as the whole.

    Raises:
        ValueError: it does not lie within the image.
    """
    height, width = part.shape
    if top < 0 or left < 0 or top + height > size[0] or left + width > size[1]:
        raise ValueError(
            f"a mask of {width} x {height} pixels at ({left}, {top}) does not lie within its image of {size[1]} x "
            f"{size[0]}: draw it again"
        )
    mask = np.zeros(size, dtype=np.bool_)
    mask[top : top + height, left : left + width] = part
    return runs_of(mask)


def part(outline: Outline, size: tuple[int, int]) -> tuple[Mask, int, int]:
    """The part of a mask that is not empty, and its upper and its left edge.

    Raises:
        ValueError: all of it is empty, or it does not fit the image.
    """
    mask = filled(outline, size)
    around = box_of(mask)
    top, left = int(around.top), int(around.left)
    return mask[top : int(around.bottom), left : int(around.right)], top, left


def filled(outline: Outline, size: tuple[int, int]) -> Mask:
    """A mask with at least one pixel.

    Raises:
        ValueError: it is empty, or does not fit the image.
    """
    mask = mask_of(outline, size)
    if not mask.any():
        raise ValueError("it covers no pixel of its image: this format cannot hold that: draw it again, or remove it")
    return mask


def around(outline: Outline, size: tuple[int, int] | None) -> Box:
    """The box around an outline; `size` is needed but for boxes and polygons.

    Raises:
        ValueError: it encloses nothing, or does not fit the image.
    """
    if isinstance(outline, Box):
        return box(outline.left, outline.top, outline.right, outline.bottom)
    if isinstance(outline, Polygons):
        xs = [x for ring in outline.rings for x in ring[::2]]
        ys = [y for ring in outline.rings for y in ring[1::2]]
        if xs:
            return box(min(xs), min(ys), max(xs), max(ys))
    if size is None:
        raise ValueError("its image's size is not known: give the folder of the images")
    return box_of(filled(outline, size))


def ringed(outline: Outline, size: tuple[int, int]) -> tuple[tuple[float, ...], ...]:
    """The rings of an outline that is no box; a mask's holes are lost.

    Raises:
        ValueError: it is empty, or does not fit the image.
    """
    drawn = outline if isinstance(outline, Polygons) else rings_of(filled(outline, size))
    rings = tuple(ring for ring in drawn.rings if len(ring) >= 6)
    if not rings:
        raise ValueError("it has no ring of three corners: this format cannot hold that: draw it again, or remove it")
    return rings


def collected(images: Iterable[AnnotatedImage], regions: Sequence[str], complaints: Complaints) -> Annotations:
    """Images as `Annotations`; `regions` come first, then those that are named nowhere else.

    Raises:
        Misfit: something was complained of; or an image stands twice, or is named outside of its folder; or a region
            has no name.
    """
    images = tuple(images)
    places: dict[str, str] = {}
    names = dict.fromkeys(regions)
    for image in images:
        first = places.setdefault(image.file, image.where)
        if leaves(image.file):
            complaints.add(
                image.where, f"image {image.file!r}: is not in the folder of the images: write its path below that"
            )
        elif first is not image.where:
            complaints.add(image.where, f"image {image.file!r}: stands in {first} too: keep one of them")
        names |= dict.fromkeys(annotation.region for annotation in image.annotations)
        if any(not annotation.region.strip() for annotation in image.annotations):
            complaints.add(image.where, f"image {image.file!r}: something in it has no label: give it one")
    complaints.end()
    return Annotations(images, tuple(names))


def sized(annotations: Annotations, images: Path | None) -> Annotations:
    """The annotations with every image's size, read from its header in the folder `images` where it is not known.

    Raises:
        Misfit: one is not known, or not to be read: a line for each.
    """
    wrong = Complaints()
    found = []
    for image in annotations.images:
        if image.size is not None:
            found.append(image)
        elif images is None:
            wrong.add(image.where, f"image {image.file!r}: its size is not known: give the folder of the images")
        elif (header := wrong.attempt(lambda image=image: size_of(images / image.file))) is not None:  # type: ignore[misc]
            found.append(replace(image, size=header))
    wrong.end()
    return replace(annotations, images=tuple(found))


def _turned(corners: npt.NDArray[np.float64], about: tuple[float, float], degrees: float) -> tuple[float, ...]:
    angle = np.deg2rad(degrees)
    matrix = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    found: list[float] = ((corners - about) @ matrix + about).reshape(-1).tolist()
    # Of -0.0 and the like nothing is left.
    return tuple(round(value, DIGITS) + 0.0 for value in found)


def _check(values: Iterable[float]) -> None:
    for value in values:
        if not abs(value) <= MOST_COORDINATE:
            raise ValueError(f"a coordinate is {value:g}: expected at most {MOST_COORDINATE:g} pixels: correct it")

"""Images as detectors take them, and what those find as outlines in the image that is stored.

Enters: a folder of images. Leaves: the files in it; each as a `Picture`, three channels of 8 bits and no larger than a
detector has use for; masks and boxes in it as outlines at the size of the file's pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from bias_audit.data.annotations import Box, Complaints, Misfit, Runs
from bias_audit.data.files import files_in, unfound
from bias_audit.data.outlines import Mask, picture, runs_of
from bias_audit.data.tables import read_labels

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
# Detectors shrink to about 1333 pixels themselves; a mask per person at the size of a camera's pictures takes
# gigabytes.
MOST_SIDE = 2048


@dataclass(frozen=True)
class Picture:
    """An image to look at, and the (height, width) of the file that it was read from."""

    image: Image.Image
    size: tuple[int, int]

    def runs(self, mask: Mask) -> Runs:
        """A mask of the image's pixels as an outline in the file; what is disjoint stays so, and nothing is rounded."""
        if mask.shape != self.size:
            # Each pixel takes what lies at its centre.
            rows, columns = (
                (2 * np.arange(most) + 1) * few // (2 * most) for most, few in zip(self.size, mask.shape, strict=True)
            )
            mask = mask[np.ix_(rows, columns)]
        return runs_of(mask)

    def box(self, left: float, top: float, right: float, bottom: float) -> Box | None:
        """Edges in the image's pixels as a box in the file, within its borders; None where nothing is left of it."""
        height, width = self.size
        across, down = width / self.image.width, height / self.image.height
        box = Box(
            min(max(left * across, 0.0), width),
            min(max(top * down, 0.0), height),
            min(max(right * across, 0.0), width),
            min(max(bottom * down, 0.0), height),
        )
        return box if box.left < box.right and box.top < box.bottom else None


def image_files(folder: Path) -> tuple[str, ...]:
    """The names of all images below a folder, with "/", in alphabetical order; hidden ones are left out.

    Raises:
        Misfit: it is no folder, has no image, or has some whose names are not text in UTF-8.
    """
    if not folder.is_dir():
        raise Misfit([f"{folder}: is no folder: give the folder of the images"])
    found = [name for name in files_in(folder) if PurePosixPath(name).suffix.lower() in SUFFIXES]
    if not found:
        raise Misfit([f"{folder}: has no image ({', '.join(sorted(SUFFIXES))}): give the folder of the images"])
    wrong = [name for name in found if not _is_text(name)]
    if wrong:
        raise Misfit([f"{folder}: the name of image {name!r} is not UTF-8: rename it" for name in wrong])
    return tuple(found)


def chosen_files(folder: Path, only: Path | None) -> tuple[str, ...]:
    """Those images of a folder that are rows of a table of labels, as `image_files` has them; without a table all.

    Raises:
        Misfit: as `image_files`; or rows that are wrong, or name what is no image of the folder: all of them.
    """
    found = image_files(folder)
    if only is None:
        return found
    wrong = Complaints()
    rows, _ = read_labels(only, (), None, wrong)
    names = frozenset(found)
    for row in rows:
        if row.file not in names:
            reason = unfound(row.file, folder) or f"its name does not end in {', '.join(sorted(SUFFIXES))}"
            wrong.add(row.where, f"image {row.file!r}: {reason}")
    if not rows and not wrong.lines:
        wrong.add(str(only), "has no row below its header: list the images to look at")
    wrong.end()
    chosen = {row.file for row in rows}
    return tuple(name for name in found if name in chosen)


def opened(path: Path) -> Picture:
    """An image with the pixels as they are stored, shrunk if it is longer than `MOST_SIDE`.

    Raises:
        ValueError: it does not decode, is too large, or has more than 8 bits per channel; says which file.
    """
    found = picture(path)
    if found.mode.startswith(("I", "F")):
        raise ValueError(f"{path}: expected 8 bits per channel, got the mode {found.mode!r}: scale it to 8 bits")
    size = (found.height, found.width)
    image, taken = found.convert("RGB"), taken_size(size)
    if taken != size:
        image = image.resize(taken[::-1], Image.Resampling.BILINEAR, reducing_gap=2.0)
    return Picture(image, size)


def taken_size(size: tuple[int, int]) -> tuple[int, int]:
    """The size (height, width) in which an image of this size is looked at.

    Example:
        >>> taken_size((3000, 4000)), taken_size((480, 640))
        ((1536, 2048), (480, 640))
    """
    scale = min(1.0, MOST_SIDE / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True

"""What lies where in which image, as an editor or a detector says it: what every annotation format is read into.

Enters: what the readers in `formats` find in a file. Leaves: `Annotations`, checked but for what only the pixels tell,
or one `Misfit` with all that is wrong. Outlines become masks in `outlines`.

Neither torch nor NumPy is imported here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

Found = TypeVar("Found")


@dataclass(frozen=True)
class Box:
    """A rectangle by its edges in pixels from the upper left corner of the image, fractions allowed."""

    left: float
    top: float
    right: float
    bottom: float


@dataclass(frozen=True)
class Polygons:
    """The union of rings `(x1, y1, x2, y2, ...)` in pixels, each closed by itself."""

    rings: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Runs:
    """Lengths of runs of zeros and ones in turn, column by column: numbers, or COCO's compressed text."""

    counts: tuple[int, ...] | str
    size: tuple[int, int]


@dataclass(frozen=True)
class Painted:
    """A picture of the image's size: where it is not black; or where it has a colour, (R, G, B) or an index."""

    path: Path
    colour: tuple[int, int, int] | int | None = None


Outline = Box | Polygons | Runs | Painted


@dataclass(frozen=True)
class Annotation:
    """One thing in one image.

    `score`, 0 to 1, is a detector's. `source` says what drew it, "" where that is not known. `instance` counts the
    things of an image, so that a person's face is known to be hers; None where it is not known.
    """

    region: str
    outline: Outline
    score: float | None = None
    source: str = ""
    instance: int | None = None


@dataclass(frozen=True)
class AnnotatedImage:
    """An image and what is annotated in it.

    `file` is its path below the folder of the images, with "/". `size` is (height, width), None where the format does
    not say. `where` is the place in the annotation file, for errors.
    """

    file: str
    size: tuple[int, int] | None
    annotations: tuple[Annotation, ...]
    where: str


@dataclass(frozen=True)
class Annotations:
    """Annotated images in the order of their files, and the names of all regions, those on no image too.

    `groups` are pairs of a region's name and that of the group it belongs to (COCO's supercategories).

    Example:
        >>> hair = Annotation("hair", Box(2, 0, 6, 3))
        >>> Annotations((AnnotatedImage("a.jpg", (8, 8), (hair,), "made up"),), ("hair",)).named(["hair"])
        ('hair',)
    """

    images: tuple[AnnotatedImage, ...]
    regions: tuple[str, ...]
    groups: tuple[tuple[str, str], ...] = ()

    def named(self, names: Sequence[str]) -> tuple[str, ...]:
        """The regions of these names, a group's name standing for all of its regions; unknown ones are left out."""
        grouped = [
            [region for region, group in self.groups if group == name] if name not in self.regions else [name]
            for name in names
        ]
        return tuple(region for found in grouped for region in found)


class Misfit(ValueError):
    """All that is wrong with some files: `lines`, one for each, with file, line and image, and what to do."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__(lines)
        self.lines = tuple(lines)

    def __str__(self) -> str:
        return "\n".join(self.lines)


@dataclass
class Complaints:
    """Collects what is wrong, to say it all at once.

    Example:
        >>> wrong = Complaints()
        >>> wrong.add("boxes.csv, line 3", "image 'a.jpg': left edge 9 beyond right edge 4: exchange them")
        >>> wrong.end()
        Traceback (most recent call last):
        ...
        bias_audit.data.annotations.Misfit: boxes.csv, line 3: image 'a.jpg': left edge 9 ... exchange them
    """

    lines: list[str] = field(default_factory=list)

    def add(self, where: str, what: str) -> None:
        """One thing that is wrong at one place."""
        self.lines.append(f"{where}: {what}")

    def attempt(self, read: Callable[[], Found], where: str = "") -> Found | None:
        """What `read` gives; None if it raises a `Misfit` or another `ValueError`, which is added.

        `where` is put before the text of an error that does not say it itself.
        """
        try:
            return read()
        except Misfit as error:
            self.lines += error.lines
        except ValueError as error:
            self.lines.append(f"{where}: {error}" if where else str(error))
        return None

    def end(self) -> None:
        """Raises:
        Misfit: something was added.
        """
        if self.lines:
            raise Misfit(self.lines)

"""Annotations as other tools write them, in and out: one module per format, each with the same three functions.

Enters: an export, a file or a folder, and where a format lacks sizes the folder of its images. Leaves: `Annotations`;
or a file or folder that the format's editors open.

The readers are our own since those of other packages stop at the first fault, without its line, or trust what they
read: here a `Misfit` says all that is wrong at once, and no name leaves its folder.

A module of a format has

    recognises(path) -> bool                        a quick look: it may well be one of these; raises nothing
    read(path, images) -> Annotations               raises `Misfit`
    write(annotations, path, images) -> None        whole or not at all; raises `Misfit`

`images` is the folder of the images or None. What a format cannot hold its module's docstring says; a writer that
would lose a region entirely refuses.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Protocol, cast

from bias_audit.data.annotations import Annotations, Misfit

# What the command line calls each, and its module here.
FORMATS: Mapping[str, str] = MappingProxyType(
    {
        "coco": "coco",
        "masks": "masks",
        "voc": "voc",
        "labelme": "labelme",
        "cvat": "cvat",
        "labelstudio": "label_studio",
        "yolo": "yolo",
        "boxes": "boxes",
    }
)


class Format(Protocol):
    """What a module of a format has."""

    def recognises(self, path: Path) -> bool:
        """Whether the file or folder may well be one of these."""

    def read(self, path: Path, images: Path | None) -> Annotations:
        """What is annotated in it."""

    def write(self, annotations: Annotations, path: Path, images: Path | None) -> None:
        """The annotations as a file or folder."""


def format_of(name: str) -> Format:
    """The module of a format.

    Raises:
        ValueError: there is none of this name.

    Example:
        >>> format_of("coco").__name__
        'bias_audit.data.formats.coco'
    """
    if name not in FORMATS:
        raise ValueError(f"unknown format {name!r}: expected one of {', '.join(FORMATS)}")
    return cast(Format, importlib.import_module(f"bias_audit.data.formats.{FORMATS[name]}"))


def recognised(path: Path) -> str:
    """The name of the one format that a file or folder has.

    Raises:
        Misfit: it is not there, or is of none, or of several.
    """
    if not path.exists():
        raise Misfit([f"{path}: is not there: give the path of annotations"])
    found = [name for name in FORMATS if format_of(name).recognises(path)]
    if len(found) != 1:
        kind = f"may be any of {', '.join(found)}" if found else f"is none of {', '.join(FORMATS)}"
        advice = "unpack it" if path.suffix.lower() == ".zip" else "name its format, or check the path"
        raise Misfit([f"{path}: {kind}: {advice}"])
    return found[0]


def read_annotations(path: str | Path, images: str | Path | None = None, format: str | None = None) -> Annotations:
    """What is annotated in a file or folder, in its `format` or else in the one it is recognised as.

    Args:
        path: the export.
        images: the folder of its images: YOLO and mask folders need it.
        format: a name of `FORMATS`.

    Raises:
        Misfit: all that is wrong with it.
        ValueError: an unknown format.
    """
    path = Path(path)
    return format_of(format or recognised(path)).read(path, None if images is None else Path(images))


def write_annotations(
    annotations: Annotations, path: str | Path, format: str, images: str | Path | None = None
) -> None:
    """Write annotations in a format, whole or not at all.

    Raises:
        Misfit: the format cannot hold them; says of each what.
        ValueError: an unknown format.
    """
    format_of(format).write(annotations, Path(path), None if images is None else Path(images))

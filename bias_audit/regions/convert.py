"""Annotations from one format into another, and what is lost on the way.

Enters: the path of annotations, and the format that is wanted. Leaves: a file or folder in it, and a line for each kind
of thing that it does not hold. What is lost is not looked up but measured: the new annotations are read again, and
compared with those they are made of.

Neither torch nor Lightning is imported here.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from bias_audit.data.annotations import AnnotatedImage, Annotations, Box, Complaints, Outline
from bias_audit.data.files import size_of, unfound
from bias_audit.data.formats.known import format_of, read_annotations, recognised, write_annotations
from bias_audit.data.outlines import Mask, mask_of, rings_of, union
from bias_audit.progress import Progress, silent

# Formats that are read with their images only.
_NEEDS_IMAGES = ("masks", "yolo")


@dataclass(frozen=True)
class Converted:
    """What was converted: the formats' names, how many images and things in them, and what was lost, a line each."""

    source: str
    to: str
    images: int
    annotations: int
    losses: tuple[str, ...]


@dataclass(frozen=True)
class _Change:
    """How one region of one image differs from what it was; IoU is of the masks, None where no size is known."""

    file: str
    iou: float | None
    filled: bool
    boxed: bool


def convert(
    source: Path,
    to: str,
    out: Path,
    format: str | None = None,
    images: Path | None = None,
    progress: Progress = silent,
) -> Converted:
    """Write annotations in another format, whole or not at all.

    Args:
        source: the annotations.
        to: a name of `FORMATS`.
        out: a path that is not there yet.
        format: that of `source`, or None to recognise it.
        images: the folder of the images.
        progress: called with (images done, images in all) while what is written is compared with what was read.

    Raises:
        Misfit: all that is wrong with `source`, or that the format cannot hold.
        ValueError: `out` is there already, an unknown format, or a format that needs `images`.

    Example:
        >>> convert(Path("regions.json"), "cvat", Path("annotations.xml")).losses  # doctest: +SKIP
        ('scores of 12 of 12 things are not held',)
    """
    writer = format_of(to)
    if out.exists():
        raise ValueError(f"{out}: is there already: name another path, or remove it")
    if to in _NEEDS_IMAGES and images is None:
        raise ValueError(f"the format {to} is read with its images only: give their folder with --images")
    known = format or recognised(source)
    before = read_annotations(source, images, known)
    if images is not None and to in _NEEDS_IMAGES:
        _check_files(before, images)
    out.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
    try:
        write_annotations(before, made / out.name, to, images)
        after = writer.read(made / out.name, images)
        things = sum(len(image.annotations) for image in before.images)
        found = Converted(known, to, len(before.images), things, losses(before, after, images, progress))
        (made / out.name).replace(out)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return found


def losses(
    before: Annotations, after: Annotations, images: Path | None = None, progress: Progress = silent
) -> tuple[str, ...]:
    """What of annotations is not in others made of them, a line for each kind of thing.

    Raises:
        Misfit: an image or a region of it is lost entirely.
    """
    return (*_outlines(before, after, images, progress), *_words(before, after))


def _check_files(annotations: Annotations, images: Path) -> None:
    """Raises:
    Misfit: something is annotated in images that are not in the folder: a line for each.
    """
    wrong = Complaints()
    for image in annotations.images:
        if image.annotations and unfound(image.file, images):
            wrong.add(image.where, f"image {image.file!r}: {unfound(image.file, images)}")
    wrong.end()


def _words(before: Annotations, after: Annotations) -> Iterator[str]:
    """What is lost beside the outlines."""
    things = [a for image in before.images for a in image.annotations]
    kept = [a for image in after.images for a in image.annotations]
    for name, had, has in (
        ("scores", [a.score for a in things], [a.score for a in kept]),
        ("sources", [a.source or None for a in things], [a.source or None for a in kept]),
        ("instances", [a.instance for a in things], [a.instance for a in kept]),
    ):
        # Of one thing there may be several now, which all have what it had.
        gone = {value for value in had if value is not None} - set(has)
        if gone:
            yield f"{name} of {sum(value in gone for value in had)} of {len(things)} things are not held"
    files = {image.file for image in after.images}
    empty = [image.file for image in before.images if image.file not in files]
    if empty:
        yield f"images without annotations are not held: {len(empty)} of {len(before.images)}"
    sizes = {image.file: image.size for image in after.images}
    unsized = sum(image.size is not None and sizes.get(image.file) is None for image in before.images)
    if unsized:
        yield f"sizes of {unsized} of {len(before.images)} images are not held"
    unused = [region for region in before.regions if region not in after.regions]
    if unused:
        yield f"regions that are on no image are not held: {', '.join(unused)}"
    if set(before.groups) - set(after.groups):
        yield f"groups of {len(set(before.groups) - set(after.groups))} of {len(before.regions)} regions are not held"


def _outlines(before: Annotations, after: Annotations, images: Path | None, progress: Progress) -> Iterator[str]:
    """How the outlines of each region have changed."""
    wrong = Complaints()
    changes: dict[str, list[_Change]] = {region: [] for region in before.regions}
    total = dict.fromkeys(before.regions, 0)
    found = {image.file: image for image in after.images}
    for number, image in enumerate(before.images):
        progress(number, len(before.images))
        there = found.get(image.file)
        if there is None and image.annotations:
            wrong.add(image.where, f"image {image.file!r}: this format loses it: use another")
        if there is None:
            continue
        if image.size is None and images is not None:
            image = replace(image, size=size_of(images / image.file))
        for region in dict.fromkeys(annotation.region for annotation in image.annotations):
            total[region] += 1
            if not _of(there, region):
                wrong.add(image.where, f"image {image.file!r}: {region!r}: this format loses it: use another")
            elif (change := _change(image, there, region)) is not None:
                changes[region].append(change)
    progress(len(before.images), len(before.images))
    wrong.end()
    for region, changed in changes.items():
        yield from _said(region, changed, total[region])


def _said(region: str, changed: list[_Change], total: int) -> Iterator[str]:
    boxed = [change for change in changed if change.boxed]
    filled = [change for change in changed if change.filled]
    measured = [(change.iou, change.file) for change in changed if change.iou is not None and change.iou < 1]
    if boxed:
        yield f"{region}: outlines in {len(boxed)} of {total} images are boxes now"
    if filled:
        yield f"{region}: holes in {len(filled)} of {total} images are filled"
    if measured:
        iou, file = min(measured)
        # What has changed is not said to be 1.000.
        floored = math.floor(iou * 1000) / 1000
        yield f"{region}: areas in {len(measured)} of {total} images have changed, to an IoU of {floored:.3f} in {file}"


def _of(image: AnnotatedImage, region: str) -> tuple[Outline, ...]:
    return tuple(annotation.outline for annotation in image.annotations if annotation.region == region)


def _change(before: AnnotatedImage, after: AnnotatedImage, region: str) -> _Change | None:
    """None where the outlines are the same."""
    had, has = _of(before, region), _of(after, region)
    if had == has:
        return None
    boxed = all(isinstance(o, Box) for o in has) and not all(isinstance(o, Box) for o in had)
    size = before.size or after.size
    if size is None:
        return _Change(before.file, None, False, boxed)
    old, new = union(had, size), union(has, size)
    both, either = int((old & new).sum()), int((old | new).sum())
    iou = both / either if either else 1.0
    # Holes that a box covers too are not worth a line of their own.
    filled = iou < 1 and not boxed and bool((_holes(old) & new).any())
    return _Change(before.file, iou, filled, boxed) if iou < 1 or boxed else None


def _holes(mask: Mask) -> Mask:
    return mask_of(rings_of(mask), (mask.shape[0], mask.shape[1])) & ~mask

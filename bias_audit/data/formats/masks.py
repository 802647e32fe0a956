"""Mask pictures: a folder with a folder per region, in it `<image's path without suffix>.png`, black but on the region.

Enters: such a folder and that of the images, which tells their names. Leaves: `Annotations` with one `Painted` picture
per image and region; or such a folder, with white on black.

What one region has in one image is one picture: scores, sources, instances and groups are not held, and boxes become
what they cover. Two images whose paths differ in their suffix only would share their pictures: written they are
refused.
"""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
from PIL import Image

from bias_audit.data.annotations import AnnotatedImage, Annotation, Annotations, Complaints, Misfit, Painted
from bias_audit.data.files import files_in, leaves, near, pictures_in, size_of, whole_folder
from bias_audit.data.formats import shapes
from bias_audit.data.outlines import union


def recognises(path: Path) -> bool:
    """Whether it is a folder of folders with a PNG below each, and nothing else."""
    if not path.is_dir():
        return False
    inside = [one for one in path.iterdir() if not one.name.startswith(".")]
    return bool(inside) and all(one.is_dir() and next(one.rglob("*.png"), None) is not None for one in inside)


def read(path: Path, images: Path | None) -> Annotations:
    """The pictures of `images`, sorted, each with the masks that it has.

    Raises:
        Misfit: no folder, no folder of images, an image that cannot be read, or a mask without an image.
    """
    if images is None or not images.is_dir():
        raise Misfit([f"{path}: masks are named as their images: give the folder of the images"])
    if not path.is_dir():
        raise Misfit([f"{path}: is not there: expected a folder with a folder of masks per region"])
    wrong = Complaints()
    regions = tuple(sorted(one.name for one in path.iterdir() if one.is_dir() and not one.name.startswith(".")))
    wrong.lines += missing(path, regions)
    # The masks may lie below the images.
    own = f"{os.path.relpath(path.resolve(), images.resolve())}/"
    files = [file for file in pictures_in(images) if not file.startswith(own)]
    stems = {str(PurePosixPath(file).with_suffix("")) for file in files}
    for region in regions:
        for mask in files_in(path / region, ".png"):
            if str(PurePosixPath(mask).with_suffix("")) not in stems:
                wrong.add(str(path / region / mask), f"has no image in {images}: remove it, or name it as its image")
    sizes = {file: wrong.attempt(lambda file=file: size_of(images / file)) for file in files}  # type: ignore[misc]
    wrong.end()
    found = (AnnotatedImage(file, sizes[file], painted(path, file, regions), f"{path}") for file in files)
    return Annotations(tuple(found), regions)


def painted(masks: Path, file: str, regions: Sequence[str]) -> tuple[Annotation, ...]:
    """What is painted for one image, given by its path below the folder of the images: of each region that it has."""
    name = Path(file).with_suffix(".png")
    paths = ((region, masks / region / name) for region in regions)
    return tuple(Annotation(region, Painted(path)) for region, path in paths if path.is_file())


def missing(masks: Path, regions: Sequence[str]) -> list[str]:
    """What is wrong with the folders of regions, a line each: none, one elsewhere, or one of other pictures."""
    known = sorted(one.name for one in masks.iterdir() if one.is_dir()) if masks.is_dir() else []
    lines = []
    for region in regions:
        if leaves(region):
            lines.append(f"region {region!r}: leaves the folder {masks}: a region has the name of a folder in it")
        elif not (masks / region).is_dir():
            lines.append(f"{masks / region}: no folder of region {region!r}: {near(region, known)}")
        elif not files_in(masks / region, ".png") and (others := pictures_in(masks / region)):
            lines.append(f"{masks / region / others[0]}: is no .png, nor is another there: save masks as that")
    return lines


def write(annotations: Annotations, path: Path, images: Path | None = None) -> None:
    """A folder of masks; sizes that the annotations lack are those of the pictures in `images`.

    Raises:
        Misfit: an image whose size is not known, one that would share its masks with another, an outline that does not
            fit, or a region that cannot name a folder.
    """
    wrong = Complaints()
    for region in annotations.regions:
        if leaves(region) or PureWindowsPath(region).name != region:
            wrong.add(f"region {region!r}", "cannot be the name of a folder: rename it")
    shared = Counter(PurePosixPath(image.file).with_suffix("") for image in annotations.images)
    for image in annotations.images:
        if shared[PurePosixPath(image.file).with_suffix("")] > 1:
            wrong.add(image.where, f"image {image.file!r}: another differs in its suffix only: rename one")
    sized = wrong.attempt(lambda: shapes.sized(annotations, images))
    wrong.end()
    assert sized is not None
    with whole_folder(path) as folder:
        for region in annotations.regions:
            (folder / region).mkdir()
        for image in sized.images:
            for region in dict.fromkeys(a.region for a in image.annotations):
                outlines = [a.outline for a in image.annotations if a.region == region]
                where = f"{image.where}: image {image.file!r}: {region!r}"
                mask = wrong.attempt(partial(union, outlines, image.size or (0, 0)), where)
                if mask is not None:
                    target = folder / region / PurePosixPath(image.file).with_suffix(".png")
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(_png(mask))
        wrong.end()


def _png(mask: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8) * 255).save(buffer, "PNG")
    return buffer.getvalue()

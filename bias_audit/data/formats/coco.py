"""COCO instances: one JSON file with `images`, `annotations` and `categories` (https://cocodataset.org/#format-data).

Enters: such a file, with polygons, RLE in both of its forms, or boxes alone; categories are regions, supercategories
groups. Leaves: `Annotations`; or such a file.

Beyond the standard an annotation may have `score`, `source` and `instance`, as `Annotation` has them; other tools keep
or ignore them. All that `Annotation` has is held, but a painted picture, which becomes an RLE. Annotations of images
that the file does not list are passed over: who cuts the images of a file down often leaves those in.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from bias_audit.atomic import write_whole
from bias_audit.data.annotations import (
    AnnotatedImage,
    Annotation,
    Annotations,
    Box,
    Complaints,
    Outline,
    Painted,
    Polygons,
    Runs,
)
from bias_audit.data.files import leaves
from bias_audit.data.formats import shapes
from bias_audit.data.json_files import read_json, top_level
from bias_audit.data.outlines import MOST_PIXELS, box_of, mask_of, runs_of
from bias_audit.located import Loc

# pycocotools allocates memory in proportion to a polygon's extent, so a damaged coordinate must not reach it.
_Coordinate = Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)]
_Side = Annotated[int, Field(ge=1, le=MOST_PIXELS)]
_ImageId = int | str


class _FromFile(BaseModel):
    """Keys that are not named here are ignored; those that are have the type they say."""

    model_config = ConfigDict(strict=True, frozen=True)


class _Image(_FromFile):
    id: _ImageId
    file_name: str
    height: _Side
    width: _Side


class _Category(_FromFile):
    id: int
    name: str
    supercategory: str | None = None


class _Rle(_FromFile):
    size: tuple[int, int]
    counts: list[int] | str


class _Annotation(_FromFile):
    image_id: _ImageId
    category_id: int
    segmentation: _Rle | list[list[_Coordinate]] | None = None
    bbox: Annotated[list[_Coordinate], Field(min_length=4, max_length=4)] | None = None
    # Other tools may mean something else by these.
    score: Any = None
    source: Any = None
    instance: Any = None


class _Coco(_FromFile):
    images: list[_Image]
    annotations: list[_Annotation]
    categories: list[_Category]


def recognises(path: Path) -> bool:
    """Whether it is JSON with COCO's three lists."""
    return (
        path.suffix.lower() == ".json"
        and path.is_file()
        and {"images", "annotations", "categories"} <= set(top_level(path))
    )


def read(path: Path, images: Path | None = None) -> Annotations:
    """The annotated images of a COCO file, in its order.

    Raises:
        Misfit: it cannot be read; an image stands twice or leaves its folder; an annotation has no outline or one that
            cannot be, or a category that is not there; two categories have one id.

    Example:
        >>> read(Path("instances.json")).regions  # doctest: +SKIP
        ('person', 'tie')
    """
    coco, where = read_json(path, _Coco, "COCO instances")
    wrong = Complaints()
    names: dict[int, str] = {}
    for index, category in enumerate(coco.categories):
        if names.setdefault(category.id, category.name) != category.name:
            other = f"the id {category.id} is also that of {names[category.id]!r}: ids are unique"
            wrong.add(where(("categories", index)), f"category {category.name!r}: {other}")
    files = _files(coco, where, wrong)
    alike = {str(number) for number in files}
    drawn: defaultdict[_ImageId, list[Annotation]] = defaultdict(list)
    for index, annotation in enumerate(coco.annotations):
        if annotation.image_id not in files:
            if str(annotation.image_id) in alike:
                said = f"the image_id {annotation.image_id!r} is a text here and a number there, or the reverse"
                wrong.add(where(("annotations", index)), f"{said}: write both alike")
            continue
        outline = _outline(annotation)
        what = _fault(annotation, names, outline)
        if what:
            wrong.add(where(("annotations", index)), f"image {files[annotation.image_id]!r}: {what}")
        elif outline is not None:
            drawn[annotation.image_id].append(_annotation(names[annotation.category_id], outline, annotation))
    wrong.end()
    found = tuple(
        AnnotatedImage(files[image.id], (image.height, image.width), tuple(drawn[image.id]), f"{path}")
        for image in coco.images
    )
    groups = ((c.name, c.supercategory) for c in coco.categories if c.supercategory)
    return Annotations(found, tuple(dict.fromkeys(names.values())), tuple(dict.fromkeys(groups)))


def write(annotations: Annotations, path: Path, images: Path | None = None) -> None:
    """A COCO file; ids count from 1 in the order of the regions, the images, and what is annotated in them.

    Sizes that the annotations lack are those of the pictures in `images`.

    Raises:
        Misfit: an image whose size is not known, or an outline that does not fit its image.
    """
    annotations, wrong = shapes.sized(annotations, images), Complaints()
    groups = dict(annotations.groups)
    categories = [
        {"id": number, "name": region, "supercategory": groups.get(region, "")}
        for number, region in enumerate(annotations.regions, 1)
    ]
    numbers = {region: number for number, region in enumerate(annotations.regions, 1)}
    listed: list[dict[str, Any]] = []
    drawn: list[dict[str, Any]] = []
    for number, image in enumerate(annotations.images, 1):
        height, width = image.size or (0, 0)
        listed.append({"id": number, "file_name": image.file, "height": height, "width": width})
        for annotation in image.annotations:
            where = f"{image.where}: image {image.file!r}: {annotation.region!r}"
            shape = wrong.attempt(partial(_shape, annotation.outline, (height, width)), where) or {}
            known = {"score": annotation.score, "source": annotation.source or None, "instance": annotation.instance}
            drawn.append(
                {
                    "id": len(drawn) + 1,
                    "image_id": number,
                    "category_id": numbers[annotation.region],
                    "iscrowd": 0,
                    **shape,
                    **{name: value for name, value in known.items() if value is not None},
                }
            )
    wrong.end()
    content = {"images": listed, "annotations": drawn, "categories": categories}
    write_whole(path, json.dumps(content, allow_nan=False).encode())


def _files(coco: _Coco, where: Callable[[Loc], str], wrong: Complaints) -> dict[_ImageId, str]:
    """Each image's file by its id."""
    files: dict[_ImageId, str] = {}
    seen: set[str] = set()
    for index, image in enumerate(coco.images):
        said = ""
        file = image.file_name.replace("\\", "/")
        if file in seen:
            said = f"two images have the file name {image.file_name!r}: file names are unique"
        elif image.id in files:
            said = f"the id {image.id!r} is also that of {files[image.id]!r}: ids are unique"
        elif leaves(image.file_name):
            said = f"{image.file_name!r} leaves the folder of the images: write the path below that folder"
        elif image.height * image.width > MOST_PIXELS:
            said = f"has {image.width} x {image.height} pixels, at most {MOST_PIXELS} are decoded: make it smaller"
        if said:
            wrong.add(where(("images", index)), f"image {image.file_name!r}: {said}")
        seen.add(file)
        files.setdefault(image.id, file)
    return files


def _outline(annotation: _Annotation) -> Outline | None:
    """What is drawn; a box only where nothing else is, since it is drawn around the rest."""
    drawn = annotation.segmentation
    if isinstance(drawn, _Rle):
        return Runs(drawn.counts if isinstance(drawn.counts, str) else tuple(drawn.counts), drawn.size)
    # Some tools write one empty ring where there is none.
    if drawn and any(drawn):
        return Polygons(tuple(tuple(ring) for ring in drawn))
    if annotation.bbox is not None:
        left, top, width, height = annotation.bbox
        return Box(left, top, left + width, top + height)
    return None


def _fault(annotation: _Annotation, names: dict[int, str], outline: Outline | None) -> str:
    """What is wrong with an annotation, and what to do; "" if nothing is."""
    if annotation.category_id not in names:
        return f"an annotation has the category {annotation.category_id}, which is not there: add it, or remove it"
    if outline is None:
        return "an annotation has no segmentation and no bbox: draw a polygon, RLE or box, or remove it"
    if isinstance(outline, Box) and (outline.right < outline.left or outline.bottom < outline.top):
        return f"a box is {annotation.bbox}: expected [left, top, width, height], none of the last two below 0"
    if isinstance(outline, Polygons) and any(len(ring) % 2 for ring in outline.rings):
        return "a polygon has an odd number of coordinates: expected x1, y1, x2, y2, ...: draw it again"
    return ""


def _annotation(region: str, outline: Outline, found: _Annotation) -> Annotation:
    is_share = isinstance(found.score, int | float) and not isinstance(found.score, bool) and 0 <= found.score <= 1
    is_number = isinstance(found.instance, int) and not isinstance(found.instance, bool)
    return Annotation(
        region,
        outline,
        score=float(found.score) if is_share else None,
        source=found.source if isinstance(found.source, str) else "",
        instance=found.instance if is_number else None,
    )


def _shape(outline: Outline, size: tuple[int, int]) -> dict[str, Any]:
    """`segmentation`, `bbox` and `area`, as other tools expect all three."""
    if isinstance(outline, Box):
        width, height = outline.right - outline.left, outline.bottom - outline.top
        return {"segmentation": [], "bbox": [outline.left, outline.top, width, height], "area": width * height}
    mask = mask_of(outline, size)
    if isinstance(outline, Painted) or (isinstance(outline, Polygons) and not outline.rings):
        # Without a ring it would be read as its box.
        outline = runs_of(mask)
    if isinstance(outline, Runs):
        drawn: Any = {"size": list(outline.size), "counts": outline.counts}
    else:
        drawn = [list(ring) for ring in outline.rings]
    box = box_of(mask) if mask.any() else Box(0.0, 0.0, 0.0, 0.0)
    bounds = [box.left, box.top, box.right - box.left, box.bottom - box.top]
    return {"segmentation": drawn, "bbox": bounds, "area": int(np.count_nonzero(mask))}

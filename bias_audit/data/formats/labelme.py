"""LabelMe: a JSON file per image, beside it or in a folder of their own (https://github.com/wkentaro/labelme).

    {"imagePath": "a.jpg", "imageHeight": 480, "imageWidth": 640, "imageData": null, "shapes": [
      {"label": "hair", "shape_type": "polygon", "points": [[1, 2], [30, 2], [30, 9]], "group_id": 1}]}

`shape_type` is polygon, rectangle or oriented_rectangle (its corners), circle (centre, a point of its rim), or mask:
`mask` is then a PNG in base64 of the rectangle whose first and last pixel the two points name. Lines and points have no
area and are refused. `imagePath` counts from the JSON file; one that leaves the folder counts by its last part.

Enters: such a file, or a folder of them. Leaves: `Annotations`, with `group_id` as instance; or a folder of such files,
laid out as the images, to be opened with them (`labelme IMAGES --output FOLDER`). Scores, sources, groups and regions
on no image are not held. Of polygons with several rings each ring becomes a shape.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
import posixpath
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict

from bias_audit.data.annotations import (
    AnnotatedImage,
    Annotation,
    Annotations,
    Box,
    Complaints,
    Misfit,
    Outline,
    Polygons,
)
from bias_audit.data.files import files_in, leaves, size_of, whole_folder
from bias_audit.data.formats import shapes
from bias_audit.data.json_files import read_json, top_level
from bias_audit.data.outlines import Mask

# The version of the files that are written: the first with masks.
VERSION = "5.2.1"


class _FromFile(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


class _Shape(_FromFile):
    label: str
    points: list[tuple[float, float]]
    shape_type: str | None = None
    group_id: int | None = None
    mask: str | None = None


class _Labels(_FromFile):
    imagePath: str
    imageHeight: int | None = None
    imageWidth: int | None = None
    shapes: list[_Shape]


def recognises(path: Path) -> bool:
    """Whether it, or the first JSON file in it, is of LabelMe."""
    found = path / next(iter(files_in(path, ".json")), "") if path.is_dir() else path
    return found.suffix.lower() == ".json" and {"shapes", "imagePath"} <= set(top_level(found))


def read(path: Path, images: Path | None = None) -> Annotations:
    """The images in the order of their files' paths.

    Raises:
        Misfit: there is no JSON file, one cannot be read, or a shape cannot be or has no area.
    """
    folder = path if path.is_dir() else path.parent
    files = [folder / name for name in files_in(folder, ".json")] if path.is_dir() else [path]
    if not files:
        raise Misfit([f"{path}: holds no .json file: give the folder that LabelMe saves to"])
    wrong = Complaints()
    found = (wrong.attempt(partial(_read, file, folder, images)) for file in files)
    listed = [image for image in found if image is not None]
    return shapes.collected(listed, (), wrong)


def write(annotations: Annotations, path: Path, images: Path | None = None) -> None:
    """A folder of JSON files; sizes that are not known are read from `images`.

    Raises:
        Misfit: a size is not known, an outline is empty or does not fit, or two images differ in their suffix only.
        ValueError: `path` is there already and not empty.
    """
    annotations = shapes.sized(annotations, images)
    wrong = Complaints()
    with whole_folder(path) as folder:
        for image in annotations.images:
            target = folder / PurePosixPath(image.file).with_suffix(".json")
            if target.exists():
                wrong.add(image.where, f"image {image.file!r}: another differs in its suffix only: rename one")
                continue
            height, width = image.size or (0, 0)
            drawn: list[dict[str, Any]] = []
            for annotation in image.annotations:
                where = f"{image.where}: image {image.file!r}: {annotation.region!r}"
                drawn += wrong.attempt(partial(_shapes, annotation, (height, width)), where) or []
            content: dict[str, Any] = {
                "version": VERSION,
                "flags": {},
                "shapes": drawn,
                "imagePath": PurePosixPath(image.file).name,
                "imageData": None,
                "imageHeight": height,
                "imageWidth": width,
            }
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(json.dumps(content, indent=1, allow_nan=False), encoding="utf-8")
        wrong.end()


def _read(path: Path, folder: Path, images: Path | None) -> AnnotatedImage:
    labels, where = read_json(path, _Labels, "a LabelMe file")
    name = _name(labels.imagePath, path.relative_to(folder).parent)
    wrong = Complaints()
    size = None
    # The place is looked up only where something is wrong.
    try:
        if labels.imageHeight is not None and labels.imageWidth is not None:
            size = shapes.size(labels.imageHeight, labels.imageWidth)
        elif images is not None and not leaves(name):
            size = size_of(images / name)
    except ValueError as error:
        wrong.add(where(("imagePath",)), f"image {name!r}: {error}")
    drawn = []
    for index, shape in enumerate(labels.shapes):
        try:
            outline = _outline(shape, size)
        except ValueError as error:
            wrong.add(where(("shapes", index)), f"image {name!r}: {shape.label!r}: {error}")
            continue
        drawn.append(Annotation(shape.label, outline, instance=shape.group_id))
    wrong.end()
    return AnnotatedImage(name, size, tuple(drawn), str(path))


def _name(said: str, inside: Path) -> str:
    """The image's path below the folder of the JSON files, which lie in it as the images do in theirs."""
    said = said.replace("\\", "/")
    beside = posixpath.normpath(posixpath.join(inside.as_posix(), said))
    if leaves(beside):
        beside = posixpath.normpath(posixpath.join(inside.as_posix(), posixpath.basename(said)))
    return beside


def _outline(shape: _Shape, size: tuple[int, int] | None) -> Outline:
    kind, points = shape.shape_type or "polygon", shape.points
    expected = {"rectangle": 2, "circle": 2, "mask": 2, "oriented_rectangle": 4}.get(kind, len(points))
    if len(points) != expected:
        raise ValueError(f"a {kind} has {len(points)} points: expected {expected}: draw it again, or remove it")
    if kind in ("polygon", "oriented_rectangle"):
        return shapes.polygon([value for point in points for value in point])
    if kind == "rectangle":
        (x1, y1), (x2, y2) = points
        return shapes.box(min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))
    if kind == "circle":
        (x, y), rim = points
        radius = math.dist((x, y), rim)
        return shapes.ellipse(x, y, radius, radius)
    if kind == "mask":
        return _pasted(shape, size)
    raise ValueError(f"a {kind} has no area: draw a polygon, mask or rectangle, or remove it")


def _pasted(shape: _Shape, size: tuple[int, int] | None) -> Outline:
    if size is None:
        raise ValueError("its image's size is not known: give the folder of the images")
    left, top, right, bottom = (int(shapes.number(str(v), "points")) for point in shape.points for v in point)
    part = _decoded(shape.mask or "", (bottom - top + 1, right - left + 1), size)
    return shapes.placed(part, top, left, size)


def _decoded(text: str, expected: tuple[int, int], most: tuple[int, int]) -> Mask:
    try:
        content = base64.b64decode(text, validate=True)
        with Image.open(io.BytesIO(content), formats=["PNG"]) as found:
            # Its size is checked before it is decoded.
            if (found.height, found.width) != expected or expected[0] > most[0] or expected[1] > most[1]:
                raise ValueError(
                    f"has {found.width} x {found.height} pixels, its points are of {expected[1]} x {expected[0]} in an "
                    f"image of {most[1]} x {most[0]}"
                )
            values = np.asarray(found.convert("L") if found.mode == "P" else found)
    # Damaged pictures make PIL raise errors of many kinds.
    except (Exception, binascii.Error) as error:
        raise ValueError(f"its mask cannot be read ({error}): draw it again, or remove it") from error
    mask: Mask = np.logical_or.reduce(values.reshape(*values.shape[:2], -1), axis=2)
    return mask


def _shapes(annotation: Annotation, size: tuple[int, int]) -> list[dict[str, Any]]:
    common: dict[str, Any] = {
        "label": annotation.region,
        "group_id": annotation.instance,
        "description": "",
        "flags": {},
    }
    outline = annotation.outline
    if isinstance(outline, Box):
        outline = shapes.around(outline, size)
        points = [[outline.left, outline.top], [outline.right, outline.bottom]]
        return [common | {"points": points, "shape_type": "rectangle", "mask": None}]
    if isinstance(outline, Polygons):
        return [
            common | {"points": np.reshape(ring, (-1, 2)).tolist(), "shape_type": "polygon", "mask": None}
            for ring in shapes.ringed(outline, size)
        ]
    part, top, left = shapes.part(outline, size)
    buffer = io.BytesIO()
    Image.fromarray(part).save(buffer, "PNG")
    corners = [[float(left), float(top)], [float(left + part.shape[1] - 1), float(top + part.shape[0] - 1)]]
    return [common | {"points": corners, "shape_type": "mask", "mask": base64.b64encode(buffer.getvalue()).decode()}]

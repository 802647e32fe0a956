"""Annotated images as they lie on disk, or in a dataset that somebody else wrote, as samples of an audit set.

Enters: a COCO instances file, a folder of mask pictures, or a map-style dataset; for files, a CSV whose rows choose
the images and give labels and attributes. Leaves: `PendingSample`s in that order, checked as far as files can be
without decoding an image, and the class names.
"""

from __future__ import annotations

import csv
import difflib
import operator
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from functools import partial
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import pycocotools.mask
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from bias_audit.data.samples import Decoded, PendingSample
from bias_audit.rng import preserved_rng

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch.utils.data import Dataset

# A larger picture is refused before it is decoded, and so are outlines that are together longer than this: what reads
# them takes memory in proportion, and a file of a few bytes can ask for any number.
MOST_PIXELS = 1 << 27
MOST_OUTLINE = 1 << 22
# Formats for which Pillow starts a program that draws them, whatever the file is called.
PROGRAMS = ("EPS",)
# pycocotools allocates memory in proportion to a polygon's extent, so a damaged coordinate must not reach it.
_Coordinate = Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)]
_Cell = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
_ImageId = int | str


class _FromFile(BaseModel):
    """Keys that are not named here are ignored; those that are have the type they say."""

    model_config = ConfigDict(strict=True, frozen=True)


class _Image(_FromFile):
    id: _ImageId
    file_name: str
    height: int
    width: int


class _Category(_FromFile):
    id: int
    name: str
    supercategory: str | None = None


class _Rle(_FromFile):
    size: tuple[int, int]
    counts: list[int] | str


_Outline = _Rle | list[list[_Coordinate]]


class _Annotation(_FromFile):
    image_id: _ImageId
    category_id: int
    segmentation: _Outline | None = None


class _Coco(_FromFile):
    images: list[_Image]
    annotations: list[_Annotation]
    categories: list[_Category]


class _Row(_FromFile):
    where: str
    file: _Cell
    label: _Cell
    attributes: dict[str, _Cell]


def read_coco(
    annotations: str | Path,
    images: str | Path,
    labels: str | Path,
    wanted: Mapping[str, Sequence[str]],
    minus: Mapping[str, Sequence[str]],
    attributes: Sequence[str] | None,
    classes: Sequence[str] | None,
) -> tuple[list[PendingSample], tuple[str, ...]]:
    """The images that the rows of the CSV `labels` choose from a COCO file, and the class names.

    A region of `wanted` is the union of its categories' annotations, less those of its categories in `minus`; an image
    without the former lacks the region.

    Raises:
        ValueError: see `AuditDataset.from_coco`.
    """
    coco = _read_json(annotations)
    rows, found = _read_labels(labels, attributes, classes)
    unknown = next((name for name in minus if name not in wanted), None)
    if unknown is not None:
        raise ValueError(f"minus: unknown region {unknown!r}: {_near(unknown, wanted)}")
    category_ids = partial(_category_ids, coco.categories, annotations)
    regions = {name: (category_ids(names), category_ids(minus.get(name, ()))) for name, names in wanted.items()}
    by_image: defaultdict[_ImageId, list[_Annotation]] = defaultdict(list)
    for annotation in coco.annotations:
        by_image[annotation.image_id].append(annotation)
    by_file: dict[str, _Image] = {}
    for image in coco.images:
        if by_file.setdefault(image.file_name, image) is not image:
            raise ValueError(f"{annotations}: two images have the file name {image.file_name!r}: file names are unique")

    samples = []
    for row in rows:
        if row.file not in by_file:
            raise ValueError(f"{row.where}: {annotations} has no image {row.file!r}: {_near(row.file, by_file)}")
        image = by_file[row.file]
        outlines = partial(_outlines, by_image[image.id], f"{annotations}: image {row.file!r}")
        drawn = {name: (outlines(plus), outlines(cut)) for name, (plus, cut) in regions.items() if outlines(plus)}
        decode = partial(_decode_coco, _existing(images, row), (image.height, image.width), drawn)
        samples.append(PendingSample(found.index(row.label), row.attributes, row.file, decode))
    return samples, found


def read_folder(
    images: str | Path,
    labels: str | Path,
    masks: str | Path,
    regions: Sequence[str],
    attributes: Sequence[str] | None,
    classes: Sequence[str] | None,
) -> tuple[list[PendingSample], tuple[str, ...]]:
    """The images that the rows of the CSV `labels` choose from a folder, with a mask picture per region, and the class
    names.

    Raises:
        ValueError: see `AuditDataset.from_folder`.
    """
    rows, found = _read_labels(labels, attributes, classes)
    for region in regions:
        if _leaves(region):
            raise ValueError(f"region {region!r}: leaves the folder {masks}: a region has the name of a folder in it")
        if not (Path(masks) / region).is_dir():
            folders = sorted(p.name for p in Path(masks).iterdir() if p.is_dir()) if Path(masks).is_dir() else []
            raise ValueError(f"{Path(masks) / region}: no folder of region {region!r}: {_near(region, folders)}")
    samples = []
    for row in rows:
        image = _existing(images, row)
        paths = {region: Path(masks) / region / Path(row.file).with_suffix(".png") for region in regions}
        drawn = {region: path for region, path in paths.items() if path.is_file()}
        decode = partial(_decode_folder, image, drawn)
        samples.append(PendingSample(found.index(row.label), row.attributes, row.file, decode))
    return samples, found


def read_dataset(
    dataset: Dataset[Any],
    regions: Sequence[str],
    attributes: Callable[[int, Any], Mapping[str, str | int]] | None,
    label: Callable[[Any], int] | None,
) -> list[PendingSample]:
    """Every item of a map-style dataset as a sample; its id is its index.

    Each item is read once here, for its label and attributes, and again when its image is needed.

    Raises:
        ValueError: see `AuditDataset.from_dataset`.
    """
    if not isinstance(dataset, Sized):
        raise ValueError(f"expected a map-style dataset with a length, got {type(dataset).__name__}: give it `__len__`")
    samples = []
    # The dataset may draw random numbers for each item; training draws as if nobody had looked.
    with preserved_rng(seed=0):
        for index in range(len(dataset)):
            _, target, _ = _item(dataset, index, regions)
            values = attributes(index, target) if attributes is not None else {}
            decode = partial(_decode_item, dataset, index, tuple(regions))
            samples.append(PendingSample(_label(index, target, label), values, str(index), decode))
    return samples


def _read_json(path: str | Path) -> _Coco:
    try:
        return _Coco.model_validate_json(Path(path).read_bytes())
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be read ({error.strerror}): give the path of a COCO instances file"
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{path}: {key or 'content'}: {first['msg']}: expected COCO instances") from error


def _read_labels(
    path: str | Path, attributes: Sequence[str] | None, classes: Sequence[str] | None
) -> tuple[list[_Row], tuple[str, ...]]:
    """The rows of the CSV, and the class names: those given, or the labels in alphabetical order."""
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            columns = list(reader.fieldnames or ())
            names = [c for c in columns if c not in ("file", "label")] if attributes is None else attributes
            _check_columns(path, columns, names)
            rows = [_row(f"{path}, line {reader.line_num}", cells, names) for cells in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: cannot be read as CSV in UTF-8: {error}") from error
    found = tuple(sorted({row.label for row in rows})) if classes is None else tuple(classes)
    for row in rows:
        if row.label not in found:
            raise ValueError(f"{row.where}: label {row.label!r} is not among `classes` {list(found)}")
    return rows, found


def _check_columns(path: str | Path, columns: Sequence[str], attributes: Sequence[str]) -> None:
    # DictReader would keep the last of two columns, and call an index that pandas wrote an attribute named "".
    odd = next((c for i, c in enumerate(columns) if not c or c in columns[:i]), None)
    if odd is not None:
        raise ValueError(f"{path}, line 1: column {odd!r} has no name or occurs twice: rename or remove it")
    for name in ("file", "label", *attributes):
        if name not in columns:
            raise ValueError(f"{path}, line 1: no column {name!r}: {_near(name, columns)}")


def _row(where: str, cells: Mapping[str | None, Any], attributes: Sequence[str]) -> _Row:
    if None in cells:
        raise ValueError(f"{where}: more values than columns: put a value that holds a comma in quotes")
    values = {name: cells[name] for name in attributes}
    try:
        return _Row(where=where, file=cells["file"], label=cells["label"], attributes=values)
    except ValidationError as error:
        column = error.errors()[0]["loc"][-1]
        raise ValueError(f"{where}: no value in column {column!r}: fill it in, or remove the row") from error


def _leaves(name: str) -> bool:
    """Whether a name from a file is that of something outside of the folder it is looked for in, here or elsewhere."""
    anywhere = PureWindowsPath(name)
    return bool(Path(name).anchor or anywhere.root) or ".." in anywhere.parts


def _existing(images: str | Path, row: _Row) -> Path:
    """The path of a row's image. Symbolic links are followed: whoever owns the folder has put them there."""
    if _leaves(row.file):
        raise ValueError(f"{row.where}: {row.file!r} leaves the folder {images}: write the path below that folder")
    path = Path(images) / row.file
    # Not `is_file`, which raises where a name is too long.
    if not os.path.isfile(path):
        raise ValueError(f"{row.where}: no file {path}: check the folder, or remove the row")
    return path


def _near(name: str, known: Iterable[str]) -> str:
    known = sorted(known)
    near = difflib.get_close_matches(name, known)
    if near:
        return "did you mean " + " or ".join(repr(n) for n in near) + "?"
    return f"there are {known[:20]}" + (" and more" if len(known) > 20 else "")


def _category_ids(categories: Sequence[_Category], path: str | Path, names: Sequence[str]) -> frozenset[int]:
    """The categories of these names; a name that is no category's stands for all of its supercategory."""
    if isinstance(names, str):
        raise ValueError(f"expected a list of categories, got one text: write [{names!r}]")
    found: set[int] = set()
    for name in names:
        ids = {c.id for c in categories if c.name == name} or {c.id for c in categories if c.supercategory == name}
        if not ids:
            known = {c.name for c in categories} | {c.supercategory for c in categories if c.supercategory}
            raise ValueError(f"{path}: unknown category {name!r}: {_near(name, known)}")
        found |= ids
    return frozenset(found)


def _outlines(annotations: Sequence[_Annotation], where: str, categories: frozenset[int]) -> list[_Outline]:
    outlines = [a.segmentation for a in annotations if a.category_id in categories]
    if not all(outlines):
        raise ValueError(f"{where}: an annotation has no segmentation: draw a polygon or RLE, or remove it")
    return [o for o in outlines if o]


def _decode_coco(
    path: Path, size: tuple[int, int], regions: Mapping[str, tuple[Sequence[_Outline], Sequence[_Outline]]]
) -> Decoded:
    picture = _picture(path)
    if (picture.height, picture.width) != size:
        raise ValueError(
            f"{path}: is {picture.height} x {picture.width} pixels (height x width), its annotations are for "
            f"{size[0]} x {size[1]}: give the images that were annotated"
        )
    masks = {name: _union(plus, size) & ~_union(cut, size) for name, (plus, cut) in regions.items()}
    return picture, {name: torch.from_numpy(mask) for name, mask in masks.items()}


def _union(outlines: Sequence[_Outline], size: tuple[int, int]) -> NDArray[np.bool_]:
    mask = np.zeros(size, dtype=np.bool_)
    for outline in outlines:
        mask |= _rle_mask(outline, size) if isinstance(outline, _Rle) else _polygon_mask(outline, size)
    return mask


def _polygon_mask(polygons: list[list[float]], size: tuple[int, int]) -> NDArray[np.bool_]:
    if any(len(p) % 2 for p in polygons):
        raise ValueError("a polygon has an odd number of coordinates: expected x1, y1, x2, y2, ...")
    # Two points enclose nothing, but pycocotools would take their four numbers for a box.
    polygons = [p for p in polygons if len(p) >= 6]
    if not polygons:
        return np.zeros(size, dtype=np.bool_)
    length = sum(_length(np.array(polygon).reshape(-1, 2)) for polygon in polygons)
    if length > MOST_OUTLINE:
        raise ValueError(
            f"polygons have edges of {length:.0f} pixels in all, expected at most {MOST_OUTLINE}: draw them simpler"
        )
    merged = pycocotools.mask.merge(pycocotools.mask.frPyObjects(polygons, *size))
    return _rle_mask(_Rle(size=size, counts=merged["counts"].decode()), size)


def _length(corners: NDArray[np.float64]) -> float:
    """The length of a closed outline as pixels are counted along it."""
    return float(np.abs(corners - np.roll(corners, 1, axis=0)).max(axis=1).sum())


def _rle_mask(rle: _Rle, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Runs of zeros and ones in turn, column by column.

    Not by pycocotools: where the runs are too short it leaves what was in memory in the mask (`decode`) or never
    returns (`merge`).
    """
    runs = _expand(rle.counts) if isinstance(rle.counts, str) else rle.counts
    if rle.size != size or sum(runs) != size[0] * size[1] or min(runs) < 0:
        raise ValueError(
            f"an RLE of size {rle.size} with runs over {sum(runs)} pixels does not fit the image's {size}: export the "
            "annotations again"
        )
    values = np.arange(len(runs)) % 2 == 1
    return np.repeat(values, runs).reshape(size[::-1]).T


def _expand(counts: str) -> list[int]:
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


def _picture(path: Path) -> Image.Image:
    """The pixels as they are stored: masks are drawn on those, so a rotation in EXIF is not applied."""
    try:
        Image.init()
        with Image.open(path, formats=[name for name in Image.OPEN if name not in PROGRAMS]) as picture:
            if picture.width * picture.height > MOST_PIXELS:
                raise ValueError(
                    f"has {picture.width} x {picture.height} pixels, at most {MOST_PIXELS} are decoded: make it smaller"
                )
            picture.load()
            return picture
    # Damaged files make PIL raise SyntaxError, EOFError, struct.error, zlib.error and DecompressionBombError too.
    except Exception as error:
        raise ValueError(f"{path}: {error}: replace the file, or remove its row") from error


def _decode_folder(path: Path, regions: Mapping[str, Path]) -> Decoded:
    return _picture(path), {name: torch.from_numpy(_painted(mask)) for name, mask in regions.items()}


def _painted(path: Path) -> NDArray[np.bool_]:
    """Where a mask picture is not black."""
    picture = _picture(path)
    if "A" in picture.getbands():
        raise ValueError(f"{path}: a mask has no transparency: save it as black and white")
    # An index says nothing of its colour: tools sort palettes as they like, and 0 may well be white.
    values = np.asarray(picture.convert("RGB") if picture.mode == "P" else picture)
    painted: NDArray[np.bool_] = np.logical_or.reduce(values.reshape(*values.shape[:2], -1), axis=2)
    return painted


def _decode_item(dataset: Any, index: int, regions: Sequence[str]) -> Decoded:
    image, _, masks = _item(dataset, index, regions)
    return image, masks


def _item(dataset: Any, index: int, regions: Sequence[str]) -> tuple[Tensor | Image.Image, Any, dict[str, Tensor]]:
    """An item's image, its target, and the mask of each region that it has."""
    item = dataset[index]
    if not isinstance(item, tuple | list) or len(item) < 2:
        raise ValueError(f"item {index}: expected (image, target), got {type(item).__name__}: return a tuple")
    image, target = item[0], item[1]
    if isinstance(image, Tensor) and image.is_floating_point():
        raise ValueError(
            f"item {index}: expected an image of uint8, got {image.dtype}: give the dataset without its own ToDtype or "
            "ToTensor; the transform belongs to the audit set"
        )
    if not isinstance(image, Image.Image | Tensor):
        raise ValueError(
            f"item {index}: expected a PIL image or a uint8 tensor, got {type(image).__name__}: return one"
        )
    size = (image.height, image.width) if isinstance(image, Image.Image) else (image.shape[-2], image.shape[-1])
    found = _drawn(index, target, size)
    if len(found) != len(regions):
        raise ValueError(
            f"item {index}: has {len(found)} masks or boxes, `regions` names {len(regions)}: return one for each name"
        )
    return image, target, {name: mask for name, mask in zip(regions, found, strict=True) if mask is not None}


def _drawn(index: int, target: Any, size: tuple[int, int]) -> list[Tensor | None]:
    """The masks in a target, or else its boxes as masks, None where a box is empty.

    A dataset that has both, as torchvision's COCO has, has a box around each mask, which says less.
    """
    values = _values(target)
    masks = [v.as_subclass(Tensor) for v in values if isinstance(v, tv_tensors.Mask)]
    boxes = [v for v in values if isinstance(v, tv_tensors.BoundingBoxes)]
    if masks:
        return [m for stack in masks for m in stack.reshape(-1, *stack.shape[-2:])]
    if not boxes:
        raise ValueError(
            f"item {index}: no tv_tensors.Mask or BoundingBoxes in its target ({type(target).__name__}): return them, "
            "or wrap the dataset with torchvision.datasets.wrap_dataset_for_transforms_v2"
        )
    return [mask for stack in boxes for mask in _filled(index, stack, size)]


def _filled(index: int, boxes: tv_tensors.BoundingBoxes, size: tuple[int, int]) -> list[Tensor | None]:
    """Per box the pixels whose centres lie in it: on its left and upper edge too, on the other two not."""
    if tuple(boxes.canvas_size) != size:
        raise ValueError(
            f"item {index}: its boxes are for an image of {tuple(boxes.canvas_size)}, its image is {size}: resize in "
            "the audit set's transform, which moves both"
        )
    if boxes.shape[-1] != 4:
        raise ValueError(f"item {index}: boxes of format {boxes.format.name} are rotated: return masks instead")
    corners = F.convert_bounding_box_format(
        boxes.as_subclass(Tensor).reshape(-1, 4), boxes.format, tv_tensors.BoundingBoxFormat.XYXY
    )
    rows, columns = torch.arange(size[0]) + 0.5, torch.arange(size[1]) + 0.5
    masks = [
        ((top <= rows) & (rows < bottom))[:, None] & ((left <= columns) & (columns < right))
        for left, top, right, bottom in corners
    ]
    return [mask if mask.any() else None for mask in masks]


def _values(target: Any) -> list[Any]:
    if isinstance(target, Mapping):
        # torchvision's COCO has the image's number among the values: an integer, but no label.
        return [value for key, value in target.items() if key != "image_id"]
    return list(target) if isinstance(target, tuple | list) else [target]


def _label(index: int, target: Any, label: Callable[[Any], int] | None) -> int:
    if label is not None:
        found = label(target)
    elif isinstance(target, Mapping) and "label" in target:
        found = target["label"]
    else:
        integers = [v for v in _values(target) if _is_integer(v)]
        if len(integers) != 1:
            raise ValueError(f"item {index}: has {len(integers)} integers in its target, not one: give `label=`")
        found = integers[0]
    try:
        # Of all that may hold a number this takes integers only: int, NumPy's, and tensors of one element.
        return operator.index(found)
    except TypeError as error:
        raise ValueError(f"item {index}: expected a class index as label, got {found!r}: give `label=`") from error


def _is_integer(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.ndim == 0 and not value.is_floating_point() and value.dtype != torch.bool
    return isinstance(value, int | np.integer) and not isinstance(value, bool)

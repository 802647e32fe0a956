"""Annotated images as they lie on disk, or in a dataset that somebody else wrote, as samples of an audit set.

Enters: `Annotations`, a folder of mask pictures, or a map-style dataset; for files, a CSV whose rows choose the images
and give labels and attributes. Leaves: `PendingSample`s in that order, checked as far as files can be without decoding
an image, and the class names.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence, Sized
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from bias_audit.data.annotations import Annotation, Annotations, Box, Complaints, Outline
from bias_audit.data.files import leaves, near, unfound
from bias_audit.data.formats import masks as mask_pictures
from bias_audit.data.formats import read_annotations
from bias_audit.data.outlines import WrongSize, mask_of, picture, union
from bias_audit.data.samples import Decoded, PendingSample
from bias_audit.data.tables import read_labels
from bias_audit.rng import preserved_rng

if TYPE_CHECKING:
    from torch.utils.data import Dataset


def read_annotated(
    annotations: str | Path,
    format: str | None,
    images: str | Path,
    labels: str | Path,
    wanted: Mapping[str, Sequence[str]],
    minus: Mapping[str, Sequence[str]],
    attributes: Sequence[str] | None,
    classes: Sequence[str] | None,
) -> tuple[list[PendingSample], tuple[str, ...]]:
    """The images that the rows of the CSV `labels` choose from annotations, and the class names.

    A region of `wanted` is the union of what is annotated as its names, less what is as those in `minus`; an image
    without the former lacks the region.

    Raises:
        Misfit: see `AuditDataset.from_annotations`.
    """
    for names in (*wanted.values(), *minus.values()):
        if isinstance(names, str):
            raise ValueError(f"expected a list of categories, got one text: write [{names!r}]")
    wrong = Complaints()
    known = wrong.attempt(lambda: read_annotations(annotations, images, format))
    rows, found = read_labels(labels, attributes, classes, wrong)
    for name in minus:
        if name not in wanted:
            wrong.add("minus", f"unknown region {name!r}: {near(name, wanted)}")
    if known is not None:
        _check_names(known, annotations, [n for names in (*wanted.values(), *minus.values()) for n in names], wrong)
    by_file = {image.file: image for image in known.images} if known is not None else {}
    for row in rows:
        if known is not None and row.file not in by_file and not leaves(row.file):
            wrong.add(row.where, f"{annotations} has no image {row.file!r}: {near(row.file, by_file)}")
        elif unfound(row.file, images):
            wrong.add(row.where, unfound(row.file, images))
    wrong.end()
    assert known is not None
    parts = {name: (known.named(names), known.named(minus.get(name, ()))) for name, names in wanted.items()}
    samples = []
    for row in rows:
        image = by_file[row.file]
        drawn = {
            name: (_outlines(image.annotations, plus), _outlines(image.annotations, cut))
            for name, (plus, cut) in parts.items()
            if _outlines(image.annotations, plus)
        }
        decode = partial(_decode_annotated, Path(images) / row.file, image.size, drawn)
        samples.append(PendingSample(found.index(row.label), row.attributes, row.file, decode, _boxed(drawn)))
    return samples, found


def read_folder(
    images: str | Path,
    labels: str | Path,
    masks: str | Path | None,
    regions: Sequence[str],
    attributes: Sequence[str] | None,
    classes: Sequence[str] | None,
) -> tuple[list[PendingSample], tuple[str, ...]]:
    """The images that the rows of the CSV `labels` choose from a folder, with a mask picture per region, and the class
    names.

    Raises:
        Misfit: see `AuditDataset.from_folder`.
    """
    wrong = Complaints()
    rows, found = read_labels(labels, attributes, classes, wrong)
    if masks is not None:
        wrong.lines += mask_pictures.missing(Path(masks), regions)
    elif regions:
        wrong.add("masks", f"is not given, which region {regions[0]!r} needs: name the folder of the masks")
    for row in rows:
        if unfound(row.file, images):
            wrong.add(row.where, unfound(row.file, images))
    wrong.end()
    samples = []
    for row in rows:
        painted = () if masks is None else mask_pictures.painted(Path(masks), row.file, regions)
        decode = partial(_decode_painted, Path(images) / row.file, {a.region: a.outline for a in painted})
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
            _, target, masks = _item(dataset, index, regions)
            values = attributes(index, target) if attributes is not None else {}
            decode = partial(_decode_item, dataset, index, tuple(regions))
            boxed = frozenset[str]() if _masks(target) else frozenset(masks)
            samples.append(PendingSample(_label(index, target, label), values, str(index), decode, boxed))
    return samples


def _check_names(known: Annotations, path: str | Path, names: Sequence[str], wrong: Complaints) -> None:
    groups = {group for _, group in known.groups}
    for name in dict.fromkeys(names):
        if not known.named([name]):
            wrong.add(str(path), f"unknown category {name!r}: {near(name, {*known.regions, *groups})}")


def _outlines(annotations: Sequence[Annotation], regions: Sequence[str]) -> tuple[Outline, ...]:
    return tuple(a.outline for a in annotations if a.region in regions)


def _boxed(drawn: Mapping[str, tuple[Sequence[Outline], Sequence[Outline]]]) -> frozenset[str]:
    """The regions whose outline is, wholly or in part, that of a box."""
    return frozenset(name for name, parts in drawn.items() if any(isinstance(o, Box) for part in parts for o in part))


def _decode_annotated(
    path: Path,
    size: tuple[int, int] | None,
    regions: Mapping[str, tuple[Sequence[Outline], Sequence[Outline]]],
) -> Decoded:
    found = picture(path)
    actual = (found.height, found.width)
    if size is not None and actual != tuple(size):
        raise WrongSize(
            f"{path}: is {found.height} x {found.width} pixels (height x width), its annotations are for "
            f"{size[0]} x {size[1]}: give the images that were annotated"
        )
    masks = {}
    for name, (plus, cut) in regions.items():
        drawn = union(plus, actual)
        left = drawn & ~union(cut, actual)
        # What is cut away as a whole is not there; that an outline holds no pixel is for who drew it to know.
        if left.any() or not drawn.any():
            masks[name] = torch.from_numpy(left)
    return found, masks


def _decode_painted(path: Path, regions: Mapping[str, Outline]) -> Decoded:
    found = picture(path)
    size = (found.height, found.width)
    return found, {name: torch.from_numpy(mask_of(outline, size)) for name, outline in regions.items()}


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
    masks = _masks(target)
    boxes = [v for v in _values(target) if isinstance(v, tv_tensors.BoundingBoxes)]
    if masks:
        return [m for stack in masks for m in stack.reshape(-1, *stack.shape[-2:])]
    if not boxes:
        raise ValueError(
            f"item {index}: no tv_tensors.Mask or BoundingBoxes in its target ({type(target).__name__}): return them, "
            "or wrap the dataset with torchvision.datasets.wrap_dataset_for_transforms_v2"
        )
    return [mask for stack in boxes for mask in _filled(index, stack, size)]


def _masks(target: Any) -> list[Tensor]:
    return [value.as_subclass(Tensor) for value in _values(target) if isinstance(value, tv_tensors.Mask)]


def _filled(index: int, boxes: tv_tensors.BoundingBoxes, size: tuple[int, int]) -> list[Tensor | None]:
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
    masks = [torch.from_numpy(mask_of(Box(*edges), size)) for edges in corners.tolist()]
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

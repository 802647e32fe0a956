"""A map-style dataset that somebody else wrote, such as torchvision's, as samples of an audit set.

Enters: a dataset whose items hold an image, a target with masks or boxes, and a label. Leaves: a `PendingSample` for
each item, in order.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence, Sized
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from bias_audit.data.annotations import Box
from bias_audit.data.outlines import mask_of
from bias_audit.data.samples import Decoded, PendingSample
from bias_audit.rng import preserved_rng

if TYPE_CHECKING:
    from torch.utils.data import Dataset


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

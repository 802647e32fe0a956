"""Whether the map of a class finds that class's object: weakly supervised localization, and a two-object forced choice.

Enters: upsampled maps `(..., B, H, W)` and true boxes, or maps at their own resolution and the masks of two objects.
Leaves: `Boxes`, and `Scored` values with whether each is valid. Both measures are of the Grad-CAM paper (arXiv
1610.02391, sections 4.1 and 5.1). Neither is part of an audit; boxes are found on the CPU.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage
from torch import Tensor
from torchvision.ops import box_iou

from bias_audit.localization import Scored, energy_share, enrichment, project_regions


class Boxes(NamedTuple):
    """Boxes `(..., B, 4)` and whether each is valid, `(..., B)`.

    `corners` are float32 `(x0, y0, x1, y1)` in pixels, from the left edge of the first column to the right edge of the
    last: `x1 - x0` is the width. Of a box that is not valid they are 0.
    """

    corners: Tensor
    valid: Tensor


def bounding_boxes(maps: Tensor, threshold: float = 0.15) -> Boxes:
    """The box around the largest segment of each map `(..., B, H, W)`, cut at `threshold` times its maximum.

    Segments are connected through edges and corners of pixels; of several that are largest it is the first in reading
    order. Not valid where the map is silent or not finite. Maps are upsampled; the threshold is the paper's (arXiv
    1610.02391, section 4.1).

    Raises:
        ValueError: a threshold that is not in [0, 1).

    Example:
        >>> boxes = bounding_boxes(torch.tensor([[[0.0, 0.9, 0.0, 0.0], [0.0, 1.0, 0.8, 0.1]]]))
        >>> boxes.corners
        tensor([[1., 0., 3., 2.]])
    """
    if not 0 <= threshold < 1:
        raise ValueError(f"expected a threshold in [0, 1), got {threshold}")
    flat = maps.flatten(0, -3)
    peak = flat.amax(dim=(1, 2))
    valid = (peak > 0) & peak.isfinite()
    hot = (flat > threshold * peak[:, None, None]) & valid[:, None, None]
    corners = torch.from_numpy(_around_largest(hot.cpu().numpy())).to(maps.device)
    return Boxes(corners.view(*maps.shape[:-2], 4), valid.view(maps.shape[:-2]))


def _around_largest(hot: npt.NDArray[np.bool_]) -> npt.NDArray[np.float32]:
    # All images at once: one does not touch the next.
    neighbours = np.zeros((3, 3, 3), dtype=bool)
    neighbours[1] = True
    labels, count = ndimage.label(hot, structure=neighbours)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    image = np.zeros(count + 1, dtype=np.intp)
    image[labels] = np.arange(len(hot))[:, None, None]
    largest = np.zeros(len(hot), dtype=np.intp)
    # Of an image's segments the one assigned last stays: the largest, and of those the first.
    ascending = np.lexsort((-np.arange(1, count + 1), sizes[1:])) + 1
    largest[image[ascending]] = ascending
    segment = (labels == largest[:, None, None]) & hot
    columns, rows = segment.any(axis=1), segment.any(axis=2)
    edges = [(line.argmax(axis=1), line.shape[1] - line[:, ::-1].argmax(axis=1)) for line in (columns, rows)]
    (left, right), (top, bottom) = edges
    corners = np.stack([left, top, right, bottom], axis=1).astype(np.float32)
    return np.where(largest[:, None] > 0, corners, np.float32(0))


def localized(boxes: Boxes, truth: Tensor, threshold: float = 0.5) -> Scored:
    """Whether each box covers an object: 1 where its intersection over union with any true box reaches `threshold`.

    `boxes` are `(..., B, 4)`, values `(..., B)`. `truth` `(B, G, 4)` holds the same corners of up to G objects, rows of
    NaN where an image has fewer. Not valid where the box is not, or the image has no true box.

    Example:
        >>> boxes = Boxes(torch.tensor([[0.0, 0.0, 4.0, 2.0]]), torch.tensor([True]))
        >>> localized(boxes, torch.tensor([[[0.0, 0.0, 2.0, 2.0]]])).value
        tensor([1.])
    """
    _check_truth(boxes, truth)
    corners = boxes.corners.reshape(-1, *boxes.corners.shape[-2:])
    # A true box of NaN overlaps with nothing: no comparison with NaN holds.
    covers = torch.vmap(box_iou)(corners.movedim(1, 0), truth) >= threshold
    value = covers.any(dim=2).T.reshape(boxes.valid.shape)
    valid = boxes.valid & truth.isfinite().all(dim=2).any(dim=1)
    return Scored((value & valid).float(), valid)


def localization_error(
    boxes: Boxes, classes: Tensor, labels: Tensor, truth: Tensor, k: int, threshold: float = 0.5
) -> Scored:
    """Top-k localization error of each image, `(B,)`: 1 unless one of the k first classes is right and well located.

    `boxes` `(K, B, 4)` are those of the maps of the classes int64 `(K, B)`, the model's best first, K at least k.
    `labels` are int64 `(B,)`, `truth` `(B, G, 4)` the boxes of the label's objects as in `localized`. A silent map has
    no box and finds nothing. Not valid where the image has no true box. It is the error of ILSVRC (arXiv 1409.0575,
    section 4.2), which the Grad-CAM paper reports for k of 1 and 5 (arXiv 1610.02391, section 4.1).

    Raises:
        ValueError: k is not between 1 and K.

    Example:
        >>> boxes = Boxes(torch.tensor([[[0.0, 0.0, 2.0, 2.0]], [[0.0, 0.0, 4.0, 2.0]]]), torch.ones(2, 1).bool())
        >>> classes, labels, truth = torch.tensor([[7], [3]]), torch.tensor([3]), torch.tensor([[[0.0, 0.0, 4.0, 2.0]]])
        >>> [localization_error(boxes, classes, labels, truth, k).value.item() for k in (1, 2)]
        [1.0, 0.0]
    """
    if not 1 <= k <= len(classes):
        raise ValueError(f"expected k from 1 to {len(classes)}, as many as there are classes an image, got {k}")
    if classes.shape != boxes.valid.shape:
        raise ValueError(f"expected a class for each box, {tuple(boxes.valid.shape)}, got {tuple(classes.shape)}")
    found = localized(boxes, truth, threshold).value[:k] > 0
    hit = (found & (classes[:k] == labels)).any(dim=0)
    valid = truth.isfinite().all(dim=2).any(dim=1)
    return Scored((~hit & valid).float(), valid)


def _check_truth(boxes: Boxes, truth: Tensor) -> None:
    if truth.ndim != 3 or truth.shape[0] != boxes.valid.shape[-1] or truth.shape[2] != 4:
        raise ValueError(
            f"expected true boxes ({boxes.valid.shape[-1]}, G, 4), G for each of the {boxes.valid.shape[-1]} images, "
            f"got {tuple(truth.shape)}: of one box an image make `truth[:, None]`"
        )


def forced_choice(maps: Tensor, masks: Tensor, target: Tensor) -> Scored:
    """Which of two objects does a map point at? 1 where at the one it explains, 0 at the other, 0.5 at both alike.

    `maps` `(..., B, *grid)` are at their own resolution, values `(..., B)`; `masks` bool `(B, 2, *places)`; `target`
    int64 `(B,)` says which of the two the map was made for, 0 or 1. Energy per area decides, so that the larger object
    is not favoured; alike are two that agree to five digits. Chance is 0.5, and of maps made for each of the two a
    method that does not discriminate gets just that. Not valid where the map is silent or an object is missing.

    It stands in for the human study of class discrimination in the Grad-CAM paper (arXiv 1610.02391, section 5.1).

    Raises:
        ValueError: masks that are not of two objects, or a target that is not 0 or 1.

    Example:
        >>> masks = torch.tensor([[[[True, True, False, False]], [[False, False, False, True]]]])
        >>> forced_choice(torch.tensor([[[2.0, 2.0, 0.0, 3.0]]]), masks, torch.tensor([1])).value
        tensor([1.])
    """
    if masks.ndim < 4 or masks.shape[1] != 2:
        raise ValueError(f"expected the masks of two objects (B, 2, H, W), got {tuple(masks.shape)}")
    if target.shape != masks.shape[:1] or not ((target == 0) | (target == 1)).all():
        raise ValueError(f"expected as target 0 or 1 for each of {len(masks)} images, got {target.tolist()}")
    regions = project_regions(masks, maps.shape[2 - masks.ndim :])
    density = enrichment(energy_share(maps, regions), regions.area)
    which = target[:, None].expand(*density.value.shape[:-1], 1)
    own, other = density.value.gather(-1, which)[..., 0], density.value.gather(-1, 1 - which)[..., 0]
    alike = torch.isclose(own, other, rtol=1e-5, atol=0)
    valid = density.valid.all(dim=-1)
    return Scored(torch.where(valid, torch.where(alike, 0.5, (own > other).float()), 0), valid)

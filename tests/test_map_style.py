"""A dataset that somebody else wrote, such as torchvision's, as an audit set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from annotated_images import (
    HEIGHT,
    ONE_MASK,
    WIDTH,
    Items,
    annotation,
    block,
    grey_levels,
    masks_of,
    noise,
    rectangle,
    write_coco,
)
from torch.utils.data import IterableDataset
from torchvision import datasets, tv_tensors
from torchvision.transforms import v2

from bias_audit.data.dataset import AuditDataset


def boxes(values: Any, format: str = "XYXY", size: tuple[int, int] = (HEIGHT, WIDTH)) -> tv_tensors.BoundingBoxes:
    return tv_tensors.BoundingBoxes(values, format=format, canvas_size=size)


def naive_box(left: float, top: float, right: float, bottom: float) -> torch.Tensor:
    mask = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
    for row in range(HEIGHT):
        for column in range(WIDTH):
            mask[row, column] = left <= column + 0.5 < right and top <= row + 0.5 < bottom
    return mask


@pytest.mark.parametrize(
    ("format", "values"),
    [
        ("XYXY", [[3.0, 2.0, 12.0, 9.0], [0.5, 0.6, 7.5, 7.4], [-5.0, -5.0, 50.0, 3.2]]),
        ("XYWH", [[3.0, 2.0, 9.0, 7.0], [0.5, 0.6, 7.0, 6.8], [-5.0, -5.0, 55.0, 8.2]]),
        ("CXCYWH", [[7.5, 5.5, 9.0, 7.0], [4.0, 4.0, 7.0, 6.8], [22.5, -0.9, 55.0, 8.2]]),
    ],
)
def test_boxes_of_any_format_hold_the_pixels_whose_centres_lie_inside(format: str, values: list[list[float]]) -> None:
    dataset = Items([(noise(1), {"label": 1, "boxes": boxes(values, format)})])
    audit_set = AuditDataset.from_dataset(dataset, regions=["a", "b", "c"], object=["a", "b"], spurious=["c"])
    expected = [naive_box(3, 2, 12, 9), naive_box(0.5, 0.6, 7.5, 7.4), naive_box(-5, -5, 50, 3.2)]
    assert torch.equal(masks_of(audit_set), torch.stack(expected))


def test_boxes_of_integers_by_their_centre_hold_the_same_pixels() -> None:
    dataset = Items([(noise(1), {"label": 0, "boxes": boxes([[10, 10, 5, 5]], "CXCYWH")})])
    audit_set = AuditDataset.from_dataset(dataset, regions=["tie"], object=["tie"])
    assert torch.equal(masks_of(audit_set)[0], naive_box(7.5, 7.5, 12.5, 12.5))


def test_empty_boxes_are_regions_that_are_not_there() -> None:
    values = [[5.0, 5.0, 5.0, 9.0], [9.0, 9.0, 3.0, 3.0], [float("nan")] * 4, [100.0, 0.0, 120.0, 9.0], [0.0, 0, 4, 4]]
    dataset = Items([(noise(1), (0, boxes(values)))])
    audit_set = AuditDataset.from_dataset(dataset, regions=list("abcde"), object=list("abcde"))
    assert set(audit_set.samples[0].decode()[1]) == {"e"}


@pytest.mark.parametrize("as_image", [v2.functional.to_pil_image, tv_tensors.Image, lambda image: image])
@pytest.mark.parametrize(
    "target",
    [
        {"label": 2, "masks": tv_tensors.Mask(torch.stack([block(0, 0, 5, 5), block(9, 9, 20, 20)]))},
        {
            "image_id": 77,
            "class": np.int64(2),
            "m": tv_tensors.Mask(torch.stack([block(0, 0, 5, 5), block(9, 9, 20, 20)])),
        },
        (torch.tensor(2), tv_tensors.Mask(block(0, 0, 5, 5)), tv_tensors.Mask(block(9, 9, 20, 20).to(torch.uint8) * 9)),
    ],
    ids=["dict", "only integer", "tuple"],
)
def test_items_of_a_dataset(as_image: Callable[[torch.Tensor], Any], target: Any) -> None:
    dataset = Items([(as_image(noise(i)), target, "more") for i in range(3)])
    audit_set = AuditDataset.from_dataset(
        dataset,
        regions=["tie", "hair"],
        object=["tie"],
        spurious=["hair"],
        attributes=lambda index, target: {"parity": index % 2, "parts": len(target)},
    )
    assert dataset.reads == 3
    batch = audit_set.batch([0, 1, 2])
    assert dataset.reads == 6
    assert torch.equal(grey_levels(batch.images), torch.stack([noise(i) for i in range(3)]))
    assert torch.equal(batch.masks[1], torch.stack([block(0, 0, 5, 5), block(9, 9, 20, 20)]))
    assert batch.labels.tolist() == [2, 2, 2] and audit_set.ids == ("0", "1", "2")
    assert audit_set.attribute_table[:, 0].tolist() == ["0", "1", "0"]


def test_masks_go_before_the_boxes_around_them() -> None:
    target = {"label": 0, "boxes": boxes([[0, 0, 30, 30]]), "masks": tv_tensors.Mask(block(3, 3, 5, 5)[None])}
    audit_set = AuditDataset.from_dataset(Items([(noise(0), target)]), regions=["tie"], object=["tie"])
    assert torch.equal(masks_of(audit_set)[0], block(3, 3, 5, 5))


def test_a_label_function_reads_the_label() -> None:
    dataset = Items([(noise(0), tv_tensors.Mask(block(0, 0, 5, 5).to(torch.uint8)))])
    audit_set = AuditDataset.from_dataset(
        dataset, regions=["tie"], object=["tie"], label=lambda target: int(target.max()) + 2
    )
    assert audit_set.labels.tolist() == [3]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_torchvisions_own_coco_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn = [rectangle(0, 0, 9, 9), rectangle(12, 5, 20, 30)]
    annotations = [
        annotation(category, part, image, id=10 * image + category, area=1, bbox=[0, 0, 1, 1])
        for image in (1, 2)
        for category, part in zip((5, 1), drawn, strict=True)
    ]
    files = write_coco(tmp_path, annotations)
    plain = datasets.CocoDetection(str(files["images"]), str(files["annotations"]))
    keys = {"image_id", "boxes", "labels", "masks"}
    dataset = datasets.wrap_dataset_for_transforms_v2(plain, target_keys=keys)
    given = AuditDataset.from_dataset(
        dataset, regions=["tie", "person"], object=["tie"], spurious=["person"], label=lambda t: t["image_id"] - 1
    )
    read = AuditDataset.from_coco(**files, object=["tie"], spurious=["person"])
    assert torch.equal(given.batch([0, 1]).masks, read.batch([0, 1]).masks)
    assert torch.equal(given.batch([0, 1]).images, read.batch([0, 1]).images)
    assert given.labels.tolist() == [0, 1]
    # Without `label`, the image's number is not taken for one.
    with pytest.raises(ValueError, match="item 0: has 0 integers in its target"):
        AuditDataset.from_dataset(dataset, regions=["tie", "person"], object=["tie"])


@pytest.mark.parametrize(
    ("item", "says"),
    [
        (noise(0), r"expected \(image, target\)"),
        ((noise(0),), r"expected \(image, target\)"),
        ((noise(0) / 255, {"label": 0, "masks": ONE_MASK}), "without its own ToDtype"),
        (("a.png", {"label": 0, "masks": ONE_MASK}), "expected a PIL image or a uint8 tensor, got str"),
        ((noise(0), {"label": 0}), "no tv_tensors.Mask or BoundingBoxes"),
        ((noise(0), 3), "no tv_tensors.Mask or BoundingBoxes"),
        ((noise(0), {"label": 0, "masks": ONE_MASK.expand(2, -1, -1)}), "no tv_tensors.Mask"),
        ((noise(0), {"label": 0, "masks": tv_tensors.Mask(torch.ones(2, 30, 40))}), "has 2 masks.*names 1"),
        ((noise(0), {"masks": ONE_MASK}), "has 0 integers in its target, not one: give `label=`"),
        ((noise(0), (1, 2, ONE_MASK)), "has 2 integers in its target"),
        ((noise(0), {"label": "doctor", "masks": ONE_MASK}), "class index as label, got 'doctor'"),
        (
            (noise(0), {"label": 0, "boxes": boxes([[0, 0, 5, 5]], size=(60, 80))}),
            r"boxes are for an image of \(60, 80\)",
        ),
        ((noise(0), {"label": 0, "boxes": boxes([[5.0, 5.0, 3.0, 3.0, 45.0]], "CXCYWHR")}), "CXCYWHR are rotated"),
    ],
)
def test_a_wrong_item_is_named(item: Any, says: str) -> None:
    fine = (noise(1), {"label": 0, "masks": ONE_MASK})
    with pytest.raises(ValueError, match=f"item 1: .*{says}"):
        AuditDataset.from_dataset(Items([fine, item]), regions=["tie"], object=["tie"])


def test_a_dataset_without_length_is_refused() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            yield noise(0), {}

    with pytest.raises(ValueError, match="map-style dataset with a length, got Stream"):
        AuditDataset.from_dataset(Stream(), regions=["tie"], object=["tie"])

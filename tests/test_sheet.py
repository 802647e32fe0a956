"""What the records keep of the images: thumbnails, masks, fingerprint, and counts of regions."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from annotated_images import block, noise, sample
from PIL import Image
from torchvision.transforms import v2

from bias_audit.data.dataset import AuditDataset
from bias_audit.data.samples import AuditSample
from bias_audit.data.sheet import THUMBNAIL_SIDE, describe


def test_the_sheet_shows_what_the_model_sees() -> None:
    wide, tall = block(40, 100, 160, 290, 200, 400), block(10, 10, 50, 40, 60, 50)
    samples = [
        AuditSample(m.to(torch.uint8).mul(255).expand(3, -1, -1), i, {"tie": m}, {"gender": g}, g)
        for i, (m, g) in enumerate([(wide, "f"), (tall, "m")])
    ]
    steps: list[tuple[int, int]] = []
    sheet = describe(AuditDataset(samples, object=["tie"]), lambda done, of: steps.append((done, of))).sheet
    assert steps == [(1, 2), (2, 2)]
    assert sheet.ids == ("f", "m") and sheet.labels.tolist() == [0, 1] and sheet.attributes.tolist() == [["f"], ["m"]]
    pictures = [np.asarray(Image.open(io.BytesIO(t)).convert("L")) for t in sheet.thumbnails]
    assert [p.shape for p in pictures] == [(64, THUMBNAIL_SIDE), (60, 50)]
    assert sheet.masks.shape == (2, 1, 64, THUMBNAIL_SIDE) and sheet.masks[0].dtype == np.bool_
    for pixels, (mask,) in zip(pictures, sheet.masks, strict=True):
        height, width = pixels.shape
        # JPEG and the thinning out of pixels may move an edge by one.
        differ = (pixels > 127) ^ mask[:height, :width]
        assert differ.sum() <= 2 * (height + width) * 0.5 and mask.any()
        assert not mask[height:].any() and not mask[:, width:].any()


def test_a_region_of_few_pixels_is_on_the_image_although_the_thumbnail_loses_it() -> None:
    audit_set = AuditDataset([sample(0, block(301, 301, 302, 303, 640, 640))], object=["tie"])
    sheet = describe(audit_set).sheet
    assert max(Image.open(io.BytesIO(sheet.thumbnails[0])).size) == THUMBNAIL_SIDE


def test_a_thumbnail_of_normalised_floats_has_contrast() -> None:
    transform = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.1] * 3), v2.Resize(32)])
    sheet = describe(AuditDataset([sample(0)], object=["tie"], transform=transform)).sheet
    assert np.ptp(np.asarray(Image.open(io.BytesIO(sheet.thumbnails[0])).convert("L"))) > 60


def fingerprint(change: str = "", **arguments: Any) -> str:
    image, mask = noise(0), block(2, 3, 10, 12)
    roles: dict[str, Any] = {"object": ["tie"], "spurious": ["hair"]}
    label, gender, name = 0, "female", "s0"
    if change == "pixel":
        image[1, 7, 9] ^= 1
    elif change == "mask":
        mask[20, 20] = True
    elif change == "label":
        label = 1
    elif change == "attribute":
        gender = "male"
    elif change == "role":
        roles = {"object": ["hair"], "spurious": ["tie"]}
    elif change == "id":
        name = "s1"
    regions = {"tie": mask, "hair": block(0, 0, 2, 2)}
    samples = [
        AuditSample(image, label, regions, {"gender": gender}, name),
        AuditSample(noise(9), 1, regions, {"gender": "female"}, "last"),
    ]
    return describe(AuditDataset(samples, **roles, **arguments)).fingerprint


@pytest.mark.parametrize("change", ["pixel", "mask", "label", "attribute", "role", "id"])
def test_the_fingerprint_tells_any_change(change: str) -> None:
    assert fingerprint(change) != fingerprint()


def test_the_fingerprint_is_stable_otherwise() -> None:
    assert fingerprint() == fingerprint() == fingerprint(cache_bytes=0)
    assert fingerprint(transform=v2.Resize(20)) != fingerprint()
    assert fingerprint(classes=["doctor", "nurse"]) != fingerprint()


def test_a_region_on_no_image_is_named() -> None:
    audit_set = AuditDataset([sample(0)], object=["tie"], spurious=["watermark"])
    with pytest.raises(ValueError, match="spurious region 'watermark' is on no image"):
        describe(audit_set)
    # As is one that the transform has cut away.
    cropped = AuditDataset([sample(0)], object=["tie"], transform=v2.CenterCrop(4))
    with pytest.raises(ValueError, match=r"object region 'tie' is on no image of the audit set: .* the transform"):
        describe(cropped)

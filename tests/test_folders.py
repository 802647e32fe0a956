"""Pictures on disk, and a folder of mask pictures, as an audit set."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from annotated_images import (
    HEIGHT,
    WIDTH,
    annotation,
    block,
    grey,
    grey_levels,
    masks_of,
    noise,
    picture,
    rectangle,
    write_coco,
    write_folder,
)
from PIL import Image
from torchvision.transforms import v2

from bias_audit.data.dataset import AuditDataset
from bias_audit.data.samples import AuditSample
from bias_audit.data.sheet import describe


def broken_png(path: Path) -> None:
    """A picture whose header is whole: PIL raises SyntaxError when it reads on."""
    buffer = io.BytesIO()
    picture(1).save(buffer, "PNG")
    content = bytearray(buffer.getvalue())
    content[content.index(b"IDAT") + 1] = 0
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:60]),
        lambda path: path.write_text("not an image"),
        lambda path: path.write_bytes(b""),
        lambda path: path.unlink(),
        broken_png,
    ],
    ids=["truncated", "text", "empty", "gone", "broken"],
)
def test_an_image_that_does_not_decode_is_named_when_its_batch_is_made(
    tmp_path: Path, damage: Callable[[Path], Any]
) -> None:
    files = write_coco(tmp_path, [annotation(5, rectangle(0, 0, 9, 9), image=2)])
    audit_set = AuditDataset.from_coco(**files, object=["tie"])
    damage(files["images"] / "a.png")
    with pytest.raises(ValueError, match=r"sample 'a\.png': does not decode: .*replace the file, or remove its row"):
        audit_set.batch([1, 0])
    with pytest.raises(ValueError, match=r"sample 'a\.png'"):
        describe(audit_set)
    assert audit_set.batch([1]).masks.any()


def test_a_picture_in_memory_that_does_not_decode_is_named(tmp_path: Path) -> None:
    picture(1).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:200])
    lazy = AuditSample(Image.open(tmp_path / "a.png"), 0, {"tie": block(0, 0, 5, 5)}, {}, "lazy")
    with pytest.raises(ValueError, match="sample 'lazy': does not decode"):
        AuditDataset([lazy], object=["tie"]).batch([0])


@pytest.mark.parametrize(
    ("suffix", "mode"), [("png", "P"), ("png", "L"), ("png", "RGBA"), ("gif", "P"), ("tiff", "RGB"), ("bmp", "RGB")]
)
def test_common_formats_and_modes_decode(tmp_path: Path, suffix: str, mode: str) -> None:
    files = write_folder(tmp_path, {"tie/c.png": grey(block(0, 0, 5, 5))}, f"file,label\nc.{suffix},doctor\n")
    stored = picture(5).convert(mode)
    stored.save(files["images"] / f"c.{suffix}")
    audit_set = AuditDataset.from_folder(**files, object=["tie"])
    expected = v2.functional.pil_to_tensor(stored.convert("RGB"))
    assert torch.equal(grey_levels(audit_set.batch([0]).images[0]), expected)


@pytest.mark.parametrize(
    "deep",
    [
        Image.fromarray(np.full((HEIGHT, WIDTH), 40_000, dtype=np.uint16)),
        Image.fromarray(np.full((HEIGHT, WIDTH), 40_000, dtype=np.int32)),
        Image.fromarray(np.full((HEIGHT, WIDTH), 0.5, dtype=np.float32)),
    ],
    ids=["I;16", "I", "F"],
)
def test_pictures_of_more_than_8_bits_are_not_clipped_in_silence(deep: Image.Image) -> None:
    audit_set = AuditDataset([AuditSample(deep, 0, {"tie": block(0, 0, 5, 5)}, {}, "deep")], object=["tie"])
    with pytest.raises(ValueError, match="sample 'deep': expected 8 bits"):
        audit_set.batch([0])


def reversed_palette(mask: torch.Tensor) -> Image.Image:
    """Black and white where index 0 is white, as some tools write it."""
    indexed = Image.fromarray((~mask).numpy().astype(np.uint8), "L").convert("P")
    indexed.putdata((~mask).flatten().int().tolist())
    indexed.putpalette([255, 255, 255, 0, 0, 0])
    return indexed


@pytest.mark.parametrize(
    "paint",
    [
        grey,
        lambda mask: grey(mask).convert("1"),
        lambda mask: grey(mask).convert("RGB"),
        lambda mask: Image.fromarray(mask.numpy().astype(np.uint8)),
        lambda mask: Image.fromarray(mask.numpy().astype(np.uint16) * 300),
        reversed_palette,
    ],
    ids=["L", "1", "RGB", "ones", "I;16", "P"],
)
def test_mask_pictures(tmp_path: Path, paint: Callable[[torch.Tensor], Image.Image]) -> None:
    tie, hair = block(2, 3, 10, 12), block(20, 0, 30, 40)
    files = write_folder(tmp_path, {"tie/a.png": paint(tie), "hair/a.png": paint(hair), "tie/b.png": paint(hair)})
    audit_set = AuditDataset.from_folder(**files, object=["tie"], spurious=["hair"])
    batch = audit_set.batch([0, 1])
    assert torch.equal(batch.masks[0], torch.stack([tie, hair]))
    assert torch.equal(batch.masks[1], torch.stack([hair, torch.zeros_like(hair)]))
    assert torch.equal(grey_levels(batch.images), torch.stack([noise(1), noise(2)]))
    assert batch.labels.tolist() == [0, 1] and audit_set.attribute_table.tolist() == [["male"], ["female"]]
    assert set(audit_set.samples[1].decode()[1]) == {"tie"}


def test_masks_of_images_in_folders(tmp_path: Path) -> None:
    files = write_folder(tmp_path, {"tie/ward/c.png": grey(block(1, 1, 4, 4))}, "file,label\nward/c.jpg,nurse\n")
    (files["images"] / "ward").mkdir()
    picture(3).save(files["images"] / "ward" / "c.jpg")
    assert torch.equal(masks_of(AuditDataset.from_folder(**files, object=["tie"]))[0], block(1, 1, 4, 4))


def test_a_mask_of_another_size_is_named(tmp_path: Path) -> None:
    files = write_folder(tmp_path, {"tie/a.png": grey(block(0, 0, 5, 5, WIDTH, HEIGHT))})
    with pytest.raises(
        ValueError,
        match=r"sample 'a\.png': .*tie.a\.png: is 40 x 30 pixels .* its image is 30 x 40: a mask has the size",
    ):
        AuditDataset.from_folder(**files, object=["tie"]).batch([0])


def test_a_mask_that_does_not_decode_or_is_transparent_is_named(tmp_path: Path) -> None:
    files = write_folder(tmp_path, {"tie/a.png": grey(block(0, 0, 5, 5)), "tie/b.png": picture(0).convert("RGBA")})
    (files["masks"] / "tie" / "a.png").write_bytes(b"nothing")
    audit_set = AuditDataset.from_folder(**files, object=["tie"])
    with pytest.raises(ValueError, match=r"sample 'a\.png': does not decode: .*tie.a\.png"):
        audit_set.batch([0])
    with pytest.raises(ValueError, match=r"sample 'b\.png'.*tie.b\.png: a mask has no transparency"):
        audit_set.batch([1])


@pytest.mark.parametrize(
    ("region", "masks", "says"),
    [
        ("tei", None, "no folder of region 'tei': did you mean 'tie'"),
        ("tie", "nowhere", r"nowhere.tie: no folder of region 'tie': there are \[\]"),
    ],
)
def test_a_region_without_folder_is_named(tmp_path: Path, region: str, masks: str | None, says: str) -> None:
    files = write_folder(tmp_path, {"tie/a.png": grey(block(0, 0, 5, 5))})
    if masks is not None:
        files["masks"] = tmp_path / masks
    with pytest.raises(ValueError, match=says):
        AuditDataset.from_folder(**files, object=[region])

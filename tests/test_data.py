"""The audit set: what the readers make of files and datasets, and what the batches, subsets and sheets hold.

Enters: pictures and annotations that are written here, and the photographs in ../shared where there are any.
Leaves: nothing.
"""

from __future__ import annotations

import csv
import io
import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from torch.utils.data import Dataset, IterableDataset
from torchvision import datasets, tv_tensors
from torchvision import transforms as v1
from torchvision.models import ResNet18_Weights
from torchvision.transforms import v2

from bias_audit.data.samples import THUMBNAIL_SIDE, AuditDataset, AuditSample, Decoded, PendingSample, _shares

PEOPLE = Path(__file__).parents[1] / ".." / "shared" / "data" / "coco_people"
with_people = pytest.mark.skipif(not PEOPLE.is_dir(), reason=f"the photographs are not at {PEOPLE}")

HEIGHT, WIDTH = 30, 40
CATEGORIES = [
    {"id": 1, "name": "person", "supercategory": "person"},
    {"id": 5, "name": "tie", "supercategory": "clothing"},
    {"id": 7, "name": "coat", "supercategory": "clothing"},
    {"id": 8, "name": "kitchen", "supercategory": "toy"},
    {"id": 9, "name": "oven", "supercategory": "kitchen"},
]
LABELS = "file,label,gender\na.png,doctor,male\nb.png,nurse,female\n"


def noise(seed: int, height: int = HEIGHT, width: int = WIDTH) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


def picture(seed: int, height: int = HEIGHT, width: int = WIDTH) -> Image.Image:
    return Image.fromarray(noise(seed, height, width).permute(1, 2, 0).numpy())


def block(top: int, left: int, bottom: int, right: int, height: int = HEIGHT, width: int = WIDTH) -> torch.Tensor:
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask


def rectangle(top: int, left: int, bottom: int, right: int) -> list[list[float]]:
    return [[left, top, right, top, right, bottom, left, bottom]]


def sample(i: int, region: torch.Tensor | None = None, label: int = 0, **attributes: str | int) -> AuditSample:
    mask = block(2, 3, 10, 12) if region is None else region
    return AuditSample(noise(i, *mask.shape), label, {"tie": mask}, attributes, f"s{i}")


def annotation(category: int, segmentation: Any, image: int = 1, **more: Any) -> dict[str, Any]:
    return {"id": 1, "image_id": image, "category_id": category, "segmentation": segmentation, "iscrowd": 0, **more}


def write_coco(
    folder: Path, annotations: list[dict[str, Any]], labels: str = LABELS, names: tuple[str, ...] = ("a.png", "b.png")
) -> dict[str, Any]:
    """Noise pictures with their annotations; image ids count from 1."""
    images = [
        {"id": i, "file_name": name, "height": HEIGHT, "width": WIDTH, "license": 3} for i, name in enumerate(names, 1)
    ]
    for image in images:
        path = folder / "images" / str(image["file_name"])
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(int(str(image["id"]))).save(path)
    content = {"info": {"year": 2017}, "images": images, "annotations": annotations, "categories": CATEGORIES}
    (folder / "instances.json").write_text(json.dumps(content))
    (folder / "labels.csv").write_text(labels)
    return {"annotations": folder / "instances.json", "images": folder / "images", "labels": folder / "labels.csv"}


def write_folder(folder: Path, masks: dict[str, Image.Image], labels: str = LABELS) -> dict[str, Any]:
    """Noise pictures a.png and b.png; `masks` by path below the folder of masks."""
    for name, content in {"images/a.png": picture(1), "images/b.png": picture(2)}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        content.save(folder / name)
    for name, content in masks.items():
        (folder / "masks" / name).parent.mkdir(parents=True, exist_ok=True)
        content.save(folder / "masks" / name)
    (folder / "labels.csv").write_text(labels)
    return {"images": folder / "images", "labels": folder / "labels.csv", "masks": folder / "masks"}


def grey(mask: torch.Tensor) -> Image.Image:
    return Image.fromarray(mask.numpy().astype(np.uint8) * 255)


def runs_of(mask: torch.Tensor) -> list[int]:
    """Run lengths by walking over the pixels column by column."""
    runs, value = [0], False
    for pixel in mask.T.flatten().tolist():
        if pixel != value:
            runs.append(0)
            value = pixel
        runs[-1] += 1
    return runs


def walked(counts: list[int], height: int, width: int) -> torch.Tensor:
    """The mask of run lengths, pixel by pixel."""
    mask = torch.zeros(height, width, dtype=torch.bool)
    position = 0
    for i, run in enumerate(counts):
        for _ in range(run):
            mask[position % height, position // height] = bool(i % 2)
            position += 1
    return mask


def inked(polygons: list[list[float]], height: int, width: int) -> torch.Tensor:
    """The polygons as PIL draws them three times as large, seen at the pixels' centres: PIL fills the outline too."""
    canvas = Image.new("1", (3 * width, 3 * height))
    for polygon in polygons:
        ImageDraw.Draw(canvas).polygon([3 * x for x in polygon], fill=1)
    return torch.from_numpy(np.array(canvas))[1::3, 1::3]


def distance_to_outline(polygon: list[float], row: int, column: int) -> float:
    points = np.array(polygon).reshape(-1, 2)
    centre = np.array([column + 0.5, row + 0.5])
    nearest = []
    for start, end in zip(points, np.roll(points, -1, axis=0), strict=True):
        along = np.clip(np.dot(centre - start, end - start) / max(np.dot(end - start, end - start), 1e-12), 0, 1)
        nearest.append(float(np.linalg.norm(start + along * (end - start) - centre)))
    return min(nearest)


def grey_levels(images: torch.Tensor) -> torch.Tensor:
    """The uint8 pixels that were scaled to [0, 1]."""
    return (images * 255).round().to(torch.uint8)


def masks_of(audit_set: AuditDataset, index: int = 0) -> torch.Tensor:
    return audit_set.batch([index]).masks[0]


# ---------------------------------------------------------------------------------------------------------------- COCO


@pytest.mark.parametrize("corners", [3, 4, 7, 12])
def test_polygons_agree_with_pil_but_for_their_outline(tmp_path: Path, corners: int) -> None:
    rng = np.random.default_rng(corners)
    angles = np.sort(rng.uniform(0, 2 * np.pi, corners))
    radii = rng.uniform(6, 14, corners)
    star = np.stack([20 + radii * np.cos(angles), 15 + radii * np.sin(angles)], 1).round(2).flatten().tolist()
    files = write_coco(tmp_path, [annotation(5, [star])])
    read = masks_of(AuditDataset.from_coco(**files, object=["tie"]))[0]
    drawn = inked([star], HEIGHT, WIDTH)
    assert (read & drawn).sum() > 20
    for row, column in (read ^ drawn).nonzero().tolist():
        assert distance_to_outline(star, row, column) <= 1


def test_rectangles_of_whole_pixels_are_exact_and_may_lie_half_outside(tmp_path: Path) -> None:
    parts = rectangle(2, 3, 10, 12) + rectangle(-5, 35, 4, 50)
    files = write_coco(tmp_path, [annotation(5, parts)])
    read = masks_of(AuditDataset.from_coco(**files, object=["tie"]))[0]
    assert torch.equal(read, block(2, 3, 10, 12) | block(0, 35, 4, WIDTH))


def test_a_polygon_of_two_points_encloses_nothing(tmp_path: Path) -> None:
    # pycocotools would fill the box that has these four numbers.
    files = write_coco(tmp_path, [annotation(5, [[2, 3, 10, 12]]), annotation(5, rectangle(20, 20, 22, 22))])
    read = masks_of(AuditDataset.from_coco(**files, object=["tie"]))[0]
    assert torch.equal(read, block(20, 20, 22, 22))


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.98, 1.0])
@pytest.mark.parametrize("iscrowd", [0, 1])
def test_rle_in_both_forms_agrees_with_walking_the_runs(tmp_path: Path, share: float, iscrowd: int) -> None:
    mask = torch.rand(HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1)) < share
    runs, size = runs_of(mask), [HEIGHT, WIDTH]
    compressed = pycocotools.mask.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))["counts"].decode()
    files = write_coco(
        tmp_path,
        [
            annotation(5, {"size": size, "counts": runs}, iscrowd=iscrowd),
            annotation(7, {"size": size, "counts": compressed}, iscrowd=iscrowd),
        ],
    )
    tie, coat = masks_of(AuditDataset.from_coco(**files, object=["tie"], spurious=["coat"]))
    assert torch.equal(tie, walked(runs, HEIGHT, WIDTH)) and torch.equal(tie, mask)
    assert torch.equal(coat, mask)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_compressed_long_runs_agree_with_pycocotools(tmp_path: Path) -> None:
    # Long runs and falling run lengths take several characters and negative differences.
    mask = block(0, 1, 29, 2) | block(3, 10, 4, 30) | block(29, 38, 30, 40)
    rle = pycocotools.mask.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
    files = write_coco(tmp_path, [annotation(5, {"size": [HEIGHT, WIDTH], "counts": rle["counts"].decode()})])
    read = masks_of(AuditDataset.from_coco(**files, object=["tie"]))[0]
    assert torch.equal(read, torch.from_numpy(pycocotools.mask.decode(rle)) > 0)


@pytest.mark.parametrize(
    ("segmentation", "says"),
    [
        ({"size": [HEIGHT, WIDTH], "counts": [10, 20]}, "runs over 30 pixels"),
        ({"size": [HEIGHT, WIDTH], "counts": [10, HEIGHT * WIDTH]}, "runs over 1210 pixels"),
        ({"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH + 1, -1]}, "does not fit"),
        ({"size": [HEIGHT, WIDTH], "counts": []}, "runs over 0 pixels"),
        ({"size": [HEIGHT, WIDTH], "counts": "04"}, "does not fit"),
        ({"size": [HEIGHT, WIDTH], "counts": "0é"}, "'é'"),
        ({"size": [HEIGHT, WIDTH], "counts": "0o"}, "ends within a number"),
        ({"size": [WIDTH, HEIGHT], "counts": [0, HEIGHT * WIDTH]}, "does not fit"),
    ],
)
def test_a_damaged_outline_names_its_sample(tmp_path: Path, segmentation: Any, says: str) -> None:
    audit_set = AuditDataset.from_coco(**write_coco(tmp_path, [annotation(5, segmentation)]), object=["tie"])
    with pytest.raises(ValueError, match=rf"sample 'a\.png'.*{says}"):
        audit_set.batch([0])


def test_union_minus_and_names(tmp_path: Path) -> None:
    files = write_coco(
        tmp_path,
        [
            annotation(5, rectangle(0, 0, 10, 10)),
            annotation(7, rectangle(5, 5, 15, 15)),
            annotation(1, rectangle(8, 0, 12, 40)),
            annotation(1, rectangle(0, 0, 30, 40), image=2),
            annotation(8, rectangle(20, 20, 25, 25)),
            annotation(9, rectangle(26, 26, 30, 30)),
        ],
    )
    tie, coat, person = block(0, 0, 10, 10), block(5, 5, 15, 15), block(8, 0, 12, 40)
    audit_set = AuditDataset.from_coco(
        **files,
        object={"clothes": ["clothing"], "both": ["tie", "coat"]},
        spurious=["person", "kitchen"],
        minus={"clothes": ["person"]},
    )
    assert audit_set.subjects.regions == (
        ("clothes", "object"),
        ("both", "object"),
        ("person", "spurious"),
        ("kitchen", "spurious"),
    )
    clothes, both, found_person, kitchen = masks_of(audit_set)
    assert torch.equal(clothes, (tie | coat) & ~person)
    assert torch.equal(both, tie | coat)
    assert torch.equal(found_person, person)
    # "kitchen" is a category and the supercategory of "oven": the category it is.
    assert torch.equal(kitchen, block(20, 20, 25, 25))
    # The second image has nobody dressed: the regions are not there at all, whatever is cut out of them.
    assert set(audit_set.samples[1].decode()[1]) == {"person"}
    assert masks_of(audit_set, 1).flatten(1).any(1).tolist() == [False, False, True, False]


def test_the_csv_chooses_and_orders_the_images(tmp_path: Path) -> None:
    labels = "﻿label,gender,file,age\nnurse, female ,b.png,30\n\ndoctor,male,sub/c.png,40\n"
    names = ("a.png", "b.png", "sub/c.png")
    files = write_coco(tmp_path, [annotation(5, rectangle(0, 0, 9, 9), image=3)], labels, names)
    audit_set = AuditDataset.from_coco(**files, object=["tie"])
    assert audit_set.ids == ("b.png", "sub/c.png")
    assert audit_set.subjects.classes == ("doctor", "nurse") and audit_set.labels.tolist() == [1, 0]
    assert audit_set.subjects.attributes == (("age", ("30", "40")), ("gender", ("female", "male")))
    assert torch.equal(grey_levels(audit_set.batch([0, 1]).images), torch.stack([noise(2), noise(3)]))
    chosen = AuditDataset.from_coco(**files, object=["tie"], attributes=["age"], classes=["patient", "nurse", "doctor"])
    assert chosen.labels.tolist() == [1, 2] and chosen.attribute_table.tolist() == [["30"], ["40"]]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"object": ["tei"]}, r"instances\.json: unknown category 'tei': did you mean 'tie'\?"),
        ({"object": ["zebra"]}, r"unknown category 'zebra': there are \['clothing', 'coat',"),
        ({"minus": {"tie": ["persom"]}}, "unknown category 'persom': did you mean 'person'"),
        ({"minus": {"ties": ["person"]}}, "unknown region 'ties': did you mean 'tie'"),
        ({"object": {"tie": "tie"}}, r"write \['tie'\]"),
        ({"object": "tie"}, r"write \['tie'\]"),
        ({"spurious": ["tie"]}, "region 'tie' is named in more than one role"),
        ({"attributes": ["gander"]}, r"labels\.csv, line 1: no column 'gander': did you mean 'gender'\?"),
        ({"classes": ["doctor"]}, r"labels\.csv, line 3: label 'nurse' is not among `classes` \['doctor'\]"),
        ({"labels": "nowhere.csv"}, r"nowhere\.csv: cannot be read"),
        ({"annotations": "nowhere.json"}, r"nowhere\.json: cannot be read"),
        ({"images": "nowhere"}, r"labels\.csv, line 2: no file nowhere.a\.png"),
    ],
)
def test_wrong_arguments_say_what_to_write(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    files = write_coco(tmp_path, [annotation(5, rectangle(0, 0, 9, 9))])
    with pytest.raises(ValueError, match=says):
        AuditDataset.from_coco(**{**files, "object": ["tie"], **changes})


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ("", "line 1: no column 'file'"),
        ("file,gender\na.png,male\n", "line 1: no column 'label'"),
        ("file,label\n", "the audit set is empty"),
        ("file,label\na.png,\n", "line 2: no value in column 'label'"),
        ("file,label\na.png,doctor\nb.png\n", "line 3: no value in column 'label'"),
        ("file,label\n ,doctor\n", "line 2: no value in column 'file'"),
        ("file,label,gender\na.png,doctor,\n", "line 2: no value in column 'gender'"),
        ("file,label\na.png,doctor,male\n", "line 2: more values than columns"),
        (",file,label\n0,a.png,doctor\n", "line 1: column '' has no name"),
        ("file,label,label\na.png,doctor,nurse\n", "line 1: column 'label' has no name or occurs twice"),
        ("file,label\na.png,doctor\nc.png,doctor\n", r"line 3: .*instances\.json has no image 'c\.png': did you mean"),
        ("file,label\na.png,doctor\n\na.png,nurse\n", r"line 4: 'a\.png' stands in .*labels\.csv, line 2 as well"),
        (f"file,label\na.png,{'x' * 200_000}\n", "cannot be read as CSV"),
    ],
)
def test_a_wrong_csv_names_its_line(tmp_path: Path, labels: str, says: str) -> None:
    files = write_coco(tmp_path, [annotation(5, rectangle(0, 0, 9, 9))], labels)
    with pytest.raises(ValueError, match=says):
        AuditDataset.from_coco(**files, object=["tie"])


def test_a_csv_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    files = write_coco(tmp_path, [])
    files["labels"].write_bytes("file,label\na.png,pêcheur\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"labels\.csv: cannot be read as CSV in UTF-8"):
        AuditDataset.from_coco(**files, object=["tie"])


@pytest.mark.parametrize(
    "name",
    ["../outside.png", "sub/../../outside.png", "/etc/hostname", r"..\x.png", r"sub\..\..\x.png", r"\\host\x.png"],
)
@pytest.mark.parametrize("kind", ["coco", "folder"])
def test_no_path_leaves_its_folder(tmp_path: Path, name: str, kind: str) -> None:
    picture(0).save(tmp_path / "outside.png")
    labels = f"file,label\n{name},doctor\n"
    audit_set: Callable[..., AuditDataset]
    if kind == "coco":
        files, audit_set = write_coco(tmp_path, [], labels), AuditDataset.from_coco
        content = json.loads(files["annotations"].read_text())
        content["images"][0]["file_name"] = name
        files["annotations"].write_text(json.dumps(content))
    else:
        files = write_folder(tmp_path, {"tie/a.png": grey(block(0, 0, 5, 5))}, labels)
        audit_set = AuditDataset.from_folder
    with pytest.raises(ValueError, match=r"labels\.csv, line 2: .* leaves the folder"):
        audit_set(**files, object=["tie"])


def test_a_name_that_no_file_can_have_is_named_with_its_line(tmp_path: Path) -> None:
    files = write_folder(tmp_path, {"tie/a.png": grey(block(0, 0, 5, 5))}, f"file,label\n{'a' * 300}.png,doctor\n")
    with pytest.raises(ValueError, match=r"labels\.csv, line 2: no file .*aaa\.png"):
        AuditDataset.from_folder(**files, object=["tie"])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c["images"][0].pop("height"), r"images\.0\.height: Field required"),
        (lambda c: c["images"][0].update(height="30"), r"images\.0\.height: Input should be a valid integer"),
        (lambda c: c["annotations"][0].update(category_id=None), r"annotations\.0\.category_id"),
        (lambda c: c["annotations"][0].update(segmentation=[1, 2, 3]), r"annotations\.0\.segmentation"),
        (lambda c: c["annotations"][0].update(segmentation=[[0, 0, 1e12, 0, 5, 5]]), r"annotations\.0\.segmentation"),
        (lambda c: c["annotations"][0].update(segmentation=[[0, 0, float("nan"), 0, 5, 5]]), r"segmentation"),
        (lambda c: c["annotations"][0].update(segmentation=[]), r"image 'a\.png': an annotation has no segmentation"),
        (lambda c: c["annotations"][0].pop("segmentation"), r"image 'a\.png': an annotation has no segmentation"),
        (
            lambda c: c["annotations"][0].update(segmentation=[[0, 0, 5, 0, 5]]),
            r"'a\.png': a polygon has an odd number",
        ),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, 3]), r"annotations\.0\.bbox: List should have at least 4"),
        (
            lambda c: c["annotations"][0].update(segmentation=[], bbox=[5, 5, -1, 3]),
            r"'a\.png': a box is \[5.*, 3.*\]: expected \[left, top, width, height\]",
        ),
        (lambda c: c["annotations"][0].update(category_id=99), r"image 'a\.png': an annotation has the category 99"),
        (lambda c: c["images"][1].update(id=1), r"image 'b\.png': the id 1 is also that of 'a\.png'"),
        (lambda c: c["images"][1].update(file_name="../b.png"), r"'\.\./b\.png' leaves the folder"),
        (lambda c: c["images"][1].update(height=0), r"images\.1\.height: Input should be greater"),
        (lambda c: c["images"][1].update(height=1 << 14, width=1 << 14), r"image 'b\.png': has 16384 x 16384 pixels"),
        (lambda c: c["categories"][1].update(id=1), r"category 'tie': the id 1 is also that of 'person'"),
        (lambda c: c.pop("categories"), r"categories: Field required"),
        (lambda c: c["images"][1].update(file_name="a.png"), r"two images have the file name 'a\.png'"),
    ],
)
def test_a_wrong_json_names_its_place(tmp_path: Path, change: Callable[[Any], Any], says: str) -> None:
    files = write_coco(tmp_path, [annotation(5, rectangle(0, 0, 9, 9))])
    content = json.loads(files["annotations"].read_text())
    change(content)
    files["annotations"].write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"instances\.json, line 1: .*{says}"):
        AuditDataset.from_coco(**files, object=["tie"])


def test_json_that_is_none_is_named(tmp_path: Path) -> None:
    files = write_coco(tmp_path, [])
    files["annotations"].write_text('{"images": [')
    with pytest.raises(ValueError, match=r"instances\.json: content: Invalid JSON"):
        AuditDataset.from_coco(**files, object=["tie"])


def test_an_image_of_another_size_than_its_annotations_is_named(tmp_path: Path) -> None:
    files = write_coco(tmp_path, [annotation(5, rectangle(0, 0, 9, 9))])
    picture(1, WIDTH, HEIGHT).save(files["images"] / "a.png")
    audit_set = AuditDataset.from_coco(**files, object=["tie"])
    with pytest.raises(ValueError, match=r"sample 'a\.png'.*is 40 x 30 pixels.*annotations are for 30 x 40"):
        audit_set.batch([0])


def test_pixels_are_not_turned_by_exif(tmp_path: Path) -> None:
    files = write_coco(tmp_path, [annotation(5, rectangle(0, 0, 9, 9))])
    turned = Image.Exif()
    turned[0x0112] = 6
    picture(1).save(files["images"] / "a.png", exif=turned)
    audit_set = AuditDataset.from_coco(**files, object=["tie"])
    assert torch.equal(grey_levels(audit_set.batch([0]).images[0]), noise(1))


# -------------------------------------------------------------------------------------------------- images on disk


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
        audit_set.sheet()
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


# ---------------------------------------------------------------------------------------------------------- folder


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


# -------------------------------------------------------------------------------------------------------- datasets


class Items(Dataset[Any]):
    """A map-style dataset of the items given, or of what a function makes of the index."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items
        self.reads = 0

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        self.reads += 1
        item = self.items[index]
        return item() if callable(item) else item


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


ONE_MASK = tv_tensors.Mask(torch.ones(1, HEIGHT, WIDTH))


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


# ------------------------------------------------------------------------------------------------ transforms, batches


def global_states() -> tuple[Any, ...]:
    # The global generators are what is looked at.
    numpy = np.random.get_state(legacy=False)["state"]  # noqa: NPY002
    return random.getstate(), numpy["key"].tolist(), numpy["pos"], torch.get_rng_state().tolist()


def drawing(seed: int) -> Callable[[], tuple[torch.Tensor, dict[str, Any]]]:
    """An item that draws from all three global generators."""

    def item() -> tuple[torch.Tensor, dict[str, Any]]:
        drawn = int(torch.randint(5, ())) + int(np.random.randint(5)) + random.randrange(5)  # noqa: NPY002
        return noise(seed) // 2 + drawn, {"label": 0, "masks": ONE_MASK}

    return item


def test_a_random_transform_draws_once_and_leaves_the_global_generators_alone() -> None:
    transform = v2.Compose(
        [v2.RandomCrop(20), v2.RandomHorizontalFlip(), v2.ColorJitter(0.4), v2.ToDtype(torch.float32)]
    )
    samples = [sample(i) for i in range(6)]
    before = global_states()
    audit_set = AuditDataset(samples, object=["tie"], transform=transform, cache_bytes=0)
    first = audit_set.batch([0, 1, 2, 3, 4, 5])
    again = AuditDataset(samples, object=["tie"], transform=transform).batch([5, 3])
    assert global_states() == before
    assert torch.equal(audit_set.batch([0, 1, 2, 3, 4, 5]).images, first.images)
    assert torch.equal(again.images, first.images[[5, 3]]) and torch.equal(again.masks, first.masks[[5, 3]])
    # It is random all the same: a constant crop would show the same part of the same picture.
    same = [AuditSample(noise(0), 0, {"tie": block(0, 0, 9, 9)}, {}, str(i)) for i in range(6)]
    crops = AuditDataset(same, object=["tie"], transform=transform).batch(range(6)).images
    assert len({tuple(crop.flatten().tolist()) for crop in crops}) > 1


def test_a_dataset_that_draws_leaves_the_global_generators_alone_and_gives_the_same_each_time() -> None:
    before = global_states()
    audit_set = AuditDataset.from_dataset(
        Items([drawing(i) for i in range(4)]), regions=["tie"], object=["tie"], cache_bytes=0
    )
    first = audit_set.batch([0, 1, 2, 3]).images
    assert torch.equal(audit_set.batch([3, 1]).images, first[[3, 1]])
    assert global_states() == before


@pytest.mark.parametrize("resize", [v2.Resize((60, 80), v2.InterpolationMode.NEAREST), v2.Resize((60, 80))])
def test_image_and_mask_move_together(resize: v2.Transform) -> None:
    mask = block(4, 3, 17, 12)
    image = mask.to(torch.uint8).mul(255).expand(3, -1, -1)
    transform = v2.Compose([resize, v2.CenterCrop((50, 70)), v2.RandomHorizontalFlip(1.0), v2.Pad(3)])
    audit_set = AuditDataset([AuditSample(image, 0, {"tie": mask}, {}, "a")], object=["tie"], transform=transform)
    batch = audit_set.batch([0])
    # Twice as large, less 5 at each side, mirrored, 3 more at each side.
    expected = block(4 * 2 - 5 + 3, 73 - (12 * 2 - 5), 17 * 2 - 5 + 3, 73 - (3 * 2 - 5), 56, 76)
    assert torch.equal(batch.masks[0, 0], expected)
    assert torch.equal(batch.images[0, 0] > 0.5, expected)


@pytest.mark.parametrize(
    "transform",
    [
        v2.Compose(
            [
                v2.Resize(24),
                v2.CenterCrop(20),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize([0.4] * 3, [0.2] * 3),
            ]
        ),
        v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Resize(24), v2.Normalize([0.4] * 3, [0.2] * 3)]),
        v2.Compose([v2.Resize(24), v2.ConvertImageDtype(torch.float32), v2.ToPureTensor()]),
        v2.Compose([v2.ToDtype(torch.float32)]),
        v2.ToDtype(torch.float32, scale=True),
    ],
)
def test_a_batch_is_what_the_whole_transform_makes_of_each_image(transform: v2.Transform) -> None:
    audit_set = AuditDataset([sample(i) for i in range(3)], object=["tie"], transform=transform)
    expected = [transform(tv_tensors.Image(noise(i))).as_subclass(torch.Tensor) for i in range(3)]
    batch = audit_set.batch([0, 1, 2])
    torch.testing.assert_close(batch.images, torch.stack(expected), rtol=0, atol=1e-6)
    assert type(batch.images) is torch.Tensor and batch.images.dtype == torch.float32
    assert batch.masks.dtype == torch.bool and batch.masks.shape[-2:] == batch.images.shape[-2:]


@pytest.mark.filterwarnings("ignore:.*ToTensor.*")
def test_to_tensor_scales_although_the_image_is_a_tensor_by_then() -> None:
    transform = v2.Compose([v2.Resize(24), v2.ToTensor(), v2.Normalize([0.4] * 3, [0.2] * 3)])
    audit_set = AuditDataset([sample(0)], object=["tie"], transform=transform)
    resized = v2.functional.resize(noise(0), [24])
    torch.testing.assert_close(audit_set.batch([0]).images[0], (resized / 255 - 0.4) / 0.2)


def test_a_weights_preset_is_applied_to_image_and_mask() -> None:
    preset = ResNet18_Weights.DEFAULT.transforms()
    mask = block(30, 20, 200, 150, 300, 400)
    audit_set = AuditDataset([sample(0, mask)], object=["tie"], transform=preset)
    batch = audit_set.batch([0])
    # One grey level: v1 rounds after resizing in floats, v2 resizes integers.
    torch.testing.assert_close(batch.images[0], preset(noise(0, 300, 400)), rtol=0, atol=1.01 / 255 / min(preset.std))
    marked = AuditSample(mask.to(torch.uint8).mul(255).expand(3, -1, -1), 0, {"tie": mask}, {}, "a")
    moved = AuditDataset([marked], object=["tie"], transform=preset).batch([0])
    bright = preset(marked.image)[0] > 0
    assert (bright ^ moved.masks[0, 0]).float().mean() < 0.01 and bright.any()


def test_pictures_of_one_size_need_no_transform_and_masks_keep_their_order() -> None:
    regions = {"tie": block(0, 0, 5, 5), "hair": block(6, 6, 9, 9), "unnamed": block(0, 0, 30, 40)}
    both = AuditSample(picture(4).convert("L"), 1, regions, {}, "both")
    audit_set = AuditDataset([both], object=["hair"], context=["tie"])
    batch = audit_set.batch([0])
    assert torch.equal(batch.masks[0], torch.stack([regions["hair"], regions["tie"]]))
    assert torch.equal(batch.images[0, 0], batch.images[0, 2]) and batch.labels.tolist() == [1]


def counted(i: int, reads: list[int]) -> PendingSample:
    def decode() -> Decoded:
        reads.append(i)
        return noise(i), {"tie": block(2, 3, 10, 12)}

    return PendingSample(0, {}, f"s{i}", decode)


@pytest.mark.parametrize(("room", "second_pass"), [(5, 0), (2, 3), (0, 5)])
def test_images_are_decoded_once_as_far_as_they_fit(room: int, second_pass: int) -> None:
    reads: list[int] = []
    each = (3 + 1) * HEIGHT * WIDTH
    audit_set = AuditDataset([counted(i, reads) for i in range(5)], object=["tie"], cache_bytes=room * each)
    assert not reads
    first = audit_set.batch(range(5))
    assert sorted(reads) == [0, 1, 2, 3, 4]
    second = audit_set.batch(range(5))
    assert len(reads) == 5 + second_pass
    assert torch.equal(first.images, second.images) and torch.equal(first.masks, second.masks)


def test_a_kept_crop_does_not_keep_the_picture() -> None:
    audit_set = AuditDataset([sample(0)], object=["tie"], transform=v2.CenterCrop(8))
    audit_set.batch([0])
    (kept,) = audit_set._cache.values()
    assert kept.image.untyped_storage().nbytes() + kept.masks.untyped_storage().nbytes() == 4 * 8 * 8


def test_an_audit_set_of_files_can_be_pickled(tmp_path: Path) -> None:
    # Processes that are spawned, not forked, get a copy.
    files = write_coco(tmp_path, [annotation(5, rectangle(0, 0, 9, 9))])
    audit_set = AuditDataset.from_coco(
        **files, object=["tie"], transform=v2.Compose([v2.Resize(20), v2.ToDtype(torch.float32)])
    )
    copy = pickle.loads(pickle.dumps(audit_set))
    assert torch.equal(copy.batch([0, 1]).images, audit_set.batch([0, 1]).images)
    assert copy.sheet()[1] == audit_set.sheet()[1]


# --------------------------------------------------------------------------------------------------------- subset


def cells_of(audit_set: AuditDataset) -> dict[tuple[int, str], int]:
    counts: dict[tuple[int, str], int] = {}
    for label, (gender,) in zip(audit_set.labels.tolist(), audit_set.attribute_table.tolist(), strict=True):
        counts[label, gender] = counts.get((label, gender), 0) + 1
    return counts


def test_a_subset_is_stratified_and_depends_on_the_seed_alone() -> None:
    sizes = {(0, "m"): 120, (0, "f"): 40, (1, "m"): 38, (1, "f"): 2}
    cells = [cell for cell, n in sizes.items() for _ in range(n)]
    random.Random(0).shuffle(cells)
    samples = [
        PendingSample(label, {"gender": g}, f"s{i}", lambda: (noise(0), {})) for i, (label, g) in enumerate(cells)
    ]
    audit_set = AuditDataset(samples, object=["tie"])
    before = global_states()
    drawn = audit_set.subset(50, seed=3)
    assert global_states() == before
    assert cells_of(drawn) == {(0, "m"): 30, (0, "f"): 10, (1, "m"): 9, (1, "f"): 1}
    assert drawn.ids == audit_set.subset(50, seed=3).ids != audit_set.subset(50, seed=4).ids
    assert len(set(drawn.ids)) == 50 and list(drawn.ids) == sorted(drawn.ids, key=audit_set.ids.index)
    assert set(cells_of(audit_set.subset(4, seed=0)).values()) == {1}
    assert len(audit_set.subset(1, seed=0)) == 1
    assert audit_set.subset(200, seed=0).ids == audit_set.ids
    assert drawn.subjects == audit_set.subjects
    with pytest.raises(ValueError, match="at least 1, got 0"):
        audit_set.subset(0, seed=0)


def test_a_subset_holds_the_same_images(tmp_path: Path) -> None:
    audit_set = AuditDataset([sample(i, label=i % 2) for i in range(9)], object=["tie"])
    whole = audit_set.batch(range(9))
    drawn = audit_set.subset(4, seed=1)
    places = [audit_set.ids.index(i) for i in drawn.ids]
    assert torch.equal(drawn.batch(range(4)).images, whole.images[places])


@given(st.data())
def test_shares(data: st.DataObject) -> None:
    sizes = np.array(data.draw(st.lists(st.integers(1, 60), min_size=1, max_size=12)), dtype=np.int64)
    total = data.draw(st.integers(1, int(sizes.sum())))
    quota = _shares(sizes, total)
    exact = sizes * total / sizes.sum()
    assert quota.sum() == total
    assert (quota >= 0).all() and (quota <= sizes).all()
    if total >= len(sizes):
        assert (quota >= 1).all()
    if exact.min() >= 1 or total < len(sizes):
        assert (np.abs(quota - exact) < 1 + 1e-9).all()
    larger = sizes[:, None] > sizes[None, :]
    assert (quota[:, None] - quota[None, :])[larger].min(initial=0) >= -1


# ---------------------------------------------------------------------------------------------------------- sheet


def test_the_sheet_shows_what_the_model_sees() -> None:
    wide, tall = block(40, 100, 160, 290, 200, 400), block(10, 10, 50, 40, 60, 50)
    samples = [
        AuditSample(m.to(torch.uint8).mul(255).expand(3, -1, -1), i, {"tie": m}, {"gender": g}, g)
        for i, (m, g) in enumerate([(wide, "f"), (tall, "m")])
    ]
    steps: list[tuple[int, int]] = []
    sheet, _, _ = AuditDataset(samples, object=["tie"]).sheet(lambda done, of: steps.append((done, of)))
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
    sheet, _, _ = audit_set.sheet()
    assert max(Image.open(io.BytesIO(sheet.thumbnails[0])).size) == THUMBNAIL_SIDE


def test_a_thumbnail_of_normalised_floats_has_contrast() -> None:
    transform = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.1] * 3), v2.Resize(32)])
    sheet, _, _ = AuditDataset([sample(0)], object=["tie"], transform=transform).sheet()
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
    return AuditDataset(samples, **roles, **arguments).sheet()[1]


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
        audit_set.sheet()
    # As is one that the transform has cut away.
    cropped = AuditDataset([sample(0)], object=["tie"], transform=v2.CenterCrop(4))
    with pytest.raises(ValueError, match=r"object region 'tie' is on no image of the audit set: .* the transform"):
        cropped.sheet()


# ------------------------------------------------------------------------------------------------------ bad inputs


@pytest.mark.parametrize(
    ("samples", "arguments", "says"),
    [
        ([], {}, "the audit set is empty"),
        ([sample(0), sample(1), sample(0)], {}, "sample id 's0' occurs more than once"),
        ([sample(0)], {"spurious": ["tie"]}, "region 'tie' is named in more than one role"),
        ([sample(0)], {"spurious": "tie"}, r"write \['tie'\]"),
        ([sample(0)], {"spurious": ["remainder"]}, "'remainder': the name is taken"),
        ([sample(0)], {"object": []}, "no region has a role"),
        ([sample(0), sample(1, label=2)], {"classes": ["a", "b"]}, "sample 's1': label 2 has no name"),
        ([sample(0, label=-1)], {}, "sample 's0': expected a class index"),
        ([sample(0, gender="f")], {"attributes": ["gander"]}, r"unknown attribute 'gander'.*\['gender'\]"),
        ([sample(0)], {"transform": v1.Compose([v1.Resize(8)])}, "transforms.v2, got torchvision.transforms.Compose"),
        ([sample(0)], {"transform": v1.Resize(8)}, "transforms.v2, got torchvision.transforms.Resize"),
        ([sample(0)], {"transform": v2.Compose([v1.Resize(8)])}, "transforms.v2, got torchvision.transforms.Resize"),
    ],
)
def test_a_wrong_audit_set_says_what_is_wrong(samples: list[AuditSample], arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        AuditDataset(samples, **{"object": ["tie"], **arguments})


@pytest.mark.parametrize(
    ("wrong", "arguments", "says"),
    [
        (
            AuditSample(noise(1), 0, {"tie": block(0, 0, 5, 5, 30, 41)}, {}, "s1"),
            {},
            r"mask of region 'tie' is \(30, 41\)",
        ),
        (AuditSample(noise(1) / 255, 0, {}, {}, "s1"), {}, r"uint8 tensor \(3, H, W\), got torch.float32"),
        (AuditSample(noise(1)[:1], 0, {}, {}, "s1"), {}, r"got torch.uint8 \(1, 30, 40\)"),
        (sample(1, block(0, 0, 5, 5, 31, 40)), {}, r"expected the size \(3, 30, 40\) of sample 's0'.*that resizes"),
        (sample(1), {"transform": lambda image, masks: (image[:, :9], masks)}, "must move both together"),
    ],
)
def test_a_wrong_sample_is_named_when_its_batch_is_made(
    wrong: AuditSample, arguments: dict[str, Any], says: str
) -> None:
    audit_set = AuditDataset([sample(0), wrong], object=["tie"], **arguments)
    with pytest.raises(ValueError, match=rf"sample 's[01]': .*{says}"):
        audit_set.batch([0, 1])


def test_sizes_may_differ_where_the_transform_makes_them_one() -> None:
    samples = [sample(0), sample(1, block(3, 3, 40, 40, 50, 60))]
    batch = AuditDataset(samples, object=["tie"], transform=v2.Resize((16, 16))).batch([0, 1])
    assert batch.images.shape == (2, 3, 16, 16) and batch.masks.flatten(2).any(2).all()


# --------------------------------------------------------------------------------------------------- photographs

SCENE = ["sports", "kitchen", "furniture"]


def people(labels: str, **regions: Any) -> AuditDataset:
    return AuditDataset.from_coco(PEOPLE / "instances.json", PEOPLE / "images", labels=PEOPLE / labels, **regions)


def rows_of(labels: str) -> list[dict[str, str]]:
    with (PEOPLE / labels).open(newline="") as file:
        return list(csv.DictReader(file))


def drawn_apart(annotation: dict[str, Any], image: dict[str, Any]) -> torch.Tensor:
    """One annotation's mask, without any of the reader's means."""
    outline, size = annotation["segmentation"], (image["height"], image["width"])
    return inked(outline, *size) if isinstance(outline, list) else walked(outline["counts"], *size)


@with_people
def test_person_areas_are_those_that_the_annotations_state() -> None:
    content = json.loads((PEOPLE / "instances.json").read_text())
    by_file = {image["file_name"]: image for image in content["images"]}
    audit_set = people("labels_gender.csv", object=["person"])
    assert len(audit_set) == len(rows_of("labels_gender.csv")) == 92
    assert audit_set.subjects.classes == ("man", "woman")
    assert audit_set.subjects.attributes == (("scene", ("domestic", "other", "sports")),)
    stated, measured, compared = [], [], 0
    for one in audit_set.samples:
        image = by_file[one.id]
        of_image = [a for a in content["annotations"] if a["image_id"] == image["id"] and a["category_id"] == 1]
        # Crowds often state another area than their runs have.
        if any(a["iscrowd"] for a in of_image):
            continue
        apart = torch.stack([drawn_apart(a, image) for a in of_image])
        mask = one.decode()[1]["person"]
        assert (mask ^ apart.any(0)).sum() < 0.03 * apart.any(0).sum() + 60, one.id
        compared += 1
        areas = [a["area"] for a in of_image]
        if None not in areas:
            overlap = int(apart.sum() - apart.any(0).sum())
            stated.append(sum(areas) - overlap)
            measured.append(float(mask.sum()))
    assert (compared, len(stated)) == (84, 54)
    np.testing.assert_allclose(measured, stated, rtol=0.01, atol=20)


@with_people
def test_a_crowds_runs_agree_with_walking_them() -> None:
    content = json.loads((PEOPLE / "instances.json").read_text())
    rows = {row["file"] for row in rows_of("labels_gender.csv")}
    images = {image["id"]: image for image in content["images"] if image["file_name"] in rows}
    crowds = [a for a in content["annotations"] if a["iscrowd"] and a["image_id"] in images]
    names = {category["id"]: category["name"] for category in content["categories"]}
    assert crowds
    crowd = min(crowds, key=lambda a: len(a["segmentation"]["counts"]))
    image, name = images[crowd["image_id"]], names[crowd["category_id"]]
    audit_set = people("labels_gender.csv", object=[name])
    mask = audit_set.samples[audit_set.ids.index(image["file_name"])].decode()[1][name]
    walk = drawn_apart(crowd, image)
    assert walk.any() and not (walk & ~mask).any()


@with_people
def test_the_scene_is_its_objects_less_the_person() -> None:
    content = json.loads((PEOPLE / "instances.json").read_text())
    by_super = {name: [c["name"] for c in content["categories"] if c["supercategory"] == name] for name in SCENE}
    names = [category for categories in by_super.values() for category in categories]
    cut = {"scene": ["person"]}
    audit_set = people("labels_scene.csv", object={"scene": SCENE}, spurious=["person"], minus=cut)
    rows = rows_of("labels_scene.csv")
    assert audit_set.ids == tuple(row["file"] for row in rows)
    assert audit_set.subjects.classes == ("domestic", "sports")
    assert [audit_set.subjects.classes[i] for i in audit_set.labels] == [row["label"] for row in rows]
    assert audit_set.attribute_table[:, 0].tolist() == [row["gender"] for row in rows]
    apart = people("labels_scene.csv", object=names, spurious=["person"])
    seen = 0
    for index, one in enumerate(audit_set.samples):
        scene, person = masks_of(audit_set, index)
        seen += bool(scene.any())
        each = dict(apart.samples[index].decode()[1])
        assert torch.equal(person, each.pop("person"))
        objects = torch.stack([torch.zeros_like(person), *each.values()]).any(0)
        assert torch.equal(scene, objects & ~person), one.id
    # On three photographs the only domestic object is food, or lies wholly on the person.
    assert (len(rows), seen) == (63, 60)


@with_people
def test_the_photographs_go_through_a_preset_into_one_batch() -> None:
    audit_set = people("labels_gender.csv", object=["person"]).subset(12, seed=0)
    resized = AuditDataset(audit_set.samples, object=["person"], transform=ResNet18_Weights.DEFAULT.transforms())
    batch = resized.batch(range(12))
    assert batch.images.shape == (12, 3, 224, 224) and batch.masks.flatten(2).any(2).all()
    assert batch.images.isfinite().all()

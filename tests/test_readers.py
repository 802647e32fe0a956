"""COCO instances on disk as an audit set: polygons, runs, names, and all that can be wrong; and real photographs."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask
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
from PIL import Image, ImageDraw
from torchvision.models import ResNet18_Weights

from bias_audit.data.dataset import AuditDataset

PEOPLE = Path(__file__).parents[1] / ".." / "shared" / "data" / "coco_people"
with_people = pytest.mark.skipif(not PEOPLE.is_dir(), reason=f"the photographs are not at {PEOPLE}")


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

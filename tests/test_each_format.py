"""What is particular to one format, reader by reader."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from annotated_files import FACE, HAIR, SIZE, drawn, filled, lines, of, pictures, there_and_back
from PIL import Image
from torchvision.datasets import VOCDetection, VOCSegmentation

from bias_audit.data.annotations import (
    Annotation,
    Box,
    Misfit,
    Polygons,
)
from bias_audit.data.formats import label_studio, voc
from bias_audit.data.formats.known import read_annotations, write_annotations
from bias_audit.data.outlines import mask_of, runs_of
from bias_audit.regions.convert import losses


def test_cvat_turned_boxes_and_ellipses(tmp_path: Path) -> None:
    path = tmp_path / "a.xml"
    path.write_text(
        '<annotations><image name="a.png" width="32" height="24">'
        '<box label="turned" xtl="10" ytl="4" xbr="20" ybr="8" rotation="90"/>'
        '<ellipse label="round" cx="16" cy="12" rx="8" ry="4" rotation="90"/>'
        '<tag label="blurred"/></image></annotations>'
    )
    found = drawn(read_annotations(path))
    # About the box's middle, 15 and 6.
    assert (found["a.png", "turned"] == filled(1, 11, 13, 17)).all()
    rows, columns = np.mgrid[:24, :32] + 0.5
    upright = ((columns - 16) / 4) ** 2 + ((rows - 12) / 8) ** 2 < 1
    assert (found["a.png", "round"] ^ upright).sum() <= 4
    assert found.keys() == {("a.png", "turned"), ("a.png", "round")}


def test_label_studio_turns_about_the_upper_left_corner(tmp_path: Path) -> None:
    """The corners by the formula of Label Studio's own converter."""
    value = {"x": 50, "y": 25, "width": 25, "height": 12.5, "rotation": 30, "rectanglelabels": ["tie"]}
    result = {"type": "rectanglelabels", "original_width": 32, "original_height": 24, "value": value}
    (tmp_path / "a.json").write_text(json.dumps([{"data": {"image": "a.png"}, "annotations": [{"result": [result]}]}]))
    outline = read_annotations(tmp_path / "a.json").images[0].annotations[0].outline
    x, y, w, h, (cos, sin) = 16, 6, 8, 3, (np.sqrt(3) / 2, 0.5)
    corners = [
        (x, y),
        (x + w * cos, y + w * sin),
        (x + w * cos - h * sin, y + w * sin + h * cos),
        (x - h * sin, y + h * cos),
    ]
    assert isinstance(outline, Polygons)
    np.testing.assert_allclose(np.reshape(outline.rings[0], (-1, 2)), corners, atol=1e-6)


def task(image: str = "a.png", **more: object) -> dict[str, object]:
    return {"data": {"image": image}, "annotations": [], **more}


def rectangle(label: str, **more: object) -> dict[str, object]:
    value = {"x": 50, "y": 25, "width": 25, "height": 12.5, "rotation": 0, "rectanglelabels": [label]}
    return {"type": "rectanglelabels", "original_width": 32, "original_height": 24, "value": value, **more}


def test_label_studio_annotators_are_sources_and_come_before_predictions(tmp_path: Path) -> None:
    answers = [
        {"completed_by": 3, "result": [rectangle("tie")]},
        {"completed_by": {"id": 5, "email": "x@example.org"}, "result": [rectangle("tie"), rectangle("hair")]},
        {"completed_by": 6, "was_cancelled": True, "result": [rectangle("cancelled")]},
    ]
    guess = [{"model_version": "m1", "result": [rectangle("guess", score=0.25)]}]
    tasks = [
        task(annotations=answers, predictions=guess),
        task("b.png", predictions=guess),
        task("c.png", predictions=[7]),
    ]
    (tmp_path / "a.json").write_text(json.dumps(tasks))
    found = read_annotations(tmp_path / "a.json").images
    assert [(a.region, a.source, a.score) for a in found[0].annotations] == [
        ("tie", "annotator 3", None), ("tie", "annotator 5", None), ("hair", "annotator 5", None)
    ]  # fmt: skip
    assert [(a.region, a.source, a.score) for a in found[1].annotations] == [("guess", "m1", 0.25)]
    assert found[2].annotations == () and found[0].annotations[0].outline == Box(16, 6, 24, 9)
    # Two annotators stay two.
    after = there_and_back(read_annotations(tmp_path / "a.json"), "labelstudio", tmp_path)
    assert [a.source for a in after.images[0].annotations] == ["annotator 3", "annotator 5", "annotator 5"]


def test_label_studio_finds_the_image_by_the_end_of_its_path(tmp_path: Path) -> None:
    images = pictures(tmp_path / "images", "a.png", "ward/b.png", "deadbeef-c.png")
    said = {
        "/data/upload/1/0a1b2c3d-a.png": "a.png",
        "/data/local-files/?d=set/images/ward/b.png": "ward/b.png",
        "s3://bucket/ward/b.png": "ward/b.png",
        "https://host/x/deadbeef-c.png?token=1": "deadbeef-c.png",
    }
    (tmp_path / "a.json").write_text(json.dumps([task(image) for image in said]))
    with pytest.raises(Misfit, match=r"'ward/b.png': stands in .* too"):
        read_annotations(tmp_path / "a.json", images)
    for image, file in said.items():
        (tmp_path / "a.json").write_text(json.dumps([task(image)]))
        assert read_annotations(tmp_path / "a.json", images).images[0].file == file
    assert label_studio.read(tmp_path / "a.json").images[0].file == "c.png"


def test_label_studio_labels_apart_from_their_shapes(tmp_path: Path) -> None:
    """As `<Labels>` beside `<Rectangle>` and the like gives them: the shape twice, once with its label."""
    size = {"original_width": 32, "original_height": 24, "image_rotation": 0}
    shapes: dict[str, dict[str, object]] = {
        "rectangle": {"x": 25, "y": 25, "width": 50, "height": 50, "rotation": 0},
        "polygon": {"points": [[0, 0], [50, 0], [50, 50]]},
        "ellipse": {"x": 50, "y": 50, "radiusX": 10, "radiusY": 10, "rotation": 0},
        "brush": {"format": "rle", "rle": label_studio._packed(FACE)},
    }
    listed = [
        size | {"id": kind, "type": name, "value": value | labels}
        for kind, value in shapes.items()
        for name, labels in ((kind, {}), ("labels", {"labels": [f"a {kind}"]}))
    ]
    words = {"id": "t", "type": "labels", "value": {"start": 1, "end": 2, "text": "x", "labels": ["word"]}}
    (tmp_path / "a.json").write_text(json.dumps([task(annotations=[{"result": [*listed, words]}])]))
    found = read_annotations(tmp_path / "a.json").images[0].annotations
    assert [a.region for a in found] == [f"a {kind}" for kind in shapes]
    assert found[0].outline == Box(8, 6, 24, 18) and (mask_of(found[3].outline, SIZE) == FACE).all()
    assert found[1].outline == Polygons(((0, 0, 16, 0, 16, 12),)) and isinstance(found[2].outline, Polygons)
    # A shape without its label is nothing that can be measured, and so is what is not read.
    unread = size | {"id": "b", "type": "bitmasklabels", "value": {"bitmasklabels": ["hair"]}}
    (tmp_path / "a.json").write_text(json.dumps([task(annotations=[{"result": [listed[0], listed[3], unread]}])]))
    with pytest.raises(Misfit) as wrong:
        read_annotations(tmp_path / "a.json")
    assert len(lines(wrong)) == 2 and "it has no label" in lines(wrong)[0] and "bitmasklabels are" in lines(wrong)[1]


def test_label_studio_names_that_an_address_cannot_hold(tmp_path: Path) -> None:
    name = "a+b #1&d=%20?.png"
    found = there_and_back(of(Annotation("tie", Box(3, 2, 11, 9)), file=name), "labelstudio", tmp_path)
    assert found.images[0].file == name
    for said, error in (
        ("data:image/png;base64," + "A" * 5000, "holds its image itself"),
        ("/data/local-files/?d=..%5Ca.png", "not in the folder of the images"),
    ):
        (tmp_path / "b.json").write_text(json.dumps([{"data": {"image": said}, "annotations": []}]))
        with pytest.raises(Misfit, match=error):
            read_annotations(tmp_path / "b.json", tmp_path)
    (tmp_path / "c.json").write_text('[{"data": {"image": "/data/local-files/?d=ward%5Ca.png"}, "annotations": []}]')
    assert read_annotations(tmp_path / "c.json").images[0].file == "ward/a.png"


def test_label_studio_runs_longer_than_a_word(tmp_path: Path) -> None:
    """Of more than 65,536 bytes."""
    size = (300, 400)
    mask = filled(10, 290, 0, 400, size)
    mask[150, 200] = False
    after = there_and_back(of(Annotation("hair", runs_of(mask)), size=size), "labelstudio", tmp_path)
    assert (drawn(after, size)["a.png", "hair"] == mask).all()


def test_label_studio_runs_of_bytes_that_differ(tmp_path: Path) -> None:
    """Two pixels of four bytes: the last of each is the mask, however the bytes are packed."""
    head = f"{8:032b}{7:05b}" + "0010001101111111"
    values = "000111" + "".join(f"{value:08b}" for value in (9, 9, 9, 255, 9, 9, 9, 0))
    runs = "".join(f"100{length - 1:03b}{value:08b}" for length, value in ((3, 0), (2, 255), (3, 0)))
    for bits in (head + values, head + runs):
        rle = [int(bits[k : k + 8].ljust(8, "0"), 2) for k in range(0, len(bits), 8)]
        result = {"type": "brushlabels", "original_height": 1, "value": {"rle": rle, "brushlabels": ["x"]}}
        content = task(annotations=[{"result": [result | {"original_width": 2}]}])
        (tmp_path / "a.json").write_text(json.dumps([content]))
        assert drawn(read_annotations(tmp_path / "a.json"), (1, 2))["a.png", "x"].tolist() == [[True, False]]
        content = task(annotations=[{"result": [result | {"original_width": 4}]}])
        (tmp_path / "a.json").write_text(json.dumps([content]))
        with pytest.raises(Misfit, match="its `rle` is of 8 values, expected 16 of an image of 4 x 1"):
            read_annotations(tmp_path / "a.json")


def _bounds(*edges: int) -> str:
    named = zip(("xmin", "ymin", "xmax", "ymax"), edges, strict=True)
    return "<bndbox>" + "".join(f"<{name}>{edge}</{name}>" for name, edge in named) + "</bndbox>"


def test_voc_parts_and_painted_objects(tmp_path: Path) -> None:
    """Boxes of a class that is painted are passed over; those of parts, and of other classes, are not."""
    objects = "".join(
        f"<object><name>{name}</name>{_bounds(1, 1, 9, 9)}{part}</object>"
        for name, part in (
            ("person", f"<part><name>head</name>{_bounds(2, 2, 3, 3)}</part>"),
            ("dog", ""),
        )
    )  # fmt: skip
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "Annotations" / "a.xml").write_text(
        f"<annotation><filename>a.jpg</filename><size><width>32</width><height>24</height></size>{objects}</annotation>"
    )
    plain = read_annotations(tmp_path)
    assert {(a.region, a.instance) for a in plain.images[0].annotations} == {("person", 1), ("head", 1), ("dog", 2)}
    painted = Image.fromarray(np.where(FACE, 1, np.where(HAIR, 255, 0)).astype(np.uint8), mode="P")
    painted.putpalette([channel for index in range(256) for channel in voc.palette(index)])
    (tmp_path / "SegmentationObject").mkdir()
    painted.save(tmp_path / "SegmentationObject" / "a.png")
    found = drawn(read_annotations(tmp_path))
    assert (found["a.jpg", "person"] == FACE).all(), "the first object; 255 is the border"
    assert (found["a.jpg", "head"] == filled(1, 3, 1, 3)).all() and (found["a.jpg", "dog"] == filled(0, 9, 0, 9)).all()
    (tmp_path / "SegmentationClass").mkdir()
    # A few of its pixels are a person's, 15.
    numbers = np.where(FACE, 12, 0).astype(np.uint8)
    numbers[3, 16:20] = 15
    classes = Image.fromarray(numbers, mode="P")
    classes.putpalette(painted.getpalette() or [])
    classes.save(tmp_path / "SegmentationClass" / "a.png")
    found = drawn(read_annotations(tmp_path))
    assert (found["a.jpg", "dog"] == FACE).all(), "12 is VOC's number of dog"
    (tmp_path / "labelmap.txt").write_text("background:0,0,0::\nperson:1,2,3::\n")
    with pytest.raises(Misfit, match="have no name"):
        read_annotations(tmp_path)


def test_voc_is_read_by_torchvision(tmp_path: Path) -> None:
    before = of(Annotation("tie", Box(3, 2, 11, 9)), Annotation("face", runs_of(FACE)))
    root = tmp_path / "VOCdevkit" / "VOC2012"
    write_annotations(before, root, "voc")
    pictures(root / "JPEGImages", "a.jpg")
    for kind in ("Main", "Segmentation"):
        (root / "ImageSets" / kind).mkdir(parents=True)
        (root / "ImageSets" / kind / "train.txt").write_text("a\n")
    _, target = VOCDetection(tmp_path, image_set="train")[0]
    bounds = {thing["name"]: thing["bndbox"] for thing in target["annotation"]["object"]}
    assert bounds["tie"] == {"xmin": "4", "ymin": "3", "xmax": "11", "ymax": "9"}
    assert bounds["face"] == {"xmin": "17", "ymin": "4", "xmax": "28", "ymax": "12"}
    assert target["annotation"]["size"] == {"width": "32", "height": "24", "depth": "3"}
    _, painted = VOCSegmentation(tmp_path, image_set="train")[0]
    assert (np.asarray(painted) == 2 * FACE).all(), "face is the second region"


def test_one_file_of_voc_has_its_pictures(tmp_path: Path) -> None:
    write_annotations(of(Annotation("face", runs_of(FACE))), tmp_path / "out", "voc")
    found = read_annotations(tmp_path / "out" / "Annotations" / "a.xml")
    assert (drawn(found)["a.png", "face"] == FACE).all()


def test_voc_says_what_lies_under_other_things(tmp_path: Path) -> None:
    # The person's hole stays one.
    person, face = filled(0, 20, 0, 20) & ~filled(12, 15, 12, 15), filled(2, 8, 5, 9)
    before = of(Annotation("person", runs_of(person)), Annotation("face", runs_of(face)))
    after = there_and_back(before, "voc", tmp_path)
    assert (drawn(after)["a.png", "face"] == face).all()
    assert (drawn(after)["a.png", "person"] == (person & ~face)).all()
    assert losses(before, after) == ("person: areas in 1 of 1 images have changed, to an IoU of 0.938 in a.png",)
    with pytest.raises(Misfit, match=r"'a.png': '(face|head)' would lie wholly under others"):
        write_annotations(
            of(Annotation("face", runs_of(face)), Annotation("head", runs_of(face))), tmp_path / "two", "voc"
        )
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize(
    ("picture", "labels", "names"),
    [
        ("images/train/a.png", "labels/train/a.txt", "data.yaml"),
        ("train/images/a.png", "train/labels/a.txt", "data.yaml"),
        ("obj_train_data/a.png", "obj_train_data/a.txt", "obj.names"),
        ("images/a.png", "labels/a.txt", "classes.txt"),
    ],
)
def test_yolo_is_found_where_its_tools_put_it(tmp_path: Path, picture: str, labels: str, names: str) -> None:
    pictures(tmp_path, picture)
    (tmp_path / labels).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / labels).write_text("1 0.5 0.5 0.25 0.5\n0 0.25 0.25 0.5 0.25 0.5 0.5 0.25 0.5\n0 .5 .5 1 1 .75\n")
    (tmp_path / names).write_text("names: {0: hair, 1: tie}\n" if names == "data.yaml" else "hair\ntie\n")
    (tmp_path / "README.txt").write_text("not labels")
    # LabelImg writes it there, and macOS the other.
    (tmp_path / labels).with_name("classes.txt").write_text("hair\ntie\n")
    (tmp_path / labels).with_name("._a.txt").write_bytes(b"\0\5")
    found = read_annotations(tmp_path)
    assert found.regions == ("hair", "tie") and len(found.images) == 1
    tie, corners, whole = found.images[0].annotations
    assert tie == Annotation("tie", Box(12, 6, 20, 18)) and whole == Annotation("hair", Box(0, 0, 32, 24), score=0.75)
    assert corners.outline == Polygons(((8, 6, 16, 6, 16, 12, 8, 12),))


def test_labels_beside_the_images_are_not_those_of_another_export(tmp_path: Path) -> None:
    images = pictures(tmp_path / "old" / "images", "a.png")
    (tmp_path / "old" / "labels").mkdir()
    (tmp_path / "old" / "labels" / "a.txt").write_text("0 .5 .5 1 1\n")
    before = of(Annotation("tie", Box(3, 2, 11, 9)))
    assert there_and_back(before, "yolo", tmp_path, images).images[0].annotations[0].outline == Box(3, 2, 11, 9)
    # One image, but two files that may be its labels.
    for part in ("train", "val"):
        (tmp_path / "out" / part).mkdir()
        (tmp_path / "out" / "labels" / "a.txt").rename(tmp_path / "out" / part / "a.txt")
        (tmp_path / "out" / "labels" / "a.txt").write_text("")
    (tmp_path / "out" / "labels" / "a.txt").unlink()
    with pytest.raises(Misfit, match=r"train/a\.txt: and .*val/a\.txt may both be of the image 'a\.png'"):
        read_annotations(tmp_path / "out", images)


def test_yolo_of_key_points_or_without_names_is_refused(tmp_path: Path) -> None:
    pictures(tmp_path / "images", "a.png")
    with pytest.raises(Misfit, match=r"has none of data\.yaml"):
        read_annotations(tmp_path, format="yolo")
    for text, said in (("names: [a]\nkpt_shape: [17, 3]", "key points"), ("names: 3", "expected a list of names")):
        (tmp_path / "data.yaml").write_text(text)
        with pytest.raises(Misfit, match=said):
            read_annotations(tmp_path)
    (tmp_path / "data.yaml").write_text("names: [a]")
    with pytest.raises(Misfit, match=r"no image in .* has labels"):
        read_annotations(tmp_path)


def test_csv_of_boxes_says_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("file,regoin,left,top,right,right\n")
    with pytest.raises(Misfit) as wrong:
        read_annotations(path, format="boxes")
    assert len(lines(wrong)) == 3 and "'region'" in lines(wrong)[0] and "did you mean 'regoin'?" in lines(wrong)[0]
    path.write_text("﻿file,region,left,top,right,bottom,width,height\r\na.png,tie,1,2,3,4,32,24\r\nb.png,,,,,,,\r\n")
    found = read_annotations(path).images
    assert [(i.file, i.size, len(i.annotations)) for i in found] == [("a.png", SIZE, 1), ("b.png", None, 0)]


def test_every_picture_format_of_a_painted_mask_is_refused_or_read(tmp_path: Path) -> None:
    """VOC's pictures without colours say so: grey could be indices or not."""
    (tmp_path / "SegmentationClass").mkdir()
    pictures(tmp_path / "JPEGImages", "a.png")
    buffer = io.BytesIO()
    Image.fromarray(FACE.astype(np.uint8)).save(buffer, "PNG")
    (tmp_path / "SegmentationClass" / "a.png").write_bytes(buffer.getvalue())
    with pytest.raises(Misfit, match="expected colours, got the mode 'L'"):
        read_annotations(tmp_path, format="voc")


def test_yolo_names_stay_text(tmp_path: Path) -> None:
    """A region may be called what YAML takes for a truth value, or hold its signs."""
    images = pictures(tmp_path / "images", "a.png")
    names = ("no", "a: b", "- c", "é", "1")
    before = of(*(Annotation(name, Box(1, 1, 5, 5)) for name in names))
    assert there_and_back(before, "yolo", tmp_path, images).regions == names
    assert yaml.safe_load((tmp_path / "out" / "data.yaml").read_text())["names"] == dict(enumerate(names))

"""Annotation formats: what other tools write is read, what is written is read again, and what is wrong is said at once.

`exports/` holds what other packages wrote of one made-up image; its README says which and what.
"""

from __future__ import annotations

import base64
import io
import json
import shutil
import struct
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage
from torchvision.datasets import VOCDetection, VOCSegmentation
from typer.testing import CliRunner

from bias_audit.cli import app
from bias_audit.data.annotations import (
    AnnotatedImage,
    Annotation,
    Annotations,
    Box,
    Misfit,
    Polygons,
    Runs,
)
from bias_audit.data.elements import read_xml
from bias_audit.data.formats import FORMATS, label_studio, read_annotations, recognised, voc, write_annotations
from bias_audit.data.outlines import mask_of, rings_of, runs_of, union
from bias_audit.regions.convert import convert, losses

Mask = npt.NDArray[np.bool_]
EXPORTS = Path(__file__).parent / "exports"
PEOPLE = Path(__file__).parents[1] / ".." / "shared" / "data" / "coco_people"
SIZE = (24, 32)
NAMES = {"coco": "out.json", "labelstudio": "out.json", "cvat": "out.xml", "boxes": "out.csv"}


def filled(top: int, bottom: int, left: int, right: int, size: tuple[int, int] = SIZE) -> Mask:
    mask = np.zeros(size, dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


TIE = filled(2, 9, 3, 11)
FACE = filled(3, 12, 16, 28) & ~filled(6, 8, 20, 23)
HAIR = mask_of(Polygons(((2, 14, 12, 14, 12, 22, 2, 20),)), SIZE)


def pictures(folder: Path, *files: str, size: tuple[int, int] = SIZE) -> Path:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size[::-1]).save(folder / file)
    return folder


def drawn(found: Annotations, size: tuple[int, int] = SIZE) -> dict[tuple[str, str], Mask]:
    """Each region of each image as a mask."""
    return {
        (image.file, region): union([a.outline for a in image.annotations if a.region == region], size)
        for image in found.images
        for region in {annotation.region for annotation in image.annotations}
    }


def of(*annotations: Annotation, file: str = "a.png", size: tuple[int, int] | None = SIZE) -> Annotations:
    regions = tuple(dict.fromkeys(annotation.region for annotation in annotations))
    return Annotations((AnnotatedImage(file, size, annotations, "made up"),), regions)


def there_and_back(found: Annotations, to: str, folder: Path, images: Path | None = None) -> Annotations:
    path = folder / NAMES.get(to, "out")
    shutil.rmtree(path, ignore_errors=True)
    path.unlink(missing_ok=True)
    write_annotations(found, path, to, images)
    return read_annotations(path, images, to)


def lines(wrong: pytest.ExceptionInfo[Misfit]) -> list[str]:
    return list(wrong.value.lines)


# ------------------------------------------------------------------------------------------------- what others write


@pytest.mark.parametrize(
    ("export", "format", "expected"),
    [
        ("datumaro_cvat.xml", "cvat", {("ward/a.png", "tie"): TIE, ("ward/a.png", "hair"): HAIR}),
        # Its boxes count from 0: a pixel more at the left and above.
        (
            "datumaro_voc",
            "voc",
            {("ward/a.png", "tie"): filled(1, 9, 2, 11), ("ward/a.png", "face"): FACE},
        ),
        ("datumaro_voc_segmentation", "voc", {("ward/a.png", "face"): FACE}),
        ("datumaro_yolo", "yolo", {("ward/a.png", "tie"): TIE}),
        ("supervision_voc", "voc", {("a.png", "tie"): TIE, ("a.png", "hair"): filled(14, 22, 2, 12)}),
        ("supervision_yolo", "yolo", {("a.png", "tie"): TIE, ("a.png", "hair"): filled(14, 22, 2, 12)}),
        ("labelme.json", "labelme", {("a.png", "tie"): TIE, ("a.png", "hair"): HAIR, ("a.png", "face"): FACE}),
        ("label_studio.json", "labelstudio", {("a.png", "face"): FACE}),
    ],
)
def test_what_other_tools_write_is_read(
    tmp_path: Path, export: str, format: str, expected: dict[tuple[str, str], Mask]
) -> None:
    images = pictures(tmp_path, "ward/a.png" if "datumaro" in export else "a.png", "b.png")
    assert recognised(EXPORTS / export) == format or export == "datumaro_voc_segmentation"
    found = drawn(read_annotations(EXPORTS / export, images, format))
    assert found.keys() - {("a.png", "button")} == expected.keys()
    for key, mask in expected.items():
        # YOLO's shares have 5 or 6 digits: a row at an edge may go either way.
        assert (found[key] ^ mask).sum() <= (12 if format == "yolo" else 0), key


def test_polygons_by_supervision_are_read(tmp_path: Path) -> None:
    """Its polygons run through the middle of the pixels on the rim, so half a pixel is off all around."""
    found = drawn(read_annotations(EXPORTS / "supervision_polygons", pictures(tmp_path, "a.png")))
    assert (found["a.png", "tie"] & TIE).sum() == found["a.png", "tie"].sum() == 7 * 6
    assert not (found["a.png", "hair"] & ~HAIR).any() and found["a.png", "hair"].sum() > 0.7 * HAIR.sum()


def test_a_circle_of_labelme_has_the_area_of_one() -> None:
    found = drawn(read_annotations(EXPORTS / "labelme.json"))["a.png", "button"]
    # Centre 20, 18 and radius 5; one below the image's edge is cut off.
    rows, columns = np.mgrid[:24, :32] + 0.5
    assert (found ^ (np.hypot(columns - 20, rows - 18) < 5)).sum() <= 4


def test_instances_and_sources_are_read() -> None:
    shapes = read_annotations(EXPORTS / "labelme.json").images[0].annotations
    assert {a.region: a.instance for a in shapes} == {"tie": None, "hair": 1, "button": None, "face": 1}
    boxes = read_annotations(EXPORTS / "datumaro_cvat.xml").images[0].annotations
    assert {a.region: a.instance for a in boxes} == {"tie": 1, "hair": 2}
    assert read_annotations(EXPORTS / "datumaro_cvat.xml").regions == ("tie", "hair", "face")
    assert read_annotations(EXPORTS / "label_studio.json").images[0].annotations[0].source == "annotator 3"


# ------------------------------------------------------------------------------------------------------- round trips

_edges = st.integers(0, 96).map(lambda value: value / 4)


@st.composite
def boxes(draw: st.DrawFn) -> Box:
    left, top = draw(_edges), draw(_edges)
    return Box(left, top, left + 0.25 + draw(_edges), top + 0.25 + draw(_edges))


@st.composite
def masks(draw: st.DrawFn) -> Mask:
    height, width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    bits = draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width))
    mask = np.array(bits).reshape(height, width)
    mask[draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))] = True
    return mask


@pytest.mark.parametrize("to", [name for name in FORMATS if name != "masks"])
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(found=st.lists(boxes(), min_size=1, max_size=4))
def test_boxes_come_back_as_they_were(tmp_path: Path, to: str, found: list[Box]) -> None:
    images = pictures(tmp_path / "images", "ward/a.png")
    before = of(*(Annotation(f"r{k % 2}", box) for k, box in enumerate(found)), file="ward/a.png")
    after = there_and_back(before, to, tmp_path, images)
    assert [(a.region, a.outline) for a in after.images[0].annotations] == [
        (a.region, a.outline) for a in before.images[0].annotations
    ]
    assert after.images[0].file == "ward/a.png"
    assert losses(before, after) == ()


@pytest.mark.parametrize("to", ["coco", "masks", "voc", "labelme", "cvat", "labelstudio"])
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mask=masks())
def test_masks_come_back_as_they_were(tmp_path: Path, to: str, mask: Mask) -> None:
    size = (mask.shape[0], mask.shape[1])
    images = pictures(tmp_path / "images", "a.png", size=size)
    before = of(Annotation("hair", runs_of(mask)), size=size)
    after = there_and_back(before, to, tmp_path, images)
    assert (drawn(after, size)["a.png", "hair"] == mask).all()
    assert losses(before, after) == ()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mask=masks())
def test_as_polygons_masks_lose_their_holes_only(tmp_path: Path, mask: Mask) -> None:
    size = (mask.shape[0], mask.shape[1])
    images = pictures(tmp_path / "images", "a.png", size=size)
    whole = ndimage.binary_fill_holes(mask)
    assert (mask_of(rings_of(mask), size) == whole).all()
    before = of(Annotation("hair", runs_of(mask)), size=size)
    after = there_and_back(before, "yolo", tmp_path, images)
    assert (drawn(after, size)["a.png", "hair"] == whole).all()
    assert any("holes in 1 of 1 images" in line for line in losses(before, after)) == bool((whole != mask).any())


@pytest.mark.parametrize("to", ["coco", "labelme", "cvat", "labelstudio", "yolo"])
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rings=st.lists(st.lists(_edges, min_size=6, max_size=10).filter(lambda r: len(r) % 2 == 0), max_size=2, min_size=1)
)
def test_polygons_come_back_as_they_were(tmp_path: Path, to: str, rings: list[list[float]]) -> None:
    images = pictures(tmp_path / "images", "a.png")
    after = there_and_back(of(Annotation("hair", Polygons(tuple(map(tuple, rings))))), to, tmp_path, images)
    outlines = [a.outline for a in after.images[0].annotations]
    found = [ring for outline in outlines if isinstance(outline, Polygons) for ring in outline.rings]
    assert [list(ring) for ring in found] == rings


@pytest.mark.parametrize("to", list(FORMATS))
def test_what_is_written_is_recognised(tmp_path: Path, to: str) -> None:
    images = pictures(tmp_path / "images", "a.png")
    path = tmp_path / NAMES.get(to, "out")
    write_annotations(of(Annotation("tie", Box(3, 2, 11, 9))), path, to, images)
    assert recognised(path) == to


def test_what_a_format_holds_beside_outlines_comes_back(tmp_path: Path) -> None:
    """Each format is asked for what its docstring says that it holds."""
    thing = Annotation("tie", Box(3, 2, 11, 9), score=0.5, source="a model", instance=2)
    images = pictures(tmp_path / "images", "a.png")
    held = {
        "coco": ("score", "source", "instance"),
        "boxes": ("score", "source", "instance"),
        "labelstudio": ("score", "source"),
        "yolo": ("score",),
        "labelme": ("instance",),
        "cvat": ("instance",),
    }
    for to, names in held.items():
        back = there_and_back(of(thing), to, tmp_path, images).images[0].annotations[0]
        assert {name: getattr(back, name) for name in names} == {name: getattr(thing, name) for name in names}, to
        said = " ".join(losses(of(thing), there_and_back(of(thing), to, tmp_path, images)))
        assert {f"{name}s" for name in ("score", "source", "instance") if f"{name}s" in said} == {
            f"{name}s" for name in ("score", "source", "instance") if getattr(back, name) != getattr(thing, name)
        } - ({"sources"} if to == "cvat" and "sources" not in said else set()), to


def test_images_without_annotations_and_unused_regions_are_kept_or_said(tmp_path: Path) -> None:
    images = pictures(tmp_path / "images", "a.png", "b.png")
    empty = AnnotatedImage("b.png", SIZE, (), "made up")
    before = replace(of(Annotation("tie", Box(3, 2, 11, 9))), regions=("tie", "hair"))
    before = replace(before, images=(*before.images, empty))
    for to in FORMATS:
        after = there_and_back(before, to, tmp_path, images)
        assert [image.file for image in after.images] == ["a.png", "b.png"], to
        assert ("hair" in after.regions) != any("hair" in loss for loss in losses(before, after)), to


# ----------------------------------------------------------------------------------------------- all that is wrong

CVAT = """<annotations>
<version>1.1</version>
<image id="0" name="a.png" width="32" height="24">
  <box label="tie" xtl="9" ytl="2" xbr="3" ybr="9"/>
  <polyline label="tie" points="1,1;2,2"/>
  <polygon label="hair" points="1,1;2,2"/>
  <mask label="hair" rle="3, 5" left="1" top="1" width="3" height="3"/>
  <mask label="hair" rle="3, 6" left="30" top="1" width="3" height="3"/>
  <polygon label="hair" points="1,1;2,x;3,3"/>
  <box label="" xtl="1" ytl="2" xbr="3" ybr="9"/>
  <mask label="hair" rle="3, 6" left="-2" top="1" width="3" height="3"/>
</image>
<image id="1" name="../b.png" width="32" height="24"/>
<image id="2" name="c.png" width="0" height="24"/>
<track id="0" label="tie"/>
</annotations>
"""
VOC = """<annotation>
<filename>a.png</filename>
<size><width>32</width><height>24</height></size>
<object><name>tie</name>
<bndbox><xmin>9</xmin><ymin>2</ymin><xmax>3</xmax><ymax>9</ymax></bndbox></object>
<object><name>hair</name>
<bndbox><xmin>x</xmin><ymin>2</ymin><xmax>3</xmax><ymax>9</ymax></bndbox></object>
<object><name>face</name></object>
</annotation>
"""
LABELME = """{"imagePath": "a.png", "imageHeight": 24, "imageWidth": 32, "shapes": [
{"label": "tie", "shape_type": "rectangle", "points": [[1, 2]]},
{"label": "tie", "shape_type": "rectangle", "points": [[1, 2], [1, 9]]},
{"label": "eye", "shape_type": "point", "points": [[1, 2]]},
{"label": "hair", "shape_type": "polygon", "points": [[1, 2], [3, 4]]},
{"label": "face", "shape_type": "mask", "points": [[1, 2], [3, 4]], "mask": "nonsense"}
]}
"""
TASKS = """[{"data": {"image": "a.png"}, "annotations": [{"result": [
{"type": "rectanglelabels", "original_width": 32, "original_height": 24, "value": {"x": 1, "rectanglelabels": ["tie"]}},
{"type": "polygonlabels", "original_width": 32, "original_height": 24, "value": {"points": 3, "polygonlabels": ["x"]}},
{"type": "keypointlabels", "original_width": 32, "original_height": 24, "value": {"keypointlabels": ["tie"]}},
{"type": "brushlabels", "original_width": 32, "original_height": 24, "value": {"rle": [0, 0], "brushlabels": ["tie"]}},
{"type": "brushlabels", "original_width": 32, "original_height": 24, "value": {"rle": [300], "brushlabels": ["tie"]}},
{"type": "rectanglelabels", "value": {"x": 1, "rectanglelabels": ["tie"]}},
{"type": "rectanglelabels", "original_width": 32, "original_height": 24, "value": {"x": 1, "rectanglelabels": []}},
{"type": "choices", "value": {"choices": ["fine"]}}]}]},
{"data": {}, "annotations": []}]
"""
BOXES = """file,region,left,top,right,bottom,score
a.png,tie,9,2,3,9,
a.png,tie,1,2,3,nan,
a.png,,1,2,3,9,
b.png,tie,1,2,3,9,1.5
c.png,tie,1,2,3
../d.png,tie,1,2,3,4,
e.png,tie,1,2,3,4,1,2
,tie,1,2,3,4,
,tie,1,2,3,4,
f.png,tie,1,2,1e9,4,
good.png,tie,1,2,3,4,
"""


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        (
            "a.xml",
            CVAT,
            ["line 4: image 'a.png': a box has its left edge at 9", "line 5: image 'a.png': a polyline has no area",
             "line 6: image 'a.png': a polygon has 4", "line 7: image 'a.png': a mask of 3 x 3 pixels has runs over 8",
             "line 8: image 'a.png': a mask of 3 x 3 pixels at (30, 1) does not lie", "line 9: image 'a.png': po",
             "line 3: image 'a.png': something in it has no label",
             "line 11: image 'a.png': a mask of 3 x 3 pixels at (-2, 1) does not lie",
             "line 13: image '../b.png': is not in the folder",
             "line 14: image 'c.png': has 0 x 24 pixels", 'line 15: tracks are of "CVAT for video"'],
        ),
        (
            "a.xml",
            VOC,
            ["line 5: image 'a.png': a box has its left edge at 8", "line 7: image 'a.png': xmin is 'x'",
             "line 8: image 'a.png': the object 'face' has no <bndbox>"],
        ),
        (
            "a.json",
            LABELME,
            ["line 2: image 'a.png': 'tie': a rectangle has 1 points", "line 3: image 'a.png': 'tie': a box has",
             "line 4: image 'a.png': 'eye': a point has no area", "line 5: image 'a.png': 'hair': a polygon has 4",
             "line 6: image 'a.png': 'face': its mask cannot be read"],
        ),
        (
            "a.json",
            TASKS,
            ["line 2: image 'a.png': y is ''", "line 3: image 'a.png': its `points` are no pairs",
             "line 4: image 'a.png': keypointlabels are not read", "line 5: image 'a.png': its `rle` ends too early",
             "line 6: image 'a.png': its `rle` is no list of bytes", "line 7: image 'a.png': has 0 x 0 pixels",
             "line 8: image 'a.png': it has no label", "line 10: a task has no image"],
        ),
        (
            "a.csv",
            BOXES,
            ["line 2: image 'a.png': a box has its left edge at 9", "line 3: image 'a.png': bottom is 'nan'",
             "line 4: image 'a.png': no value in column 'region'", "line 5: image 'b.png': score is 1.5",
             "line 6: image 'c.png': bottom is ''", "line 7: image '../d.png': is not in the folder",
             "line 8: image 'e.png': more values than columns", "line 9: no value in column 'file'",
             "line 10: no value in column 'file'", "line 11: image 'f.png': a coordinate is 1e+09"],
        ),
    ],
    ids=["cvat", "voc", "labelme", "labelstudio", "boxes"],
)  # fmt: skip
def test_all_that_is_wrong_is_said_at_once(tmp_path: Path, name: str, text: str, expected: Sequence[str]) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    with pytest.raises(Misfit) as wrong:
        read_annotations(path)
    said = lines(wrong)
    for start in expected:
        assert sum(line.startswith(f"{path}, {start}") for line in said) == 1, (start, said)
    assert len(said) == len(expected) and "good.png" not in str(said)


def test_all_that_is_wrong_with_yolo_is_said_at_once(tmp_path: Path) -> None:
    images = pictures(tmp_path / "images", "a.png", "b.png")
    (tmp_path / "images" / "c.png").write_bytes(b"no picture")
    (tmp_path / "labels").mkdir()
    text = (
        "0 .5 .5 .2 .2\n7 .5 .5 .2 .2\n0 .5 .5 .2\n\n0 120 80 40 30\n0 .1 .1 .2 .2 .3 .3 .4\n0 .5 .5 0 .2\nx 1 1 1 1\n"
    )
    (tmp_path / "labels" / "a.txt").write_text(text)
    (tmp_path / "labels" / "gone.txt").write_text("0 .5 .5 .2 .2\n")
    (tmp_path / "data.yaml").write_text("names: [tie]\n")
    with pytest.raises(Misfit) as wrong:
        read_annotations(tmp_path)
    labels = tmp_path / "labels" / "a.txt"
    expected = [
        f"{labels}, line 2: image 'a.png': has the class 7",
        f"{labels}, line 3: image 'a.png': a polygon has 3",
        f"{labels}, line 5: image 'a.png': has the places [120.0",
        f"{labels}, line 6: image 'a.png': a polygon has 7",
        f"{labels}, line 7: image 'a.png': a box has its left edge at 16",
        f"{labels}, line 8: image 'a.png': the class is 'x'",
        f"{images / 'c.png'}: ",
        f"{tmp_path / 'labels' / 'gone.txt'}: has no image",
    ]
    assert all(any(line.startswith(start) for line in lines(wrong)) for start in expected), lines(wrong)
    assert len(lines(wrong)) == len(expected)
    labels.write_text("0 .5 .5 .2 .2\n")
    (tmp_path / "images" / "c.png").unlink()
    (tmp_path / "labels" / "gone.txt").unlink()
    assert len(read_annotations(tmp_path).images) == 2


@pytest.mark.parametrize("file", ["../x.png", "/etc/x.png", "C:\\x.png", "..\\x.png"])
def test_no_name_leaves_the_folder_of_the_images(tmp_path: Path, file: str) -> None:
    said = json.dumps(file)
    texts = {
        "cvat.xml": f'<annotations><image name="{file}" width="3" height="3"/></annotations>',
        "voc.xml": f"<annotation><filename>{file}</filename></annotation>",
        "boxes.csv": f"file,region,left,top,right,bottom\n{file},tie,1,1,2,2\n",
        "tasks.json": f'[{{"data": {{"image": {json.dumps("/data/local-files/?d=" + file)}}}, "annotations": []}}]',
    }
    # There paths count from a root of their own.
    if file.startswith("/"):
        texts.pop("tasks.json")
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(Misfit, match="not in the folder of the images") as wrong:
            read_annotations(tmp_path / name, tmp_path)
        assert name in str(wrong.value)
    # LabelMe's own files say so of pictures beside: what counts then is the last part.
    (tmp_path / "labelme.json").write_text(f'{{"imagePath": {said}, "imageHeight": 3, "imageWidth": 3, "shapes": []}}')
    assert read_annotations(tmp_path / "labelme.json").images[0].file == "x.png"


BILLION = '<!DOCTYPE x [<!ENTITY a "ha"><!ENTITY b "&a;&a;">]>'
ELSEWHERE = '<!DOCTYPE x [<!ENTITY b SYSTEM "file:///etc/passwd">]>'


@pytest.mark.parametrize("document", [BILLION, ELSEWHERE, '<!DOCTYPE x SYSTEM "http://localhost/x.dtd">'])
def test_xml_with_a_document_type_is_refused(tmp_path: Path, document: str) -> None:
    for tag, name in (("annotations", "cvat"), ("annotation", "voc")):
        path = tmp_path / f"{name}.xml"
        path.write_text(f'<?xml version="1.0"?>\n{document}\n<{tag}><filename>&b;</filename></{tag}>')
        with pytest.raises(Misfit, match=r"line 2: has a document type"):
            read_annotations(path, format=name)
        path.write_text(f'<?xml version="1.0"?>\n<{tag}><filename>a.png</filename></{tag}>')
        assert read_xml(path, tag).said("filename") == "a.png"


def test_lines_of_xml_are_known_beyond_65535(tmp_path: Path) -> None:
    path = tmp_path / "a.xml"
    path.write_text("<annotations>" + "\n" * 70_000 + "<image/></annotations>")
    assert next(read_xml(path, "annotations").all("image")).line == 70_001
    path.write_text('<?xml version="1.0" encoding="gb2312"?><annotations/>')
    with pytest.raises(ValueError, match=r"a\.xml, line 1: not valid XML: multi-byte .* in UTF-8"):
        read_xml(path, "annotations")
    path.write_text("<annotations>\n<image></annotations>")
    with pytest.raises(ValueError, match=r"a\.xml, line 2: not valid XML"):
        read_xml(path, "annotations")


def bomb(width: int, height: int) -> str:
    """A PNG whose header asks for many pixels, in base64."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    return base64.b64encode(png).decode()


def test_small_files_take_little_memory(tmp_path: Path) -> None:
    """What a file asks for is compared with its image's size, and that with what is decoded, before it is taken."""
    huge = 1 << 16
    mask = {"label": "x", "shape_type": "mask", "points": [[0, 0], [huge, huge]], "mask": bomb(huge + 1, huge + 1)}
    head = f"{1 << 31:032b}{7:05b}" + "0010001101111111"
    rle = [int(head[k : k + 8].ljust(8, "0"), 2) for k in range(0, len(head), 8)]
    brush = {"type": "brushlabels", "value": {"rle": rle, "brushlabels": ["x"]}}
    texts = {
        "labelme.json": json.dumps({"imagePath": "a", "imageHeight": 9, "imageWidth": 9, "shapes": [mask]}),
        "large.json": json.dumps({"imagePath": "a", "imageHeight": huge, "imageWidth": huge, "shapes": [mask]}),
        "tasks.json": json.dumps(
            [
                {"data": {"image": "a"}, "annotations": [{"result": [brush | size]}]}
                for size in ({"original_width": 1 << 15, "original_height": 1 << 14}, {"original_width": 9})
            ]
        ),
        "cvat.xml": '<annotations><image name="a" width="9" height="9"><mask label="x" rle="0, 4294967296" left="0" '
        'top="0" width="65536" height="65536"/></image></annotations>',
        "sides.xml": f'<annotations><image name="a" width="{huge}" height="{huge}"/></annotations>',
        "voc.xml": "<annotation><filename>a</filename><size><width>65536</width><height>65536</height></size>"
        "</annotation>",
        "count.json": json.dumps(
            [
                {
                    "data": {"image": "a"},
                    "annotations": [
                        {
                            "result": [
                                brush
                                | {"value": {"rle": 1 << 28, "brushlabels": ["x"]}}
                                | {"original_width": 9, "original_height": 9}
                            ]
                        }
                    ],
                }
            ]
        ),
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        tracemalloc.start()
        with pytest.raises(Misfit):
            read_annotations(tmp_path / name)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 32 << 20, (name, peak)


@pytest.mark.parametrize("side", [2, 9000])
def test_a_mask_of_labelme_has_the_size_that_its_points_say(tmp_path: Path, side: int) -> None:
    """What its header says is compared before a pixel is decoded."""
    shape = {"label": "x", "shape_type": "mask", "points": [[1, 1], [3, 2]], "mask": bomb(side, side)}
    text = json.dumps({"imagePath": "a", "imageHeight": 24, "imageWidth": 32, "shapes": [shape]})
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(
        Misfit, match=rf"'x': its mask cannot be read \(has {side} x {side} pixels, its points are of 3"
    ):
        read_annotations(tmp_path / "a.json")


# ------------------------------------------------------------------------------------------------- format by format


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


# ------------------------------------------------------------------------------------------------------- converting


def test_a_writer_refuses_what_it_would_lose_and_writes_nothing(tmp_path: Path) -> None:
    images = pictures(tmp_path / "images", "a.png", "a.jpg")
    empty = of(Annotation("hair", runs_of(np.zeros(SIZE, dtype=bool))), Annotation("tie", Polygons(())))
    for to in ("labelme", "cvat", "labelstudio", "yolo", "voc", "boxes"):
        with pytest.raises(Misfit) as wrong:
            write_annotations(empty, tmp_path / NAMES.get(to, "out"), to, images)
        assert len(lines(wrong)) == 2 and "'hair': it covers no pixel" in lines(wrong)[0], to
    misfit = of(Annotation("hair", Runs((2, 2), (2, 2))))
    tie = Annotation("tie", Box(1, 1, 2, 2))
    twins = Annotations(tuple(of(tie, file=file).images[0] for file in ("a.png", "a.jpg")), ("tie",))
    for to in ("labelme", "yolo", "voc"):
        for wrong_one, said in ((misfit, "does not fit"), (twins, "differs in its suffix only")):
            with pytest.raises(Misfit, match=said):
                write_annotations(wrong_one, tmp_path / "out", to, images)
    unsized = of(Annotation("hair", runs_of(FACE)), size=None)
    with pytest.raises(Misfit, match=r"'a\.png': its size is not known: give the folder of the images"):
        write_annotations(unsized, tmp_path / "out", "labelme")
    with pytest.raises(Misfit, match="character that XML cannot"):
        write_annotations(of(Annotation("ti\x00e", Box(1, 1, 2, 2))), tmp_path / "out.xml", "cvat")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images"]


@pytest.mark.parametrize("to", ["labelme", "cvat", "labelstudio", "yolo", "voc", "boxes"])
def test_boxes_without_an_area_are_refused_where_they_come_from(tmp_path: Path, to: str) -> None:
    """COCO may hold such; what is refused only when it is read again would be said of a file that is gone."""
    pictures(tmp_path, "a.png")
    write_annotations(of(Annotation("tie", Box(1, 1, 1, 4))), tmp_path / "thin.json", "coco")
    with pytest.raises(Misfit) as wrong:
        convert(tmp_path / "thin.json", to, tmp_path / "out", images=tmp_path)
    assert len(lines(wrong)) == 1
    assert lines(wrong)[0].startswith(f"{tmp_path / 'thin.json'}: image 'a.png': 'tie': a box has its left edge at 1")


def test_what_yolo_cannot_say_is_refused_where_it_comes_from(tmp_path: Path) -> None:
    images = pictures(tmp_path / "images", "a.png")
    for outline in (Box(200, 1, 210, 4), Polygons(((1, 1, 900, 1, 900, 900),))):
        write_annotations(of(Annotation("tie", outline)), tmp_path / "far.json", "coco")
        with pytest.raises(Misfit, match=r"far\.json: image 'a\.png': 'tie': has the places"):
            convert(tmp_path / "far.json", "yolo", tmp_path / "out", images=images)
    write_annotations(of(Annotation("tie", Box(1, 1, 2, 4)), file="gone.png"), tmp_path / "gone.json", "coco")
    for to in ("yolo", "masks"):
        with pytest.raises(Misfit, match=r"gone\.json: image 'gone\.png': no file .*images/gone\.png"):
            convert(tmp_path / "gone.json", to, tmp_path / "out", images=images)
    assert not (tmp_path / "out").exists()


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["regions", "convert", *map(str, arguments)])
    return result.exit_code, result.output or str(result.exception)


def source(folder: Path) -> tuple[Path, Path]:
    """COCO as proposed, with a hole, a score and a box, and its images."""
    images = pictures(folder / "images", "a.png", "b.png")
    face = Annotation("face", runs_of(FACE), score=0.5, source="a model", instance=1)
    both = of(face, Annotation("tie", Box(3, 2, 11, 9)))
    both = replace(both, images=(*both.images, AnnotatedImage("b.png", SIZE, (replace(face, instance=2),), "made up")))
    write_annotations(both, folder / "regions.json", "coco")
    return folder / "regions.json", images


def test_convert_says_what_is_lost(tmp_path: Path) -> None:
    path, images = source(tmp_path)
    code, said = run(path, "--to", "yolo", "-o", tmp_path / "yolo", "--images", images)
    assert code == 0, said
    assert "coco to yolo: 3 things in 2 images" in said
    assert "lost: face: holes in 2 of 2 images are filled" in said
    iou = FACE.sum() / ndimage.binary_fill_holes(FACE).sum()
    assert (
        f"lost: face: areas in 2 of 2 images have changed, to an IoU of {np.floor(iou * 1000) / 1000:.3f} in a.png"
        in said
    )
    assert "lost: sources of 2 of 3 things are not held" in said and "tie" not in said
    code, said = run(path, "--to", "boxes", "-o", tmp_path / "boxes.csv")
    assert code == 0 and "lost: face: outlines in 2 of 2 images are boxes now" in said and "scores" not in said
    code, said = run(path, "--to", "cvat", "-o", tmp_path / "sub" / "annotations.xml")
    assert code == 0 and "lost: scores of 2 of 3 things are not held" in said and "areas" not in said
    code, said = run(tmp_path / "sub" / "annotations.xml", "--to", "coco", "-o", tmp_path / "back.json")
    assert code == 0 and "lost:" not in said
    after, before = drawn(read_annotations(tmp_path / "back.json")), drawn(read_annotations(path))
    assert after.keys() == before.keys() and all((after[key] == before[key]).all() for key in before)


def test_convert_writes_nothing_where_it_refuses(tmp_path: Path) -> None:
    path, images = source(tmp_path)
    listed = sorted(tmp_path.iterdir())
    (tmp_path / "bad.csv").write_text(BOXES)
    for arguments, said in (
        ((path, "--to", "yolo", "-o", tmp_path / "out"), "give their folder with --images"),
        ((path, "--to", "voc", "-o", images), "is there already"),
        ((path, "--to", "vock", "-o", tmp_path / "out"), "unknown format 'vock'"),
        ((path, "--to", "voc", "-o", tmp_path / "out", "--from", "cvat"), "not valid XML"),
        ((tmp_path / "gone", "--to", "voc", "-o", tmp_path / "out"), "is not there"),
        ((tmp_path / "bad.csv", "--to", "coco", "-o", tmp_path / "out.json"), "line 11"),
    ):
        code, found = run(*arguments)
        assert code != 0 and said in found, found
    assert sorted(tmp_path.iterdir()) == sorted([*listed, tmp_path / "bad.csv"])


def test_convert_ends_with_2_and_a_line_for_each_fault_without_torch(tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_text(BOXES)
    source(tmp_path)
    script = """
import sys
from bias_audit.cli import main
codes = []
for source, to, out in (("regions.json", "voc", "voc"), ("bad.csv", "coco", "out.json")):
    sys.argv = ["bias-audit", "regions", "convert", source, "--to", to, "-o", out]
    try:
        main()
    except SystemExit as end:
        codes.append(end.code)
assert codes == [0, 2], codes
assert "torch" not in sys.modules
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert len(ended.stderr.splitlines()) == 10 and "line 5: image 'b.png'" in ended.stderr
    assert (tmp_path / "voc" / "Annotations" / "a.xml").is_file() and not (tmp_path / "out.json").exists()


def test_a_lost_region_is_an_error_of_the_format(tmp_path: Path) -> None:
    before = of(Annotation("tie", Box(3, 2, 11, 9)), Annotation("hair", Box(1, 1, 2, 2)))
    after = of(Annotation("tie", Box(3, 2, 11, 9)))
    with pytest.raises(Misfit, match="'hair': this format loses it"):
        losses(before, after)
    assert losses(after, after) == ()


@pytest.mark.skipif(not PEOPLE.is_dir(), reason="../shared/data/coco_people is not there")
@pytest.mark.parametrize("to", [name for name in FORMATS if name != "coco"])
def test_real_polygons_keep_their_areas(tmp_path: Path, to: str) -> None:
    """Of the first five photographs: exact but for boxes and, in VOC, for what lies under other things.

    Grey pictures of the same sizes stand for the photographs.
    """
    known = read_annotations(PEOPLE / "instances.json")
    few = [
        replace(image, annotations=tuple(a for a in image.annotations if a.region in ("person", "tie", "chair")))
        for image in known.images[:5]
    ]
    write_annotations(Annotations(tuple(few), ("person", "tie", "chair")), tmp_path / "few.json", "coco")
    images = tmp_path / "images"
    for image in few:
        pictures(images, image.file, size=image.size or (1, 1))
    found = convert(tmp_path / "few.json", to, tmp_path / NAMES.get(to, "out"), images=images)
    areas = [float(loss.split(" IoU of ")[1].split()[0]) for loss in found.losses if " IoU of " in loss]
    if to == "boxes":
        assert areas and "boxes now" in " ".join(found.losses)
    else:
        assert all(iou > (0.5 if to == "voc" else 0.99) for iou in areas), found.losses


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

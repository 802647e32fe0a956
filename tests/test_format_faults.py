"""Annotation files that are wrong, damaged or hostile: all of it is said at once, and takes little memory."""

from __future__ import annotations

import base64
import json
import struct
import tracemalloc
import zlib
from collections.abc import Sequence
from pathlib import Path

import pytest
from annotated_files import BOXES, lines, pictures

from bias_audit.data.annotations import (
    Misfit,
)
from bias_audit.data.elements import read_xml
from bias_audit.data.formats.known import read_annotations

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

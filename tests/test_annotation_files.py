"""COCO and mask folders, in and out, and what all readers of annotations share: names, lines, whole folders.

Enters: files that are written here. Leaves: nothing.
"""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO

from bias_audit import AuditDataset
from bias_audit.data.annotations import (
    AnnotatedImage,
    Annotation,
    Annotations,
    Box,
    Complaints,
    Misfit,
    Outline,
    Painted,
    Polygons,
    Runs,
)
from bias_audit.data.files import leaves, size_of, unfound, whole_folder
from bias_audit.data.formats import coco, masks
from bias_audit.data.formats.known import FORMATS, read_annotations, recognised, write_annotations
from bias_audit.data.json_files import MOST_LOCATED, line_in_json
from bias_audit.data.outlines import mask_of, runs_of, union
from bias_audit.data.sheet import describe

HEIGHT, WIDTH = 10, 14


def picture(path: Path, height: int = HEIGHT, width: int = WIDTH) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((height, width, 3), 90, np.uint8)).save(path)
    return path


def block(top: int, left: int, bottom: int, right: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.bool_)
    mask[top:bottom, left:right] = True
    return mask


def annotated(*images: AnnotatedImage, groups: tuple[tuple[str, str], ...] = ()) -> Annotations:
    return Annotations(images, ("hair", "coat"), groups)


def image(file: str, *annotations: Annotation, size: tuple[int, int] | None = (HEIGHT, WIDTH)) -> AnnotatedImage:
    return AnnotatedImage(file, size, annotations, "made up")


def drawn(found: Annotations) -> dict[str, dict[str, bytes]]:
    """The mask of each region of each image."""
    return {
        one.file: {
            region: union([a.outline for a in one.annotations if a.region == region], (HEIGHT, WIDTH)).tobytes()
            for region in {a.region for a in one.annotations}
        }
        for one in found.images
    }


# ------------------------------------------------------------------------------------------------------------ COCO

corners = st.integers(0, 4 * WIDTH).map(lambda quarter: quarter / 4)
rings = st.lists(st.tuples(*[corners] * 6), min_size=1, max_size=3).map(tuple)
bits = st.lists(st.booleans(), min_size=HEIGHT * WIDTH, max_size=HEIGHT * WIDTH)
outlines: st.SearchStrategy[Outline] = st.one_of(
    st.tuples(corners, corners, corners, corners).map(
        lambda c: Box(min(c[0], c[2]), min(c[1], c[3]), max(c[0], c[2]), max(c[1], c[3]))
    ),
    rings.map(Polygons),
    bits.map(lambda values: runs_of(np.array(values).reshape(HEIGHT, WIDTH))),
    st.integers(0, HEIGHT * WIDTH).map(lambda n: Runs((n, HEIGHT * WIDTH - n), (HEIGHT, WIDTH))),
)
things = st.builds(
    Annotation,
    st.sampled_from(["hair", "coat"]),
    outlines,
    st.none() | st.floats(0, 1),
    st.sampled_from(["", "Mask R-CNN, weights 1f2e", "Ann"]),
    st.none() | st.integers(0, 9),
)


@settings(max_examples=40)
@given(st.lists(st.lists(things, max_size=4), max_size=3))
def test_coco_gives_back_all_that_was_written(tmp_path_factory: pytest.TempPathFactory, listed: list[Any]) -> None:
    path = tmp_path_factory.mktemp("coco") / "regions.json"
    wrote = annotated(*(image(f"ward/{i}.jpg", *found) for i, found in enumerate(listed)), groups=(("hair", "head"),))
    coco.write(wrote, path)
    read = coco.read(path)
    assert [(i.file, i.size, i.annotations) for i in read.images] == [
        (i.file, i.size, i.annotations) for i in wrote.images
    ]
    assert (read.regions, read.groups) == (wrote.regions, wrote.groups)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_pycocotools_reads_what_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(block(1, 1, 4, 9).astype(np.uint8) * 255).save(tmp_path / "painted.png")
    shapes = (
        Polygons(((1.0, 1.0, 9.0, 1.0, 9.0, 7.0),)),
        runs_of(block(0, 2, 5, 6) | block(7, 0, 9, 14)),
        Runs((30, 20, HEIGHT * WIDTH - 50), (HEIGHT, WIDTH)),
        Painted(tmp_path / "painted.png"),
        Polygons(()),
    )
    wrote = annotated(image("a.png", *(Annotation("hair", shape) for shape in shapes)), image("b.png"))
    coco.write(wrote, tmp_path / "regions.json")
    peer = COCO(str(tmp_path / "regions.json"))
    assert [found["file_name"] for found in peer.loadImgs([1, 2])] == ["a.png", "b.png"]
    assert [found["name"] for found in peer.loadCats([1, 2])] == ["hair", "coat"]
    for shape, found in zip(shapes, peer.loadAnns(peer.getAnnIds(imgIds=[1])), strict=True):
        mask = mask_of(shape, (HEIGHT, WIDTH))
        np.testing.assert_array_equal(peer.annToMask(found), mask)
        assert found["area"] == mask.sum()
        np.testing.assert_array_equal(found["bbox"], pycocotools.mask.toBbox(peer.annToRLE(found)))


def test_a_size_that_is_not_known_is_the_pictures(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "a.png")
    unknown = annotated(image("a.png", Annotation("hair", Box(0, 0, 4, 4)), size=None), image("b.png", size=None))
    with pytest.raises(Misfit) as caught:
        coco.write(unknown, tmp_path / "regions.json")
    assert len(caught.value.lines) == 2 and "image 'a.png': its size is not known" in caught.value.lines[0]
    with pytest.raises(Misfit, match=r"b\.png.*replace the file") as caught:
        coco.write(unknown, tmp_path / "regions.json", tmp_path / "images")
    assert len(caught.value.lines) == 1 and not (tmp_path / "regions.json").exists()
    picture(tmp_path / "images" / "b.png", 3, 5)
    coco.write(unknown, tmp_path / "regions.json", tmp_path / "images")
    assert [one.size for one in coco.read(tmp_path / "regions.json").images] == [(HEIGHT, WIDTH), (3, 5)]


def test_an_outline_that_does_not_fit_is_not_written(tmp_path: Path) -> None:
    wrong = annotated(
        image("a.png", Annotation("hair", Runs((5, 5), (2, 5)))), image("b.png", Annotation("coat", Runs("", (1, 1))))
    )
    for write in (coco.write, masks.write):
        with pytest.raises(Misfit) as caught:
            write(wrong, tmp_path / "out")
        assert [line.split(":")[1:3] for line in caught.value.lines] == [
            [" image 'a.png'", " 'hair'"],
            [" image 'b.png'", " 'coat'"],
        ]
        assert list(tmp_path.iterdir()) == []


def test_coco_as_other_tools_write_it(tmp_path: Path) -> None:
    """Backslashes, a byte order mark, an empty ring for a box; an id that is text in one place only is said."""
    content: dict[str, Any] = {
        "images": [{"id": 1, "file_name": "ward\\a.jpg", "height": HEIGHT, "width": WIDTH}],
        "annotations": [{"image_id": 1, "category_id": 1, "segmentation": [[]], "bbox": [1, 2, 3, 4]}],
        "categories": [{"id": 1, "name": "hair"}],
    }
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content), encoding="utf-8-sig")
    found = read_annotations(path).images[0]
    assert (found.file, found.annotations) == ("ward/a.jpg", (Annotation("hair", Box(1, 2, 4, 6)),))
    content["annotations"] += [{"image_id": "1", "category_id": 1, "bbox": [1, 2, 3, 4]}, {"image_id": 9}]
    content["annotations"][2] = content["annotations"][0] | {"image_id": 9}
    path.write_text(json.dumps(content, indent=0))
    line = path.read_text().splitlines().index('"image_id": "1",')
    with pytest.raises(Misfit, match=rf"a\.json, line {line}: the image_id '1' is a text") as caught:
        read_annotations(path)
    assert len(caught.value.lines) == 1


def test_what_other_tools_mean_by_score_source_and_instance_is_passed_over(tmp_path: Path) -> None:
    one = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 2, 2], "segmentation": []}
    odd = ({"score": 7.5, "source": {"tool": 3}, "instance": "x"}, {"score": True, "instance": False}, {"score": "1"})
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": HEIGHT, "width": WIDTH}],
        "annotations": [*({**one, **more} for more in odd), {**one, "image_id": 9, "segmentation": [[1]]}],
        "categories": [{"id": 1, "name": "hair"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert coco.read(tmp_path / "a.json").images[0].annotations == (Annotation("hair", Box(0, 0, 2, 2)),) * 3


# ---------------------------------------------------------------------------------------------------- all at once


FAULTY = {
    "images": [
        {"id": 1, "file_name": "a.png", "height": HEIGHT, "width": WIDTH},
        {"id": 2, "file_name": "b.png", "height": HEIGHT, "width": WIDTH},
        {"id": 3, "file_name": "a.png", "height": HEIGHT, "width": WIDTH},
        {"id": 4, "file_name": "/etc/passwd", "height": HEIGHT, "width": WIDTH},
    ],
    "annotations": [
        {"id": 90, "image_id": 1, "category_id": 1, "segmentation": [[0, 0, 5, 0, 5, 5]]},
        {"id": 91, "image_id": 1, "category_id": 1, "segmentation": []},
        {"id": 92, "image_id": 2, "category_id": 77, "bbox": [0, 0, 4, 4]},
        {"id": 93, "image_id": 2, "category_id": 1, "bbox": [0, 0, 4, -4]},
    ],
    "categories": [{"id": 1, "name": "hair"}],
}


def line_of(text: str, part: str) -> int:
    """The line on which the object around a part of the text begins."""
    number = next(i for i, line in enumerate(text.splitlines()) if part in line)
    return next(i + 1 for i in range(number, -1, -1) if text.splitlines()[i].strip() == "{")


def test_all_that_is_wrong_with_the_files_of_an_audit_set_is_said_at_once(tmp_path: Path) -> None:
    text = json.dumps(FAULTY, indent=2)
    (tmp_path / "regions.json").write_text(text)
    (tmp_path / "labels.csv").write_text("file,label\na.png,doctor\n,nurse\na.png,pilot\nx.png,nurse,3\nc.png,nurse\n")
    with pytest.raises(Misfit) as caught:
        AuditDataset.from_annotations(
            tmp_path / "regions.json",
            tmp_path / "nowhere",
            labels=tmp_path / "labels.csv",
            format="coco",
            object=["hair"],
            classes=["doctor", "nurse"],
            minus={"hat": ["coat"]},
        )
    said = [line.replace(f"{tmp_path}/", "") for line in caught.value.lines]
    assert len(said) == 13
    assert [line[: len(start)] for line, start in zip(said, starts(text), strict=True)] == starts(text)


def starts(text: str) -> list[str]:
    at = {number: line_of(text, f'"id": {number},') for number in (3, 4, 91, 92, 93)}
    return [
        f"regions.json, line {at[3]}: image 'a.png': two images have the file name",
        f"regions.json, line {at[4]}: image '/etc/passwd': '/etc/passwd' leaves the folder",
        f"regions.json, line {at[91]}: image 'a.png': an annotation has no segmentation and no bbox",
        f"regions.json, line {at[92]}: image 'b.png': an annotation has the category 77",
        f"regions.json, line {at[93]}: image 'b.png': a box is [0.0, 0.0, 4.0, -4.0]",
        "labels.csv, line 3: no value in column 'file'",
        "labels.csv, line 5: more values than columns",
        "labels.csv, line 4: label 'pilot' is not among `classes`",
        "labels.csv, line 4: 'a.png' stands in labels.csv, line 2 as well",
        "minus: unknown region 'hat'",
        "labels.csv, line 2: no file nowhere/a.png",
        "labels.csv, line 4: no file nowhere/a.png",
        "labels.csv, line 6: no file nowhere/c.png",
    ]


def test_names_that_do_not_fit_the_annotations_are_said_at_once(tmp_path: Path) -> None:
    coco.write(annotated(image("a.png", Annotation("hair", Box(0, 0, 4, 4)))), tmp_path / "regions.json")
    picture(tmp_path / "a.png")
    (tmp_path / "labels.csv").write_text("file,label\na.png,x\nb.png,x\nc.png,y\n")
    with pytest.raises(Misfit) as caught:
        AuditDataset.from_annotations(
            tmp_path / "regions.json", tmp_path, labels=tmp_path / "labels.csv", object=["hairs"], spurious=["hat"]
        )
    said = [line.replace(f"{tmp_path}/", "") for line in caught.value.lines]
    assert said[0] == "regions.json: unknown category 'hairs': did you mean 'hair'?"
    assert said[1].startswith("regions.json: unknown category 'hat'")
    assert [line.split(":")[0] for line in said[2:]] == ["labels.csv, line 3", "labels.csv, line 4"]


def test_of_a_value_that_fits_no_form_the_deepest_fault_is_said(tmp_path: Path) -> None:
    content = json.loads(json.dumps(FAULTY))
    content["annotations"][0]["segmentation"] = [[0, 0, 5, "x", 5, 1e9]]
    content["annotations"][1]["segmentation"] = {"size": [HEIGHT], "counts": 3}
    content["annotations"][2]["bbox"] = "wide"
    (tmp_path / "a.json").write_text(json.dumps(content, indent=1))
    with pytest.raises(Misfit) as caught:
        coco.read(tmp_path / "a.json")
    keys = [line.split(": ")[1] for line in caught.value.lines]
    assert keys == [
        "annotations.0.segmentation.0.3",
        "annotations.0.segmentation.0.5",
        "annotations.1.segmentation.size.1",
        "annotations.1.segmentation.counts",
        "annotations.2.bbox",
    ]


def test_many_faults_are_said_without_looking_for_each_line(tmp_path: Path) -> None:
    content = json.loads(json.dumps(FAULTY))
    content["annotations"] = [{"image_id": 1, "category_id": 2, "bbox": [0, 0, 1, 1]}] * 3000
    content["images"] = content["images"][:1]
    (tmp_path / "a.json").write_text(json.dumps(content, indent=1))
    with pytest.raises(Misfit) as caught:
        coco.read(tmp_path / "a.json")
    assert len(caught.value.lines) == 3000
    assert sum(", line " in line.split(":")[0] for line in caught.value.lines) == MOST_LOCATED


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text('ab"\\{[,:]} \n', max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('ab" ,', max_size=3), inner, max_size=3),
    max_leaves=12,
)


def places(value: Any, loc: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Where each value of a content is."""
    pairs: list[tuple[str | int, Any]] = []
    if isinstance(value, dict):
        pairs = list(value.items())
    elif isinstance(value, list):
        pairs = list(enumerate(value))
    return [loc, *(place for key, inner in pairs for place in places(inner, (*loc, key)))]


def with_mark(value: Any, loc: tuple[str | int, ...]) -> Any:
    if not loc:
        return 31337
    if isinstance(value, dict):
        return {key: with_mark(inner, loc[1:]) if key == loc[0] else inner for key, inner in value.items()}
    return [with_mark(inner, loc[1:]) if i == loc[0] else inner for i, inner in enumerate(value)]


@given(json_values, st.sampled_from([None, 1, "\t"]))
def test_lines_in_json_are_where_another_value_would_be_written(value: Any, indent: Any) -> None:
    text = json.dumps(value, indent=indent)
    for loc in places(value):
        marked = json.dumps(with_mark(value, loc), indent=indent)
        line = next(i for i, one in enumerate(marked.splitlines(), 1) if "31337" in one)
        assert line_in_json(text, loc) == line
        # A place that is not there is said to be where the innermost one around it is.
        assert line_in_json(text, (*loc, "no such key")) == line


def test_space_may_stand_anywhere_in_json() -> None:
    text = ' {\n"a" :\r\n [ 1 ,\n\t2 ] ,\n "b"\n:\n{ } }'
    found = [line_in_json(text, loc) for loc in ((), ("a",), ("a", 0), ("a", 1), ("b",))]
    assert found == [1, 3, 3, 4, 7]


@pytest.mark.parametrize("text", ["", '{"a": [', '{"a" 1}', "[1, 2", "nonsense", '{"a": {"b": tru}}', "[" * 100_000])
def test_broken_json_has_no_line_or_a_line(text: str) -> None:
    for loc in (("a",), ("a", "b"), (0,), (1,), (0, 0), ()):
        line = line_in_json(text, loc)
        assert line is None or line == 1


def test_a_misfit_is_itself_after_it_went_to_another_process() -> None:
    wrong = Complaints()
    wrong.add("a.csv, line 2", "no value")
    assert wrong.attempt(lambda: 3) == 3
    assert wrong.attempt(lambda: int("x")) is None
    with pytest.raises(Misfit) as caught:
        wrong.end()
    again = pickle.loads(pickle.dumps(caught.value))
    assert again.lines == caught.value.lines and str(again) == str(caught.value)
    assert str(again).splitlines()[0] == "a.csv, line 2: no value" and len(again.lines) == 2


# ------------------------------------------------------------------------------------------------------ mask folders


def test_mask_folders_give_back_what_was_written(tmp_path: Path) -> None:
    for name in ("a.jpg", "ward/b.png", "c.png"):
        picture(tmp_path / "images" / name)
    (tmp_path / "images" / "notes.txt").write_text("no picture")
    wrote = annotated(
        image("a.jpg", Annotation("hair", Box(0, 0, 4, 4)), Annotation("hair", Box(6, 0, 8, 3))),
        image("c.png"),
        image(
            "ward/b.png", Annotation("coat", runs_of(block(3, 3, 9, 9))), Annotation("hair", Polygons(())), size=None
        ),
    )
    masks.write(wrote, tmp_path / "masks", tmp_path / "images")
    assert sorted(p.relative_to(tmp_path / "masks").as_posix() for p in (tmp_path / "masks").rglob("*.png")) == [
        "coat/ward/b.png",
        "hair/a.png",
        "hair/ward/b.png",
    ]
    assert recognised(tmp_path / "masks") == "masks"
    read = read_annotations(tmp_path / "masks", tmp_path / "images")
    assert [(one.file, one.size) for one in read.images] == [(i.file, (HEIGHT, WIDTH)) for i in wrote.images]
    assert drawn(read) == drawn(wrote) and read.regions == ("coat", "hair")
    assert not any(p.name.endswith(".tmp") for p in tmp_path.iterdir())
    # The same files as a folder and as annotations are the same audit set.
    (tmp_path / "labels.csv").write_text("file,label\nward/b.png,x\na.jpg,y\n")
    roles: dict[str, Any] = {"labels": tmp_path / "labels.csv", "object": ["hair"], "spurious": ["coat"]}
    as_folder = AuditDataset.from_folder(tmp_path / "images", masks=tmp_path / "masks", **roles)
    as_annotations = AuditDataset.from_annotations(tmp_path / "masks", tmp_path / "images", **roles)
    one, other = describe(as_folder), describe(as_annotations)
    assert (one.fingerprint, one.annotated) == (other.fingerprint, other.annotated)


def test_masks_without_their_image_and_pictures_that_are_none_are_said_at_once(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "a.png")
    (tmp_path / "images" / "b.png").write_bytes(b"nothing")
    for name in ("hair/a.png", "hair/x.png", "coat/ward/a.png"):
        picture(tmp_path / "masks" / name)
    with pytest.raises(Misfit) as caught:
        masks.read(tmp_path / "masks", tmp_path / "images")
    said = [line.replace(f"{tmp_path}/", "").split(":")[0] for line in caught.value.lines]
    assert said == ["masks/coat/ward/a.png", "masks/hair/x.png", "images/b.png"]
    with pytest.raises(Misfit, match="give the folder of the images"):
        masks.read(tmp_path / "masks", None)


def test_masks_may_lie_below_their_images_and_are_png(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    picture(tmp_path / "masks" / "hair" / "a.png")
    # What macOS and editors put beside files.
    (tmp_path / "masks" / "hair" / "._a.png").write_bytes(b"no picture")
    (tmp_path / "._a.jpg").write_bytes(b"no picture")
    (tmp_path / "consent.pdf").write_bytes(b"%PDF-1.4")
    found = masks.read(tmp_path / "masks", tmp_path)
    assert [(one.file, len(one.annotations)) for one in found.images] == [("a.jpg", 1)]
    (tmp_path / "masks" / "hair" / "a.png").rename(tmp_path / "masks" / "hair" / "a.PNG")
    (tmp_path / "labels.csv").write_text("file,label\na.jpg,x\n")
    with pytest.raises(Misfit, match=r"hair/a\.PNG: is no \.png"):
        masks.read(tmp_path / "masks", tmp_path)
    with pytest.raises(Misfit, match=r"hair/a\.PNG: is no \.png"):
        AuditDataset.from_folder(tmp_path, labels=tmp_path / "labels.csv", masks=tmp_path / "masks", object=["hair"])


def test_masks_that_cannot_be_written_apart_are_refused(tmp_path: Path) -> None:
    hair = Annotation("hair", Box(0, 0, 4, 4))
    clash = Annotations((image("a.png", hair), image("a.jpg", hair)), ("hair", "../coat", "", "a/b"))
    with pytest.raises(Misfit) as caught:
        masks.write(clash, tmp_path / "masks")
    assert len(caught.value.lines) == 5 and list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------- what all share


def test_a_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"

    def fails() -> None:
        with whole_folder(target) as folder:
            (folder / "half").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert not target.exists() and list(target.parent.iterdir()) == []
    with whole_folder(target) as folder:
        (folder / "a").write_text("a")
        assert not target.exists()
    assert [p.name for p in target.iterdir()] == ["a"] and list(target.parent.iterdir()) == [target]
    (tmp_path / "plain").mkdir()
    assert target.stat().st_mode == (tmp_path / "plain").stat().st_mode
    with pytest.raises(ValueError, match="is there already"), whole_folder(target):
        raise AssertionError("a folder that is there must not be written over")
    with whole_folder(tmp_path / "plain") as folder:
        (folder / "b").write_text("b")
    assert [p.name for p in (tmp_path / "plain").iterdir()] == ["b"]


def test_names_stay_in_their_folder(tmp_path: Path) -> None:
    outside = ["", ".", "./", "../a", "a/../../b", "/a", "\\a", r"..\a", "C:\\a", r"\\host\a", "//host/a"]
    inside = ["a", "a/b", "a..b", "...", "a b", "x:1.jpg", ".hidden"]
    assert [leaves(name) for name in outside + inside] == [True] * len(outside) + [False] * len(inside)
    picture(tmp_path / "in" / "a.png")
    os.symlink(tmp_path / "in" / "a.png", tmp_path / "in" / "linked.png")
    assert unfound("a.png", tmp_path / "in") == unfound("linked.png", tmp_path / "in") == ""
    assert "leaves the folder" in unfound("../in/a.png", tmp_path / "in")
    assert unfound("b" * 300, tmp_path / "in").startswith("no file")


def test_a_size_is_read_without_decoding(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png", 7, 9)
    # The header is whole, the rest is not.
    path.write_bytes(path.read_bytes()[:50])
    assert size_of(path) == (7, 9)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"a\.png: .*replace the file"):
        size_of(path)


def test_a_format_is_found_or_asked_for(tmp_path: Path) -> None:
    (tmp_path / "task.zip").write_bytes(b"PK")
    with pytest.raises(Misfit, match=r"task\.zip: is none of .*: unpack it"):
        recognised(tmp_path / "task.zip")
    coco.write(annotated(image("a.png")), tmp_path / "regions.json")
    assert recognised(tmp_path / "regions.json") == "coco"
    (tmp_path / "other.json").write_text("[3]")
    with pytest.raises(Misfit, match=r"other\.json: is none of coco, masks"):
        recognised(tmp_path / "other.json")
    with pytest.raises(Misfit, match="is not there"):
        recognised(tmp_path / "nowhere.json")
    with pytest.raises(ValueError, match=f"unknown format 'coca': expected one of {', '.join(FORMATS)}"):
        write_annotations(annotated(), tmp_path / "x", "coca")

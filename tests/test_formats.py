"""Annotation formats: what other tools write is read, and what is written is read again.

`exports/` holds what other packages wrote of one made-up image; its README says which and what.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from annotated_files import (
    FACE,
    HAIR,
    NAMES,
    SIZE,
    Mask,
    _edges,
    boxes,
    drawn,
    filled,
    masks,
    of,
    pictures,
    there_and_back,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import ndimage

from bias_audit.data.annotations import (
    AnnotatedImage,
    Annotation,
    Annotations,
    Box,
    Polygons,
)
from bias_audit.data.formats.known import FORMATS, read_annotations, recognised, write_annotations
from bias_audit.data.outlines import mask_of, rings_of, runs_of
from bias_audit.regions.convert import convert, losses

EXPORTS = Path(__file__).parent / "exports"
PEOPLE = Path(__file__).parents[1] / ".." / "shared" / "data" / "coco_people"

TIE = filled(2, 9, 3, 11)


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

"""Annotations that tests of the formats write and read again."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import strategies as st
from PIL import Image

from bias_audit.data.annotations import (
    AnnotatedImage,
    Annotation,
    Annotations,
    Box,
    Misfit,
    Polygons,
)
from bias_audit.data.formats.known import read_annotations, write_annotations
from bias_audit.data.outlines import mask_of, runs_of, union

Mask = npt.NDArray[np.bool_]

SIZE = (24, 32)
NAMES = {"coco": "out.json", "labelstudio": "out.json", "cvat": "out.xml", "boxes": "out.csv"}


def filled(top: int, bottom: int, left: int, right: int, size: tuple[int, int] = SIZE) -> Mask:
    mask = np.zeros(size, dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


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


def source(folder: Path) -> tuple[Path, Path]:
    """COCO as proposed, with a hole, a score and a box, and its images."""
    images = pictures(folder / "images", "a.png", "b.png")
    face = Annotation("face", runs_of(FACE), score=0.5, source="a model", instance=1)
    both = of(face, Annotation("tie", Box(3, 2, 11, 9)))
    both = replace(both, images=(*both.images, AnnotatedImage("b.png", SIZE, (replace(face, instance=2),), "made up")))
    write_annotations(both, folder / "regions.json", "coco")
    return folder / "regions.json", images

"""CVAT for images 1.1: one XML file with all images (https://docs.cvat.ai/docs/other/xml_format).

    <annotations>
      <meta>... <label><name>hair</name> ...</meta>
      <image id="0" name="ward/a.jpg" width="640" height="480">
        <box label="tie" xtl="12" ytl="4" xbr="60" ybr="31"/>
        <polygon label="hair" points="1,2;30,2;30,9"/>
        <mask label="face" rle="3, 5, 7" left="10" top="8" width="5" height="3"/>
        <ellipse label="face" cx="20" cy="20" rx="5" ry="7"/>

A mask's runs are of zeros and ones in turn, row by row within its rectangle. What is turned becomes a polygon. Tags are
passed over; polylines, points, cuboids and skeletons have no area and are refused, and so are the tracks of "CVAT for
video".

Enters: the file, or the unpacked folder with `annotations.xml` in it. Leaves: `Annotations`, with `group_id` as
instance and `source` as CVAT has it ("manual", "auto" ...); or such a file, without images. Scores and groups are not
held; of a source it is held only whether there is one: "manual", "semi-auto" and "file" stay, another text becomes
"auto". Of polygons with several rings each ring becomes a polygon.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from bias_audit.atomic import write_whole
from bias_audit.data.annotations import (
    AnnotatedImage,
    Annotation,
    Annotations,
    Box,
    Complaints,
    Misfit,
    Outline,
    Polygons,
)
from bias_audit.data.elements import Element, read_xml, root_tag, xml_bytes
from bias_audit.data.formats import shapes

FILE = "annotations.xml"
SOURCES = ("manual", "auto", "semi-auto", "file", "consensus")
# Has no area.
_LINES = ("polyline", "points", "cuboid", "skeleton")


def recognises(path: Path) -> bool:
    """Whether it is XML with CVAT's root, or a folder with such a file."""
    path = path / FILE if path.is_dir() else path
    return path.suffix.lower() == ".xml" and root_tag(path) == "annotations"


def read(path: Path, images: Path | None = None) -> Annotations:
    """The images in the order of the file.

    Raises:
        Misfit: it cannot be read, holds tracks, or a shape cannot be or has no area.
    """
    path = path / FILE if path.is_dir() else path
    wrong = Complaints()
    root = wrong.attempt(partial(read_xml, path, "annotations"))
    if root is None:
        raise Misfit(wrong.lines)
    for track in root.all("track"):
        wrong.add(
            f"{path}, line {track.line}", 'tracks are of "CVAT for video": export the task as "CVAT for images 1.1"'
        )
    listed = [image for element in root.all("image") if (image := _image(path, element, wrong)) is not None]
    if not listed:
        wrong.add(f"{path}, line {root.line}", 'holds no image: export the task as "CVAT for images 1.1"')
    return shapes.collected(listed, tuple(dict.fromkeys(_labels(root))), wrong)


def write(annotations: Annotations, path: Path, images: Path | None = None) -> None:
    """A file to be uploaded to a task with the same images and labels; sizes that are not known are read from `images`.

    Raises:
        Misfit: a size is not known, an outline is empty or does not fit, or a name cannot be in XML.
    """
    annotations = shapes.sized(annotations, images)
    wrong = Complaints()
    root = ET.Element("annotations")
    ET.SubElement(root, "version").text = "1.1"
    task = ET.SubElement(ET.SubElement(root, "meta"), "task")
    ET.SubElement(task, "size").text = str(len(annotations.images))
    ET.SubElement(task, "mode").text = "annotation"
    labels = ET.SubElement(task, "labels")
    for region in annotations.regions:
        label = ET.SubElement(labels, "label")
        ET.SubElement(label, "name").text = region
        ET.SubElement(label, "attributes")
    for index, image in enumerate(annotations.images):
        height, width = image.size or (0, 0)
        attributes = {"id": str(index), "name": image.file, "width": str(width), "height": str(height)}
        parent = ET.SubElement(root, "image", attributes)
        for annotation in image.annotations:
            where = f"{image.where}: image {image.file!r}: {annotation.region!r}"
            wrong.attempt(partial(_write, parent, annotation, (height, width)), where)
    content = wrong.attempt(partial(xml_bytes, root), str(path))
    wrong.end()
    write_whole(path, content or b"")


def _labels(root: Element) -> Iterator[str]:
    """The names of a task's or a project's labels."""
    meta = root.first("meta")
    for inside in () if meta is None else meta.children:
        labels = inside.first("labels")
        for label in () if labels is None else labels.all("label"):
            # A skeleton's points have labels too.
            if label.said("name") and not label.said("parent"):
                yield label.said("name")


def _image(path: Path, element: Element, wrong: Complaints) -> AnnotatedImage | None:
    name = element.attributes.get("name", "").replace("\\", "/")
    where = f"{path}, line {element.line}"
    try:
        height, width = (shapes.whole(element.attributes.get(side), side) for side in ("height", "width"))
        size = shapes.size(height, width)
    except ValueError as error:
        wrong.add(where, f"image {name!r}: {error}")
        return None
    found = []
    for shape in element.children:
        try:
            outline = _outline(shape, size)
            group = shapes.whole(shape.attributes.get("group_id", "0"), "group_id")
        except ValueError as error:
            wrong.add(f"{path}, line {shape.line}", f"image {name!r}: {error}")
            continue
        if outline is not None:
            source = shape.attributes.get("source", "")
            found.append(Annotation(shape.attributes.get("label", ""), outline, source=source, instance=group or None))
    return AnnotatedImage(name, size, tuple(found), where)


def _outline(shape: Element, size: tuple[int, int]) -> Outline | None:
    if shape.tag in _LINES:
        raise ValueError(f"a {shape.tag} has no area: draw a polygon, mask or box, or remove it")

    def number(name: str) -> float:
        return shapes.number(shape.attributes.get(name), name)

    degrees = number("rotation") if "rotation" in shape.attributes else 0.0
    if shape.tag == "box":
        found = shapes.box(number("xtl"), number("ytl"), number("xbr"), number("ybr"))
        centre = (found.left + found.right) / 2, (found.top + found.bottom) / 2
        return shapes.turned(found, degrees, centre) if degrees else found
    if shape.tag == "ellipse":
        return shapes.ellipse(number("cx"), number("cy"), number("rx"), number("ry"), degrees)
    if shape.tag == "polygon":
        pairs = shape.attributes.get("points", "").split(";")
        return shapes.polygon([shapes.number(value, "points") for pair in pairs for value in pair.split(",")])
    return _unrolled(shape, size) if shape.tag == "mask" else None


def _unrolled(shape: Element, size: tuple[int, int]) -> Outline:
    left, top, width, height = (
        shapes.whole(shape.attributes.get(name), name) for name in ("left", "top", "width", "height")
    )
    runs = [shapes.whole(run, "rle") for run in shape.attributes.get("rle", "").split(",")]
    if min(width, height) < 1 or width > size[1] or height > size[0] or min(runs) < 0 or sum(runs) != width * height:
        raise ValueError(
            f"a mask of {width} x {height} pixels has runs over {sum(runs)} pixels: export the annotations again"
        )
    part = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(height, width)
    return shapes.placed(part, top, left, size)


def _write(parent: ET.Element, annotation: Annotation, size: tuple[int, int]) -> None:
    source = annotation.source or ("manual" if annotation.score is None else "auto")
    common = {"label": annotation.region, "source": source if source in SOURCES else "auto", "occluded": "0"}
    if annotation.instance:
        common["group_id"] = str(annotation.instance)
    outline = annotation.outline
    if isinstance(outline, Box):
        outline = shapes.around(outline, size)
        edges = (("xtl", outline.left), ("ytl", outline.top), ("xbr", outline.right), ("ybr", outline.bottom))
        ET.SubElement(parent, "box", common | {name: f"{value:.12g}" for name, value in edges})
    elif isinstance(outline, Polygons):
        for ring in shapes.ringed(outline, size):
            points = ";".join(f"{x:.12g},{y:.12g}" for x, y in zip(ring[::2], ring[1::2], strict=True))
            ET.SubElement(parent, "polygon", common | {"points": points})
    else:
        part, top, left = shapes.part(outline, size)
        flat = np.concatenate([[False], part.reshape(-1), [part[-1, -1] ^ True]])
        starts = np.flatnonzero(flat[1:] != flat[:-1])
        runs = np.diff(starts, prepend=0)
        sides = {"left": left, "top": top, "width": part.shape[1], "height": part.shape[0]}
        ET.SubElement(
            parent,
            "mask",
            common | {"rle": ", ".join(map(str, runs))} | {name: str(value) for name, value in sides.items()},
        )

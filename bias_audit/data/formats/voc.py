"""Pascal VOC: an XML file per image, and pictures of its segmentation where there are some
(http://host.robots.ox.ac.uk/pascal/VOC/voc2012/htmldoc).

    Annotations/a.xml         <annotation><filename>a.jpg</filename><size><width>640</width> ...
                              <object><name>person</name><bndbox><xmin>13</xmin> ... <part><name>head</name> ...
    SegmentationClass/a.png   the colour of the class at each pixel; labelmap.txt names the colours, else they are VOC's
    SegmentationObject/a.png  the colour of the object at each pixel

Pixels count from 1 and `xmax` is within the box: the first pixel alone is 1, 1, 1, 1. (Of tools that count from 0 the
boxes are a pixel larger.) What is painted is no box any more: an image's boxes of a class that is painted in it are
passed over, those of parts are not. Black, VOC's border and what labelmap.txt calls background or ignored is no class.

Enters: the folder with these, or the one of the XML files alone, or one such file; or SegmentationClass without XML,
for which the folder of the images tells their names. Leaves: `Annotations`, an object's number being its instance; or
such a folder, without images. Scores, sources, groups and regions on no image are not held; instances are counted anew.
At a pixel there is one object: smaller things lie upon larger ones, which lose what is under them.
"""

from __future__ import annotations

import io
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt
from PIL import Image

from bias_audit.data.annotations import (
    AnnotatedImage,
    Annotation,
    Annotations,
    Box,
    Complaints,
    Misfit,
    Outline,
    Painted,
)
from bias_audit.data.elements import Element, read_xml, root_tag, xml_bytes
from bias_audit.data.files import files_in, leaves, read_bytes, size_of, whole_folder
from bias_audit.data.formats import shapes
from bias_audit.data.outlines import Mask, picture

BOXES, CLASSES, OBJECTS, LABELS = "Annotations", "SegmentationClass", "SegmentationObject", "labelmap.txt"
# fmt: off
VOC = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)
# fmt: on
Colour = tuple[int, int, int]
# The background, and the border around each object that belongs to none.
NOTHING: tuple[Colour, ...] = ((0, 0, 0), (224, 224, 192))
_NO_CLASS = ("background", "ignored", "__background__", "__ignore__")
# More objects have no colour of their own.
MOST_OBJECTS = 254


def palette(index: int) -> Colour:
    """VOC's colour of a number: three bits at a time go to red, green and blue, the highest first.

    Example:
        >>> palette(0), palette(1), palette(15), palette(255)
        ((0, 0, 0), (128, 0, 0), (192, 128, 128), (224, 224, 192))
    """
    red, green, blue = (sum((index >> 3 * k + channel & 1) << 7 - k for k in range(8)) for channel in range(3))
    return red, green, blue


PALETTE = tuple(palette(index) for index in range(256))


@dataclass(frozen=True)
class _Layout:
    """Where an export's parts are."""

    boxes: Path
    classes: Path
    objects: Path
    colours: Mapping[Colour, str]


def recognises(path: Path) -> bool:
    """Whether it is such a file, or a folder with one or with pictures of classes."""
    if path.is_file():
        return path.suffix.lower() == ".xml" and root_tag(path) == "annotation"
    first = next(iter(files_in(path, ".xml")), None)
    return (path / CLASSES).is_dir() or (first is not None and root_tag(path / first) == "annotation")


def read(path: Path, images: Path | None = None) -> Annotations:
    """The images in the order of their files' paths.

    Raises:
        Misfit: there is nothing of VOC, a file cannot be read, a box cannot be, or a colour has no name.
    """
    inside = path if path.is_dir() else path.parent
    root = inside.parent if inside.name == BOXES else inside
    boxes = path if path.is_file() else root / BOXES if (root / BOXES).is_dir() else path
    layout = _Layout(boxes, root / CLASSES, root / OBJECTS, _colours(root / LABELS))
    files = [path] if path.is_file() else [boxes / name for name in files_in(boxes, ".xml")]
    wrong = Complaints()
    if files:
        found = [wrong.attempt(partial(_read, file, layout, images)) for file in files]
    else:
        painted = [layout.classes / name for name in files_in(layout.classes, ".png")]
        if not painted:
            raise Misfit([f"{path}: has neither XML files nor pictures in {CLASSES}: give the folder of a VOC export"])
        found = [wrong.attempt(partial(_read_painted, file, root, layout, images)) for file in painted]
    listed = [image for image in found if image is not None]
    regions = layout.colours.values() if (root / LABELS).is_file() else ()
    return shapes.collected(listed, tuple(dict.fromkeys(regions)), wrong)


def write(annotations: Annotations, path: Path, images: Path | None = None) -> None:
    """A folder of XML files; with pictures of the segmentation for each image in which something is no box.

    A class that is no box somewhere in an image is painted all over it. Sizes that are not known are read from
    `images`.

    Raises:
        Misfit: a size is not known, an outline is empty or does not fit, a region would be covered by others in an
            image, or has a name that cannot be written; two images differ in their suffix only; or there are too many
            things or regions.
        ValueError: `path` is there already and not empty.
    """
    annotations = shapes.sized(annotations, images)
    wrong = Complaints()
    if len(annotations.regions) > MOST_OBJECTS:
        wrong.add(str(path), f"has {len(annotations.regions)} regions, VOC has colours for {MOST_OBJECTS}: split it")
    for region in annotations.regions:
        if ":" in region or "\n" in region:
            wrong.add(f"region {region!r}", "labelmap.txt cannot hold a colon or a new line: rename it")
    numbers = {region: number for number, region in enumerate(annotations.regions, 1)}
    with whole_folder(path) as folder:
        is_painted = False
        for image in annotations.images:
            name = PurePosixPath(image.file)
            if (folder / BOXES / name.with_suffix(".xml")).exists():
                wrong.add(image.where, f"image {image.file!r}: another differs in its suffix only: rename one")
                continue
            is_painted |= wrong.attempt(partial(_write, image, folder, numbers)) or False
        if is_painted:
            lines = ["background:0,0,0::"] + [
                f"{region}:{','.join(map(str, palette(number)))}::" for region, number in numbers.items()
            ]
            (folder / LABELS).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        wrong.end()


def _colours(path: Path) -> dict[Colour, str]:
    """The names of the colours."""
    if not path.is_file():
        return {palette(number): name for number, name in enumerate(VOC, 1)}
    wrong = Complaints()
    found: dict[Colour, str] = {}
    text = read_bytes(path, "names and colours").decode("utf-8-sig", errors="replace")
    lines = ((number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip() and line[0] != "#")
    for place, (number, line) in enumerate(lines):
        name, _, rest = line.partition(":")
        said = rest.split(":")[0]
        try:
            # Where none has a colour they have VOC's in turn, background included.
            red, green, blue = (int(value) for value in said.split(",")) if said else palette(place)
        except ValueError:
            wrong.add(f"{path}, line {number}", f"{line!r}: expected name:red,green,blue:parts:actions")
            continue
        if name not in _NO_CLASS:
            found[red, green, blue] = name
    wrong.end()
    return found


def _read(path: Path, layout: _Layout, images: Path | None) -> AnnotatedImage:
    root = read_xml(path, "annotation")
    inside = path.relative_to(layout.boxes).parent if layout.boxes.is_dir() else Path()
    said = root.said("filename").replace("\\", "/")
    if not said:
        raise ValueError(f"{path}, line {root.line}: has no <filename>: expected the image's name")
    name = said if "/" in said else (inside / said).as_posix()
    wrong = Complaints()
    size = _size(path, root, name, images, wrong)
    drawn: list[Annotation] = []
    parts: list[Annotation] = []
    for number, element in enumerate(root.all("object"), 1):
        drawn += _boxed(path, element, name, number, wrong)
        for part in element.all("part"):
            parts += _boxed(path, part, name, number, wrong)
    stem = (inside / path.name).with_suffix(".png")
    painted: list[Annotation] = []
    if (layout.classes / stem).is_file():
        painted = wrong.attempt(partial(_painted, stem, layout, size), f"{path}: image {name!r}") or []
    elif (layout.objects / stem).is_file():
        objects = wrong.attempt(partial(_colours_of, layout.objects / stem), f"{path}: image {name!r}")
        regions = {annotation.instance: annotation.region for annotation in drawn}
        numbered = {} if objects is None else {n: objects.keys[place] for n, place in objects.numbered().items()}
        for number, key in numbered.items():
            if number in regions:
                painted.append(Annotation(regions[number], Painted(layout.objects / stem, key), instance=number))
            else:
                wrong.add(str(layout.objects / stem), f"image {name!r}: object {number} is not in {path}: paint it out")
    wrong.end()
    classes = {annotation.region for annotation in painted}
    boxes = [annotation for annotation in drawn if annotation.region not in classes]
    return AnnotatedImage(name, size, (*boxes, *painted, *parts), str(path))


def _read_painted(path: Path, root: Path, layout: _Layout, images: Path | None) -> AnnotatedImage:
    """An image of which there is a picture only."""
    stem = path.relative_to(layout.classes)
    folder = images if images is not None else root / "JPEGImages"
    found = sorted((folder / stem.parent).glob(f"{stem.stem}.*")) if folder.is_dir() else []
    if len(found) != 1:
        raise ValueError(f"{path}: has {len(found)} images of this name in {folder}: give the folder of the images")
    size = size_of(path)
    return AnnotatedImage(found[0].relative_to(folder).as_posix(), size, tuple(_painted(stem, layout, size)), str(path))


def _size(path: Path, root: Element, name: str, images: Path | None, wrong: Complaints) -> tuple[int, int] | None:
    sides = root.first("size")
    # Some tools write 0 where they have not looked.
    if sides is not None and sides.said("width") not in ("", "0") and sides.said("height") not in ("", "0"):
        return wrong.attempt(
            lambda: shapes.size(*(shapes.whole(sides.said(side), side) for side in ("height", "width"))),
            f"{path}, line {sides.line}: image {name!r}",
        )
    if images is None or leaves(name):
        return None
    return wrong.attempt(lambda: size_of(images / name), f"{path}, line {root.line}")


def _boxed(path: Path, element: Element, name: str, number: int, wrong: Complaints) -> Iterator[Annotation]:
    bounds = element.first("bndbox")
    try:
        if bounds is None:
            raise ValueError(f"the {element.tag} {element.said('name')!r} has no <bndbox>: draw its box, or remove it")
        left, top, right, bottom = (shapes.number(bounds.said(edge), edge) for edge in ("xmin", "ymin", "xmax", "ymax"))
        box = shapes.box(left - 1, top - 1, right, bottom)
    except ValueError as error:
        wrong.add(f"{path}, line {(bounds or element).line}", f"image {name!r}: {error}")
        return
    yield Annotation(element.said("name"), box, instance=number)


def _painted(stem: Path, layout: _Layout, size: tuple[int, int] | None) -> list[Annotation]:
    """What is painted in an image: its objects with the classes they lie in, or its classes where those alone are."""
    path = layout.classes / stem
    classes = _colours_of(path)
    if size is not None and classes.places.shape != size:
        height, width = classes.places.shape
        raise ValueError(f"{path}: is {height} x {width} pixels (height x width), its image is {size[0]} x {size[1]}")
    names = [layout.colours.get(colour) for colour in classes.colours]
    unnamed = [c for c, name in zip(classes.colours, names, strict=True) if name is None and c not in NOTHING]
    if unnamed:
        raise ValueError(f"{path}: the colours {unnamed[:5]} have no name: add them to {LABELS}, or paint them out")
    if not (layout.objects / stem).is_file():
        pairs = zip(names, classes.keys, strict=True)
        return [Annotation(name, Painted(path, key)) for name, key in pairs if name is not None]
    path = layout.objects / stem
    objects = _colours_of(path)
    if objects.places.shape != classes.places.shape:
        raise ValueError(f"{path}: has not the size of {layout.classes / stem}: export both again")
    # How many pixels of each object lie in each class.
    both = objects.places * len(names) + classes.places
    counts = np.bincount(both.reshape(-1), minlength=len(objects.colours) * len(names)).reshape(-1, len(names))
    found = []
    for number, place in objects.numbered().items():
        inside = [
            (int(counts[place, k]), name) for k, name in enumerate(names) if name is not None and counts[place, k]
        ]
        if not inside:
            raise ValueError(f"{path}: object {number} lies in no class of {layout.classes / stem}: export both again")
        found.append(Annotation(max(inside)[1], Painted(path, objects.keys[place]), instance=number))
    return found


@dataclass(frozen=True)
class _Colours:
    """A picture: at each pixel the place of its colour in `colours`, which `Painted` calls `keys`."""

    places: npt.NDArray[np.int64]
    colours: tuple[Colour, ...]
    keys: tuple[Colour | int, ...]

    def numbered(self) -> dict[int, int]:
        """The places of objects by their numbers in VOC's palette, counted on where a colour is not of it."""
        known = {colour: number for number, colour in enumerate(PALETTE)}
        things = [place for place, colour in enumerate(self.colours) if colour not in NOTHING]
        return dict(sorted((known.get(self.colours[place], 256 + place), place) for place in things))


def _colours_of(path: Path) -> _Colours:
    found = picture(path)
    if found.mode == "P":
        indices = np.asarray(found).astype(np.int64)
        channels = (found.getpalette("RGB") or []) + [0] * 768
        present = np.flatnonzero(np.bincount(indices.reshape(-1), minlength=256)).tolist()
        known = tuple((channels[3 * k], channels[3 * k + 1], channels[3 * k + 2]) for k in present)
        return _Colours(np.searchsorted(present, indices), known, tuple(present))
    if found.mode != "RGB":
        raise ValueError(f"{path}: expected colours, got the mode {found.mode!r}: save it as RGB or with VOC's palette")
    values = np.asarray(found).astype(np.int64)
    codes, places = np.unique(values @ np.array([1 << 16, 1 << 8, 1]), return_inverse=True)
    seen = tuple((int(code) >> 16, int(code) >> 8 & 255, int(code) & 255) for code in codes)
    return _Colours(places.reshape(values.shape[:2]), seen, seen)


def _write(image: AnnotatedImage, folder: Path, numbers: Mapping[str, int]) -> bool:
    """One image's files; whether it has pictures."""
    size = image.size or (0, 0)
    name = PurePosixPath(image.file)
    wrong = Complaints()
    root = ET.Element("annotation")
    ET.SubElement(root, "folder").text = name.parent.name
    ET.SubElement(root, "filename").text = image.file if name.parent.parts else name.name
    sides = ET.SubElement(root, "size")
    for side, value in (("width", size[1]), ("height", size[0]), ("depth", 3)):
        ET.SubElement(sides, side).text = str(value)
    painted = {a.region for a in image.annotations if not isinstance(a.outline, Box)}
    ET.SubElement(root, "segmented").text = str(int(bool(painted)))
    # The painted ones come first: their numbers are those of their colours.
    ordered = sorted(image.annotations, key=lambda annotation: annotation.region not in painted)
    for annotation in ordered:
        box = wrong.attempt(
            partial(shapes.around, annotation.outline, size),
            f"{image.where}: image {image.file!r}: {annotation.region!r}",
        )
        if box is not None:
            _object(root, annotation.region, box)
    files = {folder / BOXES / name.with_suffix(".xml"): wrong.attempt(partial(xml_bytes, root), image.where) or b""}
    if painted and not wrong.lines:
        things = [annotation for annotation in ordered if annotation.region in painted]
        found = wrong.attempt(partial(_pictures, things, size, numbers), f"{image.where}: image {image.file!r}")
        if found is not None:
            files |= {
                folder / kind / name.with_suffix(".png"): png
                for kind, png in zip((CLASSES, OBJECTS), found, strict=True)
            }
    wrong.end()
    for target, content in files.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    return bool(painted)


def _object(root: ET.Element, region: str, box: Box) -> None:
    element = ET.SubElement(root, "object")
    ET.SubElement(element, "name").text = region
    for key in ("pose", "truncated", "difficult"):
        ET.SubElement(element, key).text = "Unspecified" if key == "pose" else "0"
    bounds = ET.SubElement(element, "bndbox")
    edges = (("xmin", box.left + 1), ("ymin", box.top + 1), ("xmax", box.right), ("ymax", box.bottom))
    for edge, value in edges:
        ET.SubElement(bounds, edge).text = f"{value:.12g}"


def _pictures(things: list[Annotation], size: tuple[int, int], numbers: Mapping[str, int]) -> tuple[bytes, bytes]:
    """The pictures of the classes and of the objects."""
    if len(things) > MOST_OBJECTS:
        raise ValueError(f"has {len(things)} things, VOC has colours for {MOST_OBJECTS}: split it")
    outlines: list[Outline] = [annotation.outline for annotation in things]
    masks: list[Mask] = [shapes.filled(outline, size) for outline in outlines]
    classes, objects = np.zeros(size, dtype=np.uint8), np.zeros(size, dtype=np.uint8)
    for index in sorted(range(len(things)), key=lambda index: -int(masks[index].sum())):
        classes[masks[index]] = numbers[things[index].region]
        objects[masks[index]] = index + 1
    for annotation in things:
        if not (classes == numbers[annotation.region]).any():
            raise ValueError(
                f"{annotation.region!r} would lie wholly under others, and VOC holds one at each pixel: write coco, "
                "masks, cvat or labelme instead"
            )
    return _png(classes), _png(objects)


def _png(values: npt.NDArray[np.uint8]) -> bytes:
    found = Image.fromarray(values, mode="L")
    found.putpalette([channel for colour in PALETTE for channel in colour])
    buffer = io.BytesIO()
    found.save(buffer, "PNG")
    return buffer.getvalue()

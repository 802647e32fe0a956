"""Images with regions, from whatever declares them: what the checks of regions look at.

Enters: the YAML of an audit set, or annotations and the folder of their images; perhaps those of a second annotator.
Leaves: a `RegionSet`, of which no image has been opened. torch is imported for an audit set only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from bias_audit.data.annotations import AnnotatedImage, Annotation, Annotations, Box, Complaints, Misfit
from bias_audit.data.files import near, pictures_in, unfound
from bias_audit.data.formats.cvat import SOURCES
from bias_audit.data.formats.known import read_annotations, recognised
from bias_audit.data.outlines import Mask, WrongSize, picture, union
from bias_audit.located import read_file, read_yaml
from bias_audit.terms import Role

if TYPE_CHECKING:
    from bias_audit.data.dataset import AuditDataset
    from bias_audit.data.samples import AuditSample, PendingSample

Size = tuple[int, int]
Masks = Mapping[str, Mask]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Item:
    """One image of a set: its path below the folder of images, what is known of it, and how to decode it.

    `label` is the place of its class, None where labels are not known; `attributes` stand in the set's order, "" for
    one that it lacks. `boxed` are the regions that are boxes on it. `where` is the place to look at when it is wrong.
    `decode()` gives the picture and a mask for each region that it has.
    """

    file: str
    label: int | None
    attributes: tuple[str, ...]
    boxed: frozenset[str]
    where: str
    decode: Callable[[], tuple[Image.Image, Masks]]


@dataclass(frozen=True)
class Annotator:
    """Who drew regions on some images; `draw(file, size)` gives a mask for each region drawn on one of `files`."""

    name: str
    files: frozenset[str]
    regions: frozenset[str]
    draw: Callable[[str, Size], Masks]


@dataclass(frozen=True)
class RegionSet:
    """Images with regions. `classes` are () where labels are not known, a role is None where roles are not known.

    `attributes` are pairs of a name and its values. `annotators` are two or more, or none where only one is known.
    `unlisted` counts the pictures in the folder that the annotations do not name. `cut` are the regions out of which a
    declaration cuts others (`minus`). `images` is the folder of the images, None where it is not known.
    """

    name: str
    regions: tuple[tuple[str, Role | None], ...]
    classes: tuple[str, ...]
    attributes: tuple[tuple[str, tuple[str, ...]], ...]
    items: tuple[Item, ...]
    annotators: tuple[Annotator, ...] = ()
    unlisted: int = 0
    cut: tuple[str, ...] = ()
    images: Path | None = None

    @property
    def region_names(self) -> tuple[str, ...]:
        """The regions, in order."""
        return tuple(name for name, _ in self.regions)

    def with_role(self, role: Role) -> tuple[str, ...]:
        """The regions in `role`."""
        return tuple(name for name, its_role in self.regions if its_role == role)


def read_set(data: Path, images: Path | None = None, format: str | None = None) -> RegionSet:
    """The YAML of an audit set; or, with their folder of `images`, annotations, in `format` or as they are recognised.

    Annotations have neither labels nor roles. If their annotators are known by name, or the models that drew them, and
    two drew the same region, they can be compared.

    Raises:
        ValueError: what cannot be read; a `Misfit` where that is more than one thing.

    Example:
        >>> read_set(Path("data.yaml")).region_names  # doctest: +SKIP
        ('tie', 'person')
    """
    if images is None:
        if data.suffix.lower() not in (".yaml", ".yml"):
            raise ValueError(f"{data}: annotations are drawn on images: name their folder with --images")
        from bias_audit.data.declared import read_declared
        from bias_audit.imports import import_from_here

        import_from_here()
        audit_set = read_declared(data)
        content, _ = read_file(data, str(data), read_yaml, "YAML")
        folder = data.parent / content["images"] if "images" in content else None
        return replace(_declared(str(data), audit_set), cut=tuple(content.get("minus", ())), images=folder)
    if not images.is_dir():
        raise ValueError(f"--images {images}: is {'a file' if images.exists() else 'not there'}, expected a folder")
    return _annotated(_read(data, images, format), data, images)


def with_other(found: RegionSet, other: Path, images: Path | None = None) -> RegionSet:
    """The set with a second annotator: annotations of regions or groups of the same names, or a YAML.

    `images` is the folder of the images where the set itself is annotations: then the second is too.

    Raises:
        ValueError: it cannot be read, or has none of the set's images, or none of its regions; or the set cuts
            something out of a region, which annotations do not.
    """
    if images is None and other.suffix.lower() in (".yaml", ".yml"):
        second = _annotator(read_set(other))
    else:
        annotations = _read(other, images or found.images)
        second = _of_images(str(other), _renamed(annotations, found.region_names))
        cut = [name for name in found.cut if name in second.regions]
        if cut:
            raise ValueError(
                f"{other}: {found.name} cuts others out of {', '.join(cut)} (minus), annotations alone do not: give a "
                "YAML that does the same with them"
            )
    first = _annotator(found)
    if not first.files & second.files:
        example = near(min(first.files), second.files)
        raise ValueError(f"{other}: has none of the images of {found.name}, such as {min(first.files)!r}: {example}")
    if not first.regions & second.regions:
        raise ValueError(
            f"{other}: has none of the regions of {found.name} ({', '.join(sorted(first.regions))}): name them alike, "
            "or give a YAML that does"
        )
    return replace(found, annotators=(first, second))


def _read(path: Path, images: Path | None, format: str | None = None) -> Annotations:
    if images is not None and format is None and path.suffix.lower() in (".yaml", ".yml"):
        try:
            recognised(path)
        except Misfit as error:
            hint = f"{path}: the YAML of an audit set goes without --images, and beside another one only"
            raise Misfit([*error.lines, hint]) from error
    return read_annotations(path, images, format)


def _declared(name: str, audit_set: AuditDataset) -> RegionSet:
    subjects = audit_set.subjects
    names = [region for region, _ in subjects.regions]
    items = [
        Item(sample.id, int(sample.label), tuple(values), sample.boxed, name, _decoded(sample, names))
        for sample, values in zip(audit_set.samples, audit_set.attribute_table.tolist(), strict=True)
    ]
    return RegionSet(name, subjects.regions, subjects.classes, subjects.attributes, tuple(items))


def _decoded(sample: AuditSample | PendingSample, names: Sequence[str]) -> Callable[[], tuple[Image.Image, Masks]]:
    def decode() -> tuple[Image.Image, Masks]:
        found, regions = sample.decode()
        image = _as_picture(found)
        masks = {name: np.asarray(regions[name]) > 0 for name in names if name in regions}
        for name, mask in masks.items():
            if mask.shape != (image.height, image.width):
                raise WrongSize(
                    f"the mask of region {name!r} is {mask.shape[0]} x {mask.shape[1]} pixels (height x width), its "
                    f"image is {image.height} x {image.width}: a mask has the size of its image"
                )
        return image, masks

    return decode


def _as_picture(found: Any) -> Image.Image:
    if isinstance(found, Image.Image):
        found.load()
        return found
    from torchvision.transforms.v2.functional import to_pil_image

    image: Image.Image = to_pil_image(found)
    return image


def _annotated(annotations: Annotations, data: Path, images: Path) -> RegionSet:
    wrong = Complaints()
    for image in annotations.images:
        if unfound(image.file, images):
            wrong.add(image.where, f"image {image.file!r}: {unfound(image.file, images)}")
    wrong.end()
    if not annotations.images:
        raise ValueError(f"{data}: has no image: annotate some, or give another file")
    drawn = {a.region for image in annotations.images for a in image.annotations}
    files = {image.file for image in annotations.images}
    items = [
        Item(
            image.file,
            None,
            (),
            frozenset(a.region for a in image.annotations if isinstance(a.outline, Box)),
            image.where,
            _opened(image, images),
        )
        for image in annotations.images
    ]
    # Editors and COCO itself list many categories of which a set has a few.
    regions = tuple((name, None) for name in annotations.regions if name in drawn)
    return RegionSet(
        str(data), regions, (), (), tuple(items), _sources(annotations.images), len(set(pictures_in(images)) - files)
    )


def _opened(image: AnnotatedImage, images: Path) -> Callable[[], tuple[Image.Image, Masks]]:
    def decode() -> tuple[Image.Image, Masks]:
        found = picture(images / image.file)
        size = (found.height, found.width)
        return found, _drawn(image, size)

    return decode


def _drawn(image: AnnotatedImage, size: Size) -> Masks:
    """The regions of an image of `size`, each the union of what is annotated as it."""
    if image.size is not None and tuple(image.size) != size:
        raise WrongSize(
            f"is {size[0]} x {size[1]} pixels (height x width), its annotations are for {image.size[0]} x "
            f"{image.size[1]}: give the images that were annotated"
        )
    by_region: dict[str, list[Annotation]] = {}
    for annotation in image.annotations:
        by_region.setdefault(annotation.region, []).append(annotation)
    return {region: union([a.outline for a in those], size) for region, those in by_region.items()}


def _annotator(found: RegionSet) -> Annotator:
    items = {item.file: item for item in found.items}

    def draw(file: str, size: Size) -> Masks:
        image, masks = items[file].decode()
        if (image.height, image.width) != size:
            raise WrongSize(
                f"is {image.height} x {image.width} pixels (height x width) in {found.name}, the other annotator's is "
                f"{size[0]} x {size[1]}: give the same images"
            )
        return masks

    return Annotator(found.name, frozenset(items), frozenset(found.region_names), draw)


def _renamed(annotations: Annotations, names: Sequence[str]) -> list[AnnotatedImage]:
    """The images with what is annotated under these names, or under regions of a group that one of them names."""
    renamed = {part: name for name in names for part in annotations.named([name])}
    return [
        replace(
            i, annotations=tuple(replace(a, region=renamed[a.region]) for a in i.annotations if a.region in renamed)
        )
        for i in annotations.images
    ]


def _of_images(name: str, images: Sequence[AnnotatedImage]) -> Annotator:
    known = {image.file: image for image in images}
    regions = frozenset(a.region for image in images for a in image.annotations)
    return Annotator(name, frozenset(known), regions, lambda file, size: _drawn(known[file], size))


def _sources(images: Sequence[AnnotatedImage]) -> tuple[Annotator, ...]:
    """An annotator for each source, if two of them drew the same region and share an image; what has no source is
    nobody's, and so is what only CVAT's words say: how it was drawn there, not by whom."""
    names = sorted({a.source for image in images for a in image.annotations} - {"", *SOURCES})
    found = []
    for name in names:
        own = [replace(i, annotations=tuple(a for a in i.annotations if a.source == name)) for i in images]
        own = [image for image in own if image.annotations]
        found.append(_of_images(name, own))
    compared = any(a.regions & b.regions and a.files & b.files for a, b in combinations(found, 2))
    return tuple(found) if compared else ()

"""Annotated images as they lie on disk, as samples of an audit set.

Enters: `Annotations` or a folder of mask pictures, and a CSV whose rows choose the images and give labels and
attributes. Leaves: `PendingSample`s in that order, checked as far as can be without decoding an image, and the class
names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from bias_audit.data.annotations import Annotation, Annotations, Box, Complaints, Outline
from bias_audit.data.files import leaves, near, unfound
from bias_audit.data.formats import masks as mask_pictures
from bias_audit.data.formats.known import read_annotations
from bias_audit.data.outlines import WrongSize, mask_of, picture, union
from bias_audit.data.samples import Decoded, PendingSample
from bias_audit.data.tables import read_labels


def read_annotated(
    annotations: str | Path,
    format: str | None,
    images: str | Path,
    labels: str | Path,
    wanted: Mapping[str, Sequence[str]],
    minus: Mapping[str, Sequence[str]],
    attributes: Sequence[str] | None,
    classes: Sequence[str] | None,
) -> tuple[list[PendingSample], tuple[str, ...]]:
    """The images that the rows of the CSV `labels` choose from annotations, and the class names.

    A region of `wanted` is the union of what is annotated as its names, less what is as those in `minus`; an image
    without the former lacks the region.

    Raises:
        Misfit: see `AuditDataset.from_annotations`.
    """
    for names in (*wanted.values(), *minus.values()):
        if isinstance(names, str):
            raise ValueError(f"expected a list of categories, got one text: write [{names!r}]")
    wrong = Complaints()
    known = wrong.attempt(lambda: read_annotations(annotations, images, format))
    rows, found = read_labels(labels, attributes, classes, wrong)
    for name in minus:
        if name not in wanted:
            wrong.add("minus", f"unknown region {name!r}: {near(name, wanted)}")
    if known is not None:
        _check_names(known, annotations, [n for names in (*wanted.values(), *minus.values()) for n in names], wrong)
    by_file = {image.file: image for image in known.images} if known is not None else {}
    for row in rows:
        if known is not None and row.file not in by_file and not leaves(row.file):
            wrong.add(row.where, f"{annotations} has no image {row.file!r}: {near(row.file, by_file)}")
        elif unfound(row.file, images):
            wrong.add(row.where, unfound(row.file, images))
    wrong.end()
    assert known is not None
    parts = {name: (known.named(names), known.named(minus.get(name, ()))) for name, names in wanted.items()}
    samples = []
    for row in rows:
        image = by_file[row.file]
        drawn = {
            name: (_outlines(image.annotations, plus), _outlines(image.annotations, cut))
            for name, (plus, cut) in parts.items()
            if _outlines(image.annotations, plus)
        }
        decode = partial(_decode_annotated, Path(images) / row.file, image.size, drawn)
        samples.append(PendingSample(found.index(row.label), row.attributes, row.file, decode, _boxed(drawn)))
    return samples, found


def read_folder(
    images: str | Path,
    labels: str | Path,
    masks: str | Path | None,
    regions: Sequence[str],
    attributes: Sequence[str] | None,
    classes: Sequence[str] | None,
) -> tuple[list[PendingSample], tuple[str, ...]]:
    """The images that the rows of the CSV `labels` choose from a folder, with a mask picture per region, and the class
    names.

    Raises:
        Misfit: see `AuditDataset.from_folder`.
    """
    wrong = Complaints()
    rows, found = read_labels(labels, attributes, classes, wrong)
    if masks is not None:
        wrong.lines += mask_pictures.missing(Path(masks), regions)
    elif regions:
        wrong.add("masks", f"is not given, which region {regions[0]!r} needs: name the folder of the masks")
    for row in rows:
        if unfound(row.file, images):
            wrong.add(row.where, unfound(row.file, images))
    wrong.end()
    samples = []
    for row in rows:
        painted = () if masks is None else mask_pictures.painted(Path(masks), row.file, regions)
        decode = partial(_decode_painted, Path(images) / row.file, {a.region: a.outline for a in painted})
        samples.append(PendingSample(found.index(row.label), row.attributes, row.file, decode))
    return samples, found


def _check_names(known: Annotations, path: str | Path, names: Sequence[str], wrong: Complaints) -> None:
    groups = {group for _, group in known.groups}
    for name in dict.fromkeys(names):
        if not known.named([name]):
            wrong.add(str(path), f"unknown category {name!r}: {near(name, {*known.regions, *groups})}")


def _outlines(annotations: Sequence[Annotation], regions: Sequence[str]) -> tuple[Outline, ...]:
    return tuple(a.outline for a in annotations if a.region in regions)


def _boxed(drawn: Mapping[str, tuple[Sequence[Outline], Sequence[Outline]]]) -> frozenset[str]:
    """The regions whose outline is, wholly or in part, that of a box."""
    return frozenset(name for name, parts in drawn.items() if any(isinstance(o, Box) for part in parts for o in part))


def _decode_annotated(
    path: Path,
    size: tuple[int, int] | None,
    regions: Mapping[str, tuple[Sequence[Outline], Sequence[Outline]]],
) -> Decoded:
    found = picture(path)
    actual = (found.height, found.width)
    if size is not None and actual != tuple(size):
        raise WrongSize(
            f"{path}: is {found.height} x {found.width} pixels (height x width), its annotations are for "
            f"{size[0]} x {size[1]}: give the images that were annotated"
        )
    masks = {}
    for name, (plus, cut) in regions.items():
        drawn = union(plus, actual)
        left = drawn & ~union(cut, actual)
        # What is cut away as a whole is not there; that an outline holds no pixel is for who drew it to know.
        if left.any() or not drawn.any():
            masks[name] = torch.from_numpy(left)
    return found, masks


def _decode_painted(path: Path, regions: Mapping[str, Outline]) -> Decoded:
    found = picture(path)
    size = (found.height, found.width)
    return found, {name: torch.from_numpy(mask_of(outline, size)) for name, outline in regions.items()}

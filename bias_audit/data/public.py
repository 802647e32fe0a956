"""Public data sets in which a cue is known to go with the class, as audit sets: CelebA, Oxford-IIIT Pet, Waterbirds.

Enters: the folder a data set was unpacked into, as torchvision or WILDS lays it out. Leaves: an `AuditDataset`, its
images decoded when first needed; or one `Misfit` with every row and file that is wrong.

The tables are read here and not by torchvision's classes: those stop at the first fault without naming its line, and
CelebA's checks each table's checksum, so that a part of the data set is refused.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from bias_audit.data.annotations import Box, Complaints, Misfit
from bias_audit.data.dataset import DEFAULT_CACHE_BYTES, AuditDataset
from bias_audit.data.files import near, read_bytes, unfound
from bias_audit.data.outlines import mask_of, picture
from bias_audit.data.samples import Decoded, PendingSample

FACE_REGIONS = ("face", "eyes", "mouth", "hair", "background")
PET_REGIONS = ("pet", "background", "border")
BIRD_REGIONS = ("bird", "background")
# (height, width) of CelebA's aligned pictures.
ALIGNED = (218, 178)
# What the columns of Waterbirds' metadata may hold: 1 is water; training, validation and test.
_CODES = {"y": ("0", "1"), "split": ("0", "1", "2"), "place": ("0", "1")}


def celeba(
    root: str | Path,
    *,
    split: Literal["train", "valid", "test", "all"] = "valid",
    aligned: bool = True,
    target: str = "Blond_Hair",
    attributes: Sequence[str] = ("Male",),
    object: Sequence[str] = ("hair",),
    spurious: Sequence[str] = ("face",),
    context: Sequence[str] = (),
    transform: Callable[..., Any] | None = None,
    cache_bytes: int = DEFAULT_CACHE_BYTES,
) -> AuditDataset:
    """CelebA's faces; one of its 40 attributes is the class, others are compared by.

    Regions are drawn around the five landmarks by `face_regions`. Its boxes of heads belong to the pictures as they
    were found, not to the aligned ones, though torchvision gives both together. What an object region covers is cut out
    of the others. An attribute's values are "yes" and "no"; their names are the data set's, and so is what they claim
    of people.

    Args:
        root: holds `celeba/` as torchvision unpacks it, or is that folder.
        split: which rows of `list_eval_partition.txt`.
        aligned: the pictures of `img_align_celeba`, all of one size; else those of `img_celeba`, which have the region
            "box" too.
        target: name of the attribute to be classified: class 1 has it, class 0 is "not" it.
        attributes: names of the attributes to compare groups by.
        object, spurious, context: any of "face", "eyes", "mouth", "hair", "background"; and "box".

    Raises:
        Misfit: a table that cannot be read, rows that do not fit it, pictures that are not there; says all of them.
        ValueError: an unknown split, attribute or region.

    Source: Liu, Luo, Wang and Tang, ICCV 2015, arXiv 1411.7766. Blond hair and gender: Sagawa et al., arXiv 1911.08731.

    Example:
        >>> celeba("data", split="test").subjects.classes  # doctest: +SKIP
        ('not Blond_Hair', 'Blond_Hair')
    """
    folder, splits = _below(root, "celeba"), {"train": "0", "valid": "1", "test": "2"}
    if split not in (*splits, "all"):
        raise ValueError(f"split={split!r}: expected one of {', '.join(splits)}, all")
    _check_regions(FACE_REGIONS if aligned else (*FACE_REGIONS, "box"), object, spurious, context)
    wrong = Complaints()
    wanted = set()
    for row in _rows(folder / "list_eval_partition.txt", 1, wrong):
        if row.cells[0] not in splits.values():
            wrong.add(row.where, f"image {row.name!r}: {row.cells[0]!r} is no split, expected 0, 1 or 2")
        elif split == "all" or row.cells[0] == splits[split]:
            wanted.add(row.name)
    names = _header(folder / "list_attr_celeba.txt")
    for name in (target, *attributes):
        if name not in names:
            raise ValueError(f"{folder / 'list_attr_celeba.txt'}: no attribute {name!r}: {near(name, names)}")
    landmarks = _numbers(folder / f"list_landmarks_{'align_' if aligned else ''}celeba.txt", 10, wanted, wrong)
    boxes = None if aligned else _numbers(folder / "list_bbox_celeba.txt", 4, wanted, wrong)
    pictures = folder / ("img_align_celeba" if aligned else "img_celeba")
    there = set(os.listdir(pictures)) if pictures.is_dir() else set()
    samples = []
    for row in _rows(folder / "list_attr_celeba.txt", 40, wrong, header=2):
        if row.name not in wanted:
            continue
        wanted.remove(row.name)
        values = dict(zip(names, row.cells, strict=True))
        odd = next((f"{name} is {values[name]!r}" for name in names if values[name] not in ("-1", "1")), "")
        if odd:
            wrong.add(row.where, f"image {row.name!r}: {odd}, expected -1 or 1: unpack the data set again")
        if row.name not in there:
            wrong.add(row.where, f"image {row.name!r}: is not in {pictures}: unpack the pictures there")
        if row.name not in landmarks:
            wrong.add(row.where, f"image {row.name!r}: has no landmarks: unpack the data set again")
        elif boxes is not None and row.name not in boxes:
            wrong.add(row.where, f"image {row.name!r}: has no box: unpack the data set again")
        else:
            box = None if boxes is None else boxes[row.name]
            decode = partial(_decode_face, pictures / row.name, landmarks[row.name], box, tuple(object))
            known = {name: "yes" if values[name] == "1" else "no" for name in attributes}
            boxed = frozenset[str]() if aligned else frozenset({"box"})
            samples.append(PendingSample(int(values[target] == "1"), known, row.name, decode, boxed))
    for name in sorted(wanted):
        wrong.add(str(folder / "list_eval_partition.txt"), f"image {name!r}: has no row in list_attr_celeba.txt")
    wrong.end()
    return AuditDataset(
        samples,
        object=object,
        spurious=spurious,
        context=context,
        classes=[f"not {target}", target],
        attributes=attributes,
        transform=transform,
        cache_bytes=cache_bytes,
    )


def face_regions(landmarks: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
    """Face, eyes, mouth, hair and background around five landmarks of a face, as far as these alone can tell.

    Everything is measured along the line from the mouth to the eyes and across it, so a tilted head is drawn tilted, in
    units of the larger of two lengths: between the eyes, and from their middle to the mouth's. That keeps a face in
    half profile as large as it is. The face is an ellipse from one unit above the eyes to 0.75 below the mouth and 2.1
    wide; each eye one of 0.8 x 0.5, the mouth one of 0.5 units, as wide as its corners and 0.2 more. The hair is
    what an ellipse up to 1.9 units above the eyes and 3.2 wide covers beyond the face, above the mouth's line: where
    hair may be, with whatever else is there; a bald head has it too. The background is what neither face nor hair
    covers.

    Args:
        landmarks: `(B, 5, 2)`: x and y in pixels of the eyes, the nose and the corners of the mouth, each pair from
            left to right in the picture.
        size: (height, width) of the pictures.

    Returns:
        Of each name of `FACE_REGIONS` bool `(B, H, W)`; all False where eyes and mouth are in one place.

    Example:
        >>> points = torch.tensor([[[69.0, 111], [108, 111], [88, 136], [72, 152], [105, 152]]])
        >>> {name: int(mask.sum()) for name, mask in face_regions(points, (218, 178)).items()}["eyes"] > 0
        True
    """
    left, right, _, mouth_left, mouth_right = landmarks.double().unbind(1)
    eyes, mouth = (left + right) / 2, (mouth_left + mouth_right) / 2
    rise = torch.linalg.vector_norm(eyes - mouth, dim=1, keepdim=True)
    unit = torch.maximum(rise, torch.linalg.vector_norm(right - left, dim=1, keepdim=True))
    up = (eyes - mouth) / rise.clamp_min(1e-9)
    across = torch.stack([-up[:, 1], up[:, 0]], dim=1)
    rows, columns = (torch.arange(side, dtype=torch.float64) for side in size)
    # How far each pixel lies along both directions, `(B, H, W)`: the same for all ellipses.
    along, beside = (v[:, :1, None] * columns + v[:, 1:, None] * rows[:, None] for v in (up, across))

    def within(centre: Tensor, half_width: Tensor, half_height: Tensor) -> Tensor:
        a = (beside - (centre * across).sum(1)[:, None, None]) / half_width[:, None]
        b = (along - (centre * up).sum(1)[:, None, None]) / half_height[:, None]
        inside: Tensor = a**2 + b**2 <= 1
        return inside

    def spanning(top: Tensor, bottom: Tensor, half_width: Tensor) -> Tensor:
        return within((top + bottom) / 2, half_width, torch.linalg.vector_norm(top - bottom, dim=1, keepdim=True) / 2)

    chin = mouth - 0.75 * unit * up
    face = spanning(eyes + unit * up, chin, 1.05 * unit)
    above = along > (mouth * up).sum(1)[:, None, None]
    hair = spanning(eyes + 1.9 * unit * up, chin, 1.6 * unit) & above & ~face
    wide = torch.linalg.vector_norm(mouth_right - mouth_left, dim=1, keepdim=True) / 2 + 0.1 * unit
    found = {
        "face": face,
        "eyes": within(left, 0.4 * unit, 0.25 * unit) | within(right, 0.4 * unit, 0.25 * unit),
        "mouth": within(mouth, wide, 0.25 * unit),
        "hair": hair,
        "background": ~(face | hair),
    }
    drawable = (rise > 1e-9)[:, :, None]
    return {name: torch.logical_and(mask, drawable) for name, mask in found.items()}


def oxford_pets(
    root: str | Path,
    *,
    split: Literal["trainval", "test"] = "test",
    target: Literal["species", "breed"] = "species",
    attributes: Sequence[str] = (),
    object: Sequence[str] = ("pet",),
    spurious: Sequence[str] = ("background",),
    context: Sequence[str] = ("border",),
    transform: Callable[..., Any] | None = None,
    cache_bytes: int = DEFAULT_CACHE_BYTES,
) -> AuditDataset:
    """The Oxford-IIIT Pet data set with its trimaps: the pet, the background, and the border that is neither.

    Args:
        root: holds `oxford-iiit-pet/` as torchvision unpacks it, or is that folder.
        split: which of the two lists of images.
        target: "species" (cat or dog) or "breed" (37) as the class.
        attributes: any of "species" and "breed", to compare groups by.
        object, spurious, context: any of "pet", "background", "border".

    Raises:
        Misfit: the list cannot be read, rows do not fit it, a picture or a trimap is not there; says all of them.
        ValueError: an unknown split, target, attribute or region.

    Source: Parkhi, Vedaldi, Zisserman and Jawahar, CVPR 2012.

    Example:
        >>> oxford_pets("data").subjects.classes  # doctest: +SKIP
        ('Cat', 'Dog')
    """
    folder, species = _below(root, "oxford-iiit-pet"), ("Cat", "Dog")
    if split not in ("trainval", "test"):
        raise ValueError(f"split={split!r}: expected trainval or test")
    for name in (target, *attributes):
        if name not in ("species", "breed"):
            raise ValueError(f"expected species or breed as target and attributes, got {name!r}")
    _check_regions(PET_REGIONS, object, spurious, context)
    wrong, samples = Complaints(), []
    breeds: dict[int, str] = {}
    for row in _rows(folder / "annotations" / f"{split}.txt", 3, wrong):
        number, kind = _whole(row.cells[0]), _whole(row.cells[1])
        if number is None or not 1 <= number <= 1000 or kind not in (1, 2):
            wrong.add(row.where, f"image {row.name!r}: expected the numbers of a class and of a species, 1 or 2")
            continue
        image, trimap = f"images/{row.name}.jpg", f"annotations/trimaps/{row.name}.png"
        reasons = [reason for reason in (unfound(image, folder), unfound(trimap, folder)) if reason]
        if reasons:
            wrong.lines += [f"{row.where}: image {row.name!r}: {reason}" for reason in reasons]
            continue
        breed = " ".join(part.title() for part in row.name.rsplit("_", 1)[0].split("_"))
        if breeds.setdefault(number, breed) != breed:
            wrong.add(row.where, f"image {row.name!r}: class {number} is {breeds[number]!r} above: unpack it again")
        known = {"species": species[kind - 1], "breed": breed}
        decode = partial(_decode_pet, folder / image, folder / trimap)
        label = kind - 1 if target == "species" else number - 1
        samples.append(PendingSample(label, {name: known[name] for name in attributes}, row.name, decode))
    wrong.end()
    named = [breeds.get(number, f"class {number}") for number in range(1, max(breeds, default=0) + 1)]
    return AuditDataset(
        samples,
        object=object,
        spurious=spurious,
        context=context,
        classes=species if target == "species" else named,
        attributes=attributes,
        transform=transform,
        cache_bytes=cache_bytes,
    )


def waterbirds(
    root: str | Path,
    *,
    masks: str | Path,
    split: Literal["train", "val", "test", "all"] = "test",
    object: Sequence[str] = ("bird",),
    spurious: Sequence[str] = ("background",),
    context: Sequence[str] = (),
    transform: Callable[..., Any] | None = None,
    cache_bytes: int = DEFAULT_CACHE_BYTES,
) -> AuditDataset:
    """Waterbirds: water and land birds of CUB pasted on water or land, which goes with the bird in training.

    The attribute is `place`, "land" or "water". Birds are cut out by CUB's segmentations, which come apart from
    Waterbirds: a pixel is the bird's where more than half of the annotators said so. An image without one lacks its
    regions.

    Args:
        root: holds `waterbirds_v1.0/` as WILDS unpacks it, or is that folder.
        masks: the folder of CUB's segmentations, `<species>/<image>.png`.
        split: which rows of `metadata.csv`.
        object, spurious, context: any of "bird", "background".

    Raises:
        Misfit: `metadata.csv` cannot be read, rows do not fit it, pictures are not there, or no image at all has a
            mask; says all of them.
        ValueError: an unknown split or region.

    Source: Sagawa, Koh, Hashimoto and Liang, ICLR 2020, arXiv 1911.08731; WILDS, arXiv 2012.07421; Wah et al.,
    CUB-200-2011, for the segmentations.

    Example:
        >>> waterbirds("data", masks="CUB/segmentations").subjects.attributes  # doctest: +SKIP
        (('place', ('land', 'water')),)
    """
    folder, splits = _below(root, "waterbirds_v1.0"), {"train": "0", "val": "1", "test": "2"}
    if split not in (*splits, "all"):
        raise ValueError(f"split={split!r}: expected one of {', '.join(splits)}, all")
    _check_regions(BIRD_REGIONS, object, spurious, context)
    wrong, samples, masked = Complaints(), [], 0
    for where, row in _metadata(folder / "metadata.csv", ("img_filename", *_CODES)):
        file = row["img_filename"]
        odd = next((name for name, known in _CODES.items() if row[name] not in known), None)
        if odd is not None:
            wrong.add(where, f"image {file!r}: {odd} is {row[odd]!r}, expected one of {', '.join(_CODES[odd])}")
            continue
        if split != "all" and row["split"] != splits[split]:
            continue
        reason = unfound(file, folder)
        if reason:
            wrong.add(where, f"image {file!r}: {reason}")
            continue
        mask = Path(masks) / Path(file).with_suffix(".png")
        masked += mask.is_file()
        decode = partial(_decode_bird, folder / file, mask if mask.is_file() else None)
        place = ("land", "water")[int(row["place"])]
        samples.append(PendingSample(int(row["y"]), {"place": place}, file, decode))
    if samples and not masked:
        wrong.add(str(masks), f"has no mask of any of {len(samples)} images: give the folder of CUB's segmentations")
    wrong.end()
    return AuditDataset(
        samples,
        object=object,
        spurious=spurious,
        context=context,
        classes=["landbird", "waterbird"],
        transform=transform,
        cache_bytes=cache_bytes,
    )


@dataclass(frozen=True)
class _Row:
    """A line of a table with blanks between its cells, the first of which names an image."""

    where: str
    name: str
    cells: tuple[str, ...]


def _below(root: str | Path, name: str) -> Path:
    inner = Path(root) / name
    return inner if inner.is_dir() else Path(root)


def _check_regions(known: Sequence[str], *roles: Sequence[str]) -> None:
    for names in roles:
        if isinstance(names, str):
            raise ValueError(f"expected a list of region names, got one text: write [{names!r}]")
        for name in names:
            if name not in known:
                raise ValueError(f"unknown region {name!r}: {near(name, known)}")


def _lines(path: Path) -> list[str]:
    try:
        return read_bytes(path, "a table of the data set").decode().splitlines()
    except UnicodeDecodeError as error:
        raise Misfit([f"{path}: is no text in UTF-8: unpack the data set again"]) from error


def _header(path: Path) -> list[str]:
    """The names of CelebA's attributes: the second line of their table, which begins with the number of its rows."""
    names = " ".join(_lines(path)[1:2]).split()
    if len(names) != 40:
        raise Misfit([f"{path}, line 2: expected the names of 40 attributes, got {len(names)}: unpack it again"])
    return names


def _rows(path: Path, cells: int, wrong: Complaints, header: int = 0) -> Iterator[_Row]:
    """The rows below the header that name an image and have so many cells beside it; `wrong` is told of the others."""
    for number, line in enumerate(_lines(path)[header:], start=header + 1):
        name, *rest = line.split() or [""]
        if name and len(rest) == cells:
            yield _Row(f"{path}, line {number}", name, tuple(rest))
        elif name and not name.startswith("#"):
            wrong.add(f"{path}, line {number}", f"image {name!r}: expected {cells} values, got {len(rest)}")


def _numbers(path: Path, count: int, wanted: set[str], wrong: Complaints) -> dict[str, tuple[int, ...]]:
    """Of each wanted image its row: x and y of five points, or left, top, width and height."""
    found = {}
    for row in _rows(path, count, wrong, header=2):
        if row.name in wanted:
            numbers = tuple(value for value in map(_whole, row.cells) if value is not None)
            if len(numbers) == count:
                found[row.name] = numbers
            else:
                wrong.add(row.where, f"image {row.name!r}: expected {count} whole numbers: unpack the data set again")
    return found


def _metadata(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, Mapping[str, str]]]:
    """Where each row of a CSV stands, and its cells."""
    reader = csv.DictReader(_lines(path))
    try:
        known = reader.fieldnames or ()
        missing = [name for name in columns if name not in known]
        if missing:
            raise Misfit([f"{path}, line 1: no column {name!r}: {near(name, known)}" for name in missing])
        for row in reader:
            yield f"{path}, line {reader.line_num}", {name: (row[name] or "").strip() for name in columns}
    except csv.Error as error:
        raise Misfit([f"{path}, line {reader.line_num}: is no CSV: {error}: unpack the data set again"]) from error


def _whole(text: str) -> int | None:
    """A number of at most six digits, or None."""
    digits = text.removeprefix("-")
    return int(text) if digits.isascii() and digits.isdecimal() and len(digits) <= 6 else None


def _decode_face(
    path: Path, landmarks: tuple[int, ...], box: tuple[int, ...] | None, objects: tuple[str, ...]
) -> Decoded:
    """`box` is (left, top, width, height), None of an aligned picture."""
    found = picture(path)
    size = found.height, found.width
    if box is None and size != ALIGNED:
        raise ValueError(
            f"{path}: is {found.height} x {found.width} pixels (height x width), the landmarks are for the aligned "
            f"pictures of {ALIGNED[0]} x {ALIGNED[1]}: unpack img_align_celeba.zip"
        )
    points = torch.tensor(landmarks, dtype=torch.float32).reshape(1, 5, 2)
    every = {name: masks[0] for name, masks in face_regions(points, size).items()}
    if box is not None:
        left, top, width, height = box
        every["box"] = torch.from_numpy(mask_of(Box(left, top, left + width, top + height), size))
    regions = {name: mask for name, mask in every.items() if mask.any()}
    taken = torch.stack([regions[name] for name in objects if name in regions] or [torch.zeros(size).bool()]).any(0)
    return found, {name: mask if name in objects else mask & ~taken for name, mask in regions.items()}


def _decode_pet(path: Path, trimap: Path) -> Decoded:
    values = _grey(trimap)
    odd = sorted(set(np.unique(values).tolist()) - {1, 2, 3})
    if odd:
        raise ValueError(f"{trimap}: has the value {odd[0]}, expected 1 (pet), 2 (background) or 3 (border)")
    masks = {name: torch.from_numpy(values == number) for number, name in enumerate(PET_REGIONS, start=1)}
    return picture(path), {name: mask for name, mask in masks.items() if mask.any()}


def _decode_bird(path: Path, mask: Path | None) -> Decoded:
    if mask is None:
        return picture(path), {}
    # Five people drew each bird: the value is 255 times the share of them that said "bird".
    bird = torch.from_numpy(_grey(mask) > 127)
    return picture(path), {"bird": bird, "background": ~bird}


def _grey(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The first channel of a picture, `(H, W)`: some of CUB's masks have more, all of them alike."""
    found = picture(path)
    if found.mode not in ("L", "LA", "RGB", "RGBA", "P"):
        raise ValueError(f"{path}: expected 8 bits a pixel, got the mode {found.mode!r}: save it so")
    values = np.asarray(found)
    return values if values.ndim == 2 else values[:, :, 0]

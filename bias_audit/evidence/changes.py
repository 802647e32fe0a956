"""What is changed in each image before the model sees it again.

Enters: the audit set's images and masks, its roles and attributes, the class that each attribute value goes with, and
the user's swaps. Leaves: `Changes`: for every image the same list of `Change`s, each with the pixels that it replaces.

Regions do not move from audit to audit: everything here is done once and kept, as far as it replaces pixels.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from bias_audit.data.dataset import AuditDataset
from bias_audit.evidence.association import Alignment
from bias_audit.evidence.contents import contents
from bias_audit.evidence.removal import FILLS, Mask, control_regions, inpainted, transplanted, widened

Kind = Literal[
    "none", "removal", "control", "fill", "fill_control", "swap", "swap_control", "noise_rest", "noise_object"
]
Swap = Callable[[Any, str], "Tensor | Image.Image | None"]

# Noise of arXiv 2201.10766, on images in [0, 1].
SIGMA, TRIALS = 0.25, 3
# A donor's region takes the place of one that it covers: so much of both must overlap (intersection over union).
_LEAST_OVERLAP = 0.7
# Donors whose overlap differs by less than this cover a region equally well.
_TIE = 0.01


@dataclass(frozen=True)
class Change:
    """One change that is made in every image where it can be made.

    `region` and `attribute` are places in `Subjects`, -1 for none; `detail` is the name of the fill. Of "control" and
    the noises there are several alike.
    """

    kind: Kind
    region: int = -1
    attribute: int = -1
    detail: str = ""


@dataclass(frozen=True)
class _Patch:
    """Pixels `(3, h, w)` that replace those at `top`, `left`."""

    top: int
    left: int
    pixels: Tensor

    def on(self, image: Tensor) -> Tensor:
        """A copy of the image with these pixels."""
        changed = image.clone()
        height, width = self.pixels.shape[1:]
        changed[:, self.top : self.top + height, self.left : self.left + width] = self.pixels
        return changed


class Changes:
    """The changes of a drawn audit set.

    Args:
        audit_set: the images, all of them changed.
        controls: control regions for each removed region.
        sensitivity: of so many images, drawn like the audit set itself, fills and noise are tried too.
        swaps: per attribute the user's `swap(sample, value)`: the sample's image with the attribute's cue changed to
            `value`, of the same size, or None (or the image as it is) where it cannot be. Without one, the spurious
            regions of images of other values are put in, where they cover each other well enough.
        alignments: which value goes with which class; a swap turns an aligned image into a conflicting one, and back.
        seed: of the controls, the donors and the noise. What is drawn for an image depends on its id and not on its
            place in the audit set.
    """

    def __init__(
        self,
        audit_set: AuditDataset,
        controls: int,
        sensitivity: int,
        swaps: Mapping[str, Swap],
        alignments: Sequence[Alignment],
        seed: int,
    ) -> None:
        self._set, self._swaps, self._controls = audit_set, swaps, controls
        tried = set(audit_set.subset(sensitivity, seed).ids) if sensitivity else set()
        self._sensitive = [name in tried for name in audit_set.ids]
        # One seed for each image.
        self._seeds = [_seed(seed, zlib.crc32(name.encode())) for name in audit_set.ids]
        subjects = audit_set.subjects
        self._spurious = [r for r, (_, role) in enumerate(subjects.regions) if role == "spurious"]
        self._objects = [r for r, (_, role) in enumerate(subjects.regions) if role == "object"]
        self._names = [name for name, _ in subjects.attributes]
        self._attributes = audit_set.attribute_table
        self._wanted = _wanted_values(self._attributes, audit_set.labels, subjects.attributes, alignments, self._seeds)
        self.list: tuple[Change, ...] = (Change("none"), *self._all())
        self._prepared = [audit_set.prepared(i) for i in range(len(audit_set))]
        self._donors = self._find_donors()
        self._kept: dict[int, list[_Patch | None]] = {}

    def _all(self) -> Iterator[Change]:
        for r in self._spurious:
            yield Change("removal", r)
            yield from (Change("control", r) for _ in range(self._controls))
            for fill in FILLS:
                yield Change("fill", r, detail=fill)
                yield Change("fill_control", r, detail=fill)
        for a, name in enumerate(self._names):
            if name in self._swaps:
                yield Change("swap", attribute=a)
            else:
                for r in self._spurious:
                    yield Change("swap", r, a)
                    yield Change("swap_control", r, a)
        if self._objects:
            yield from (Change("noise_rest") for _ in range(TRIALS))
            yield from (Change("noise_object") for _ in range(TRIALS))

    @property
    def count(self) -> int:
        """Images."""
        return len(self._prepared)

    @property
    def contents(self) -> npt.NDArray[np.float64]:
        """What each spurious region of each image looks like, `(S, N, D)`: see `evidence.contents`."""
        return np.stack([[contents(image, masks[r]) for image, masks in self._prepared] for r in self._spurious])

    @property
    def shown(self) -> npt.NDArray[np.bool_]:
        """Whether each image shows each spurious region, `(N, S)`."""
        return np.array([[bool(masks[r].any()) for r in self._spurious] for _, masks in self._prepared])

    @property
    def swapped_values(self) -> npt.NDArray[np.str_]:
        """The value that each image's cue is changed to, `(N, A)`, "" where it has none."""
        return self._wanted

    def made(self, index: int) -> list[int]:
        """The numbers of the changes that can be made in an image: the first is the image itself."""
        tried = zip(self.list, self._patches_of(index), strict=True)
        return [
            number
            for number, (change, patch) in enumerate(tried)
            if number == 0 or patch is not None or self._can_be_noisy(index, change)
        ]

    def pictures(self, index: int) -> Iterator[tuple[int, Tensor]]:
        """Number and picture `(3, H, W)` of each change that can be made in an image."""
        return ((number, self.picture(index, number)) for number in self.made(index))

    def picture(self, index: int, number: int) -> Tensor:
        """The picture `(3, H, W)` of one change in one image, in which it can be made."""
        image, patch, change = self._prepared[index][0], self._patches_of(index)[number], self.list[number]
        if change.kind.startswith("noise"):
            return self._noisy(index, number, change)
        return image if patch is None else patch.on(image)

    def _patches_of(self, index: int) -> list[_Patch | None]:
        if index not in self._kept:
            self._kept[index] = list(self._patches(index))
        return self._kept[index]

    def _patches(self, index: int) -> Iterator[_Patch | None]:
        """Of every change the pixels that it replaces; None where it cannot be made, and for noise."""
        image = self._prepared[index][0]
        holes = {r: self._holes(index, r) for r in self._spurious}
        for change in self.list:
            if change.kind.startswith("swap"):
                yield self._swap_patch(index, change)
            elif change.region < 0 or (change.detail and not self._sensitive[index]):
                yield None
            else:
                region, controls = holes[change.region]
                hole = region if change.kind in ("removal", "fill") else next(controls, None)
                if hole is None:
                    yield None
                elif change.detail:
                    yield _difference(image, FILLS[change.detail](image, hole, self._seeds[index]))
                else:
                    yield _difference(image, inpainted(image, hole))

    def _holes(self, index: int, region: int) -> tuple[Mask | None, Iterator[Mask]]:
        """What is removed of a region, None where it is nowhere or everywhere, and its control regions by turns."""
        masks = self._prepared[index][1].numpy()
        hole = widened(masks[region])
        if not hole.any() or hole.all():
            return None, iter(())
        claimed = [widened(masks[r]) for r in (*self._spurious, *self._objects)]
        controls = control_regions(hole, np.logical_or.reduce(claimed), self._controls, self._seeds[index])
        return hole, cycle(controls)

    def _swap_patch(self, index: int, change: Change) -> _Patch | None:
        image, masks = self._prepared[index]
        value = self._wanted[index, change.attribute]
        if not value:
            return None
        if change.region < 0:
            picture = self._swaps[self._names[change.attribute]](self._set.samples[index], value)
            changed = image if picture is None else self._set.prepared(index, picture)[0]
            # A swap that gives the image back has swapped nothing: that no decision changes then is no innocence.
            return None if torch.equal(changed, image) else _difference(image, changed)
        donor = self._donors[change.region][int(change.kind == "swap_control"), index, change.attribute]
        if donor < 0:
            return None
        donated, donor_masks = self._prepared[donor]
        region, donor_region = masks[change.region].numpy(), donor_masks[change.region].numpy()
        return _difference(image, transplanted(image, region, donated, donor_region))

    def _find_donors(self) -> Mapping[int, npt.NDArray[np.int64]]:
        """Per region `(2, N, A)`: who gives each image the wanted value's region, and who gives it its own value's."""
        own = self._attributes
        sizes = {tuple(masks.shape) for _, masks in self._prepared}
        # A cue that is always in the same place is covered equally well by all: each image draws its own donor, or one
        # image's cue would stand for its value everywhere.
        turns = np.array(self._seeds) / 2**32
        drawn = _TIE * ((turns[:, None] + turns) % 1)
        found = {}
        for r in self._spurious:
            donors = np.full((2, *own.shape), -1)
            if len(sizes) == 1:
                overlap = _overlaps(torch.stack([masks[r] for _, masks in self._prepared])).numpy()
                np.fill_diagonal(overlap, 0)
                for a in range(own.shape[1]):
                    for row, values in enumerate((self._wanted[:, a], own[:, a])):
                        fits = (own[None, :, a] == values[:, None]) & (values[:, None] != "")
                        fits &= overlap >= _LEAST_OVERLAP
                        best = np.where(fits, overlap + drawn, 0).argmax(axis=1)
                        donors[row, :, a] = np.where(fits.any(axis=1), best, -1)
            found[r] = donors
        return found

    def _can_be_noisy(self, index: int, change: Change) -> bool:
        if not (change.kind.startswith("noise") and self._sensitive[index]):
            return False
        image, masks = self._prepared[index]
        objects = masks[self._objects].any(dim=0)
        # Where the transform has normalised it in a step that cannot be put off, sigma would mean something else.
        in_range = image.dtype == torch.uint8 or bool(image.amin() >= 0 and image.amax() <= 1)
        return bool(objects.any()) and not bool(objects.all()) and in_range

    def _noisy(self, index: int, number: int, change: Change) -> Tensor:
        image, masks = self._prepared[index]
        objects = masks[self._objects].any(dim=0)
        where = objects if change.kind == "noise_object" else ~objects
        scaled = image.float() / 255 if image.dtype == torch.uint8 else image
        generator = torch.Generator().manual_seed(_seed(self._seeds[index], number))
        noise = (torch.randn(scaled.shape, generator=generator) * SIGMA).to(scaled.dtype)
        noisy = torch.where(where, (scaled + noise).clamp(0, 1), scaled)
        return (noisy * 255).round().to(torch.uint8) if image.dtype == torch.uint8 else noisy


def _wanted_values(
    own: npt.NDArray[np.str_],
    labels: npt.NDArray[np.int64],
    attributes: Sequence[tuple[str, tuple[str, ...]]],
    alignments: Sequence[Alignment],
    seeds: Sequence[int],
) -> npt.NDArray[np.str_]:
    """Of an image whose value goes with its class another value; else the one that does, or any other."""
    wanted = np.full(own.shape, "", dtype=np.array([v for _, vs in attributes for v in vs] or [""]).dtype)
    known = {alignment.attribute: alignment.value_of_class for alignment in alignments}
    for a, (name, values) in enumerate(attributes):
        for i, value in enumerate(own[:, a]):
            others = [v for v in values if v != value]
            if not value or not others:
                continue
            aligned = known[name][labels[i]] if name in known else ""
            wanted[i, a] = aligned if aligned in others else others[_seed(seeds[i], a) % len(others)]
    return wanted


def _overlaps(masks: Tensor) -> Tensor:
    """Intersection over union of each pair of masks `(N, H, W)`, `(N, N)`; 0 of empty ones."""
    flat = masks.flatten(1).float()
    both = flat @ flat.T
    size = flat.sum(dim=1)
    return both / (size[:, None] + size - both).clamp_min(1)


def _difference(image: Tensor, changed: Tensor) -> _Patch | None:
    """The smallest rectangle that holds every changed pixel; a change that changes nothing keeps one pixel."""
    differs = (image != changed).any(dim=0)
    if not differs.any():
        return _Patch(0, 0, image[:, :1, :1].clone())
    rows, columns = differs.any(dim=1).nonzero()[:, 0], differs.any(dim=0).nonzero()[:, 0]
    top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
    return _Patch(top, left, changed[:, top:bottom, left:right].clone())


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1)[0])

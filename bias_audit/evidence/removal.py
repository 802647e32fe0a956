"""Pictures from which a region was taken, or into which another image's region was put.

Enters: a decoded picture and boolean masks. Leaves: the same picture with some pixels replaced, and, for comparison,
control regions: places of the same size and shape that nobody claims the model should or should not look at.

Removal must add nothing. A patch of noise or of one colour is a new cue with edges of its own; so what is removed is
in-painted from what surrounds it. The other fills are here to show how much they insert.

Everything here runs on the CPU, once for each sample: a region does not change from audit to audit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import cv2
import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage, signal
from torch import Tensor

Mask = npt.NDArray[np.bool_]

# Pixels around a hole that in-painting reads from.
_RADIUS = 3
# Of a control region so much may lie where it should not, where there is no better place.
_MOST_OVERLAP = 0.1


def widened(mask: Mask) -> Mask:
    """The mask and a rim of a hundredth of the shorter side, at least one pixel.

    A rim of hair that stays behind would be smeared over the hole.

    Example:
        >>> widened(np.array([[False, False, True, False]])).tolist()
        [[False, True, True, True]]
    """
    rim = max(1, round(min(mask.shape) / 100)) if mask.any() else 0
    grown: Mask = ndimage.binary_dilation(mask, np.ones((3, 3), dtype=bool), iterations=rim) if rim else mask
    return grown


def inpainted(picture: Tensor, hole: Mask) -> Tensor:
    """The picture `(C, H, W)`, of bytes or floats, with the hole filled from its surroundings.

    Lines of equal brightness that meet the hole go on into it (Bertalmio et al. 2001), as OpenCV does it. A hole
    without surroundings gets the picture's mean.

    Example:
        >>> grey = torch.full((3, 8, 8), 100, dtype=torch.uint8)
        >>> spotted = grey.clone()
        >>> spotted[:, 3:5, 3:5] = 255
        >>> bool((inpainted(spotted, (spotted[0] == 255).numpy()) == grey).all())
        True
    """
    # At the picture's border OpenCV reads pixels of the hole too: what is to be removed has to be gone by then.
    picture = filled_with_mean(picture, hole, 0)
    if hole.all():
        return picture
    flags = hole.astype(np.uint8)
    if picture.dtype == torch.uint8 and len(picture) == 3:
        pixels = np.ascontiguousarray(picture.permute(1, 2, 0).numpy())
        return torch.from_numpy(cv2.inpaint(pixels, flags, _RADIUS, cv2.INPAINT_NS)).permute(2, 0, 1).contiguous()
    # OpenCV takes three channels of bytes together, and anything else one by one, as float32 at most.
    planes = (picture if picture.dtype == torch.uint8 else picture.float()).numpy()
    filled = torch.from_numpy(np.stack([cv2.inpaint(plane, flags, _RADIUS, cv2.INPAINT_NS) for plane in planes]))
    return torch.where(torch.from_numpy(hole), filled.to(picture.dtype), picture)


def filled_with_mean(picture: Tensor, hole: Mask, seed: int) -> Tensor:
    """The picture with the mean colour of what lies outside the hole in it; of the whole where nothing does."""
    where = torch.from_numpy(hole)
    outside = picture[:, ~where] if not hole.all() else picture.flatten(1)
    colour = outside.double().mean(dim=1)
    return torch.where(where, _as_pixels(colour, picture.dtype)[:, None, None], picture)


def filled_with_blur(picture: Tensor, hole: Mask, seed: int) -> Tensor:
    """The picture with a blurred one in the hole; the standard deviation is a 14th of the shorter side."""
    sigma = min(hole.shape) / 14
    blurred = ndimage.gaussian_filter(picture.float().numpy(), (0, sigma, sigma), mode="nearest")
    return torch.where(torch.from_numpy(hole), _as_pixels(torch.from_numpy(blurred), picture.dtype), picture)


def _as_pixels(values: Tensor, dtype: torch.dtype) -> Tensor:
    # Cut off instead of rounded, 99.9999 would be a shade darker than the 100 around it.
    return (values if dtype.is_floating_point else values.round()).to(dtype)


def filled_with_noise(picture: Tensor, hole: Mask, seed: int) -> Tensor:
    """The picture with pixels drawn from all over it in the hole: its colours without its shapes."""
    flat = picture.flatten(1)
    generator = torch.Generator().manual_seed(seed)
    drawn = flat[:, torch.randint(flat.shape[1], (flat.shape[1],), generator=generator)].view_as(picture)
    return torch.where(torch.from_numpy(hole), drawn, picture)


Fill = Callable[[Tensor, Mask, int], Tensor]
FILLS: Mapping[str, Fill] = {"mean": filled_with_mean, "blur": filled_with_blur, "noise": filled_with_noise}


def control_regions(region: Mask, taken: Mask, count: int, seed: int) -> npt.NDArray[np.bool_]:
    """Up to `count` regions of the same size outside `taken` and `region`, `(k, H, W)`: what else could be removed.

    Each is the region itself, or its mirror image, elsewhere in the picture: as large, as wide, as long a border, so
    that in-painting makes it as smooth. They are drawn from all places where at most a tenth of it lies on what is
    taken; the fewer pixels do, the rather. Where it fits nowhere, what is free nearest to a random place is taken, and
    where less is free than it needs there is none: `k` is 0.

    Example:
        >>> region = np.zeros((8, 8), dtype=bool)
        >>> region[:2, :2] = True
        >>> controls = control_regions(region, region, count=3, seed=0)
        >>> controls.sum(axis=(1, 2)).tolist(), bool((controls & region).any())
        ([4, 4, 4], False)
    """
    rng = np.random.default_rng(seed)
    barred = region | taken
    size = int(region.sum())
    none = np.zeros((0, *region.shape), dtype=bool)
    if size == 0 or size > (~barred).sum() * (1 + _MOST_OVERLAP):
        return none
    rows, columns = (np.flatnonzero(region.any(axis=axis)) for axis in (1, 0))
    shape = region[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    mirrored = shape[:, ::-1]
    overlap = np.stack([np.rint(signal.fftconvolve(barred, s[::-1, ::-1], mode="valid")) for s in (shape, mirrored)])
    allowed = overlap <= min(_MOST_OVERLAP * size, max(overlap.min(), 0) + 0.02 * size)
    places = np.argwhere(allowed)
    if len(places) == 0:
        return _blobs(barred, size, count, rng)
    chosen = places[rng.choice(len(places), size=min(count, len(places)), replace=False)]
    found = np.zeros((len(chosen), *region.shape), dtype=bool)
    for control, (flip, top, left) in zip(found, chosen, strict=True):
        control[top : top + shape.shape[0], left : left + shape.shape[1]] = mirrored if flip else shape
    return found


def _blobs(barred: Mask, size: int, count: int, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    """Regions of the free pixels nearest to a random free pixel."""
    free = np.argwhere(~barred)
    if len(free) < size:
        return np.zeros((0, *barred.shape), dtype=bool)
    found = np.zeros((count, *barred.shape), dtype=bool)
    for control in found:
        distance = np.square(free - free[rng.integers(len(free))]).sum(axis=1)
        nearest = free[np.argpartition(distance, size - 1)[:size]]
        control[nearest[:, 0], nearest[:, 1]] = True
    return found


def transplanted(picture: Tensor, region: Mask, donor: Tensor, donor_region: Mask) -> Tensor:
    """The picture with the donor's region, in its place, instead of its own: the rest of its own is in-painted.

    A region that covers more than half of the picture is a ground on which the rest stands. The rest keeps its place
    and its shape: around it comes the donor's ground, in-painted where something stood on it. So Waterbirds was made
    (arXiv 1911.08731), and so backgrounds are exchanged in arXiv 2006.09994.

    Args:
        picture, donor: `(C, H, W)`, of one size.
        region, donor_region: bool `(H, W)`.

    Example:
        >>> ground = np.ones((6, 6), dtype=bool)
        >>> ground[2:4, 2:4] = False
        >>> dark, light = (torch.full((3, 6, 6), shade, dtype=torch.uint8) for shade in (20, 200))
        >>> transplanted(dark, ground, light, np.roll(ground, 1, axis=0))[0, 0].tolist()
        [200, 200, 200, 200, 200, 200]
    """
    if region.mean() > 0.5:
        ground = inpainted(donor, widened(~donor_region)).to(picture.dtype)
        return torch.where(torch.from_numpy(widened(region)), ground, picture)
    cleared = inpainted(picture, widened(region))
    return torch.where(torch.from_numpy(donor_region), donor.to(picture.dtype), cleared)

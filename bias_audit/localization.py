"""Where a heatmap's energy lies, against annotated regions.

Enters: non-negative maps, at their own resolution `(..., B, *grid)` or upsampled `(..., B, *places)`, and region masks
bool `(B, R, *places)`. Places are `(H, W)`, of clips `(T, H, W)`: a region of a clip is a tube. Leading dimensions of
maps, such as one for methods, share the masks. Leaves: `Scored` values `(..., B, R)`, each with whether it is valid.
Every function is pure, batched, on the tensors' device.

Shares need no pixels. Bilinear upsampling is linear, so `sum(upsample(map) * mask) = <map, U_h^T mask U_w>`: each mask
is projected once on to the map's grid (`project_regions`), and a share is one small dot product. Only what asks for
single pixels (the maximum, a threshold, a rank) takes upsampled maps. All of that is read off one histogram: pixels are
counted by their level and by which regions they lie in. What depends on masks alone (`label_pixels`) is kept too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from bias_audit.resize import upsample

# Levels into which a map's range is cut to rank its pixels.
LEVELS = 4096
# On a CPU so many pixels a thread are scored at once: few enough for its cache to hold most of what is computed on the
# way, and enough that threads seldom wait for each other.
_PIXELS_A_THREAD = 1 << 19


class Scored(NamedTuple):
    """Values and whether each is valid, same shape; a value that is not valid is 0 and means nothing."""

    value: Tensor
    valid: Tensor


class PixelScores(NamedTuple):
    """What asks for single pixels, each `(..., B, R)`."""

    pointing_game: Scored
    iou: Scored
    relevance_rank_accuracy: Scored


@dataclass(frozen=True)
class ProjectedRegions:
    """Regions on the grid of a map.

    `weights` `(B, R, *grid)`: the sum of the upsampled map over a region's pixels is the inner product of the map and
    the region's weights. `image` `(*grid)`: the same for the whole image. `area` `(B, R)`: share of the image, 0 to 1.
    """

    weights: Tensor
    image: Tensor
    area: Tensor


@dataclass(frozen=True)
class PixelRegions:
    """Regions, one small number a pixel: each image is cut into parts, whose pixels all lie in the same regions.

    `part` uint8 `(B, *places)`, int32 where an image has more than 256 parts. `members` bool `(B, P, R)`: whether a
    part lies in a region; `reached` likewise: whether it lies within the pointing game's tolerance of it. `pixels`
    int32 `(B, R)`: how many a region has.
    """

    part: Tensor
    members: Tensor
    reached: Tensor
    pixels: Tensor


def with_remainder(masks: Tensor) -> Tensor:
    """The masks `(B, R, *places)` and, as one more region, what none of them covers: `(B, R + 1, *places)`.

    Example:
        >>> with_remainder(torch.tensor([[[[True, False]]]])).tolist()
        [[[[True, False]], [[False, True]]]]
    """
    return torch.cat([masks, ~masks.any(dim=1, keepdim=True)], dim=1)


def project_regions(masks: Tensor, size: Sequence[int]) -> ProjectedRegions:
    """Masks `(B, R, *places)` on the grid `size` of a map: `U_h^T mask U_w`, with `U` the upsampling of an axis.

    Example:
        >>> masks = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
        >>> masks[..., :2] = True
        >>> project_regions(masks, (2, 2)).weights[0, 0]
        tensor([[3.5000, 0.5000],
                [3.5000, 0.5000]])
    """
    weights, image = _projected(masks, size), _projected(torch.ones_like(masks[:1, :1]), size)[0, 0]
    return ProjectedRegions(weights, image, masks.flatten(2).float().mean(dim=2))


def _projected(masks: Tensor, size: Sequence[int]) -> Tensor:
    # Products of float32 matrices may be rounded to bfloat16 (`torch.set_float32_matmul_precision`), of float64 not.
    # Apple's GPUs know neither.
    precise = torch.float32 if masks.device.type == "mps" else torch.float64
    weights = masks.to(precise)
    for coarse, fine in zip(reversed(size), reversed(masks.shape[2:]), strict=True):
        line = _upsampling(coarse, fine, masks.device).to(precise)
        weights = (weights @ line).movedim(-1, 2)
    return weights.float()


def _upsampling(coarse: int, fine: int, device: torch.device) -> Tensor:
    """The matrix `(fine, coarse)` that upsamples a line linearly, `align_corners=False`."""
    identity = torch.eye(coarse, device=device)[:, None]
    return nn.functional.interpolate(identity, size=fine, mode="linear", align_corners=False)[:, 0].T


def energy_share(maps: Tensor, regions: ProjectedRegions) -> Scored:
    """The share of each map's energy that lies in each region, `(..., B, R)`, 0 to 1.

    `maps` `(..., B, *grid)` are non-negative, at any scale. Not valid where the map is silent (all zero) or the region
    empty. It is the energy-based pointing game of Score-CAM (arXiv 1910.01279), for every region.

    Example:
        >>> regions = project_regions(with_remainder(torch.tensor([[[[True, False]]]])), (1, 2))
        >>> energy_share(torch.tensor([[[3.0, 1.0]]]), regions).value
        tensor([[0.7500, 0.2500]])
    """
    flat = maps.flatten(-regions.image.ndim)[..., None, :]
    # Scaled first: a map of gradients may be so small that its products underflow.
    peak = flat.amax(dim=-1, keepdim=True)
    scaled = flat / torch.where(peak > 0, peak, 1)
    # No matrix product, which may be rounded to bfloat16.
    energy = (scaled * regions.weights.flatten(2)).sum(dim=-1)
    total = (scaled * regions.image.flatten()).sum(dim=-1)
    valid = (total > 0) & (regions.area > 0)
    return Scored(torch.where(valid, energy / torch.where(total > 0, total, 1), 0), valid)


def enrichment(share: Scored, area: Tensor) -> Scored:
    """Energy share over share of area, `(..., B, R)`, 0 to `1 / area`: 1 is what a map that ignores the region gives.

    `share` is of `energy_share`, `area` `(B, R)` of the same regions. Not valid where the share is not.

    Example:
        >>> share = Scored(torch.tensor([[0.5]]), torch.tensor([[True]]))
        >>> enrichment(share, torch.tensor([[0.25]])).value
        tensor([[2.]])
    """
    return Scored(torch.where(share.valid, share.value / torch.where(area > 0, area, 1), 0), share.valid)


def pointing_game(maps: Tensor, masks: Tensor, tolerance: int = 0) -> Scored:
    """Whether each map's maximum lies in each region, `(..., B, R)`, 0 to 1; pixels that tie for it share the hit.

    `maps` `(..., B, *places)` are upsampled, `masks` bool `(B, R, *places)`. A maximum within `tolerance` pixels
    (Euclidean, of clips in the same frame) of the region hits it; the original takes 15 (arXiv 1608.00507). Not valid
    where the map is silent or the region empty.

    Example:
        >>> masks = torch.tensor([[[[True, False, False]]]])
        >>> pointing_game(torch.tensor([[[1.0, 1.0, 0.0]]]), masks).value
        tensor([[0.5000]])
    """
    return score_pixels(maps, label_pixels(masks, tolerance), threshold=0.0).pointing_game


def iou(maps: Tensor, masks: Tensor, threshold: float) -> Scored:
    """Intersection over union of each region and the map cut at `threshold` times its maximum, `(..., B, R)`, 0 to 1.

    `maps` `(..., B, *places)` are upsampled, `masks` bool `(B, R, *places)`; the Grad-CAM paper cuts at 0.15 (arXiv
    1610.02391, section 4.1). Not valid where the map is silent or the region empty.

    Example:
        >>> iou(torch.tensor([[[1.0, 0.6, 0.1]]]), torch.tensor([[[[True, False, False]]]]), threshold=0.5).value
        tensor([[0.5000]])
    """
    return score_pixels(maps, label_pixels(masks), threshold).iou


def relevance_rank_accuracy(maps: Tensor, masks: Tensor) -> Scored:
    """Of the K largest pixels, K the region's size, the share that lies in the region, `(..., B, R)`, 0 to 1.

    `maps` `(..., B, *places)` are upsampled, `masks` bool `(B, R, *places)`; arXiv 2003.07258. Pixels that
    tie at the K-th place share what places are left. So do those that share a level with it: the map's range is cut
    into `LEVELS`, and if n pixels have the K-th one's level, this is at most `n / 4K` off. Not valid where the map is
    silent or the region empty.

    Example:
        >>> maps = torch.tensor([[[3.0, 2.0, 1.0, 0.0]]])
        >>> relevance_rank_accuracy(maps, torch.tensor([[[[True, False, True, False]]]])).value
        tensor([[0.5000]])
    """
    return score_pixels(maps, label_pixels(masks), threshold=0.0).relevance_rank_accuracy


def label_pixels(masks: Tensor, tolerance: int = 0) -> PixelRegions:
    """Masks bool `(B, R, *places)` as parts, for metrics with this tolerance of the pointing game.

    The number of parts depends on the masks: the host waits for the device, once for each region.

    Example:
        >>> regions = label_pixels(torch.tensor([[[[True, True, False]], [[False, True, False]]]]))
        >>> regions.part
        tensor([[[1, 2, 0]]], dtype=torch.uint8)
        >>> regions.members.tolist()
        [[[False, False], [True, False], [True, True]]]
    """
    count = masks.shape[1]
    kinds = torch.cat([masks, _dilated(masks, tolerance)], dim=1) if tolerance else masks
    part = torch.zeros_like(masks[:, 0], dtype=torch.int64).flatten(1)
    parts = 1
    for region in kinds.flatten(2).unbind(dim=1):
        # Each part splits in two; numbers that no pixel has are closed up.
        halves = 2 * part + region
        present = torch.zeros(len(part), 2 * parts, dtype=torch.int64, device=part.device).scatter_(1, halves, 1)
        part = (present.cumsum(dim=1) - 1).gather(1, halves)
        parts = int(present.sum(dim=1).max())
    of_pixels = kinds.flatten(2).transpose(1, 2)
    members = of_pixels.new_zeros(len(part), parts, kinds.shape[1])
    members.scatter_(1, part[:, :, None].expand_as(of_pixels), of_pixels)
    narrow = part.to(torch.uint8 if parts <= 256 else torch.int32).view(masks[:, 0].shape)
    pixels = masks.flatten(2).sum(dim=2, dtype=torch.int32)
    return PixelRegions(narrow, members[:, :, :count], members[:, :, -count:], pixels)


def _dilated(masks: Tensor, radius: int) -> Tensor:
    """Every pixel within `radius` of a mask's pixel in its frame: a disc as the union of its rows."""
    frames = masks.flatten(1, -3)
    padded = nn.functional.pad(frames.float(), (0, 0, radius, radius))
    height = frames.shape[2]
    reached = torch.zeros_like(frames)
    for dy in range(-radius, radius + 1):
        half = int((radius**2 - dy**2) ** 0.5)
        row = padded[:, :, radius + dy : radius + dy + height]
        reached |= nn.functional.max_pool2d(row, (1, 2 * half + 1), stride=1, padding=(0, half)) > 0
    return reached.view(masks.shape)


def score_maps(maps: Tensor, regions: PixelRegions, threshold: float) -> PixelScores:
    """`score_pixels` of maps `(..., B, *grid)` upsampled to the masks' size, linearly and without aligned corners.

    Example:
        >>> regions = label_pixels(torch.tensor([[[[True, False, False, False]]]]))
        >>> score_maps(torch.tensor([[[1.0, 0.0]]]), regions, threshold=0.5).iou.value
        tensor([[0.5000]])
    """
    size = regions.part.shape[1:]
    batch = maps.ndim - 1 - len(size)
    at_once = maps.shape[batch]
    if maps.device.type == "cpu":
        pixels = _PIXELS_A_THREAD * torch.get_num_threads()
        at_once = max(1, pixels // (size.numel() * maps.shape[:batch].numel()))
    pieces = [
        _count(upsample(some, size), part, regions.members.shape[1], threshold)
        for some, part in zip(torch.split(maps, at_once, batch), torch.split(regions.part, at_once), strict=True)
    ]
    joined: _Counts = tree_map(lambda *tensors: torch.cat(tensors, dim=batch), *pieces)
    return _scores(joined, regions)


def score_pixels(maps: Tensor, regions: PixelRegions, threshold: float) -> PixelScores:
    """`pointing_game`, `iou` at `threshold` and `relevance_rank_accuracy` of upsampled maps `(..., B, *places)`.

    Each is `(..., B, R)`; see there. Masks are labelled once by `label_pixels`, for any number of maps.

    Example:
        >>> regions = label_pixels(torch.tensor([[[[True, False, False]]]]))
        >>> score_pixels(torch.tensor([[[1.0, 0.6, 0.1]]]), regions, threshold=0.5).pointing_game.value
        tensor([[1.]])
    """
    return _scores(_count(maps, regions.part, regions.members.shape[1], threshold), regions)


class _Counts(NamedTuple):
    """Pixels counted by part and level: int32 `(..., B, P, 1 + LEVELS)`.

    Levels count from 1, where the maximum is alone, downwards; `last_hot` int64 `(..., B, 1)` is the last of those
    above the threshold, and `loud` `(..., B, 1)` tells whether there is anything to rank.
    """

    counts: Tensor
    last_hot: Tensor
    loud: Tensor


def _count(maps: Tensor, part: Tensor, parts: int, threshold: float) -> _Counts:
    flat = maps.flatten(1 - part.ndim)
    peak = flat.amax(dim=-1, keepdim=True)
    span = peak - flat.amin(dim=-1, keepdim=True)
    cut = threshold * peak
    unit = torch.where(span > 0, span, 1)
    # `floor` of the distance from the threshold keeps apart what lies above it and what does not, and `sign` the
    # maximum from all else, however close.
    top = ((cut - peak) / unit * (LEVELS - 3)).floor()
    level = (cut - flat).div_(unit).mul_(LEVELS - 3).floor_().sub_((flat - peak).sign_()).sub_(top - 1)
    # Clamped as integers: what is not finite gets some level too.
    place = level.int().clamp_(1, LEVELS).add_(part.flatten(1).int() * (1 + LEVELS)).long()
    counts = torch.zeros(*place.shape[:-1], parts * (1 + LEVELS), dtype=torch.int32, device=flat.device)
    counts.scatter_add_(-1, place, counts.new_ones(()).expand_as(place))
    return _Counts(
        counts.view(*place.shape[:-1], parts, 1 + LEVELS),
        (1 - top).long().clamp_(1, LEVELS),
        (peak > 0) & span.isfinite(),
    )


def _scores(counted: _Counts, regions: PixelRegions) -> PixelScores:
    upto = counted.counts.cumsum(dim=-1, dtype=torch.int32)
    *leading, parts, _ = upto.shape

    maxima = upto[..., 1, None]
    pointing = (maxima * regions.reached).sum(dim=-2) / maxima.sum(dim=-2)

    hot = upto.gather(-1, counted.last_hot[..., None].expand(*leading, parts, 1))
    both = (hot * regions.members).sum(dim=-2)
    overlap = both / (hot.sum(dim=-2) + regions.pixels - both).clamp_min(1)

    # The K-th largest pixel's level: what lies above it counts whole, of its own what places are left.
    everywhere = upto.sum(dim=-2, dtype=torch.int32)
    kth = torch.searchsorted(everywhere, regions.pixels.expand(*leading, -1).contiguous()).clamp_min(1)
    ends = torch.cat([kth - 1, kth], dim=-1)
    around = upto.gather(-1, ends[..., None, :].expand(*leading, parts, -1))
    above, down_to = (around * regions.members.repeat(1, 1, 2)).sum(dim=-2).chunk(2, dim=-1)
    above_everywhere, down_to_everywhere = everywhere.gather(-1, ends).chunk(2, dim=-1)
    share = (down_to - above) / (down_to_everywhere - above_everywhere)
    hits = above + (regions.pixels - above_everywhere) * share

    valid = counted.loud & (regions.pixels > 0)
    values = (pointing, overlap, hits / regions.pixels.clamp_min(1))
    return PixelScores(*(Scored(torch.where(valid, value, 0), valid) for value in values))

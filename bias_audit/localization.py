"""Where a heatmap's energy lies, against annotated regions.

Enters: non-negative maps, at their own resolution `(B, h, w)` or upsampled `(B, H, W)`, and region masks bool
`(B, R, H, W)`. Leaves: `Scored` values `(B, R)`, each with whether it is valid. Every function is pure, batched, on the
tensors' device.

Shares need no pixels. Bilinear upsampling is linear, so `sum(upsample(map) * mask) = <map, U_h^T mask U_w>`: each mask
is projected once on to the map's grid, and a share is one small dot product. Only what asks for single pixels (the
maximum, a threshold, a rank) takes upsampled maps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Scored(NamedTuple):
    """Values and whether each is valid, same shape; a value that is not valid is 0 and means nothing."""

    value: Tensor
    valid: Tensor


@dataclass(frozen=True)
class ProjectedRegions:
    """Regions on the grid of a map.

    `weights` `(B, R, h, w)`: the sum of the upsampled map over a region's pixels is the inner product of the map and
    the region's weights. `image` `(h, w)`: the same for the whole image. `area` `(B, R)`: share of the image, 0 to 1.
    """

    weights: Tensor
    image: Tensor
    area: Tensor


def with_remainder(masks: Tensor) -> Tensor:
    """The masks `(B, R, H, W)` and, as one more region, what none of them covers: `(B, R + 1, H, W)`.

    Example:
        >>> with_remainder(torch.tensor([[[[True, False]]]])).tolist()
        [[[[True, False]], [[False, True]]]]
    """
    return torch.cat([masks, ~masks.any(dim=1, keepdim=True)], dim=1)


def project_regions(masks: Tensor, size: tuple[int, int]) -> ProjectedRegions:
    """Masks `(B, R, H, W)` on the grid `size` = `(h, w)` of a map: `U_h^T mask U_w`, with `U` the upsampling.

    Example:
        >>> masks = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
        >>> masks[..., :2] = True
        >>> project_regions(masks, (2, 2)).weights[0, 0]
        tensor([[3.5000, 0.5000],
                [3.5000, 0.5000]])
    """
    rows = _upsampling(size[0], masks.shape[2], masks.device)
    columns = _upsampling(size[1], masks.shape[3], masks.device)
    weights = torch.einsum("Hh,brHW,Ww->brhw", rows, masks.float(), columns)
    return ProjectedRegions(weights, torch.outer(rows.sum(0), columns.sum(0)), masks.float().mean(dim=(2, 3)))


def _upsampling(coarse: int, fine: int, device: torch.device) -> Tensor:
    """The matrix `(fine, coarse)` that upsamples a line bilinearly, `align_corners=False`."""
    identity = torch.eye(coarse, device=device)[:, None]
    return nn.functional.interpolate(identity, size=fine, mode="linear", align_corners=False)[:, 0].T


def energy_share(maps: Tensor, regions: ProjectedRegions) -> Scored:
    """The share of each map's energy that lies in each region, `(B, R)`, 0 to 1.

    `maps` `(B, h, w)` are non-negative, at any scale. Not valid where the map is silent (all zero) or the region empty.
    It is the energy-based pointing game of Score-CAM (arXiv 1910.01279, section 4.3), for every region.

    Example:
        >>> regions = project_regions(with_remainder(torch.tensor([[[[True, False]]]])), (1, 2))
        >>> energy_share(torch.tensor([[[3.0, 1.0]]]), regions).value
        tensor([[0.7500, 0.2500]])
    """
    # Scaled first: a map of gradients may be so small that its products underflow.
    peak = maps.amax(dim=(1, 2), keepdim=True)
    scaled = maps / torch.where(peak > 0, peak, 1)
    energy = torch.einsum("bhw,brhw->br", scaled, regions.weights)
    total = torch.einsum("bhw,hw->b", scaled, regions.image)[:, None]
    valid = (total > 0) & (regions.area > 0)
    return Scored(torch.where(valid, energy / torch.where(total > 0, total, 1), 0), valid)


def enrichment(share: Scored, area: Tensor) -> Scored:
    """Energy share over the share of area, `(B, R)`, 0 to `1 / area`: 1 is what a map that ignores the region gives.

    `share` is of `energy_share`, `area` `(B, R)` of the same regions. Not valid where the share is not.

    Example:
        >>> share = Scored(torch.tensor([[0.5]]), torch.tensor([[True]]))
        >>> enrichment(share, torch.tensor([[0.25]])).value
        tensor([[2.]])
    """
    return Scored(torch.where(share.valid, share.value / torch.where(area > 0, area, 1), 0), share.valid)


def pointing_game(maps: Tensor, masks: Tensor, tolerance: int = 0) -> Scored:
    """Whether each map's maximum lies in each region, `(B, R)`, 0 to 1; pixels that tie for the maximum share the hit.

    `maps` `(B, H, W)` are upsampled, `masks` bool `(B, R, H, W)`. A maximum within `tolerance` pixels (Euclidean) of
    the region hits it; the original takes 15 (arXiv 1608.00507, section 4.2). Not valid where the map is silent or the
    region empty.

    Example:
        >>> masks = torch.tensor([[[[True, False, False]]]])
        >>> pointing_game(torch.tensor([[[1.0, 1.0, 0.0]]]), masks).value
        tensor([[0.5000]])
    """
    peak = maps.amax(dim=(1, 2), keepdim=True)
    at_peak = (maps == peak).float()
    hits = torch.einsum("bhw,brhw->br", at_peak, _dilated(masks, tolerance).float())
    valid = (peak[:, :, 0] > 0) & peak[:, :, 0].isfinite() & masks.flatten(2).any(dim=2)
    return Scored(torch.where(valid, hits / at_peak.sum(dim=(1, 2))[:, None], 0), valid)


def _dilated(masks: Tensor, radius: int) -> Tensor:
    """Every pixel within `radius` of a mask's pixel: a disc as the union of its rows."""
    if radius == 0:
        return masks
    padded = nn.functional.pad(masks.float(), (0, 0, radius, radius))
    height = masks.shape[2]
    reached = torch.zeros_like(masks)
    for dy in range(-radius, radius + 1):
        half = int((radius**2 - dy**2) ** 0.5)
        row = padded[:, :, radius + dy : radius + dy + height]
        reached |= nn.functional.max_pool2d(row, (1, 2 * half + 1), stride=1, padding=(0, half)) > 0
    return reached


def iou(maps: Tensor, masks: Tensor, threshold: float) -> Scored:
    """Intersection over union of each region and the map cut at `threshold` times its maximum, `(B, R)`, 0 to 1.

    `maps` `(B, H, W)` are upsampled, `masks` bool `(B, R, H, W)`; the Grad-CAM paper cuts at 0.15 (arXiv 1610.02391,
    section 4.1). Not valid where the map is silent or the region empty.

    Example:
        >>> iou(torch.tensor([[[1.0, 0.6, 0.1]]]), torch.tensor([[[[True, False, False]]]]), threshold=0.5).value
        tensor([[0.5000]])
    """
    peak = maps.amax(dim=(1, 2), keepdim=True)
    hot = (maps > threshold * peak).float()
    inside = masks.float()
    both = torch.einsum("bhw,brhw->br", hot, inside)
    either = hot.sum(dim=(1, 2))[:, None] + inside.sum(dim=(2, 3)) - both
    valid = (peak[:, :, 0] > 0) & peak[:, :, 0].isfinite() & masks.flatten(2).any(dim=2)
    return Scored(torch.where(valid, both / torch.where(either > 0, either, 1), 0), valid)


def relevance_rank_accuracy(maps: Tensor, masks: Tensor) -> Scored:
    """Of the K largest pixels, K the region's size, the share that lies in the region, `(B, R)`, 0 to 1.

    `maps` `(B, H, W)` are upsampled, `masks` bool `(B, R, H, W)`; arXiv 2003.07258, section 3.2. Pixels that tie at the
    K-th place share what places are left. Not valid where the map is silent or the region empty.

    Example:
        >>> maps = torch.tensor([[[3.0, 2.0, 1.0, 0.0]]])
        >>> relevance_rank_accuracy(maps, torch.tensor([[[[True, False, True, False]]]])).value
        tensor([[0.5000]])
    """
    ranked, order = maps.flatten(1).sort(dim=1, descending=True)
    inside = masks.flatten(2).gather(2, order[:, None].expand(-1, masks.shape[1], -1))
    # found[..., n]: how many of the n largest pixels lie inside.
    found = nn.functional.pad(inside.cumsum(dim=2, dtype=torch.float32), (1, 0))
    size = found[:, :, -1].long()
    kth = ranked.gather(1, (size - 1).clamp_min(0))
    # The pixels that tie with the K-th are those ranked from `first` up to `last`.
    first, last = torch.searchsorted(-ranked, -kth), torch.searchsorted(-ranked, -kth, right=True)
    above = found.gather(2, first[:, :, None])[:, :, 0]
    tied = found.gather(2, last[:, :, None])[:, :, 0] - above
    hits = above + (size - first) * tied / (last - first)
    valid = (ranked[:, :1] > 0) & ranked[:, :1].isfinite() & (size > 0)
    return Scored(torch.where(valid, hits / size.clamp_min(1), 0), valid)

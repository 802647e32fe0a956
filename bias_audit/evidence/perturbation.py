"""What a score does while parts of an image are removed: occlusion, insertion and deletion.

Enters: images, their blurred copies, and a function that scores images. Leaves: the score's falls per cell of a grid,
and areas under curves. All is batched, on the images' device.

Parts are removed by blurring them. A patch of one colour has edges, which are a cue of their own; a blurred one keeps
its colour and loses its content.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

# Cells of the occlusion map on a side, steps from the blurred image to the whole one.
GRID, STEPS = 7, 8

# Scores of perturbed images `(n,)`, given which image each was `(n,)`.
Score = Callable[[Tensor, Tensor], Tensor]


def generator_of(seed: int, device: torch.device) -> torch.Generator:
    """A generator on the device, started from the seed."""
    return torch.Generator(device).manual_seed(seed)


def ranking(values: Tensor, seed: int) -> Tensor:
    """The place of each value in descending order, `(..., P)` int32 from 0; ties fall in random order."""
    places = values.shape[-1]
    shuffled = torch.randperm(places, generator=generator_of(seed, values.device), device=values.device)
    order = shuffled[values[..., shuffled].argsort(dim=-1, descending=True, stable=True)]
    ascending = torch.arange(places, dtype=torch.int32, device=values.device).expand(values.shape)
    return torch.empty_like(ascending.contiguous()).scatter_(-1, order, ascending)


def blurred(images: Tensor) -> Tensor:
    """Images `(..., H, W)` blurred by a Gaussian whose standard deviation is a 14th of the shorter side.

    Half a cell of the occlusion grid: what is smaller than a cell is gone. At the edge the kernel ends.
    """
    height, width = images.shape[-2:]
    sigma = min(height, width) / (2 * GRID)
    rows, columns = (_gaussian(n, sigma, images.device) for n in (height, width))
    return torch.einsum("Hh,...hw,Ww->...HW", rows, images.float(), columns).to(images.dtype)


def _gaussian(length: int, sigma: float, device: torch.device) -> Tensor:
    places = torch.arange(length, device=device)
    weights = torch.exp(-((places[:, None] - places) / sigma).square() / 2)
    return weights / weights.sum(dim=1, keepdim=True)


def grid_of(size: tuple[int, int]) -> tuple[int, int]:
    """Cells of the occlusion map for images of this size: no more than there are pixels."""
    return min(GRID, size[0]), min(GRID, size[1])


def _cell_of_each(length: int, cells: int, device: torch.device) -> Tensor:
    return torch.arange(length, device=device) * cells // length


def cell_means(pixels: Tensor, grid: tuple[int, int]) -> Tensor:
    """The mean of `(..., H, W)` over each cell of the grid, `(..., rows, columns)`."""
    averages = []
    for length, cells in zip(pixels.shape[-2:], grid, strict=True):
        members = nn.functional.one_hot(_cell_of_each(length, cells, pixels.device), cells).float()
        averages.append(members / members.sum(dim=0))
    return torch.einsum("...hw,hr,wc->...rc", pixels, averages[0], averages[1])


def _scores_where(
    score: Score,
    images: Tensor,
    fill: Tensor,
    variants: int,
    keep: Callable[[Tensor, Tensor], Tensor],
    batch_size: int,
) -> Tensor:
    """The scores `(B, variants)` of images of which only `keep(image, variant)`, bool `(n, H, W)`, is not filled."""
    count, found = len(images) * variants, []
    same_in_all = [1] * (images.ndim - 3)
    for start in range(0, count, batch_size):
        pair = torch.arange(start, min(start + batch_size, count), device=images.device)
        of, variant = pair // variants, pair % variants
        kept = keep(of, variant)
        kept = kept.view(len(pair), *same_in_all, *kept.shape[1:])
        found.append(score(torch.where(kept, images[of], fill[of]), of))
    return torch.cat(found).view(len(images), variants)


def occlusion_maps(score: Score, images: Tensor, fill: Tensor, batch_size: int) -> Tensor:
    """How far the score falls when a cell of the image is filled, `(B, rows, columns)`."""
    height, width = images.shape[-2:]
    rows, columns = grid_of((height, width))
    row = _cell_of_each(height, rows, images.device)
    column = _cell_of_each(width, columns, images.device)
    cell = row[:, None] * columns + column
    # The last variant fills no cell: it is the image itself.
    scores = _scores_where(
        score, images, fill, rows * columns + 1, lambda _, variant: cell != variant[:, None, None], batch_size
    )
    return (scores[:, -1:] - scores[:, :-1]).view(-1, rows, columns)


def insertion_auc(probability: Score, images: Tensor, fill: Tensor, ranks: Tensor, batch_size: int) -> Tensor:
    """The area under the probability while pixels are put into the fill in the order of their ranks, `(K, B)`, 0 to 1.

    `ranks` `(K, B, H, W)` from 0 to `HW - 1`, K orders for each image. By the trapezoid rule over 8 equal steps.
    """
    orders, inner = len(ranks), STEPS - 1
    pixels = images.shape[-2] * images.shape[-1]

    def keep(of: Tensor, variant: Tensor) -> Tensor:
        order = (variant // inner).clamp(max=orders - 1)
        # After the orders' own steps come, once for all of them, the fill and the whole image.
        step = torch.where(variant < orders * inner, variant % inner + 1, (variant - orders * inner) * STEPS)
        return ranks[order, of] * STEPS < (step * pixels)[:, None, None]

    scores = _scores_where(probability, images, fill, orders * inner + 2, keep, batch_size)
    between = scores[:, :-2].reshape(-1, orders, inner).transpose(0, 1)
    ends = scores[:, -2:].expand(orders, -1, -1)
    curve = torch.cat([ends[..., :1], between, ends[..., 1:]], dim=2)
    return torch.trapezoid(curve, dx=1 / STEPS, dim=2)

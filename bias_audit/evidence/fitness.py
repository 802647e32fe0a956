"""Evidence about the evidence: whether an explanation method's maps say anything of this model.

Enters: a borrowed model, images, and the functions that explain and score them. Leaves: per method and image how well
the map agrees with what the model does when parts of the image are removed, and how much of the map remains when the
weights are drawn anew; and the `Estimate`s of these, which have a method and no region.

What is removed and how, `perturbation` says. Of a clip the same part of every frame is removed, and its map is averaged
over time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from bias_audit.attribution.cam import Sign
from bias_audit.attribution.redrawn import drawable, redrawn_weights
from bias_audit.evidence.perturbation import (
    blurred,
    cell_means,
    generator_of,
    grid_of,
    insertion_auc,
    occlusion_maps,
    ranking,
)
from bias_audit.localization import Scored
from bias_audit.resize import upsample
from bias_audit.stats import bootstrap_ratios
from bias_audit.terms import EXPLAINER_METRICS, Estimate

# Draws of the weights per image.
DRAWS = 4

Outputs = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Explained:
    """What is measured of a model: its maps, and the numbers that the maps are to explain.

    `maps(images, classes)` are `(M, B, *places)`, by each method; `outputs(images)` logits `(B, classes)`, float32;
    `score(outputs, classes)` the explained scores `(B,)`. `sign` says what the maps show.
    """

    methods: tuple[str, ...]
    maps: Callable[[Tensor, Tensor], Tensor]
    outputs: Outputs
    score: Callable[[Tensor, Tensor], Tensor]
    sign: Sign


def fitness(
    model: nn.Module, explained: Explained, images: Tensor, classes: Tensor, seeds: Sequence[int], batch_size: int
) -> Tensor:
    """Each of `EXPLAINER_METRICS`, by each method, of each image: `(6, M, B)`, NaN where it is not valid.

    `occlusion_correlation` (-1 to 1) is Spearman's rank correlation of a map, averaged over the cells of a 7 x 7 grid,
    with how far the explained score falls when a cell is blurred: the measure of faithfulness in arXiv 1610.02391,
    section 5.3. Of maps that speak against the score it is the rise, of absolute maps the change.

    `insertion_auc` and `deletion_auc` (0 to 1) are the areas under the probability of the class while the pixels are
    uncovered, or blurred, from the map's highest to its lowest: arXiv 1806.07421, in 8 steps. The `_gain`s are what is
    won over a map of random numbers on the same grid: positive is better than chance for both. Of maps that speak
    against the score the probability is that of the other classes.

    `randomisation_similarity` (-1 to 1) is Spearman's rank correlation of a map with the map of the same image after
    every weight was drawn anew, the mean of four draws of the image's own: after the model parameter randomization test
    of arXiv 1810.03292. The sign of the correlation counts. Draws that leave the map silent are left out: where an
    explainer shows nothing for one half of all weights and the same for the other half, what it shows does not depend
    on them.

    It costs 50 forwards an image for occlusion, `14 (M + 1) + 2` for insertion and deletion, and 5 for the maps.

    Args:
        model: a borrowed one (see `borrowed`); its weights are bit for bit the same on leaving.
        images: `(B, C, H, W)` or clips `(B, C, T, H, W)`, as the model takes them.
        classes: int64 `(B,)`, the classes that are explained.
        seeds: one for each image, of its random map and its random weights.
        batch_size: images per forward pass.
    """
    maps = explained.maps(images, classes)
    flat = maps.flatten(2)
    loud = flat.isfinite().all(dim=2) & (flat.amax(dim=2) > flat.amin(dim=2))
    fill = blurred(images)
    size = (images.shape[-2], images.shape[-1])
    planes = (maps.mean(dim=2) if maps.ndim == 5 else maps).nan_to_num()
    # An image's random numbers are its own: they do not depend on the images beside it.
    grid, device = planes.shape[2:], maps.device
    chance = torch.stack([torch.rand(grid, generator=generator_of(seed, device), device=device) for seed in seeds])
    pixels = upsample(torch.cat([planes, chance[None]]), size)

    def score(perturbed: Tensor, of: Tensor) -> Tensor:
        return explained.score(explained.outputs(perturbed), classes[of]).float()

    def probability(perturbed: Tensor, of: Tensor) -> Tensor:
        p = class_probability(explained.outputs(perturbed), classes[of])
        return 1 - p if explained.sign == "negative" else p

    drop = occlusion_maps(score, images, fill, batch_size)
    drop = {"negative": drop.neg(), "absolute": drop.abs()}.get(explained.sign, drop)
    occlusion = spearman(cell_means(pixels[:-1], grid_of(size)).flatten(2), drop.flatten(1))
    ranks = ranking(pixels.flatten(2), seed=0)
    # With one image to start from and one to end at, deletion is insertion in the reverse order.
    both = torch.cat([ranks, ranks.shape[2] - 1 - ranks]).view(-1, len(images), *size)
    insertion, deletion = insertion_auc(probability, images, fill, both, batch_size).chunk(2)
    similarity = _randomisation_similarity(model, explained, images, classes, maps, seeds)
    values = (
        torch.where(occlusion.valid, occlusion.value, torch.nan),
        insertion[:-1],
        insertion[:-1] - insertion[-1],
        deletion[:-1],
        deletion[-1] - deletion[:-1],
        similarity,
    )
    return torch.where(loud, torch.stack(values), torch.nan)


def spearman(one: Tensor, two: Tensor) -> Scored:
    """Spearman's rank correlation along the last dimension, -1 to 1; ties get the mean of their ranks.

    `one` and `two` `(..., P)`. Not valid where either is constant or has a value that is not finite.

    Example:
        >>> spearman(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[10.0, 30.0, 20.0]])).value
        tensor([0.5000])
    """
    finite = one.isfinite().all(dim=-1) & two.isfinite().all(dim=-1)
    first, second = _centred_ranks(one), _centred_ranks(two)
    scale = (first.square().sum(dim=-1) * second.square().sum(dim=-1)).sqrt()
    valid = finite & (scale > 0)
    value = (first * second).sum(dim=-1) / torch.where(valid, scale, 1)
    return Scored(torch.where(valid, value, 0), valid)


def _centred_ranks(values: Tensor) -> Tensor:
    ordered = values.contiguous().sort(dim=-1).values
    below = torch.searchsorted(ordered, values.contiguous(), right=False)
    up_to = torch.searchsorted(ordered, values.contiguous(), right=True)
    # Twice the mean rank of a tie, less twice that of all: whole numbers, so that a constant gives zeros.
    return (below + up_to - values.shape[-1]).float()


def class_probability(outputs: Tensor, classes: Tensor) -> Tensor:
    """The softmax probability of each image's class, `(B,)`; of a head with one logit, the sigmoid's."""
    if outputs.shape[1] == 1:
        return (outputs[:, 0] * (2 * classes - 1)).sigmoid()
    return outputs.softmax(dim=1).gather(1, classes[:, None])[:, 0]


def _randomisation_similarity(
    model: nn.Module, explained: Explained, images: Tensor, classes: Tensor, maps: Tensor, seeds: Sequence[int]
) -> Tensor:
    """`(M, B)`, NaN where no draw gives a map."""
    if not any(drawable(p) for p in model.parameters()):
        return torch.full_like(maps[..., 0, 0], torch.nan)
    found = []
    with redrawn_weights(model) as redraw:
        for i, seed in enumerate(seeds):
            # Maps of one draw are alike in the same way: images would not be independent if they shared it.
            for k in range(DRAWS):
                redraw(DRAWS * seed + k)
                found.append(explained.maps(images[i : i + 1], classes[i : i + 1]))
    drawn = torch.cat(found, dim=1).view(len(maps), len(images), DRAWS, -1)
    alike = spearman(drawn, maps[:, :, None].flatten(3).expand_as(drawn))
    return torch.where(alike.valid, alike.value, torch.nan).nanmean(dim=2)


def fitness_estimates(values: npt.NDArray[np.float32], methods: Sequence[str], seed: int) -> tuple[Estimate, ...]:
    """The mean over images of each of `EXPLAINER_METRICS` by each method; `values` `(6, M, N)`, NaN where not valid."""
    columns = values.reshape(-1, values.shape[2]).T.astype(np.float64)
    valid = np.isfinite(columns)
    mean, low, high = bootstrap_ratios(np.where(valid, columns, 0), valid, np.zeros(len(columns)), seed=seed)
    names = ((metric, method) for metric in EXPLAINER_METRICS for method in methods)
    found = []
    for i, (metric, method) in enumerate(names):
        n = int(valid[:, i].sum())
        value = float(mean[i]) if n else None
        lower, upper = (float(low[i]), float(high[i])) if n > 1 else (None, None)
        reason = "" if n > 1 else "one image gives no interval"
        if n == 0:
            random = ", with random weights too" if metric == "randomisation_similarity" else ""
            reason = f"no image with finite outputs and a heatmap that is not silent{random}"
        found.append(Estimate(metric, value, lower, upper, n, method=method, reason=reason))
    return tuple(found)

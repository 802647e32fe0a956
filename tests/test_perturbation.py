"""What is removed of an image and how, and what a score does then, against other packages and loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from captum.attr import Occlusion
from fitness_nets import SIZE, area, random
from scipy.ndimage import gaussian_filter
from torch import Tensor

from bias_audit.evidence.perturbation import STEPS, blurred, cell_means, insertion_auc, occlusion_maps, ranking


def test_places_are_ranked_from_the_highest_and_ties_at_random() -> None:
    values = torch.tensor([[0.0, 5.0, 0.0, 7.0, 0.0, 0.0, 0.0, 0.0], [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]])
    orders = [ranking(values, seed) for seed in range(40)]
    for ranks in orders:
        assert ranks[0].sort().values.tolist() == list(range(8)) and ranks[1].tolist() == list(range(8))
        assert ranks[0, 3] == 0 and ranks[0, 1] == 1
    # The first of the ties is not the first in the image any more often than another.
    assert {int(ranks[0, 0]) for ranks in orders} == set(range(2, 8))
    assert (ranking(values, 3) == orders[3]).all()


def test_blurring_is_scipys_away_from_the_edge_and_keeps_a_plain_image() -> None:
    images = random(2, 3, 70, 84)
    found = blurred(images)
    expected = gaussian_filter(images.double().numpy(), (0, 0, 5, 5), truncate=12)
    inside = np.s_[:, :, 30:40, 30:54]
    np.testing.assert_allclose(found.numpy()[inside], expected[inside], atol=1e-4)
    assert torch.allclose(blurred(torch.full((1, 3, *SIZE), 0.3)), torch.tensor(0.3))
    assert blurred(images.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("grid", [(7, 7), (3, 5), (1, 1)])
def test_a_cell_is_the_mean_of_its_pixels(grid: tuple[int, int]) -> None:
    pixels = random(2, 3, *SIZE)
    found = cell_means(pixels, grid)
    for r, c in np.ndindex(*grid):
        members = [(y, x) for y, x in np.ndindex(*SIZE) if (y * grid[0] // SIZE[0], x * grid[1] // SIZE[1]) == (r, c)]
        expected = torch.stack([pixels[..., y, x] for y, x in members]).mean(0)
        assert torch.allclose(found[..., r, c], expected, atol=1e-6)


# Whatever a score may be: not linear, and another one for each image.
def squares(images: Tensor, of: Tensor) -> Tensor:
    return ((images * random(*images.shape[1:], seed=5)).flatten(1).sum(1) ** 2) * (of + 1)


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_occlusion_maps_are_captums(batch_size: int) -> None:
    images, fill = random(3, 3, 28, 14), random(3, 3, 28, 14, seed=1)
    found = occlusion_maps(squares, images, fill, batch_size)
    assert found.shape == (3, 7, 7)
    for i in range(3):
        peer = Occlusion(lambda batch, i=i: squares(batch, torch.full((len(batch),), i)))
        expected = peer.attribute(images[i : i + 1], (3, 4, 2), (3, 4, 2), fill[i : i + 1])[0, 0, ::4, ::2]
        np.testing.assert_allclose(found[i], expected.numpy(), rtol=1e-3, atol=1e-2)


def test_cells_of_uneven_size_cover_the_image_once() -> None:
    images, fill = random(2, 3, *SIZE), torch.zeros(2, 3, *SIZE)
    # Of a linear score the drops of all cells add up to the drop of the whole.
    found = occlusion_maps(lambda batch, of: batch.flatten(1).sum(1), images, fill, 10)
    np.testing.assert_allclose(found.sum((1, 2)), images.flatten(1).sum(1), rtol=1e-5)
    np.testing.assert_allclose(found, 18 * 21 / 49 * 3 * cell_means(images.mean(1), (7, 7)), rtol=0.5)
    tiny = occlusion_maps(lambda batch, of: batch.flatten(1).sum(1), images[..., :3, :2], fill[..., :3, :2], 10)
    np.testing.assert_allclose(tiny, images[..., :3, :2].sum(1), rtol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 9, 1000])
def test_insertion_is_a_loop_over_pixels(batch_size: int) -> None:
    images, fill = random(3, 3, 5, 7), random(3, 3, 5, 7, seed=1)
    ranks = torch.stack([ranking(random(3, 35, seed=s), s) for s in (1, 2)])
    found = insertion_auc(squares, images, fill, ranks.view(2, 3, 5, 7), batch_size)
    for k, i in np.ndindex(2, 3):
        order = ranks[k, i].argsort().tolist()
        expected = area(lambda p, i=i: float(squares(p[None], torch.tensor([i]))), images[i], fill[i], order, True)
        assert float(found[k, i]) == pytest.approx(expected, rel=1e-4)


def test_insertion_of_what_is_known() -> None:
    """A score that counts uncovered pixels grows in a straight line; one that asks for a half of them jumps once."""
    images, fill = torch.ones(1, 1, 8, 8), torch.zeros(1, 1, 8, 8)
    ranks = torch.arange(64).view(1, 1, 8, 8)
    straight = insertion_auc(lambda p, of: p.mean(dim=(1, 2, 3)), images, fill, ranks, 5)
    assert float(straight) == pytest.approx(0.5)
    jump = insertion_auc(lambda p, of: (p[:, 0, :4].mean(dim=(1, 2)) == 1).float(), images, fill, ranks, 5)
    assert float(jump) == pytest.approx(1 - (STEPS // 2 - 0.5) / STEPS)
    reverse = insertion_auc(lambda p, of: (p[:, 0, :4].mean(dim=(1, 2)) == 1).float(), images, fill, 63 - ranks, 5)
    assert float(reverse) == pytest.approx(0.5 / STEPS)

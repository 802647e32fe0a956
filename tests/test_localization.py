"""Localization metrics against loops over single pixels, torch's own upsampling, and closed forms."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise, permutations
from typing import Any

import numpy as np
import pixelwise
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from bias_audit import localization
from bias_audit.localization import (
    LEVELS,
    Scored,
    energy_share,
    enrichment,
    iou,
    label_pixels,
    pointing_game,
    project_regions,
    relevance_rank_accuracy,
    score_maps,
    score_pixels,
    with_remainder,
)

Naive = Callable[[pixelwise.Array, pixelwise.Array], float | None]
Slack = Callable[[pixelwise.Array, pixelwise.Array], float]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]

# (map, image), none of them square except where a side of one pixel is the point.
SIZES = [
    ((5, 3), (17, 29)),
    ((1, 1), (9, 4)),
    ((1, 6), (7, 13)),
    ((4, 1), (11, 5)),
    ((13, 9), (13, 9)),  # the map is as large as the image
    ((6, 7), (6, 15)),
    ((9, 11), (5, 4)),  # and larger
    ((1, 1), (1, 1)),
]
CLIPS = [((2, 3, 4), (5, 7, 6)), ((1, 2, 2), (3, 5, 4)), ((4, 1, 3), (4, 6, 3))]


def random_maps(batch: int, size: tuple[int, ...], seed: int, levels: int = 0) -> Tensor:
    """Non-negative maps, a third of them zeros; with `levels`, of so few values that many pixels tie."""
    rng = np.random.default_rng(seed)
    values = rng.random((batch, *size)) if not levels else rng.integers(0, levels, (batch, *size)) / 8
    return torch.from_numpy(np.where(rng.random((batch, *size)) < 0.3, 0, values)).float()


def random_masks(batch: int, regions: int, size: tuple[int, ...], seed: int) -> Tensor:
    """Masks that overlap: boxes and scattered pixels, now and then empty or whole."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((batch, regions, *size), dtype=bool)
    for mask in masks.reshape(-1, *size):
        kind = rng.integers(6)
        if kind == 0:
            mask[:] = rng.random(size) < 0.2
        elif kind == 1:
            mask[tuple(rng.integers(side) for side in size)] = True
        elif kind == 2:
            mask[:] = rng.random() < 0.5
        else:
            starts = [rng.integers(side) for side in size]
            mask[tuple(slice(a, a + rng.integers(1, side + 1)) for a, side in zip(starts, size, strict=True))] = True
    return torch.from_numpy(masks)


def upsampled(maps: Tensor, size: tuple[int, ...]) -> Tensor:
    mode = "trilinear" if len(size) == 3 else "bilinear"
    return nn.functional.interpolate(maps[:, None], size=size, mode=mode, align_corners=False)[:, 0]


def share_of(maps: Tensor, masks: Tensor) -> Scored:
    return energy_share(maps, project_regions(masks, maps.shape[1:]))


def rank_slack(pixels: pixelwise.Array, mask: pixelwise.Array) -> float:
    # Three levels are spent on the maximum and on the one that begins at the threshold.
    return pixelwise.rank_slack(pixels, mask, LEVELS - 3)


def no_slack(pixels: pixelwise.Array, mask: pixelwise.Array) -> float:
    return 0.0


def assert_naive(
    scored: Scored, pixels: Tensor, masks: Tensor, naive: Naive, tolerance: float = 1e-6, slack: Slack = no_slack
) -> None:
    """`scored` is what the naive function says of each image and region; not valid exactly where that gives None."""
    assert scored.value.shape == scored.valid.shape == masks.shape[:2]
    assert scored.value.dtype == torch.float32 and scored.valid.dtype == torch.bool
    for b in range(masks.shape[0]):
        for r in range(masks.shape[1]):
            given_ = pixels[b].double().numpy(), masks[b, r].numpy()
            expected = naive(*given_)
            assert bool(scored.valid[b, r]) == (expected is not None)
            absolute = tolerance + slack(*given_)
            assert float(scored.value[b, r]) == pytest.approx(expected or 0, abs=absolute, rel=tolerance)


@pytest.mark.parametrize(("small", "large"), [*SIZES, *CLIPS])
@pytest.mark.parametrize("seed", [0, 1])
def test_projected_share_is_the_share_of_the_upsampled_pixels(
    small: tuple[int, ...], large: tuple[int, ...], seed: int
) -> None:
    maps, masks = random_maps(4, small, seed), random_masks(4, 3, large, seed + 100)
    maps[0] = 0
    pixels = torch.from_numpy(np.stack([pixelwise.upsampled(m.numpy(), *large) for m in maps]))
    np.testing.assert_allclose(pixels, upsampled(maps, large), atol=1e-6)  # the loops upsample as torch does
    regions = project_regions(masks, small)
    assert_naive(energy_share(maps, regions), pixels, masks, pixelwise.energy_share, 1e-5)
    assert_naive(enrichment(energy_share(maps, regions), regions.area), pixels, masks, pixelwise.enrichment, 1e-5)
    np.testing.assert_allclose(regions.area, masks.numpy().reshape(4, 3, -1).mean(axis=2), rtol=1e-6)


def test_projected_share_at_the_size_of_a_resnet() -> None:
    maps, masks = random_maps(3, (7, 7), 5), random_masks(3, 4, (224, 224), 6)
    pixels = upsampled(maps.double(), (224, 224)).numpy()
    scored = share_of(maps, masks)
    assert scored.valid.sum() >= 8
    for b, r in np.argwhere(scored.valid.numpy()):
        expected = pixels[b][masks[b, r].numpy()].sum() / pixels[b].sum()
        assert float(scored.value[b, r]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("small", "large"), [*SIZES[:4], *CLIPS])
def test_weights_of_a_region_are_the_energy_it_gets_from_each_cell(
    small: tuple[int, ...], large: tuple[int, ...]
) -> None:
    masks = random_masks(2, 2, large, 3)
    regions = project_regions(masks, small)
    assert regions.weights.dtype == regions.image.dtype == regions.area.dtype == torch.float32
    for place in np.ndindex(*small):
        cell = np.zeros(small)
        cell[place] = 1
        spread = pixelwise.upsampled(cell, *large)
        energy = (masks.numpy() * spread).reshape(2, 2, -1).sum(2)
        np.testing.assert_allclose(regions.weights[(..., *place)], energy, atol=1e-4)
        assert float(regions.image[place]) == pytest.approx(spread.sum(), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_shares_do_not_depend_on_the_precision_of_matrix_products(precision: str) -> None:
    # Of two methods: a batch of dot products is one matrix product only then.
    maps, masks = torch.stack([random_maps(32, (7, 7), seed) for seed in (4, 5)]), random_masks(32, 4, (224, 224), 6)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        regions = project_regions(masks, (7, 7))
        share = energy_share(maps, regions)
    finally:
        torch.set_float32_matmul_precision(before)
    pixels = upsampled(maps.flatten(0, 1).double(), (224, 224)).unflatten(0, (2, 32))
    expected = (pixels[:, :, None] * masks).sum((3, 4)) / pixels.sum((2, 3))[:, :, None]
    assert share.valid.sum() > 160
    torch.testing.assert_close(share.value[share.valid], expected[share.valid].float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tolerance", [0, 1, 3, 15])
@pytest.mark.parametrize(("levels", "seed"), [(0, 0), (3, 1), (2, 2)])
@pytest.mark.parametrize("size", [(17, 29), (8, 3), (1, 21), (5, 1)])
def test_pointing_game_is_the_loop_over_pixels(tolerance: int, levels: int, seed: int, size: tuple[int, int]) -> None:
    maps, masks = random_maps(4, size, seed, levels), random_masks(4, 3, size, seed + 10)
    maps[1] = 0
    scored = pointing_game(maps, masks, tolerance)
    assert_naive(scored, maps, masks, lambda p, m: pixelwise.pointing_game(p, m, tolerance))


@pytest.mark.parametrize(
    ("tolerance", "reaches"),
    [(1, [(0, 1), (1, 0)]), (3, [(3, 0), (2, 2), (1, 2)]), (5, [(3, 4), (5, 0)]), (15, [(9, 12), (0, 15), (10, 11)])],
)
def test_a_maximum_exactly_at_the_tolerance_hits_and_one_further_misses(
    tolerance: int, reaches: list[tuple[int, int]]
) -> None:
    mask = torch.zeros(1, 1, 41, 43, dtype=torch.bool)
    mask[0, 0, 20, 21] = True
    for dy, dx in [*reaches, *((-y, -x) for y, x in reaches), *((x, -y) for y, x in reaches)]:
        maps = torch.zeros(1, 41, 43)
        maps[0, 20 + dy, 21 + dx] = 1
        assert pointing_game(maps, mask, tolerance).value.item() == 1
    for dy, dx in [(0, tolerance + 1), (-tolerance - 1, 0), (tolerance, 1), (-1, -tolerance)]:
        maps = torch.zeros(1, 41, 43)
        maps[0, 20 + dy, 21 + dx] = 1
        scored = pointing_game(maps, mask, tolerance)
        assert scored.value.item() == 0 and scored.valid.item()


def test_maxima_that_tie_share_the_hit() -> None:
    maps = torch.zeros(1, 4, 5)
    maps[0, [0, 1, 3], [0, 4, 2]] = 2.5
    masks = torch.zeros(1, 4, 4, 5, dtype=torch.bool)
    masks[0, 0, 0, 0] = True
    masks[0, 1, :2] = True
    masks[0, 2] = True
    masks[0, 3, 2, 2] = True
    torch.testing.assert_close(pointing_game(maps, masks).value, torch.tensor([[1 / 3, 2 / 3, 1, 0]]))
    torch.testing.assert_close(pointing_game(maps, masks, 1).value, torch.tensor([[1 / 3, 2 / 3, 1, 1 / 3]]))


@pytest.mark.parametrize("threshold", [0.0, 0.15, 0.25, 0.5, 0.75, 0.99])
@pytest.mark.parametrize(("levels", "seed"), [(0, 0), (9, 1)])
@pytest.mark.parametrize("size", [(17, 29), (6, 1)])
def test_iou_is_the_loop_over_pixels(threshold: float, levels: int, seed: int, size: tuple[int, int]) -> None:
    maps, masks = random_maps(4, size, seed, levels), random_masks(4, 3, size, seed + 20)
    maps[0] = 0
    assert_naive(iou(maps, masks, threshold), maps, masks, lambda p, m: pixelwise.iou(p, m, threshold))


def test_iou_leaves_out_pixels_at_the_threshold() -> None:
    maps = torch.tensor([[[4.0, 1.0, 0.0, 1.0]]])
    mask = torch.tensor([[[[True, True, False, False]]]])
    assert iou(maps, mask, 0.25).value.item() == 1 / 2  # the maximum alone, of two
    assert iou(maps, mask, 0.249).value.item() == pytest.approx(2 / 3)


@pytest.mark.parametrize(("levels", "seed"), [(2, 1), (3, 2), (9, 3), (LEVELS - 4, 4)])
@pytest.mark.parametrize("size", [(17, 29), (1, 8), (3, 3)])
def test_rank_accuracy_is_the_loop_over_pixels(levels: int, seed: int, size: tuple[int, int]) -> None:
    """Exactly, as long as the map has no more values than there are levels."""
    maps, masks = random_maps(5, size, seed, levels), random_masks(5, 4, size, seed + 30)
    maps[0], maps[1] = 0, 0.7  # silent, and all equal
    assert_naive(relevance_rank_accuracy(maps, masks), maps, masks, pixelwise.relevance_rank_accuracy)


@pytest.mark.parametrize(("power", "offset"), [(1, 0), (8, 0), (1, 50)])
@pytest.mark.parametrize("size", [(17, 29), (64, 50)])
@pytest.mark.parametrize("seed", [0, 1])
def test_rank_accuracy_of_any_map_is_within_its_bound(
    power: int, offset: int, size: tuple[int, int], seed: int
) -> None:
    """With the power most pixels crowd on the lowest levels, with the offset the range is far from zero."""
    maps, masks = random_maps(4, size, seed) ** power + offset, random_masks(4, 4, size, seed + 30)
    masks[:, 0] = torch.rand(size, generator=torch.Generator().manual_seed(seed)) < 0.02
    scored = relevance_rank_accuracy(maps, masks)
    assert_naive(scored, maps, masks, pixelwise.relevance_rank_accuracy, slack=rank_slack)


def test_rank_accuracy_at_the_size_of_a_resnet_is_off_by_little() -> None:
    maps, masks = random_maps(4, (7, 7), 3), random_masks(4, 4, (224, 224), 4)
    pixels = upsampled(maps, (224, 224))
    scored = relevance_rank_accuracy(pixels, masks)
    off = []
    for b, r in np.argwhere(scored.valid.numpy()):
        values, inside = pixels[b].numpy().ravel(), masks[b, r].numpy().ravel()
        kth = np.sort(values)[-inside.sum()]
        left = inside.sum() - (values > kth).sum()
        hits = (inside & (values > kth)).sum() + left * inside[values == kth].mean()
        off.append(abs(float(scored.value[b, r]) - hits / inside.sum()))
    assert len(off) >= 12 and max(off) < 0.002 and np.mean(off) < 2e-4


def test_rank_accuracy_of_pixels_on_one_level_is_off_by_the_bound_at_worst() -> None:
    """n pixels within one level, half of them to be taken, and the right half in the region: off by n / 4K."""
    n = 8
    maps = torch.zeros(1, 1, 40)
    maps[0, 0, 0] = 1
    maps[0, 0, 1 : n + 1] = 0.5 + torch.arange(n).flip(0) * 1e-6
    masks = torch.zeros(1, 1, 1, 40, dtype=torch.bool)
    masks[0, 0, 0, : n // 2 + 1] = True
    size = n // 2 + 1
    assert pixelwise.relevance_rank_accuracy(maps[0].numpy(), masks[0, 0].numpy()) == 1
    assert relevance_rank_accuracy(maps, masks).value.item() == pytest.approx(1 - n / 4 / size)
    assert rank_slack(maps[0].numpy(), masks[0, 0].numpy()) == n / 4 / size


@st.composite
def crowded(draw: Any) -> Tensor:
    """Maps of any magnitude, whose pixels are a few units in the last place apart, or orders of magnitude."""
    base = draw(st.floats(2.0**-99, 2.0**99, width=32))
    steps = draw(st.lists(st.integers(-3, 3), min_size=12, max_size=12))
    exponents = draw(st.lists(st.sampled_from([0, 0, 0, -1, -20, -60]), min_size=12, max_size=12))
    values = [np.float32(base)] * 12
    for i, step in enumerate(steps):
        for _ in range(abs(step)):
            values[i] = np.nextafter(values[i], np.float32(np.inf if step > 0 else 0))
        values[i] = np.float32(values[i] * 2.0 ** exponents[i])
    return torch.tensor(np.array(values)).view(1, 3, 4)


@given(crowded(), st.sampled_from([0.0, 0.15, 0.5, 0.99]), st.integers(0, 2**12 - 1))
@settings(max_examples=150, deadline=None)
def test_maximum_and_threshold_are_exact_to_the_last_bit(maps: Tensor, threshold: float, bits: int) -> None:
    masks = torch.tensor([bool(bits >> i & 1) for i in range(12)]).view(1, 1, 3, 4)
    cut = np.float32(threshold) * np.float32(maps.max())

    def above(pixels: pixelwise.Array, mask: pixelwise.Array) -> float | None:
        return float((mask & (pixels > cut)).sum() / (mask | (pixels > cut)).sum()) if mask.any() else None

    scored = score_pixels(maps, label_pixels(masks), threshold)
    assert_naive(scored.pointing_game, maps, masks, lambda p, m: pixelwise.pointing_game(p, m, 0))
    assert_naive(scored.iou, maps, masks, above)
    naive = pixelwise.relevance_rank_accuracy
    assert_naive(scored.relevance_rank_accuracy, maps, masks, naive, slack=rank_slack)


@given(
    values=st.lists(st.integers(0, 2), min_size=5, max_size=5),
    region=st.lists(st.booleans(), min_size=5, max_size=5),
)
@settings(max_examples=40, deadline=None)
def test_rank_accuracy_is_the_mean_over_every_order_of_ties(values: list[int], region: list[bool]) -> None:
    size = sum(region)
    shares = [
        sum(region[i] for i in order[:size]) / size
        for order in permutations(range(5))
        if size and all(values[a] >= values[b] for a, b in pairwise(order))
    ]
    scored = relevance_rank_accuracy(torch.tensor([[values]]).float(), torch.tensor([[[region]]]))
    assert scored.valid.item() == bool(size and max(values))
    if scored.valid.item():
        assert scored.value.item() == pytest.approx(np.mean(shares), abs=1e-6)


@pytest.mark.parametrize("size", [(7, 4), (1, 1), (3, 11)])
def test_closed_forms_of_whole_images_single_pixels_and_flat_maps(size: tuple[int, int]) -> None:
    whole = torch.ones(1, 1, *size, dtype=torch.bool)
    one = torch.zeros(1, 1, *size, dtype=torch.bool)
    one[..., -1, 0] = True
    peaked = torch.rand(1, *size, generator=torch.Generator().manual_seed(0)) * 0.9
    peaked[0, -1, 0] = 1
    flat = torch.full((1, *size), 0.3)
    area = 1 / (size[0] * size[1])
    for maps in (peaked, flat):
        for score in (pointing_game, relevance_rank_accuracy):
            assert score(maps, whole).value.item() == pytest.approx(1)
        assert share_of(maps, whole).value.item() == pytest.approx(1)
        assert iou(maps, whole, 0.0).value.item() == pytest.approx(1)
    assert pointing_game(peaked, one).value.item() == 1
    assert relevance_rank_accuracy(peaked, one).value.item() == 1
    assert iou(peaked, one, 0.95).value.item() == 1
    # A map that ignores the region gives it what its area gives.
    assert share_of(flat, one).value.item() == pytest.approx(area)
    assert enrichment(share_of(flat, one), torch.tensor([[area]])).value.item() == pytest.approx(1)
    assert pointing_game(flat, one).value.item() == pytest.approx(area)
    assert relevance_rank_accuracy(flat, one).value.item() == pytest.approx(area)
    assert iou(flat, one, 0.5).value.item() == pytest.approx(area)


def every_metric(maps: Tensor, masks: Tensor) -> dict[str, Scored]:
    regions = project_regions(masks, maps.shape[1:])
    share = energy_share(maps, regions)
    pixels = upsampled(maps, masks.shape[2:])
    return {
        "energy_share": share,
        "enrichment": enrichment(share, regions.area),
        "pointing_game": pointing_game(pixels, masks),
        "pointing_game_3": pointing_game(pixels, masks, 3),
        "iou": iou(pixels, masks, 0.15),
        "relevance_rank_accuracy": relevance_rank_accuracy(pixels, masks),
    }


METRICS = tuple(every_metric(torch.ones(1, 1, 1), torch.ones(1, 1, 1, 1, dtype=torch.bool)))


@pytest.mark.parametrize("metric", METRICS)
def test_silent_maps_and_empty_regions_are_not_valid_and_never_nan(metric: str) -> None:
    maps = random_maps(3, (4, 5), 0) + 0.1
    maps[1] = 0
    masks = torch.zeros(3, 2, 9, 10, dtype=torch.bool)
    masks[:, 0, 2:5, 3:9] = True
    scored = every_metric(maps, masks)[metric]
    # Beside them the first and the last map, and the region that is there, are valid.
    assert scored.valid.tolist() == [[True, False], [False, False], [True, False]]
    assert scored.value.isfinite().all()
    assert (scored.value[~scored.valid] == 0).all()
    assert (scored.value[[0, 2], 0] > 0).any() or metric == "pointing_game"


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("holes", ["one", "all"])
def test_maps_that_are_not_finite_are_not_valid(metric: str, holes: str, value: float) -> None:
    maps = random_maps(2, (4, 5), 0) + 0.1
    if holes == "one":
        maps[0, 1, 2] = value
    else:
        maps[0] = value
    masks = torch.zeros(2, 1, 9, 10, dtype=torch.bool)
    masks[:, 0, :5] = True
    scored = every_metric(maps, masks)[metric]
    assert scored.valid.tolist() == [[False], [True]]
    assert scored.value.isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_pixels_that_are_not_finite_are_not_valid(value: float) -> None:
    """Given at the image's resolution, where no interpolation makes NaN of infinity."""
    maps, masks = random_maps(3, (4, 5), 0) + 0.1, torch.ones(3, 1, 4, 5, dtype=torch.bool)
    maps[0, 1, 2], maps[1] = value, value
    for scored in score_pixels(maps, label_pixels(masks), 0.15):
        assert scored.valid.tolist() == [[False], [False], [True]]
        assert scored.value.isfinite().all()


def test_pixels_below_the_smallest_normal_number_are_scored_too() -> None:
    maps, masks = random_maps(4, (17, 29), 1, levels=9), random_masks(4, 3, (17, 29), 2)
    tiny = maps * 2.0**-140
    assert 0 < tiny.max() < torch.finfo(torch.float32).tiny
    regions = label_pixels(masks)
    for plain, scaled in zip(score_pixels(maps, regions, 0.5), score_pixels(tiny, regions, 0.5), strict=True):
        assert torch.equal(plain.valid, scaled.valid) and torch.equal(plain.value, scaled.value)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("exponent", [-100, -30, 7, 100])
def test_scale_does_not_matter(metric: str, exponent: int) -> None:
    """Powers of two, so that rounding is the same: 2**-100 is about 1e-30."""
    maps, masks = random_maps(4, (5, 3), 1), random_masks(4, 3, (17, 29), 2)
    maps[2] = 0
    plain, scaled = every_metric(maps, masks)[metric], every_metric(maps * 2.0**exponent, masks)[metric]
    assert torch.equal(plain.valid, scaled.valid) and plain.valid.any() and not plain.valid.all()
    torch.testing.assert_close(scaled.value, plain.value, rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", [1e-42, 1e-37, 1e-30, 1e30, 1e38])
def test_share_of_maps_of_any_magnitude_is_that_of_the_pixels(scale: float) -> None:
    maps, masks = random_maps(3, (5, 3), 4) * scale, random_masks(3, 2, (17, 29), 8)
    pixels = np.stack([pixelwise.upsampled(m.double().numpy() / scale, 17, 29) for m in maps])
    assert_naive(share_of(maps, masks), torch.from_numpy(pixels), masks, pixelwise.energy_share, 1e-5)


@pytest.mark.parametrize("metric", METRICS)
def test_a_batch_gives_what_its_images_give_one_by_one(metric: str) -> None:
    maps, masks = random_maps(6, (5, 3), 1, levels=4), random_masks(6, 3, (17, 29), 2)
    maps[4] = 0
    batch = every_metric(maps, masks)[metric]
    for b in range(6):
        single = every_metric(maps[b : b + 1], masks[b : b + 1])[metric]
        assert torch.equal(single.valid[0], batch.valid[b])
        torch.testing.assert_close(single.value[0], batch.value[b], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("device", DEVICES)
def test_inputs_stay_as_they_are_and_results_on_their_device(device: str) -> None:
    maps, masks = random_maps(3, (5, 3), 1).to(device), random_masks(3, 2, (17, 29), 2).to(device)
    pixels = upsampled(maps, (17, 29))
    regions = project_regions(masks, (5, 3))
    given_ = [maps, masks, pixels, regions.weights, regions.image, regions.area]
    before = [t.clone() for t in given_]
    share = energy_share(maps, regions)
    scored = [
        share,
        enrichment(share, regions.area),
        pointing_game(pixels, masks),
        pointing_game(pixels, masks, 15),
        iou(pixels, masks, 0.15),
        relevance_rank_accuracy(pixels, masks),
    ]
    labelled_ = label_pixels(masks, 15)
    given_ += [labelled_.part, labelled_.members, labelled_.reached, labelled_.pixels]
    before += [t.clone() for t in given_[len(before) :]]
    scored += [*score_pixels(pixels, labelled_, 0.15), *score_maps(maps, labelled_, 0.15)]
    rest = with_remainder(masks)
    for tensor, copy in zip(given_, before, strict=True):
        assert torch.equal(tensor, copy)
    for s in scored:
        assert s.value.dtype == torch.float32 and s.valid.dtype == torch.bool
        assert s.value.device.type == s.valid.device.type == device
    assert rest.dtype == torch.bool and rest.device.type == device
    on_cpu = every_metric(maps.cpu(), masks.cpu())
    torch.testing.assert_close(share.value.cpu(), on_cpu["energy_share"].value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scored[5].value.cpu(), on_cpu["relevance_rank_accuracy"].value, rtol=1e-5, atol=1e-3)


def test_the_remainder_is_what_no_region_covers() -> None:
    masks = random_masks(5, 3, (6, 11), 7)
    extended = with_remainder(masks)
    assert extended.shape == (5, 4, 6, 11) and torch.equal(extended[:, :3], masks)
    for b in range(5):
        for y in range(6):
            for x in range(11):
                assert bool(extended[b, 3, y, x]) == (not any(bool(m[y, x]) for m in masks[b]))


@st.composite
def labelled(draw: Any) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Maps, and an image of which every pixel has one of three labels (the third is what no region covers)."""
    small = (draw(st.integers(1, 6)), draw(st.integers(1, 6)))
    large = (draw(st.integers(1, 12)), draw(st.integers(1, 12)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    maps = rng.random((2, *small)) * (rng.random((2, *small)) < draw(st.sampled_from([0.1, 0.5, 1.0])))
    return torch.from_numpy(maps).float(), torch.from_numpy(rng.integers(0, 3, (2, *large))), small


@given(labelled())
@settings(max_examples=60, deadline=None)
def test_shares_of_disjoint_regions_and_the_remainder_sum_to_one(case: tuple[Tensor, Tensor, tuple[int, int]]) -> None:
    maps, labels, small = case
    masks = with_remainder(torch.stack([labels == 0, labels == 1], dim=1))
    scored = energy_share(maps, project_regions(masks, small))
    loud = upsampled(maps, tuple(labels.shape[1:])).sum((1, 2)) > 0
    torch.testing.assert_close(scored.value.sum(1), loud.float(), atol=1e-5, rtol=0)
    assert (scored.value >= 0).all() and (scored.value <= 1 + 1e-5).all()
    assert torch.equal(scored.valid, loud[:, None] & masks.flatten(2).any(2))


@given(labelled())
@settings(max_examples=60, deadline=None)
def test_the_share_of_a_union_is_the_sum_for_disjoint_regions_and_less_the_overlap_for_others(
    case: tuple[Tensor, Tensor, tuple[int, int]],
) -> None:
    maps, labels, small = case
    first, second = labels == 0, labels == 1
    wide = first | (labels == 2)
    masks = torch.stack([first, second, first | second, wide, wide | second, wide & first], dim=1)
    share = energy_share(maps, project_regions(masks, small)).value
    torch.testing.assert_close(share[:, 2], share[:, 0] + share[:, 1], atol=1e-5, rtol=0)
    torch.testing.assert_close(share[:, 4], share[:, 3] + share[:, 2] - share[:, 5], atol=1e-5, rtol=0)


@given(labelled(), st.integers(0, 4), st.sampled_from([0.0, 0.15, 0.5]))
@settings(max_examples=40, deadline=None)
def test_pixel_metrics_lie_between_0_and_1_and_grow_with_the_region(
    case: tuple[Tensor, Tensor, tuple[int, int]], tolerance: int, threshold: float
) -> None:
    maps, labels, _ = case
    pixels = upsampled(maps, tuple(labels.shape[1:]))
    masks = torch.stack([labels == 0, labels <= 1, labels <= 2], dim=1)
    pointing = pointing_game(pixels, masks, tolerance)
    for scored in (pointing, iou(pixels, masks, threshold), relevance_rank_accuracy(pixels, masks)):
        assert (scored.value >= 0).all() and (scored.value <= 1 + 1e-6).all()
    assert (pointing.value.diff(dim=1)[pointing.valid[:, :2]] >= -1e-6).all()
    assert (pointing_game(pixels, masks, tolerance + 1).value >= pointing.value - 1e-6).all()


@pytest.mark.parametrize("tolerance", [0, 2])
@pytest.mark.parametrize("levels", [0, 3])
def test_metrics_of_clips_against_tubes_are_the_loops_over_pixels(tolerance: int, levels: int) -> None:
    size = (3, 7, 6)
    maps, masks = random_maps(4, size, 1, levels), random_masks(4, 3, size, 2)
    maps[1] = 0
    scored = score_pixels(maps, label_pixels(masks, tolerance), 0.25)
    assert_naive(scored.pointing_game, maps, masks, lambda p, m: pixelwise.pointing_game(p, m, tolerance))
    assert_naive(scored.iou, maps, masks, lambda p, m: pixelwise.iou(p, m, 0.25))
    naive = pixelwise.relevance_rank_accuracy
    assert_naive(scored.relevance_rank_accuracy, maps, masks, naive, slack=rank_slack)


def test_a_maximum_near_a_tube_of_another_frame_misses_it() -> None:
    masks = torch.zeros(1, 1, 2, 5, 5, dtype=torch.bool)
    masks[0, 0, 0, 2, 2] = True
    for frame in (0, 1):
        maps = torch.zeros(1, 2, 5, 5)
        maps[0, frame, 2, 3] = 1
        assert pointing_game(maps, masks, 1).value.item() == (frame == 0)


@pytest.mark.parametrize("size", [(6, 11), (3, 4, 5)])
@pytest.mark.parametrize("tolerance", [0, 1])
def test_parts_are_what_the_regions_cut_each_image_into(size: tuple[int, ...], tolerance: int) -> None:
    masks = with_remainder(random_masks(5, 3, size, 7))
    regions = label_pixels(masks, tolerance)
    assert regions.part.dtype == torch.uint8 and regions.part.shape == (5, *size)
    most = 0
    for b in range(5):
        # From each pixel's part back to the regions that it lies in, and that it lies near.
        inside, near = regions.members[b][regions.part[b].long()], regions.reached[b][regions.part[b].long()]
        assert torch.equal(inside.movedim(-1, 0), masks[b])
        for r, region in enumerate(masks[b]):
            for place in np.ndindex(*size):
                peak = torch.zeros(size)
                peak[place] = 1
                hit = pixelwise.pointing_game(peak.numpy(), region.numpy(), tolerance)
                assert bool(near[(*place, r)]) == bool(hit)
        both = torch.cat([inside, near], dim=-1).flatten(0, -2)
        assert len({tuple(row) for row in both.tolist()}) == len(regions.part[b].unique())
        most = max(most, len(regions.part[b].unique()))
    assert most == regions.members.shape[1]
    assert torch.equal(regions.pixels.long(), masks.flatten(2).sum(2))


def test_more_parts_than_a_byte_can_number() -> None:
    masks = torch.from_numpy(np.random.default_rng(0).random((1, 9, 40, 50)) < 0.5)
    regions = label_pixels(masks)
    assert regions.members.shape[1] > 256 and regions.part.dtype == torch.int32
    maps = random_maps(1, (40, 50), 3, levels=9)
    scored = score_pixels(maps, regions, 0.25)
    assert_naive(scored.iou, maps, masks, lambda p, m: pixelwise.iou(p, m, 0.25))
    assert_naive(scored.relevance_rank_accuracy, maps, masks, pixelwise.relevance_rank_accuracy)


@pytest.mark.parametrize(("small", "large"), [((5, 3), (17, 29)), ((2, 3, 4), (5, 7, 6))])
def test_maps_of_several_methods_share_the_masks(small: tuple[int, ...], large: tuple[int, ...]) -> None:
    maps = torch.stack([random_maps(5, small, seed, levels) for seed, levels in ((0, 0), (1, 3), (2, 0))])
    maps[1, 2] = 0
    masks = random_masks(5, 3, large, 9)
    projected, regions = project_regions(masks, small), label_pixels(masks, 2)
    share = energy_share(maps, projected)
    together = (share, enrichment(share, projected.area), *score_maps(maps, regions, 0.15))
    for m, alone in enumerate(maps):
        share = energy_share(alone, projected)
        one_by_one = (share, enrichment(share, projected.area), *score_maps(alone, regions, 0.15))
        for all_, one in zip(together, one_by_one, strict=True):
            assert torch.equal(all_.valid[m], one.valid)
            torch.testing.assert_close(all_.value[m], one.value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("images", [0, 2, 100])
def test_how_many_images_are_scored_at_once_does_not_matter(images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    maps = torch.stack([random_maps(5, (5, 3), seed) for seed in (0, 1)])
    regions = label_pixels(random_masks(5, 3, (17, 29), 9), 2)
    expected = score_pixels(upsampled(maps.flatten(0, 1), (17, 29)).view(2, 5, 17, 29), regions, 0.15)
    monkeypatch.setattr(localization, "_PIXELS_A_THREAD", images * 2 * 17 * 29 // torch.get_num_threads())
    for found, given_ in zip(score_maps(maps, regions, 0.15), expected, strict=True):
        assert torch.equal(found.valid, given_.valid) and torch.equal(found.value, given_.value)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.skipif(
    torch.__version__ < "2.9" and not torch.cuda.is_available(), reason="makes tensors of a device that is not there"
)
def test_scoring_never_asks_the_device_for_a_number(device: str) -> None:
    """Tensors without content cannot give one: whatever would make the host wait for the device raises."""
    with FakeTensorMode():
        maps = torch.rand(2, 4, 7, 7, device=device)
        masks = torch.zeros(4, 3, 56, 56, dtype=torch.bool, device=device)
        parts = torch.zeros(4, 5, 3, dtype=torch.bool, device=device)
        regions = localization.PixelRegions(masks[:, 0].byte(), parts, parts, masks.flatten(2).sum(2).int())
        share = energy_share(maps, project_regions(masks, (7, 7)))
        for scored in (share, enrichment(share, share.value[0]), *score_maps(maps, regions, 0.15)):
            assert scored.value.shape == (2, 4, 3) and scored.value.device.type == device
            assert scored.value.dtype == torch.float32 and scored.valid.dtype == torch.bool
        with pytest.raises(DataDependentOutputException):
            label_pixels(masks)


def test_scoring_works_where_only_deterministic_algorithms_are_allowed() -> None:
    maps, masks = random_maps(4, (5, 3), 1), random_masks(4, 3, (17, 29), 2)
    expected = every_metric(maps, masks)
    torch.use_deterministic_algorithms(True)
    try:
        for name, scored in every_metric(maps, masks).items():
            assert torch.equal(scored.value, expected[name].value) and torch.equal(scored.valid, expected[name].valid)
    finally:
        torch.use_deterministic_algorithms(False)

"""Every measure of an explanation method against loops and peers; planted unfit methods beside fit ones; weights given
back; and what an unfit method does to an audit."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import Occlusion
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from scipy.stats import spearmanr
from scipy.stats import t as student
from torch import Tensor, nn
from training import audit_set as scenes
from training import fit, trainer

from bias_audit import AuditDataset, Auditor, AuditPlan, AuditResult, AuditSample, audit_model, read_run, run_gate
from bias_audit.attribution.cam import gradcam, hirescam
from bias_audit.attribution.capture import borrowed, capture
from bias_audit.attribution.targets import ClassLogit, ClassMargin
from bias_audit.callbacks import BiasAuditCallback
from bias_audit.evidence.fitness import (
    DRAWS,
    STEPS,
    Explained,
    blurred,
    cell_means,
    class_probability,
    fitness,
    fitness_estimates,
    insertion_auc,
    occlusion_maps,
    ranking,
    redrawn_weights,
    spearman,
)
from bias_audit.findings import explainers
from bias_audit.policies.policy import Policy
from bias_audit.records.results import AuditSummary
from bias_audit.terms import EXPLAINER_METRICS, Outcome, Verdict

NAN = float("nan")
SIZE = (21, 18)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


# Ranks.


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 40), st.integers(1, 6), st.integers(0, 10**6))
def test_rank_correlation_is_scipys(places: int, levels: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    one, two = rng.integers(0, levels, (2, 3, 4, places)).astype(np.float32)
    found = spearman(torch.from_numpy(one), torch.from_numpy(two))
    assert found.value.shape == found.valid.shape == (3, 4)
    for i, j in np.ndindex(3, 4):
        assert bool(found.valid[i, j]) == (np.ptp(one[i, j]) > 0 and np.ptp(two[i, j]) > 0)
        if found.valid[i, j]:
            assert float(found.value[i, j]) == pytest.approx(spearmanr(one[i, j], two[i, j])[0], abs=1e-6)


def test_rank_correlation_of_what_is_not_finite_is_not_valid() -> None:
    one = torch.tensor([[1.0, 2.0, 3.0], [1.0, NAN, 3.0], [1.0, math.inf, 3.0]])
    assert spearman(one, one).valid.tolist() == [True, False, False]
    assert spearman(one, one).value.tolist() == [1, 0, 0]
    assert spearman(one[:1], -one[:1]).value.tolist() == [-1]


def test_places_are_ranked_from_the_highest_and_ties_at_random() -> None:
    values = torch.tensor([[0.0, 5.0, 0.0, 7.0, 0.0, 0.0, 0.0, 0.0], [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]])
    orders = [ranking(values, seed) for seed in range(40)]
    for ranks in orders:
        assert ranks[0].sort().values.tolist() == list(range(8)) and ranks[1].tolist() == list(range(8))
        assert ranks[0, 3] == 0 and ranks[0, 1] == 1
    # The first of the ties is not the first in the image any more often than another.
    assert {int(ranks[0, 0]) for ranks in orders} == set(range(2, 8))
    assert (ranking(values, 3) == orders[3]).all()


# What is removed.


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


def area(score: Callable[[Tensor], float], image: Tensor, fill: Tensor, order: list[int], inserts: bool) -> float:
    """The area under the score while the pixels in `order` are uncovered, or filled, one share after the other."""
    curve = []
    for step in range(STEPS + 1):
        changed = {p for place, p in enumerate(order) if place * STEPS < step * len(order)}
        picture = torch.empty_like(image)
        for p, (y, x) in enumerate(np.ndindex(*image.shape[-2:])):
            picture[..., y, x] = (image if (p in changed) == inserts else fill)[..., y, x]
        curve.append(score(picture))
    return sum((a + b) / 2 for a, b in pairwise(curve)) / STEPS


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


def test_the_probability_of_the_class() -> None:
    outputs, classes = torch.tensor([[1.0, 3.0, 0.0], [2.0, 2.0, 2.0]]), torch.tensor([1, 2])
    expected = [math.exp(3) / (math.exp(1) + math.exp(3) + 1), 1 / 3]
    assert class_probability(outputs, classes).tolist() == pytest.approx(expected)
    one_logit = class_probability(torch.tensor([[2.0], [2.0]]), torch.tensor([0, 1]))
    assert one_logit.tolist() == pytest.approx([1 / (1 + math.exp(2)), 1 / (1 + math.exp(-2))])


# Everything of an image at once.


class Net(nn.Module):
    """Two convolutions and a hidden layer: the methods differ; one weight is tied, one is a scalar, one is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1)
        )
        self.relu = nn.ReLU(inplace=True)
        self.hidden = nn.LazyLinear(6)
        self.again = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)
        self.temperature = nn.Parameter(torch.tensor([0.3]))
        self.again.weight = nn.Parameter(torch.empty(6, 6))
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.again.weight
        nn.init.normal_(self.again.weight, std=0.4)
        self.features[0].weight.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.tanh(self.hidden(self.relu(self.features(images)).flatten(1)))
        return self.head(torch.tanh(self.tied(torch.tanh(self.again(hidden))))) / self.temperature


def make_net(seed: int = 0) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Net()
        for _ in range(3):
            net(torch.rand(8, 3, *SIZE))
    return net.eval()


METHODS = {"gradcam": gradcam, "hirescam": hirescam}


def explained(net: nn.Module, sign: Any = "positive", **more: Callable[[Tensor], Tensor]) -> Explained:
    """Both methods on the network's `relu`, and `more` that see the images alone."""

    def maps(images: Tensor, classes: Tensor) -> Tensor:
        taken = capture(net, images, ClassMargin(classes), "relu")
        found = [method(taken.activations, taken.gradients, sign) for method in METHODS.values()]
        size = taken.activations.shape[2:]
        return torch.stack(found + [nn.functional.adaptive_avg_pool2d(m(images), size)[:, 0] for m in more.values()])

    return Explained(
        (*METHODS, *more), maps, lambda images: net(images), lambda outputs, y: ClassMargin(y)(outputs), sign
    )


def edges(images: Tensor) -> Tensor:
    grey = images.mean(1, keepdim=True)
    right, down = grey.diff(dim=3, prepend=grey[..., :1]), grey.diff(dim=2, prepend=grey[..., :1, :])
    return right.abs() + down.abs()


def by_hand(net: Net, image: Tensor, y: int, sign: Any, method: Any, seed: int) -> dict[str, float]:
    """Each metric of one image by one method, in plain numbers."""
    labels = torch.tensor([y])

    def margin(picture: Tensor) -> float:
        outputs = net(picture[None])[0]
        return float(outputs[y] - max(outputs[k] for k in range(3) if k != y))

    def probability(picture: Tensor) -> float:
        p = float(net(picture[None]).softmax(1)[0, y])
        return 1 - p if sign == "negative" else p

    def heatmap(model: nn.Module) -> Tensor:
        taken = capture(model, image[None], ClassMargin(labels), "relu")
        found: Tensor = method(taken.activations, taken.gradients, sign)[0]
        return found

    def upsampled(coarse: Tensor) -> Tensor:
        return nn.functional.interpolate(coarse[None, None], SIZE, mode="bilinear")[0, 0]

    coarse = heatmap(net)
    if not coarse.max() > coarse.min():
        return dict.fromkeys(EXPLAINER_METRICS, NAN)
    fill = blurred(image[None])[0]
    means, drops = [], []
    for r, c in np.ndindex(7, 7):
        inside = [(y * 7 // SIZE[0], x * 7 // SIZE[1]) == (r, c) for y, x in np.ndindex(*SIZE)]
        cell = torch.tensor(inside).view(SIZE)
        means.append(float(upsampled(coarse)[cell].mean()))
        drop = margin(image) - margin(torch.where(cell, fill, image))
        drops.append({"positive": drop, "negative": -drop, "absolute": abs(drop)}[sign])
    chance = torch.rand(coarse.shape, generator=torch.Generator().manual_seed(seed))
    found = {"occlusion_correlation": float(spearmanr(means, drops)[0])}
    curves = {}
    for name, values in (("map", coarse), ("chance", chance)):
        order = ranking(upsampled(values).flatten()[None], seed=0)[0].argsort().tolist()
        curves[name, "insertion"] = area(probability, image, fill, order, True)
        curves[name, "deletion"] = area(probability, image, fill, order, False)
    found |= {"insertion_auc": curves["map", "insertion"], "deletion_auc": curves["map", "deletion"]}
    found["insertion_gain"] = curves["map", "insertion"] - curves["chance", "insertion"]
    found["deletion_gain"] = curves["chance", "deletion"] - curves["map", "deletion"]
    alike = []
    for k in range(DRAWS):
        other = copy.deepcopy(net)
        generator = torch.Generator().manual_seed(DRAWS * seed + k)
        for p in other.parameters():
            if p.numel() > 1:
                rms = math.sqrt(float((p.double() ** 2).mean()))
                p.data = torch.empty_like(p).normal_(generator=generator) * rms
        random_map = heatmap(other)
        if random_map.max() > random_map.min():
            alike.append(float(spearmanr(random_map.flatten(), coarse.flatten())[0]))
    return found | {"randomisation_similarity": float(np.mean(alike)) if alike else NAN}


@pytest.mark.parametrize("sign", ["positive", "negative", "absolute"])
def test_every_measure_of_every_image_is_what_loops_give(sign: Any) -> None:
    net, images, labels = make_net(), random(4, 3, *SIZE), torch.tensor([0, 1, 2, 0])
    seeds = [11, 4, 7, 0]
    with borrowed(net) as lent:
        found = fitness(lent, explained(net, sign), images, labels, seeds, 16)
        expected = [
            [by_hand(net, images[i], int(labels[i]), sign, method, seeds[i]) for i in range(4)]
            for method in METHODS.values()
        ]
    assert found.shape == (6, 2, 4)
    for k, metric in enumerate(EXPLAINER_METRICS):
        values = [[row[metric] for row in rows] for rows in expected]
        np.testing.assert_allclose(found[k], values, atol=2e-3, err_msg=metric)
        assert np.isfinite(values).sum() >= 4
    assert not torch.allclose(found[0, 0], found[0, 1], atol=0.02, equal_nan=True)  # the methods differ


def test_an_image_is_measured_alike_alone_and_in_any_batch() -> None:
    net, images, labels, seeds = make_net(), random(5, 3, *SIZE), torch.tensor([0, 1, 2, 0, 1]), [3, 1, 4, 0, 5]
    with borrowed(net) as lent:
        whole = fitness(lent, explained(net), images, labels, seeds, 100)
        alone = [fitness(lent, explained(net), images[[i]], labels[[i]], [seeds[i]], 3) for i in range(5)]
    np.testing.assert_allclose(torch.cat(alone, dim=2), whole, atol=1e-4)


def test_a_clip_of_one_picture_is_measured_like_the_picture() -> None:
    net, images, labels = make_net(), random(3, 3, *SIZE), torch.tensor([0, 1, 2])
    still = explained(net)

    def maps(clips: Tensor, classes: Tensor) -> Tensor:
        first = still.maps(clips[:, :, 0], classes)
        return torch.stack([0 * first, 3 * first, 0 * first], dim=2)

    clip = Explained(still.methods, maps, lambda clips: net(clips.mean(dim=2)), still.score, "positive")
    with borrowed(net) as lent:
        expected = fitness(lent, still, images, labels, [0, 1, 2], 16)
        found = fitness(lent, clip, images[:, :, None].expand(-1, -1, 3, -1, -1), labels, [0, 1, 2], 16)
    # The clip's random weights change its maps as the picture's do, but their ranks are taken over all frames.
    np.testing.assert_allclose(found[:-1], expected[:-1], atol=1e-3)
    assert found.shape == expected.shape and (found[-1].isfinite() == expected[-1].isfinite()).all()


def test_silent_maps_and_outputs_that_are_no_numbers_are_not_valid() -> None:
    net, images, labels = make_net(), random(3, 3, *SIZE), torch.tensor([0, 1, 2])
    good = explained(net, edges=edges)

    def maps(batch: Tensor, classes: Tensor) -> Tensor:
        found = good.maps(batch, classes).clone()
        found[0, classes == 0] = 0
        found[0, classes == 1] = 2.5
        found[1, classes == 1] = NAN
        return found

    def outputs(batch: Tensor) -> Tensor:
        return torch.where((batch.flatten(1) == images[2].flatten()).all(1)[:, None], NAN, net(batch))

    with borrowed(net) as lent:
        found = fitness(lent, Explained(good.methods, maps, good.outputs, good.score, "positive"), images, labels,
                        [0, 1, 2], 16)  # fmt: skip
        assert found[:, 0, :2].isnan().all() and found[:, 1, 1].isnan().all()
        assert found[:5, 0, 2].isfinite().all() and found[:, 2].isfinite().all()
        broken = fitness(lent, Explained(good.methods, good.maps, outputs, good.score, "positive"), images, labels,
                         [0, 1, 2], 16)  # fmt: skip
    assert broken[:5, :, 2].isnan().all() and broken[:5, 2, :2].isfinite().all()


def test_estimates_are_means_over_valid_images() -> None:
    values = np.random.default_rng(0).normal(size=(6, 3, 30)).astype(np.float32)
    values[0, 0, ::2], values[1, 1], values[5, 2, 1:] = NAN, NAN, NAN
    found = fitness_estimates(values, ("a", "b", "c"), seed=0)
    assert [(e.metric, e.method) for e in found] == [(m, x) for m in EXPLAINER_METRICS for x in "abc"]
    for e in found:
        column = values[EXPLAINER_METRICS.index(e.metric), "abc".index(e.method)]  # type: ignore[arg-type]
        valid = column[np.isfinite(column)]
        assert e.n == len(valid) and (e.region, e.class_name, e.group, e.age) == (None, None, None, 0)
        if len(valid) > 1:
            half = float(student.ppf(0.975, len(valid) - 1) * valid.std(ddof=1)) / math.sqrt(len(valid))
            assert e.value == pytest.approx(valid.mean(), abs=1e-5)
            assert e.low == pytest.approx(valid.mean() - half, abs=0.3 * half)
            assert e.high == pytest.approx(valid.mean() + half, abs=0.3 * half)
        else:
            assert not e.measured and e.reason and (e.value is None) == (e.n == 0)


# The weights.


def test_weights_are_given_back_bit_for_bit_after_an_exception_too() -> None:
    net = make_net()
    optimizer = torch.optim.AdamW(net.parameters())
    inputs = random(2, 3, *SIZE).requires_grad_()
    waiting = net(inputs).sum()
    before = {name: (p, p.data_ptr(), p._version, p.detach().clone()) for name, p in net.named_parameters()}
    buffers = {name: b.clone() for name, b in net.named_buffers()}

    def draw_and_fail(seed: int) -> None:
        with redrawn_weights(net) as redraw:
            redraw(seed)
            for name, (p, _, _, kept) in before.items():
                # A scalar is left as it is, and so is what is zero everywhere.
                moved = float((p != kept).float().mean())
                assert moved == (0 if p.numel() == 1 or not kept.any() else 1), name
                if p.numel() > 50:
                    assert float(p.detach().square().mean() / kept.square().mean()) == pytest.approx(1, abs=0.5)
            assert net.tied.weight is net.again.weight
            raise KeyboardInterrupt

    for seed in range(2):
        with pytest.raises(KeyboardInterrupt):
            draw_and_fail(seed)
    after = dict(net.named_parameters())
    assert after.keys() == before.keys()
    for name, (p, address, version, kept) in before.items():
        assert after[name] is p and p.data_ptr() == address and p._version == version
        assert torch.equal(p.view(torch.int32), kept.view(torch.int32))
    assert optimizer.param_groups[0]["params"][0] is net.temperature
    assert all(torch.equal(b, buffers[name]) for name, b in net.named_buffers())
    # A graph that was waiting is not disturbed.
    waiting.backward()
    again = inputs.detach().clone().requires_grad_()
    net(again).sum().backward()
    assert torch.equal(inputs.grad, again.grad)  # type: ignore[arg-type]


def test_an_audit_that_fails_with_random_weights_gives_the_models_own_back() -> None:
    class Refuses(Learned):
        own = (-1.0, 0.5, 0.5)

        def forward(self, images: Tensor) -> Tensor:
            if tuple(self.filter.flatten().tolist()) != self.own:
                raise ArithmeticError
            return super().forward(images)

    net = Refuses()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    with pytest.raises(ArithmeticError):
        audit_model(net, marked())
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())


def test_weights_are_drawn_by_their_seed() -> None:
    net = make_net()

    def drawn(seed: int) -> Tensor:
        redraw(seed)
        return torch.cat([p.detach().flatten() for p in net.parameters()])

    with redrawn_weights(net) as redraw:
        one, two, same = drawn(1), drawn(2), drawn(1)
    assert torch.equal(one, same) and not torch.equal(one, two)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_other_precisions_and_of_inference_mode(dtype: torch.dtype) -> None:
    with torch.inference_mode(dtype is torch.bfloat16):
        layer = nn.Linear(40, 40).to(dtype)
    before = layer.weight.detach().clone()
    with redrawn_weights(layer) as redraw:
        redraw(0)
        assert layer.weight.dtype == dtype and (layer.weight != before).float().mean() > 0.9
        assert float(layer.weight.detach().float().std() / before.float().std()) == pytest.approx(1, abs=0.15)
    assert torch.equal(layer.weight, before)


def test_without_weights_nothing_can_be_drawn_and_the_fitness_is_unknown() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu = nn.ReLU()

        def forward(self, images: Tensor) -> Tensor:
            return self.relu(images).mean(dim=(2, 3))

    net = Bare()
    with borrowed(net) as lent:
        found = fitness(lent, explained(net), random(3, 3, *SIZE), torch.tensor([0, 1, 2]), [0, 1, 2], 16)
    assert found[-1].isnan().all() and found[0].isfinite().any()


# Planted and innocent.


@cache
def trained() -> tuple[Net, Tensor, Tensor]:
    """A network that tells where the chequered patch is, with images and labels that it has not seen."""

    def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        images = torch.rand(count, 3, *SIZE, generator=generator) * 0.6
        labels = torch.randint(0, 3, (count,), generator=generator)
        for image, y in zip(images, labels.tolist(), strict=True):
            top, left = ((1, 1), (1, 11), (14, 6))[y]
            image[:, top : top + 6 : 2, left : left + 6 : 2] += 0.8
            image[:, top + 1 : top + 6 : 2, left + 1 : left + 6 : 2] += 0.8
        return images, labels

    generator = torch.Generator().manual_seed(1)
    net = make_net(3).train()
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(60):
        images, labels = draw(48, generator)
        loss = nn.functional.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    images, labels = draw(16, generator)
    with torch.no_grad():
        assert (net.eval()(images).argmax(1) == labels).float().mean() > 0.9
    return net, images, labels


def test_a_method_that_ignores_the_model_is_unfit_and_gradcam_is_not() -> None:
    net, images, labels = trained()
    ramp = torch.linspace(0, 1, SIZE[1]).expand(*SIZE)
    ways = {"edges": edges, "ramp": lambda images: ramp.expand(len(images), 1, *SIZE)}
    with borrowed(net) as lent:
        values = fitness(lent, explained(net, **ways), images, labels, range(16), 32)
    estimates = fitness_estimates(values.numpy(), (*METHODS, *ways), seed=0)
    verdicts = {x.method: x.fit for x in explainers(estimates, Policy())}
    assert verdicts == {"gradcam": True, "hirescam": True, "edges": False, "ramp": False}
    by_name = {(e.metric, e.method): e for e in estimates}
    assert by_name["randomisation_similarity", "edges"].value == pytest.approx(1)
    # The map of a network with one thing to look at agrees with what removing it does; the same map for all does not.
    for metric in ("occlusion_correlation", "insertion_gain", "deletion_gain"):
        found, planted = by_name[metric, "hirescam"], by_name[metric, "ramp"]
        assert found.low is not None and planted.low is not None and planted.value is not None
        assert found.low > max(0, planted.value) and planted.low < 0


# Within an audit.


class Fixed(nn.Module):
    """Sees the cyan of the mark through a filter that is no weight; only the head is learned.

    Its maps are the same picture whatever the head is: `spread` wide, they are no evidence of the model.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("filter", torch.tensor([-1.0, 0.5, 0.5])[None, :, None, None])
        self.relu = nn.ReLU()
        self.head = nn.Linear(1, 2)
        self.head.weight.data = torch.tensor([[-9.0], [9.0]])
        self.head.bias.data = torch.tensor([0.2, -0.2])

    def forward(self, images: Tensor) -> Tensor:
        seen = self.relu(nn.functional.conv2d(images, self.filter))  # type: ignore[arg-type]
        return self.head(seen.mean(dim=(2, 3)))


class Learned(Fixed):
    """The same decision, and the filter is a weight."""

    def __init__(self) -> None:
        super().__init__()
        kept = self._buffers.pop("filter")
        self.filter = nn.Parameter(kept)  # type: ignore[arg-type]


@cache
def marked(each: int = 30) -> AuditDataset:
    """Noise with a cyan mark on half of the images of either class: a model that reads it is wrong on the others."""
    rng = np.random.default_rng(0)
    samples = []
    for label, mark, number in [(y, m, i) for y in (0, 1) for m in (0, 1) for i in range(each)]:
        picture = rng.integers(0, 20, (12, 12, 3))
        if mark:
            picture[8:11, 7:11] = (20, 240, 240)
        mask = torch.zeros(12, 12, dtype=torch.bool)
        mask[8:11, 7:11] = True
        image = torch.from_numpy(picture.astype(np.uint8)).permute(2, 0, 1).contiguous()
        samples.append(
            AuditSample(image, label, {"mark": mask}, {"mark": ("no", "yes")[mark]}, f"{label}{mark}{number}")
        )
    return AuditDataset(samples, spurious=["mark"])


RULES = {
    "rules": [
        {"metric": "verdict", "region": "spurious", "forbid": ["reliance"]},
        {"metric": "enrichment", "region": "mark", "max": 100, "name": "far from the limit"},
        {"metric": "enrichment", "region": "mark", "max": 100, "method": "gradcam", "name": "one method"},
        {"metric": "accuracy", "min": 0.1, "name": "accuracy"},
    ]
}


def outcomes(result: AuditSummary) -> dict[str, set[Outcome]]:
    names = {c.rule for c in result.judgement.checks}
    return {name: {c.outcome for c in result.judgement.checks if c.rule == name} for name in names}


def test_an_unfit_method_is_no_evidence_and_never_a_pass(tmp_path: Path) -> None:
    # What a removal shows needs no heatmap: here nothing is removed.
    result = audit_model(Fixed(), marked(), policy=RULES, plan=AuditPlan(intervention_samples=0), out=tmp_path)
    for method in METHODS:
        assert result.estimate("randomisation_similarity", method=method).value == pytest.approx(1, abs=1e-3)
    (region, attribute) = result.judgement.findings
    assert (region.kind, region.verdict) == ("region", Verdict.INCONCLUSIVE)
    assert "the gradcam maps are unfit as evidence" in region.sentence.lower() and "hirescam" in region.sentence
    assert Verdict.RELIANCE in region.possible
    assert [e.metric for e in region.evidence] == ["accuracy_gap", "randomisation_similarity"]
    # The accuracy differs, whatever the heatmaps are worth; whether they would show more is unknown.
    assert (attribute.kind, attribute.verdict) == ("attribute", Verdict.INCONCLUSIVE)
    assert attribute.possible == (Verdict.RELIANCE, Verdict.SUSPECTED)
    unknown = {Outcome.INCONCLUSIVE}
    assert outcomes(result) == {
        "verdict spurious != reliance": unknown,
        "far from the limit": unknown,
        "one method": unknown,
        "accuracy": {Outcome.HELD},
    }
    run = read_run(tmp_path)
    assert run.audits[0].estimates == result.estimates
    assert run_gate(run).exit_code == 3 and "unfit" in str(run_gate(run).judgement)
    # Untested, or with a filter that is learned, the same maps are evidence.
    for net, samples in ((Fixed(), 0), (Learned(), 16)):
        known = audit_model(
            net, marked(), policy=RULES, plan=AuditPlan(fitness_samples=samples, intervention_samples=0)
        )
        assert known.judgement.findings[0].verdict is Verdict.RELIANCE
        assert known.judgement.outcome is Outcome.VIOLATED
        assert outcomes(known)["far from the limit"] == {Outcome.HELD}


def learned(outputs: int) -> Learned:
    """With one logit or two."""
    net = Learned()
    if outputs == 1:
        net.head.weight.data, net.head.bias.data = torch.tensor([[18.0]]), torch.tensor([-0.4])
    return net


def fitness_of(result: AuditSummary) -> list[tuple[Any, ...]]:
    return [
        (e.metric, e.method, e.value, e.low, e.high, e.n) for e in result.estimates if e.metric in EXPLAINER_METRICS
    ]


def relabelled(labels: Sequence[int]) -> AuditDataset:
    samples = [replace(s, label=int(y)) for s, y in zip(marked().samples, labels, strict=True)]
    return AuditDataset(samples, spurious=["mark"])


@pytest.mark.parametrize("outputs", [1, 2])
def test_what_was_predicted_on_the_whole_image_is_explained_of_each_variant(outputs: int) -> None:
    net = learned(outputs)
    found = audit_model(net, marked(), plan=AuditPlan(target="predicted", fitness_samples=120))
    predicted = found.scores.predictions
    assert 20 < (predicted != marked().labels).sum() < 100
    expected = audit_model(net, relabelled(predicted), plan=AuditPlan(target="label", fitness_samples=120))
    assert fitness_of(found) == fitness_of(expected)
    assert fitness_of(found) != fitness_of(
        audit_model(net, marked(), plan=AuditPlan(target="label", fitness_samples=120))
    )


def test_a_targets_own_score_is_explained() -> None:
    def other_class(labels: Tensor) -> ClassLogit:
        return ClassLogit(1 - labels)

    found = audit_model(learned(2), marked(), plan=AuditPlan(target=other_class, fitness_samples=120))
    expected = audit_model(
        learned(2), relabelled(1 - marked().labels), plan=AuditPlan(target="label", fitness_samples=120)
    )
    # The maps and what occlusion does are of the target's score; the probability is the label's all the same.
    for metric in ("occlusion_correlation", "randomisation_similarity"):
        one, two = (result.estimate(metric, method="gradcam") for result in (found, expected))
        assert (one.value, one.n) == (two.value, two.n) and one.measured
    assert found.estimate("insertion_gain", method="gradcam").value == pytest.approx(
        -(expected.estimate("insertion_gain", method="gradcam").value or 0), abs=1e-6
    )


def test_of_audits_every_nth_tests_the_methods_and_the_others_carry_it_on() -> None:
    auditor = Auditor(scenes(), AuditPlan(fitness_samples=4, fitness_every=3))
    net = Learned()
    results: list[AuditResult] = [auditor.run(net, trigger="reference")]
    assert not any(e.metric in EXPLAINER_METRICS for e in results[0].estimates)
    for step in range(1, 6):
        net.head.weight.data *= 1.1
        results.append(auditor.run(net, step=step, previous=results[-1]))
    tests = [[e for e in r.estimates if e.metric in EXPLAINER_METRICS] for r in results[1:]]
    assert [{e.age for e in test} for test in tests] == [{0}, {1}, {2}, {0}, {1}]
    values = [[e.value for e in test] for test in tests]
    assert values[0] == values[1] == values[2] != values[3] == values[4]
    assert all(len(test) == 12 for test in tests)
    # An audit that knows of none before it tests; the age is read back, and said.
    assert {e.age for e in auditor.run(net).estimates} == {0}
    carried = next(e for e in tests[2] if e.measured)
    assert str(carried).endswith(", 2 audits ago") and "ago" not in str(tests[3][0])
    without = Auditor(scenes(), AuditPlan(fitness_samples=0)).run(net)
    assert not any(e.metric in EXPLAINER_METRICS for e in without.estimates)


def test_the_forward_context_is_entered_for_what_is_tested() -> None:
    depth: list[bool] = []

    class Watched(Learned):
        def forward(self, images: Tensor) -> Tensor:
            depth.append(bool(inside))
            return super().forward(images)

    inside: list[bool] = []

    class Context:
        def __enter__(self) -> None:
            inside.append(True)

        def __exit__(self, *_: Any) -> None:
            inside.pop()

    net = Watched()
    auditor = Auditor(scenes(1), AuditPlan(fitness_samples=2))
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    auditor.run(net, forward_context=Context)
    assert len(depth) > 2 * 2 * DRAWS and all(depth)
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())


@pytest.mark.usefixtures("without_page")
def test_a_training_tests_the_methods_now_and_then_and_at_its_end(tmp_path: Path) -> None:
    plan = AuditPlan(fitness_samples=3, fitness_every=3)
    callback = BiasAuditCallback(scenes(), dirpath=tmp_path / "run", plan=plan)
    fit(trainer(tmp_path, callback, max_epochs=6))
    audits = read_run(tmp_path / "run").audits

    def ages(audit: AuditSummary) -> set[int]:
        return {e.age for e in audit.estimates if e.metric in EXPLAINER_METRICS}

    assert [a.trigger for a in audits] == ["reference", *["validation"] * 6]
    assert [ages(a) for a in audits] == [set(), {0}, {1}, {2}, {0}, {1}, {0}]
    # Another training with the same callback begins anew.
    fit(trainer(tmp_path, callback, max_epochs=2))
    assert [ages(a) for a in read_run(tmp_path / "run").audits] == [set(), {0}, {0}]

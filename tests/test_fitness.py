"""Every measure of an explanation method's fitness, against loops, SciPy and nets of which the truth is known."""

from __future__ import annotations

import copy
import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from fitness_nets import METHODS, SIZE, Net, area, explained, make_net, random
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from scipy.stats import t as student
from torch import Tensor, nn

from bias_audit.attribution.borrow import borrowed
from bias_audit.attribution.capture import capture
from bias_audit.attribution.targets import ClassMargin
from bias_audit.evidence.fitness import DRAWS, Explained, class_probability, fitness, fitness_estimates, spearman
from bias_audit.evidence.perturbation import blurred, ranking
from bias_audit.policies.policy import Policy
from bias_audit.terms import EXPLAINER_METRICS
from bias_audit.verdicts.explainers import explainers

NAN = float("nan")


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


def test_the_probability_of_the_class() -> None:
    outputs, classes = torch.tensor([[1.0, 3.0, 0.0], [2.0, 2.0, 2.0]]), torch.tensor([1, 2])
    expected = [math.exp(3) / (math.exp(1) + math.exp(3) + 1), 1 / 3]
    assert class_probability(outputs, classes).tolist() == pytest.approx(expected)
    one_logit = class_probability(torch.tensor([[2.0], [2.0]]), torch.tensor([0, 1]))
    assert one_logit.tolist() == pytest.approx([1 / (1 + math.exp(2)), 1 / (1 + math.exp(-2))])


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

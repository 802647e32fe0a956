"""Clusters of heatmaps: a planted group is found and comes first, one continuum stays one, and every formula anew."""

from __future__ import annotations

import math
import re
import sys
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from synthetic import make_run
from torch import Tensor, nn

from bias_audit import AuditDataset, AuditPlan, AuditSample, audit_model, explain
from bias_audit.cli import main
from bias_audit.evidence.clusters import (
    FEWEST,
    MARGIN,
    NEAREST,
    ClassClusters,
    Cluster,
    Contrast,
    layout,
    ranked,
    spray,
    stands_apart,
)
from bias_audit.records.runs import read_run
from bias_audit.report.clusters import draw_clusters, run_clusters
from bias_audit.terms import Estimate, Subjects

Array = np.ndarray[Any, Any]
ONE = Subjects((), (), ("cat",))
SIDE = 7


def bumps(y: Array, x: Array, width: Array | float, side: int = SIDE) -> Array:
    """A bump per sample; places from 0 to 1."""
    rows, columns = np.mgrid[:side, :side] / (side - 1)
    away = (rows - y[:, None, None]) ** 2 + (columns - x[:, None, None]) ** 2
    return np.exp(-away / (2 * np.broadcast_to(width, y.shape)[:, None, None] ** 2))


def speckled(rng: np.random.Generator, maps: Array) -> Array:
    return maps * rng.gamma(4, 0.25, maps.shape) + 0.1 * rng.random(maps.shape)


def centred(rng: np.random.Generator, n: int) -> Array:
    return speckled(rng, bumps(np.full(n, 0.5), np.full(n, 0.5), 0.2))


def anywhere(rng: np.random.Generator, n: int) -> Array:
    return speckled(rng, bumps(rng.uniform(0.2, 0.8, n), rng.uniform(0.2, 0.8, n), rng.uniform(0.12, 0.22, n)))


def scattered(rng: np.random.Generator, n: int) -> Array:
    return speckled(rng, bumps(rng.normal(0.5, 0.15, n), rng.normal(0.5, 0.15, n), 0.18))


def sparse(rng: np.random.Generator, n: int) -> Array:
    return np.maximum(rng.normal(-1, 1, (n, SIDE, SIDE)), 0)


def with_corner(rng: np.random.Generator, maps: Array, share: Array) -> Array:
    n = len(maps)
    corner = speckled(rng, bumps(np.full(n, 0.05), np.full(n, 0.05), 0.12))
    share = share[:, None, None]
    return (1 - share) * maps / maps.sum((1, 2), keepdims=True) + share * corner / corner.sum((1, 2), keepdims=True)


def planted(rng: np.random.Generator, n: int, kind: Callable[[np.random.Generator, int], Array], part: float) -> Array:
    """The first `part` of the maps have most of their energy in the corner."""
    share = np.where(np.arange(n) < round(part * n), rng.uniform(0.6, 0.9, n), rng.uniform(0, 0.05, n))
    return with_corner(rng, kind(rng, n), share)


def alone(maps: Array, correct: Array | None = None, seed: int = 0) -> ClassClusters:
    """The maps as one class, nothing else known of them."""
    n = len(maps)
    right = np.ones(n, dtype=bool) if correct is None else correct
    (found,) = spray(maps, np.zeros(n, np.int64), right, np.empty((n, 0), np.str_), ONE, seed=seed)
    return found


def members(found: ClassClusters) -> list[set[int]]:
    return [set(c.members.tolist()) for c in found.clusters]


@pytest.mark.parametrize("kind", [centred, anywhere, scattered, sparse])
def test_a_homogeneous_class_is_one_cluster(kind: Callable[[np.random.Generator, int], Array]) -> None:
    found = [alone(kind(np.random.default_rng(seed), n)) for seed in range(3) for n in (60, 120)]
    assert [len(one.clusters) for one in found] == [1] * 6
    assert ranked(found) == ()
    for one in found:
        (cluster,) = one.clusters
        assert not one.reason and len(cluster.members) == len(one.samples) and cluster.contrasts == ()


def test_the_largest_eigengap_would_split_a_continuum() -> None:
    """Why the number of clusters is not taken from the eigengap alone."""
    found = [alone(anywhere(np.random.default_rng(seed), 120)) for seed in range(4)]
    assert all(np.argmax(np.diff(one.eigenvalues)) + 1 > 1 for one in found)
    assert all(len(one.clusters) == 1 for one in found)


@pytest.mark.parametrize(("kind", "part", "n"), [(centred, 0.33, 60), (centred, 0.1, 200), (anywhere, 0.33, 200)])
def test_a_planted_group_is_found(kind: Callable[[np.random.Generator, int], Array], part: float, n: int) -> None:
    for seed in range(3):
        found = alone(planted(np.random.default_rng(seed), n, kind, part), seed=seed)
        marked = set(range(round(part * n)))
        assert members(found) == [set(range(n)) - marked, marked]
        assert [c.number for c in found.clusters] == [1, 2] and found.cluster.tolist() == [2] * len(marked) + [1] * (
            n - len(marked)
        )
        corner = [float(c.mean_map[:2, :2].sum()) for c in found.clusters]
        assert corner[1] > 0.3 and corner[0] < 0.1
        # Objects are anywhere, the corner is not: where nothing else is known, the tighter cluster comes first.
        assert kind is centred or ranked([found])[0].number == 2


def test_three_groups() -> None:
    rng = np.random.default_rng(0)
    maps = planted(rng, 150, centred, 1 / 3)
    maps[100:] = np.flip(planted(rng, 50, centred, 1.0), axis=(1, 2))
    assert sorted(map(sorted, members(alone(maps)))) == [list(range(i, i + 50)) for i in (0, 50, 100)]


def test_a_group_no_larger_than_a_neighbourhood_is_not_found() -> None:
    assert len(alone(planted(np.random.default_rng(0), 80, centred, 0.1)).clusters) == 1


def planted_classes(
    seed: int = 0, kind: Callable[[np.random.Generator, int], Array] = scattered
) -> tuple[Array, Array, Array, Array, Subjects]:
    """Of class 0 the first third is planted: often wrong, mostly photographed in the city; class 1 is clean."""
    rng = np.random.default_rng(seed)
    n = 120
    maps = np.concatenate([planted(rng, n, kind, 1 / 3), kind(rng, n)])
    labels = np.repeat([0, 1], n)
    marked = np.arange(2 * n) < n // 3
    correct = rng.random(2 * n) < np.where(marked, 0.5, 0.95)
    place = np.where(rng.random(2 * n) < np.where(marked, 0.9, 0.3), "city", "land")
    weather = rng.choice(["sun", "rain", "snow"], 2 * n)
    place[rng.random(2 * n) < 0.1] = ""
    subjects = Subjects((), (("place", ("city", "land")), ("weather", ("rain", "snow", "sun"))), ("cat", "dog"))
    return maps.astype(np.float16), labels, correct, np.stack([place, weather], 1), subjects


def test_departures_are_named_and_ranked_first() -> None:
    maps, labels, correct, attributes, subjects = planted_classes()
    cat, dog = spray(maps, labels, correct, attributes, subjects, seed=0)
    assert [len(cat.clusters), len(dog.clusters)] == [2, 1]
    first, second = ranked([cat, dog])
    assert set(first.members) >= set(range(40)) and len(first.members) <= 45
    assert sorted({*first.members, *second.members}) == list(range(120))
    shown = {c.what for c in first.contrasts if c.shown}
    assert shown == {"correct", "place=city"}
    # Two values ask once, three ask each.
    assert [c.what.partition("=")[0] for c in first.contrasts] == ["correct", "place", *["weather"] * 3]
    assert first.departure is not None and first.departure.what == "place=city"
    assert "place=city" in str(first.departure) and "% elsewhere (p < 0.0001)" in str(first.departure)


def test_contrasts_against_counting() -> None:
    maps, labels, correct, attributes, subjects = planted_classes(1)
    found = spray(maps, labels, correct, attributes, subjects, seed=0)
    raw: list[float] = []
    got: list[float] = []
    for one in found:
        for cluster in one.clusters if len(one.clusters) > 1 else ():
            here = np.isin(np.arange(len(labels)), cluster.members)
            others = np.isin(np.arange(len(labels)), one.samples) & ~here
            assert cluster.accuracy.value == pytest.approx(sum(correct[here]) / sum(here))
            for contrast in cluster.contrasts:
                attribute, _, value = contrast.what.partition("=")
                column = ["place", "weather"].index(attribute) if value else None
                known = np.ones(len(labels), bool) if column is None else attributes[:, column] != ""
                holds = correct if column is None else attributes[:, column] == value
                a, b = int((here & known & holds).sum()), int((here & known).sum())
                c, d = int((others & known & holds).sum()), int((others & known).sum())
                assert contrast.here == pytest.approx(a / b) and contrast.elsewhere == pytest.approx(c / d)
                raw.append(fisher(a, b, c, d))
                got.append(contrast.p)
    order = sorted(range(len(raw)), key=raw.__getitem__)
    highest = 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, raw[i] * (len(raw) - rank)))
        assert got[i] == pytest.approx(highest, rel=1e-6)
    assert len(raw) == 10


def fisher(a: int, b: int, c: int, d: int) -> float:
    """`a` of `b` against `c` of `d`: the chance of a table as rare as this one or rarer, all margins as they are."""
    hits = a + c
    ways = [math.comb(b, x) * math.comb(d, hits - x) for x in range(hits + 1) if x <= b and hits - x <= d]
    here = math.comb(b, a) * math.comb(d, c)
    return sum(w for w in ways if w <= here * (1 + 1e-9)) / math.comb(b + d, hits)


def test_separation_nearest_and_mean_map_one_sample_at_a_time() -> None:
    maps = planted(np.random.default_rng(3), 90, scattered, 1 / 3)
    found = alone(maps)
    assert len(found.clusters) == 2
    points = {int(i): p for i, p in zip(found.samples, found.points, strict=True)}
    for cluster in found.clusters:
        widths = []
        for i in cluster.members.tolist():
            own = [math.dist(points[i], points[j]) for j in cluster.members.tolist() if j != i]
            other = [math.dist(points[i], points[j]) for c in found.clusters if c is not cluster for j in c.members]
            a, b = sum(own) / len(own), sum(other) / len(other)
            widths.append((b - a) / max(a, b))
        assert cluster.separation == pytest.approx(sum(widths) / len(widths))
        centre = sum(points[i] for i in cluster.members.tolist()) / len(cluster.members)
        away = sorted(cluster.members.tolist(), key=lambda i: math.dist(points[i], centre))
        assert cluster.nearest.tolist() == away[:NEAREST]
        mean = sum(maps[i] / maps[i].sum() for i in cluster.members) / len(cluster.members)
        np.testing.assert_allclose(cluster.mean_map, mean, rtol=1e-6)
        assert cluster.mean_map.sum() == pytest.approx(1)


def test_smoothing_does_not_move_energy() -> None:
    """A map with one hot cell stays hottest there, whatever its resolution; near misses are nearer than far ones."""
    for side in (7, 14, 28):
        maps = np.zeros((FEWEST, side, side))
        maps[np.arange(FEWEST), side // 2, np.arange(FEWEST) % 4 * side // 7] = 1
        points = alone(maps).points.reshape(FEWEST, side, side)
        assert (points.reshape(FEWEST, -1).argmax(1) == maps.reshape(FEWEST, -1).argmax(1)).all()
        steps = [np.linalg.norm(points[0] - points[i]) for i in range(4)]
        assert all(a < b for a, b in pairwise(steps))
        np.testing.assert_allclose(np.linalg.norm(points, axis=(1, 2)), 1)


def naive_stands_apart(graph: Array, inside: list[int]) -> bool:
    """Every cut along the Fiedler vector counted edge by edge."""
    n = len(inside)
    if n < 4:
        return False
    degree = [max(1.0, sum(graph[i, j] for j in inside)) for i in inside]
    laplacian = np.array(
        [[(a == b) - graph[i, j] / math.sqrt(degree[a] * degree[b]) for b, j in enumerate(inside)]
         for a, i in enumerate(inside)]
    )  # fmt: skip
    vector = np.linalg.eigh(laplacian)[1][:, 1]
    order = sorted(range(n), key=lambda a: vector[a] / math.sqrt(degree[a]))
    cuts = []
    for left in range(math.ceil(n / 4), math.floor(3 * n / 4) + 1):
        sides = order[:left], order[left:]
        cuts.append(sum(graph[inside[a], inside[b]] for a in sides[0] for b in sides[1]))
    out = sum(graph[i, j] for i in inside for j in range(len(graph)) if j not in inside)
    return bool(out < MARGIN * min(cuts))


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_standing_apart_against_counting_edges(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, size = 24, int(rng.integers(2, 20))
    # Weights without ties, so that there is one Fiedler vector; few edges between the two parts, or many.
    inside = np.arange(n) < size
    density = np.where(inside[:, None] == inside, 1.0, rng.choice([0.0, 0.05, 0.3]))
    upper = np.triu(rng.uniform(0.5, 1, (n, n)) * (rng.random((n, n)) < density), 1)
    graph = upper + upper.T
    assert stands_apart(graph, inside) == naive_stands_apart(graph, list(range(size)))


def test_silent_and_broken_maps_are_left_out_and_counted() -> None:
    rng = np.random.default_rng(0)
    maps = planted(rng, 80, centred, 0.4)
    spoiled = np.concatenate([maps, np.zeros((3, SIDE, SIDE)), np.full((1, SIDE, SIDE), np.nan), maps[:1]])
    spoiled[-1, 0, 0] = np.inf
    found = alone(spoiled)
    assert found.silent == 5 and found.samples.tolist() == list(range(80))
    assert members(found) == members(alone(maps)) and len(found.clusters) == 2


def test_strength_does_not_matter() -> None:
    rng = np.random.default_rng(5)
    maps = planted(rng, 90, scattered, 1 / 3)
    assert members(alone(maps * rng.uniform(1e-3, 1e3, (90, 1, 1)))) == members(alone(maps))


@pytest.mark.parametrize(
    ("maps", "reason"),
    [
        (np.zeros((0, SIDE, SIDE)), f"0 usable maps, {FEWEST} needed"),
        (np.zeros((50, SIDE, SIDE)), f"0 usable maps (50 more are silent), {FEWEST} needed"),
        (np.ones((1, SIDE, SIDE)), f"1 usable maps, {FEWEST} needed"),
        (centred(np.random.default_rng(0), FEWEST - 1), f"{FEWEST - 1} usable maps, {FEWEST} needed"),
        (np.ones((50, SIDE, SIDE)), "all 50 maps are alike"),
    ],
)
def test_too_little_to_go_on_is_a_reason(maps: Array, reason: str) -> None:
    found = alone(maps)
    assert (found.reason, found.clusters, len(found.points)) == (reason, (), 0)
    assert ranked([found]) == ()


def test_maps_that_repeat() -> None:
    """Two pictures, many times each: two clusters, and no trouble with distances of 0."""
    maps = np.zeros((60, SIDE, SIDE))
    maps[:40, 3, 3] = maps[40:, 0, 0] = 1
    assert members(alone(maps)) == [set(range(40)), set(range(40, 60))]
    assert len(alone(np.ones((60, 1, 1))).clusters) == 0


def test_a_class_without_samples_is_named() -> None:
    maps, labels, correct, attributes, subjects = planted_classes()
    more = Subjects((), subjects.attributes, (*subjects.classes, "eel"))
    assert spray(maps, labels, correct, attributes, more, seed=0)[2].reason == f"0 usable maps, {FEWEST} needed"


def test_attributes_that_nobody_knows_are_not_compared() -> None:
    maps, labels, correct, attributes, subjects = planted_classes()
    attributes = attributes.copy()
    attributes[:, 0] = ""
    cat, _ = spray(maps, labels, correct, attributes, subjects, seed=0)
    assert {c.what.partition("=")[0] for cluster in cat.clusters for c in cluster.contrasts} == {"correct", "weather"}


def test_permuting_samples_permutes_the_clusters() -> None:
    maps, labels, correct, attributes, subjects = planted_classes(kind=centred)
    order = np.random.default_rng(9).permutation(len(labels))
    plain = spray(maps, labels, correct, attributes, subjects, seed=0)
    moved = spray(maps[order], labels[order], correct[order], attributes[order], subjects, seed=0)
    for one, other in zip(plain, moved, strict=True):
        assert members(one) == [set(order[c.members].tolist()) for c in other.clusters]
        for a, b in zip(one.clusters, other.clusters, strict=True):
            assert (a.accuracy, a.contrasts) == (b.accuracy, b.contrasts)
            np.testing.assert_allclose(a.mean_map, b.mean_map)


def test_the_seed_decides_and_nothing_else_is_drawn() -> None:
    maps, labels, correct, attributes, subjects = planted_classes()
    before = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    first, second = (spray(maps, labels, correct, attributes, subjects, seed=3) for _ in range(2))
    places = [layout(first[0].points, 3) for _ in range(2)]
    assert (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before  # noqa: NPY002
    for one, other in zip(first, second, strict=True):
        assert one.cluster.tolist() == other.cluster.tolist()
    np.testing.assert_array_equal(*places)
    assert places[0].shape == (120, 2) and np.isfinite(places[0]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"maps": np.ones((3, SIDE, SIDE))}, r"expected maps \(N, h, w\) of N = 240 labels, got \(3, 7, 7\)"),
        ({"maps": np.ones((240, 2, SIDE, SIDE))}, r"got \(240, 2, 7, 7\): give those of one method"),
        ({"correct": np.ones(3, dtype=bool)}, r"expected correct of shape \(240,\), as there are 240 labels, got \(3,"),
        ({"attributes": np.empty((240, 0), np.str_)}, r"expected attributes of shape \(240, 2\)"),
        ({"labels": np.full(240, 2)}, "expected labels 0 to 1, got 2 to 2"),
        ({"labels": np.full(240, -1)}, "expected labels 0 to 1, got -1 to -1"),
        (
            {"maps": -np.ones((240, SIDE, SIDE))},
            "expected maps of at least 0, got one below in sample 0: use another sign",
        ),
    ],
)
def test_bad_input_is_refused(change: dict[str, Array], message: str) -> None:
    names = ("maps", "labels", "correct", "attributes", "subjects")
    arguments = dict(zip(names, planted_classes(), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        spray(**arguments, seed=0)  # type: ignore[arg-type]


def test_ranking() -> None:
    def cluster(number: int, separation: float, *contrasts: Contrast) -> Cluster:
        none = np.empty(0, np.int64)
        accuracy = Estimate("accuracy", 1.0, 0.5, 1.0, 5)
        return Cluster("cat", number, none, none, np.ones((1, 1)), separation, accuracy, contrasts)

    def one(*clusters: Cluster) -> ClassClusters:
        nothing = np.empty(0)
        return ClassClusters("cat", np.empty(0, np.int64), 0, nothing, np.empty(0, np.int64), nothing, clusters)

    near, far = cluster(1, 0.1), cluster(2, 0.6)
    chance = cluster(3, 0.2, Contrast("correct", 0.1, 0.9, 0.06))
    little, much = (cluster(4, 0.0, Contrast("correct", 0.8, 0.9, 0.01), Contrast("a=b", x, 0.1, 0.04)) for x in (0, 1))
    assert ranked([one(near, far, chance), one(little, much), one(cluster(5, 0.9))]) == (
        much,
        little,
        far,
        chance,
        near,
    )
    assert much.departure is not None and much.departure.what == "a=b" and chance.departure is None


# A small network, trained while you wait: stripes are hard to see, a watermark in a third of class 0 is not.
PIXELS = 32


def striped(n: int, seed: int, marked: float, contrast: float) -> tuple[Tensor, Tensor, Array]:
    """Images `(n, 3, 32, 32)` from 0 to 1, labels (upright or level stripes, anywhere), and which are marked."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    images = rng.normal(0.45, 0.08, (n, 3, PIXELS, PIXELS))
    stripes = [(np.indices((12, 12))[1 - label] // 2 % 2) * 2 * contrast - contrast for label in (0, 1)]
    for i in range(n):
        y, x = rng.integers(8, PIXELS - 12, 2)
        images[i, :, y : y + 12, x : x + 12] += stripes[labels[i]]
    has = (labels == 0) & (rng.random(n) < marked)
    images[has, :, :6, :6] = np.where(np.indices((6, 6)).sum(0) % 3 == 0, 0.95, 0.1)
    return torch.from_numpy(images.clip(0, 1)).float(), torch.from_numpy(labels), has


def trained(marked: float, contrast: float, seed: int) -> nn.Module:
    def block(inputs: int, outputs: int, stride: int) -> tuple[nn.Module, ...]:
        return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()

    images, labels, _ = striped(400, seed + 1, marked, contrast)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        features = nn.Sequential(nn.BatchNorm2d(3), *block(3, 12, 2), *block(12, 24, 2), *block(24, 24, 1))
        net = nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 2))
        optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
        for _ in range(8):
            for batch in torch.randperm(len(images)).split(40):
                loss = nn.functional.cross_entropy(net(images[batch]), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return net.eval()


STRIPES = Subjects((), (), ("upright", "level"))


@pytest.fixture(scope="module")
def clever_hans() -> nn.Module:
    return trained(1 / 3, 0.02, seed=2)


def clusters_of(net: nn.Module, marked: float, contrast: float) -> tuple[tuple[ClassClusters, ...], Array]:
    images, labels, has = striped(240, 77, marked, contrast)
    heatmaps = explain(net, images, target=labels)
    with torch.no_grad():
        correct = (net(images).argmax(1) == labels).numpy()
    maps = heatmaps.maps.numpy().astype(np.float16)
    return spray(maps, labels.numpy(), correct, np.empty((240, 0), np.str_), STRIPES, seed=0), has


def test_a_networks_watermark_is_found_without_any_annotation(clever_hans: nn.Module) -> None:
    found, has = clusters_of(clever_hans, 1 / 3, 0.02)
    assert [len(one.clusters) for one in found] == [2, 1]
    first = ranked(found)[0]
    assert first.class_name == "upright" and has[first.members].mean() > 0.8 and has[first.nearest].all()
    # Every marked image is in it, and the corner is where its energy lies.
    assert has.sum() == has[first.members].sum() and first.mean_map[:3, :3].sum() > 0.4
    assert first.departure is not None and first.departure.what == "correct"


@pytest.mark.parametrize(("marked", "contrast"), [(0.0, 0.02), (1 / 3, 0.08)], ids=["clean", "ignored"])
def test_a_network_without_or_above_the_watermark_has_one_cluster(marked: float, contrast: float) -> None:
    found, _ = clusters_of(trained(marked, contrast, seed=2), marked, contrast)
    assert [len(one.clusters) for one in found] == [1, 1]


@pytest.fixture(scope="module")
def run_dir(clever_hans: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clusters") / "run"
    images, labels, has = striped(240, 77, 1 / 3, 0.02)
    whole = torch.ones(PIXELS, PIXELS, dtype=torch.bool)
    samples = [
        AuditSample((image * 255).round().to(torch.uint8), int(label), {"stripes": whole}, {}, f"{kind}-{i}")
        for i, (image, label, kind) in enumerate(zip(images, labels, np.where(has, "marked", "plain"), strict=True))
    ]
    audit_set = AuditDataset(samples, object=["stripes"], classes=["upright", "level"])
    plan = AuditPlan(layer="0", fitness_samples=0, intervention_samples=0, batch_size=240)
    audit_model(clever_hans, audit_set, plan=plan, out=path)
    return path


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["bias-audit", "clusters", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit:
        main()
    return int(str(exit.value.code))


def test_the_command_names_and_draws_them(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, run_dir, "--method", "hirescam", "--audit", "0", "--out", tmp_path / "found.png") == 0
    text = capsys.readouterr().out
    rows = [line for line in text.splitlines() if "upright" in line]
    assert "hirescam" in text and "marked-" in rows[0] and "marked-" not in rows[1] and "correct" in rows[0]
    assert "Class level: one cluster: no group of its 120 heatmaps stands apart." in text
    assert "2 of 2 classes drawn" in text and str(tmp_path / "found.png") in text
    with Image.open(tmp_path / "found.png") as picture:
        colours = picture.convert("RGB").getcolors(1 << 24)
    assert picture.width > 600 and picture.height > 600 and colours is not None and len(colours) > 500


def test_the_picture_shows_points_maps_and_nearest_images(run_dir: Path, tmp_path: Path) -> None:
    found = run_clusters(read_run(run_dir))
    assert found.method == "gradcam" and len(found.thumbnails) == len(found.ids) == 240
    assert draw_clusters(tmp_path / "found.svg", found) == 2
    svg = (tmp_path / "found.svg").read_text()
    marks = Counter(
        (kind, part.count("<path") or part.count("<image"))
        for kind, part in re.findall(r'<g class="mark-(symbol|rect|image).*?>(.*?)</g>', svg, re.DOTALL)
    )
    # 120 points of each class, the 8 x 8 cells of each cluster's mean map, and the three images nearest to its centre.
    assert marks == {("symbol", 120): 2, ("rect", 64): 3, ("image", 3): 3}
    assert svg.count("data:image/jpeg;base64,") == 9
    for text in ("upright", "2 clusters", "level", "one cluster", "Grad-CAM"):
        assert text in svg


def test_by_default_the_picture_lies_in_the_run_directory(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, run_dir) == 0
    assert (run_dir / "clusters.png").read_bytes()[:4] == b"\x89PNG"
    read_run(run_dir)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--audit", "1"), "there is no audit 1; there are 0 to 0, or -1 for the last"),
        (("--audit", "-2"), "there is no audit -2"),
        (("--method", "lime"), "no maps by 'lime' were recorded: expected one of gradcam, hirescam"),
        (("--out", "found.pdf"), "expected a name that ends in .png or .svg"),
    ],
)
def test_what_there_is_not_is_said(
    run_dir: Path,
    arguments: tuple[str, str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command(monkeypatch, run_dir, *arguments) == 2
    assert message in capsys.readouterr().err


def test_a_small_run_says_why_it_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_run(tmp_path / "run")
    assert command(monkeypatch, path) == 0
    assert f"Class nurse: 11 usable maps (1 more are silent), {FEWEST} needed." in capsys.readouterr().out
    assert not (path / "clusters.png").exists()
    with pytest.raises(ValueError, match="no class could be clustered"):
        draw_clusters(tmp_path / "x.png", run_clusters(read_run(path)))


def test_a_run_without_audits(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the run recorded no audit"):
        run_clusters(read_run(make_run(tmp_path / "run", audits=0)))

"""Boxes and forced choices against loops over pixels, closed forms, and a model that is known to look at its object."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bias_audit import explain
from bias_audit.discrimination import Boxes, bounding_boxes, forced_choice, localization_error, localized

Box = tuple[int, int, int, int]


def largest_segment(pixels: Any, threshold: float) -> set[tuple[int, int]]:
    """By flooding from one pixel after another, in reading order; of the largest the first."""
    cut = np.float32(threshold) * np.float32(pixels.max())
    hot = {(y, x) for y, x in np.ndindex(*pixels.shape) if pixels[y, x] > cut}
    best: set[tuple[int, int]] = set()
    seen: set[tuple[int, int]] = set()
    for start in sorted(hot):
        if start in seen:
            continue
        segment, ahead = {start}, [start]
        while ahead:
            y, x = ahead.pop()
            for near in [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]:
                if near in hot and near not in segment:
                    segment.add(near)
                    ahead.append(near)
        seen |= segment
        best = segment if len(segment) > len(best) else best
    return best


def around(segment: set[tuple[int, int]]) -> Box:
    ys, xs = [y for y, _ in segment], [x for _, x in segment]
    return min(xs), min(ys), max(xs) + 1, max(ys) + 1


def blocks(size: tuple[int, int], *boxes: tuple[Box, float]) -> Tensor:
    maps = torch.zeros(1, *size)
    for (x0, y0, x1, y1), value in boxes:
        maps[0, y0:y1, x0:x1] = value
    return maps


@pytest.mark.parametrize("threshold", [0.0, 0.15, 0.6])
@pytest.mark.parametrize("size", [(9, 13), (1, 8), (7, 1)])
@pytest.mark.parametrize("density", [0.2, 0.45, 1.0])
def test_boxes_are_those_of_the_loop_over_pixels(threshold: float, size: tuple[int, int], density: float) -> None:
    rng = np.random.default_rng(3)
    maps = (rng.random((12, *size)) * (rng.random((12, *size)) < density)).astype(np.float32)
    maps[5] = 0
    boxes = bounding_boxes(torch.from_numpy(maps), threshold)
    assert boxes.corners.dtype == torch.float32 and boxes.valid.tolist() == [bool(m.any()) for m in maps]
    for m, corners in zip(maps, boxes.corners.tolist(), strict=True):
        assert tuple(corners) == (around(largest_segment(m, threshold)) if m.any() else (0, 0, 0, 0))


@given(st.lists(st.lists(st.integers(0, 2), min_size=5, max_size=5), min_size=1, max_size=6))
@settings(max_examples=80, deadline=None)
def test_boxes_of_small_maps_with_many_segments(rows: list[list[int]]) -> None:
    maps = torch.tensor([rows, rows[::-1]]).float()
    boxes = bounding_boxes(maps, 0.5)
    for m, corners, valid in zip(maps.numpy(), boxes.corners.tolist(), boxes.valid.tolist(), strict=True):
        assert valid == bool(m.any())
        assert tuple(corners) == (around(largest_segment(m, 0.5)) if m.any() else (0, 0, 0, 0))


def test_the_largest_segment_counts_not_the_brightest_nor_the_one_below_the_threshold() -> None:
    bright, wide, faint = (8, 1, 10, 3), (1, 4, 5, 8), (6, 4, 14, 10)
    maps = blocks((12, 15), (bright, 1.0), (wide, 0.2), (faint, 0.1))
    assert bounding_boxes(maps).corners.tolist() == [list(map(float, wide))]
    assert bounding_boxes(maps, 0.05).corners.tolist() == [list(map(float, faint))]
    assert bounding_boxes(maps, 0.5).corners.tolist() == [list(map(float, bright))]


def test_corners_connect_and_images_of_a_batch_do_not() -> None:
    diagonal = torch.eye(4)[None]
    assert bounding_boxes(diagonal).corners.tolist() == [[0, 0, 4, 4]]
    below = torch.zeros(2, 3, 3)
    below[:, 2, :2] = 1
    below[1, 0, 0] = 1
    assert bounding_boxes(below).corners.tolist() == [[0, 2, 2, 3], [0, 2, 2, 3]]


def test_boxes_of_several_targets_keep_their_shape_and_of_what_is_not_finite_there_are_none() -> None:
    maps = torch.rand(3, 4, 6, 5, generator=torch.Generator().manual_seed(0)) ** 4
    maps[1, 2, 0, 0], maps[2, 0, 3, 3] = torch.nan, torch.inf
    boxes = bounding_boxes(maps)
    assert boxes.corners.shape == (3, 4, 4) and boxes.valid.shape == (3, 4)
    assert boxes.valid.sum() == 10 and not boxes.valid[1, 2] and not boxes.valid[2, 0]
    for k in range(3):
        assert torch.equal(bounding_boxes(maps[k]).corners, boxes.corners[k])


def box(*rows: Box) -> Boxes:
    return Boxes(torch.tensor(rows).float(), torch.ones(len(rows), dtype=torch.bool))


def test_a_box_that_covers_half_of_the_union_is_localized_and_one_that_covers_less_is_not() -> None:
    truth = torch.tensor([[[0, 0, 4, 4]]] * 4).float()
    boxes = box((0, 0, 8, 4), (0, 0, 9, 4), (0, 0, 2, 4), (5, 5, 9, 9))
    assert localized(boxes, truth).value.tolist() == [1, 0, 1, 0]
    assert localized(boxes, truth, 0.4).value.tolist() == [1, 1, 1, 0]


def test_any_true_box_will_do_and_rows_of_nan_are_none() -> None:
    nan = [float("nan")] * 4
    truth = torch.tensor([[[0, 0, 2, 2], [4, 4, 8, 8]], [[0, 0, 2, 2], nan], [nan, nan]])
    scored = localized(box((4, 4, 8, 8), (4, 4, 8, 8), (4, 4, 8, 8)), truth)
    assert scored.value.tolist() == [1, 0, 0] and scored.valid.tolist() == [True, True, False]
    silent = Boxes(torch.zeros(3, 4), torch.zeros(3, dtype=torch.bool))
    assert not localized(silent, truth).valid.any()


@pytest.mark.parametrize("k", [1, 2, 5])
def test_localization_error_is_the_loop_over_images_and_classes(k: int) -> None:
    rng = np.random.default_rng(k)
    images, best, classes = 60, 5, 8
    labels = rng.integers(0, classes, images)
    ranked = np.stack([rng.permutation(classes)[:best] for _ in range(images)], axis=1)
    corners = rng.integers(0, 3, (best, images, 4)) + np.array([0, 0, 3, 3])
    truth = rng.integers(0, 3, (images, 2, 4)) + np.array([0.0, 0, 3, 3])
    truth[rng.random((images, 2)) < 0.3] = np.nan
    valid = rng.random((best, images)) < 0.8
    boxes = Boxes(torch.from_numpy(corners).float(), torch.from_numpy(valid))
    given_ = torch.from_numpy(ranked), torch.from_numpy(labels), torch.from_numpy(truth).float()
    scored = localization_error(boxes, *given_, k=k)

    def overlap(one: Any, two: Any) -> float:
        def cells(c: Any) -> set[tuple[int, int]]:
            return {(x, y) for x in range(int(c[0]), int(c[2])) for y in range(int(c[1]), int(c[3]))}

        return len(cells(one) & cells(two)) / len(cells(one) | cells(two))

    for i in range(images):
        known = [t for t in truth[i] if not np.isnan(t).any()]
        hits = [
            valid[r, i] and ranked[r, i] == labels[i] and any(overlap(corners[r, i], t) >= 0.5 for t in known)
            for r in range(k)
        ]
        assert bool(scored.valid[i]) == bool(known)
        assert float(scored.value[i]) == (0 if not known or any(hits) else 1)
    assert 0 < scored.value.sum() < scored.valid.sum() < images


def test_the_right_class_in_the_wrong_place_and_the_wrong_class_in_the_right_place_are_errors() -> None:
    right, wrong = (0, 0, 4, 4), (5, 5, 9, 9)
    truth, label = torch.tensor([[right]]).float(), torch.tensor([3])
    for of_three, of_seven, top1, top2 in [(right, wrong, 1, 0), (wrong, right, 1, 1)]:
        boxes = Boxes(torch.tensor([[of_seven], [of_three]]).float(), torch.ones(2, 1, dtype=torch.bool))
        errors = [localization_error(boxes, torch.tensor([[7], [3]]), label, truth, k).value.item() for k in (1, 2)]
        assert errors == [top1, top2]


class TwoColours(nn.Module):
    """Class 0 is how red an image is, class 1 how green: each map must lie on its own square."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 2, 4, stride=4, bias=False)
        self.features.weight.data.zero_()
        self.features.weight.data[0, 0] = self.features.weight.data[1, 1] = 1 / 16
        self.relu = nn.ReLU()

    def forward(self, images: Tensor) -> Tensor:
        return self.relu(self.features(images)).mean(dim=(2, 3))


def squares() -> tuple[Tensor, Tensor]:
    """Images of a red and a larger green square, and the squares' masks."""
    images, masks = torch.zeros(6, 3, 32, 32), torch.zeros(6, 2, 32, 32, dtype=torch.bool)
    for i in range(6):
        masks[i, 0, 4 * (i % 3) : 4 * (i % 3) + 8, 0:8] = True
        masks[i, 1, 12:28, 16:28] = True
        images[i, 0][masks[i, 0]] = 0.3 + 0.1 * i
        images[i, 1][masks[i, 1]] = 0.5
    return images, masks


def test_maps_of_a_model_that_looks_at_its_object_localize_it_and_of_one_that_looks_away_do_not() -> None:
    images, masks = squares()
    net = TwoColours()
    classes = net(images).topk(2).indices.T
    truth = torch.stack([torch.tensor(around({(int(y), int(x)) for y, x in m.nonzero()})).float() for m in masks[:, 1]])
    labels = torch.ones(6, dtype=torch.long)
    boxes, swapped = (
        bounding_boxes(
            torch.stack([explain(net, images, target=c, layer="relu").upsample((32, 32)) for c in of]), threshold=0.5
        )
        for of in (classes, 1 - classes)
    )
    assert localization_error(boxes, classes, labels, truth[:, None], k=1).value.tolist() == [0] * 6
    # The same answers, with the other object's maps.
    assert localization_error(swapped, classes, labels, truth[:, None], k=2).value.tolist() == [1] * 6


@pytest.mark.parametrize("target", [0, 1])
def test_forced_choice_finds_whose_object_a_map_is_on(target: int) -> None:
    images, masks = squares()
    asked = torch.full((6,), target)
    maps = explain(TwoColours(), images, target=asked, layer="relu").maps
    assert forced_choice(maps, masks, asked).value.tolist() == [1] * 6
    assert forced_choice(maps, masks, 1 - asked).value.tolist() == [0] * 6
    # The green square has the more energy in both together, the brighter red one the more of it per area.
    both = explain(TwoColours(), images, target=lambda outputs: outputs.sum(1), layer="relu").maps
    brighter = images[:, 0].amax((1, 2)) > 0.5 + 1e-4
    expected = torch.where(brighter == (asked == 0), 1.0, 0.0)
    telling = (images[:, 0].amax((1, 2)) - 0.5).abs() > 0.05
    assert telling.sum() >= 4 and 0 < brighter[telling].sum() < telling.sum()
    assert torch.equal(forced_choice(both, masks, asked).value[telling], expected[telling])


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_a_map_made_for_neither_object_gets_chance_when_asked_for_both(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    maps = torch.rand(4, 3, 3, generator=generator)
    masks = torch.rand(4, 2, 9, 9, generator=generator) < 0.3
    asked = torch.randint(0, 2, (4,), generator=generator)
    one, other = forced_choice(maps, masks, asked), forced_choice(maps, masks, 1 - asked)
    assert torch.equal(one.value + other.value, one.valid.float()) and torch.equal(one.valid, other.valid)


def test_maps_that_favour_neither_object_are_ties_however_large_the_objects() -> None:
    masks = torch.zeros(2, 2, 9, 9, dtype=torch.bool)
    masks[:, 0, :2, :3], masks[:, 1, 3:] = True, True
    flat = torch.full((2, 3, 3), 0.1)
    assert forced_choice(flat, masks, torch.tensor([0, 1])).value.tolist() == [0.5, 0.5]
    many = torch.rand(64, 2, 31, 29, generator=torch.Generator().manual_seed(0)) < 0.1
    assert (forced_choice(torch.full((64, 7, 7), 0.1), many, torch.ones(64, dtype=torch.long)).value == 0.5).all()
    same = masks[:, :1].expand(-1, 2, -1, -1)
    assert forced_choice(torch.rand(2, 3, 3), same, torch.tensor([0, 1])).value.tolist() == [0.5, 0.5]


def test_forced_choice_is_not_valid_for_silent_maps_and_missing_objects_and_takes_clips() -> None:
    masks = torch.zeros(3, 2, 4, 6, 6, dtype=torch.bool)
    masks[:, 0, :, :3], masks[:, 1, :2, 3:] = True, True
    masks[2, 1] = False
    maps = torch.zeros(2, 3, 2, 3, 3)
    maps[:, [0, 2], 0, 2] = 1  # in the first frames, below
    scored = forced_choice(maps, masks, torch.tensor([1, 1, 1]))
    assert scored.valid.tolist() == [[True, False, False]] * 2
    assert scored.value.tolist() == [[1, 0, 0]] * 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bounding_boxes(torch.rand(1, 2, 2), 1.0), "expected a threshold in [0, 1), got 1.0"),
        (lambda: localized(box((0, 0, 1, 1)), torch.rand(1, 4)), "expected true boxes (1, G, 4)"),
        (lambda: localized(box((0, 0, 1, 1)), torch.rand(2, 1, 4)), "got (2, 1, 4)"),
        (
            lambda: localization_error(
                Boxes(torch.rand(2, 3, 4), torch.ones(2, 3).bool()),
                torch.zeros(2, 3),
                torch.zeros(3),
                torch.rand(3, 1, 4),
                k=3,
            ),
            "expected k from 1 to 2",
        ),
        (
            lambda: localization_error(
                Boxes(torch.rand(2, 3, 4), torch.ones(2, 3).bool()),
                torch.zeros(3, 2),
                torch.zeros(3),
                torch.rand(3, 1, 4),
                k=1,
            ),
            "expected a class for each box, (2, 3), got (3, 2)",
        ),
        (
            lambda: forced_choice(torch.rand(1, 2, 2), torch.ones(1, 3, 4, 4).bool(), torch.tensor([0])),
            "expected the masks of two objects (B, 2, H, W), got (1, 3, 4, 4)",
        ),
        (
            lambda: forced_choice(torch.rand(1, 2, 2), torch.ones(1, 2, 4, 4).bool(), torch.tensor([2])),
            "expected as target 0 or 1 for each of 1 images, got [2]",
        ),
    ],
)
def test_what_cannot_be_scored_is_said(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()

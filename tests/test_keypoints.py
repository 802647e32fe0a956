"""Regions of people: on a mannequin whose parts are known, on whatever points there may be, and on photographs."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from benchmarks.mannequin import Mannequin, mannequin, turn
from benchmarks.people import PICTURE, RESULTS, detected, main, measure, persons, written
from bias_audit.regions.keypoints import FACE, HEAD, REGIONS, Heads, head_poses, people_regions

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

PHOTOGRAPHS = Path(__file__).parents[2] / "shared" / "data" / "coco_people"
photographs = pytest.mark.skipif(not PHOTOGRAPHS.is_dir(), reason="needs ../shared/data/coco_people")


def iou(a: Mask, b: Mask) -> float:
    return float((a & b).sum() / (a | b).sum())


@pytest.mark.parametrize("roll", [0, 37, 180])
@pytest.mark.parametrize(("yaw", "pitch"), [(0, 0), (30, 0), (-60, 0), (90, 0), (-30, 20), (0, -20)])
def test_head_of_a_mannequin(yaw: float, pitch: float, roll: float) -> None:
    person = mannequin(yaw, pitch, roll)
    found = person.regions()
    assert np.rad2deg(head_poses(person.keypoints[None]).yaw[0]) == pytest.approx(yaw, abs=23)
    assert iou(found["face"], person.parts["face"]) > (0.75 if abs(yaw) < 90 else 0.55)
    assert (found["face"] & person.parts["face"]).sum() > 0.9 * person.parts["face"].sum()
    above = lie_above_eyes(person)
    assert (person.parts["hair"] & above & ~found["face"] & ~found["hair"]).sum() < 0.02 * person.mask.sum()
    assert (found["hair"] & (person.parts["hair"] | person.parts["face"])).sum() > 0.95 * found["hair"].sum()
    assert (found["hair"] & person.parts["face"]).sum() < 0.1 * found["hair"].sum()
    # A pixel of the line itself may lie on either side of it.
    assert (found["hair"] & ~above).sum() < 0.05 * found["hair"].sum()


def lie_above_eyes(person: Mannequin) -> Mask:
    """Beyond the line through the true middle between the eyes, across the head."""
    row, column = np.indices(person.mask.shape) + 0.5
    eyes = person.keypoints[1:3, :2].mean(axis=0)
    above: Mask = (column - eyes[0]) * person.up[0] + (row - eyes[1]) * person.up[1] > -2.5
    return above


@pytest.mark.parametrize("yaw", [180, 150, -140])
def test_back_of_a_head_has_hair_and_no_face(yaw: float) -> None:
    person = mannequin(yaw, body=180)
    found = person.regions()
    assert not found["face"].any()
    assert (found["hair"] & person.parts["hair"]).sum() > 0.95 * found["hair"].sum()
    assert found["hair"].sum() > 0.4 * person.parts["hair"].sum()
    # A detector that takes the hair for a face still has left and right the wrong way round.
    claimed = person.keypoints.copy()
    claimed[:5, 2] = 1
    assert not people_regions(claimed[None], person.mask[None])["face"].any()


def test_face_of_a_detector_that_marks_only_eyes_and_nose() -> None:
    person = mannequin()
    alone = person.keypoints.copy()
    alone[3:, 2] = 0
    face = people_regions(alone[None], person.mask[None], ["face"])["face"][0]
    assert iou(face, person.parts["face"]) > 0.7
    for few in ([0], [1], [3], [], [0, 5, 6], [3, 5, 6]):
        alone[:, 2] = 0
        alone[few, 2] = 1
        assert not any(mask.any() for mask in people_regions(alone[None], person.mask[None]).values())


def test_points_that_all_lie_in_one_place_are_nobody() -> None:
    person = mannequin()
    heap = person.keypoints.copy()
    for place in (heap[0, :2].copy(), (0, 0)):
        heap[:, :2] = place
        assert not any(mask.any() for mask in people_regions(heap[None], person.mask[None]).values())


@pytest.mark.parametrize("body", [0, 40, 90, 180])
def test_torso_and_hands_of_a_mannequin(body: float) -> None:
    person = mannequin(body, body=body, roll=20)
    found = person.regions()
    # Arms hang beside it, and from the side before it: not all that lies between shoulders and hips is torso.
    assert iou(found["torso"], person.parts["torso"]) > (0.8 if body in (0, 180) else 0.55)
    row, column = np.nonzero(found["torso"])
    shoulders, hips = person.keypoints[5:7, :2].mean(axis=0), person.keypoints[11:13, :2].mean(axis=0)
    along = (np.stack([column, row], axis=1) + 0.5 - shoulders) @ (hips - shoulders) / ((hips - shoulders) ** 2).sum()
    assert along.min() > -0.03 and along.max() < 1.03
    if body in (0, 180):
        assert (found["hands"] & person.parts["hands"]).sum() > 0.9 * person.parts["hands"].sum()
        assert (found["hands"] & person.parts["hands"]).sum() > 0.9 * found["hands"].sum()
    row, column = np.nonzero(found["hands"])
    to_wrists = np.hypot(*(np.stack([column, row])[:, :, None] + 0.5 - person.keypoints[9:11, :2].T[:, None]))
    assert to_wrists.min(axis=1).max() < 200 * person.scale


def test_regions_lie_in_the_mask_and_apart() -> None:
    # A hand before the face: what of it the face's outline holds stays face.
    person = mannequin()
    raised = person.keypoints.copy()
    raised[9, :2], raised[7, :2] = raised[5, :2] + (0, -20), raised[5, :2] + (25, 20)
    found = people_regions(raised[None], person.mask[None])
    assert sum(mask.astype(int) for mask in found.values()).max() == 1
    assert not (np.logical_or.reduce(list(found.values()))[0] & ~person.mask).any()
    assert found["hands"].any() and found["face"].any()


def test_what_is_hidden_has_no_region() -> None:
    person = mannequin()
    points, mask = person.keypoints, person.mask
    clean = {name: part.any() for name, part in person.regions().items()}
    assert clean == dict.fromkeys(REGIONS, True)
    for region, hidden in (("face", [0, 1, 2]), ("hair", range(5)), ("torso", [5, 6])):
        fewer = points.copy()
        fewer[list(hidden), 2] = 0
        assert not people_regions(fewer[None], mask[None])[region].any()
    for unseen in ([7, 10], [9, 8], [9, 10], [7, 8]):
        fewer = points.copy()
        fewer[unseen, 2] = 0
        # Whatever lies where the point is not.
        assert not people_regions(fewer[None], np.ones_like(mask)[None])["hands"].any()


@pytest.mark.parametrize("region", REGIONS)
def test_a_sliver_behind_something_is_no_region(region: str) -> None:
    """Something before the body: the mask lacks it."""
    person = mannequin()
    whole = person.regions()[region]
    row, column = np.nonzero(whole)
    for share in (0.04, 0.5):
        hidden = whole.copy()
        rest = row > np.quantile(row, 1 - share)
        hidden[row[rest], column[rest]] = False
        found = people_regions(person.keypoints[None], (person.mask & ~hidden)[None], [region])[region][0]
        assert found.any() == (share == 0.5)
        assert (found & whole).sum() == found.sum()


def test_torso_whose_hips_are_not_in_the_picture() -> None:
    person = mannequin()
    unseen = person.keypoints.copy()
    unseen[11:, 2] = 0
    assert not people_regions(unseen[None], person.mask[None])["torso"].any()
    waist = int(person.keypoints[11, 1] - 150 * person.scale)
    found = people_regions(unseen[None], person.mask[None, :waist])["torso"][0]
    assert iou(found, person.regions()["torso"][:waist]) > 0.9
    assert found[-1].any()
    # Hips that are known are believed, beyond the edge too.
    edge = int(person.keypoints[11, 1] - 60 * person.scale)
    kept = people_regions(person.keypoints[None], person.mask[None, :edge])["torso"][0]
    np.testing.assert_array_equal(kept, person.regions()["torso"][:edge])


def test_torso_of_which_one_side_is_seen() -> None:
    person = mannequin(90, body=90)
    fewer = person.keypoints.copy()
    fewer[[5, 11], 2] = 0
    assert iou(people_regions(fewer[None], person.mask[None])["torso"][0], person.regions()["torso"]) > 0.7
    fewer[[6, 11], 2] = 0, 1
    assert not people_regions(fewer[None], person.mask[None])["torso"].any()


def test_turned_scaled_and_mirrored_pictures_have_the_same_regions() -> None:
    person = mannequin(35, 10, 15)
    found, side = person.regions(), len(person.mask)
    quarter = person.keypoints.copy()
    quarter[:, :2] = np.column_stack([person.keypoints[:, 1], side - person.keypoints[:, 0]])
    other = np.arange(17)
    other[1:] = other[1:].reshape(-1, 2)[:, ::-1].ravel()
    mirrored = person.keypoints[other] * (-1, 1, 1) + (side, 0, 0)
    twice = np.kron(person.mask, np.ones((2, 2), dtype=bool))
    for name, region in found.items():
        turned = people_regions(quarter[None], np.rot90(person.mask)[None])[name][0]
        assert (turned != np.rot90(region)).sum() <= 0.01 * region.sum()
        flipped = people_regions(mirrored[None], person.mask[None, :, ::-1])[name][0]
        assert (flipped[:, ::-1] != region).sum() <= 0.01 * region.sum()
        large = people_regions((person.keypoints * (2, 2, 1))[None], twice[None])[name][0]
        assert iou(large, np.kron(region, np.ones((2, 2), dtype=bool))) > 0.95


def test_persons_do_not_matter_to_each_other() -> None:
    people = [mannequin(yaw, body=yaw) for yaw in (0, 70, 180)]
    points, masks = np.stack([p.keypoints for p in people]), np.stack([p.mask for p in people])
    together = people_regions(torch.tensor(points), torch.tensor(masks), ["hands", "face"])
    assert list(together) == ["hands", "face"]
    for place, person in enumerate(people):
        for name, mask in person.regions("hands", "face").items():
            np.testing.assert_array_equal(together[name][place], mask)


def test_nobody_and_nothing() -> None:
    nobody = people_regions(np.zeros((0, 17, 3)), np.zeros((0, 4, 6), dtype=bool))
    assert {name: mask.shape for name, mask in nobody.items()} == dict.fromkeys(REGIONS, (0, 4, 6))
    person = mannequin()
    empty = people_regions(person.keypoints[None], np.zeros((1, 8, 8), dtype=bool))
    assert not any(mask.any() for mask in empty.values())


@settings(max_examples=60, deadline=None)
@given(
    arrays.arrays(np.float64, (2, 17, 2), elements=st.one_of(st.integers(-5, 25).map(float), st.floats(-1e6, 1e6))),
    arrays.arrays(np.float64, (2, 17), elements=st.sampled_from([0.0, 1.0])),
    arrays.arrays(np.bool_, (2, 12, 20)),
)
def test_any_points_give_regions_that_keep_their_promises(places: Floats, seen: Floats, masks: Mask) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = people_regions(np.concatenate([places, seen[:, :, None]], axis=2), masks)
    assert sum(mask.astype(int) for mask in found.values()).max() <= 1
    for name, mask in found.items():
        assert mask.dtype == np.bool_ and not (mask & ~masks).any()
        if name in ("face", "hair"):
            assert not mask[(seen[:, :5] > 0).sum(axis=1) < 2].any()


@pytest.mark.parametrize(
    ("keypoints", "masks", "wanted", "says"),
    [
        (np.zeros((1, 16, 3)), np.zeros((1, 4, 4), dtype=bool), ["face"], r"keypoints: expected shape \(persons, 17"),
        (np.zeros((17, 3)), np.zeros((4, 4), dtype=bool), ["face"], r"got \(17, 3\)"),
        (np.zeros((1, 17, 3)), np.zeros((2, 4, 4), dtype=bool), ["face"], r"masks: .*one mask for each person"),
        (np.zeros((1, 17, 3)), np.zeros((1, 4, 4)), ["face"], r"masks: expected bool .*got float64.*> 0.5"),
        (np.zeros((1, 17, 3)), np.zeros((1, 4, 4), dtype=bool), ["foot"], r"'foot': expected one of face, hair"),
        (np.full((1, 17, 3), np.inf), np.zeros((1, 4, 4), dtype=bool), ["face"], r"point 0 of person 0 .*third number"),
    ],
)
def test_bad_input(keypoints: Floats, masks: Mask, wanted: list[str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        people_regions(keypoints, masks, wanted)


def test_points_that_are_not_seen_may_lie_anywhere() -> None:
    person = mannequin()
    nowhere = person.keypoints.copy()
    nowhere[[3, 15], 2] = 0
    lost = nowhere.copy()
    lost[[3, 15], :2] = np.nan
    for name, mask in people_regions(nowhere[None], person.mask[None]).items():
        np.testing.assert_array_equal(mask, people_regions(lost[None], person.mask[None])[name])


def test_pose_is_the_best_of_all_turns() -> None:
    """Each turn by itself, with its roll, size and place by least squares."""
    rng = np.random.default_rng(3)
    person = mannequin(-70, 15, 70)
    points = person.keypoints.copy()
    points[:5, :2] += rng.normal(0, 1, (5, 2))
    found = head_poses(points[None])
    best, axes, origin = np.inf, np.zeros((2, 3)), np.zeros(2)
    neck = points[5:7, :2].mean(axis=0)
    for yaw in np.arange(-180, 180, 7.5):
        for pitch in np.arange(-45, 46, 7.5):
            turned = turn(yaw, pitch)
            rows, sides = [], []
            for place in [n for n in range(5) if points[n, 2]] + [5]:
                x, y, _ = turned @ ((0, 235, -15) if place == 5 else HEAD[place])
                sure = 1 / (70 if place == 5 else 18 if place in (3, 4) else 8)
                rows += [sure * np.array((x, -y, 1, 0)), sure * np.array((y, x, 0, 1))]
                sides += list(sure * (neck if place == 5 else points[place, :2]))
            (a, b, *shift), (left_over,), *_ = np.linalg.lstsq(np.array(rows), np.array(sides), rcond=None)
            cost = left_over / (a * a + b * b) + (yaw / 60) ** 2 + (pitch / 20) ** 2
            for place in [n for n in range(5) if not points[n, 2]]:
                out = turned @ [(0, 0, 1), (0.5, 0, 0.87), (-0.5, 0, 0.87), (1, 0, 0), (-1, 0, 0)][place]
                cost += 3 * max(out[2], 0) ** 2
            if cost < best:
                best, axes, origin = cost, np.array([(a, -b), (b, a)]) @ turned[:2], np.array(shift)
    assert not points[:5, 2].all()
    np.testing.assert_allclose(found.axes[0], axes, atol=1e-9)
    np.testing.assert_allclose(found.origin[0], origin, atol=1e-6)


def test_ellipse_is_the_outline_of_the_ellipsoid() -> None:
    """Against points strewn over the ellipsoid."""
    rng = np.random.default_rng(0)
    turned = turn(50, 20)[:2] * 0.4
    heads = Heads(turned[None], np.array([[60.0, 50.0]]), np.zeros(1), np.ones(1, dtype=bool))
    grid = np.arange(120)[None] + 0.5, np.arange(100)[:, None] + 0.5
    ellipses = heads.ellipses(FACE, np.ones(1, dtype=bool))
    drawn = ellipses.covers(0, *grid)
    inside = rng.normal(size=(400_000, 3))
    inside *= rng.random((len(inside), 1)) ** (1 / 3) / np.linalg.norm(inside, axis=1, keepdims=True)
    column, row = ((inside * FACE[1] + FACE[0]) @ turned.T + (60, 50)).astype(int).T
    hit = np.zeros_like(drawn)
    hit[row, column] = True
    assert iou(drawn, hit) > 0.95
    assert ellipses.area(0) == pytest.approx(drawn.sum(), rel=0.02)


@photographs
def test_photographs_keep_what_is_claimed() -> None:
    bodies = {(file, number): mask for file, _, masks in persons(PHOTOGRAPHS) for number, mask in masks}
    shown = dict.fromkeys(REGIONS, 0)
    for person in detected():
        body, points = bodies[person.file, person.annotation], np.array(person.keypoints)
        found = {name: mask[0] for name, mask in people_regions(points[None], body[None]).items()}
        assert sum(mask.astype(int) for mask in found.values()).max() <= 1
        for name, mask in found.items():
            assert not (mask & ~body).any()
            shown[name] += bool(mask.any())
        if found["hair"].any() and found["face"].any():
            # In the head's frame: from the nose to the eyes, the hair lies further that way than the face.
            up = points[1:3, :2].mean(axis=0) - points[0, :2]
            middles = [np.argwhere(found[name])[:, ::-1].mean(axis=0) for name in ("hair", "face")]
            assert (middles[0] - middles[1]) @ up > 0
    assert shown["face"] >= 75 and shown["hair"] >= 80 and shown["torso"] >= 70 and shown["hands"] >= 55


@photographs
def test_photographs_give_the_figures_that_are_kept() -> None:
    measured = measure(PHOTOGRAPHS)
    assert json.loads((RESULTS / "people.json").read_text()) == json.loads(json.dumps(asdict(measured)))
    assert (RESULTS / "people.md").read_text() == written(measured)
    face, others, *_, hands, torso = measured.shares
    assert face.low > 0.7 and others.low > 0.65 and hands.low > 0.75 and torso.high < 0.2
    without, lost = measured.counts[-2:]
    assert without.count >= 8 and lost.count <= 2


def test_picture_shows_the_regions(tmp_path: Path) -> None:
    main(["picture", "--out", str(tmp_path)])
    drawn, kept = (path.read_text() for path in (tmp_path / PICTURE.name, PICTURE))
    for text in (drawn, kept):
        root = ElementTree.fromstring(text)
        groups = [[path.get("class") for path in group] for group in root.iter("{http://www.w3.org/2000/svg}g")]
        assert groups == [["body", *REGIONS]] * 5
        drawn_faces = [
            group.find("*[@class='face']").get("d") != "" for group in root.iter("{http://www.w3.org/2000/svg}g")
        ]
        assert drawn_faces == [True, True, True, False, True]

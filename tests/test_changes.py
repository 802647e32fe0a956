"""What is changed in each image, against loops over images and pixels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from bias_audit import AuditDataset, AuditSample
from bias_audit.evidence.association import Alignment
from bias_audit.evidence.changes import SIGMA, TRIALS, Change, Changes
from bias_audit.evidence.removal import FILLS, inpainted, transplanted, widened

SIDE, CONTROLS = 24, 3


def mask(top: int, left: int, height: int = 5, width: int = 5, side: int = SIDE) -> Tensor:
    found = torch.zeros(side, side, dtype=torch.bool)
    found[max(top, 0) : top + height, max(left, 0) : left + width] = True
    return found


def sample(
    number: int,
    *,
    value: str = "",
    label: int = 0,
    hair: Tensor | None = None,
    tie: Tensor | None = None,
    side: int = SIDE,
) -> AuditSample:
    generator = torch.Generator().manual_seed(number)
    image = torch.randint(40, 216, (3, side, side), generator=generator).to(torch.uint8)
    regions = {name: region for name, region in (("hair", hair), ("tie", tie)) if region is not None}
    return AuditSample(image, label, regions, {"gender": value} if value else {}, f"portrait-{number}")


def people(count: int = 12, **options: Any) -> AuditDataset:
    """Hair near one place, a tie below it, gender by turns."""
    samples = [
        sample(i, value=("female", "male")[i % 2], label=i // 2 % 2, hair=mask(3 + i // 6, 4), tie=mask(15, 10))
        for i in range(count)
    ]
    return AuditDataset(samples, object=["tie"], spurious=["hair"], classes=["doctor", "nurse"], **options)


def changes_of(
    audit_set: AuditDataset,
    *,
    controls: int = CONTROLS,
    sensitivity: int = 64,
    swaps: Mapping[str, Callable[[Any, str], Any]] | None = None,
    alignments: tuple[Alignment, ...] = (),
    seed: int = 0,
) -> Changes:
    return Changes(audit_set, controls, sensitivity, swaps or {}, alignments, seed)


def made(changes: Changes, index: int) -> dict[Change, list[Tensor]]:
    """Of every change of an image its pictures."""
    found: dict[Change, list[Tensor]] = {}
    for number, picture in changes.pictures(index):
        found.setdefault(changes.list[number], []).append(picture)
    return found


def raw(audit_set: AuditDataset, index: int) -> Tensor:
    image = audit_set.samples[index].image  # type: ignore[union-attr]
    assert isinstance(image, Tensor)
    return image


def test_every_change_is_on_the_list_once_and_controls_and_trials_as_often_as_asked() -> None:
    both = changes_of(people())
    expected = Counter(
        [Change("none"), Change("removal", 1), Change("swap", 1, 0), Change("swap_control", 1, 0)]
        + [Change("control", 1)] * CONTROLS
        + [Change(kind, 1, detail=fill) for kind in ("fill", "fill_control") for fill in FILLS]
        + [Change(kind) for kind in ("noise_rest", "noise_object") for _ in range(TRIALS)]
    )
    assert Counter(both.list) == expected and both.list[0] == Change("none")
    # The user's swap takes the place of all exchanges of regions.
    with_swap = changes_of(people(), swaps={"gender": lambda sample, value: None})
    assert Counter(with_swap.list) == expected - Counter(
        [Change("swap", 1, 0), Change("swap_control", 1, 0)]
    ) + Counter([Change("swap", attribute=0)])
    assert both.count == 12


def test_removals_and_controls_are_inpainted_and_nothing_else_is_touched() -> None:
    audit_set = people()
    changes = changes_of(audit_set)
    for i in range(len(audit_set)):
        image, masks = audit_set.prepared(i)
        assert torch.equal(image, raw(audit_set, i))
        found = made(changes, i)
        hole = widened(masks[1].numpy())
        assert torch.equal(found[Change("none")][0], image)
        assert torch.equal(found[Change("removal", 1)][0], inpainted(image, hole))
        claimed = hole | widened(masks[0].numpy())
        controls = found[Change("control", 1)]
        assert len(controls) == CONTROLS
        for control in controls:
            differs = (control != image).any(dim=0).numpy()
            # In-painting hits an old shade now and then: a pixel or two of the 49.
            assert 0.9 * hole.sum() <= differs.sum() <= hole.sum() and not (differs & claimed).any()
            rows, columns = np.flatnonzero(differs.any(1)), np.flatnonzero(differs.any(0))
            assert torch.equal(control, inpainted(image, mask(rows[0], columns[0], 7, 7).numpy()))
        assert len({c.numpy().tobytes() for c in controls}) == CONTROLS


def test_fills_are_made_in_the_region_and_in_a_control_of_it() -> None:
    audit_set = people(4)
    changes = changes_of(audit_set)
    for i in range(4):
        found, (image, masks) = made(changes, i), audit_set.prepared(i)
        hole = torch.from_numpy(widened(masks[1].numpy()))
        for fill in FILLS:
            inside = found[Change("fill", 1, detail=fill)][0]
            beside = found[Change("fill_control", 1, detail=fill)][0]
            assert torch.equal(inside[:, ~hole], image[:, ~hole])
            assert torch.equal(beside[:, hole], image[:, hole])
            assert 40 <= int((inside != image).any(dim=0).sum()) <= 49
            assert 40 <= int((beside != image).any(dim=0).sum()) <= 49
        mean = image[:, ~hole].double().mean(dim=1).round()
        assert (found[Change("fill", 1, detail="mean")][0][:, hole] == mean[:, None]).all()


def test_fills_and_noise_are_tried_on_a_part_that_is_drawn_from_all_classes() -> None:
    by_class = sorted(people(40).samples, key=lambda s: s.label)
    audit_set = AuditDataset(by_class, object=["tie"], spurious=["hair"], classes=["doctor", "nurse"])
    changes = changes_of(audit_set, sensitivity=8)
    tried = [i for i in range(40) if Change("noise_rest") in made(changes, i)]
    assert tried == [i for i in range(40) if Change("fill", 1, detail="blur") in made(changes, i)]
    assert Counter(int(audit_set.labels[i]) for i in tried) == {0: 4, 1: 4}
    assert Counter(audit_set.attribute_table[i, 0] for i in tried) == {"female": 4, "male": 4}
    # Removals and their controls are of no such part.
    assert all(len(made(changes, i)[Change("control", 1)]) == CONTROLS for i in range(40))
    assert not any(
        change.kind.startswith(("noise", "fill")) for change in made(changes_of(audit_set, sensitivity=0), 0)
    )


@pytest.mark.parametrize("where", ["nowhere", "everywhere", "not annotated", "all but the rim"])
def test_a_region_that_is_nowhere_or_everywhere_is_not_removed(where: str) -> None:
    hair = {
        "nowhere": torch.zeros(SIDE, SIDE, dtype=torch.bool),
        "everywhere": torch.ones(SIDE, SIDE, dtype=torch.bool),
        "not annotated": None,
        "all but the rim": mask(1, 1, SIDE - 2, SIDE - 2),
    }[where]
    odd = sample(0, value="female", hair=hair, tie=mask(15, 10))
    others = [sample(i, value="male", hair=mask(3, 4), tie=mask(15, 10)) for i in (1, 2)]
    audit_set = AuditDataset([odd, *others], object=["tie"], spurious=["hair"])
    changes = changes_of(audit_set)
    assert {c.kind for c in made(changes, 0)} == {"none", "noise_rest", "noise_object"}
    assert Change("removal", 1) in made(changes, 1)


def test_without_room_for_a_control_there_is_a_removal_and_no_control() -> None:
    audit_set = AuditDataset([sample(0, hair=mask(0, 0, SIDE, 16))], spurious=["hair"])
    found = made(changes_of(audit_set), 0)
    assert {c.kind for c in found} == {"none", "removal", "fill"}


def test_controls_keep_off_every_spurious_region_and_every_object_but_not_off_context() -> None:
    free = mask(14, 14, 10, 10)
    regions = {"hair": mask(0, 0, 6, 6), "mark": mask(0, 7, SIDE, 6), "tie": mask(14, 0, 10, 6), "wall": free}
    one = AuditSample(sample(0).image, 0, regions, {}, "a")
    audit_set = AuditDataset([one], object=["tie"], spurious=["hair", "mark"], context=["wall"])
    (r,) = (i for i, (name, _) in enumerate(audit_set.subjects.regions) if name == "hair")
    claimed = np.logical_or.reduce([widened(regions[name].numpy()) for name in ("hair", "mark", "tie")])
    image = raw(audit_set, 0)
    seen = np.zeros((SIDE, SIDE), dtype=bool)
    for seed in range(10):
        for control in made(changes_of(audit_set, seed=seed), 0)[Change("control", r)]:
            seen |= (control != image).any(dim=0).numpy()
    assert not (seen & claimed).any() and (seen & free.numpy()).any()


def iou(one: Tensor, other: Tensor) -> float:
    union = int((one | other).sum())
    return int((one & other).sum()) / union if union else 0.0


def test_donors_have_the_wanted_value_and_their_region_in_the_same_place() -> None:
    rng = np.random.default_rng(4)
    # Two clusters of places: donors are found within one only.
    corners = [(3 + 9 * (i % 2) + int(rng.integers(0, 2)), 4 + int(rng.integers(0, 3))) for i in range(24)]
    values = [str(v) for v in rng.choice(["female", "male", "none said"], 24)]
    values[5] = ""
    samples = [
        sample(i, value=values[i], label=int(rng.integers(0, 2)), hair=mask(*corner, 8, 8))
        for i, corner in enumerate(corners)
    ]
    audit_set = AuditDataset(samples, spurious=["hair"], classes=["doctor", "nurse"])
    changes = changes_of(audit_set)
    hairs = [mask(*corner, 8, 8) for corner in corners]
    images = [raw(audit_set, i) for i in range(24)]
    given = 0
    for i in range(24):
        found, wanted = made(changes, i), changes.swapped_values[i, 0]
        assert (wanted == "") == (values[i] == "") and wanted != (values[i] or None)
        for kind, value in (("swap", wanted), ("swap_control", values[i])):
            able = {j: iou(hairs[i], hairs[j]) for j in range(24) if j != i and value and values[j] == value}
            able = {j: overlap for j, overlap in able.items() if overlap >= 0.7}
            pictures = found.get(Change(kind, 0, 0), [])  # type: ignore[arg-type]
            assert len(pictures) == bool(able)
            if able:
                best = [j for j, overlap in able.items() if overlap >= max(able.values()) - 0.01]
                donated = [transplanted(images[i], hairs[i].numpy(), images[j], hairs[j].numpy()) for j in best]
                assert sum(torch.equal(pictures[0], one) for one in donated) == 1
                given += 1
    assert given > 20


def test_a_cue_in_one_place_comes_from_many_donors() -> None:
    samples = [sample(i, value=("female", "male")[i % 2], hair=mask(3, 4)) for i in range(30)]
    audit_set = AuditDataset(samples, spurious=["hair"])
    changes = changes_of(audit_set)
    patches = {made(changes, i)[Change("swap", 0, 0)][0][:, 3:8, 4:9].numpy().tobytes() for i in range(30)}
    assert len(patches) >= 15


def test_images_of_different_sizes_have_no_donors_and_all_else() -> None:
    large = sample(9, value="male", hair=mask(3, 4, side=30), tie=mask(15, 10, side=30), side=30)
    audit_set = AuditDataset([*people(3).samples, large], object=["tie"], spurious=["hair"], classes=["a", "b"])
    changes = changes_of(audit_set)
    for i in range(4):
        assert {c.kind for c in made(changes, i)} == {
            "none", "removal", "control", "fill", "fill_control", "noise_rest", "noise_object"
        }  # fmt: skip
        assert all(p.shape == audit_set.prepared(i)[0].shape for _, p in changes.pictures(i))


def test_a_swap_turns_aligned_images_into_conflicting_ones_and_back() -> None:
    audit_set = people()
    of_class = ("male", "female")
    changes = changes_of(audit_set, alignments=(Alignment("gender", of_class),))
    for i, label in enumerate(audit_set.labels):
        own, wanted = audit_set.attribute_table[i, 0], changes.swapped_values[i, 0]
        assert {own, wanted} == {"female", "male"}
        assert (own == of_class[label]) != (wanted == of_class[label])


def test_of_three_values_the_one_that_goes_with_the_class_is_wanted_and_else_any_other() -> None:
    values = ["a", "b", "c"]
    samples = [
        sample(i, value=values[i % 3] if i % 10 else "", label=i // 3 % 2, hair=mask(3, 4)) for i in range(1, 121)
    ]
    audit_set = AuditDataset(samples, spurious=["hair"], classes=["doctor", "nurse"])
    changes = changes_of(audit_set, alignments=(Alignment("gender", ("b", "")),))
    drawn = Counter()
    for own, label, wanted in zip(
        audit_set.attribute_table[:, 0], audit_set.labels, changes.swapped_values[:, 0], strict=True
    ):
        if not own:
            assert wanted == ""
        elif label == 0 and own != "b":
            assert wanted == "b"
        else:
            assert wanted in set(values) - {own}
            drawn[own, wanted] += 1
    # Both others are drawn, neither hardly ever.
    assert len(drawn) == 6 and min(drawn.values()) >= 3
    # Without alignments every value may be drawn, whatever the class.
    free = changes_of(audit_set).swapped_values[:, 0]
    assert {(o, w) for o, w in zip(audit_set.attribute_table[:, 0], free, strict=True) if o} == set(drawn)


def test_an_attribute_with_one_value_is_not_swapped() -> None:
    samples = [sample(i, value="female", hair=mask(3, 4)) for i in range(4)]
    calls: list[str] = []
    changes = changes_of(AuditDataset(samples, spurious=["hair"]), swaps={"gender": lambda s, v: calls.append(v)})
    assert (changes.swapped_values == "").all()
    assert all(Change("swap", attribute=0) not in made(changes, i) for i in range(4)) and not calls


def test_the_users_swap_gets_the_sample_and_the_value_once_and_its_picture_is_taken() -> None:
    audit_set, calls = people(), []

    def swap(sample: AuditSample, value: str) -> Tensor | Image.Image | None:
        calls.append((sample.id, value))
        assert isinstance(sample.image, Tensor)
        if sample.id == "portrait-3":
            return None
        brighter = (sample.image + 20).clone()
        if sample.id == "portrait-4":
            return Image.fromarray(brighter.permute(1, 2, 0).numpy())
        return sample.image if sample.id == "portrait-5" else brighter

    changes = changes_of(audit_set, swaps={"gender": swap})
    for _ in range(2):  # the second time nothing is asked again
        for i in range(12):
            pictures = made(changes, i).get(Change("swap", attribute=0), [])
            # Given back as it is, nothing was swapped: portrait-5 as little as portrait-3.
            expected = [] if i in (3, 5) else [raw(audit_set, i) + 20]
            assert len(pictures) == len(expected)
            assert all(torch.equal(a, b) for a, b in zip(pictures, expected, strict=True))
    other = {"female": "male", "male": "female"}
    assert calls == [(s.id, other[str(s.attributes["gender"])]) for s in audit_set.samples]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(3, 9, SIDE, dtype=torch.uint8), r"portrait-0.*its size \(3, 24, 24\), got \(3, 9, 24\)"),
        (Image.new("RGB", (SIDE, 9)), r"portrait-0.*its size \(3, 24, 24\), got \(3, 9, 24\)"),
        (torch.zeros(3, SIDE, SIDE), r"portrait-0.*uint8 tensor \(3, H, W\), got torch.float32"),
        (np.zeros((SIDE, SIDE, 3), dtype=np.uint8), r"portrait-0.*expected a PIL image.*got ndarray"),
    ],
    ids=["size", "size of a PIL image", "floats", "an array"],
)
def test_a_swap_that_gives_no_such_image_is_refused_by_the_samples_name(given: Any, message: str) -> None:
    changes = changes_of(people(), swaps={"gender": lambda sample, value: given})
    with pytest.raises(ValueError, match=message):
        made(changes, 0)


def test_a_swapped_image_goes_through_its_samples_own_transform() -> None:
    turned = v2.Compose([v2.RandomHorizontalFlip(0.5), v2.RandomCrop(20), v2.RandomRotation(30)])
    audit_set = people(16, transform=turned)
    # A swap that inverts the colours: wherever the transform puts a pixel, it must put the inverted one too.
    changes = changes_of(audit_set, swaps={"gender": lambda sample, value: 255 - sample.image})
    same_as_raw = 0
    for i in range(16):
        image, swapped = audit_set.prepared(i)[0], made(changes, i)[Change("swap", attribute=0)][0]
        fill = (image == 0).all(dim=0)  # what rotating leaves empty
        assert torch.equal(swapped[:, ~fill], 255 - image[:, ~fill]) and (swapped[:, fill] == 0).all()
        assert float((~fill).float().mean()) > 0.5
        same_as_raw += torch.equal(image, raw(audit_set, i)[:, :20, :20])
    assert same_as_raw < 8
    # The transform draws from the global generator, which is given back.
    before = torch.get_rng_state()
    made(changes_of(audit_set, swaps={"gender": lambda sample, value: 255 - sample.image}), 0)
    assert torch.equal(before, torch.get_rng_state())


FLOATS = {
    "0 to 1": v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Resize((18, 18))]),
    "normalised": v2.Compose(
        [v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.2] * 3), v2.Resize((18, 18))]
    ),
    "doubles": v2.Compose([v2.ToDtype(torch.float64, scale=True), v2.Resize((18, 18))]),
    "grey": v2.Grayscale(),
    "grey floats": v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Grayscale()]),
}


@pytest.mark.parametrize("name", FLOATS)
def test_pictures_that_the_transform_has_made_floats_or_grey_are_changed_alike(name: str) -> None:
    audit_set = people(4, transform=FLOATS[name])
    changes = changes_of(audit_set)
    for i in range(4):
        (image, masks), found = audit_set.prepared(i), made(changes, i)
        noisy = {"noise_rest", "noise_object"} & {c.kind for c in found}
        # Noise of a given size means something else on normalised numbers.
        assert noisy == (set() if name == "normalised" else {"noise_rest", "noise_object"})
        assert {c.kind for c in found} - noisy == {
            "none", "removal", "control", "fill", "fill_control", "swap", "swap_control"
        }  # fmt: skip
        for pictures in found.values():
            for picture in pictures:
                assert picture.dtype == image.dtype and picture.shape == image.shape and picture.isfinite().all()
        hole = torch.from_numpy(widened(masks[1].numpy()))
        removed = found[Change("removal", 1)][0]
        assert torch.equal(removed[:, ~hole], image[:, ~hole]) and not torch.equal(removed, image)


@pytest.mark.parametrize("transform", [None, FLOATS["0 to 1"]], ids=["bytes", "floats"])
def test_noise_has_the_size_of_the_paper_and_its_place(transform: Any) -> None:
    audit_set = people(8, transform=transform)
    changes = changes_of(audit_set)
    spread: list[Tensor] = []
    for i in range(8):
        (image, masks), found = audit_set.prepared(i), made(changes, i)
        scale = 255 if image.dtype == torch.uint8 else 1
        for kind, where in (("noise_rest", ~masks[0]), ("noise_object", masks[0])):
            trials = found[Change(kind)]  # type: ignore[arg-type]
            assert len(trials) == TRIALS and len({t.numpy().tobytes() for t in trials}) == TRIALS
            for trial in trials:
                assert torch.equal(trial[:, ~where], image[:, ~where])
                scaled = trial.double() / scale
                assert float(scaled.min()) >= 0 and float(scaled.max()) <= 1
                moved = (scaled - image.double() / scale)[:, where]
                # Of the middle shades almost nothing is clipped.
                middle = (image.double() / scale)[:, where].sub(0.5).abs() < 0.02
                spread.append(moved[middle])
    drawn = torch.cat(spread)
    clipped = torch.randn(200_000, generator=torch.Generator().manual_seed(0)).mul(0.25).clamp(-0.5, 0.5)
    assert len(drawn) > 1000 and SIGMA == 0.25
    assert float(drawn.std()) == pytest.approx(float(clipped.std()), rel=0.06)
    assert float(drawn.mean()) == pytest.approx(0, abs=0.02)


def test_an_object_that_is_everywhere_or_nowhere_gets_no_noise() -> None:
    whole, none = torch.ones(SIDE, SIDE, dtype=torch.bool), torch.zeros(SIDE, SIDE, dtype=torch.bool)
    samples = [sample(i, hair=mask(3, 4), tie=tie) for i, tie in enumerate((whole, none, None, mask(15, 10)))]
    changes = changes_of(AuditDataset(samples, object=["tie"], spurious=["hair"]))
    noisy = [{c.kind for c in made(changes, i)} & {"noise_rest", "noise_object"} for i in range(4)]
    # With noise on one part only, there is nothing to compare it with.
    assert noisy == [set(), set(), set(), {"noise_rest", "noise_object"}]


def everything(changes: Changes, names: tuple[str, ...]) -> dict[str, list[tuple[int, bytes]]]:
    return {
        name: [(number, picture.numpy().tobytes()) for number, picture in changes.pictures(i)]
        for i, name in enumerate(names)
    }


def test_the_seed_decides_and_the_order_of_the_images_does_not() -> None:
    audit_set = people()
    first = everything(changes_of(audit_set), audit_set.ids)
    state = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    assert everything(changes_of(audit_set), audit_set.ids) == first
    assert torch.equal(state[0], torch.get_rng_state()) and state[1] == np.random.get_state()[1].tolist()  # noqa: NPY002
    assert everything(changes_of(audit_set, seed=1), audit_set.ids) != first
    order = np.random.default_rng(0).permutation(len(audit_set)).tolist()
    turned = audit_set.select(order)
    assert everything(changes_of(turned), turned.ids) == first


def test_without_any_region_of_a_role_there_is_nothing_of_its_kind() -> None:
    only_object = AuditDataset(people().samples, object=["tie"], classes=["a", "b"])
    assert {c.kind for c in changes_of(only_object).list} == {"none", "noise_rest", "noise_object"}
    swapped = changes_of(only_object, swaps={"gender": lambda s, v: s.image})
    assert Change("swap", attribute=0) in swapped.list
    only_spurious = AuditDataset(people().samples, spurious=["hair"], classes=["a", "b"])
    assert not {c.kind for c in changes_of(only_spurious).list} & {"noise_rest", "noise_object"}


@pytest.mark.parametrize("name", [None, "grey", "normalised"])
def test_contents_are_as_long_for_images_that_lack_the_region(name: str | None) -> None:
    samples = [*people(4).samples, sample(9, value="male", tie=mask(15, 10))]
    audit_set = AuditDataset(samples, object=["tie"], spurious=["hair"], classes=["a", "b"],
                             transform=FLOATS[name] if name else None)  # fmt: skip
    changes = changes_of(audit_set)
    assert changes.shown[:, 0].tolist() == [True] * 4 + [False]
    looks = changes.contents
    assert looks.shape[:2] == (1, 5) and np.isfinite(looks).all()
    assert not looks[0, 4].any() and looks[0, :4].any(axis=1).all()

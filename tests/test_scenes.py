"""The generated scenes: labels honoured, masks exact and disjoint, chance confined to the generator given."""

import itertools
import pickle
from collections import Counter

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from bias_audit import AuditSample
from bias_audit.data import painting
from bias_audit.data import scenes as module
from bias_audit.data.painting import REGIONS
from bias_audit.data.scenes import (
    GENDERS,
    OCCUPATIONS,
    Scene,
    balanced_scenes,
    bayes_accuracy,
    counts_with_bias,
    draw_scene,
    draw_scenes,
    scene_dataset,
    swap_gender,
)

PAIRS = [(occupation, gender) for occupation in OCCUPATIONS for gender in GENDERS]


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return draw_scenes(dict.fromkeys(PAIRS, 50), seed=0)


def of(scenes: list[Scene], **labels: str) -> list[Scene]:
    return [scene for scene in scenes if all(getattr(scene, name) == value for name, value in labels.items())]


def mean_area(scenes: list[Scene], region: str) -> float:
    return float(np.mean([scene.masks[region].mean() for scene in scenes]))


def same(one: Scene, other: Scene) -> bool:
    return np.array_equal(one.image, other.image) and all(
        np.array_equal(one.masks[name], other.masks[name]) for name in REGIONS
    )


@pytest.mark.parametrize("size", [32, 64, 97])
def test_images_and_masks_have_the_promised_form(size: int) -> None:
    for scene in draw_scenes(dict.fromkeys(PAIRS, 4), seed=2, size=size):
        assert scene.image.shape == (3, size, size)
        assert scene.image.dtype == np.uint8
        assert scene.image.flags.c_contiguous
        assert tuple(scene.masks) == REGIONS
        for mask in scene.masks.values():
            assert mask.shape == (size, size)
            assert mask.dtype == np.bool_


def test_masks_are_disjoint_and_leave_some_background(scenes: list[Scene]) -> None:
    for scene in scenes:
        claims = np.sum([scene.masks[name] for name in REGIONS], axis=0)
        assert claims.max() == 1
        assert 0.2 < (claims == 0).mean() < 0.8


def test_face_hair_and_coat_are_always_visible(scenes: list[Scene]) -> None:
    for scene in scenes:
        for name, least in (("face", 0.02), ("hair", 0.005), ("coat", 0.1)):
            assert scene.masks[name].mean() > least, name


def test_stethoscopes_are_worn_as_often_as_documented(scenes: list[Scene]) -> None:
    for occupation, expected in module.P_STETHOSCOPE.items():
        worn = [scene.masks["stethoscope"].sum() for scene in of(scenes, occupation=occupation)]
        # 100 scenes: four standard errors of the rate.
        assert np.mean(np.greater(worn, 0)) == pytest.approx(expected, abs=4 * np.sqrt(expected * (1 - expected) / 100))
        assert all(count == 0 or count >= 12 for count in worn), "a worn stethoscope must be there to be seen"


def test_face_lies_above_coat_and_hair_above_face(scenes: list[Scene]) -> None:
    for scene in scenes:
        rows = {name: np.flatnonzero(scene.masks[name].any(axis=1)) for name in ("face", "hair", "coat")}
        assert rows["hair"].min() <= rows["face"].min() < rows["coat"].min()
        assert rows["coat"].max() > rows["face"].max()


def test_mask_edges_are_edges_of_the_picture() -> None:
    """The hair's colour is found inside its mask and not outside: painted twice, only the hair's colour changed."""
    black, white = draw_with_hair((0, 0, 0)), draw_with_hair((255, 255, 255))
    brightness = white.image.astype(int).sum(axis=0) - black.image.astype(int).sum(axis=0)
    hair = black.masks["hair"]
    np.testing.assert_array_equal(hair, white.masks["hair"])
    touched = neighbourhood(hair) | black.masks["face"]  # an edge pixel mixes; brows and beard follow the hair
    assert not brightness[~touched].any()
    inner = ~neighbourhood(~hair)
    assert inner.sum() > 50
    assert (brightness[inner] > 300).all()


def draw_with_hair(colour: tuple[int, int, int]) -> Scene:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(painting, "_HAIR_COLOURS", (colour,) * len(painting._HAIR_COLOURS))
        return draw_scene(np.random.default_rng(11), "nurse", "female")


def neighbourhood(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """The mask grown by one pixel in the eight directions."""
    padded = np.pad(mask, 1)
    height, width = mask.shape
    grown = [padded[1 + y : 1 + y + height, 1 + x : 1 + x + width] for y, x in itertools.product((-1, 0, 1), repeat=2)]
    whole: npt.NDArray[np.bool_] = np.any(grown, axis=0)
    return whole


def test_gender_shows_in_the_hair_and_not_in_the_occupation_cues(scenes: list[Scene]) -> None:
    long, short = of(scenes, gender="female"), of(scenes, gender="male")
    assert mean_area(long, "hair") > 2 * mean_area(short, "hair")
    assert min(scene.masks["hair"].sum() for scene in long) > np.median([s.masks["hair"].sum() for s in short])
    assert mean_area(long, "coat") == pytest.approx(mean_area(short, "coat"), rel=0.1)


def test_occupation_does_not_change_face_or_hair(scenes: list[Scene]) -> None:
    for gender, region in itertools.product(GENDERS, ("face", "hair")):
        areas = [mean_area(of(scenes, occupation=name, gender=gender), region) for name in OCCUPATIONS]
        assert areas[0] == pytest.approx(areas[1], rel=0.12)


def test_the_outfit_is_all_that_the_occupation_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What makes the closed form exact: with the outfit given, doctor and nurse are the same picture."""
    for outfit in itertools.product((True, False), repeat=2):
        monkeypatch.setattr(module, "_sample_outfit", lambda rng, occupation, outfit=outfit: outfit)
        doctor, nurse = (draw_scene(np.random.default_rng(4), name, "male") for name in OCCUPATIONS)
        assert same(doctor, nurse)


def cue(*scenes: Scene) -> npt.NDArray[np.bool_]:
    """Face and hair of any of the scenes and two pixels more: edges mix, and tips of hair are thinner than a pixel."""
    return neighbourhood(
        neighbourhood(np.any([scene.masks[name] for scene in scenes for name in ("face", "hair")], axis=0))
    )


@pytest.mark.parametrize("size", [32, 64, 96])
def test_the_gender_cue_is_all_that_the_gender_changes(size: int) -> None:
    """Doctor or nurse, coat or tunic: outside face and hair of both, light and noise included, no pixel differs."""
    for seed, occupation in itertools.product(range(20), OCCUPATIONS):
        female, male = (draw_scene(np.random.default_rng(seed), occupation, name, size) for name in GENDERS)
        changed = (female.image != male.image).any(axis=0)
        assert not (changed & ~cue(female, male)).any()
        assert changed.sum() > 0.02 * changed.size
        # The features of the face stay where they are: eyes and mouth are the same in both.
        both = female.masks["face"] & male.masks["face"]
        assert changed[both].mean() < 0.9
        # What is worn is what it was, but for the hair that falls over it.
        for region in ("coat", "stethoscope"):
            differs = female.masks[region] != male.masks[region]
            assert not (differs & ~cue(female, male)).any()


def test_both_genders_leave_the_generator_in_one_state() -> None:
    for occupation in OCCUPATIONS:
        states = []
        for gender in GENDERS:
            rng = np.random.default_rng(6)
            draw_scene(rng, occupation, gender)
            states.append(rng.random())
        assert states[0] == states[1]


def test_a_sample_is_drawn_again_as_the_other_gender() -> None:
    audit_set = balanced_scenes(3, seed=5, size=48)
    scenes = draw_scenes(dict.fromkeys(PAIRS, 3), seed=5, size=48)
    for sample, scene in zip(audit_set.samples, scenes, strict=True):
        assert isinstance(sample, AuditSample) and sample.attributes["gender"] == scene.gender
        assert np.array_equal(sample.image, scene.image) and OCCUPATIONS[sample.label] == scene.occupation
        other = next(name for name in GENDERS if name != scene.gender)
        own, swapped = swap_gender(sample, scene.gender), swap_gender(sample, other)
        assert torch.equal(own, torch.from_numpy(scene.image))
        assert swapped.dtype == torch.uint8 and swapped.shape == (3, 48, 48)
        changed = (swapped != own).any(dim=0).numpy()
        assert changed.mean() > 0.02
        # The hair of the other gender is not annotated: all that changed is near the head, nothing below the chest.
        face = np.flatnonzero(scene.masks["face"].any(axis=1))
        assert np.flatnonzero(changed.any(axis=1)).max() < face.max() + 0.2 * 48
        untouched = ~neighbourhood(scene.masks["hair"] | scene.masks["face"] | changed)
        assert untouched.mean() > 0.5


def test_a_swapped_sample_is_as_good_as_one_of_that_gender() -> None:
    """Long hair covers more of the picture, whoever was drawn first: swapping gives what drawing gives."""
    drawn = {name: mean_area(draw_scenes({("nurse", name): 60}, seed=1), "hair") for name in GENDERS}
    for own, other in (GENDERS, GENDERS[::-1]):
        data = scene_dataset({("nurse", own): 60}, seed=2)
        redrawn = [module._draw_key(module._Key.parse(sample.id), other, 64) for sample in data.samples]
        assert mean_area(redrawn, "hair") == pytest.approx(drawn[other], rel=0.1)
        for sample, scene in zip(data.samples, redrawn, strict=True):
            assert np.array_equal(swap_gender(sample, other), scene.image)


def test_nobody_in_a_data_set_is_another_ones_counterfactual() -> None:
    """Else the scenes of a test set would come in pairs, and count for less than they are."""
    audit_set = balanced_scenes(2, seed=8)
    drawn = [sample.decode()[0] for sample in audit_set.samples]
    for sample, gender in itertools.product(audit_set.samples, GENDERS):
        swapped = swap_gender(sample, gender)
        assert sum(np.array_equal(swapped, image) for image in drawn) == (gender == sample.attributes["gender"])


def test_ids_stay_what_they_are_when_other_scenes_are_added() -> None:
    few, many = (scene_dataset({("nurse", "male"): 4, ("doctor", "female"): n}, seed=3) for n in (2, 7))
    assert set(few.ids) < set(many.ids)
    images = dict(zip(many.ids, (sample.decode()[0] for sample in many.samples), strict=True))
    assert all(np.array_equal(sample.decode()[0], images[sample.id]) for sample in few.samples)


def test_bayes_accuracy_agrees_with_a_rule_learned_from_draws() -> None:
    rng = np.random.default_rng(5)
    draws = [(module._sample_outfit(rng, name), name) for name in OCCUPATIONS for _ in range(20_000)]
    order = rng.permutation(len(draws))
    learn, check = ([draws[index] for index in half] for half in np.array_split(order, 2))
    table = Counter(learn)
    rule = {outfit: max(OCCUPATIONS, key=lambda name: table[outfit, name]) for outfit, _ in draws}
    measured = np.mean([rule[outfit] == name for outfit, name in check])
    assert bayes_accuracy() == pytest.approx(measured, abs=0.006)
    assert 0.94 < bayes_accuracy() < 0.97


def test_both_occupation_cues_are_needed_for_the_bayes_accuracy() -> None:
    for table in (module.P_OPEN_COAT, module.P_STETHOSCOPE):
        alone = (table["doctor"] + 1 - table["nurse"]) / 2
        assert alone < bayes_accuracy() - 0.01


def test_counts_are_honoured_and_scenes_are_shuffled() -> None:
    counts = {("doctor", "male"): 30, ("nurse", "female"): 20, ("nurse", "male"): 1}
    drawn = [(scene.occupation, scene.gender) for scene in draw_scenes(counts, seed=7)]
    assert Counter(drawn) == counts
    assert drawn != sorted(drawn)
    assert draw_scenes({}, seed=7) == []


def test_same_seed_same_scenes_other_seed_other_scenes() -> None:
    counts = dict.fromkeys(PAIRS, 3)
    first, again, other = (draw_scenes(counts, seed=seed) for seed in (8, 8, 9))
    assert all(same(one, two) for one, two in zip(first, again, strict=True))
    assert not any(same(one, two) for one, two in itertools.product(first, other))
    assert not any(same(one, two) for one, two in itertools.combinations(first, 2))


def test_scenes_do_not_depend_on_key_order_nor_on_the_other_counts() -> None:
    counts = {("doctor", "female"): 2, ("nurse", "male"): 3}
    reordered = draw_scenes(dict(reversed(counts.items())), seed=3)
    assert all(same(one, two) for one, two in zip(draw_scenes(counts, seed=3), reordered, strict=True))
    more = draw_scenes({("doctor", "female"): 5, ("doctor", "male"): 4, ("nurse", "male"): 3}, seed=3)
    for scene in reordered:
        assert any(same(scene, candidate) for candidate in more)


def test_no_global_random_state_is_used() -> None:
    state = pickle.dumps(np.random.get_state())  # noqa: NPY002 - the legacy state is what must stay as it is
    draw_scenes(dict.fromkeys(PAIRS, 1), seed=1)
    assert pickle.dumps(np.random.get_state()) == state  # noqa: NPY002


def test_scenes_survive_pickling_for_loader_workers(scenes: list[Scene]) -> None:
    copy = pickle.loads(pickle.dumps(scenes[0]))
    assert same(copy, scenes[0])
    assert (copy.occupation, copy.gender) == (scenes[0].occupation, scenes[0].gender)


def test_counts_with_bias_gives_the_papers_shares() -> None:
    counts = counts_with_bias(1000, male_doctors=0.78, female_nurses=0.93)
    assert counts == {
        ("doctor", "female"): 220,
        ("doctor", "male"): 780,
        ("nurse", "female"): 930,
        ("nurse", "male"): 70,
    }
    for share in (0.0, 1 / 3, 0.5, 1.0):
        odd = counts_with_bias(7, share, share)
        assert sum(odd.values()) == 14
        assert odd["doctor", "male"] == odd["nurse", "female"] == round(7 * share)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: draw_scene(np.random.default_rng(0), "surgeon", "male"), "occupation: expected one of"),
        (lambda: draw_scene(np.random.default_rng(0), "doctor", "unknown"), "gender: expected one of"),
        (lambda: draw_scene(np.random.default_rng(0), "doctor", "male", size=8), "size: expected a whole number"),
        (lambda: draw_scenes({("doctor", "man"): 1}, seed=0), "counts: expected keys among"),
        (lambda: draw_scenes({("doctor", "male"): -1}, seed=0), "at least 0, got -1"),
        (lambda: draw_scenes({("doctor", "male"): 1}, seed=-1), "seed: expected a whole number"),
        (lambda: draw_scenes({}, seed=0, size=4096), "size: expected a whole number"),
        (lambda: balanced_scenes(0, seed=0), "the audit set is empty"),
        (lambda: swap_gender(balanced_scenes(1, seed=0).samples[0], "other"), "gender: expected one of"),
        (
            lambda: swap_gender(AuditSample(torch.zeros(3, 64, 64), 0, {}, {}, "a.png"), "male"),
            "sample 'a.png': expected",
        ),
        (
            lambda: swap_gender(AuditSample(Image.new("RGB", (9, 9)), 1, {}, {}, "nurse-male-0000-seed-0"), "male"),
            "expected the tensor of a generated scene, got Image",
        ),
        (lambda: counts_with_bias(10, 1.2, 0.5), "male_doctors: expected a share"),
        (lambda: counts_with_bias(10, 0.5, float("nan")), "female_nurses: expected a share"),
        (lambda: counts_with_bias(-1, 0.5, 0.5), "per_class: expected a whole number"),
    ],
)
def test_wrong_input_is_refused_with_what_was_expected(call: object, message: str) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match=message):
        call()

"""Generated scenes for the doctor/nurse case: pictures whose spurious cue, and its place, are known exactly.

Enters: an occupation, a gender and a generator; or counts per occupation and gender, and a seed. Leaves: `Scene`s, each
an RGB picture of a person with one exact mask per region, as `painting` makes it; or an `AuditDataset` of them, with
coat and stethoscope as objects and face and hair as spurious.

The case is section 6.3 of the Grad-CAM paper (arXiv 1610.02391): a doctor-or-nurse classifier, trained on pictures
where 78 % of the doctors were men and 93 % of the nurses were women, had learned faces and hair.

*Cue values.* `gender` is the annotated value of the drawn gender cue and nothing else: hair length, and the shape and
shading of the jaw. Skin tone, hair colour, pose, background and light are drawn independently of both labels.
`occupation` acts on the picture through two draws alone, each independent of gender: the garment (an open coat with
lapels, or a tunic with a V-neck; their colours overlap, so shape must be read) and whether a stethoscope is worn. Both
draws are noisy (`P_OPEN_COAT`, `P_STETHOSCOPE`): surgeons wear scrubs, nurses borrow coats. Hence the best any
classifier can do without the gender cue is known, `bayes_accuracy`: with g and s for the two draws and equal classes,
it is the sum over the four (g, s) of `max(P(g, s | doctor), P(g, s | nurse)) / 2` = 0.958.

*Counterfactuals.* Every draw is made whatever the gender, so one scene can be drawn again as the other gender: what
differs is the gender cue, and what hair it uncovers or hides. `swap_gender` does so for an audit's samples.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bias_audit.data.dataset import AuditDataset
from bias_audit.data.painting import paint
from bias_audit.data.samples import AuditSample, PendingSample

OCCUPATIONS = ("doctor", "nurse")
GENDERS = ("female", "male")

P_OPEN_COAT: Mapping[str, float] = {"doctor": 0.92, "nurse": 0.03}
P_STETHOSCOPE: Mapping[str, float] = {"doctor": 0.92, "nurse": 0.05}

MIN_SIZE, MAX_SIZE = 32, 1024


@dataclass(frozen=True, eq=False)
class Scene:
    """One picture with its labels: `image` uint8 `(3, size, size)`, `masks` bool `(size, size)` for every region.

    Masks hold visible pixels only, so they are disjoint; a region that the scene does not show has an all-False mask.
    `face` holds ears and beard shadow and no neck; `coat` is whatever is worn on the torso, the shirt in an open
    coat included; `occupation` is one of `OCCUPATIONS`, `gender` one of `GENDERS`.

    Example:
        >>> scene = draw_scene(np.random.default_rng(0), "doctor", "female")
        >>> scene.image.shape, sorted(scene.masks), scene.masks["face"].dtype
        ((3, 64, 64), ['coat', 'face', 'hair', 'stethoscope'], dtype('bool'))
    """

    image: npt.NDArray[np.uint8]
    masks: Mapping[str, npt.NDArray[np.bool_]]
    occupation: str
    gender: str


def bayes_accuracy() -> float:
    """Best accuracy in [0, 1] from garment and stethoscope alone, classes equal, in closed form from the constants.

    Example:
        >>> round(bayes_accuracy(), 4)
        0.9576
    """
    best = 0.0
    for coat in (True, False):
        for stethoscope in (True, False):
            best += max(
                (P_OPEN_COAT[name] if coat else 1.0 - P_OPEN_COAT[name])
                * (P_STETHOSCOPE[name] if stethoscope else 1.0 - P_STETHOSCOPE[name])
                for name in OCCUPATIONS
            )
    return best / len(OCCUPATIONS)


def counts_with_bias(per_class: int, male_doctors: float, female_nurses: float) -> dict[tuple[str, str], int]:
    """Counts by (occupation, gender) with `per_class` scenes of each occupation and the given shares in [0, 1].

    Shares are rounded to whole scenes; the paper's are 0.78 and 0.93.

    Raises:
        ValueError: a negative count, or a share outside [0, 1].

    Example:
        >>> counts_with_bias(100, male_doctors=0.78, female_nurses=0.93)
        {('doctor', 'female'): 22, ('doctor', 'male'): 78, ('nurse', 'female'): 93, ('nurse', 'male'): 7}
    """
    _require_count("per_class", per_class)
    for name, share in (("male_doctors", male_doctors), ("female_nurses", female_nurses)):
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"{name}: expected a share in [0, 1], got {share!r}; give 0.78 for 78 %")
    male, female = round(per_class * male_doctors), round(per_class * female_nurses)
    return {
        ("doctor", "female"): per_class - male,
        ("doctor", "male"): male,
        ("nurse", "female"): female,
        ("nurse", "male"): per_class - female,
    }


def draw_scenes(counts: Mapping[tuple[str, str], int], seed: int, size: int = 64) -> list[Scene]:
    """Draw `counts[occupation, gender]` scenes of each pair, shuffled, the same ones for the same arguments.

    A scene has its own generator, spawned from (seed, pair, number within the pair): it does not change with the other
    pairs' counts. Two sets of one seed therefore share scenes: give the test set another seed than the training set.

    Raises:
        ValueError: an unknown pair, a negative count or seed, or a `size` out of range.

    Example:
        >>> scenes = draw_scenes({("doctor", "male"): 2, ("nurse", "female"): 1}, seed=1)
        >>> sorted((scene.occupation, scene.gender) for scene in scenes)
        [('doctor', 'male'), ('doctor', 'male'), ('nurse', 'female')]
    """
    _require_size(size)
    return [_draw_key(key, key.gender, size) for key in _keys(counts, seed)]


def scene_dataset(
    counts: Mapping[tuple[str, str], int], seed: int, size: int = 64, transform: Callable[..., Any] | None = None
) -> AuditDataset:
    """The scenes of `draw_scenes` as an audit set: occupation is the class, gender the attribute.

    A sample's id names its scene, so that `swap_gender` can draw it again.

    Raises:
        ValueError: as `draw_scenes`; or counts that are all 0.

    Example:
        >>> scene_dataset({("doctor", "male"): 2, ("nurse", "female"): 1}, seed=1).subjects.classes
        ('doctor', 'nurse')
    """
    samples = [
        AuditSample(
            image=torch.from_numpy(scene.image.copy()),
            label=OCCUPATIONS.index(scene.occupation),
            regions={name: torch.from_numpy(mask.copy()) for name, mask in scene.masks.items()},
            attributes={"gender": scene.gender},
            id=str(key),
        )
        for key, scene in zip(_keys(counts, seed), draw_scenes(counts, seed, size), strict=True)
    ]
    return AuditDataset(
        samples,
        object=["coat", "stethoscope"],
        spurious=["face", "hair"],
        classes=OCCUPATIONS,
        transform=transform,
    )


def balanced_scenes(
    per_cell: int, seed: int, size: int = 64, transform: Callable[..., Any] | None = None
) -> AuditDataset:
    """`per_cell` scenes of each occupation x gender as an audit set.

    Raises:
        ValueError: as `scene_dataset`.

    Example:
        >>> len(balanced_scenes(2, seed=0))
        8
    """
    return scene_dataset({(o, g): per_cell for o in OCCUPATIONS for g in GENDERS}, seed, size, transform)


def swap_gender(sample: AuditSample | PendingSample, value: str) -> Tensor:
    """A sample of `scene_dataset` as the other gender: the same scene, drawn again with the other gender cue.

    Uint8 `(3, size, size)`, the sample's own size; its own image where `value` is its own gender. Give it to an audit
    as `swaps={"gender": swap_gender}`. No pixel differs that lies clear of face and hair, before and after.

    Raises:
        ValueError: an unknown gender, or a sample that is not of `scene_dataset`.

    Example:
        >>> sample = balanced_scenes(1, seed=0).samples[0]
        >>> other = "male" if sample.attributes["gender"] == "female" else "female"
        >>> swapped = swap_gender(sample, other)
        >>> swapped.shape, 0.01 < (swapped != sample.image).any(dim=0).float().mean().item() < 0.3
        (torch.Size([3, 64, 64]), True)
    """
    key = _Key.parse(sample.id)
    _require_gender(value)
    image, _ = sample.decode()
    if not isinstance(image, Tensor):
        raise ValueError(f"sample {sample.id!r}: expected the tensor of a generated scene, got {type(image).__name__}")
    return image if value == key.gender else torch.from_numpy(_draw_key(key, value, image.shape[-1]).image)


def draw_scene(rng: np.random.Generator, occupation: str, gender: str, size: int = 64) -> Scene:
    """Draw one scene of `size` x `size` pixels; all chance comes from `rng`.

    What is drawn from `rng` does not depend on `gender`: generators alike give one scene in two genders. Face, hair
    and coat are visible in every scene; the stethoscope in those that have one.

    Raises:
        ValueError: an unknown occupation or gender, or a `size` outside 32 to 1024.

    Example:
        >>> scene = draw_scene(np.random.default_rng(3), "nurse", "male", size=96)
        >>> scene.image.dtype, bool(scene.masks["face"].any()), bool((scene.masks["face"] & scene.masks["hair"]).any())
        (dtype('uint8'), True, False)
    """
    if occupation not in OCCUPATIONS:
        raise ValueError(f"occupation: expected one of {OCCUPATIONS}, got {occupation!r}; correct the label")
    _require_gender(gender)
    _require_size(size)

    # The only two draws that know the occupation: everything below sees their outcome instead, which is what makes
    # bayes_accuracy exact.
    open_coat, stethoscope = _sample_outfit(rng, occupation)
    image, masks = paint(rng, size, open_coat, stethoscope, long_hair=gender == "female")
    return Scene(image, masks, occupation, gender)


class _Key(NamedTuple):
    """What a scene is drawn from; as text, a sample's id."""

    seed: int
    occupation: str
    gender: str
    number: int

    def __str__(self) -> str:
        return f"{self.occupation}-{self.gender}-{self.number:04d}-seed-{self.seed}"

    @staticmethod
    def parse(text: str) -> _Key:
        match = _ID.fullmatch(text)
        if match is None:
            raise ValueError(
                f"sample {text!r}: expected an id that scene_dataset gave, such as 'nurse-male-0003-seed-0': only its "
                "samples can be drawn again"
            )
        return _Key(int(match["seed"]), match["occupation"], match["gender"], int(match["number"]))


_PAIRS = tuple((occupation, gender) for occupation in OCCUPATIONS for gender in GENDERS)
_ID = re.compile(
    rf"(?P<occupation>{'|'.join(OCCUPATIONS)})-(?P<gender>{'|'.join(GENDERS)})-(?P<number>\d+)-seed-(?P<seed>\d+)"
)


def _keys(counts: Mapping[tuple[str, str], int], seed: int) -> list[_Key]:
    """The keys of `counts[occupation, gender]` scenes of each pair, shuffled."""
    for pair, count in counts.items():
        if pair not in _PAIRS:
            raise ValueError(f"counts: expected keys among {list(_PAIRS)}, got {pair!r}; give (occupation, gender)")
        _require_count(f"counts[{pair!r}]", count)
    _require_count("seed", seed)
    keys = [_Key(seed, *pair, number) for pair in _PAIRS for number in range(counts.get(pair, 0))]
    shuffler = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(len(_PAIRS),)))
    return [keys[index] for index in shuffler.permutation(len(keys))]


def _draw_key(key: _Key, gender: str, size: int) -> Scene:
    """The key's scene with the cue of `gender`; its chance is that of the key's own pair."""
    chance = np.random.SeedSequence(key.seed, spawn_key=(_PAIRS.index((key.occupation, key.gender)), key.number))
    return draw_scene(np.random.default_rng(chance), key.occupation, gender, size)


def _sample_outfit(rng: np.random.Generator, occupation: str) -> tuple[bool, bool]:
    """Whether the garment is an open coat, and whether a stethoscope is worn: independent given the occupation."""
    return bool(rng.random() < P_OPEN_COAT[occupation]), bool(rng.random() < P_STETHOSCOPE[occupation])


def _require_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 0:
        raise ValueError(f"{name}: expected a whole number of at least 0, got {value!r}; correct it")


def _require_gender(gender: str) -> None:
    if gender not in GENDERS:
        raise ValueError(f"gender: expected one of {GENDERS}, got {gender!r}; correct the label")


def _require_size(size: int) -> None:
    if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or not MIN_SIZE <= size <= MAX_SIZE:
        raise ValueError(f"size: expected a whole number from {MIN_SIZE} to {MAX_SIZE} pixels, got {size!r}; use 64")

"""Families of small image problems whose cue is known exactly, for the power study.

Enters: a family, a kind and a seed. Leaves: a `Problem`: training images with their label and cue columns, an
`AuditDataset` of other images on which the cue goes with no label, a `swap` for it, and the pictures on which the truth
is measured, of which neither training nor audit sees one.

A picture is drawn from its own generator, and draws the same numbers whatever the cue's value. Drawn again with another
value, it differs in the cue and in nothing else.

The kinds of a family differ in this:

============  ====================  =============  ==============
kind          cue goes with label   object         cue is drawn
============  ====================  =============  ==============
used          yes                   hard to read   yes
independent   no                    hard to read   yes
ignored       yes                   easy to read   yes
none          yes, in the columns   hard to read   no
============  ====================  =============  ==============

Where the object is hard to read, the cue helps whoever may use it. Where it is easy, it is right where the cue is
wrong; there the cue is also wrong more often (`AGREEMENT`), or a network could as well use either.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Literal, Protocol, get_args

import cv2
import numpy as np
import numpy.typing as npt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from bias_audit import AuditDataset, AuditSample
from bias_audit.data.scenes import OCCUPATIONS, Scene, draw_scene

Kind = Literal["used", "independent", "ignored", "none"]
Part = Literal["training", "audit", "truth"]
KINDS: tuple[Kind, ...] = get_args(Kind)
PARTS: tuple[Part, ...] = get_args(Part)

# How often, in training, the cue's value is the label's, from and to; each model draws its own. Where the label does
# not matter it is as often as by chance.
AGREEMENT: dict[Kind, tuple[float, float]] = {"used": (0.9, 1.0), "ignored": (0.65, 0.9), "none": (0.9, 1.0)}
CUE, OBJECT = "cue", "figure"

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Look:
    """How a picture is drawn: object easy or hard, cue drawn or not and how strong, and for which part of a study."""

    easy: bool
    drawn: bool
    strength: float
    part: Part


@dataclass(frozen=True, eq=False)
class Picture:
    """An image, uint8 `(3, H, W)`, with the places of object and cue, bool `(H, W)`."""

    image: npt.NDArray[np.uint8]
    object: Bools
    cue: Bools


class Draw(Protocol):
    """Draws one picture; `label` and `value` are indices."""

    def __call__(self, rng: np.random.Generator, label: int, value: int, look: Look) -> Picture: ...


class Network(nn.Module):
    """Three convolutions; the head pools the last map, or keeps its places.

    The last map has a place for every 4 pixels, with `coarse` for every 8.

    Example:
        >>> Network(classes=4, size=40, places=True)(torch.zeros(2, 3, 40, 40)).shape
        torch.Size([2, 4])
    """

    def __init__(self, classes: int, size: int, *, places: bool, coarse: bool = False) -> None:
        super().__init__()
        layers = [*_convolution(3, 16, 5, stride=2), *((nn.MaxPool2d(2),) if coarse else ())]
        layers += [*_convolution(16, 32, 3), nn.MaxPool2d(2), *_convolution(32, 32, 3)]
        side = size // (8 if coarse else 4)
        self.features = nn.Sequential(*layers)
        self.head = (
            nn.Sequential(nn.Flatten(), nn.Linear(32 * side * side, 32), nn.ReLU(), nn.Linear(32, classes))
            if places
            else nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, classes))
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(B, classes)` of images `(B, 3, H, W)` in [0, 1]."""
        logits: Tensor = self.head(self.features(images))
        return logits


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    ]


@dataclass(frozen=True)
class Family:
    """A problem: its classes, the cue's values (the i-th goes with class i), how it is drawn, and who learns it.

    `strength` is how strong the cue is drawn, from and to, as a share of its full strength; each model draws its own.
    """

    name: str
    classes: tuple[str, ...]
    values: tuple[str, ...]
    size: int
    draw: Draw
    network: Callable[[], nn.Module]
    training: int
    epochs: int = 10
    strength: tuple[float, float] = (0.6, 1.0)


# Decoy digits


@cache
def digits_of(part: Part) -> tuple[tuple[Floats, ...], ...]:
    """Of each class the digits of one part, each `(8, 8)` in [0, 1]; no digit is in two parts."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    # Half of them to learn from, a fifth to audit on, the rest for the truth.
    begin, end = {"training": (0, 0.5), "audit": (0.5, 0.7), "truth": (0.7, 1.0)}[part]
    mine = order[int(begin * len(order)) : int(end * len(order))]
    return tuple(tuple(digits.images[i] / 16 for i in mine if digits.target[i] == label) for label in range(10))


def draw_digit(rng: np.random.Generator, label: int, value: int, look: Look) -> Picture:
    """A handwritten digit, and in one corner a block whose grey is one of ten.

    After the decoy digits of arXiv 1703.03717, section 4, with scikit-learn's digits in the place of MNIST's.
    """
    size, block = 32, 7
    of_label = digits_of(look.part)[label]
    digit = cv2.resize(of_label[rng.integers(len(of_label))], (18, 18), interpolation=cv2.INTER_LINEAR)
    top, left = rng.integers(6, 9, 2)
    bottom, right = (int(x) * (size - block) for x in rng.integers(0, 2, 2))
    ink, noise = np.zeros((size, size)), rng.normal(0, 1, (3, size, size))
    ink[top : top + 18, left : left + 18] = digit
    grey = np.full((size, size), 0.3) + (0.65 if look.easy else 0.14) * ink
    cue = np.zeros((size, size), dtype=bool)
    cue[bottom : bottom + block, right : right + block] = True
    if look.drawn:
        grey = np.where(cue, 0.5 + look.strength * (value / 9 - 0.5), grey)
    return Picture(_exposed(np.broadcast_to(grey, (3, size, size)) + 0.1 * noise), (ink > 0.25) & ~cue, cue)


# Shapes beside a patch of colour

_HUES = np.array([[0.85, 0.2, 0.2], [0.2, 0.75, 0.25], [0.25, 0.35, 0.9], [0.85, 0.8, 0.2]])
_FILLS = np.array([[0.9, 0.55, 0.8], [0.45, 0.85, 0.85], [0.8, 0.65, 0.4], [0.55, 0.5, 0.85]])
SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = ("red", "green", "blue", "yellow")


def draw_shape(rng: np.random.Generator, label: int, value: int, look: Look) -> Picture:
    """A shape, and elsewhere in the image a patch of one of four colours.

    After SpuCo (arXiv 2306.11957), which puts a colour of chosen magnitude beside a shape of chosen difficulty.
    """
    size, radius = 40, rng.uniform(6.5, 8)
    # The two stand in opposite quarters, so that neither covers the other.
    across, down = rng.integers(0, 2, 2)
    near, far = rng.uniform(10, 12, 2), rng.uniform(28, 30, 2)
    places = np.array([near, far])
    centre = places[[across, down], [0, 1]]
    other = places[[1 - across, 1 - down], [0, 1]]
    turn, noise = rng.uniform(-0.35, 0.35), rng.normal(0, 1, (3, size, size))
    ink = _filled(_outline(SHAPES[label], radius, turn) + centre, size)
    cue = _filled(other + 5 * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]), size)
    fill = _FILLS[label] if look.easy else np.full(3, 0.76)
    image = np.full((3, size, size), 0.5)
    image = np.where(ink, fill[:, None, None], image)
    if look.drawn:
        image = np.where(cue, 0.5 + look.strength * (_HUES[value][:, None, None] - 0.5), image)
    return Picture(_exposed(image + 0.12 * noise), ink & ~cue, cue)


def _outline(shape: str, radius: float, turn: float) -> Floats:
    """The corners of a shape about the origin `(P, 2)`."""
    if shape == "cross":
        arm = 0.35
        quarter = np.array([[arm, 1], [arm, arm], [1, arm]])
        turns = [np.array([[c, s], [-s, c]]) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1))]
        points = np.concatenate([quarter @ t.T for t in turns])
    else:
        count, first = {"circle": (24, 0.0), "square": (4, 0.25), "triangle": (3, 0.25)}[shape]
        angles = 2 * np.pi * (np.arange(count) / count + first)
        points = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    turned: Floats = radius * points @ rotation
    return turned


def _filled(corners: Floats, size: int) -> Bools:
    canvas = np.zeros((size, size), dtype=np.uint8)
    cv2.fillPoly(canvas, [np.rint(corners).astype(np.int32)], 1)
    filled: Bools = canvas.astype(bool)
    return filled


# One cross or two, and a disc


def draw_crosses(rng: np.random.Generator, label: int, value: int, look: Look) -> Picture:
    """One cross or two, and a disc at the left edge or the right.

    After the synthetic task of ActDiff (arXiv 1910.00199), whose distractor tells the class by where it is.
    """
    size, arm = 40, 5
    noise = rng.normal(0, 1, (3, size, size))
    rows, columns = rng.permutation([8, 20, 32])[:2] + rng.integers(-2, 3, 2), rng.integers(14, 27, 2)
    height = rng.integers(6, 35)
    ink = np.zeros((size, size), dtype=bool)
    for row, column in list(zip(rows, columns, strict=True))[: label + 1]:
        ink[row - arm : row + arm + 1, column - 1 : column + 1] = True
        ink[row - 1 : row + 1, column - arm : column + arm + 1] = True
    y, x = np.mgrid[:size, :size]
    cue = (x - (4 if value == 0 else size - 5)) ** 2 + (y - height) ** 2 <= 4**2
    image = np.full((3, size, size), 0.4) + (0.55 if look.easy else 0.12) * ink
    if look.drawn:
        image = np.where(cue, 0.4 + 0.5 * look.strength, image)
    return Picture(_exposed(image + 0.14 * noise), ink & ~cue, cue)


# Doctors and nurses

# The gender of most doctors, and that of most nurses.
WITH_OCCUPATIONS = ("male", "female")
_DYES = np.array([[200, 70, 70], [70, 120, 200]])


def draw_person(rng: np.random.Generator, label: int, value: int, look: Look) -> Picture:
    """A doctor or a nurse, a woman or a man (`bias_audit.data.scenes`); the cue's place is face and hair.

    Where the object is easy, the garment has a colour of its class. Where no cue is drawn, all that differs between
    woman and man, face and hair with it, has the colour of the room behind.
    """
    seed = int(rng.integers(2**62))

    def drawn(gender: str) -> Scene:
        return draw_scene(np.random.default_rng(seed), OCCUPATIONS[label], gender)

    scene = drawn(WITH_OCCUPATIONS[value])
    image, head = scene.image.astype(np.float64), scene.masks["face"] | scene.masks["hair"]
    garment = scene.masks["coat"] | scene.masks["stethoscope"]
    if look.easy:
        image = np.where(scene.masks["coat"], 0.4 * image + 0.6 * _DYES[label][:, None, None], image)
    if not look.drawn:
        other = drawn(WITH_OCCUPATIONS[1 - value])
        head = head | other.masks["face"] | other.masks["hair"] | (scene.image != other.image).any(axis=0)
        room = np.where(head | garment, np.nan, image)
        # Each row has the colour of the room at its height, and the grain that the camera gives all of the image.
        grain = np.nanmedian(np.abs(np.diff(room, axis=2))) * rng.normal(0, 1.05, image.shape)
        wall = np.nanmedian(room, axis=2, keepdims=True)
        image, garment = np.where(head, (wall + grain).clip(0, 255), image), garment & ~head
    return Picture(np.rint(image).astype(np.uint8), garment, head)


def _exposed(image: Floats) -> npt.NDArray[np.uint8]:
    exposed: npt.NDArray[np.uint8] = np.rint(255 * image.clip(0, 1)).astype(np.uint8)
    return exposed


FAMILIES = {
    family.name: family
    for family in (
        Family(
            "decoy digits",
            tuple(str(digit) for digit in range(10)),
            tuple(f"grey {digit}" for digit in range(10)),
            32,
            draw_digit,
            lambda: Network(10, 32, places=True),
            training=2000,
        ),
        Family("colour patches", SHAPES, COLOURS, 40, draw_shape, lambda: Network(4, 40, places=False), training=1500),
        Family(
            "crosses",
            ("one", "two"),
            ("left", "right"),
            40,
            draw_crosses,
            lambda: Network(2, 40, places=True),
            training=1500,
        ),
        Family(
            "doctor/nurse",
            OCCUPATIONS,
            WITH_OCCUPATIONS,
            64,
            draw_person,
            lambda: Network(2, 64, places=False, coarse=True),
            training=1200,
            # A gender cue is drawn or it is not.
            strength=(1.0, 1.0),
        ),
    )
}


@dataclass(frozen=True)
class Problem:
    """What one model of the study learns, is audited on, and is tested on for the truth.

    `agreement` is the share of training images whose cue has the label's value, `strength` how strong the cue is drawn.
    """

    family: Family
    kind: Kind
    seed: int
    agreement: float
    strength: float

    @classmethod
    def of(cls, family: str, kind: Kind, seed: int, strength: float | None = None) -> Problem:
        """The problem number `seed` of a family and kind; agreement and strength are drawn from their ranges.

        A `strength` that is given is taken as it is.

        Example:
            >>> problem = Problem.of("crosses", "used", 3)
            >>> AGREEMENT["used"][0] <= problem.agreement <= AGREEMENT["used"][1]
            True
        """
        rng = np.random.default_rng([zlib.crc32(f"{family} {kind}".encode()), seed])
        its = FAMILIES[family]
        chance = 1 / len(its.values)
        agreement, drawn = rng.uniform(*AGREEMENT.get(kind, (chance, chance))), rng.uniform(*its.strength)
        return cls(its, kind, seed, float(agreement), float(drawn) if strength is None else strength)

    def picture(self, part: Part, number: int, label: int, value: int) -> Picture:
        """Picture `number` of a part, with this label and this value of the cue.

        The truth is measured on the same pictures for all seeds of a kind, as far as strengths are alike; what is
        learned and audited is drawn for each anew.
        """
        look = Look(self.kind == "ignored", self.kind != "none", self.strength, part)
        seed = 0 if part == "truth" else self.seed
        key = zlib.crc32(f"{self.family.name} {self.kind}".encode()), PARTS.index(part), seed, number
        return self.family.draw(np.random.default_rng(key), label, value, look)

    def columns(self) -> tuple[Ints, Ints]:
        """Labels and cue values of the training set, `(N,)`; classes are equally frequent."""
        count, classes = self.family.training, len(self.family.classes)
        rng = np.random.default_rng([1, self.seed])
        labels = np.arange(count) % classes
        others = (labels + rng.integers(1, classes, count)) % classes
        return labels, np.where(rng.random(count) < self.agreement, labels, others)

    def images(self, part: Part, labels: Ints, values: Ints) -> Tensor:
        """The pictures of a part from its first on, with these labels and cue values, uint8 `(N, 3, H, W)`."""
        pairs = enumerate(zip(labels.tolist(), values.tolist(), strict=True))
        return torch.from_numpy(np.stack([self.picture(part, i, y, v).image for i, (y, v) in pairs]))

    def audit_set(self, count: int) -> AuditDataset:
        """Other pictures with every label with every cue value equally often, their regions and their cue's value."""
        cells = list(product(range(len(self.family.classes)), range(len(self.family.values))))
        samples = []
        for number in range(count):
            label, value = cells[number % len(cells)]
            drawn = self.picture("audit", number, label, value)
            regions = {OBJECT: torch.from_numpy(drawn.object), CUE: torch.from_numpy(drawn.cue)}
            attributes = {CUE: self.family.values[value]}
            samples.append(AuditSample(torch.from_numpy(drawn.image), label, regions, attributes, f"{number:04d}"))
        return AuditDataset(samples, object=[OBJECT], spurious=[CUE], classes=self.family.classes)

    def swap(self, sample: AuditSample, value: str) -> Tensor:
        """The audit's picture `sample`, drawn again with another value of the cue, uint8 `(3, H, W)`."""
        index = self.family.values.index(value)
        return torch.from_numpy(self.picture("audit", int(sample.id), sample.label, index).image)

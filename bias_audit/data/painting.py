"""How a generated scene is painted: a person in a room, with an exact mask of each region.

Enters: what is worn, the length of the hair, the size, and a generator. Leaves: the picture and its masks.

A scene is painted once, on a grid of 4 x 4 subpixels per pixel, with a number per shape. That one painting gives the
colours (a pixel is the mean of its own 16 subpixels) and the regions (a pixel belongs to what fills most of it, of the
four regions and the rest), so picture and masks cannot disagree. The rest is the room, neck, hands, trousers, and a
badge on a cord that both occupations wear equally often.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

REGIONS = ("face", "hair", "coat", "stethoscope")
P_BADGE = 0.5  # in either occupation: a cord round the neck is not enough to tell a stethoscope
SUBPIXELS = 4

_Points = npt.NDArray[np.float64]
_Colour = npt.NDArray[np.float64]

_REST, _FACE, _HAIR, _COAT, _STETHOSCOPE = range(5)

_SKIN_TONES = ((250, 222, 202), (238, 197, 166), (219, 168, 130), (187, 132, 94), (146, 96, 66), (98, 64, 46))
_HAIR_COLOURS = ((38, 30, 28), (74, 48, 34), (112, 66, 40), (150, 74, 42), (206, 168, 104), (158, 154, 150))
_WALLS = ((206, 214, 216), (216, 208, 194), (186, 202, 206), (198, 206, 188), (212, 200, 204), (172, 180, 190))
_WHITES = ((242, 242, 240), (236, 240, 244), (244, 240, 232))
_PASTELS = ((196, 214, 232), (200, 224, 220), (212, 220, 204), (222, 212, 228))
_SCRUBS = ((92, 158, 164), (96, 134, 184), (124, 164, 132), (158, 124, 170), (196, 140, 152))
_DARKS = ((52, 64, 92), (70, 60, 64), (62, 86, 88), (96, 62, 70), (88, 92, 104))
_CORDS = (
    (34, 36, 42),
    (30, 44, 84),
    (92, 28, 44),
    (28, 70, 62),
    (110, 112, 120),
    (70, 110, 160),
    (150, 150, 152),
    (150, 110, 120),
)
# One list per garment kind: a coat may be pale blue and a tunic white, so colour alone does not tell them apart.
_COAT_COLOURS = (*_WHITES, *_WHITES, *_PASTELS, *_PASTELS, *_SCRUBS)
_TUNIC_COLOURS = (*_WHITES, *_PASTELS, *_SCRUBS, *_SCRUBS)

_ANGLES = np.linspace(0.0, 2.0 * math.pi, 28, endpoint=False)
_CIRCLE: _Points = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1)
_MIRROR: _Points = np.array([-1.0, 1.0])


def paint(
    rng: np.random.Generator, size: int, open_coat: bool, stethoscope: bool, long_hair: bool
) -> tuple[npt.NDArray[np.uint8], dict[str, npt.NDArray[np.bool_]]]:
    """A person as an image uint8 `(3, size, size)`, and a mask bool `(size, size)` for each of `REGIONS`.

    Without an open coat a tunic is worn; short hair goes with a squarer jaw and the shadow of a beard. The generator
    is drawn from equally often whatever the hair is, so that generators alike give one scene with either.

    Example:
        >>> image, masks = paint(np.random.default_rng(0), 64, open_coat=True, stethoscope=True, long_hair=False)
        >>> image.shape, sorted(masks)
        ((3, 64, 64), ['coat', 'face', 'hair', 'stethoscope'])
    """
    canvas = _Canvas(size * SUBPIXELS)
    _paint_room(canvas, rng)
    skin = _pick(rng, _SKIN_TONES, 7.0)
    hair = _pick(rng, _HAIR_COLOURS, 10.0)
    look = _Look(skin=skin, hair=hair, hair_length=rng.uniform(-0.06, 0.05), squareness=2.0 if long_hair else 2.7)

    scale, lean, nod = rng.uniform(0.88, 1.1), rng.uniform(-0.09, 0.09), rng.uniform(-0.12, 0.12)
    origin = (rng.uniform(0.42, 0.58), 0.52 + rng.uniform(-0.03, 0.06))
    body = _Pose(scale, lean, origin)
    head = body.bend(nod, (0.0, -0.10), grow=1.15)

    if long_hair:
        _paint_hair_behind(canvas, head, look)
    _paint_neck(canvas, body, look)
    if open_coat:
        _paint_open_coat(canvas, body, look, rng)
    else:
        _paint_tunic(canvas, body, look, rng)
    if rng.random() < P_BADGE:
        _paint_badge(canvas, body, rng)
    if stethoscope:
        _paint_stethoscope(canvas, body, rng)
    _paint_head(canvas, head, look, rng, beard=not long_hair)
    _paint_hair_over(canvas, head, look, rng, long_hair=long_hair)

    colours, regions = canvas.reduce(SUBPIXELS)
    masks = {name: regions == label for label, name in enumerate(REGIONS, start=1)}
    return _expose(colours, rng), masks


@dataclass(frozen=True)
class _Pose:
    """Similarity from body coordinates (origin between the shoulders, y down, unit = picture side) to the picture."""

    scale: float
    angle: float
    origin: tuple[float, float]

    def __call__(self, points: _Points) -> _Points:
        cos, sin = self.scale * math.cos(self.angle), self.scale * math.sin(self.angle)
        turn: _Points = np.array([[cos, sin], [-sin, cos]])
        moved: _Points = points @ turn + self.origin
        return moved

    def bend(self, angle: float, pivot: tuple[float, float], grow: float) -> _Pose:
        """The same pose turned by ``angle`` and enlarged by ``grow`` about ``pivot``, a point in body coordinates."""
        fixed = np.array([pivot])
        turned = _Pose(self.scale * grow, self.angle + angle, (0.0, 0.0))
        x, y = (self(fixed) - turned(fixed))[0]
        return _Pose(turned.scale, turned.angle, (float(x), float(y)))


@dataclass(frozen=True, eq=False)
class _Look:
    skin: _Colour
    hair: _Colour
    hair_length: float
    squareness: float


class _Canvas:
    """A painting that stores, at every subpixel, the number of the shape seen there."""

    def __init__(self, side: int) -> None:
        self._side = side
        self._picture = Image.new("P", (side, side), 0)
        self._draw = ImageDraw.Draw(self._picture)
        self._colours: list[_Colour] = []
        self._regions: list[int] = []

    def polygon(self, points: _Points, colour: _Colour, region: int) -> None:
        self._draw.polygon((points * self._side).ravel().tolist(), fill=self._shape(colour, region))

    def line(self, points: _Points, width: float, colour: _Colour, region: int) -> None:
        pixels = (points * self._side).ravel().tolist()
        self._draw.line(
            pixels, fill=self._shape(colour, region), width=max(1, round(width * self._side)), joint="curve"
        )

    def _shape(self, colour: _Colour, region: int) -> int:
        self._colours.append(colour)
        self._regions.append(region)
        return len(self._regions) - 1

    def reduce(self, factor: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.intp]]:
        """Colours (side, side, 3) in [0, 255] and region numbers (side, side), each from its own subpixels alone."""
        palette = np.clip(np.rint(np.stack(self._colours)), 0, 255).astype(np.uint8)
        self._picture.putpalette(palette.tobytes())
        colours = np.asarray(self._picture.convert("RGB").reduce(factor), dtype=np.float32)
        # With regions for colours, two three-channel reductions count the subpixels of all five.
        coverage = np.empty((5, *colours.shape[:2]), dtype=np.int16)
        shares = np.zeros((len(self._regions), 6), dtype=np.uint8)
        shares[np.arange(len(self._regions)), np.asarray(self._regions)] = 240
        for half in (0, 3):
            self._picture.putpalette(np.ascontiguousarray(shares[:, half : half + 3]).tobytes())
            reduced = np.asarray(self._picture.convert("RGB").reduce(factor))
            for channel in range(min(3, 5 - half)):
                coverage[half + channel] = reduced[:, :, channel]
        return colours, coverage.argmax(axis=0)


def _paint_room(canvas: _Canvas, rng: np.random.Generator) -> None:
    wall = _pick(rng, _WALLS, 10.0)
    canvas.polygon(_box(0.0, 0.0, 1.0, 1.0), wall, _REST)
    horizon = rng.uniform(0.68, 0.86)
    for _ in range(int(rng.integers(2, 5))):
        left, width = rng.uniform(-0.1, 0.9), rng.uniform(0.15, 0.4)
        kind = rng.integers(4)
        tint = wall + rng.uniform(-45.0, 30.0) + rng.normal(0.0, 12.0, 3)
        if kind == 0:  # window: a light pane with a cross bar
            top, bottom = rng.uniform(0.02, 0.15), rng.uniform(0.35, 0.55)
            canvas.polygon(_box(left - 0.02, top - 0.02, left + width + 0.02, bottom + 0.02), wall - 35.0, _REST)
            canvas.polygon(_box(left, top, left + width, bottom), wall + np.array([14.0, 24.0, 34.0]), _REST)
            canvas.polygon(_box(left + width / 2 - 0.01, top, left + width / 2 + 0.01, bottom), wall - 35.0, _REST)
        elif kind == 1:  # shelf with boxes
            level = rng.uniform(0.2, 0.6)
            for item in range(3):
                x, height = left + item * width / 3.0, rng.uniform(0.05, 0.13)
                colour = wall + rng.normal(-20.0, 35.0, 3)
                canvas.polygon(_box(x, level - height, x + width / 3.6, level), colour, _REST)
            canvas.polygon(_box(left - 0.02, level, left + width + 0.02, level + 0.025), wall - 60.0, _REST)
        elif kind == 2:  # cabinet
            top = rng.uniform(0.4, 0.65)
            canvas.polygon(_box(left, top, left + width, 1.0), tint - 20.0, _REST)
            canvas.polygon(_box(left + 0.02, top + 0.03, left + width - 0.02, top + 0.16), tint, _REST)
            canvas.polygon(_box(left + 0.02, top + 0.19, left + width - 0.02, top + 0.34), tint, _REST)
        else:  # picture or notice
            top = rng.uniform(0.05, 0.4)
            canvas.polygon(_box(left, top, left + width, top + 0.7 * width), tint - 25.0, _REST)
            canvas.polygon(_box(left + 0.02, top + 0.02, left + width - 0.02, top + 0.7 * width - 0.02), tint, _REST)
    canvas.polygon(_box(0.0, horizon, 1.0, 1.0), wall * 0.72 + rng.normal(0.0, 10.0, 3), _REST)
    canvas.polygon(_box(0.0, horizon - 0.012, 1.0, horizon + 0.008), wall * 0.9, _REST)


def _paint_neck(canvas: _Canvas, body: _Pose, look: _Look) -> None:
    canvas.polygon(body(_box(-0.056, -0.16, 0.056, 0.06)), look.skin * 0.88, _REST)


def _paint_limbs(
    canvas: _Canvas, body: _Pose, look: _Look, rng: np.random.Generator, cloth: _Colour, hem: float
) -> None:
    """What every garment shares: arms, hands, and the silhouette of the torso down to ``hem``."""
    arm = np.array([(-0.15, 0.01), (-0.225, 0.045), (-0.262, 0.13), (-0.285, 0.40), (-0.20, 0.41), (-0.16, 0.18)])
    half = np.array([(-0.062, -0.035), (-0.10, -0.005), (-0.19, 0.025), (-0.205, 0.12), (-0.19, 0.30), (-0.215, hem)])
    for side in (np.ones(2), _MIRROR):
        canvas.polygon(body(_ellipse(-0.243, 0.425, 0.04, 0.05) * side), look.skin * 0.95, _REST)
        canvas.polygon(body(arm * side), cloth * 0.9, _COAT)
    canvas.polygon(body(_mirrored(half)), cloth, _COAT)
    for side in (np.ones(2), _MIRROR):  # the seam that sets the arm off from the torso
        canvas.line(
            body(np.array([(-0.178, 0.13), (-0.178, 0.30), (-0.2, min(hem, 0.42))]) * side), 0.012, cloth * 0.74, _COAT
        )
    # Pockets come with either garment, so that they tell nothing.
    if rng.random() < 0.6:
        for side in (np.ones(2), _MIRROR):
            canvas.line(body(np.array([(-0.165, 0.31), (-0.085, 0.31)]) * side), 0.012, cloth * 0.74, _COAT)


def _paint_trousers(canvas: _Canvas, body: _Pose, rng: np.random.Generator) -> None:
    legs = np.array([(-0.165, 0.24), (-0.175, 0.75), (-0.01, 0.75), (0.01, 0.75), (0.175, 0.75), (0.165, 0.24)])
    canvas.polygon(body(legs), _pick(rng, _DARKS, 8.0), _REST)


def _paint_open_coat(canvas: _Canvas, body: _Pose, look: _Look, rng: np.random.Generator) -> None:
    cloth, shirt = _pick(rng, _COAT_COLOURS, 5.0), _pick(rng, (*_DARKS, *_SCRUBS, *_PASTELS, *_WHITES), 10.0)
    gap, notch = rng.uniform(0.008, 0.03), rng.uniform(0.15, 0.22)
    _paint_limbs(canvas, body, look, rng, cloth, hem=0.75)
    opening = np.array([(-0.066, -0.04), (-gap, notch), (-gap - 0.012, 0.75)])
    canvas.polygon(body(_mirrored(opening)), shirt, _COAT)
    canvas.polygon(body(np.array([(-0.034, -0.04), (0.034, -0.04), (0.0, 0.035)])), look.skin * 0.92, _REST)
    lapel = np.array([(-0.07, -0.045), (-0.125, 0.045), (-0.09, 0.062), (-0.108, 0.085), (-gap, notch), (-0.045, 0.03)])
    fold = rng.uniform(0.86, 0.95)
    for side in (np.ones(2), _MIRROR):
        canvas.polygon(body(lapel * side), cloth * fold, _COAT)


def _paint_tunic(canvas: _Canvas, body: _Pose, look: _Look, rng: np.random.Generator) -> None:
    cloth = _pick(rng, _TUNIC_COLOURS, 8.0)
    trim = cloth * rng.uniform(0.62, 0.84)
    neckline = rng.uniform(0.07, 0.12)
    _paint_trousers(canvas, body, rng)
    _paint_limbs(canvas, body, look, rng, cloth, hem=rng.uniform(0.46, 0.60))
    collar = np.array([(-0.068, -0.04), (0.0, neckline), (0.068, -0.04)])
    canvas.polygon(body(collar), look.skin * 0.92, _REST)
    canvas.line(body(collar), 0.02, trim, _COAT)


def _paint_badge(canvas: _Canvas, body: _Pose, rng: np.random.Generator) -> None:
    cord, end = _pick(rng, _CORDS, 8.0), rng.uniform(0.15, 0.24)
    canvas.line(
        body(np.array([(-0.07, -0.05), (-0.06, 0.02), (0.0, end), (0.06, 0.02), (0.07, -0.05)])), 0.016, cord, _REST
    )
    canvas.polygon(body(_box(-0.03, end, 0.03, end + 0.075)), np.array([236.0, 238.0, 240.0]), _REST)
    canvas.polygon(body(_box(-0.02, end + 0.015, 0.0, end + 0.05)), cord, _REST)


def _paint_stethoscope(canvas: _Canvas, body: _Pose, rng: np.random.Generator) -> None:
    tube, end, side = _pick(rng, _CORDS, 8.0), rng.uniform(0.2, 0.28), float(rng.choice((-1.0, 1.0)))
    loop = np.array(
        [(-0.075, -0.05), (-0.1, 0.03), (-0.085, 0.11), (-0.02, 0.16), (0.045, 0.13), (0.085, 0.05), (0.078, -0.05)]
    )
    drop = np.array([(-0.02, 0.16), (0.0, end - 0.02), (0.03, end)])
    flip = np.array([side, 1.0])
    canvas.line(body(loop * flip), 0.016, tube, _STETHOSCOPE)
    canvas.line(body(drop * flip), 0.016, tube, _STETHOSCOPE)
    canvas.polygon(body(_ellipse(0.034, end + 0.01, 0.03, 0.03) * flip), tube, _STETHOSCOPE)
    canvas.polygon(
        body(_ellipse(0.034, end + 0.01, 0.018, 0.018) * flip), np.array([196.0, 200.0, 206.0]), _STETHOSCOPE
    )


def _paint_head(canvas: _Canvas, head: _Pose, look: _Look, rng: np.random.Generator, beard: bool) -> None:
    """Head and face; with ``beard``, the lower face lies in a shadow of varying strength."""
    skin, skull = look.skin, _skull(look.squareness)
    strength = rng.uniform(0.15, 0.55)  # with or without a beard: the draws that follow must not shift
    for side in (-1.0, 1.0):
        canvas.polygon(head(_ellipse(0.112 * side, -0.215, 0.02, 0.033)), skin * 0.9, _FACE)
    canvas.polygon(head(skull), skin, _FACE)
    if beard:
        shadow = (1.0 - strength) * skin + strength * (0.6 * look.hair + 20.0)
        jaw = skull[skull[:, 1] > -0.2]
        jaw = jaw[np.argsort(jaw[:, 0])]
        upper = np.array([(0.08, -0.165), (0.045, -0.155), (0.0, -0.168), (-0.045, -0.155), (-0.08, -0.165)])
        canvas.polygon(head(np.concatenate([jaw, upper])), shadow, _FACE)
    dark = np.minimum(look.hair, skin * 0.6) * 0.8
    gaze, smile = rng.uniform(-0.006, 0.006), rng.uniform(0.0, 0.016)
    for side in (-1.0, 1.0):
        canvas.polygon(head(_ellipse(0.045 * side, -0.228, 0.02, 0.013)), np.array([244.0, 244.0, 242.0]), _FACE)
        canvas.polygon(head(_ellipse(0.045 * side + gaze, -0.228, 0.011, 0.013)), np.array([44.0, 34.0, 32.0]), _FACE)
        brow = np.array([(0.022, -0.253), (0.045, -0.259), (0.07, -0.252)]) * [side, 1.0]
        canvas.line(head(brow), 0.011, dark, _FACE)
    canvas.line(head(np.array([(0.002, -0.215), (0.012, -0.187), (-0.006, -0.183)])), 0.01, skin * 0.78, _FACE)
    mouth = np.array([(-0.036, -0.14 - smile), (-0.015, -0.134), (0.015, -0.134), (0.036, -0.14 - smile)])
    canvas.line(head(mouth), 0.014, skin * [0.72, 0.5, 0.5], _FACE)


def _paint_hair_behind(canvas: _Canvas, head: _Pose, look: _Look) -> None:
    tip = look.hair_length
    half = np.array(
        [(-0.06, -0.38), (-0.115, -0.34), (-0.145, -0.25), (-0.17, -0.13), (-0.182, tip - 0.03), (-0.12, tip)]
    )
    canvas.polygon(head(_mirrored(half)), look.hair * 0.82, _HAIR)


def _paint_hair_over(canvas: _Canvas, head: _Pose, look: _Look, rng: np.random.Generator, long_hair: bool) -> None:
    part, brow, tip = rng.uniform(-0.05, 0.05), rng.uniform(-0.305, -0.285), look.hair_length
    if long_hair:
        fringe = [(0.1, -0.24), (0.07, brow), (part, brow - 0.035), (-0.07, brow), (-0.1, -0.24)]
        crown = _arch(0.143, -0.2, 0.2)
        lock = [(-0.098, -0.25), (-0.143, -0.24), (-0.168, -0.14), (-0.178, tip - 0.02), (-0.13, tip), (-0.104, -0.08)]
        for side in (np.ones(2), _MIRROR):
            canvas.polygon(head(np.array(lock) * side), look.hair, _HAIR)
    else:
        fringe = [(0.1, -0.26), (0.085, brow), (part, brow - 0.012), (-0.085, brow), (-0.1, -0.26)]
        crown = _arch(0.122, -0.235, 0.155)
    canvas.polygon(head(np.concatenate([crown, fringe])), look.hair, _HAIR)
    shine = np.array([(-0.075, -0.345), (-0.02, -0.372), (0.03, -0.37)])
    canvas.line(head(shine), 0.012, look.hair * 1.12 + 12.0, _HAIR)


def _expose(colours: npt.NDArray[np.float32], rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """The picture as a camera gives it: light from one side, exposure, a colour cast and sensor noise."""
    size = colours.shape[0]
    direction, strength = rng.uniform(0.0, 2.0 * math.pi), rng.uniform(0.05, 0.22)
    ramp = np.linspace(-1.0, 1.0, size, dtype=np.float32) * np.float32(strength)
    light = 1.0 + ramp[:, None] * np.float32(math.sin(direction)) + ramp * np.float32(math.cos(direction))
    gain = (rng.uniform(0.82, 1.02) * rng.normal(1.0, 0.025, 3)).astype(np.float32)
    noise = rng.standard_normal(colours.shape, dtype=np.float32) * np.float32(rng.uniform(3.0, 8.0))
    exposed = np.clip(colours * light[:, :, None] * gain + noise, 0.0, 255.0).astype(np.uint8)
    return np.ascontiguousarray(exposed.transpose(2, 0, 1))


def _skull(squareness: float) -> _Points:
    """Outline of the head, a superellipse narrowing to the chin: exponent 2 is an oval, more a squarer jaw."""
    corners: _Points = np.sign(_CIRCLE) * np.abs(_CIRCLE) ** (2.0 / squareness)
    taper = 1.0 - 0.14 * np.clip(corners[:, 1:], 0.0, None)
    outline: _Points = corners * np.concatenate([taper, np.ones_like(taper)], axis=1) * [0.11, 0.145] + [0.0, -0.225]
    return outline


def _arch(width: float, base: float, height: float) -> _Points:
    """The upper half of a superellipse standing on ``base``, from left to right."""
    angles = np.linspace(math.pi, 2.0 * math.pi, 15)
    ends = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    outline: _Points = np.sign(ends) * np.abs(ends) ** 0.8 * [width, height] + [0.0, base]
    return outline


def _ellipse(x: float, y: float, width: float, height: float) -> _Points:
    return _CIRCLE * [width, height] + [x, y]


def _box(left: float, top: float, right: float, bottom: float) -> _Points:
    return np.array([(left, top), (right, top), (right, bottom), (left, bottom)])


def _mirrored(half: _Points) -> _Points:
    """A closed outline from its left half, listed from top to bottom."""
    return np.concatenate([half, (half * _MIRROR)[::-1]])


def _pick(rng: np.random.Generator, colours: Sequence[tuple[int, int, int]], spread: float) -> _Colour:
    """One of the colours, a little lighter or darker, and shifted in hue less than in lightness."""
    shift = rng.normal(0.0, spread) + rng.normal(0.0, 0.4 * spread, 3)
    return np.asarray(colours[int(rng.integers(len(colours)))], dtype=np.float64) + shift

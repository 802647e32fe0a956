"""Where the face, the hair, the torso and the hands of people are, from the keypoints of their poses and their masks.

Enters: keypoints `(P, 17, 3)` of P persons in COCO's order, and their masks `(P, H, W)`. Leaves: for each region a
mask of each person, empty where the person does not show it.

This is geometry: no network looks at the pixels, and nothing is said about who a person is. An average head is turned
until its nose, eyes and ears lie on those that are seen, so that a head may be tilted, lie, or be seen from the side or
from behind. Regions are then drawn in the head's own frame, and along the limbs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bias_audit.data.outlines import box_of

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
# A person's number, and the middles of pixels: x `(1, W)` and y `(H, 1)`.
Grid = tuple[int, Floats, Floats]

REGIONS = ("face", "hair", "torso", "hands")

# Nose, eyes, ears, shoulders, elbows, wrists, hips, knees, ankles; of each pair the person's left first.
KEYPOINTS = 17
FACE_POINTS, HEAD_POINTS = slice(0, 3), slice(0, 5)
SHOULDERS, ELBOWS, WRISTS, HIPS = slice(5, 7), slice(7, 9), slice(9, 11), slice(11, 13)

# An adult's head in mm, rounded: to the person's left, down and forward, from the height of the eyes on the axis of
# the ears. Its nose, eyes, ears; the middle of its shoulders; and where each point of the head looks.
HEAD = np.array([(0, 42, 108), (32, 0, 78), (-32, 0, 78), (72, 18, 0), (-72, 18, 0)], dtype=float)
NECK = np.array([(0, 235, -15)], dtype=float)
OUTWARD = np.array([(0, 0, 1), (0.5, 0, 0.87), (-0.5, 0, 0.87), (1, 0, 0), (-1, 0, 0)])
EYES = np.array((0, 0, 78), dtype=float)
# By how many mm a detector's points differ from these. Detectors put ears anywhere between the cheek and the lobe.
SPREADS, NECK_SPREAD = np.array((8, 8, 8, 18, 18), dtype=float), 70.0
# All turns are tried at these angles; those far from an upright head towards the camera need more evidence.
YAWS, PITCHES = np.deg2rad(np.arange(-180, 180, 7.5)), np.deg2rad(np.arange(-45, 46, 7.5))
YAW_SPREAD, PITCH_SPREAD = np.deg2rad(60), np.deg2rad(20)
# What it counts against a turn that a point which is not seen would face the camera.
UNSEEN = 3.0
# Beyond this turn from the camera it is the back of a head, whatever a detector says of its eyes.
LARGEST_YAW = np.deg2rad(105)

# Ellipsoids, centre and half axes in mm: a face from the middle of the forehead to the chin and back to the cheeks; and
# what lies around a skull, with room for hair and hats.
FACE = np.array(((0, 24, 40), (76, 92, 64)), dtype=float)
CROWN = np.array(((0, 0, -15), (120, 175, 155)), dtype=float)
TORSO_LENGTH, FOREARM = 480.0, 255.0
# As shares of the torso's length: how far it reaches beyond shoulders and hips, and from its middle at least.
BESIDE, SLENDEREST = 0.1, 0.25
# A hand lies in a circle of this radius in mm, whose centre is this share of the forearm beyond the wrist.
HAND, BEYOND = 95.0, 0.33
# What shows less than this share of its shape is hidden behind something.
LEAST_SHOWN = 0.1


@dataclass(frozen=True)
class Ellipses:
    """One ellipse for each of P persons: `centre` `(P, 2)` and `matrix` `(P, 2, 2)` in pixels, the points whose
    distance d from the centre has `d . inverse(matrix) d <= 1`; `exists` `(P,)`."""

    centre: Floats
    matrix: Floats
    exists: Mask

    def area(self, person: int) -> float:
        """Pixels in one ellipse."""
        return float(np.pi * np.sqrt(max(np.linalg.det(self.matrix[person]), 0.0)))

    def covers(self, person: int, x: Floats, y: Floats) -> Mask:
        """Which points of a grid, `x` `(1, W)` and `y` `(H, 1)`, lie in one ellipse, bool `(H, W)`."""
        if not self.exists[person]:
            return np.zeros((y.size, x.size), dtype=np.bool_)
        whitened = np.linalg.inv(np.linalg.cholesky(self.matrix[person]))
        x, y = x - self.centre[person, 0], y - self.centre[person, 1]
        inside: Mask = np.square(whitened[0, 0] * x) + np.square(whitened[1, 0] * x + whitened[1, 1] * y) <= 1
        return inside


@dataclass(frozen=True)
class Quads:
    """One convex quadrilateral for each of P persons: its `corners` `(P, 4, 2)` in turn, in pixels; `exists` `(P,)`."""

    corners: Floats
    exists: Mask

    def area(self, person: int) -> float:
        """Pixels in one quadrilateral."""
        x, y = self.corners[person].T
        return float(abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2)

    def covers(self, person: int, x: Floats, y: Floats) -> Mask:
        """Which points of a grid lie in one quadrilateral, as `Ellipses.covers`."""
        inside = np.full((y.size, x.size), self.exists[person])
        for corner, following in zip(self.corners[person], np.roll(self.corners[person], -1, axis=0), strict=True):
            edge = following - corner
            inside &= edge[0] * (y - corner[1]) - edge[1] * (x - corner[0]) >= 0
        return inside


@dataclass(frozen=True)
class HalfPlanes:
    """One half-plane for each of P persons: what lies from `point` `(P, 2)` on in `direction` `(P, 2)`."""

    point: Floats
    direction: Floats

    def covers(self, person: int, x: Floats, y: Floats) -> Mask:
        """Which points of a grid lie in one half-plane, as `Ellipses.covers`."""
        point, direction = self.point[person], self.direction[person]
        inside: Mask = (x - point[0]) * direction[0] + (y - point[1]) * direction[1] >= 0
        return inside


@dataclass(frozen=True)
class Heads:
    """How the heads of P persons are turned.

    `axes` `(P, 2, 3)` takes mm of the average head to pixels, `origin` `(P, 2)` is where its origin lies, `yaw` `(P,)`
    its turn in radians to the person's left, and `found` `(P,)` says whether enough of it is seen.
    """

    axes: Floats
    origin: Floats
    yaw: Floats
    found: Mask

    @property
    def scale(self) -> Floats:
        """Pixels for each mm, `(P,)`."""
        scale: Floats = np.linalg.norm(self.axes, axis=(1, 2)) / np.sqrt(2)
        return scale

    def point(self, point: Floats) -> Floats:
        """Where a point of the average head lies, `(P, 2)`."""
        placed: Floats = self.origin + self.axes @ point
        return placed

    def ellipses(self, ellipsoid: Floats, exists: Mask) -> Ellipses:
        """The outlines of an ellipsoid: centre and half axes."""
        centre, half = ellipsoid
        matrix = np.einsum("pik,k,pjk->pij", self.axes, half**2, self.axes)
        return Ellipses(self.point(centre), matrix, exists & self.found)


def people_regions(keypoints: npt.ArrayLike, masks: npt.ArrayLike, wanted: Sequence[str] = REGIONS) -> dict[str, Mask]:
    """Masks of the wanted regions of each person, drawn from keypoints and cut by the person's mask.

    What is claimed of each person:

    - Every region lies inside the person's mask, and no two of them overlap.
    - `face` is drawn where an eye or the nose is seen and the head is not turned away.
    - `hair` lies above the eyes, in the head's own frame, and outside the face. A hat or a bald crown counts as hair;
      hair that hangs below the eyes is left out, for keypoints do not tell it from clothes.
    - `torso` lies between the line of the shoulders and that of the hips. Where no hip is seen it is drawn if the hips
      must lie beyond the edge of the picture, and goes to that edge.
    - `hands` lie around the ends of the forearms, beyond the wrists: nothing where elbow or wrist is not seen.
    - What is hidden, or has too few points, gives no region rather than a guess.

    Turning, scaling, moving or mirroring points and masks does the same to the regions, but for single pixels.

    Args:
        keypoints: float `(P, 17, 3)`: x and y in pixels from the upper left corner, and whether the point is seen: a
            positive third number says so. Compare a detector's scores with a threshold before.
        masks: bool `(P, H, W)`, NumPy or a tensor on the CPU; P may be 0. Masks may overlap.
        wanted: any of "face", "hair", "torso", "hands".

    Returns:
        For each wanted region bool `(P, H, W)`, in the order of `wanted`; all False where the person does not show it.
        "hands" is both hands together.

    Raises:
        ValueError: a shape or a name is not as above, or a seen point is not finite.

    Example:
        >>> head = [[32, 30, 1], [36, 26, 1], [28, 26, 1], [41, 28, 1], [23, 28, 1]]  # nose, eyes, ears
        >>> keypoints = np.zeros((1, 17, 3))
        >>> keypoints[0, :5] = head
        >>> regions = people_regions(keypoints, np.ones((1, 64, 64), dtype=bool), ["face", "torso"])
        >>> bool(regions["face"][0, 30, 32]), bool(regions["torso"].any())
        (True, False)
    """
    points, bodies = _checked(keypoints, masks, wanted)
    heads = head_poses(points)
    faces = heads.ellipses(FACE, (points[:, FACE_POINTS, 2] > 0).any(axis=1) & (np.abs(heads.yaw) < LARGEST_YAW))
    crowns = heads.ellipses(CROWN, heads.found)
    above_eyes = HalfPlanes(heads.point(EYES), -heads.axes[:, :, 1])
    arms = [_hands(points, heads, side) for side in (0, 1)]
    torsos = _torsos(points, heads, bodies.shape[1:])
    drawn = {name: np.zeros(bodies.shape, dtype=np.bool_) for name in wanted}
    for person, body in enumerate(bodies):
        if not body.any():
            continue
        # Only the person's part of the picture: photographs are large, and crowds are many small persons.
        edges = box_of(body)
        box = slice(int(edges.top), int(edges.bottom)), slice(int(edges.left), int(edges.right))
        y, x = (np.arange(side.start, side.stop, dtype=np.float64) + 0.5 for side in box)
        grid: Grid = person, x[None], y[:, None]
        free = body[box]
        face = _unless_hidden(faces.covers(*grid) & free, faces.area(person))
        hair = crowns.covers(*grid) & above_eyes.covers(*grid) & free & ~face
        # A crown has room for hats: most of it is empty above short hair.
        hair = _unless_hidden(hair, faces.area(person))
        free = free & ~face & ~hair
        hands = np.zeros_like(face)
        for hand, beyond in arms:
            hands |= _unless_hidden(hand.covers(*grid) & beyond.covers(*grid) & free, hand.area(person))
        torso = _unless_hidden(torsos.covers(*grid) & free & ~hands, torsos.area(person))
        for name, part in zip(REGIONS, (face, hair, torso, hands), strict=True):
            if name in drawn:
                drawn[name][person][box] = part
    return drawn


def head_poses(keypoints: Floats) -> Heads:
    """How far the average head must be turned for its points to lie where they are seen.

    A head is small beside its distance from the camera, so it is seen in scaled orthography. All yaws and pitches of a
    grid are tried; for each of them roll, size and position have a closed form: orthogonal Procrustes (Schönemann
    1966, Psychometrika 31), which in the plane is one division of complex numbers.

    Args:
        keypoints: float `(P, 17, 3)`, as `people_regions` takes them; what is not seen must be finite too.

    Example:
        >>> profile = np.zeros((1, 17, 3))
        >>> profile[0, [0, 1, 3]] = (108, 42, 1), (78, 0, 1), (0, 18, 1)
        >>> bool(np.rad2deg(head_poses(profile).yaw[0]) > 60)
        True
    """
    seen = keypoints[:, HEAD_POINTS, 2] > 0
    shoulders = (keypoints[:, SHOULDERS, 2] > 0).all(axis=1, keepdims=True)
    points = np.concatenate(
        [keypoints[:, HEAD_POINTS, :2], keypoints[:, SHOULDERS, :2].mean(axis=1, keepdims=True)], axis=1
    )
    weights = np.concatenate([seen / SPREADS**2, shoulders / NECK_SPREAD**2], axis=1)
    total = np.maximum(weights.sum(axis=1, keepdims=True), 1e-12)

    yaws, pitches = (angles.ravel() for angles in np.meshgrid(YAWS, PITCHES))
    turns = _turns(yaws, pitches)
    model = _complex(np.vstack([HEAD, NECK]) @ turns.transpose(0, 2, 1))
    mean = (weights[:, :, None] * points).sum(axis=1) / total
    found = _complex(points - mean[:, None])
    middle = weights @ model.T / total
    centred = model - middle[:, :, None]
    weights = weights[:, None]
    power = (weights * np.abs(centred) ** 2).sum(axis=2)
    turned = (weights * found[:, None] * centred.conj()).sum(axis=2) / np.maximum(power, 1e-12)
    spread = (weights[:, 0] * np.abs(found) ** 2).sum(axis=1, keepdims=True)
    # In mm of the head, so that it does not matter how large the head is in the picture.
    misfit = spread / np.maximum(np.abs(turned) ** 2, 1e-12) - power
    unseen = ~seen @ np.square(np.clip(_towards_camera(yaws, pitches), 0, None)).T
    cost = misfit + (yaws / YAW_SPREAD) ** 2 + (pitches / PITCH_SPREAD) ** 2 + UNSEEN * unseen
    best = cost.argmin(axis=1)

    chosen = np.take_along_axis(turned, best[:, None], axis=1)[:, 0]
    offset = chosen * np.take_along_axis(middle, best[:, None], axis=1)[:, 0]
    roll = np.stack([chosen.real, -chosen.imag, chosen.imag, chosen.real], axis=-1).reshape(-1, 2, 2)
    # Points that all lie in one place have neither size nor direction.
    enough = (seen.sum(axis=1) >= 2) & (spread[:, 0] > 1e-6) & (np.abs(chosen) > 1e-6)
    return Heads(roll @ turns[best], mean - np.stack([offset.real, offset.imag], axis=-1), yaws[best], enough)


def _turns(yaws: Floats, pitches: Floats) -> Floats:
    """What the camera sees across and down of a head turned to the person's left, then bent down: `(R, 2, 3)`.

    The person's left is on the right of the picture.
    """
    zero = np.zeros_like(yaws)
    across = np.stack([np.cos(yaws), zero, np.sin(yaws)], axis=-1)
    down = np.stack([-np.sin(pitches) * np.sin(yaws), np.cos(pitches), np.sin(pitches) * np.cos(yaws)], axis=-1)
    return np.stack([across, down], axis=-2)


def _towards_camera(yaws: Floats, pitches: Floats) -> Floats:
    """By how much each point of the head looks at the camera, -1 to 1, `(R, 5)`."""
    across, down = np.moveaxis(_turns(yaws, pitches), 1, 0)
    towards: Floats = np.cross(across, down) @ OUTWARD.T
    return towards


def _complex(points: Floats) -> npt.NDArray[np.complex128]:
    return points[..., 0] + 1j * points[..., 1]


def _hands(points: Floats, heads: Heads, side: int) -> tuple[Ellipses, HalfPlanes]:
    """The circles of all left or right hands, and what lies beyond the wrists."""
    elbow, wrist = points[:, ELBOWS][:, side], points[:, WRISTS][:, side]
    forearm = wrist[:, :2] - elbow[:, :2]
    length = np.linalg.norm(forearm, axis=1)
    exists = (elbow[:, 2] > 0) & (wrist[:, 2] > 0) & (length > 1e-6)
    # A forearm that points at the camera is short, so the head's size comes first.
    radius = HAND * np.where(heads.found, heads.scale, length / FOREARM)
    circles = radius[:, None, None] ** 2 * np.eye(2)
    return Ellipses(wrist[:, :2] + BEYOND * forearm, circles, exists), HalfPlanes(wrist[:, :2], forearm)


def _torsos(points: Floats, heads: Heads, size: tuple[int, ...]) -> Quads:
    """From the line of the shoulders to that of the hips; from the side the body is wider than these are apart."""
    top, bottom = points[:, SHOULDERS, :2], points[:, HIPS, :2]
    seen = points[:, :, 2] > 0
    cut_off, below = _hips_cut_off(points, heads, size)
    sides = seen[:, SHOULDERS] & (seen[:, HIPS] | cut_off[:, None])
    bottom = np.where(cut_off[:, None, None], top + below[:, None], bottom)
    # With one side seen its line is the middle of the torso.
    top, bottom = (np.where(sides[:, :, None], pair, pair[:, ::-1]) for pair in (top, bottom))
    along = bottom.mean(axis=1) - top.mean(axis=1)
    length = np.linalg.norm(along, axis=1)
    across = np.stack([along[:, 1], -along[:, 0]], axis=-1) / np.maximum(length, 1e-12)[:, None]
    right, left = _widened(top, across, length)
    low_right, low_left = _widened(bottom, across, length)
    return Quads(np.stack([right, left, low_left, low_right], axis=1), sides.any(axis=1) & (length > 1e-6))


def _hips_cut_off(points: Floats, heads: Heads, size: tuple[int, ...]) -> tuple[Mask, Floats]:
    """Whose hips must lie beyond the edge of the picture, `(P,)`, and the way to them from the shoulders `(P, 2)`."""
    neck = points[:, SHOULDERS, :2].mean(axis=1)
    down = neck - heads.origin
    down = TORSO_LENGTH * heads.scale[:, None] * down / np.maximum(np.linalg.norm(down, axis=1), 1e-12)[:, None]
    hips = neck + down
    outside = ((hips < 0) | (hips > size[::-1])).any(axis=1)
    seen = points[:, :, 2] > 0
    return heads.found & seen[:, SHOULDERS].all(axis=1) & ~seen[:, HIPS].any(axis=1) & outside, down


def _widened(pair: Floats, across: Floats, length: Floats) -> tuple[Floats, Floats]:
    """The right and the left end of lines through two joints, `(P, 2)` each."""
    middle = pair.mean(axis=1)
    offsets = np.einsum("pki,pi->pk", pair - middle[:, None], across)
    half = np.abs(offsets).max(axis=1)
    further = np.maximum(BESIDE * length, SLENDEREST * length - half)[:, None] * across
    swapped = (offsets[:, 0] > offsets[:, 1])[:, None]
    first, second = np.where(swapped, pair[:, 1], pair[:, 0]), np.where(swapped, pair[:, 0], pair[:, 1])
    return first - further, second + further


def _unless_hidden(part: Mask, whole: float) -> Mask:
    """The part of a shape that shows; nothing where that is too little of its area."""
    return part if part.sum() >= LEAST_SHOWN * whole else np.zeros_like(part)


def _checked(keypoints: npt.ArrayLike, masks: npt.ArrayLike, wanted: Sequence[str]) -> tuple[Floats, Mask]:
    """The input as arrays, points that are not seen at zero."""
    points, bodies = np.asarray(keypoints, dtype=float).copy(), np.asarray(masks)
    if points.ndim != 3 or points.shape[1:] != (KEYPOINTS, 3):
        raise ValueError(f"keypoints: expected shape (persons, {KEYPOINTS}, 3), got {points.shape}: pass x, y, seen")
    if bodies.ndim != 3 or bodies.dtype != np.bool_ or len(bodies) != len(points):
        raise ValueError(
            f"masks: expected bool of shape ({len(points)}, height, width), got {bodies.dtype} of shape "
            f"{bodies.shape}: pass one mask for each person, `probabilities > 0.5`"
        )
    unknown = sorted(set(wanted) - set(REGIONS))
    if unknown:
        raise ValueError(f"unknown region {unknown[0]!r}: expected one of {', '.join(REGIONS)}")
    points[~(points[:, :, 2] > 0)] = 0
    lost = np.argwhere(~np.isfinite(points[:, :, :2]).all(axis=2))
    if lost.size:
        person, point = (int(number) for number in lost[0])
        raise ValueError(
            f"keypoints: point {point} of person {person} is seen at {points[person, point, :2].tolist()}: give it a "
            "third number of 0 where it is not known"
        )
    return points, bodies

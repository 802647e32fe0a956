"""A drawn person whose parts are known, to try the regions of people on.

Enters: how head and body are turned. Leaves: a `Mannequin`: keypoints, mask, and the true parts, of points strewn over
the surfaces of a body of which the nearer hide those behind them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from bias_audit.data.outlines import Mask
from bias_audit.regions.keypoints import REGIONS, people_regions

Floats = npt.NDArray[np.float64]

# In mm to the person's left, down and forward from between the eyes; not the sizes that `keypoints` has.
JOINTS = np.array(
    [
        *((0, 40, 104), (31, 0, 88), (-31, 0, 88), (75, 16, -4), (-75, 16, -4)),
        *((170, 245, -20), (-170, 245, -20), (310, 480, 0), (-310, 480, 0), (440, 690, 0), (-440, 690, 0)),
        *((95, 720, -10), (-95, 720, -10), (100, 1130, 0), (-100, 1130, 0), (100, 1530, 0), (-100, 1530, 0)),
    ],
    dtype=float,
)
TIPS = np.array([(514, 809, 0), (-514, 809, 0)], dtype=float)
# Each limb between two points, and how thick it is.
LIMBS = ((5, 7, 50), (6, 8, 50), (7, 9, 40), (8, 10, 40), (11, 13, 85), (12, 14, 85), (13, 15, 60), (14, 16, 60))


@dataclass(frozen=True)
class Mannequin:
    """A drawn person: keypoints `(17, 3)`, the mask, the true parts, and the direction up her head in the picture."""

    keypoints: Floats
    mask: Mask
    parts: dict[str, Mask]
    up: Floats
    scale: float

    def regions(self, *wanted: str) -> dict[str, Mask]:
        """What is drawn from the keypoints, of all regions if none is named."""
        found = people_regions(self.keypoints[None], self.mask[None], wanted or REGIONS)
        return {name: mask[0] for name, mask in found.items()}


@cache
def mannequin(yaw: float = 0, pitch: float = 0, roll: float = 0, body: float = 0, scale: float = 0.2) -> Mannequin:
    """One whose head is turned by `yaw` and `pitch`, her body by `body`, and the whole picture by `roll`, in degrees.

    `scale` is in pixels for each mm.

    Example:
        >>> mannequin().keypoints.shape, bool(mannequin(yaw=180, body=180).parts["face"].any())
        ((17, 3), False)
    """
    turned_head, turned_body = turn(yaw, pitch), turn(body, 0)
    points, part, of_head = _surface()
    where = np.where(of_head[:, None], points @ turned_head.T, points @ turned_body.T)
    angle = np.deg2rad(roll)
    spin = np.array([(np.cos(angle), -np.sin(angle)), (np.sin(angle), np.cos(angle))])
    side = int(4000 * scale)
    order = np.argsort(where[:, 2])
    column, row = (where[order, :2] @ spin.T * scale + side / 2).astype(int).T
    on_top = np.full((side, side), -1)
    # Of points in one pixel the last counts: the nearest.
    on_top[row, column] = part[order]
    joints = np.concatenate([JOINTS[:5] @ turned_head.T, JOINTS[5:] @ turned_body.T])
    outward = np.array([(0, 0, 1), (0.4, 0, 0.9), (-0.4, 0, 0.9), (1, 0, 0.1), (-1, 0, 0.1)]) @ turned_head.T
    # Ears stick out: they are seen from behind.
    seen = np.concatenate([outward[:3, 2] > 0, outward[3:, 2] > -0.8, np.ones(12, dtype=bool)])
    placed = joints[:, :2] @ spin.T * scale + side / 2
    parts = {name: on_top == number for number, name in enumerate(REGIONS)}
    return Mannequin(np.column_stack([placed, seen]), on_top >= 0, parts, spin @ (0, -1), scale)


@cache
def _surface() -> tuple[Floats, npt.NDArray[np.int_], Mask]:
    """Points `(N, 3)` on a body that faces the camera, the number of the region of each, and which are on the head."""
    rng = np.random.default_rng(0)
    sphere = rng.normal(size=(40_000, 3))
    sphere /= np.linalg.norm(sphere, axis=1, keepdims=True)
    head = sphere * (74, 116, 96) + (0, 6, 0)
    facing = (head[:, 2] > 10) & ((head[:, 0] / 73) ** 2 + ((head[:, 1] - 27) / 96) ** 2 < 1)
    haired = ~facing & (head[:, 1] < np.where(head[:, 2] > 0, 0, 50))
    trunk = np.stack([sphere[:, 0] * 190, 245 + 475 * rng.random(len(sphere)), sphere[:, 2] * 110 - 15], axis=1)
    neck = np.stack([sphere[:, 0] * 55, 80 + 180 * rng.random(len(sphere)), sphere[:, 2] * 55 - 15], axis=1)
    face, hair, torso, hands = range(4)
    rest = len(REGIONS)
    pieces = [(trunk, torso), (neck, rest)]
    pieces += [(_limb(JOINTS[start], JOINTS[end], radius, rng), rest) for start, end, radius in LIMBS]
    pieces += [(_limb(JOINTS[9 + side], TIPS[side], 42, rng), hands) for side in (0, 1)]
    parts = [np.select([facing, haired], [face, hair], rest), *(np.full(len(piece), part) for piece, part in pieces)]
    points = np.concatenate([head, *(piece for piece, _ in pieces)])
    return points, np.concatenate(parts), np.arange(len(points)) < len(head)


def _limb(start: Floats, end: Floats, radius: float, rng: np.random.Generator) -> Floats:
    around = rng.normal(size=(12_000, 3))
    around /= np.linalg.norm(around, axis=1, keepdims=True)
    strewn: Floats = start + (end - start) * rng.random((len(around), 1)) + around * radius
    return strewn


def turn(yaw: float, pitch: float) -> Floats:
    """To the person's left, which is on the right of the picture, then down; the third row points at the camera."""
    a, b = np.deg2rad((yaw, pitch))
    sideways = np.array([(np.cos(a), 0, np.sin(a)), (0, 1, 0), (-np.sin(a), 0, np.cos(a))])
    bent = np.array([(1, 0, 0), (0, np.cos(b), np.sin(b)), (0, -np.sin(b), np.cos(b))])
    turned: Floats = bent @ sideways
    return turned

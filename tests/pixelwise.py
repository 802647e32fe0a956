"""Localization metrics the slow way, one pixel at a time: what the batched functions are compared with."""

from __future__ import annotations

import math
from itertools import groupby, product
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Pixels = list[tuple[int, ...]]


def upsampled(coarse: Array, *size: int) -> Array:
    """Linear along each axis with half-pixel centres, clamped at the border, in float64."""
    fine = np.zeros(size)
    for place in np.ndindex(*size):
        corners = product(*(_corners(p, f, c) for p, f, c in zip(place, size, coarse.shape, strict=True)))
        for corner in corners:
            at, weights = zip(*corner, strict=True)
            fine[place] += math.prod(weights) * float(coarse[at])
    return fine


def _corners(position: int, fine: int, coarse: int) -> list[tuple[int, float]]:
    source = max(0.0, (position + 0.5) * coarse / fine - 0.5)
    first = min(math.floor(source), coarse - 1)
    part = source - first
    return [(first, 1 - part), (min(first + 1, coarse - 1), part)]


def _all(mask: Array) -> Pixels:
    return list(np.ndindex(*mask.shape))


def _inside(mask: Array) -> Pixels:
    return [p for p in _all(mask) if mask[p]]


def energy_share(pixels: Array, mask: Array) -> float | None:
    """None where not valid, as in the functions below."""
    total = math.fsum(float(pixels[p]) for p in _all(mask))
    inside = _inside(mask)
    if total <= 0 or not inside:
        return None
    return math.fsum(float(pixels[p]) for p in inside) / total


def enrichment(pixels: Array, mask: Array) -> float | None:
    share = energy_share(pixels, mask)
    return None if share is None else share / (len(_inside(mask)) / mask.size)


def pointing_game(pixels: Array, mask: Array, tolerance: int) -> float | None:
    inside = _inside(mask)
    peak = max(float(pixels[p]) for p in _all(mask))
    if peak <= 0 or not inside:
        return None
    peaks = [p for p in _all(mask) if float(pixels[p]) == peak]
    hits = [any(_near(p, q, tolerance) for q in inside) for p in peaks]
    return sum(hits) / len(hits)


def _near(one: tuple[int, ...], other: tuple[int, ...], tolerance: int) -> bool:
    """Within the tolerance in the plane of the image, and of a clip in the same frame."""
    (*frame, y, x), (*other_frame, b, a) = one, other
    return frame == other_frame and (y - b) ** 2 + (x - a) ** 2 <= tolerance**2


def iou(pixels: Array, mask: Array, threshold: float) -> float | None:
    inside = set(_inside(mask))
    peak = max(float(pixels[p]) for p in _all(mask))
    if peak <= 0 or not inside:
        return None
    hot = {p for p in _all(mask) if float(pixels[p]) > threshold * peak}
    return len(hot & inside) / len(hot | inside)


def relevance_rank_accuracy(pixels: Array, mask: Array) -> float | None:
    """The expected share when pixels that tie are put into random order."""
    inside = set(_inside(mask))
    if not inside or max(float(pixels[p]) for p in _all(mask)) <= 0:
        return None
    expected, places = 0.0, len(inside)
    ranked = sorted(_all(mask), key=lambda p: -float(pixels[p]))
    for _, group in groupby(ranked, key=lambda p: float(pixels[p])):
        equal = list(group)
        taken = min(places, len(equal))
        expected += taken * sum(p in inside for p in equal) / len(equal)
        places -= taken
        if not places:
            break
    return expected / len(inside)


def rank_slack(pixels: Array, mask: Array, levels: int) -> float:
    """By how much the rank accuracy may be off where pixels of one level out of `levels` count as equal.

    At most a quarter of those that may share the K-th one's level (its whole neighbourhood here), out of K.
    """
    size = len(_inside(mask))
    if not size:
        return 0.0
    values = sorted((float(pixels[p]) for p in _all(mask)), reverse=True)
    width = (values[0] - values[-1]) / levels
    # However narrow a level is, rounding puts pixels on it that differ in their last bits.
    near = sum(abs(v - values[size - 1]) <= width + 3e-7 * values[0] for v in values)
    equal = sum(v == values[size - 1] for v in values)
    return near / 4 / size if near > equal else 0.0

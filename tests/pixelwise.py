"""Localization metrics the slow way, one pixel at a time: what the batched functions are compared with."""

from __future__ import annotations

import math
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Pixels = list[tuple[int, int]]


def upsampled(coarse: Array, height: int, width: int) -> Array:
    """Bilinear with half-pixel centres, clamped at the border, in float64."""
    fine = np.zeros((height, width))
    for y in range(height):
        top, low_y, part_y = _place(y, height, coarse.shape[0])
        for x in range(width):
            left, right, part_x = _place(x, width, coarse.shape[1])
            above = (1 - part_x) * float(coarse[top, left]) + part_x * float(coarse[top, right])
            below = (1 - part_x) * float(coarse[low_y, left]) + part_x * float(coarse[low_y, right])
            fine[y, x] = (1 - part_y) * above + part_y * below
    return fine


def _place(position: int, fine: int, coarse: int) -> tuple[int, int, float]:
    source = max(0.0, (position + 0.5) * coarse / fine - 0.5)
    first = min(math.floor(source), coarse - 1)
    return first, min(first + 1, coarse - 1), source - first


def _all(mask: Array) -> Pixels:
    return [(y, x) for y in range(mask.shape[0]) for x in range(mask.shape[1])]


def _inside(mask: Array) -> Pixels:
    return [(y, x) for y, x in _all(mask) if mask[y, x]]


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
    hits = [any((y - b) ** 2 + (x - a) ** 2 <= tolerance**2 for b, a in inside) for y, x in peaks]
    return sum(hits) / len(hits)


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

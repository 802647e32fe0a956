"""Proportions that are averaged or compared, with intervals that hold for what was done to them.

Enters: counts of images with a property. Leaves: a value with its lower and upper bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from scipy import special

from bias_audit.stats import newcombe, wilson

# So many images with a property, of how many.
Count = tuple[int, int]
# A value with its bounds, None where nothing was measured.
Numbers = tuple[float | None, float | None, float | None]


def largest_difference(pairs: Iterable[tuple[Count, Count]]) -> tuple[float, float, float]:
    """The largest absolute difference of two proportions among `pairs`, each `(successes, n)` with n > 0.

    The largest of several is chosen after looking. So all differences get intervals that hold together at 95 %
    (Bonferroni), each by Newcombe's method; the largest lies above every lower and below the highest upper bound. Its
    upper bound is not that of the pair that looks widest: another pair of few images may well be further apart. A
    negative lower bound is one that does not rule out 0.

    Example:
        >>> [round(x, 3) for x in largest_difference([((48, 80), (56, 70))])]
        [0.2, 0.052, 0.334]
    """
    both = list(pairs)
    each = 1 - 0.05 / len(both)
    found = []
    for pair in both:
        worse, better = sorted(pair, key=lambda count: (count[0] / count[1], count))
        value, low, high = newcombe(better, worse, each)
        high = max(high, -low)
        # Which of two equal proportions is the better is nobody's to say: the interval is the same either way.
        found.append((value, low if value else -high, high))
    value, low, high = (max(bound) for bound in zip(*found, strict=True))
    return value, low, high


def mean_proportion(counts: Sequence[Count], level: float = 0.95) -> tuple[float, float, float]:
    """The mean of proportions `(successes, n)` with n > 0, each with the same weight.

    Its interval squares and adds those of the proportions, which are Wilson's (MOVER: Zou and Donner, Statistics in
    Medicine 27 (2008)). Unlike the bootstrap it has a width where all succeed.

    Example:
        >>> [round(x, 3) for x in mean_proportion([(9, 10), (8, 10)])]
        [0.85, 0.633, 0.933]
    """
    value, low, high = np.array([wilson(*count, level) for count in counts]).T
    mean = float(value.mean())
    down, up = (float(np.linalg.norm(side)) / len(counts) for side in (value - low, high - value))
    return mean, mean - down, mean + up


def minus(one: tuple[float, float, float], other: tuple[float, float, float]) -> tuple[float, float, float]:
    """The difference of two independent numbers with their intervals: Newcombe's way, of single proportions."""
    value = one[0] - other[0]
    return (
        value,
        value - float(np.hypot(one[0] - one[1], other[2] - other[0])),
        value + float(np.hypot(one[2] - one[0], other[0] - other[1])),
    )


def paired_difference(gained: int, lost: int, n: int, level: float = 0.95) -> tuple[float, float, float]:
    """The difference of two proportions of the same n > 0 images: `gained` have the property after, `lost` before only.

    Adjusted Wald interval, which has a width where nothing changed: Bonett and Price, Journal of Educational and
    Behavioral Statistics 37 (2012) 479-488.

    Example:
        >>> [round(x, 3) for x in paired_difference(6, 1, 50)]
        [0.1, -0.014, 0.206]
    """
    value = (gained - lost) / n
    up, down = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    half = float(special.ndtri((1 + level) / 2)) * math.sqrt((up + down - (up - down) ** 2) / (n + 2))
    return value, min(value, max(-1.0, up - down - half)), max(value, min(1.0, up - down + half))

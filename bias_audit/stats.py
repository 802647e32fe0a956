"""Intervals for what an audit measures.

Enters: per-image numbers as NumPy arrays. Leaves: `Intervals`, one per hypothesis. Everything is vectorised over
hypotheses and resamples; randomness enters as a seed.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import special

Floats = npt.NDArray[np.float64]

# At 2000 resamples the weights of so many images take 16 MB.
_MOST_KEPT = 1024


class Intervals(NamedTuple):
    """Values with their lower and upper bound, `(H,)` each; NaN where there is nothing to estimate from."""

    value: Floats
    low: Floats
    high: Floats


def bootstrap_ratios(
    numerators: npt.NDArray[Any],
    denominators: npt.NDArray[Any],
    strata: npt.NDArray[Any],
    *,
    seed: int,
    level: float = 0.95,
    resamples: int = 2000,
) -> Intervals:
    """Sum over images of each numerator over that of its denominator, with percentile bootstrap intervals.

    Images are drawn with replacement within their stratum, the same draws for all hypotheses. A mean is the ratio to
    ones. Images that do not belong to a hypothesis have 0 in both.

    Args:
        numerators, denominators: `(N, H)`, a column per hypothesis.
        strata: `(N,)` of any labels; each stratum keeps its size in every resample.

    Reference: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.

    Example:
        >>> values = np.array([[0.0], [1.0], [2.0], [3.0]])
        >>> ratio = bootstrap_ratios(values, np.ones_like(values), np.zeros(4), seed=0)
        >>> ratio.value.item(), bool(ratio.low[0] < 1.5 < ratio.high[0])
        (1.5, True)
    """
    codes = np.unique(strata, return_inverse=True)[1].astype(np.int64)
    # Of large sets the weights are drawn anew each time rather than kept in memory.
    draw = _resampling_weights if len(codes) <= _MOST_KEPT else _resampling_weights.__wrapped__
    weights = draw(codes.tobytes(), resamples, seed)
    with np.errstate(invalid="ignore", divide="ignore"):
        value = numerators.sum(0) / denominators.sum(0)
        draws = (numerators.T.astype(np.float64) @ weights) / (denominators.T.astype(np.float64) @ weights)
    known = np.isfinite(value)
    low, high = _percentiles(draws, ((1 - level) / 2, (1 + level) / 2))
    return Intervals(*(np.where(known, bound, np.nan) for bound in (value, low, high)))


@lru_cache(maxsize=8)
def _resampling_weights(codes: bytes, resamples: int, seed: int) -> Floats:
    """How often each image is drawn in each resample, `(N, resamples)`; `codes` are int64, each image's stratum.

    Kept, because each audit of a training resamples the same images, and drawing takes longer than what follows.
    """
    strata = np.frombuffer(codes, dtype=np.int64)
    rng = np.random.default_rng(seed)
    weights = np.empty((len(strata), resamples))
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        weights[members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), size=resamples).T
    return weights


def _percentiles(draws: Floats, shares: tuple[float, float]) -> list[Floats]:
    """Of each row of `draws`, `(H, resamples)`, the values at two shares of the way up, interpolated; NaN of none.

    A resample may hold no image of a small hypothesis: it is not finite, and says nothing about it.
    """
    finite = np.isfinite(draws)
    ranked = np.sort(np.where(finite, draws, np.inf), axis=1)
    last = finite.sum(axis=1) - 1
    bounds: list[Floats] = []
    for share in shares:
        place = share * np.maximum(last, 0)
        below = np.floor(place).astype(np.int64)
        rows = np.arange(len(draws))
        first, second = ranked[rows, below], ranked[rows, np.minimum(below + 1, np.maximum(last, 0))]
        with np.errstate(invalid="ignore"):
            bounds.append(np.where(last >= 0, first + (place - below) * (second - first), np.nan))
    return bounds


def wilson(successes: int, n: int, level: float = 0.95) -> tuple[float, float, float]:
    """A proportion with its Wilson score interval; NaN for n = 0.

    Unlike the bootstrap it has a width where all trials succeed. Wilson, JASA 22 (1927).

    Example:
        >>> [round(x, 3) for x in wilson(9, 10)]
        [0.9, 0.596, 0.982]
    """
    if n == 0:
        return float("nan"), float("nan"), float("nan")
    z, p = float(special.ndtri((1 + level) / 2)), successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # At the ends the bound is the end itself, which rounding misses.
    return p, 0.0 if successes == 0 else centre - half, 1.0 if successes == n else centre + half


def newcombe(first: tuple[int, int], second: tuple[int, int], level: float = 0.95) -> tuple[float, float, float]:
    """The difference of two proportions, each `(successes, n)`, with Newcombe's hybrid score interval; NaN for n = 0.

    Newcombe, Statistics in Medicine 17 (1998), method 10.

    Example:
        >>> [round(x, 4) for x in newcombe((56, 70), (48, 80))]
        [0.2, 0.0524, 0.3339]
    """
    p, p_low, p_high = wilson(*first, level)
    q, q_low, q_high = wilson(*second, level)
    difference = p - q
    return (
        difference,
        difference - float(np.hypot(p - p_low, q_high - q)),
        difference + float(np.hypot(p_high - p, q - q_low)),
    )

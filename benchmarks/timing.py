"""Time contenders in alternation and compare them round by round.

Enters: contenders, each a function to time. Leaves: seconds per contender and round; and, from them, medians of ratios
with intervals. A ratio is taken within a round, so that what slows the whole machine for a while slows both sides.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def nothing() -> None:
    """Do nothing."""


@dataclass(frozen=True)
class Contender:
    """Something to time.

    `run` is what is timed; `warm_up` runs once before, by default `run` does. `every` is 1 to be timed in each round, n
    in every n-th, for what is too slow to be timed as often as the rest.
    """

    name: str
    run: Callable[[], object]
    every: int = 1
    warm_up: Callable[[], object] | None = None


@dataclass(frozen=True)
class Series:
    """A contender's seconds in each round, None where it was not timed."""

    contender: str
    seconds: tuple[float | None, ...]


class Interval(NamedTuple):
    """A median with the bounds of its interval, and the number of rounds it rests on."""

    median: float
    low: float
    high: float
    rounds: int


def alternate(
    contenders: Sequence[Contender],
    rounds: int,
    *,
    seed: int = 0,
    tidy: Callable[[], object] = nothing,
    wait: Callable[[], object] = nothing,
    progress: Callable[[str], object] = lambda name: None,
) -> tuple[Series, ...]:
    """Time the contenders in `rounds` rounds, each time in another order, after warming all of them up.

    Args:
        seed: of the orders.
        tidy: called before each run, untimed, to remove what the one before left behind.
        wait: called before the clock is read; on an accelerator, until all that was started is done.
        progress: called with a contender's name before it runs.

    Example:
        >>> from functools import partial
        >>> done = []
        >>> each = [Contender(n, partial(done.append, n), every, nothing) for n, every in (("a", 1), ("b", 2))]
        >>> [sum(s is not None for s in series.seconds) for series in alternate(each, rounds=4)]
        [4, 2]
        >>> sorted(done)
        ['a', 'a', 'a', 'a', 'b', 'b']
    """
    rng = np.random.default_rng(seed)
    for contender in contenders:
        progress(contender.name)
        tidy()
        (contender.warm_up or contender.run)()
    seconds: dict[str, list[float | None]] = {c.name: [None] * rounds for c in contenders}
    for number in range(rounds):
        due = [c for c in contenders if number % c.every == 0]
        for place in rng.permutation(len(due)):
            progress(due[place].name)
            tidy()
            gc.collect()
            wait()
            started = time.perf_counter()
            due[place].run()
            wait()
            seconds[due[place].name][number] = time.perf_counter() - started
    return tuple(Series(name, tuple(values)) for name, values in seconds.items())


def ratios(of: Series, to: Series) -> Floats:
    """The seconds of one contender over those of another, for each round in which both were timed.

    Example:
        >>> ratios(Series("a", (2.0, None, 9.0)), Series("b", (1.0, 1.0, 3.0)))
        array([2., 3.])
    """
    pairs = [(a, b) for a, b in zip(of.seconds, to.seconds, strict=True) if a is not None and b is not None]
    return np.array([a / b for a, b in pairs])


def median_interval(values: Floats, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Interval:
    """The median with its percentile bootstrap interval, which of five values or fewer is their range.

    Reference: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.

    Example:
        >>> median_interval(np.array([1.0, 3.0, 2.0]))
        Interval(median=2.0, low=1.0, high=3.0, rounds=3)
    """
    if not len(values):
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    draws = np.random.default_rng(seed).choice(values, (resamples, len(values)))
    low, high = np.quantile(np.median(draws, axis=1), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(np.median(values)), float(low), float(high), len(values))

"""A draw that keeps the make-up of what it is drawn from.

Enters: the cell of each thing, how many to draw, a seed. Leaves: the places of what is drawn.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np


def stratified_draw(cells: Sequence[tuple[str, ...]], count: int, seed: int) -> list[int]:
    """The places, in order, of `count` things drawn from each cell in proportion to its size.

    Example:
        >>> stratified_draw([("a",), ("a",), ("a",), ("a",), ("b",), ("b",)], 3, seed=0)
        [2, 3, 4]
    """
    members: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
    for place, cell in enumerate(cells):
        members[cell].append(place)
    keys = sorted(members)
    quota = shares(np.array([len(members[key]) for key in keys]), count)
    rng = np.random.default_rng(seed)
    return sorted(
        int(i) for key, n in zip(keys, quota, strict=True) for i in rng.choice(members[key], n, replace=False)
    )


def shares(sizes: np.ndarray[Any, np.dtype[np.int64]], total: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """`total` split over cells in proportion to `sizes` by largest remainders, at least one each where possible."""
    exact = sizes * total / sizes.sum()
    quota: np.ndarray[Any, np.dtype[np.int64]] = np.floor(exact).astype(np.int64)
    if total >= len(sizes):
        quota = np.maximum(quota, 1)
    order = np.argsort(quota - exact, kind="stable")
    while (short := total - int(quota.sum())) > 0:
        open_cells = [i for i in order if quota[i] < sizes[i]]
        quota[open_cells[:short]] += 1
    while quota.sum() > total:
        quota[np.argmax(quota)] -= 1
    return quota

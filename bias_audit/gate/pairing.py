"""Differences between two audits, image by image.

Enters: `SampleColumns` of both audits, the images that are the same in both, and pairs of estimates. Leaves: for each
pair that can be compared so the difference with its interval, and the number of images that it is of.

What is hard about an image is hard for both models and cancels, so these intervals are narrower than what the two
estimates' own intervals give. Neither torch nor Lightning is imported here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, groupby
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from bias_audit.evidence.cells import Cell
from bias_audit.evidence.proportions import minus, paired_difference
from bias_audit.gate.columns import SampleColumns, Values
from bias_audit.records.history import Change
from bias_audit.stats import Floats, Intervals, bootstrap_ratios, newcombe, wilson
from bias_audit.terms import OWN, Estimate

# Of one image 0 or 1, but for ties and for what controls do.
_HITS = ("pointing_game", "removal_flips")
_OF_GROUPS = ("accuracy_gap", "worst_group_accuracy")
# The bootstrap of more images takes seconds, and says no more than the normal distribution.
MOST_RESAMPLED = 5_000
Key = tuple[str, str | None, str | None, str | None, str | None]


@dataclass(frozen=True)
class _Column:
    """One estimate's differences, image by image, and their weights, 0 where an image does not count, `(N,)` each."""

    key: Key
    cell: Cell
    differences: Floats
    weights: Floats
    n: int


def paired_changes(
    before: SampleColumns,
    after: SampleColumns,
    shared: Sequence[str],
    of_shared: Iterable[Cell],
    estimates: Iterable[tuple[Estimate, Estimate]],
    *,
    seed: int,
) -> dict[Key, tuple[Change, int]]:
    """Of each pair of estimates that can be compared image by image: the later less the earlier, and how many images.

    Shares, enrichment, hits, accuracy and what a removal does can, where both have a score of at least half of the
    estimate's images. Images are drawn with replacement within class x attribute value, as the audit does.

    Args:
        shared: ids of the images that are the same in both.
        of_shared: their cells, with members and strata in the order of `shared`.
        estimates: pairs of the same `key`, the earlier first.
    """
    rows_before, rows_after = _rows(before, shared), _rows(after, shared)
    if not shared or rows_before is None or rows_after is None:
        return {}
    by_name = {(cell.class_name, cell.group): cell for cell in of_shared}
    columns: list[_Column] = []
    for first, second in estimates:
        cell = by_name.get((first.class_name, first.group))
        its_first, its_second = before.of(first), after.of(second)
        if cell is not None and its_first is not None and its_second is not None:
            column = _column(first, second, cell, its_first.rows(rows_before), its_second.rows(rows_after))
            columns += [column] if column is not None else []
    # One set of resamples for all that is resampled within the same strata.
    columns.sort(key=lambda column: column.cell.attribute or "")
    found: dict[Key, tuple[Change, int]] = {}
    for _, group in groupby(columns, key=lambda column: column.cell.attribute):
        found |= _intervals(list(group), seed)
    return found


def _column(before: Estimate, after: Estimate, cell: Cell, first: Values, second: Values) -> _Column | None:
    valid = cell.members & np.isfinite(first.values) & np.isfinite(second.values)
    # Where a region is drawn differently, its shares are not of the same thing.
    valid &= np.isclose(first.weights, second.weights, rtol=1e-3)
    n = int(valid.sum())
    if n < 2 or 2 * n < min(before.n, after.n):
        return None
    weights = np.where(valid, first.weights if before.metric == "enrichment" else 1.0, 0.0)
    return _Column(before.key, cell, np.where(valid, second.values - first.values, 0.0), weights, n)


def _intervals(columns: Sequence[_Column], seed: int) -> dict[Key, tuple[Change, int]]:
    """The mean difference of each column; all columns have the same strata."""
    found, drawn = {}, []
    for c in columns:
        if c.key[0] == "accuracy":
            found[c.key] = Change(*_of_hits(c)), c.n
        else:
            drawn.append(c)
    if not drawn:
        return found
    sums = np.stack([c.differences * c.weights for c in drawn], axis=1)
    weights = np.stack([c.weights for c in drawn], axis=1)
    strata = drawn[0].cell.strata
    if len(strata) > MOST_RESAMPLED:
        bounds = _normal(sums, weights, strata)
    else:
        bounds = bootstrap_ratios(sums, weights, strata, seed=seed)
    for c, value, low, high in zip(drawn, *(bound.tolist() for bound in bounds), strict=True):
        # Resampling hits that all stayed as they are gives no width, as if that were certain.
        moves = c.differences[c.weights > 0]
        of_hits = c.key[0] in _HITS or c.key[0].startswith(OWN)
        stayed = low == high and of_hits and bool(np.isin(moves, (-1, 0, 1)).all())
        found[c.key] = Change(*(_of_hits(c) if stayed else (value, low, high))), c.n
    return found


def _of_hits(c: _Column) -> tuple[float, float, float]:
    moves = c.differences[c.weights > 0]
    return paired_difference(int((moves > 0).sum()), int((moves < 0).sum()), c.n)


def _normal(sums: Floats, weights: Floats, strata: npt.NDArray[Any]) -> Intervals:
    """What `bootstrap_ratios` tends to: of so many images the ratio's error is normal, and drawing them takes long."""
    value, total = sums.sum(0) / weights.sum(0), weights.sum(0)
    deviations = (sums - value * weights) / total
    _, codes, sizes = np.unique(strata, return_inverse=True, return_counts=True)
    variance = np.zeros(len(value))
    for code, size in enumerate(sizes.tolist()):
        if size > 1:
            variance += size * deviations[codes == code].var(axis=0, ddof=1)
    half = NormalDist().inv_cdf(0.975) * np.sqrt(variance)
    return Intervals(value, value - half, value + half)


def group_changes(
    before: SampleColumns,
    after: SampleColumns,
    shared: Sequence[str],
    of_shared: Iterable[Cell],
    estimates: Iterable[tuple[Estimate, Estimate]],
) -> dict[Key, tuple[Change, int]]:
    """The same for `accuracy_gap` and `worst_group_accuracy`, which are of groups: from the changes within the groups.

    Given where it is narrower than what the two intervals give, which it is of models that mostly decide alike. Both
    kinds are rather too wide than too narrow, and so is the narrower one. The number of images is that of the smallest
    group.
    """
    rows_before, rows_after = _rows(before, shared), _rows(after, shared)
    # Without some of the images a group may be missing whole.
    complete = len(shared) == len(before.ids) == len(after.ids)
    if not complete or rows_before is None or rows_after is None:
        return {}
    known, found = list(of_shared), {}
    for first, second in estimates:
        if first.metric not in _OF_GROUPS or not first.measured or not second.measured:
            continue
        groups = [
            _Group.of(cell, before.correct[rows_before], after.correct[rows_after]) for cell in _compared(first, known)
        ]
        least = min((group.n for group in groups), default=0)
        if len(groups) < 2 or 2 * least < min(first.n, second.n):
            continue
        change = _gap_change(groups) if first.metric == "accuracy_gap" else _worst_change(groups)
        if _width(change) < _width(unpaired_change(first, second)):
            found[first.key] = change, least
    return found


def _compared(e: Estimate, known: Iterable[Cell]) -> list[Cell]:
    """The groups whose accuracies make an estimate: those of an attribute, or of class x attribute for the worst."""
    of_attribute = [cell for cell in known if cell.attribute is not None and cell.attribute == e.group]
    if e.metric == "worst_group_accuracy":
        return [cell for cell in of_attribute if cell.class_name is not None]
    return [cell for cell in of_attribute if cell.class_name == e.class_name]


@dataclass(frozen=True)
class _Group:
    """Images of one group: how many are right in both audits, in the earlier only, in the later only, and all."""

    both: int
    lost: int
    gained: int
    n: int

    @classmethod
    def of(cls, cell: Cell, before: npt.NDArray[np.bool_], after: npt.NDArray[np.bool_]) -> _Group:
        first, second = before[cell.members], after[cell.members]
        return cls(int((first & second).sum()), int((first & ~second).sum()), int((~first & second).sum()), len(first))

    @property
    def counts(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """How many of how many are right, in the earlier and in the later audit."""
        return (self.both + self.lost, self.n), (self.both + self.gained, self.n)

    def change(self, level: float) -> tuple[float, float, float]:
        return paired_difference(self.gained, self.lost, self.n, level)


def _gap_change(groups: Sequence[_Group]) -> Change:
    """How the largest difference between two groups' accuracies changed.

    The largest changes by no more than the pair of groups that it is of in the later audit, and by no less than the
    pair that it was of in the earlier one. The intervals of all pairs hold together (Bonferroni).
    """
    pairs = list(combinations(groups, 2))
    level = 1 - 0.05 / len(pairs)
    bounds, gaps = [], []
    for one, other in pairs:
        before, after = (newcombe(*counts, level) for counts in zip(one.counts, other.counts, strict=True))
        # The images of two groups are others.
        bounds.append(_amount(before[1:], after[1:], minus(one.change(level), other.change(level))[1:]))
        gaps.append((abs(before[0]), abs(after[0])))
    (lows, highs), (was, is_) = zip(*bounds, strict=True), zip(*gaps, strict=True)
    return Change(max(is_) - max(was), min(lows), max(highs))


def _amount(
    before: tuple[float, float], after: tuple[float, float], change: tuple[float, float]
) -> tuple[float, float]:
    """How far the amount of a number moved, from the bounds of the number before, after, and of its change."""
    if before[1] < 0 or (after[1] < 0 and before[0] <= 0):
        before, after, change = ((-high, -low) for low, high in (before, after, change))
    low, high = change
    if before[0] <= 0 and after[0] <= 0:
        # An amount moves by no more than the number, to either side.
        return -max(abs(low), abs(high)), max(abs(low), abs(high))
    # The number may have another sign in the audit in which it is not known to be positive.
    return min(low, before[0] + after[0]) if before[0] <= 0 else low, max(high, -after[0] - before[0])


def _worst_change(groups: Sequence[_Group]) -> Change:
    """How the accuracy of the worst group changed, whichever that is.

    It rose by no more than the group that was the worst, and fell by no more than the one that is. Which these are is
    as open as the groups' intervals leave it; all hold together (Bonferroni).
    """
    level = 1 - 0.05 / len(groups)
    changes = [group.change(level) for group in groups]
    was, is_ = ([wilson(*group.counts[side], level) for group in groups] for side in (0, 1))
    highs = [change[2] for change, its in zip(changes, was, strict=True) if its[1] <= min(w[2] for w in was)]
    lows = [change[1] for change, its in zip(changes, is_, strict=True) if its[1] <= min(w[2] for w in is_)]
    return Change(min(w[0] for w in is_) - min(w[0] for w in was), min(lows), max(highs))


def _rows(columns: SampleColumns, shared: Sequence[str]) -> list[int] | None:
    """Where the shared images stand; None where one of them is missing."""
    place = {name: i for i, name in enumerate(columns.ids)}
    return [place[name] for name in shared] if all(name in place for name in shared) else None


def _width(change: Change) -> float:
    assert change.low is not None and change.high is not None
    return change.high - change.low


def unpaired_change(before: Estimate, after: Estimate) -> Change:
    """The later less the earlier of two measured estimates, made from their two intervals as if images were others."""
    return Change(*minus(_numbers(after), _numbers(before)))


def _numbers(e: Estimate) -> tuple[float, float, float]:
    assert e.value is not None and e.low is not None and e.high is not None
    return e.value, e.low, e.high

"""Evidence (c): whether the model is right equally often for every group.

Enters: predictions, labels and attributes. Leaves: `Estimate`s of accuracy per class and group, of the worst group's,
and of the gap between an attribute's values within a class.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
import numpy.typing as npt

from bias_audit.evidence.cells import Cell, cells
from bias_audit.stats import newcombe, wilson
from bias_audit.terms import Estimate, Subjects


def performance(
    correct: npt.NDArray[np.bool_],
    labels: npt.NDArray[np.int64],
    attributes: npt.NDArray[np.str_],
    subjects: Subjects,
    decided: npt.NDArray[np.bool_],
) -> tuple[Estimate, ...]:
    """`accuracy` of every cell, `worst_group_accuracy` and `accuracy_gap` of every attribute.

    A group of `worst_group_accuracy` is a class x attribute value (arXiv 1911.08731). `accuracy_gap` is the best minus
    the worst value's accuracy, within a class and over all: within a class it is the difference that equalized odds
    forbids. Their `n` is that of the smallest group compared.

    `correct` is bool `(N,)`, `attributes` `(N, A)` text in the order of `subjects.attributes`. A group with an
    image that is not `decided`, bool `(N,)`, is unmeasured.
    """
    all_cells = list(cells(labels, attributes, subjects))
    counts = {(c.class_name, c.group): _count(correct[c.members], decided[c.members]) for c in all_cells}
    classes = [c.class_name for c in all_cells if c.class_name is not None and c.group is None]
    found = [_accuracy(cell, *counts[cell.class_name, cell.group]) for cell in all_cells]
    for attribute, values in subjects.attributes:
        groups = [f"{attribute}={value}" for value in values]
        found.append(_worst_group(attribute, [counts.get((c, g)) for c in classes for g in groups]))
        found += [_gap(attribute, c, {g: counts.get((c, g)) for g in groups}) for c in (None, *classes)]
    return tuple(found)


def _count(correct: npt.NDArray[np.bool_], decided: npt.NDArray[np.bool_]) -> tuple[int, int]:
    """Hits and images; none where an output is not finite: leaving such images out would flatter the rest."""
    return (int(correct.sum()), len(correct)) if decided.all() else (0, 0)


def _accuracy(cell: Cell, hits: int, n: int) -> Estimate:
    if n == 0:
        return _unmeasured("accuracy", cell.group, cell.class_name, f"an image {_NOT_FINITE}")
    return Estimate("accuracy", *wilson(hits, n), n, class_name=cell.class_name, group=cell.group)


Count = tuple[int, int] | None
_NOT_FINITE = "for which the model's output is not finite"


def _worst_group(attribute: str, counts: list[Count]) -> Estimate:
    known = [count for count in counts if count is not None]
    if len(known) < len(counts):
        return _unmeasured("worst_group_accuracy", attribute, None, f"a class x {attribute} group has no image")
    if any(n == 0 for _, n in known):
        return _unmeasured(
            "worst_group_accuracy", attribute, None, f"a class x {attribute} group has an image {_NOT_FINITE}"
        )
    # The minimum over groups lies between the least lower and the least upper bound.
    value, low, high = (min(bound) for bound in zip(*(wilson(*count) for count in known), strict=True))
    return Estimate("worst_group_accuracy", value, low, high, min(n for _, n in known), group=attribute)


def _gap(attribute: str, class_name: str | None, counts: dict[str, Count]) -> Estimate:
    known = [count for count in counts.values() if count is not None]
    if len(known) < 2 or len(known) < len(counts):
        empty = [group for group, count in counts.items() if count is None]
        reason = f"no image where {', '.join(empty)}" if empty else f"{attribute} has one value only"
        return _unmeasured("accuracy_gap", attribute, class_name, reason)
    undecided = [group for group, count in counts.items() if count is not None and count[1] == 0]
    if undecided:
        reason = f"an image {_NOT_FINITE} where {', '.join(undecided)}"
        return _unmeasured("accuracy_gap", attribute, class_name, reason)
    pairs = [sorted(pair, key=lambda count: (count[0] / count[1], count)) for pair in combinations(known, 2)]
    # The widest of several gaps was chosen after looking: Bonferroni over the pairs it was chosen from.
    value, low, high = max(newcombe(best, worst, 1 - 0.05 / len(pairs)) for worst, best in pairs)
    n = min(n for _, n in known)
    return Estimate("accuracy_gap", value, low, high, n, class_name=class_name, group=attribute)


def _unmeasured(metric: str, group: str | None, class_name: str | None, reason: str) -> Estimate:
    return Estimate(metric, None, None, None, 0, class_name=class_name, group=group, reason=reason)

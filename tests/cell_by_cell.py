"""Estimates by what they are about, and the images of each cell found in a loop, for tests that recompute evidence.

Enters: estimates; or labels and attributes. Leaves: the estimates by their keys; or each cell's images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from bias_audit.terms import Estimate, Subjects

SUBJECTS = Subjects(
    regions=(("coat", "object"), ("hair", "spurious")),
    attributes=(("gender", ("female", "male")), ("site", ("a", "b", "c"))),
    classes=("doctor", "nurse", "patient"),
)
Z = 1.959963984540054  # the 97.5 % point of the normal distribution

Key = tuple[str, str | None, str | None, str | None, str | None]
Attributes = npt.NDArray[np.str_]


def key(e: Estimate) -> Key:
    return e.metric, e.region, e.class_name, e.group, e.method


def by_key(estimates: Sequence[Estimate]) -> dict[Key, Estimate]:
    found = {key(e): e for e in estimates}
    assert len(found) == len(estimates)  # nothing is said twice
    return found


def cells_of(labels: Sequence[int], attributes: Attributes) -> dict[tuple[str | None, str | None], list[int]]:
    """Images of every class and `attribute=value`, and of each alone, if there are any."""
    groups: list[tuple[str | None, Any]] = [(None, None)]
    for column, (name, values) in enumerate(SUBJECTS.attributes):
        groups += [(f"{name}={value}", (column, value)) for value in values]
    found = {}
    for c, class_name in [(None, None), *enumerate(SUBJECTS.classes)]:
        for group, where in groups:
            images = [
                i
                for i in range(len(labels))
                if (c is None or labels[i] == c) and (where is None or attributes[i][where[0]] == where[1])
            ]
            if images:
                found[class_name, group] = images
    return found

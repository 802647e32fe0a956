"""Which images an estimate is about.

Enters: the audit set's labels and attributes. Leaves: `Cell`s, one per class, per attribute value, and per both, each
with its images.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bias_audit.terms import Subjects


@dataclass(frozen=True)
class Cell:
    """The images of one class (None: of all) and one attribute value (None: of all); `members` is bool `(N,)`.

    `strata` `(N,)` labels each image with its class and its value of the cell's attribute: what resampling keeps fixed.
    """

    class_name: str | None
    attribute: str | None
    value: str | None
    members: npt.NDArray[np.bool_]
    strata: npt.NDArray[Any]

    @property
    def group(self) -> str | None:
        """`attribute=value`, or None."""
        return None if self.attribute is None else f"{self.attribute}={self.value}"


def cells(labels: npt.NDArray[np.int64], attributes: npt.NDArray[np.str_], subjects: Subjects) -> Iterator[Cell]:
    """Every class x attribute value that has an image, and the margins; `attributes` is `(N, A)` text."""
    everyone = np.ones(len(labels), dtype=bool)
    present = [(None, everyone)] + [
        (name, labels == i) for i, name in enumerate(subjects.classes) if (labels == i).any()
    ]
    for class_name, of_class in present:
        yield Cell(class_name, None, None, of_class, labels)
    for column, (attribute, values) in enumerate(subjects.attributes):
        known, code = np.unique(attributes[:, column], return_inverse=True)
        strata = labels * len(known) + code
        for value in values:
            of_value = attributes[:, column] == value
            for class_name, of_class in present:
                if (of_class & of_value).any():
                    yield Cell(class_name, attribute, value, of_class & of_value, strata)

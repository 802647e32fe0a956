"""Pictures of interventions: an image before is in the sample sheet, this is what it was after.

Enters: the `Changes` of a drawn audit set, and what the model decided under each. Leaves: `ChangedPictures`, of each
removal and swap those images on which it told most.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from bias_audit.data.sheet import thumbnail
from bias_audit.evidence.changes import Changes
from bias_audit.records.samples import ChangedPictures
from bias_audit.terms import Subjects

# Of each change: enough to look at, few enough for one page.
MOST_PICTURES = 32


def changed_pictures(
    changes: Changes,
    ids: tuple[str, ...],
    subjects: Subjects,
    decisions: npt.NDArray[np.int64],
    margins: npt.NDArray[np.floating[Any]],
    step: int,
    most: int = MOST_PICTURES,
) -> ChangedPictures:
    """Of each removal and swap the `most` images whose label's margin it changes most, the largest change first.

    Args:
        changes: what was changed in N images, V changes with the unchanged image as the first.
        ids: of the images.
        subjects: the names of regions, attributes and classes.
        decisions: `(N, V)`, the class decided for under each change, -1 where the output was not finite.
        margins: `(N, V)`, the label's margin, NaN where a change cannot be made.
    """
    falls = margins[:, :1] - margins
    rows: list[tuple[Any, ...]] = []
    for number, change in enumerate(changes.list):
        if change.kind not in ("removal", "swap"):
            continue
        told = np.abs(np.nan_to_num(falls[:, number], nan=-np.inf))
        order = [int(i) for i in np.argsort(-told, kind="stable") if np.isfinite(falls[i, number])]
        region = subjects.regions[change.region][0] if change.region >= 0 else ""
        attribute = subjects.attributes[change.attribute][0] if change.kind == "swap" else ""
        for i in order[:most]:
            value = str(changes.swapped_values[i, change.attribute]) if attribute else ""
            told_of = (ids[i], change.kind, region, attribute, value)
            rows.append((*told_of, decisions[i, number], falls[i, number], thumbnail(changes.picture(i, number))))
    names, kinds, regions, attributes, values, decided, fell, pictures = zip(*rows, strict=True) if rows else [()] * 8
    return ChangedPictures(
        step,
        names,
        kinds,
        regions,
        attributes,
        values,
        np.array(decided, dtype=np.int64),
        np.array(fell, dtype=np.float32),
        pictures,
    )

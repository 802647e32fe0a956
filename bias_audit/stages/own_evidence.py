"""Evidence that the user gathers, checked.

Enters: the plan's `evidence` functions and what they are given. Leaves: their `Estimate`s, each metric called
`own.something`, each about something of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from bias_audit.plan import AuditPlan
from bias_audit.records.samples import SampleScores
from bias_audit.terms import OWN, OWN_NAME, Estimate, Subjects


def own_estimates(
    plan: AuditPlan, scores: SampleScores, attributes: npt.NDArray[np.str_], subjects: Subjects
) -> Iterator[Estimate]:
    """What the user's own evidence says.

    Raises:
        ValueError: something that is no estimate of it, or stands twice.
    """
    seen: set[object] = set()
    for gather in plan.evidence:
        found = gather(scores, attributes, subjects, plan.seed)
        if not isinstance(found, Iterable):
            raise ValueError(f"evidence: expected estimates, got {found!r}: yield them, or return a list")
        for e in found:
            wrong = _wrong_with(e, plan.metric_names)
            if not wrong and e.key in seen:
                wrong = f"{e.subject}: stands twice: give one of them another metric, region, class or group"
            if wrong:
                raise ValueError(f"evidence: {wrong}")
            seen.add(e.key)
            yield e


def _wrong_with(e: object, metrics: Sequence[str]) -> str:
    """Why something that the user's evidence gives is no estimate of it; "" if all is well."""
    if not isinstance(e, Estimate):
        return f"expected estimates, got {e!r}: make `bias_audit.terms.Estimate`s"
    if not re.fullmatch(OWN_NAME, e.metric):
        return f"expected a metric called {OWN}something, got {e.metric!r}: rename it, in letters, digits and _"
    if e.metric in metrics:
        return f"{e.metric} is one of the plan's `metrics`: rename it"
    numbers = (e.value, e.low, e.high)
    are_numbers = all(x is None or isinstance(x, int | float | np.number) for x in numbers)
    if not are_numbers or not isinstance(e.n, int | np.integer) or e.n < 0:
        return f"{e.subject}: expected numbers or None, and n a count of images, got {numbers} and {e.n!r}"
    return ""

"""Numbers as the pages write them: with their intervals, and a minus sign that is one.

Enters: an `Estimate`. Leaves: text, "–" where nothing was measured.
"""

from __future__ import annotations

from bias_audit import wording
from bias_audit.records.history import Change
from bias_audit.terms import Estimate


def interval(e: Estimate | None, digits: int = 3) -> str:
    """Value and interval.

    Example:
        >>> interval(Estimate("accuracy_gap", -0.02, -0.1, 0.06, 40), 2)
        '−0.02 [−0.10, 0.06]'
    """
    return "–" if e is None else minus(wording.interval(e, digits))


def signed(e: Estimate | Change, digits: int = 2) -> str:
    """A difference and its interval, each with its sign."""
    if e.value is None:
        return "–"
    return minus(f"{e.value:+z.{digits}f} [{e.low:+z.{digits}f}, {e.high:+z.{digits}f}]")


def minus(text: str) -> str:
    """The text with minus signs for hyphens."""
    return text.replace("-", "−")

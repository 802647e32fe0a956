"""The tables by which kinds of evidence make a verdict.

Enters: of each kind of evidence whether it is there: yes, no, or None where it was not asked. Leaves: a `Verdict`.

Looking is not relying: without an intervention or a difference in accuracy there is no reliance, and one alone is not
enough.
"""

from __future__ import annotations

from bias_audit.terms import Verdict

Way = bool | None


def verdict_by_removal(look: Way, removal: Way, gap: Way) -> Verdict:
    """The verdict on a region that shows no attribute, of each kind of evidence whether it is there.

    None where it was not asked; `gap` is accuracy by the attributes of which it is not known whether it shows them.
    """
    if removal is not None:
        if removal:
            return Verdict.RELIANCE if look or gap else Verdict.SUSPECTED
        # What can be taken away without a decision's changing is not relied on, looked at or not.
        return Verdict.CLEARED
    if look:
        return Verdict.RELIANCE if gap else Verdict.SUSPECTED
    # Accuracy differs, and by what is not shown: the heatmaps may miss this region.
    return Verdict.INCONCLUSIVE if gap else Verdict.CLEARED


def verdict_by_value(value: Way, contrast: Way, look: Way) -> Verdict:
    """The verdict on a region that shows an attribute: do decisions follow its value, and do they read it here?"""
    if not value:
        # The margin may lean on it, and the heatmaps lie there: no decision follows.
        return Verdict.CLEARED
    if contrast is None:
        return Verdict.RELIANCE if look else Verdict.INCONCLUSIVE
    if contrast:
        return Verdict.RELIANCE
    # Something else in the image says the same.
    return Verdict.SUSPECTED if look else Verdict.CLEARED


def attribute_verdict(gap: Way, swap: Way, tie: Way, look: Way, hangs: Way) -> Verdict:
    """The verdict on an attribute; `look` and `hangs` of whichever spurious region shows most."""
    if swap:
        # That a region's removal moves decisions is evidence of the same kind as the swap, not one more.
        return Verdict.RELIANCE if gap or tie or look else Verdict.SUSPECTED
    if gap:
        # Accuracy differs, but not by what the swap changes.
        return Verdict.RELIANCE if swap is None and (tie or look or hangs) else Verdict.SUSPECTED
    return Verdict.CLEARED

"""The few numbers that tell where an audit stands, out of hundreds.

Enters: the estimates of one audit. Leaves: what a person looks at first.

Standard library only: whoever reads records can say this.
"""

from __future__ import annotations

from collections.abc import Iterable

from bias_audit.terms import COMPARING_METRICS, OWN, REMAINDER, Estimate

# In the order in which a reader asks: is it right, does it look there, does it rely on it, for whom is it wrong.
HEADLINES = (
    "accuracy",
    "enrichment",
    "removal_flips",
    "removal_contrast",
    "swap_gap",
    "alignment_gap",
    "accuracy_gap",
    "worst_group_accuracy",
)


def headlines(estimates: Iterable[Estimate]) -> tuple[Estimate, ...]:
    """Over all images: accuracy, each region's enrichment, what interventions do, the gaps between groups, and what the
    user's own metrics say.

    Those of one class or one group, and those of what no region covers, are left out.

    Example:
        >>> overall = Estimate("accuracy", 0.9, 0.8, 0.95, 50)
        >>> headlines([Estimate("accuracy", 0.8, 0.7, 0.9, 25, class_name="nurse"), overall]) == (overall,)
        True
    """
    found = [e for e in estimates if is_headline(e)]
    order = {metric: place for place, metric in enumerate(HEADLINES)}
    return tuple(sorted(found, key=lambda e: order.get(e.metric, len(order))))


def is_headline(e: Estimate) -> bool:
    """Whether an estimate is one of `headlines`."""
    one_group = e.group is not None and "=" in e.group and e.metric not in COMPARING_METRICS
    return (
        (e.metric in HEADLINES or e.metric.startswith(OWN))
        and e.class_name is None
        and not one_group
        and e.region != REMAINDER
    )

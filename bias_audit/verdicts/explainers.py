"""Whether an explanation method's maps are evidence of what the model has learned.

Enters: `Estimate`s, among them each method's similarity to maps of random weights, and a `Policy`. Leaves: an
`Explainer` for each method, and which estimates are not listened to.

Standard library only: the gate judges anew, and must start in a blink.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from bias_audit.policies.policy import Policy
from bias_audit.terms import Estimate
from bias_audit.wording import interval


@dataclass(frozen=True)
class Explainer:
    """Whether an explanation method's maps depend on the model's weights, and so are evidence of what it learned.

    `fit` is True, False (the method is unfit), or None where `similarity`, to maps with random weights, leaves it open.
    """

    method: str
    fit: bool | None
    similarity: Estimate

    @property
    def doubt(self) -> str:
        """Why its maps are no evidence."""
        if not self.similarity.measured:
            reason = self.similarity.reason or "it was not measured"
            return f"whether the {self.method} maps depend on the model's weights is unknown: {reason}"
        alike = f"their rank correlation with maps of random weights is {interval(self.similarity, 2)}"
        if self.fit is None:
            return f"whether the {self.method} maps depend on the model's weights is open: {alike}"
        return f"the {self.method} maps are unfit as evidence: {alike}"


def explainers(estimates: Iterable[Estimate], policy: Policy) -> tuple[Explainer, ...]:
    """The explanation methods whose fitness was measured: fit if the whole interval lies within the tolerance."""
    limit, found = policy.tolerance.randomisation_similarity, []
    for e in estimates:
        if e.metric == "randomisation_similarity" and e.method is not None:
            fit = None
            if e.low is not None and e.high is not None and e.measured:
                fit = True if e.high <= limit else False if e.low > limit else None
            found.append(Explainer(e.method, fit, e))
    return tuple(found)


def not_listened_to(estimates: Iterable[Estimate], unfit: Iterable[str]) -> frozenset[Estimate]:
    """The estimates of `unfit` methods of which another method's estimate speaks of the same thing.

    Where no other does they stay, so that what nobody can say is said to be unknown.

    Example:
        >>> one, other = (Estimate("iou", 0.5, 0.4, 0.6, 50, "hair", method=name) for name in ("gradcam", "hirescam"))
        >>> not_listened_to([one, other], ["gradcam"]) == {one}, not_listened_to([one], ["gradcam"]) == set()
        (True, True)
    """
    known, silent = tuple(estimates), set(unfit)
    heard = {(e.region, e.class_name, e.group) for e in known if e.method not in silent}
    return frozenset(e for e in known if e.method in silent and (e.region, e.class_name, e.group) in heard)

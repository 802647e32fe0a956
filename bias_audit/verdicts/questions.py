"""Four questions, put to the estimates of one audit.

Enters: `Estimate`s, the `Subjects` they are about, and a `Policy` with its tolerances. Leaves: `Evidence`, which gives
an `Answer` to each question: do the heatmaps look at a region; does the decision move when it is removed, or its cue
swapped; is the model right less often where the cue misleads; and do attribute and label go together in the training
data.

Standard library only: the gate judges anew, and must start in a blink.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

from bias_audit.multiplicity import exceedance_p, holm, samples_to_settle
from bias_audit.policies.policy import Policy
from bias_audit.terms import INPAINTING, Estimate, Subjects
from bias_audit.verdicts.explainers import explainers
from bias_audit.wording import interval, percent, readable

# Of a 95 % interval, what may lie on one side.
_ALPHA = 0.025


@dataclass(frozen=True)
class Answer:
    """Whether one kind of evidence is there: yes, no, or unknown (None), and the estimate that says so.

    `asked` is False where nothing could answer: the audit set has no attribute, the training data were not given, no
    region was removed. What was not asked counts for nothing; what is unknown may still turn out either way.
    """

    there: bool | None
    estimate: Estimate | None = None
    reason: str = ""
    settle: int | None = None
    asked: bool = True

    @property
    def ways(self) -> tuple[bool | None, ...]:
        """How it may turn out; None for what was not asked."""
        if not self.asked:
            return (None,)
        return (True, False) if self.there is None else (self.there,)


NOT_ASKED = Answer(None, asked=False)


class Evidence:
    """The four questions, put to the estimates of one audit.

    All hypotheses by which a finding may turn against the model are corrected together, by Holm's method: with many
    classes and regions one interval or other would lie beyond its limit by chance.
    """

    def __init__(self, estimates: Sequence[Estimate], subjects: Subjects, policy: Policy) -> None:
        self.estimates, self.subjects, self.policy = tuple(estimates), subjects, policy
        present = {e.class_name for e in estimates if e.metric == "accuracy"}
        self._absent = tuple(name for name in subjects.classes if present and name not in present)
        self._explainers = {x.method: x for x in explainers(estimates, policy)}
        self._with_alignment = {e.group for e in estimates if _says_alignment(e)}
        self._with_swap_gap = {(e.region, e.group) for e in estimates if e.metric == "swap_gap" and e.n > 0}
        self._significant = self._corrected()

    def _of(self, *metrics: str, region: str | None = None, group: str | None = None) -> list[Estimate]:
        return [e for e in self.estimates if e.metric in metrics and e.region == region and e.group == group]

    def look(self, region: str) -> Answer:
        """Evidence (a): do the heatmaps give the region more than its area would get?"""
        mine = self._of("enrichment", region=region)
        doubtful = [x for x in self._explainers.values() if not x.fit and any(e.method == x.method for e in mine)]
        fit = [e for e in mine if e.method not in {x.method for x in doubtful}]
        answer = self._exceeds(fit, self.policy.tolerance.enrichment, f"attention to {region}")
        # An unfit method is no witness: the others speak without it. One that may be fit may have seen what they did
        # not.
        silenced = sorted((x for x in doubtful if x.fit is None or not fit), key=lambda x: x.method)
        if answer.there or not silenced or (fit and answer.there is None):
            return answer
        return Answer(None, silenced[0].similarity, "; ".join(x.doubt for x in silenced))

    def shows(self, region: str, attribute: str) -> bool | None:
        """Whether the attribute can be read from what the region holds: then it is the region's cue. None: unknown."""
        limit, least = self.policy.tolerance.region_probe_gain, self.policy.min_samples
        for e in self._of("region_probe_gain", region=region, group=attribute):
            if e.measured and e.low is not None and e.n >= least:
                return e.low > limit
        return None

    def removal(self, region: str) -> Answer:
        """Evidence (b): do decisions change when the region is removed, beyond those that control regions change?

        Where most images have no room for a control region, of all or of a class, the others do not speak for them: all
        that can be shown is that hardly any decision changes at all.
        """
        limit, what = self.policy.tolerance.removal_flips, f"the removal of {region}"
        removed = self._of("removal_flips", region=region)
        answer = self._exceeds(removed, limit, what, by_class=False) if removed else NOT_ASKED
        bare = [e for e in self._of("fill_flips", region=region) if e.method == INPAINTING]
        if answer.there or not bare:
            return answer
        uncompared = {e.class_name for e in bare}
        compared = [e for e in removed if e.class_name not in uncompared]
        answer = self._exceeds([*compared, *bare], limit, what, by_class=False)
        e = answer.estimate
        if answer.there is not None or e not in bare or e is None or e.value is None or e.value <= limit:
            return answer
        # More images would not tell how much of it is the hole's, whatever was in it.
        for_class = f"for class {e.class_name} " if e.class_name else ""
        changes = f"{for_class}{what} changes {percent(e)} of the decisions"
        return replace(answer, reason=f"{changes}, and no control region fits to compare with", settle=None)

    def contrast(self, region: str, attribute: str) -> Answer:
        """Evidence (b): does the decision hang on what the region says of the attribute?

        A hole is a picture that the model may never have seen, and its margin may move whatever was in it. What tells
        is that it moves one way where the value goes with the class, and another way where it does not.
        """
        found = [e for e in self._of("removal_contrast", region=region, group=attribute) if e.n > 0]
        if not found:
            return self.removal(region)
        limit, what = self.policy.tolerance.removal_contrast, f"the removal of {region}"
        return self._exceeds(found, limit, what, by_class=False)

    def value(self, attribute: str, region: str | None = None) -> Answer:
        """Evidence (b) or (c): do decisions follow the attribute's value, by the best test there is?

        A swap of the user's changes the cue and nothing else, so it settles the matter. What a swap of one region
        changes is shown; that it changes nothing is not, because other places may say the same. Else accuracy tells.
        """
        swap, gap = self.swapped(None, attribute), self.gap(attribute)
        if swap.there is not None:
            return swap
        in_region = NOT_ASKED if region is None else self.swapped(region, attribute)
        told = [answer for answer in (in_region, gap) if answer.there]
        return told[0] if told else swap if swap.asked else gap

    def swap(self, attribute: str) -> Answer:
        """Evidence (b): does the decision go with the cue when the user's swap changes it, or a region's?

        A region may hold a part of the cue only: that its swap changes nothing says nothing of the attribute.
        """
        own = self.swapped(None, attribute)
        regions = self.subjects.regions_with("spurious")
        in_regions = strongest(self.swapped(region, attribute) for region in regions)
        return in_regions if in_regions.there and not own.there else own

    def swapped(self, region: str | None, attribute: str) -> Answer:
        """Evidence (b): does the decision go with the cue that a swap changes, the user's (None) or one region's?"""
        # Where it is not known which value goes with which class, all that can be asked is whether decisions change.
        metric = "swap_gap" if (region, attribute) in self._with_swap_gap else "swap_flips"
        found = [e for e in self._of(metric, region=region, group=attribute) if e.n > 0]
        if region is not None:
            # Only images with a donor are exchanged: too few of them say nothing, and nobody expects them to.
            found = [e for e in found if e.measured and e.n >= self.policy.min_samples]
        if not found:
            return NOT_ASKED
        return self._exceeds(found, self.policy.tolerance.swap_gap, f"the swap of {attribute}", by_class=False)

    def gap(self, attribute: str) -> Answer:
        """Evidence (c): is the model right less often where the cue misleads, or for one value of the attribute?"""
        limit, what = self.policy.tolerance.accuracy_gap, f"accuracy by {attribute}"
        if attribute in self._with_alignment:
            aligned = [e for e in self._of("alignment_gap", group=attribute) if _says_alignment(e)]
            return self._exceeds(aligned, limit, what, by_class=False)
        return self._exceeds([e for e in self._of("accuracy_gap", group=attribute) if e.class_name], limit, what)

    def tie(self, attribute: str) -> Answer:
        """Evidence (d): do attribute and label go together in the training data?"""
        found = self._of("cramers_v", group=attribute)
        if not found:
            return NOT_ASKED
        limit, what = self.policy.tolerance.association, f"association with {attribute}"
        # An audit set that lacks a class says nothing against it; nor would more images of it settle it.
        return replace(self._exceeds(found, limit, what, by_class=False, absent=()), settle=None)

    def _exceeds(
        self,
        estimates: list[Estimate],
        limit: float,
        what: str,
        by_class: bool = True,
        absent: tuple[str, ...] | None = None,
    ) -> Answer:
        """Yes if any estimate is shown to lie above the limit, no if all lie within it, else unknown.

        Without `by_class`, the estimate over all classes says no for each of them, as long as none lies above the limit
        by its own interval. For `absent` classes, by default those of which there is no image at all, nothing speaks.
        """
        absent = self._absent if absent is None else absent
        least = self.policy.min_samples
        usable = [e for e in estimates if e.measured and e.n >= least]
        above = [e for e in usable if e in self._significant and e.low is not None and e.low > limit]
        if above:
            return Answer(True, max(above, key=by_value))
        if not by_class:
            # What only the correction for so many questions keeps from counting is not cleared either.
            close = [e for e in usable if e.low is not None and e.low > limit]
            estimates = [e for e in estimates if e.class_name is None or e in close]
            usable = [e for e in usable if e in estimates]
        thin = [e for e in estimates if e not in usable]
        undecided = [e for e in usable if e.high is not None and e.high > limit]
        if not estimates or (not by_class and all(e.class_name is not None for e in estimates)):
            return Answer(None, None, f"{what} was not measured" + (" over all classes" if estimates else ""))
        if thin:
            short = min(thin, key=lambda e: (e.n, *by_value(e)))
            because = short.reason or f"{short.n} valid images, {least} needed"
            return Answer(None, short, f"{readable(short.subject)}: {because}", least if short.n < least else None)
        if absent:
            missing = ", ".join(absent)
            return Answer(None, max(usable, key=by_value), f"{what}: the audit set has no image of {missing}")
        if undecided:
            widest = max(undecided, key=by_value)
            assert widest.low is not None
            open_ = (
                f"{readable(widest.subject)} is {interval(widest, 2)}, which leaves open whether it exceeds {limit:g}"
            )
            if widest.low > limit:
                open_ += " by more than the chance of so many questions would"
            return Answer(None, widest, open_, self._settle(widest, limit))
        return Answer(False, max(usable, key=by_value))

    def _settle(self, e: Estimate, limit: float) -> int | None:
        """The images that would decide an estimate, if its value stays what it is."""
        assert e.value is not None and e.low is not None and e.high is not None
        if not e.low <= e.value <= e.high:
            # Only a damaged record has such an interval: nothing follows from its width.
            return None
        low = e.low
        if e.value > limit:
            # Above the limit it must stand up to the correction, as the next after what is shown already.
            left = sum(self._is_hypothesis(other) and other not in self._significant for other in self.estimates)
            # An interval that ends on the limit may count as shown by a rounding error.
            low = e.value - (e.value - low) * _deviate(_ALPHA / max(1, left)) / _deviate(_ALPHA)
        return samples_to_settle(e.value, low, e.high, limit, e.n)

    def _corrected(self) -> frozenset[Estimate]:
        """The estimates that are shown to lie above their limit after correction for the number of hypotheses."""
        family = [(e, self._limit(e)) for e in self.estimates if self._is_hypothesis(e)]
        ps = [exceedance_p(e.value or 0.0, _facing(e, limit), limit) for e, limit in family]
        return frozenset(e for (e, _), p in zip(family, holm(ps), strict=True) if p <= _ALPHA)

    def _is_hypothesis(self, e: Estimate) -> bool:
        """Whether a finding may rest on it: what nobody asks must not make what is asked harder to show."""
        if not e.measured or e.n < self.policy.min_samples or e.metric not in _LIMITS:
            return False
        if e.metric == "enrichment":
            unfit = e.method in self._explainers and not self._explainers[e.method].fit
            return e.group is None and not unfit and e.region in self.subjects.regions_with("spurious")
        if e.metric == "removal_flips":
            return e.group is None
        if e.metric == "swap_flips":
            return (e.region, e.group) not in self._with_swap_gap
        return e.metric != "accuracy_gap" or (e.class_name is not None and e.group not in self._with_alignment)

    def _limit(self, e: Estimate) -> float:
        return _LIMITS[e.metric](self.policy)


_LIMITS: Mapping[str, Callable[[Policy], float]] = {
    "enrichment": lambda policy: policy.tolerance.enrichment,
    "removal_flips": lambda policy: policy.tolerance.removal_flips,
    "removal_contrast": lambda policy: policy.tolerance.removal_contrast,
    "swap_gap": lambda policy: policy.tolerance.swap_gap,
    "swap_flips": lambda policy: policy.tolerance.swap_gap,
    "alignment_gap": lambda policy: policy.tolerance.accuracy_gap,
    "accuracy_gap": lambda policy: policy.tolerance.accuracy_gap,
    "cramers_v": lambda policy: policy.tolerance.association,
}


def _says_alignment(e: Estimate) -> bool:
    return e.metric == "alignment_gap" and (e.n > 0 or e.class_name is None)


def _deviate(tail: float) -> float:
    """How many standard errors leave this much of a normal distribution beyond them."""
    return -NormalDist().inv_cdf(tail)


def _facing(e: Estimate, limit: float) -> float:
    """The end of the interval that faces the limit."""
    assert e.value is not None and e.low is not None and e.high is not None
    return e.low if e.value > limit else e.high


def strongest(answers: Iterable[Answer]) -> Answer:
    """Of several answers the one that counts: any yes, else any unknown, else a no; what was not asked last.

    Of several that count alike the one with the largest estimate, whatever order regions and attributes are in.
    """
    metrics = tuple(_LIMITS)

    def rank(answer: Answer) -> tuple[int, int, float, int, str]:
        counts = {True: 0, None: 1, False: 2}[answer.there] if answer.asked else 3
        if answer.estimate is None:
            return counts, len(metrics), 0.0, 0, answer.reason
        value, name, n = by_value(answer.estimate)
        metric = answer.estimate.metric
        return counts, metrics.index(metric) if metric in metrics else len(metrics), -value, n, name

    return min(answers, key=rank, default=NOT_ASKED)


def by_value(e: Estimate) -> tuple[float, str, int]:
    """By value, and where values are equal in an order that does not depend on that of the estimates."""
    return e.value if e.value is not None and e.measured else -math.inf, e.subject, e.n

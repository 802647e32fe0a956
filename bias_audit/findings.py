"""What the evidence says of each spurious region and each attribute.

Enters: `Estimate`s, the `Subjects` they are about, and a `Policy` with its tolerances. Leaves: `Finding`s.

Four kinds of evidence are asked: do the heatmaps look at the region; does the decision move when it is removed, or its
cue swapped; is the model right less often where the cue misleads; and do attribute and label go together in the
training data. Looking is not relying: without the second or the third there is no reliance, and one alone is not
enough.

Standard library only: the gate judges anew, and must start in a blink.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from statistics import NormalDist
from typing import Literal

from bias_audit.multiplicity import exceedance_p, holm, samples_to_settle
from bias_audit.policies.policy import Policy
from bias_audit.terms import Estimate, Subjects, Verdict

# Of a 95 % interval, what may lie on one side.
_ALPHA = 0.025


@dataclass(frozen=True)
class Finding:
    """The verdict on one spurious region or one attribute, with the sentence a person needs and its evidence.

    `possible` are the verdicts that the evidence does not rule out: one, or several where something is unknown. An
    unknown need not matter: a region that may or may not be looked at is not relied on if removing it changes nothing.
    """

    kind: Literal["region", "attribute"]
    name: str
    verdict: Verdict
    sentence: str
    evidence: tuple[Estimate, ...]
    possible: tuple[Verdict, ...]
    samples_to_settle: int | None = None

    @property
    def subject(self) -> str:
        """What it is about, as checks name it."""
        return f"verdict on {self.kind} {self.name}"

    def _repr_html_(self) -> str:
        from bias_audit.notebook import finding_html

        return finding_html(self)


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
        alike = f"their rank correlation with maps of random weights is {_interval(self.similarity)}"
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


def find(estimates: Sequence[Estimate], subjects: Subjects, policy: Policy) -> tuple[Finding, ...]:
    """One finding for each spurious region and each attribute, in the order of the subjects."""
    asked = _Evidence(estimates, subjects, policy)
    attributes = [attribute for attribute, _ in subjects.attributes]
    return (
        *(_region_finding(region, asked) for region in subjects.regions_with("spurious")),
        *(_attribute_finding(attribute, asked) for attribute in attributes),
    )


@dataclass(frozen=True)
class _Answer:
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


_NOT_ASKED = _Answer(None, asked=False)


class _Evidence:
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

    def look(self, region: str) -> _Answer:
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
        return _Answer(None, silenced[0].similarity, "; ".join(x.doubt for x in silenced))

    def shows(self, region: str, attribute: str) -> bool | None:
        """Whether the attribute can be read from what the region holds: then it is the region's cue. None: unknown."""
        limit, least = self.policy.tolerance.region_probe_gain, self.policy.min_samples
        for e in self._of("region_probe_gain", region=region, group=attribute):
            if e.measured and e.low is not None and e.n >= least:
                return e.low > limit
        return None

    def removal(self, region: str) -> _Answer:
        """Evidence (b): do decisions change when the region is removed?"""
        removed = self._of("removal_flips", region=region)
        limit = self.policy.tolerance.removal_flips
        return self._exceeds(removed, limit, f"the removal of {region}", by_class=False) if removed else _NOT_ASKED

    def contrast(self, region: str, attribute: str) -> _Answer:
        """Evidence (b): does the decision hang on what the region says of the attribute?

        A hole is a picture that the model may never have seen, and its margin may move whatever was in it. What tells
        is that it moves one way where the value goes with the class, and another way where it does not.
        """
        found = [e for e in self._of("removal_contrast", region=region, group=attribute) if e.n > 0]
        if not found:
            return self.removal(region)
        limit, what = self.policy.tolerance.removal_contrast, f"the removal of {region}"
        return self._exceeds(found, limit, what, by_class=False)

    def value(self, attribute: str, region: str | None = None) -> _Answer:
        """Evidence (b) or (c): do decisions follow the attribute's value, by the best test there is?

        A swap of the user's changes the cue and nothing else, so it settles the matter. What a swap of one region
        changes is shown; that it changes nothing is not, because other places may say the same. Else accuracy tells.
        """
        swap, gap = self._swapped(None, attribute), self.gap(attribute)
        if swap.there is not None:
            return swap
        in_region = _NOT_ASKED if region is None else self._swapped(region, attribute)
        told = [answer for answer in (in_region, gap) if answer.there]
        return told[0] if told else swap if swap.asked else gap

    def swap(self, attribute: str) -> _Answer:
        """Evidence (b): does the decision go with the cue when the user's swap changes it, or a region's?

        A region may hold a part of the cue only: that its swap changes nothing says nothing of the attribute.
        """
        own = self._swapped(None, attribute)
        regions = self.subjects.regions_with("spurious")
        in_regions = _strongest(self._swapped(region, attribute) for region in regions)
        return in_regions if in_regions.there and not own.there else own

    def _swapped(self, region: str | None, attribute: str) -> _Answer:
        # Where it is not known which value goes with which class, all that can be asked is whether decisions change.
        metric = "swap_gap" if (region, attribute) in self._with_swap_gap else "swap_flips"
        found = [e for e in self._of(metric, region=region, group=attribute) if e.n > 0]
        if region is not None:
            # Only images with a donor are exchanged: too few of them say nothing, and nobody expects them to.
            found = [e for e in found if e.measured and e.n >= self.policy.min_samples]
        if not found:
            return _NOT_ASKED
        return self._exceeds(found, self.policy.tolerance.swap_gap, f"the swap of {attribute}", by_class=False)

    def gap(self, attribute: str) -> _Answer:
        """Evidence (c): is the model right less often where the cue misleads, or for one value of the attribute?"""
        limit, what = self.policy.tolerance.accuracy_gap, f"accuracy by {attribute}"
        if attribute in self._with_alignment:
            aligned = [e for e in self._of("alignment_gap", group=attribute) if _says_alignment(e)]
            return self._exceeds(aligned, limit, what, by_class=False)
        return self._exceeds([e for e in self._of("accuracy_gap", group=attribute) if e.class_name], limit, what)

    def tie(self, attribute: str) -> _Answer:
        """Evidence (d): do attribute and label go together in the training data?"""
        found = self._of("cramers_v", group=attribute)
        if not found:
            return _NOT_ASKED
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
    ) -> _Answer:
        """Yes if any estimate is shown to lie above the limit, no if all lie within it, else unknown.

        Without `by_class`, the estimate over all classes says no for each of them, as long as none lies above the limit
        by its own interval. For `absent` classes, by default those of which there is no image at all, nothing speaks.
        """
        absent = self._absent if absent is None else absent
        least = self.policy.min_samples
        usable = [e for e in estimates if e.measured and e.n >= least]
        above = [e for e in usable if e in self._significant and e.low is not None and e.low > limit]
        if above:
            return _Answer(True, max(above, key=_by_value))
        if not by_class:
            # What only the correction for so many questions keeps from counting is not cleared either.
            close = [e for e in usable if e.low is not None and e.low > limit]
            estimates = [e for e in estimates if e.class_name is None or e in close]
            usable = [e for e in usable if e in estimates]
        thin = [e for e in estimates if e not in usable]
        undecided = [e for e in usable if e.high is not None and e.high > limit]
        if not estimates or (not by_class and all(e.class_name is not None for e in estimates)):
            return _Answer(None, None, f"{what} was not measured" + (" over all classes" if estimates else ""))
        if thin:
            short = min(thin, key=lambda e: (e.n, *_by_value(e)))
            because = short.reason or f"{short.n} valid images, {least} needed"
            return _Answer(None, short, f"{_readable(short)}: {because}", least if short.n < least else None)
        if absent:
            missing = ", ".join(absent)
            return _Answer(None, max(usable, key=_by_value), f"{what}: the audit set has no image of {missing}")
        if undecided:
            widest = max(undecided, key=_by_value)
            assert widest.low is not None
            open_ = f"{_readable(widest)} is {_interval(widest)}, which leaves open whether it exceeds {limit:g}"
            if widest.low > limit:
                open_ += " by more than the chance of so many questions would"
            return _Answer(None, widest, open_, self._settle(widest, limit))
        return _Answer(False, max(usable, key=_by_value))

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


def _strongest(answers: Iterable[_Answer]) -> _Answer:
    """Of several answers the one that counts: any yes, else any unknown, else a no; what was not asked last.

    Of several that count alike the one with the largest estimate, whatever order regions and attributes are in.
    """
    metrics = tuple(_LIMITS)

    def rank(answer: _Answer) -> tuple[int, int, float, int, str]:
        counts = {True: 0, None: 1, False: 2}[answer.there] if answer.asked else 3
        if answer.estimate is None:
            return counts, len(metrics), 0.0, 0, answer.reason
        value, name, n = _by_value(answer.estimate)
        metric = answer.estimate.metric
        return counts, metrics.index(metric) if metric in metrics else len(metrics), -value, n, name

    return min(answers, key=rank, default=_NOT_ASKED)


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


@dataclass(frozen=True)
class _Weighed:
    """What the evidence leaves possible, and the answers that would have to be known to tell more."""

    possible: tuple[Verdict, ...]
    wanting: tuple[_Answer, ...]


def _weigh(table: Callable[..., Verdict], *answers: _Answer) -> _Weighed:
    """What the table gives for each way in which what is unknown may turn out."""
    found = {ways: table(*ways) for ways in product(*(answer.ways for answer in answers))}
    possible = tuple(verdict for verdict in Verdict if verdict in found.values())

    def matters(i: int) -> bool:
        return any(verdict is not found[(*ways[:i], not ways[i], *ways[i + 1 :])] for ways, verdict in found.items())

    unknown = [i for i, answer in enumerate(answers) if answer.asked and answer.there is None]
    return _Weighed(possible, tuple(answers[i] for i in unknown if matters(i)))


# Of what several attributes make of one region, the gravest counts.
_GRAVITY = (Verdict.RELIANCE, Verdict.SUSPECTED, Verdict.INCONCLUSIVE, Verdict.CLEARED)


def _region_finding(region: str, asked: _Evidence) -> Finding:
    shown = [attribute for attribute, _ in asked.subjects.attributes if asked.shows(region, attribute)]
    found = [_finding_by_value(region, attribute, asked) for attribute in shown]
    if not found:
        return _finding_by_removal(region, asked)

    def gravest(f: Finding) -> tuple[list[int], list[float], str]:
        # Of several that are as grave the one with the largest numbers, whatever order attributes are in.
        return sorted(map(_GRAVITY.index, f.possible)), [-_by_value(e)[0] for e in f.evidence], f.sentence

    return min(found, key=gravest)


def _finding_by_removal(region: str, asked: _Evidence) -> Finding:
    look, removal = asked.look(region), asked.removal(region)
    gap = _strongest(
        asked.gap(attribute) for attribute, _ in asked.subjects.attributes if asked.shows(region, attribute) is None
    )
    alone = None
    if not removal.asked and not gap.asked:
        # Without (b) and (c) reliance can be neither shown nor ruled out.
        gap = _Answer(None, reason="nothing was removed, and no attribute is annotated whose values could be compared")
        alone = Verdict.SUSPECTED if look.there else None
    weighed = _weigh(verdict_by_removal, look, removal, gap)
    said = [(removal, _say_removal(region, removal, asked)), (look, _say_attention(region, look))]
    if gap.asked:
        said.insert(0, (gap, _say_performance(gap, asked)))
    return _finding("region", region, weighed, tuple(said), asked, alone)


def _finding_by_value(region: str, attribute: str, asked: _Evidence) -> Finding:
    value, contrast, look = asked.value(attribute, region), asked.contrast(region, attribute), asked.look(region)
    tie = asked.tie(attribute)
    weighed = _weigh(verdict_by_value, value, contrast, look)
    said = (
        (contrast, _say_removal(region, contrast, asked)),
        (value, _say_value(value, asked)),
        (look, _say_attention(region, look)),
        (tie, _say_association(tie)),
    )
    return _finding("region", region, weighed, said, asked)


def _attribute_finding(attribute: str, asked: _Evidence) -> Finding:
    regions = asked.subjects.regions_with("spurious")
    # Where it is known which regions show the attribute, only those can show that it is used.
    showing = [region for region in regions if asked.shows(region, attribute)] or regions
    gap, swap, tie = asked.gap(attribute), asked.swap(attribute), asked.tie(attribute)
    look = _strongest(asked.look(region) for region in showing)
    hangs = _strongest(asked.contrast(region, attribute) for region in showing)
    weighed = _weigh(attribute_verdict, gap, swap, tie, look, hangs)
    of_look, of_hangs = (a.estimate.region if a.estimate else None for a in (look, hangs))
    said = (
        (gap, _say_performance(gap, asked)),
        (swap, _say_swap(swap, asked)),
        (tie, _say_association(tie)),
        (hangs, _say_removal(of_hangs or "a spurious region", hangs, asked)),
        (look, _say_attention(of_look or "a spurious region", look)),
    )
    return _finding("attribute", attribute, weighed, said, asked)


def _finding(
    kind: Literal["region", "attribute"],
    name: str,
    weighed: _Weighed,
    said: tuple[tuple[_Answer, str], ...],
    asked: _Evidence,
    alone: Verdict | None = None,
) -> Finding:
    """The verdict, its sentence and its evidence; `alone` is the verdict where only the heatmaps were asked."""
    possible = weighed.possible
    verdict = possible[0] if len(possible) == 1 else alone or Verdict.INCONCLUSIVE
    # Of an attribute and of a region the same swap may be said.
    shown = "; ".join(dict.fromkeys(sentence for answer, sentence in said if answer.there))
    denied = "; ".join(sentence for answer, sentence in said if answer.there is False)
    wanting = [answer for answer, _ in said if answer in weighed.wanting]
    reasons = "; ".join(answer.reason for answer in wanting)
    if verdict is Verdict.RELIANCE:
        parts = [shown]
    elif verdict is Verdict.CLEARED:
        parts = [f"{shown}, but {denied}" if shown else denied]
    elif verdict is alone:
        parts = [f"{shown}; whether it decides anything is unknown: {reasons}"]
    elif verdict is Verdict.SUSPECTED:
        parts = [f"{shown}, but {denied or 'no annotated spurious region is shown to draw the decision'}"]
    elif len(possible) == 1:
        parts = [f"{shown}; {denied}: the heatmaps do not show what the accuracy shows"]
    else:
        parts = [reasons, f"Shown: {shown}" if shown else ""]
        if denied and not {Verdict.RELIANCE, Verdict.INCONCLUSIVE} & set(possible):
            parts.append(f"Reliance is ruled out: {denied}")
    sentence = " ".join(f"{_capital(part)}." for part in parts if part)
    settle = [answer.settle for answer in wanting if answer.settle is not None]
    evidence = tuple(dict.fromkeys(e for answer, _ in said for e in _with_companions(answer, asked)))
    return Finding(
        kind,
        name,
        verdict,
        sentence,
        evidence,
        possible,
        max(settle) if settle and verdict is Verdict.INCONCLUSIVE else None,
    )


# What is said along with an estimate: of the same subject, but for the metric.
_COMPANIONS = {
    "removal_flips": ("control_flips", "removal_effect", "control_effect"),
    "removal_contrast": ("removal_effect", "control_effect", "removal_score", "control_score"),
    "alignment_gap": ("conflicting_accuracy", "aligned_accuracy"),
    "swap_gap": ("swap_conflicting_accuracy", "swap_aligned_accuracy", "swap_follows"),
}


def _companions(e: Estimate, asked: _Evidence) -> list[Estimate]:
    wanted = _COMPANIONS.get(e.metric, ())
    # A contrast is of an attribute, the effects that it is made of are not.
    group = None if e.metric == "removal_contrast" else e.group
    same = {
        other.metric: other
        for other in asked.estimates
        if other.metric in wanted and (other.region, other.class_name, other.group) == (e.region, e.class_name, group)
    }
    return [same[metric] for metric in wanted if metric in same]


def _with_companions(answer: _Answer, asked: _Evidence) -> Iterator[Estimate]:
    if answer.estimate is not None:
        yield answer.estimate
        yield from _companions(answer.estimate, asked)


def _say_attention(region: str, look: _Answer) -> str:
    if look.estimate is None or not look.estimate.measured:
        return f"attention to {region} was not measured"
    for_class = f"for class {look.estimate.class_name} " if look.estimate.class_name else ""
    times = f"{_interval(look.estimate)} times the share its area would ({look.estimate.method})"
    return f"{for_class}the heatmaps give {region} {'' if look.there else 'at most '}{times}"


def _say_removal(region: str, removal: _Answer, asked: _Evidence) -> str:
    e = removal.estimate
    if e is None or not e.measured:
        return f"the removal of {region} was not measured"
    others = {other.metric: other for other in _companions(e, asked) if other.measured}
    for_class = f"for class {e.class_name} " if e.class_name else ""
    size = "" if removal.there else "at most "
    if e.metric == "removal_flips":
        said = f"{for_class}removing {region} changes {size}{_percent(e)} of the decisions"
        control = others.get("control_flips")
        return said if control is None else f"{said} beyond the {_plain_percent(control)} that a control region changes"
    said = f"what {region} says of {e.group} carries {size}{_percent(e)} of the margin"
    effect = others.get("removal_effect")
    if effect is None or effect.low is None or (effect.low <= 0 and not removal.there):
        return for_class + said
    moves = f"removing {region} moves the decision by {_percent(effect)} of its margin"
    if (control := others.get("control_effect")) is not None:
        moves += f" beyond the {_plain_percent(control)} that a control region does"
    if not removal.there:
        return f"{for_class}{said}, though {moves}"
    score, control = others.get("removal_score"), others.get("control_score")
    if score is not None and score.low is not None and score.low > 0:
        moves += f", and lowers the score by {_interval(score)}"
        moves += "" if control is None else f" beyond the {control.value:z.2f} that a control region does"
    return f"{for_class}{moves}; {said}"


def _say_value(value: _Answer, asked: _Evidence) -> str:
    swapped = value.estimate is not None and value.estimate.metric.startswith("swap_")
    return _say_swap(value, asked) if swapped else _say_performance(value, asked)


def _say_swap(swap: _Answer, asked: _Evidence) -> str:
    e = swap.estimate
    if e is None or not e.measured:
        return "no cue was swapped"
    where = f"in class {e.class_name} " if e.class_name else ""
    what = f"{e.group}" + (f" in {e.region}" if e.region else "")
    size = "" if swap.there else "at most "
    if e.metric == "swap_flips":
        return f"{where}swapping {what} changes {size}{_percent(e)} of the decisions"
    others = {other.metric: other for other in _companions(e, asked)}
    conflicting, aligned = others.get("swap_conflicting_accuracy"), others.get("swap_aligned_accuracy")
    both = ""
    if conflicting is not None and aligned is not None and conflicting.measured and aligned.measured:
        both = f", from {_plain_percent(aligned)} to {_plain_percent(conflicting)}"
    cost = _percent(e, unit="points")
    return f"{where}swapping {what} against the class costs {size}{cost} of accuracy{both}"


def _say_performance(gap: _Answer, asked: _Evidence) -> str:
    e = gap.estimate
    if e is None or not e.measured:
        return "accuracy by group was not measured"
    where = f"within class {e.class_name} " if e.class_name else ""
    size = "" if gap.there else "at most "
    if e.metric == "alignment_gap":
        others = {other.metric: other for other in _companions(e, asked)}
        conflicting, aligned = others.get("conflicting_accuracy"), others.get("aligned_accuracy")
        known = conflicting is not None and aligned is not None and conflicting.measured and aligned.measured
        if gap.there and conflicting is not None and aligned is not None and known:
            return (
                f"{where}accuracy is {_plain_percent(conflicting)} where {e.group} and class disagree, "
                f"{_plain_percent(aligned)} where they agree (difference {_interval(e)})"
            )
        return f"{where}accuracy is {size}{_interval(e)} higher where {e.group} and class agree"
    return f"{where}accuracy differs by {e.group} by {size}{_interval(e)}"


def _say_association(tie: _Answer) -> str:
    e = tie.estimate
    if e is None or not e.measured:
        return "association in the training data was not measured"
    how = "" if tie.there else "hardly "
    return f"in the training data {e.group} and label {how}go together (Cramér's V {_interval(e)})"


def _readable(e: Estimate) -> str:
    return e.subject.replace("cramers_v", "Cramér's V").replace("_", " ")


def _interval(e: Estimate) -> str:
    return f"{e.value:z.2f} [{e.low:z.2f}, {e.high:z.2f}]"


def _percent(e: Estimate, unit: str = "%") -> str:
    assert e.value is not None and e.low is not None and e.high is not None
    return f"{100 * e.value:z.0f} {unit} [{100 * e.low:z.0f}, {100 * e.high:z.0f}]"


def _plain_percent(e: Estimate) -> str:
    assert e.value is not None
    return f"{100 * e.value:z.0f} %"


def _by_value(e: Estimate) -> tuple[float, str, int]:
    """By value, and where values are equal in an order that does not depend on that of the estimates."""
    return e.value if e.value is not None and e.measured else -math.inf, e.subject, e.n


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]

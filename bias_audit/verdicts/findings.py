"""What the evidence says of each spurious region and each attribute.

Enters: `Estimate`s, the `Subjects` they are about, and a `Policy` with its tolerances. Leaves: `Finding`s: a verdict
each, with the sentence that a person needs and the evidence.

Where something is unknown the verdict is taken for each way in which it may turn out: a finding is inconclusive only
where these differ. Standard library only, but for what a notebook shows: the gate judges anew, and must start in a
blink.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

from bias_audit.policies.policy import Policy
from bias_audit.terms import Estimate, Subjects, Verdict
from bias_audit.verdicts.decisions import attribute_verdict, verdict_by_removal, verdict_by_value
from bias_audit.verdicts.questions import Answer, Evidence, by_value, strongest
from bias_audit.verdicts.sentences import (
    say_association,
    say_attention,
    say_performance,
    say_removal,
    say_swap,
    say_value,
    with_companions,
)


@dataclass(frozen=True)
class Finding:
    """The verdict on one spurious region or one attribute, with the sentence a person needs and its evidence.

    `possible` are the verdicts that the evidence does not rule out: one, or several where something is unknown. An
    unknown need not matter: a region that may or may not be looked at is not relied on if removing it changes nothing.

    Example:
        >>> subjects = Subjects((("hair", "spurious"),), (), ("doctor", "nurse"))
        >>> removed = Estimate("removal_flips", 0.01, -0.02, 0.04, 200, region="hair")
        >>> (finding,) = find([removed], subjects, Policy())
        >>> print(finding.verdict, "-", finding.sentence)
        cleared - Removing hair changes at most 1 % [-2, 4] of the decisions.
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
        from markupsafe import Markup

        from bias_audit.notebook import numbers_html, verdict_html

        whole = Markup('<div style="max-width: 90ch">{} {} <b>{}</b><p style="margin: 4px 0">{}</p>{}</div>')
        verdict, numbers = verdict_html(self.verdict), numbers_html(self.evidence)
        return str(whole.format(verdict, self.kind, self.name, self.sentence, numbers))


def find(estimates: Sequence[Estimate], subjects: Subjects, policy: Policy) -> tuple[Finding, ...]:
    """One finding for each spurious region and each attribute, in the order of the subjects.

    Args:
        estimates: of one audit; metrics that no verdict rests on are passed over.
        subjects: the names of regions, attributes and classes.
        policy: its tolerances and `min_samples`; its rules are for `judge`.

    Example:
        >>> subjects = Subjects((("hair", "spurious"),), (), ("doctor", "nurse"))
        >>> seen = Estimate("enrichment", 2.1, 1.7, 2.6, 200, region="hair", method="gradcam")
        >>> removed = Estimate("removal_flips", 0.2, 0.15, 0.26, 200, region="hair")
        >>> [(finding.name, str(finding.verdict)) for finding in find([seen, removed], subjects, Policy())]
        [('hair', 'reliance')]
    """
    asked = Evidence(estimates, subjects, policy)
    attributes = [attribute for attribute, _ in subjects.attributes]
    return (
        *(_region_finding(region, asked) for region in subjects.regions_with("spurious")),
        *(_attribute_finding(attribute, asked) for attribute in attributes),
    )


@dataclass(frozen=True)
class _Weighed:
    """What the evidence leaves possible, and the answers that would have to be known to tell more."""

    possible: tuple[Verdict, ...]
    wanting: tuple[Answer, ...]


def _weigh(table: Callable[..., Verdict], *answers: Answer) -> _Weighed:
    """What the table gives for each way in which what is unknown may turn out."""
    found = {ways: table(*ways) for ways in product(*(answer.ways for answer in answers))}
    possible = tuple(verdict for verdict in Verdict if verdict in found.values())

    def matters(i: int) -> bool:
        return any(verdict is not found[(*ways[:i], not ways[i], *ways[i + 1 :])] for ways, verdict in found.items())

    unknown = [i for i, answer in enumerate(answers) if answer.asked and answer.there is None]
    return _Weighed(possible, tuple(answers[i] for i in unknown if matters(i)))


# Of what several attributes make of one region, the gravest counts.
_GRAVITY = (Verdict.RELIANCE, Verdict.SUSPECTED, Verdict.INCONCLUSIVE, Verdict.CLEARED)


def _region_finding(region: str, asked: Evidence) -> Finding:
    shown = [attribute for attribute, _ in asked.subjects.attributes if asked.shows(region, attribute)]
    found = [_finding_by_value(region, attribute, asked) for attribute in shown]
    if not found:
        return _finding_by_removal(region, asked)

    def gravest(f: Finding) -> tuple[list[int], list[float], str]:
        # Of several that are as grave the one with the largest numbers, whatever order attributes are in.
        return sorted(map(_GRAVITY.index, f.possible)), [-by_value(e)[0] for e in f.evidence], f.sentence

    return min(found, key=gravest)


def _finding_by_removal(region: str, asked: Evidence) -> Finding:
    look, removal = asked.look(region), asked.removal(region)
    gap = strongest(
        asked.gap(attribute) for attribute, _ in asked.subjects.attributes if asked.shows(region, attribute) is None
    )
    alone = None
    if not removal.asked and not gap.asked:
        # Without (b) and (c) reliance can be neither shown nor ruled out.
        gap = Answer(None, reason="nothing was removed, and no attribute is annotated whose values could be compared")
        alone = Verdict.SUSPECTED if look.there else None
    weighed = _weigh(verdict_by_removal, look, removal, gap)
    said = [(removal, say_removal(region, removal, asked)), (look, say_attention(region, look))]
    if gap.asked:
        said.insert(0, (gap, say_performance(gap, asked)))
    return _finding("region", region, weighed, tuple(said), asked, alone)


def _finding_by_value(region: str, attribute: str, asked: Evidence) -> Finding:
    value, contrast, look = asked.value(attribute, region), asked.contrast(region, attribute), asked.look(region)
    tie = asked.tie(attribute)
    read_here = say_removal(region, contrast, asked)
    if contrast.there is None and contrast.estimate is not None and contrast.estimate.metric == "fill_flips":
        # Without anything to compare a removal with, the exchange of the region tells whether the value is read here,
        # if another test tells that it is followed; else the heatmaps have to.
        exchanged, followed = asked.swapped(region, attribute), asked.value(attribute)
        if exchanged.there and followed.there:
            value, contrast, read_here = followed, exchanged, say_swap(exchanged, asked)
        else:
            contrast = replace(contrast, asked=False)
    weighed = _weigh(verdict_by_value, value, contrast, look)
    said = (
        (contrast, read_here),
        (value, say_value(value, asked)),
        (look, say_attention(region, look)),
        (tie, say_association(tie)),
    )
    return _finding("region", region, weighed, said, asked)


def _attribute_finding(attribute: str, asked: Evidence) -> Finding:
    regions = asked.subjects.regions_with("spurious")
    # Where it is known which regions show the attribute, only those can show that it is used.
    showing = [region for region in regions if asked.shows(region, attribute)] or regions
    gap, swap, tie = asked.gap(attribute), asked.swap(attribute), asked.tie(attribute)
    look = strongest(asked.look(region) for region in showing)
    hangs = strongest(asked.contrast(region, attribute) for region in showing)
    weighed = _weigh(attribute_verdict, gap, swap, tie, look, hangs)
    of_look, of_hangs = (a.estimate.region if a.estimate else None for a in (look, hangs))
    said = (
        (gap, say_performance(gap, asked)),
        (swap, say_swap(swap, asked)),
        (tie, say_association(tie)),
        (hangs, say_removal(of_hangs or "a spurious region", hangs, asked)),
        (look, say_attention(of_look or "a spurious region", look)),
    )
    return _finding("attribute", attribute, weighed, said, asked)


def _finding(
    kind: Literal["region", "attribute"],
    name: str,
    weighed: _Weighed,
    said: tuple[tuple[Answer, str], ...],
    asked: Evidence,
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
    evidence = tuple(dict.fromkeys(e for answer, _ in said for e in with_companions(answer, asked)))
    return Finding(
        kind,
        name,
        verdict,
        sentence,
        evidence,
        possible,
        max(settle) if settle and verdict is Verdict.INCONCLUSIVE else None,
    )


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]

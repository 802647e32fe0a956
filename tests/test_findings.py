"""What the evidence says: the rule in words, the numbers behind it, and that nothing but the evidence decides."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from estimates import (
    ALIGNMENTS,
    CONTRASTS,
    GAPS,
    LOOKS,
    NO_CUE,
    NOT_ANNOTATED,
    PROBES,
    REMOVALS,
    SHOWN,
    SIMILARITIES,
    SUBJECTS,
    SWAPS,
    TIES,
    TWO_CUES,
    UNMEASURED,
    alignment,
    association,
    contrast,
    enrichment,
    fitness,
    found,
    gap,
    hirescam,
    probe,
    removal,
    swap,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from bias_audit.findings import (
    Finding,
    attribute_verdict,
    explainers,
    find,
    verdict_by_removal,
    verdict_by_value,
)
from bias_audit.policies.policy import Policy
from bias_audit.terms import Estimate, Outcome, Subjects, Verdict
from bias_audit.verdict import judge

RELIANCE, SUSPECTED, CLEARED, INCONCLUSIVE = Verdict
UNKNOWNS = ("unknown", "thin", "unmeasured", "missing")
Way = bool | None
WAYS = (True, False, None)


# The rules, in words


def of_a_region(attention: Way, removing: Way, performance: Way) -> Verdict:
    """A region that shows no attribute. None: not asked.

    Where its removal changes no decision it is not relied on, whatever else there is. Else count the kinds of evidence:
    two are reliance, one a suspicion, none clears it. Performance is of an attribute: alone it accuses no region, but
    something is there that the heatmaps do not show.
    """
    if removing is False:
        return CLEARED
    there = [attention, removing, performance].count(True)
    if there == 1 and performance:
        return INCONCLUSIVE
    return (CLEARED, SUSPECTED, RELIANCE, RELIANCE)[there]


def of_a_cue(follows: Way, read_here: Way, attention: Way) -> Verdict:
    """A region that shows an attribute: do decisions follow the value, and do they read it here?

    That they read it here is told by the removal, and where nothing was removed by the heatmaps, as far as these can:
    what they do not show is not ruled out. Looked at and not read here is a suspicion.
    """
    if not follows:
        return CLEARED
    return {
        (True, True): RELIANCE,
        (True, False): RELIANCE,
        (False, True): SUSPECTED,
        (False, False): CLEARED,
        (None, True): RELIANCE,
        (None, False): INCONCLUSIVE,
    }[read_here, bool(attention)]


def of_an_attribute(attention: Way, removing: Way, swapping: Way, performance: Way, association: Way) -> Verdict:
    """What DESIGN.md says of an attribute: (b) is its swap; a region's removal is (b) too, of a region that may hold
    it, and adds to performance but not to the swap. Where a swap changes nothing, accuracy differs by something else.
    """
    kinds = {"a": attention, "b": swapping, "c": performance, "d": association}
    there = {kind for kind, way in kinds.items() if way is True}
    if "b" in there:
        return RELIANCE if there - {"b"} else SUSPECTED
    if "c" not in there:
        return CLEARED
    more = there - {"c"} or removing is True
    return RELIANCE if more and swapping is not False else SUSPECTED


def test_the_tables_follow_the_rules_in_words() -> None:
    for look, hangs, other in itertools.product(WAYS, repeat=3):
        # Without (b) and (c) nothing is decided; `find` does not ask the table.
        if (hangs, other) != (None, None):
            assert verdict_by_removal(look, hangs, other) is of_a_region(look, hangs, other), (look, hangs, other)
        assert verdict_by_value(other, hangs, look) is of_a_cue(other, hangs, look), (other, hangs, look)
    for gap_, swap_, tie, look, hangs in itertools.product(WAYS, repeat=5):
        if gap_ is not None:
            verdict = attribute_verdict(gap_, swap_, tie, look, hangs)
            assert verdict is of_an_attribute(look, hangs, swap_, gap_, tie), (gap_, swap_, tie, look, hangs)


def test_more_evidence_against_a_model_never_makes_it_better() -> None:
    order = [CLEARED, INCONCLUSIVE, SUSPECTED, RELIANCE]
    for table, count in ((verdict_by_removal, 3), (verdict_by_value, 3), (attribute_verdict, 5)):
        for turn in itertools.product((True, False), repeat=count):
            for i, way in enumerate(turn):
                worse = table(*turn[:i], True, *turn[i + 1 :])
                assert way or order.index(worse) >= order.index(table(*turn))


def ways(state: str, asked: bool = True) -> tuple[Way, ...]:
    """How evidence in one of the states of `estimates` may turn out; without `asked`, what is missing was not asked."""
    if state == "not annotated" or (state == "missing" and not asked):
        return (None,)
    return {"yes": (True,), "no": (False,)}.get(state, (True, False))


def assert_follows(finding: Finding, possible: set[Verdict], expected: Verdict | None, case: object) -> None:
    """The verdict where one only is possible, or the one expected."""
    assert list(finding.possible) == [verdict for verdict in Verdict if verdict in possible], case
    assert finding.verdict is (expected or (possible.pop() if len(possible) == 1 else INCONCLUSIVE)), case
    assert_readable(finding)


@pytest.mark.parametrize("look", LOOKS)
def test_a_region_that_shows_no_attribute(look: str) -> None:
    """Every combination of states: shown, denied, unknown in four ways, and not asked."""
    for hangs, g, shows in itertools.product(REMOVALS, GAPS, ("no", "thin", "unmeasured", "missing")):
        subjects = NOT_ANNOTATED if g == "not annotated" else SUBJECTS
        finding = found((*LOOKS[look], *GAPS[g], *REMOVALS[hangs], *PROBES[shows]), subjects)["hair"]
        # Accuracy by what the region is known not to show says nothing of it.
        compared = g != "not annotated" and shows != "no"
        decided = hangs != "missing" or compared
        turns = itertools.product(
            ways(look),
            ways(hangs, asked=False),
            ways(g) if compared else (None,) if decided else (True, False),
        )
        attention_alone = SUSPECTED if look == "yes" and not decided else None
        assert_follows(finding, {of_a_region(*turn) for turn in turns}, attention_alone, (look, hangs, g, shows))
        assert (finding.kind, finding.name) == ("region", "hair")
        # Performance comes first, then the removal and attention.
        assert finding.evidence == (*(GAPS[g] if compared else ()), *REMOVALS[hangs], *LOOKS[look])


STATES = ("yes", "no", "unknown", "missing")


@pytest.mark.parametrize("look", LOOKS)
def test_a_region_that_shows_an_attribute(look: str) -> None:
    """What decisions follow: the user's swap, where that leaves it open accuracy; what they read here: the contrast."""
    for reads, swapping, g, tie in itertools.product(CONTRASTS, SWAPS, STATES, ("yes", "no", "missing")):
        estimates = (*SHOWN, *LOOKS[look], *GAPS[g], *SWAPS[swapping], *TIES[tie], *CONTRASTS[reads])
        finding = found(estimates)["hair"]
        by_swap = swapping in ("yes", "no") or (g != "yes" and swapping in ("unknown", "thin"))
        # No image with which to measure is as good as not asked.
        read = "missing" if reads == "unmeasured" else reads
        turns = itertools.product(ways(swapping if by_swap else g), ways(read, asked=False), ways(look))
        case = (look, reads, swapping, g, tie)
        assert_follows(finding, {of_a_cue(*turn) for turn in turns}, None, case)
        value = SWAPS[swapping] if by_swap else GAPS[g]
        assert finding.evidence == (*CONTRASTS[read], *value, *LOOKS[look], *TIES[tie]), case


def assert_readable(finding: Finding) -> None:
    assert finding.sentence[0].isupper() and finding.sentence.endswith("."), finding.sentence
    assert not re.search(r"None|\bnan\b|\binf\b|-0\.00|-0 %|  |\.\.|, but \.|; \.|^[.;,]", finding.sentence), finding
    assert (finding.samples_to_settle is None) or finding.verdict is INCONCLUSIVE


@pytest.mark.parametrize("g", [state for state in GAPS if state != "not annotated"])
def test_attribute_finding(g: str) -> None:
    for swapping, tie, look, hangs in itertools.product(STATES, repeat=4):
        # The removal of a region speaks where there is no contrast.
        for removals in (REMOVALS[hangs], (*CONTRASTS[hangs], *REMOVALS["yes"]) if CONTRASTS[hangs] else ()):
            estimates = (*GAPS[g], *SWAPS[swapping], *TIES[tie], *LOOKS[look], *removals)
            finding = found(estimates)["gender"]
            removing = ways(hangs if removals else "missing", asked=False)
            turns = itertools.product(
                ways(look), removing, ways(swapping, asked=False), ways(g), ways(tie, asked=False)
            )
            case = (g, swapping, tie, look, hangs)
            assert_follows(finding, {of_an_attribute(*turn) for turn in turns}, None, case)
            assert (finding.kind, finding.name) == ("attribute", "gender")
            expected = (*GAPS[g], *SWAPS[swapping], *TIES[tie], *removals[:1], *LOOKS[look])
            assert finding.evidence == expected, case


def test_an_attribute_without_any_cue_region() -> None:
    assert found(GAPS["yes"], NO_CUE)["gender"].verdict is SUSPECTED
    assert "no annotated spurious region is shown" in found(GAPS["yes"], NO_CUE)["gender"].sentence
    assert found((*GAPS["yes"], *TIES["yes"]), NO_CUE)["gender"].verdict is RELIANCE
    assert found(GAPS["no"], NO_CUE)["gender"].verdict is CLEARED
    # The removal of what is no cue, and of what the audit set does not have, is no evidence.
    elsewhere = tuple(make(0.9, 0.8, 1.0, region=r) for make in (removal, contrast, probe) for r in ("coat", "hair"))
    assert found((*GAPS["yes"], *elsewhere), NO_CUE)["gender"].verdict is SUSPECTED


def test_what_was_not_asked_for_rules_out_nothing() -> None:
    """No attribute and no removal: what the heatmaps show can be no proof, and what they do not show no pass."""
    looked = found(LOOKS["yes"], NOT_ANNOTATED)["hair"]
    assert looked.verdict is SUSPECTED and looked.possible == (RELIANCE, SUSPECTED)
    assert "whether it decides anything is unknown" in looked.sentence
    unseen = found(LOOKS["no"], NOT_ANNOTATED)["hair"]
    assert unseen.verdict is INCONCLUSIVE and "ruled out" not in unseen.sentence
    for estimates in LOOKS.values():
        assert judge(estimates, NOT_ANNOTATED, Policy()).outcome is Outcome.INCONCLUSIVE
    # The removal alone, without an attribute, is enough to clear a region and not enough to convict it.
    verdicts = {
        (look, hangs): found((*LOOKS[look], *REMOVALS[hangs]), NOT_ANNOTATED)["hair"].verdict
        for look, hangs in itertools.product(("yes", "no"), repeat=2)
    }
    assert verdicts == {
        ("no", "no"): CLEARED,
        ("yes", "no"): CLEARED,
        ("no", "yes"): SUSPECTED,
        ("yes", "yes"): RELIANCE,
    }
    assert "nothing was removed" not in found(REMOVALS["unknown"], NOT_ANNOTATED)["hair"].sentence


def test_which_attribute_a_region_shows() -> None:
    """The whole interval of the gain lies above the tolerance, on images enough."""
    # Where hair shows gender it is cleared: decisions do not follow it. A hole that moves decisions is a suspicion.
    rest = (*LOOKS["no"], *GAPS["no"], *REMOVALS["yes"], *CONTRASTS["yes"])
    shows = {state: found((*rest, *PROBES[state]))["hair"].verdict is CLEARED for state in PROBES}
    assert shows == {state: state == "yes" for state in PROBES}
    for gain, expected in (
        (probe(0.2, 0.1, 0.3), SUSPECTED),
        (probe(0.2, 0.11, 0.3, n=20), CLEARED),
        (probe(0.2, 0.11, 0.3, n=19), SUSPECTED),
        (probe(0.9, 0.8, 1.0, region="face"), SUSPECTED),
        (probe(0.9, 0.8, 1.0, group="light"), SUSPECTED),
    ):
        assert found((*rest, gain), TWO_CUES)["hair"].verdict is expected
    # A gap counts for a region unless it is known not to show the attribute.
    accused = (*LOOKS["no"], *REMOVALS["yes"], *GAPS["yes"])
    assert [found((*accused, *PROBES[state]))["hair"].verdict for state in ("no", "thin", "unmeasured", "missing")] == [
        SUSPECTED, RELIANCE, RELIANCE, RELIANCE,
    ]  # fmt: skip


def test_of_several_attributes_that_a_region_shows_the_gravest_counts() -> None:
    subjects = replace(SUBJECTS, attributes=(*SUBJECTS.attributes, ("light", ("dim", "bright"))))

    def light(e: Estimate, shift: float = 0.0) -> Estimate:
        assert e.value is not None and e.low is not None and e.high is not None
        return replace(e, group="light", value=e.value + shift, low=e.low + shift, high=e.high + shift)

    shown = (*SHOWN, light(SHOWN[0]), *LOOKS["no"])
    for g, other in itertools.product(("yes", "no", "unknown"), repeat=2):
        estimates = (*shown, *GAPS[g], light(GAPS[other][0]), *CONTRASTS["yes"], light(CONTRASTS["yes"][0]))
        for order in (subjects, replace(subjects, attributes=subjects.attributes[::-1])):
            finding = found(estimates, order)["hair"]
            states = {g, other}
            expected = RELIANCE if "yes" in states else INCONCLUSIVE if "unknown" in states else CLEARED
            assert finding.verdict is expected
    # Of two that are as grave, the one with the larger numbers is said.
    for shift, name in ((0.1, "light"), (-0.05, "gender")):
        estimates = (*shown, *GAPS["yes"], light(GAPS["yes"][0]), *CONTRASTS["yes"], light(CONTRASTS["yes"][0], shift))
        for order in (subjects, replace(subjects, attributes=subjects.attributes[::-1])):
            assert f"what hair says of {name}" in found(estimates, order)["hair"].sentence.lower()
    # Only one is shown: of the other, accuracy does not matter to this region.
    estimates = (*SHOWN, *LOOKS["yes"], *GAPS["no"], light(GAPS["yes"][0]), *CONTRASTS["yes"])
    assert found(estimates, subjects)["hair"].verdict is CLEARED


def test_only_regions_that_show_an_attribute_speak_of_it() -> None:
    """If any is known to; else each may."""
    face = (enrichment(2.0, 1.8, 2.2, region="face"), removal(0.3, 0.2, 0.4, region="face"))
    estimates = (*face, *LOOKS["no"], *REMOVALS["no"], *GAPS["yes"])
    assert found(estimates, TWO_CUES)["gender"].verdict is RELIANCE
    assert found((*estimates, *PROBES["no"]), TWO_CUES)["gender"].verdict is RELIANCE
    accused = found((*estimates, *SHOWN), TWO_CUES)["gender"]
    assert accused.verdict is SUSPECTED and "face" not in accused.sentence
    assert found((*estimates, *SHOWN, probe(0.3, 0.2, 0.4, region="face")), TWO_CUES)["gender"].verdict is RELIANCE


# Which estimates speak


def test_only_the_cue_that_is_looked_at_is_accused() -> None:
    estimates = (*LOOKS["yes"], enrichment(0.7, 0.6, 0.8, region="face"), *GAPS["yes"])
    findings = found(estimates, TWO_CUES)
    assert findings["hair"].verdict is RELIANCE
    assert findings["face"].verdict is INCONCLUSIVE and "do not show" in findings["face"].sentence
    assert findings["gender"].verdict is RELIANCE and "hair" in findings["gender"].sentence
    # A region that is no cue has no finding, and does not stand for one.
    assert set(found((enrichment(3, 2.8, 3.2, region="coat"), *LOOKS["no"], *GAPS["no"]))) == {"hair", "gender"}
    # Nor does the removal of one say anything of the other.
    removed = (*estimates, removal(0.5, 0.4, 0.6, region="face"), *REMOVALS["no"])
    assert [found(removed, TWO_CUES)[name].verdict for name in ("hair", "face")] == [CLEARED, RELIANCE]


def test_any_class_or_method_that_shows_it_suffices_and_the_strongest_is_named() -> None:
    looks = (
        enrichment(0.7, 0.6, 0.8),
        enrichment(1.5, 1.3, 1.7, class_name="doctor"),
        enrichment(2.5, 2.3, 2.7, class_name="nurse", method="hirescam"),
    )
    finding = found((*looks, *GAPS["yes"]))["hair"]
    assert finding.verdict is RELIANCE and finding.evidence == (*GAPS["yes"], looks[2])
    assert "; for class nurse the heatmaps give hair 2.50" in finding.sentence and "hirescam" in finding.sentence
    # A thin estimate beside one that shows it does not take it back; beside one that does not, nothing is cleared.
    assert found((*looks, *LOOKS["thin"], *GAPS["yes"]))["hair"].verdict is RELIANCE
    assert found((*LOOKS["no"], *LOOKS["thin"], *GAPS["no"]))["hair"].verdict is INCONCLUSIVE
    removals = (
        *REMOVALS["no"],
        removal(0.4, 0.3, 0.5, class_name="doctor"),
        removal(0.6, 0.5, 0.7, class_name="nurse"),
    )
    finding = found((*removals, *looks))["hair"]
    assert finding.evidence[0] is removals[2] and finding.sentence.startswith("For class nurse removing hair")


def test_of_an_attribute_speaks_whichever_region_shows_most() -> None:
    def looks(hair: tuple[Estimate, ...], face: tuple[Estimate, ...]) -> tuple[Estimate, ...]:
        return (*hair, *(replace(e, region="face") for e in face), *GAPS["yes"])

    for subjects in (TWO_CUES, replace(TWO_CUES, regions=TWO_CUES.regions[::-1])):
        strong = (enrichment(2.5, 2.3, 2.7),)
        for estimates, said in ((looks(strong, LOOKS["yes"]), "hair 2.50"), (looks(LOOKS["yes"], strong), "face 2.50")):
            assert said in found(estimates, subjects)["gender"].sentence
        for state in ("no", "unknown"):
            shown = found(looks(LOOKS[state], LOOKS["yes"]), subjects)["gender"]
            assert shown.verdict is RELIANCE and "face 2.00" in shown.sentence
        open_ = found(looks(LOOKS["no"], LOOKS["unknown"]), subjects)["gender"]
        assert open_.possible == (RELIANCE, SUSPECTED) and open_.evidence[-1].region == "face"


def test_only_the_side_that_faces_the_limit_counts() -> None:
    wide_above, wide_below = removal(0.3, 0.2, 9.0), removal(0.02, -9.0, 0.05)
    assert found((wide_above, *LOOKS["yes"]), NOT_ANNOTATED)["hair"].verdict is RELIANCE
    assert found((wide_below, *LOOKS["yes"]), NOT_ANNOTATED)["hair"].verdict is CLEARED


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None])
def test_what_is_not_a_number_is_put_in_no_order(bad: float | None) -> None:
    thin = [enrichment(bad, None, None, n=5, method=m) for m in ("gradcam", "hirescam")]
    thin.append(enrichment(1.0, 0.5, 1.5, n=5, method="scorecam"))
    said = {found((*some, *GAPS["yes"]))["hair"].evidence[-1].method for some in itertools.permutations(thin)}
    assert said == {"gradcam"}


def test_a_class_may_accuse_and_need_not_acquit() -> None:
    """Of interventions and alignment, whose overall estimate speaks for every class that has images."""
    # What is asked, beside what, and of whom: where it is denied the finding is cleared, else not.
    makers: dict[str, tuple[Callable[..., Estimate], float, tuple[Estimate, ...], str]] = {
        "removal": (removal, 0.05, (*LOOKS["no"], *GAPS["no"]), "hair"),
        "contrast": (contrast, 0.1, (*SHOWN, *LOOKS["no"], *GAPS["yes"]), "hair"),
        "alignment": (alignment, 0.1, (*LOOKS["no"], *REMOVALS["no"]), "gender"),
        "swap": (swap, 0.1, (*LOOKS["no"], *GAPS["no"]), "gender"),
    }
    for make, limit, rest, name in makers.values():
        overall, loud = make(0.02, -0.01, 0.05), make(0.9, 0.8, 1.0, n=19, class_name="nurse")
        # Too thin to accuse, without an image, or open: the overall estimate speaks for it.
        for quiet in (
            loud,
            make(*UNMEASURED, n=0, class_name="nurse"),
            make(limit, limit - 0.1, limit + 0.1, n=20, class_name="nurse"),
            make(limit + 0.1, limit, limit + 0.2, n=20, class_name="nurse"),
        ):
            assert found((*rest, overall, quiet))[name].verdict is CLEARED
        assert found((*rest, overall, replace(loud, n=20)))[name].verdict in (RELIANCE, SUSPECTED)
        for open_ in (
            # Above the limit by its own interval, though not after the correction.
            (overall, make(limit + 0.1, limit + 0.005, limit + 0.195, n=20, class_name="nurse")),
            # Overall too thin, unmeasured, open, or not there.
            (replace(overall, n=19), make(0.0, 0.0, 0.05, class_name="nurse")),
            (make(*UNMEASURED, n=30), make(0.0, 0.0, 0.05, class_name="nurse")),
            (make(limit, limit - 0.1, limit + 0.1), make(0.0, 0.0, 0.05, class_name="nurse")),
            (make(0.0, 0.0, 0.05, class_name="nurse"),),
        ):
            assert found((*rest, *open_))[name].verdict is INCONCLUSIVE, open_
    # By class, attention and accuracy by group must all be within.
    assert found((*LOOKS["no"], enrichment(0.7, 0.6, 0.8, 19, class_name="nurse"), *GAPS["no"]))["hair"].verdict is (
        INCONCLUSIVE
    )


def test_a_class_without_an_image_clears_nothing() -> None:
    def accuracy(class_name: str | None) -> Estimate:
        return Estimate("accuracy", 0.9, 0.85, 0.95, 50, class_name=class_name)

    clean = (*LOOKS["no"], *ALIGNMENTS["no"], *REMOVALS["no"], *SWAPS["no"], *TIES["yes"])
    both = (accuracy(None), accuracy("doctor"), accuracy("nurse"))
    assert {f.verdict for f in found((*clean, *both)).values()} == {CLEARED}
    one = found((*clean, *both[:2]))
    assert {f.verdict for f in one.values()} == {INCONCLUSIVE}
    assert all("the audit set has no image of nurse" in f.sentence for f in one.values())
    # The training data are not the audit set: it says nothing of them.
    open_ = found((*LOOKS["no"], *GAPS["no"], *SWAPS["yes"], *TIES["no"], *both[:2]))["gender"]
    assert open_.verdict is INCONCLUSIVE and "association" not in open_.sentence
    # What the other class shows stands, and so does what the training data show.
    bad = found((*LOOKS["yes"], *ALIGNMENTS["yes"], *REMOVALS["yes"], *TIES["yes"], *both[:2]))
    assert {f.verdict for f in bad.values()} == {RELIANCE}
    assert "hardly" in found((*SWAPS["yes"], *LOOKS["no"], *GAPS["no"], *TIES["no"]))["gender"].sentence


def test_what_is_no_evidence_of_a_finding() -> None:
    confounded = (
        enrichment(3.0, 2.8, 3.2, group="gender=female"),
        removal(0.9, 0.8, 1.0, group="gender=female"),
        gap(0.5, 0.4, 0.6, class_name=None),
        *(
            replace(removal(0.9, 0.8, 1.0), metric=m)
            for m in ("removal_effect", "removal_score", "removal_margin", "control_flips", "fill_flips")
        ),
        replace(association(0.9, 0.8, 1.0), metric="audit_cramers_v"),
    )
    # Enrichment and removal within a group, and the gap over all classes, are confounded: none makes a finding.
    clean = (*LOOKS["no"], *GAPS["no"], *REMOVALS["no"], *TIES["no"])
    assert {f.verdict for f in found((*confounded, *clean)).values()} == {CLEARED}
    assert {f.verdict for f in found(confounded).values()} == {INCONCLUSIVE}


def test_alignment_takes_the_place_of_the_gap() -> None:
    """Where it is known which value goes with which class, that is what accuracy is compared by."""
    for state in ALIGNMENTS:
        if state == "missing":
            continue
        for g in ("yes", "no"):
            finding = found((*LOOKS["yes"], *ALIGNMENTS[state], *GAPS[g]))["hair"]
            alone = found((*LOOKS["yes"], *ALIGNMENTS[state]))["hair"]
            assert (finding.verdict, finding.evidence, finding.sentence) == (
                alone.verdict,
                alone.evidence,
                alone.sentence,
            )
            assert finding.evidence[0].metric == "alignment_gap"
    # A class in which nothing conflicts is no alignment.
    one_sided = alignment(*UNMEASURED, n=0, class_name="doctor")
    assert found((*LOOKS["yes"], one_sided, *GAPS["yes"]))["hair"].verdict is RELIANCE
    # One that goes the other way is no gap: the model does better where the cue misleads.
    assert found((*LOOKS["yes"], alignment(-0.4, -0.5, -0.3), *GAPS["yes"]))["gender"].verdict is CLEARED


def test_swaps_of_the_user_and_of_regions() -> None:
    base = (*SHOWN, *LOOKS["no"], *TIES["yes"], *CONTRASTS["yes"])
    yes, no = swap(0.3, 0.2, 0.4, region="hair"), swap(0.02, -0.01, 0.05, region="hair")
    open_ = swap(0.1, 0.0, 0.2, region="hair")

    def verdicts(*estimates: Estimate) -> list[Verdict]:
        findings = found((*base, *estimates))
        return [findings[name].verdict for name in ("hair", "gender")]

    # The user's swap changes the cue and nothing else: it settles what decisions follow.
    for g, regions in itertools.product(("yes", "no", "unknown"), ((), (yes,), (no,))):
        assert verdicts(*GAPS[g], *SWAPS["yes"], *regions) == [RELIANCE, RELIANCE]
        assert verdicts(*GAPS[g], *SWAPS["no"], *regions)[0] is CLEARED
    assert verdicts(*GAPS["no"], *SWAPS["no"]) == [CLEARED, CLEARED]
    assert verdicts(*GAPS["yes"], *SWAPS["no"]) == [CLEARED, SUSPECTED]
    # What the swap of a region changes is shown; that it changes nothing says nothing, other places may say the same.
    assert verdicts(*GAPS["no"], yes) == [RELIANCE, RELIANCE]
    for silent in (no, open_, replace(yes, n=19), replace(open_, value=None), swap(*UNMEASURED, n=0, region="hair")):
        assert verdicts(*GAPS["no"], silent) == [CLEARED, CLEARED]
        assert verdicts(*GAPS["yes"], silent) == [RELIANCE, RELIANCE]
        assert verdicts(*GAPS["unknown"], silent) == [INCONCLUSIVE, INCONCLUSIVE]
    # Where the user's leaves it open, either of the others may show it, and neither denies it.
    thin = swap(0.0, -0.02, 0.02, n=19)
    for mine in (*SWAPS["unknown"], thin):
        assert verdicts(*GAPS["no"], mine) == verdicts(*GAPS["no"], mine, no) == [INCONCLUSIVE, INCONCLUSIVE]
        assert verdicts(*GAPS["no"], mine, yes) == verdicts(*GAPS["yes"], mine, yes) == [RELIANCE, RELIANCE]
        assert verdicts(*GAPS["yes"], mine)[0] is RELIANCE
    # What shows it is said: the swap in the region before accuracy.
    both = found((*base, *GAPS["yes"], *SWAPS["unknown"], yes))
    assert both["hair"].evidence == (*CONTRASTS["yes"], yes, *LOOKS["no"], *TIES["yes"])
    assert both["gender"].sentence.lower().count("swapping gender in hair") == 1
    assert found((*base, *GAPS["no"], *SWAPS["yes"], replace(yes, value=0.35)))["gender"].evidence[1] is SWAPS["yes"][0]
    # A region's swap says nothing of another region.
    other = (*base, *GAPS["no"], replace(yes, region="face"), probe(0.3, 0.2, 0.4, region="face"))
    findings = found((*other, contrast(0.3, 0.2, 0.4, region="face")), TWO_CUES)
    assert [findings[name].verdict for name in ("hair", "face", "gender")] == [CLEARED, RELIANCE, RELIANCE]
    # A swap is no word on a region that shows no attribute.
    assert found((*LOOKS["no"], *GAPS["no"], *REMOVALS["yes"], yes))["hair"].verdict is SUSPECTED


def test_where_no_value_goes_with_a_class_the_removal_stands_in_for_the_contrast() -> None:
    base = (*SHOWN, *LOOKS["yes"], *GAPS["yes"])
    assert found((*base, *REMOVALS["yes"]))["hair"].verdict is RELIANCE
    assert found((*base, *REMOVALS["no"]))["hair"].verdict is SUSPECTED
    assert found((*base, *REMOVALS["no"], contrast(*UNMEASURED, n=0)))["hair"].verdict is SUSPECTED
    # Not where the contrast was measured, on too few images or not.
    assert found((*base, *REMOVALS["no"], *CONTRASTS["yes"]))["hair"].verdict is RELIANCE
    assert found((*base, *REMOVALS["yes"], *CONTRASTS["no"]))["hair"].verdict is SUSPECTED
    assert found((*base, *REMOVALS["yes"], *CONTRASTS["thin"]))["hair"].verdict is INCONCLUSIVE
    assert found((*base, *REMOVALS["yes"], contrast(0, 0, 0, group="light")))["hair"].verdict is RELIANCE


def test_decisions_that_change_stand_in_where_no_value_goes_with_a_class() -> None:
    base = (*LOOKS["no"], *GAPS["no"], *TIES["yes"])
    flips = {state: swap(*numbers, metric="swap_flips") for state, numbers in TRIPLES.items()}
    assert found((*base, flips["yes"]))["gender"].verdict is RELIANCE
    assert (
        "swapping gender changes 30 % [20, 40] of the decisions"
        in found((*base, flips["yes"]))["gender"].sentence.lower()
    )
    assert found((*base, flips["no"]))["gender"].verdict is CLEARED
    assert found((*base, flips["unknown"]))["gender"].verdict is INCONCLUSIVE
    # Decisions that change are not asked where it is known whether they change for the worse.
    assert found((*base, flips["yes"], *SWAPS["no"]))["gender"].verdict is CLEARED
    assert found((*base, flips["no"], *SWAPS["yes"]))["gender"].verdict is RELIANCE
    assert found((*base, flips["yes"], swap(*UNMEASURED, n=0)))["gender"].verdict is RELIANCE


TRIPLES = {"yes": (0.3, 0.2, 0.4), "no": (0.02, -0.01, 0.05), "unknown": (0.1, 0.0, 0.2)}


# Explanation methods that may not be fit


def test_a_method_is_fit_if_the_whole_interval_lies_within_the_tolerance() -> None:
    expected = {"fit": True, "just fit": True, "open": None, "unfit": False, "unmeasured": None}
    for state, fit in expected.items():
        (known,) = explainers([fitness("gradcam", state), *LOOKS["yes"]], Policy())
        assert (known.method, known.fit) == ("gradcam", fit)
    stricter = Policy.model_validate({"tolerance": {"randomisation_similarity": 0.65}})
    assert [x.fit for x in explainers([fitness("gradcam", "just fit")], stricter)] == [None]
    assert explainers([*LOOKS["yes"], *GAPS["yes"]], Policy()) == ()
    for bad in (math.nan, math.inf):
        (known,) = explainers([Estimate("randomisation_similarity", 0.1, 0.0, bad, 16, method="gradcam")], Policy())
        assert known.fit is None and "unknown" in known.doubt


@pytest.mark.parametrize("state", SIMILARITIES)
def test_what_rests_on_maps_that_are_not_shown_to_be_fit_is_open(state: str) -> None:
    for look, g, hangs in itertools.product(LOOKS, GAPS, STATES):
        subjects = NOT_ANNOTATED if g == "not annotated" else SUBJECTS
        estimates = (*LOOKS[look], *GAPS[g], *REMOVALS[hangs])
        plain, tested = (found(more, subjects) for more in (estimates, (*estimates, fitness("gradcam", state))))
        if "fit" in state.split() or look == "missing" or LOOKS[look][0].method is None:
            assert tested == plain
            continue
        # As if nobody knew whether it is looked at.
        unseen = found((*LOOKS["unknown"], *GAPS[g], *REMOVALS[hangs]), subjects)
        assert {n: (f.verdict, f.possible) for n, f in tested.items()} == {
            n: (f.verdict, f.possible) for n, f in unseen.items()
        }
        hair = tested["hair"]
        assert set(plain["hair"].possible) <= set(hair.possible)
        assert "randomisation_similarity" in {e.metric for e in hair.evidence}
        assert "enrichment" not in {e.metric for e in hair.evidence}
        seen = {w: found((*LOOKS[w], *GAPS[g], *REMOVALS[hangs]), subjects)["hair"].possible for w in ("yes", "no")}
        if hair.verdict is INCONCLUSIVE and seen != dict.fromkeys(seen, hair.possible):
            assert "gradcam maps" in hair.sentence.lower()


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        # The fit method speaks alone beside an unfit one.
        ("yes", "unfit", RELIANCE),
        ("no", "unfit", CLEARED),
        ("unknown", "unfit", INCONCLUSIVE),
        # Beside one that may be fit, what it sees counts, and what it does not see may be there.
        ("yes", "open", RELIANCE),
        ("no", "open", INCONCLUSIVE),
        ("no", "unmeasured", INCONCLUSIVE),
        ("no", "just fit", RELIANCE),
    ],
)
def test_of_two_methods_one_that_is_not_shown_to_be_fit(one: str, other: str, expected: Verdict) -> None:
    gaps = GAPS["no"] if expected is CLEARED else GAPS["yes"]
    estimates = (*LOOKS[one], hirescam(3.0, 2.8, 3.2), *gaps, fitness("gradcam", "fit"), fitness("hirescam", other))
    finding = found(estimates)["hair"]
    assert finding.verdict is expected
    doubted = expected is INCONCLUSIVE and one == "no"
    assert ("whether the hirescam maps" in finding.sentence.lower()) == doubted
    assert ("3.00" in finding.sentence) == (other == "just fit")
    # With both unfit each is named, in an order of its own.
    for first, second in itertools.permutations(("gradcam", "hirescam")):
        unfit = (fitness(first, "unfit"), fitness(second, "unfit"))
        both = found((*LOOKS[one], hirescam(3, 2.8, 3.2), *gaps, *unfit))["hair"]
        assert both.verdict is INCONCLUSIVE
        assert re.search("the gradcam maps are unfit.*the hirescam maps are unfit", both.sentence, re.IGNORECASE)


# What it would take


@pytest.mark.parametrize(("n", "expected"), [(19, INCONCLUSIVE), (20, RELIANCE)])
def test_too_few_images(n: int, expected: Verdict) -> None:
    finding = found((enrichment(2.0, 1.8, 2.2, n=n), gap(0.3, 0.2, 0.4, n=20)))["hair"]
    assert finding.verdict is expected
    assert finding.samples_to_settle == (20 if n < 20 else None)
    assert ("19 valid images, 20 needed" in finding.sentence) == (n < 20)
    assert found((enrichment(2.0, 1.8, 2.2, n=n), *GAPS["yes"]), min_samples=n)["hair"].verdict is RELIANCE
    # Of two that are thin the thinner is said.
    two = (enrichment(2.0, 1.8, 2.2, n=7, class_name="nurse"), enrichment(0.5, 0.4, 0.6, n=9, class_name="doctor"))
    assert "class nurse (gradcam): 7 valid images, 20 needed" in found((*two, *GAPS["yes"]))["hair"].sentence
    # Where images are many and nothing can be measured, more of them are not promised to help.
    silent = replace(enrichment(*UNMEASURED, n=n), reason="every heatmap is silent")
    assert found((silent, *GAPS["yes"]))["hair"].samples_to_settle == (20 if n < 20 else None)


@pytest.mark.parametrize(
    ("estimate", "settle"),
    [
        # Above the limit: side 0.4, distance 0.2: half the width needs four times the images.
        (enrichment(1.2, 0.8, 1.6), 200),
        # The other side counts below the limit: side 0.9, distance 0.3.
        (enrichment(0.7, 0.6, 1.6), 450),
        (enrichment(1.0, 0.8, 1.6), None),
        # Where the value all but touches the limit, no number of images helps.
        (enrichment(1.0000000000000002, 0.8, 1.6), None),
        (enrichment(0.9999, 0.8, 1.6), None),
    ],
)
def test_samples_to_settle(estimate: Estimate, settle: int | None) -> None:
    finding = found((estimate, *GAPS["yes"]))["hair"]
    assert finding.verdict is INCONCLUSIVE and finding.samples_to_settle == settle
    assert "leaves open whether it exceeds 1" in finding.sentence
    # Beside another open question it must stand up to two: 2.241 instead of 1.960 standard errors. The one that is
    # shown already, and to lie within, take no more.
    beside = found((estimate, *GAPS["yes"], *TIES["unknown"]))["hair"].samples_to_settle
    if estimate.value == 1.2:
        assert beside == 262
    else:
        assert beside == settle


def test_an_interval_that_ends_on_the_limit_is_open_whatever_the_rounding() -> None:
    for k in range(1, 200):
        value = 1 + k * 0.0137
        finding = found((enrichment(value, 1.0, value + k * 0.0137), *REMOVALS["yes"]), NOT_ANNOTATED)["hair"]
        assert finding.possible == (RELIANCE, SUSPECTED) and finding.samples_to_settle in (50, 51)


@settings(max_examples=80, deadline=None)
@given(st.floats(0.05, 2.5), st.floats(0.01, 2), st.floats(0.01, 2), st.integers(20, 400), st.integers(0, 30))
def test_that_many_images_settle_it_and_a_tenth_fewer_do_not(
    value: float, below: float, above: float, n: int, others: int
) -> None:
    """Redone with intervals as narrow as that many images make them."""
    rest = (*GAPS["yes"], *(enrichment(0.5, 0.4, 0.6, region="face", class_name=f"c{i}") for i in range(others)))

    def with_images(count: int) -> Finding:
        shrunk = math.sqrt(n / count)
        return found((enrichment(value, value - below * shrunk, value + above * shrunk, count), *rest), TWO_CUES)[
            "hair"
        ]

    settle = with_images(n).samples_to_settle
    if settle is None:
        assert with_images(n).verdict is not INCONCLUSIVE or value <= 1 or value - 1 <= below / 500
        return
    # As many as there are, where the interval ends on the limit.
    assert settle >= n
    settled = with_images(settle + 1)
    # What does not draw the heatmaps while accuracy differs leaves the finding inconclusive for that reason alone.
    assert settled.samples_to_settle is None and settled.possible in ((RELIANCE,), (INCONCLUSIVE,))
    if settle * 0.9 > n and others == 0:
        assert with_images(int(settle * 0.9)).samples_to_settle is not None


def test_samples_to_settle_is_for_the_question_that_takes_most_of_those_that_matter() -> None:
    finding = found((*LOOKS["unknown"], *GAPS["thin"]))["hair"]
    # The thin one is no hypothesis.
    assert finding.samples_to_settle == 200
    assert "leaves open" in finding.sentence and "5 valid images, 20 needed" in finding.sentence
    assert found((*LOOKS["yes"], *GAPS["yes"]))["hair"].samples_to_settle is None
    # An open gap on the limit has no such number.
    assert found((*LOOKS["yes"], *GAPS["unknown"]))["gender"].samples_to_settle is None
    # Whether the training data go with it is open too, but no image of the audit set will tell.
    open_tie = association(0.2, 0.05, 0.35, n=10_000)
    finding = found((*SWAPS["yes"], *LOOKS["no"], *GAPS["no"], open_tie))["gender"]
    assert finding.possible == (RELIANCE, SUSPECTED) and finding.samples_to_settle is None
    assert "Cramér's V by gender is 0.20" in finding.sentence
    # Attention matters only as long as the removal may move something.
    finding = found((*LOOKS["unknown"], *GAPS["no"], *REMOVALS["unknown"]))["hair"]
    assert "removal flips" in finding.sentence.lower() and "enrichment" in finding.sentence
    idle = found((*LOOKS["unknown"], *GAPS["unknown"], *REMOVALS["no"]))["hair"]
    assert idle.verdict is CLEARED and "leaves open" not in idle.sentence and idle.samples_to_settle is None
    # What the training data say of a region's attribute is said, and decides nothing of the region.
    idle = found((*SHOWN, *LOOKS["unknown"], *GAPS["yes"], *CONTRASTS["no"], *TIES["unknown"]))["hair"]
    assert idle.possible == (SUSPECTED, CLEARED) and "Cramér" not in idle.sentence


def test_tolerance_moves_the_findings() -> None:
    estimates = (*LOOKS["yes"], *GAPS["yes"])
    assert found(estimates, tolerance={"enrichment": 2.5})["hair"].verdict is INCONCLUSIVE
    assert found(estimates, tolerance={"enrichment": 2.5, "accuracy_gap": 0.5})["hair"].verdict is CLEARED
    assert found(estimates, tolerance={"accuracy_gap": 0.5})["hair"].verdict is SUSPECTED
    # An interval that ends on the limit is within it.
    assert found(estimates, tolerance={"enrichment": 2.2, "accuracy_gap": 0.4})["hair"].verdict is CLEARED
    assert found(estimates, tolerance={"enrichment": 1.8, "accuracy_gap": 0.2})["hair"].verdict is INCONCLUSIVE
    every = (*SHOWN, *LOOKS["no"], *GAPS["no"], *REMOVALS["yes"], *CONTRASTS["yes"], *TIES["yes"], *SWAPS["yes"])
    verdicts = {
        (): (RELIANCE, RELIANCE),
        ("removal_contrast",): (CLEARED, RELIANCE),
        ("association",): (RELIANCE, SUSPECTED),
        ("swap_gap",): (CLEARED, CLEARED),
        ("removal_flips",): (RELIANCE, RELIANCE),
        # Then it shows nothing, and what is left is that its removal changes decisions.
        ("region_probe_gain",): (SUSPECTED, RELIANCE),
        ("region_probe_gain", "removal_flips"): (CLEARED, RELIANCE),
    }
    for lifted, expected in verdicts.items():
        findings = found(every, tolerance=dict.fromkeys(lifted, 0.5))
        assert (findings["hair"].verdict, findings["gender"].verdict) == expected, lifted


# Many hypotheses


def test_of_many_classes_one_beyond_its_limit_by_chance_is_no_reliance() -> None:
    """Each class on the limit: uncorrected, 100 classes would nearly always accuse the model."""
    classes = tuple(f"class {i}" for i in range(100))
    subjects = replace(SUBJECTS, classes=classes)
    z = norm.ppf(0.975)
    accused = uncorrected = seen = 0
    for seed in range(120):
        rng = np.random.default_rng(seed)
        values = 0.05 + 0.02 * rng.standard_normal(100)
        nulls = [
            removal(v, v - 0.02 * z, v + 0.02 * z, class_name=c) for v, c in zip(values.tolist(), classes, strict=True)
        ]
        rest = (removal(0.05, 0.04, 0.06), *LOOKS["yes"])
        verdict = found((*nulls, *rest), subjects)["hair"].verdict
        assert verdict in (RELIANCE, INCONCLUSIVE)
        accused += verdict is RELIANCE
        uncorrected += any(e.low is not None and e.low > 0.05 for e in nulls)
        # A true one among them is still found: six standard errors.
        true = removal(0.17, 0.17 - 0.02 * z, 0.17 + 0.02 * z, class_name=classes[0])
        finding = found((true, *nulls[1:], *rest), subjects)["hair"]
        seen += finding.verdict is RELIANCE and finding.evidence[0] is true
    # Of 120 at 0.025 at most: 9 or more would come in one of 400.
    assert accused <= 8 and uncorrected > 100 and seen == 120


def test_the_correction_is_holms_over_all_hypotheses_of_the_audit() -> None:
    rng = np.random.default_rng(0)
    classes = tuple(f"class {i}" for i in range(12))
    subjects = replace(TWO_CUES, classes=classes)
    limits = {"enrichment": 1.0, "removal_flips": 0.05, "removal_contrast": 0.1}
    limits |= {"accuracy_gap": 0.1, "cramers_v": 0.1, "swap_gap": 0.1}
    for _ in range(60):
        estimates, ps = [], []
        for metric, limit in limits.items():
            for class_name in classes if metric != "cramers_v" else (None,):
                z, error = rng.normal(1.5, 1.5), rng.uniform(0.01, 0.1)
                value, n = limit + z * error, int(rng.integers(15, 40))
                half = error * norm.ppf(0.975)
                region = "hair" if metric in OF_REGIONS else None
                group = None if metric in ("enrichment", "removal_flips") else "gender"
                names = {"region": region, "class_name": class_name, "group": group}
                estimates.append(Estimate(metric, value, value - half, value + half, n, **names))
                ps.append(norm.sf(z) if n >= 20 else None)
        tested = sorted(p for p in ps if p is not None)
        stricter = [p * (len(tested) - k) for k, p in enumerate(tested)]
        # Step down: the k-th smallest is shown if it and all smaller ones lie below 0.025 over what is left.
        shown = tested[: next((k for k, p in enumerate(stricter) if p > 0.025), len(tested))]
        rejected = {e.metric for e, p in zip(estimates, ps, strict=True) if p in shown}
        findings = {f.name: f for f in find(estimates, subjects, Policy())}
        said = {e.metric for f in (findings["hair"], findings["gender"]) for e in f.evidence if _is_shown(f, e)}
        assert said == rejected


def _is_shown(finding: Finding, e: Estimate) -> bool:
    """Whether a finding says so without `at most`, `hardly` or `leaves open`."""
    numbers = f"{e.value:.2f} [{e.low:.2f}, {e.high:.2f}]"
    assert e.value is not None and e.low is not None and e.high is not None
    percent = f"{100 * e.value:.0f} {{}} [{100 * e.low:.0f}, {100 * e.high:.0f}]"
    for text in (numbers, percent.format("%"), percent.format("points")):
        for part in re.split(r"[;.] |, but ", finding.sentence):
            if text in part and not re.search("at most|hardly|leaves open|valid images", part):
                return True
    return False


def test_what_fails_the_correction_only_is_open_and_says_so() -> None:
    marginal = removal(0.15, 0.055, 0.245)
    alone = found((marginal, *LOOKS["yes"]), NOT_ANNOTATED)["hair"]
    assert alone.verdict is RELIANCE
    classes = tuple(f"class {i}" for i in range(30))
    many = tuple(removal(0.0, -0.05, 0.05, class_name=c) for c in classes)
    finding = found((marginal, *many, *LOOKS["yes"]), replace(NOT_ANNOTATED, classes=classes))["hair"]
    assert finding.verdict is INCONCLUSIVE and finding.possible == (RELIANCE, CLEARED)
    assert "more than the chance of so many questions would" in finding.sentence.lower()
    # That it takes more images than there are is the correction's doing.
    assert finding.samples_to_settle is not None and finding.samples_to_settle > 50
    # What no finding rests on is no hypothesis: unfit maps, groups, regions that are no cue, gaps over all classes.
    idle = [hirescam(0.5, 0.4, 0.6), *LOOKS["no"], gap(0.0, -0.1, 0.1, class_name=None)]
    idle = [replace(e, value=e.value + i / 1000) for e in idle for i in range(30) if e.value is not None]
    idle = [replace(e, group="gender=male") if e.metric == "enrichment" and e.method != "hirescam" else e for e in idle]
    idle += [replace(e, region="coat", group=None) for e in idle if e.metric == "enrichment"]
    unfit = fitness("hirescam", "unfit")
    assert found((marginal, *idle, *LOOKS["yes"], unfit), NOT_ANNOTATED)["hair"].verdict is RELIANCE


def test_what_a_better_measurement_stands_for_is_no_hypothesis() -> None:
    """Beside the gap of aligned and conflicting images the groups' is not asked, nor flips beside a swap's gap."""
    clear = alignment(0.25, 0.13, 0.37)
    assert found((clear, *SWAPS["yes"], *TIES["yes"]))["gender"].verdict is RELIANCE
    alone = found((clear, *TIES["yes"]))["gender"]
    assert alone.verdict is RELIANCE and clear in alone.evidence
    beside = [gap(0.0, -0.05, 0.05, class_name=name) for name in SUBJECTS.classes for _ in range(20)]
    beside = [replace(e, value=i / 1000) for i, e in enumerate(beside)]
    swapped = swap(0.4, 0.3, 0.5)
    flips = [replace(swapped, metric="swap_flips", value=i / 1000, low=-0.05, high=0.05) for i in range(20)]
    with_all = found((clear, *TIES["yes"], *beside, swapped, *flips))["gender"]
    assert with_all.verdict is RELIANCE and {clear, swapped} <= set(with_all.evidence)
    # Where there is nothing better they are asked, and each makes the others harder to show.
    marginal = gap(0.25, 0.105, 0.395, class_name=SUBJECTS.classes[0])
    assert marginal in found((marginal, gap(0.0, -0.05, 0.05, class_name=SUBJECTS.classes[1])))["gender"].evidence
    assert "so many questions" in found((marginal, *beside, *flips))["gender"].sentence


def test_a_damaged_interval_is_no_measurement() -> None:
    """The value is not within it: nothing follows."""
    for e in (association(0.1, 1.0, 1.0), removal(0.1, 0.2, 0.3), enrichment(1.0, 1.1, 1.1), alignment(0.1, 0.3, 0.2)):
        assert not e.measured
        for finding in found((e,)).values():
            assert finding.samples_to_settle is None and finding.verdict is INCONCLUSIVE
            assert_readable(finding)
    # A rounding error is no damage, and no width to reckon with.
    rounded = enrichment(1.2, 0.8, 1.2 - 5e-7)
    assert rounded.measured and not enrichment(1.2, 0.8, 1.2 - 2e-6).measured
    assert found((rounded, *GAPS["yes"]))["hair"].samples_to_settle is None


# The words


def test_sentences_carry_the_numbers() -> None:
    findings = found((*LOOKS["yes"], *GAPS["yes"]))
    for finding in findings.values():
        assert "eatmaps give hair 2.00 [1.80, 2.20] times the share its area would (gradcam)" in finding.sentence
        assert "class nurse accuracy differs by gender by 0.30 [0.20, 0.40]" in finding.sentence
    # "at most" belongs to what is not there, and to nothing else.
    assert "at most" not in findings["hair"].sentence
    cleared = found((*LOOKS["no"], *GAPS["no"]))["hair"].sentence
    assert "at most 0.70 [0.60, 0.80]" in cleared and "at most 0.02 [-0.01, 0.05]" in cleared


def of(e: Estimate, metric: str, value: float | None) -> Estimate:
    """Another metric of the same."""
    numbers = UNMEASURED if value is None else (value, value - 0.01, value + 0.01)
    return replace(e, metric=metric, value=numbers[0], low=numbers[1], high=numbers[2])


def test_the_sentence_a_person_needs() -> None:
    """Issue 4's example, in full: what the removal does, beside a control, and where accuracy is lost."""
    read = contrast(0.38, 0.3, 0.46, class_name="nurse")
    moved = replace(read, metric="removal_effect", value=0.62, low=0.5, high=0.74, group=None)
    companions = (
        moved,
        of(moved, "control_effect", 0.04),
        replace(moved, metric="removal_score", value=2.1, low=1.7, high=2.6),
        of(moved, "control_score", 0.2),
    )
    # Another class's and another region's are not taken for them.
    others = (of(removal(0, 0, 0), "control_score", 9.0), of(replace(moved, region="wall"), "control_effect", 9.0))
    aligned = alignment(0.42, 0.3, 0.5)
    both = (of(aligned, "aligned_accuracy", 0.96), of(aligned, "conflicting_accuracy", 0.54))
    estimates = (*others, *both, *companions[::-1], read, aligned, *others, *SHOWN)
    finding = found((*estimates, *LOOKS["no"], *TIES["no"]))["hair"]
    assert finding.verdict is RELIANCE
    assert finding.sentence == (
        "For class nurse removing hair moves the decision by 62 % [50, 74] of its margin beyond the 4 % that a control "
        "region does, and lowers the score by 2.10 [1.70, 2.60] beyond the 0.20 that a control region does; what hair "
        "says of gender carries 38 % [30, 46] of the margin; accuracy is 54 % where gender and class disagree, 96 % "
        "where they agree (difference 0.42 [0.30, 0.50])."
    )
    # Each estimate is followed by what is said along with it.
    assert finding.evidence == (read, *companions, aligned, both[1], both[0], *LOOKS["no"], *TIES["no"])
    # A score that does not fall is not said to; an unmeasured companion is not said at all.
    risen = replace(companions[2], value=-1.0, low=-1.5, high=-0.5)
    assert "score" not in found((*SHOWN, read, moved, risen, aligned, *LOOKS["yes"]))["hair"].sentence
    unknown = tuple(of(e, e.metric, None) for e in (*companions, *both))
    bare = found((*SHOWN, read, aligned, *unknown, *LOOKS["yes"]))["hair"].sentence
    assert "control" not in bare and "score" not in bare and "moves" not in bare
    assert "For class nurse what hair says of gender carries 38 % [30, 46] of the margin; accuracy is" in bare
    assert "accuracy is 0.42 [0.30, 0.50] higher where gender and class agree" in bare


def test_the_sentence_of_a_hole_that_moves_the_decision() -> None:
    """The effect is said, and what it hangs on; it is not judged."""
    read = contrast(0.02, -0.01, 0.05)
    moved = replace(read, metric="removal_effect", value=0.62, low=0.5, high=0.74, group=None)
    base = (*SHOWN, *LOOKS["yes"], *GAPS["yes"], read, of(moved, "control_effect", 0.04))
    finding = found((*base, moved))["hair"]
    assert finding.verdict is SUSPECTED
    assert finding.sentence == (
        "Within class nurse accuracy differs by gender by 0.30 [0.20, 0.40]; the heatmaps give hair 2.00 [1.80, 2.20] "
        "times the share its area would (gradcam), but what hair says of gender carries at most 2 % [-1, 5] of the "
        "margin, though removing hair moves the decision by 62 % [50, 74] of its margin beyond the 4 % that a control "
        "region does."
    )
    # Where it moves nothing, there is nothing to say.
    still = replace(moved, value=0.01, low=-0.05, high=0.07)
    assert found((*base, still))["hair"].sentence.endswith("at most 2 % [-1, 5] of the margin.")


def test_the_sentence_of_a_removal() -> None:
    removed = removal(0.3, 0.2, 0.4)
    companions = (of(removed, "control_flips", 0.01), of(removed, "removal_effect", 0.5))
    finding = found((removed, *companions, *LOOKS["yes"]), NOT_ANNOTATED)["hair"]
    assert finding.sentence == (
        "Removing hair changes 30 % [20, 40] of the decisions beyond the 1 % that a control region changes; the "
        "heatmaps give hair 2.00 [1.80, 2.20] times the share its area would (gradcam)."
    )
    assert finding.evidence == (removed, *companions, *LOOKS["yes"])
    cleared = found((*REMOVALS["no"], companions[0], *LOOKS["yes"]), NOT_ANNOTATED)["hair"]
    assert cleared.sentence == (
        "The heatmaps give hair 2.00 [1.80, 2.20] times the share its area would (gradcam), but removing hair changes "
        "at most 2 % [-1, 5] of the decisions beyond the 1 % that a control region changes."
    )
    # One class may show it.
    nurse = replace(removed, class_name="nurse")
    sentence = found((nurse, *companions, *LOOKS["yes"]), NOT_ANNOTATED)["hair"].sentence
    assert sentence.startswith("For class nurse removing hair changes 30 % [20, 40] of the decisions; the heatmaps")


def test_the_sentence_of_a_swap() -> None:
    swapped = swap(0.3, 0.2, 0.4, region="hair")
    both = (of(swapped, "swap_aligned_accuracy", 0.9), of(swapped, "swap_conflicting_accuracy", 0.6))
    base = (*SHOWN, *CONTRASTS["yes"], *LOOKS["no"], *GAPS["no"], *TIES["yes"])
    assert found((*base, swapped, *both))["hair"].sentence == (
        "What hair says of gender carries 30 % [20, 40] of the margin; swapping gender in hair against the class costs "
        "30 points [20, 40] of accuracy, from 90 % to 60 %; in the training data gender and label go together "
        "(Cramér's V 0.30 [0.20, 0.40])."
    )
    assert "from" not in found((*base, swapped, both[0]))["hair"].sentence
    assert "from" not in found((*base, swapped, both[0], of(both[1], both[1].metric, None)))["hair"].sentence


def test_nothing_is_minus_zero() -> None:
    tiny = (-0.001, -0.004, 0.004)
    estimates = (removal(*tiny), contrast(*tiny), alignment(*tiny), association(*tiny), swap(*tiny), *LOOKS["no"])
    for shown in (*PROBES["no"], *SHOWN):
        for finding in found((*estimates, shown)).values():
            assert_readable(finding)
            assert finding.verdict is CLEARED


# Properties

METRICS = (
    "enrichment",
    "region_probe_gain",
    "region_probe_gain",
    "removal_flips",
    "control_flips",
    "removal_contrast",
    "removal_effect",
    "control_effect",
    "removal_score",
    "control_score",
    "swap_gap",
    "swap_flips",
    "swap_conflicting_accuracy",
    "swap_aligned_accuracy",
    "alignment_gap",
    "conflicting_accuracy",
    "aligned_accuracy",
    "accuracy_gap",
    "accuracy",
    "cramers_v",
    "randomisation_similarity",
)
GALLERY = Subjects(
    (("hair", "spurious"), ("face", "spurious"), ("coat", "object")),
    (("gender", ("female", "male")), ("light", ("dim", "bright"))),
    ("doctor", "nurse", "cook"),
)
WITHOUT_GROUP = (
    "enrichment",
    "removal_flips",
    "control_flips",
    "removal_effect",
    "control_effect",
    "removal_score",
    "control_score",
)
OF_REGIONS = (*WITHOUT_GROUP, "removal_contrast", "region_probe_gain")
numbers = st.one_of(
    st.floats(-2, 3), st.sampled_from([0.0, 0.1, 1.0]), st.sampled_from([None, math.nan, math.inf, -math.inf, 1e300])
)


@st.composite
def anything(draw: st.DrawFn, values: st.SearchStrategy[tuple[Any, Any, Any]]) -> Estimate:
    """An estimate that could be recorded, whatever its numbers."""
    metric = draw(st.sampled_from(METRICS))
    value, low, high = draw(values)
    n = draw(st.integers(0, 60))
    method = draw(st.sampled_from(["gradcam", "hirescam"]))
    if metric == "randomisation_similarity":
        return Estimate(metric, value, low, high, n, method=method)
    region = draw(st.sampled_from(["hair", "face", "coat" if metric in OF_REGIONS else None]))
    group = draw(st.sampled_from([None, "gender=male"] if metric in WITHOUT_GROUP else ["gender", "light"]))
    if metric not in OF_REGIONS and not metric.startswith("swap"):
        region = None
    class_name = (
        None if metric in ("cramers_v", "region_probe_gain") else draw(st.sampled_from([None, *GALLERY.classes]))
    )
    if metric == "accuracy":
        group = None
    return Estimate(metric, value, low, high, n, region, class_name, group, method if metric == "enrichment" else None)


wild = st.lists(
    st.one_of(
        anything(st.tuples(numbers, numbers, numbers)),
        anything(numbers.map(lambda x: (x, x, x))),
    ),
    max_size=25,
)
# As measured: the value within its interval.
proper_numbers = st.builds(
    lambda v, below, above: (v, v - below, v + above), st.floats(-1, 2), st.floats(0, 0.5), st.floats(0, 0.5)
)
proper = st.lists(st.one_of(anything(proper_numbers), anything(st.just(UNMEASURED))), max_size=25)


@settings(max_examples=120, deadline=None)
@given(wild)
def test_whatever_is_recorded_is_judged(estimates: list[Estimate]) -> None:
    policy = Policy()
    findings = judge(estimates, GALLERY, policy).findings
    assert [(f.kind, f.name) for f in findings] == [
        ("region", "hair"),
        ("region", "face"),
        ("attribute", "gender"),
        ("attribute", "light"),
    ]
    for finding in findings:
        assert_readable(finding)
        assert finding.verdict in (*finding.possible, INCONCLUSIVE)
        assert not (finding.verdict is INCONCLUSIVE and len(finding.possible) == 1) or finding.kind == "region"
        # A verdict other than inconclusive rests on something measured on enough images.
        if finding.verdict is not INCONCLUSIVE:
            assert any(e.measured and e.n >= policy.min_samples for e in finding.evidence)


@settings(max_examples=120, deadline=None)
@given(st.one_of(wild, proper))
def test_cleared_needs_a_whole_interval_within(estimates: list[Estimate]) -> None:
    """From the numbers alone, as the definitions have it."""
    finding = {f.name: f for f in find(estimates, GALLERY, Policy())}

    def usable(e: Estimate) -> bool:
        return e.measured and e.n >= 20

    def within(chosen: list[Estimate], limit: float) -> bool:
        return bool(chosen) and all(usable(e) and e.high is not None and e.high <= limit for e in chosen)

    def denied(chosen: list[Estimate], limit: float) -> bool:
        """By the estimate over all classes, and by no class."""
        close = [e for e in chosen if usable(e) and e.low is not None and e.low > limit]
        return not close and within([e for e in chosen if e.class_name is None], limit)

    def of(metric: str, region: str | None = None, group: str | None = None) -> list[Estimate]:
        return [e for e in estimates if (e.metric, e.region, e.group) == (metric, region, group)]

    def not_right_less_often(attribute: str) -> bool:
        aligned = [e for e in of("alignment_gap", group=attribute) if e.n > 0 or e.class_name is None]
        by_class = [e for e in of("accuracy_gap", group=attribute) if e.class_name]
        return denied(aligned, 0.1) if aligned else within(by_class, 0.1)

    def not_swayed(attribute: str) -> bool:
        changes = [[e for e in of(m, group=attribute) if e.n > 0] for m in ("swap_gap", "swap_flips")]
        return denied(changes[0] or changes[1], 0.1)

    unfit = {x.method for x in explainers(estimates, Policy()) if x.fit is False}
    for region in ("hair", "face"):
        if finding[region].verdict is not CLEARED:
            continue
        unseen = within([e for e in of("enrichment", region) if e.method not in unfit], 1.0)
        # The first that was measured on enough images says what the region shows.
        gains = {a: [e for e in of("region_probe_gain", region, a) if usable(e)][:1] for a in ("gender", "light")}
        shown = [a for a, gain in gains.items() for e in gain if e.low is not None and e.low > 0.1]
        removed = of("removal_flips", region)
        if not shown:
            # Cleared by its removal, or, where nothing was removed, by what draws the maps.
            assert denied(removed, 0.05) if removed else unseen
        for attribute in shown:
            read = [e for e in of("removal_contrast", region, attribute) if e.n > 0]
            not_read = denied(read, 0.1) if read else denied(removed, 0.05)
            assert not_swayed(attribute) or not_right_less_often(attribute) or (not_read and unseen)
    for attribute in ("gender", "light"):
        if finding[attribute].verdict is CLEARED:
            assert not_right_less_often(attribute)


@settings(max_examples=80, deadline=None)
@given(proper, st.integers(0, 24), st.sampled_from([UNMEASURED, (math.nan, 0.0, 0.05), (0.0, -math.inf, math.inf)]))
def test_what_is_not_measured_clears_nothing(
    estimates: list[Estimate], place: int, nothing: tuple[float | None, float | None, float | None]
) -> None:
    """Take the numbers of one estimate over all classes away: nothing is cleared that was not."""
    # A region's swap that changes nothing is not asked; and what a region shows decides how it is judged.
    over_all = [
        e
        for e in estimates
        if e.class_name is None and not (e.metric.startswith("swap") and e.region) and e.metric != "region_probe_gain"
    ]
    if not over_all:
        return
    lost = over_all[place % len(over_all)]
    without = [replace(e, value=nothing[0], low=nothing[1], high=nothing[2]) if e is lost else e for e in estimates]
    before, after = (find(some, GALLERY, Policy()) for some in (estimates, without))
    for one, other in zip(before, after, strict=True):
        assert other.verdict is not CLEARED or one.verdict is CLEARED


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(proper, st.randoms(use_true_random=False))
def test_names_and_order_decide_nothing(estimates: list[Estimate], rng: random.Random) -> None:
    """Relabelling regions, attributes and classes, and permuting estimates, permutes the findings and nothing else."""
    # Numbers of their own, or which of two equal ones is said would hang on their names. Thinness is a tie as well.
    apart = [
        replace(e, value=e.value + 1e-6 * i, high=e.high + 1e-6 * i, n=e.n + 100 * i)
        if e.value is not None and e.high is not None
        else replace(e, n=i)
        for i, e in enumerate(estimates)
    ]
    unique = list({(e.metric, e.region, e.class_name, e.group, e.method): e for e in apart}.values())
    names: dict[str, str] = {}
    for pool in (["hair", "face"], ["gender", "light"], list(GALLERY.classes)):
        names |= dict(zip(pool, rng.sample(pool, len(pool)), strict=True))

    def renamed(text: str | None) -> str | None:
        return text and re.sub("|".join(names), lambda m: names[m[0]], text, flags=re.NOFLAG)

    def relabelled(e: Estimate) -> Estimate:
        return replace(e, region=renamed(e.region), class_name=renamed(e.class_name), group=renamed(e.group))

    subjects = Subjects(
        tuple(rng.sample(GALLERY.regions, 3)),
        tuple(rng.sample(GALLERY.attributes, 2)),
        tuple(names[c] for c in GALLERY.classes),
    )
    shuffled = [relabelled(e) for e in rng.sample(unique, len(unique))]
    before = {f.name: f for f in find(unique, GALLERY, Policy())}
    after = {f.name: f for f in find(shuffled, subjects, Policy())}
    assert len(after) == len(before) == 4
    for name, finding in before.items():
        other = after[names[name]]
        assert (other.kind, other.verdict, other.possible) == (finding.kind, finding.verdict, finding.possible)
        assert other.samples_to_settle == finding.samples_to_settle
        assert other.evidence == tuple(relabelled(e) for e in finding.evidence)
        # Of several things that were not measured one is named, and nothing but its name tells them apart.
        if "was not measured" not in finding.sentence:
            assert other.sentence.lower() == renamed(finding.sentence.lower())


@settings(max_examples=80, deadline=None)
@given(st.lists(anything(proper_numbers), max_size=12), st.lists(anything(proper_numbers), max_size=4))
def test_reliance_rests_on_two_kinds_one_of_which_is_causal_or_of_performance(
    estimates: list[Estimate], more: Sequence[Estimate]
) -> None:
    kinds = {
        "enrichment": "look",
        "removal_flips": "removal",
        "removal_contrast": "removal",
        "swap_gap": "swap",
        "swap_flips": "swap",
        "alignment_gap": "performance",
        "accuracy_gap": "performance",
        "cramers_v": "association",
    }
    limits = {**dict.fromkeys(kinds, 0.1), "enrichment": 1.0, "removal_flips": 0.05}
    for finding in find([*estimates, *more], GALLERY, Policy()):
        beyond = {
            kinds[e.metric]
            for e in finding.evidence
            if e.metric in kinds and e.low is not None and e.low > limits[e.metric] and e.n >= 20
        }
        if finding.kind == "region":
            # In the training data, not in the region.
            beyond -= {"association"}
        if finding.verdict is RELIANCE:
            assert len(beyond) >= 2 and beyond & {"removal", "swap", "performance"}
            # Of an attribute, a removal alone convicts nobody.
            assert finding.kind == "region" or beyond & {"swap", "performance"}
        if finding.verdict is SUSPECTED:
            assert beyond

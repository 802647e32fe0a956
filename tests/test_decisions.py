"""The tables by which evidence makes a verdict: as the rules in words say, however the evidence turns out."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from estimates import (
    CONTRASTS,
    GAPS,
    LOOKS,
    NO_CUE,
    NOT_ANNOTATED,
    PROBES,
    REMOVALS,
    SHOWN,
    STATES,
    SUBJECTS,
    SWAPS,
    TIES,
    TWO_CUES,
    assert_readable,
    contrast,
    enrichment,
    found,
    probe,
    removal,
)

from bias_audit.policies.policy import Policy
from bias_audit.terms import Estimate, Outcome, Verdict
from bias_audit.verdicts.decisions import attribute_verdict, verdict_by_removal, verdict_by_value
from bias_audit.verdicts.findings import Finding
from bias_audit.verdicts.judgement import judge

RELIANCE, SUSPECTED, CLEARED, INCONCLUSIVE = Verdict
Way = bool | None
WAYS = (True, False, None)


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

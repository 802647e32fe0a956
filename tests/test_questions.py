"""The four questions: which estimates answer them, and what answers none."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
from estimates import (
    ALIGNMENTS,
    CONTRASTS,
    GAPS,
    LOOKS,
    NOT_ANNOTATED,
    REMOVALS,
    SHOWN,
    SWAPS,
    TIES,
    TWO_CUES,
    UNMEASURED,
    alignment,
    association,
    contrast,
    enrichment,
    found,
    gap,
    probe,
    removal,
    swap,
)

from bias_audit.terms import Estimate, Verdict

RELIANCE, SUSPECTED, CLEARED, INCONCLUSIVE = Verdict
TRIPLES = {"yes": (0.3, 0.2, 0.4), "no": (0.02, -0.01, 0.05), "unknown": (0.1, 0.0, 0.2)}


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

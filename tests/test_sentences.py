"""The sentence of a finding, and the numbers in it."""

from __future__ import annotations

from dataclasses import replace

from estimates import (
    CONTRASTS,
    GAPS,
    LOOKS,
    NOT_ANNOTATED,
    PROBES,
    REMOVALS,
    SHOWN,
    TIES,
    UNMEASURED,
    alignment,
    assert_readable,
    association,
    contrast,
    found,
    removal,
    swap,
)

from bias_audit.terms import Estimate, Verdict

RELIANCE, SUSPECTED, CLEARED, INCONCLUSIVE = Verdict


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

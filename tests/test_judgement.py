"""The rules of a policy, applied to what an audit measured."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
from estimates import (
    GAPS,
    LOOKS,
    NO_CUE,
    NOT_ANNOTATED,
    SUBJECTS,
    TWO_CUES,
    enrichment,
    fitness,
    found,
    gap,
    hirescam,
    share,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from bias_audit.policies.policy import Policy
from bias_audit.terms import Estimate, Outcome, Subjects, Verdict
from bias_audit.verdicts.judgement import Check, Judgement, judge

RELIANCE, SUSPECTED, CLEARED, INCONCLUSIVE = Verdict
HELD, VIOLATED, UNKNOWN = Outcome
RANK = {VIOLATED: 0, UNKNOWN: 1, HELD: 2}


def checks_of(
    rule: dict[str, Any], estimates: Sequence[Estimate], subjects: Subjects = SUBJECTS, **policy: Any
) -> tuple[Check, ...]:
    return judge(estimates, subjects, Policy.model_validate({"rules": [rule], **policy})).checks


def outcomes(rule: dict[str, Any], estimates: Sequence[Estimate], **policy: Any) -> list[Outcome]:
    return [check.outcome for check in checks_of(rule, estimates, **policy)]


def test_rules_on_what_unfit_maps_show() -> None:
    rule = {"metric": "enrichment", "region": "hair", "max": 1.5}
    looks = (enrichment(1.0, 0.9, 1.1), hirescam(3.0, 2.8, 3.2))
    named = {**rule, "method": "hirescam"}
    assert outcomes(rule, looks) == [HELD, VIOLATED] and outcomes(named, looks) == [VIOLATED]
    for state in ("unfit", "open", "unmeasured"):
        tested = (*looks, fitness("gradcam", "fit"), fitness("hirescam", state))
        # The unfit method is left out where the other one speaks of the same; asked for, it shows nothing.
        assert outcomes(rule, tested) == ([HELD] if state == "unfit" else [HELD, UNKNOWN])
        (check,) = checks_of(named, tested)
        assert check.outcome is UNKNOWN and "the hirescam maps" in check.message
        alone = (*looks[1:], fitness("hirescam", state))
        assert outcomes(rule, alone) == [UNKNOWN]
        # Of a class of which only the unfit method speaks, nothing is shown.
        by_class = (*tested, enrichment(3, 2.8, 3.2, class_name="nurse", method="hirescam"))
        assert outcomes({**rule, "class": "nurse"}, by_class) == [UNKNOWN]
    both = (*looks, fitness("gradcam", "unfit"), fitness("hirescam", "unfit"))
    assert outcomes(rule, both) == [UNKNOWN, UNKNOWN]
    assert outcomes({"metric": "accuracy", "min": 0.5}, (*both, Estimate("accuracy", 0.9, 0.8, 0.95, 50))) == [HELD]


def test_rules_on_the_methods_themselves() -> None:
    faithful = [Estimate("occlusion_correlation", 0.4, 0.3, 0.5, 16, method=m) for m in ("gradcam", "hirescam")]
    rule = {"metric": "occlusion_correlation", "min": 0.2}
    # Measured on fewer images than the default of min_samples, on purpose.
    assert outcomes(rule, faithful) == [HELD, HELD]
    assert outcomes({**rule, "min": 0.6, "method": "gradcam"}, faithful) == [VIOLATED]
    assert outcomes({**rule, "min_samples": 17}, faithful) == [UNKNOWN, UNKNOWN]
    assert outcomes({"metric": "occlusion_correlation", "max": 0.45}, faithful) == [UNKNOWN, UNKNOWN]
    assert outcomes(rule, [fitness("gradcam", "fit")]) == [UNKNOWN]
    similar = {"metric": "randomisation_similarity", "max": 0.5}
    assert outcomes(similar, [fitness("gradcam", "fit"), fitness("hirescam", "unfit")]) == [HELD, VIOLATED]


@pytest.mark.parametrize("bad", [None, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_unmeasured_never_passes(bad: float | None, place: int) -> None:
    numbers: list[float | None] = [0.5, 0.4, 0.6]
    assert enrichment(*numbers).measured
    numbers[place] = bad
    estimate = enrichment(*numbers)
    assert not estimate.measured and "not measured (no valid image)" in str(estimate)
    for limits in ({"max": 1e300}, {"min": -1e300}, {"max": 1e300, "on": "point"}):
        (check,) = checks_of({"metric": "enrichment", "region": "hair", **limits}, [estimate])
        assert check.outcome is UNKNOWN and "nothing to compare" in check.message
    assert found([estimate, *GAPS["no"]])["hair"].verdict is INCONCLUSIVE
    assert found([estimate, *LOOKS["no"], *GAPS["no"]])["hair"].verdict is INCONCLUSIVE


def test_estimate_in_words() -> None:
    assert enrichment(2, 1.8, 2.2).subject == "enrichment on hair (gradcam)"
    assert gap(0.3, 0.2, 0.4).subject == "accuracy_gap for class nurse by gender"
    assert str(share(0.5, 0.4, 0.6, group="gender=female", method=None)) == (
        "energy_share on hair where gender=female: 0.500 [0.400, 0.600], n = 50"
    )
    assert "every heatmap is silent" in str(LOOKS["unmeasured"][0])


@pytest.mark.parametrize(
    ("limits", "expected", "limit", "words"),
    [
        ({"max": 0.3}, VIOLATED, 0.3, "above the maximum 0.3"),
        ({"max": 0.7}, HELD, 0.7, "within the limit"),
        ({"max": 0.5}, UNKNOWN, 0.5, "reaches beyond the maximum 0.5"),
        ({"min": 0.7}, VIOLATED, 0.7, "below the minimum 0.7"),
        ({"min": 0.3}, HELD, 0.3, "within the limit"),
        ({"min": 0.5}, UNKNOWN, 0.5, "reaches below the minimum 0.5"),
        # The interval's own ends are within.
        ({"max": 0.6}, HELD, 0.6, "within"),
        ({"max": 0.4}, UNKNOWN, 0.4, "reaches"),
        ({"min": 0.4}, HELD, 0.4, "within"),
        ({"min": 0.6}, UNKNOWN, 0.6, "reaches"),
        ({"op": "<=", "threshold": 0.6}, HELD, 0.6, "within"),
        ({"op": "<", "threshold": 0.6}, UNKNOWN, 0.6, "reaches beyond"),
        ({"op": "<", "threshold": 0.4}, VIOLATED, 0.4, "above"),
        ({"op": ">", "threshold": 0.4}, UNKNOWN, 0.4, "reaches below"),
        ({"op": ">", "threshold": 0.6}, VIOLATED, 0.6, "below"),
        # The interval is not asked for.
        ({"max": 0.5, "on": "point"}, HELD, 0.5, "within"),
        ({"op": "<", "threshold": 0.5, "on": "point"}, VIOLATED, 0.5, "above"),
        ({"min": 0.55, "on": "point"}, VIOLATED, 0.55, "below"),
    ],
)
def test_limits(limits: dict[str, float], expected: Outcome, limit: float, words: str) -> None:
    estimate = share(0.5, 0.4, 0.6)
    (check,) = checks_of({"metric": "energy_share", "region": "hair", **limits}, [estimate])
    assert (check.outcome, check.limit, check.estimate) == (expected, limit, estimate)
    assert words in check.message and "0.500 [0.400, 0.600], n = 50" in check.message


def test_min_samples_of_policy_and_rule() -> None:
    rule = {"metric": "energy_share", "region": "hair", "max": 0.3}
    thin = [share(0.5, 0.4, 0.6, n=30)]
    assert outcomes(rule, thin) == [VIOLATED]
    assert outcomes(rule, thin, min_samples=30) == [VIOLATED]
    (check,) = checks_of(rule, thin, min_samples=31)
    assert check.outcome is UNKNOWN and "fewer images than min_samples = 31" in check.message
    assert outcomes({**rule, "min_samples": 31}, thin) == [UNKNOWN]
    assert outcomes({**rule, "min_samples": 5}, thin, min_samples=31) == [VIOLATED]
    # What too few images show is no pass either.
    assert outcomes({**rule, "max": 0.9, "min_samples": 31}, thin) == [UNKNOWN]


def test_warnings_never_block() -> None:
    bad, good = share(0.9, 0.8, 1.0), share(0.1, 0.0, 0.2, region="wall")
    rules = [
        {"metric": "energy_share", "region": "hair", "max": 0.5, "severity": "warn"},
        {"metric": "energy_share", "region": "wall", "max": 0.5},
    ]
    judgement = judge([bad, good], SUBJECTS, Policy.model_validate({"rules": rules}))
    assert [c.outcome for c in judgement.checks] == [VIOLATED, HELD]
    assert judgement.outcome is HELD and judgement.violations == ()
    rules[0]["severity"] = "error"
    judgement = judge([bad, good], SUBJECTS, Policy.model_validate({"rules": rules}))
    assert judgement.outcome is VIOLATED and judgement.violations == judgement.checks[:1]


def test_which_estimates_a_rule_is_about() -> None:
    estimates = [
        share(0.1, 0.0, 0.2),
        share(0.2, 0.1, 0.3, method="hirescam"),
        share(0.3, 0.2, 0.4, class_name="nurse"),
        share(0.4, 0.3, 0.5, class_name="doctor"),
        share(0.5, 0.4, 0.6, group="gender=female"),
        share(0.6, 0.5, 0.7, group="gender=male"),
        share(0.7, 0.6, 0.8, class_name="nurse", group="gender=male"),
        share(0.8, 0.7, 0.9, region="coat"),
        share(0.9, 0.8, 1.0, region="remainder"),
        enrichment(1.0, 0.9, 1.1),
        Estimate("accuracy", 0.15, 0.1, 0.2, 50),
        Estimate("accuracy", 0.25, 0.2, 0.3, 50, group="gender=male"),
        Estimate("accuracy_gap", 0.35, 0.3, 0.4, 50, group="gender"),
        Estimate("accuracy_gap", 0.45, 0.4, 0.5, 50, class_name="nurse", group="gender"),
        Estimate("worst_group_accuracy", 0.55, 0.5, 0.6, 50, group="gender"),
    ]

    def values(metric: str, **names: str) -> list[float | None]:
        checks = checks_of({"metric": metric, "max": 1, **names}, estimates)
        return [None if c.estimate is None else c.estimate.value for c in checks]

    assert values("energy_share", region="hair") == [0.1, 0.2]
    assert values("energy_share", region="hair", method="hirescam") == [0.2]
    assert values("energy_share", region="spurious", method="gradcam") == [0.1]
    assert values("energy_share", region="object") == [0.8]
    assert values("energy_share", region="remainder") == [0.9]
    assert values("energy_share", region="hair", **{"class": "nurse"}) == [0.3]
    assert values("energy_share", region="hair", **{"class": "each"}) == [0.3, 0.4]
    assert values("energy_share", region="hair", group="gender") == [0.5, 0.6]
    assert values("energy_share", region="hair", group="gender=female") == [0.5]
    # Three of the four cells have no image: each is a doubt of its own.
    assert values("energy_share", region="hair", group="gender", **{"class": "each"}) == [0.7, None, None, None]
    assert values("accuracy") == [0.15]
    assert values("accuracy", group="gender") == [0.25, None]
    assert values("accuracy_gap", group="gender") == [0.35]
    assert values("accuracy_gap", group="gender", **{"class": "each"}) == [0.45, None]
    assert values("worst_group_accuracy", group="gender") == [0.55]
    # A role with nothing measured on it, a method nobody ran, a gap that needs training data: nothing is shown, so
    # nothing passes.
    for nothing in (
        values("energy_share", region="context"),
        values("energy_share", region="hair", method="gradcm"),
        values("alignment_gap", group="gender"),
        values("iou", region="hair"),
    ):
        assert nothing == [None]


def test_a_rule_that_matches_nothing_is_inconclusive() -> None:
    judgement = judge([], SUBJECTS, Policy.model_validate({"rules": [{"metric": "accuracy", "min": 0}]}))
    (check,) = judgement.checks
    assert check.outcome is judgement.outcome is UNKNOWN and "no estimate of this kind" in check.message
    without_cue = judge([*GAPS["no"]], NO_CUE, Policy())
    assert without_cue.outcome is UNKNOWN


def test_a_class_without_an_image_is_a_doubt() -> None:
    def accuracy(class_name: str | None) -> Estimate:
        return Estimate("accuracy", 0.9, 0.85, 0.95, 50, class_name=class_name)

    clean = (*LOOKS["no"], *GAPS["no"])
    shown = found((*clean, accuracy(None), accuracy("doctor"), accuracy("nurse")))
    assert shown["hair"].verdict is CLEARED
    unseen = found((*clean, accuracy(None), accuracy("doctor")))
    assert unseen["hair"].verdict is INCONCLUSIVE and "no image of nurse" in unseen["hair"].sentence
    rule = {"metric": "accuracy", "class": "each", "min": 0.5}
    assert outcomes(rule, (accuracy("doctor"), accuracy("nurse"))) == [HELD, HELD]
    assert outcomes(rule, (accuracy("doctor"),)) == [HELD, UNKNOWN]


def test_a_role_covers_each_of_its_regions() -> None:
    estimates = [enrichment(0.7, 0.6, 0.8), enrichment(2.0, 1.8, 2.2, region="face")]
    checks = checks_of({"metric": "enrichment", "region": "spurious", "max": 1.5}, estimates, TWO_CUES)
    assert [(c.subject, c.outcome) for c in checks] == [
        ("enrichment on hair (gradcam)", HELD),
        ("enrichment on face (gradcam)", VIOLATED),
    ]


@pytest.mark.parametrize(
    ("look", "g", "forbid", "expected"),
    [
        ("yes", "yes", ["reliance"], VIOLATED),
        ("yes", "no", ["reliance"], HELD),
        ("yes", "no", ["suspected", "reliance"], VIOLATED),
        ("no", "no", ["suspected", "reliance"], HELD),
        ("unknown", "yes", ["reliance"], UNKNOWN),
        ("unknown", "yes", ["inconclusive"], VIOLATED),
        # Logits that are not finite leave a map but no accuracy: that is no pass.
        ("yes", "missing", ["reliance"], UNKNOWN),
        # Whether it is looked at is open, but where accuracy does not differ nothing is relied on either way.
        ("unknown", "no", ["reliance"], HELD),
        ("thin", "no", ["reliance"], HELD),
        ("unknown", "no", ["suspected"], UNKNOWN),
        ("unknown", "unknown", ["reliance"], UNKNOWN),
        ("no", "unknown", ["reliance"], UNKNOWN),
        ("no", "yes", ["reliance"], UNKNOWN),
    ],
)
def test_rules_on_verdicts(look: str, g: str, forbid: list[str], expected: Outcome) -> None:
    estimates = (*LOOKS[look], *GAPS[g])
    (check,) = checks_of({"metric": "verdict", "region": "hair", "forbid": forbid}, estimates)
    assert check.outcome is expected
    assert check.subject == "verdict on region hair"
    assert check.message == f"verdict on region hair: {(f := found(estimates)['hair']).verdict}. {f.sentence}"
    assert outcomes({"metric": "verdict", "region": "spurious", "forbid": forbid}, estimates) == [expected]


def test_what_no_attribute_can_tell_is_open() -> None:
    rule = {"metric": "verdict", "region": "hair", "forbid": ["reliance"]}
    for look in LOOKS:
        (check,) = judge(LOOKS[look], NOT_ANNOTATED, Policy.model_validate({"rules": [rule]})).checks
        assert check.outcome is UNKNOWN


def test_a_verdict_rule_on_an_attribute() -> None:
    rule = {"metric": "verdict", "group": "gender", "forbid": ["suspected", "reliance"]}
    assert outcomes(rule, [*LOOKS["no"], *GAPS["yes"]]) == [VIOLATED]
    assert outcomes(rule, [*LOOKS["no"], *GAPS["no"]]) == [HELD]
    # Each attribute: there may be none, and then there is nothing to hold.
    each = {"metric": "verdict", "group": "each", "op": "!=", "threshold": ["suspected", "reliance"]}
    assert outcomes(each, [*LOOKS["no"], *GAPS["yes"]]) == [VIOLATED]
    assert judge(LOOKS["no"], NOT_ANNOTATED, Policy.model_validate({"rules": [each]})).checks == ()
    # What is asked for: everything else violates it, and what is not known leaves it open.
    cleared = {"metric": "verdict", "group": "gender", "op": "==", "threshold": "cleared"}
    assert outcomes(cleared, [*LOOKS["no"], *GAPS["yes"]]) == [VIOLATED]
    assert outcomes(cleared, [*LOOKS["no"], *GAPS["no"]]) == [HELD]
    assert outcomes(cleared, [*LOOKS["no"], *GAPS["unknown"]]) == [UNKNOWN]


def test_a_region_and_an_attribute_of_one_name_are_told_apart() -> None:
    subjects = Subjects((("hair", "spurious"),), (("hair", ("long", "short")),), ("doctor", "nurse"))
    differs = Estimate("accuracy_gap", 0.3, 0.2, 0.4, 50, class_name="nurse", group="hair")
    estimates = [enrichment(0.7, 0.6, 0.8), differs]
    forbid = ["suspected"]
    (on_region,) = checks_of({"metric": "verdict", "region": "hair", "forbid": forbid}, estimates, subjects)
    (on_attribute,) = checks_of({"metric": "verdict", "group": "hair", "forbid": forbid}, estimates, subjects)
    assert (on_region.subject, on_region.outcome) == ("verdict on region hair", UNKNOWN)
    assert (on_attribute.subject, on_attribute.outcome) == ("verdict on attribute hair", VIOLATED)


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        ([], UNKNOWN),
        ([HELD], HELD),
        ([HELD, UNKNOWN], UNKNOWN),
        ([UNKNOWN, VIOLATED, HELD], VIOLATED),
        ([HELD, HELD], HELD),
    ],
)
def test_outcome_precedence(outcomes: list[Outcome], expected: Outcome) -> None:
    checks = tuple(Check("r", "s", outcome, "error", "m") for outcome in outcomes)
    assert Judgement((), checks).outcome is expected
    for outcome in Outcome:
        assert Judgement((), (*checks, Check("r", "s", outcome, "warn", "m"))).outcome is expected


numbers = st.one_of(
    st.floats(-2, 3), st.sampled_from([0.0, 0.5, 1.0, 1.5]), st.sampled_from([None, math.nan, math.inf, -math.inf])
)
looks = st.builds(
    enrichment, numbers, numbers, numbers, st.integers(0, 60), method=st.sampled_from(["gradcam", "hirescam"])
)
# As measured: the value within its interval.
proper_looks = st.builds(
    lambda value, below, above, n, method: enrichment(value, value - below, value + above, n, method=method),
    st.floats(-1, 3),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(0, 60),
    st.sampled_from(["gradcam", "hirescam"]),
)
proper_gaps = st.builds(
    lambda value, half, n, name: gap(value, value - half, value + half, n, name),
    st.floats(-1, 1),
    st.floats(0, 0.5),
    st.integers(0, 60),
    st.sampled_from([None, "doctor", "nurse"]),
)
limit = st.one_of(st.floats(-3, 4), st.sampled_from([0.0, 0.5, 1.0, 1.5]))


@settings(max_examples=200, deadline=None)
@given(st.lists(looks, max_size=4), limit, limit)
def test_raising_a_maximum_never_makes_it_worse(estimates: list[Estimate], a: float, b: float) -> None:
    def ranks(bound: str, value: float) -> tuple[list[int], int]:
        rule = {"metric": "enrichment", "region": "hair", bound: value}
        judgement = judge(estimates, SUBJECTS, Policy.model_validate({"rules": [rule]}))
        return [RANK[c.outcome] for c in judgement.checks], RANK[judgement.outcome]

    for bound, strict, lax in (("max", min(a, b), max(a, b)), ("min", max(a, b), min(a, b))):
        before, overall = ranks(bound, strict)
        after, overall_after = ranks(bound, lax)
        assert all(x <= y for x, y in zip(before, after, strict=True)) and overall <= overall_after
        # What is not a number passes nothing.
        unmeasured = [not e.measured for e in estimates]
        assert all(r == RANK[UNKNOWN] for r, bad in zip(after, unmeasured, strict=False) if bad)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.one_of(proper_looks, proper_gaps, looks), max_size=8, unique_by=lambda e: e.value),
    st.randoms(use_true_random=False),
)
def test_the_order_of_estimates_changes_nothing(estimates: list[Estimate], rng: random.Random) -> None:
    rules = [
        {"metric": "enrichment", "region": "spurious", "max": 1.5},
        {"metric": "accuracy_gap", "group": "gender", "class": "each", "max": 0.2},
        {"metric": "verdict", "region": "hair", "forbid": ["reliance", "suspected"]},
    ]
    policy = Policy.model_validate({"rules": rules})
    shuffled = rng.sample(estimates, len(estimates))
    one, other = judge(estimates, SUBJECTS, policy), judge(shuffled, SUBJECTS, policy)
    assert one.outcome is other.outcome
    assert [(f.name, f.verdict, f.samples_to_settle) for f in one.findings] == [
        (f.name, f.verdict, f.samples_to_settle) for f in other.findings
    ]
    assert sorted((c.subject, c.outcome, str(c.estimate)) for c in one.checks) == sorted(
        (c.subject, c.outcome, str(c.estimate)) for c in other.checks
    )

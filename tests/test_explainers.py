"""What rests on the maps of explanation methods that may not be fit."""

from __future__ import annotations

import itertools
import math
import re

import pytest
from estimates import (
    GAPS,
    LOOKS,
    NOT_ANNOTATED,
    REMOVALS,
    SIMILARITIES,
    STATES,
    SUBJECTS,
    fitness,
    found,
    hirescam,
)

from bias_audit.policies.policy import Policy
from bias_audit.terms import Estimate, Verdict
from bias_audit.verdicts.explainers import explainers

RELIANCE, SUSPECTED, CLEARED, INCONCLUSIVE = Verdict


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

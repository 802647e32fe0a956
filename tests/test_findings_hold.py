"""Whatever is recorded: nothing but the evidence decides, and what is not measured clears nothing."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from estimates import (
    OF_REGIONS,
    UNMEASURED,
    WITHOUT_GROUP,
    assert_readable,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bias_audit.policies.policy import Policy
from bias_audit.terms import Estimate, Subjects, Verdict
from bias_audit.verdicts.explainers import explainers
from bias_audit.verdicts.findings import find
from bias_audit.verdicts.judgement import judge

RELIANCE, SUSPECTED, CLEARED, INCONCLUSIVE = Verdict


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

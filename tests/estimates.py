"""Estimates as an audit leaves them, for tests of findings and rules.

Enters: numbers. Leaves: `Estimate`s about a gallery of doctors and nurses, and for each kind of evidence the ways in
which it can turn out under the default tolerances: an enrichment of 1, 0.05 of decisions changed by a removal, and
0.1 of everything else.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest

from bias_audit.policies.policy import Policy
from bias_audit.terms import Estimate, Subjects, Verdict
from bias_audit.verdicts.findings import Finding
from bias_audit.verdicts.judgement import judge

SUBJECTS = Subjects(
    (("coat", "object"), ("hair", "spurious"), ("wall", "context")),
    (("gender", ("female", "male")),),
    ("doctor", "nurse"),
)
TWO_CUES = Subjects((("hair", "spurious"), ("face", "spurious")), SUBJECTS.attributes, SUBJECTS.classes)
NOT_ANNOTATED = Subjects(SUBJECTS.regions, (), SUBJECTS.classes)
NO_CUE = Subjects((("coat", "object"),), SUBJECTS.attributes, SUBJECTS.classes)

UNMEASURED = (None, None, None)
# In how many ways evidence of a kind can turn out, at the least: see below for all of them.
STATES = ("yes", "no", "unknown", "missing")
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


def enrichment(value: Any, low: Any, high: Any, n: int = 50, region: str = "hair", **names: str) -> Estimate:
    return Estimate("enrichment", value, low, high, n, region, **{"method": "gradcam", **names})


def hirescam(value: float, low: float, high: float) -> Estimate:
    return enrichment(value, low, high, method="hirescam")


def gap(value: Any, low: Any, high: Any, n: int = 50, class_name: str | None = "nurse") -> Estimate:
    return Estimate("accuracy_gap", value, low, high, n, class_name=class_name, group="gender")


def alignment(value: Any, low: Any, high: Any, n: int = 50, class_name: str | None = None) -> Estimate:
    return Estimate("alignment_gap", value, low, high, n, class_name=class_name, group="gender")


def removal(value: Any, low: Any, high: Any, n: int = 50, **names: Any) -> Estimate:
    return Estimate("removal_flips", value, low, high, n, **{"region": "hair", **names})


def contrast(value: Any, low: Any, high: Any, n: int = 50, **names: Any) -> Estimate:
    return Estimate("removal_contrast", value, low, high, n, **{"region": "hair", "group": "gender", **names})


def probe(value: Any, low: Any, high: Any, n: int = 50, **names: Any) -> Estimate:
    return Estimate("region_probe_gain", value, low, high, n, **{"region": "hair", "group": "gender", **names})


def swap(value: Any, low: Any, high: Any, n: int = 50, metric: str = "swap_gap", **names: Any) -> Estimate:
    return Estimate(metric, value, low, high, n, **{"group": "gender", **names})


def association(value: Any, low: Any, high: Any, n: int = 900, group: str = "gender") -> Estimate:
    return Estimate("cramers_v", value, low, high, n, group=group)


def share(value: float, low: float, high: float, **names: Any) -> Estimate:
    return Estimate("energy_share", value, low, high, **{"n": 50, "region": "hair", "method": "gradcam", **names})


SIMILARITIES = {
    "fit": (0.1, 0.0, 0.2),
    "just fit": (0.6, 0.5, 0.7),
    "open": (0.7, 0.6, 0.8),
    "unfit": (0.9, 0.8, 1.0),
    "unmeasured": UNMEASURED,
}


def fitness(method: str, state: str, n: int = 16) -> Estimate:
    return Estimate("randomisation_similarity", *SIMILARITIES[state], n, method=method, reason="no map was drawn")


def _of(make: Any) -> dict[str, tuple[Estimate, ...]]:
    return {
        "yes": (make(0.3, 0.2, 0.4),),
        "no": (make(0.02, -0.01, 0.05),),
        "unknown": (make(0.1, 0.0, 0.2),),
        "thin": (make(0.3, 0.2, 0.4, n=5),),
        "unmeasured": (make(*UNMEASURED, n=0),),
        "missing": (),
    }


LOOKS = {
    "yes": (enrichment(2.0, 1.8, 2.2),),
    "no": (enrichment(0.7, 0.6, 0.8),),
    "unknown": (enrichment(1.2, 0.8, 1.6),),
    "thin": (enrichment(2.0, 1.8, 2.2, n=5),),
    "unmeasured": (Estimate("enrichment", *UNMEASURED, 0, "hair", reason="every heatmap is silent"),),
    "missing": (),
}
REMOVALS, CONTRASTS, GAPS, ALIGNMENTS = _of(removal), _of(contrast), _of(gap), _of(alignment)
SWAPS, TIES, PROBES = _of(swap), _of(association), _of(probe)
SHOWN = PROBES["yes"]
# No attribute is annotated: accuracy by group is not asked, and neither is its association with the label.
GAPS["not annotated"] = ()


def found(estimates: Sequence[Estimate], subjects: Subjects = SUBJECTS, **policy: Any) -> dict[str, Finding]:
    """The findings by name, as they come with a judgement."""
    judgement = judge(estimates, subjects, Policy.model_validate(policy))
    return {finding.name: finding for finding in judgement.findings}


def assert_readable(finding: Finding) -> None:
    """Whether a finding's sentence is one, and says nothing that no person would."""
    assert finding.sentence[0].isupper() and finding.sentence.endswith("."), finding.sentence
    assert not re.search(r"None|\bnan\b|\binf\b|-0\.00|-0 %|  |\.\.|, but \.|; \.|^[.;,]", finding.sentence), finding
    assert (finding.samples_to_settle is None) or finding.verdict is Verdict.INCONCLUSIVE


def alike(one: Sequence[Estimate], other: Sequence[Estimate], off: float = 1e-5) -> None:
    """Whether two audits estimated the same things and got the same numbers, but for rounding."""

    def named(estimates: Sequence[Estimate]) -> dict[Any, Estimate]:
        return {(e.metric, e.region, e.class_name, e.group, e.method): e for e in estimates}

    first, second = named(one), named(other)
    assert first.keys() == second.keys() and len(first) == len(one) == len(other)
    for key, e in first.items():
        assert (e.n, e.reason, e.age) == (second[key].n, second[key].reason, second[key].age), key
        for a, b in zip((e.value, e.low, e.high), (second[key].value, second[key].low, second[key].high), strict=True):
            assert a == b if a is None or b is None else a == pytest.approx(b, abs=off), key

"""Since when, where it is heading, and what stopping earlier would have cost."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import make_run

from bias_audit.policies.policy import Policy, Tolerance
from bias_audit.records.history import Change, Onset, onsets
from bias_audit.records.results import AuditSummary
from bias_audit.records.runs import read_run
from bias_audit.stats import newcombe, wilson
from bias_audit.terms import Estimate, Verdict
from bias_audit.verdicts.findings import Finding
from bias_audit.verdicts.judgement import Judgement

LETTERS = {"r": Verdict.RELIANCE, "s": Verdict.SUSPECTED, "c": Verdict.CLEARED, "i": Verdict.INCONCLUSIVE}
NO_ONSET = (None, None)


def enrichment(value: float, half: float = 0.1, **names: Any) -> Estimate:
    return Estimate("enrichment", value, value - half, value + half, 50, "hair", method="gradcam", **names)


def audit(
    step: int,
    verdict: Verdict,
    hits: int | None = 80,
    evidence: Estimate | None = None,
    trigger: str = "validation",
    name: str = "hair",
) -> AuditSummary:
    shown = () if evidence is None else (evidence,)
    finding = Finding("region", name, verdict, "", shown, (verdict,))
    accuracy = () if hits is None else (Estimate("accuracy", *wilson(hits, 100), 100),)
    return AuditSummary(step, 0, "raw", "", 1.0, (*accuracy, *shown), Judgement((finding,), ()), trigger)


def story(letters: str) -> Onset:
    """One audit per letter, at steps 100, 200, ..."""
    audits = [audit(100 * (i + 1), LETTERS[letter], hits=50 + 5 * i) for i, letter in enumerate(letters)]
    (found,) = onsets(audits)
    assert found.steps == tuple(a.step for a in audits) and found.verdict is LETTERS[letters[-1]]
    assert found.verdicts == tuple(LETTERS[letter] for letter in letters)
    return found


@pytest.mark.parametrize(
    ("letters", "since", "before"),
    [
        ("ccrr", 300, 200),
        ("crcr", 400, 300),
        ("rrr", 100, None),
        ("r", 100, None),
        ("srr", 200, 100),
        # An inconclusive audit neither starts, nor ends, nor is free of it.
        ("ciir", 400, 100),
        ("crir", 200, 100),
        ("iir", 300, None),
        # What is suspected now and was relied on between has been suspected since.
        ("csrs", 200, 100),
        ("css", 200, 100),
        ("crs", 200, 100),
        ("crsr", 400, 300),
        ("crc", *NO_ONSET),
        ("rri", *NO_ONSET),
        ("ccc", *NO_ONSET),
        ("i", *NO_ONSET),
    ],
)
def test_onset(letters: str, since: int | None, before: int | None) -> None:
    found = story(letters)
    assert (found.since, found.before) == (since, before)
    assert found.verdict_before is (None if before is None else LETTERS[letters[before // 100 - 1]])
    text = str(found)
    assert text.startswith("Region hair: ") and text.endswith(".") and "None" not in text
    assert ("since step" in text) == (since is not None) and ("Stopping at step" in text) == (before is not None)
    assert ("not shown to avoid" in text) == (since is not None and before is None)


@given(st.text("rsci", min_size=1, max_size=8))
@settings(deadline=None)
def test_onset_against_the_definition(letters: str) -> None:
    found, last = story(letters), letters[-1]
    alarms = {"r": "r", "s": "sr"}.get(last, "")
    starts = [i for i in range(len(letters)) if letters[i] in alarms and set(letters[i:]) <= {*alarms, "i"}]
    assert found.since == (100 * (starts[0] + 1) if starts else None)
    free = [i for i in range(starts[0]) if letters[i] != "i"] if starts else []
    assert found.before == (100 * (free[-1] + 1) if free else None)


def test_cost_is_newcombes_difference() -> None:
    (found,) = onsets([audit(1, LETTERS["c"], 70), audit(2, LETTERS["r"], 75), audit(3, LETTERS["r"], 82)])
    value, low, high = newcombe((82, 100), (70, 100))
    assert (found.cost.value, found.cost.low, found.cost.high) == pytest.approx((value, low, high))
    assert f"Stopping at step 1 (cleared) would have cost 12.0 points of accuracy [{100 * low:.1f}, " in str(found)


def test_stopping_may_gain_accuracy() -> None:
    (found,) = onsets([audit(1, LETTERS["s"], 90), audit(2, LETTERS["r"], 60)])
    assert found.cost.direction == "down" and found.cost.low is not None and found.cost.high is not None
    bounds = f"[{-100 * found.cost.high:.1f}, {-100 * found.cost.low:.1f}]"
    assert f"Stopping at step 1 (suspected) would have gained 30.0 points of accuracy {bounds}." in str(found)


def test_a_cost_that_nobody_measured() -> None:
    (found,) = onsets([audit(1, LETTERS["c"], None), audit(2, LETTERS["r"])])
    assert found.cost == Change(None, None, None, "accuracy was not measured at step 1")
    assert found.cost.direction == "unknown" and "unknown: accuracy was not measured at step 1." in str(found)
    broken = Estimate("accuracy", math.nan, math.nan, math.nan, 0)
    last = audit(2, LETTERS["r"], None)
    last = AuditSummary(**{**vars(last), "estimates": (broken,)})
    assert onsets([audit(1, LETTERS["c"]), last])[0].cost.reason == "accuracy was not measured at step 2"


def rising(values: list[float], halves: list[float], steps: list[int]) -> Change:
    rows = zip(steps, values, halves, strict=True)
    (found,) = onsets([audit(step, LETTERS["s"], evidence=enrichment(v, h)) for step, v, h in rows])
    assert found.leading is not None and found.leading.metric == "enrichment"
    return found.trend


@pytest.mark.parametrize("seed", range(5))
def test_trend_against_numpy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 9))
    steps = np.sort(rng.choice(1000, n, replace=False))
    values, halves = rng.normal(2, 1, n), rng.uniform(0.05, 0.4, n)
    trend = rising(values.tolist(), halves.tolist(), steps.tolist())
    span = steps[-1] - steps[0]
    assert trend.value == pytest.approx(span * np.polyfit(steps, values, 1)[0])
    # The error of each value alone, through the same fit.
    alone = [span * np.polyfit(steps, np.eye(n)[i] * halves[i], 1)[0] for i in range(n)]
    assert trend.low is not None and trend.high is not None and trend.value is not None
    assert trend.high - trend.value == pytest.approx(np.linalg.norm(alone))
    assert trend.value - trend.low == pytest.approx(np.linalg.norm(alone))


def test_trend_covers_the_truth() -> None:
    rng = np.random.default_rng(0)
    steps, error, held = [100, 200, 300, 400, 500], 0.1, 0
    for _ in range(400):
        values = 1 + 0.001 * np.array(steps) + rng.normal(0, error, 5)
        trend = rising(values.tolist(), [1.96 * error] * 5, steps)
        assert trend.low is not None and trend.high is not None
        held += trend.low <= 0.4 <= trend.high
    assert 0.92 <= held / 400 <= 0.98


def test_trend_of_lopsided_intervals() -> None:
    """Between two audits it is their difference: up by the later one's upper side and the earlier one's lower."""
    first = Estimate("enrichment", 1.0, 0.7, 1.1, 50, "hair", method="gradcam")
    second = Estimate("enrichment", 2.0, 1.6, 2.2, 50, "hair", method="gradcam")
    (found,) = onsets([audit(10, LETTERS["s"], evidence=first), audit(30, LETTERS["s"], evidence=second)])
    expected = (1.0, 1 - math.hypot(0.4, 0.1), 1 + math.hypot(0.2, 0.3))
    assert (found.trend.value, found.trend.low, found.trend.high) == pytest.approx(expected)


def test_trend_directions_and_words() -> None:
    for values, direction, words in (
        ([1.0, 2.0, 3.0], "up", "rises: +2.00 ["),
        ([3.0, 2.0, 1.0], "down", "falls: -2.00 ["),
        ([2.0, 2.1, 2.0], "open", "shows no trend: +0.00 ["),
    ):
        audits = [audit(i, LETTERS["s"], evidence=enrichment(v)) for i, v in enumerate(values, 1)]
        (found,) = onsets(audits)
        assert found.trend.direction == direction
        assert f"Over the run enrichment on hair (gradcam) {words}" in str(found)


def test_trend_takes_what_was_measured_and_once() -> None:
    verdict = LETTERS["s"]
    carried = audit(200, verdict, evidence=enrichment(9.0, age=1))
    other = audit(300, verdict, evidence=enrichment(9.0, class_name="nurse"))
    missing = audit(400, verdict, evidence=Estimate("enrichment", None, None, None, 0, "hair", method="gradcam"))
    ends = [audit(100, verdict, evidence=enrichment(1.0)), audit(500, verdict, evidence=enrichment(2.0))]
    (found,) = onsets([ends[0], carried, other, missing, ends[1]])
    assert found.trend.value == pytest.approx(1.0)
    (one,) = onsets([carried, ends[1]])
    assert one.trend == Change(None, None, None, "enrichment on hair (gradcam) was measured at fewer than two steps")
    (twice,) = onsets([audit(5, verdict, evidence=enrichment(1.0)), audit(5, verdict, evidence=enrichment(2.0))])
    assert twice.trend.value is None and "Over the run" not in str(twice)
    (bare,) = onsets([audit(1, verdict)])
    assert bare.trend.reason == "the finding has no evidence" and bare.leading is None


def test_the_untrained_model_does_not_count() -> None:
    before = audit(0, LETTERS["c"], trigger="reference")
    (found,) = onsets([before, audit(100, LETTERS["r"])])
    assert (found.steps, found.since, found.before) == ((100,), 100, None)
    assert onsets([before]) == () == onsets([])


def test_findings_that_come_and_go() -> None:
    gone = audit(100, LETTERS["r"], name="coat")
    (found,) = onsets([gone, audit(200, LETTERS["c"]), audit(300, LETTERS["r"])])
    assert (found.name, found.steps, found.since, found.before) == ("hair", (200, 300), 300, 200)


def test_a_recorded_run(tmp_path: Path) -> None:
    """What is said of a run read back is what its records say; attention to hair grows in it."""
    policy = Policy(min_samples=5, tolerance=Tolerance(enrichment=1.3))
    path = make_run(
        tmp_path / "run",
        audits=6,
        samples=400,
        spread=0.05,
        gap=0.5,
        hair_enrichment=2.5,
        policy=policy,
        reference=True,
    )
    run = read_run(path)
    found = {(x.kind, x.name): x for x in onsets(run.audits)}
    assert list(found) == [(f.kind, f.name) for f in run.audits[-1].judgement.findings]
    for (kind, name), one in found.items():
        recorded = [f.verdict for a in run.audits[1:] for f in a.judgement.findings if (f.kind, f.name) == (kind, name)]
        assert list(one.verdicts) == recorded and one.steps == tuple(a.step for a in run.audits[1:])
    hair = found["region", "hair"]
    assert hair.trend.direction == "up"


def test_only_the_standard_library_and_pydantic() -> None:
    """Reading records must stay quick: no NumPy, no torch."""
    code = (
        "import sys, bias_audit.records.history; sys.exit(any(m in sys.modules for m in ('numpy', 'torch', 'scipy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""What the gate makes of a run: which audits a rule is judged at, since when, by which images, and every doubt."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic import make_run

from bias_audit.gate import GateCheck, GateResult, no_evidence, run_gate
from bias_audit.policy_file import read_policy
from bias_audit.records import Run, RunDirectory, read_run
from bias_audit.terms import Estimate, Outcome

HELD, VIOLATED, UNKNOWN = Outcome.HELD, Outcome.VIOLATED, Outcome.INCONCLUSIVE
# Enrichment of hair at the four audits: see `looks`.
RULE = {"metric": "enrichment", "region": "hair", "method": "gradcam", "max": 1.5}


def rules(*content: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    return {"min_samples": 5, "rules": list(content), **more}


@pytest.fixture(scope="module")
def growing(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Four audits and a reference; hair is looked at more and more, and relied on in the end."""
    path = make_run(tmp_path_factory.mktemp("gate") / "run", audits=4, reference=True, spread=0.02, samples=60)
    return read_run(path)


def looks(run: Run) -> list[float]:
    """The enrichment of hair at each audit of the trained model."""
    found = [a.estimate("enrichment", region="hair", method="gradcam").value for a in run.audits[1:]]
    return [x for x in found if x is not None]


def only(result: GateResult) -> GateCheck:
    (check,) = result.checks
    return check


# At which audit


def test_the_last_audit_is_judged_unless_a_rule_says_otherwise(growing: Run) -> None:
    values = looks(growing)
    assert values[0] < 1.45 < 1.7 < values[-1]
    last = run_gate(growing, rules(RULE))
    assert (last.outcome, only(last).check.step) == (VIOLATED, 400)
    every = run_gate(growing, rules({**RULE, "at": "every"}))
    expected = {100 * (i + 1): VIOLATED if value > 1.55 else HELD for i, value in enumerate(values)}
    assert {c.check.step: c.check.outcome for c in every.checks} == expected and HELD in expected.values()
    # What is worst comes first.
    assert every.checks[0].check.outcome is VIOLATED and every.checks[-1].check.outcome is HELD
    # A limit that one audit in the middle breaks is broken, though the last one holds it.
    falling = rules({"metric": "accuracy", "max": 0.7, "at": "every"}, {"metric": "accuracy", "min": 0.3})
    assert run_gate(growing, falling).outcome is VIOLATED


def test_the_best_checkpoint_and_the_one_that_is_named(growing: Run, tmp_path: Path) -> None:
    best = rules({**RULE, "at": "best"})
    unknown = run_gate(growing, best)
    assert unknown.outcome is UNKNOWN and "recorded no best checkpoint" in only(unknown).check.message
    directory = RunDirectory.create(tmp_path / "run", growing.manifest, growing.sheet())
    for index in range(3):
        directory.append(_whole(growing, index))
        if index:
            directory.best(growing.audits[index].step)
    directory.best(100)
    directory.append(_whole(growing, 4))
    directory.end()
    run = read_run(tmp_path / "run")
    assert run.best_step == 100
    found = run_gate(run, best)
    assert (found.outcome, only(found).check.step) == (HELD, 100)
    # The same for a checkpoint that the gate is given.
    named = rules({**RULE, "at": "checkpoint"})
    assert "given no checkpoint" in only(run_gate(run, named)).check.message
    assert (run_gate(run, named, checkpoint_step=100).outcome, run_gate(run, named, checkpoint_step=400).outcome) == (
        HELD,
        VIOLATED,
    )
    between = run_gate(run, named, checkpoint_step=150)
    assert between.outcome is UNKNOWN and "no audit was made at step 150" in only(between).check.message


def _whole(run: Run, index: int) -> Any:
    from bias_audit.records import AuditResult

    return AuditResult(**vars(run.audits[index]), scores=run.scores(index))


def test_evidence_older_than_the_checkpoint_is_stale(growing: Run) -> None:
    holds = rules({**RULE, "max": 100})
    for step, outcome in ((None, HELD), (300, HELD), (400, HELD), (401, UNKNOWN)):
        result = run_gate(growing, holds, checkpoint_step=step)
        assert result.outcome is outcome
        assert [d for d in result.doubts if "stale" in d] == (
            ["the evidence is stale: the last audit is of step 400, the checkpoint of step 401"] if step == 401 else []
        )
    # A doubt excuses nothing.
    assert run_gate(growing, rules(RULE), checkpoint_step=401).outcome is VIOLATED


def test_an_audit_of_a_part_of_the_samples_is_no_pass(growing: Run, tmp_path: Path) -> None:
    manifest = growing.manifest.model_copy(update={"samples_audited": 61})
    directory = RunDirectory.create(tmp_path / "run", manifest, growing.sheet())
    directory.append(_whole(growing, 4))
    directory.end()
    result = run_gate(read_run(tmp_path / "run"), rules({**RULE, "max": 100}))
    assert result.outcome is UNKNOWN
    assert result.doubts == ("the audit at step 400 is partial: it holds 60 of 61 samples",)


def test_other_doubts_are_said_as_they_are_given(growing: Run) -> None:
    result = run_gate(growing, rules({**RULE, "max": 100}), doubts=["nobody knows"], source="here")
    assert (result.outcome, result.doubts, result.source) == (UNKNOWN, ("nobody knows",), "here")
    nothing = no_evidence("there", "it is gone")
    assert (nothing.outcome, nothing.exit_code, nothing.doubts) == (UNKNOWN, 3, ("it is gone",))
    assert no_evidence("there", "it is gone", on_inconclusive="pass").exit_code == 0


# What a person needs


def test_since_when(growing: Run) -> None:
    values = looks(growing)
    onset = next(100 * (i + 1) for i, value in enumerate(values) if value > 1.55)
    assert onset > 100
    found = only(run_gate(growing, rules(RULE)))
    assert found.since == onset
    held = only(run_gate(growing, rules({**RULE, "max": 100})))
    assert held.since is None and held.worst == ()
    # A break ends it.
    broken = replace(growing, audits=(*growing.audits[:4], replace(growing.audits[1], step=350), growing.audits[4]))
    broken = replace(broken, _arrays=(*growing._arrays[:4], growing._arrays[1], growing._arrays[4]))
    assert only(run_gate(broken, rules(RULE))).since == 400


def test_the_images_that_weigh_most(growing: Run) -> None:
    scores, sheet = growing.scores(4), growing.sheet()
    nurses = np.flatnonzero(sheet.labels == 1)
    female = sheet.attributes[:, 0] == "female"

    def worst(**rule: Any) -> tuple[str, ...]:
        found = only(run_gate(growing, rules(rule)))
        assert found.check.outcome is VIOLATED
        return found.worst

    lifted = scores.of("enrichment", "gradcam", "hair")
    naive = sorted(nurses, key=lambda i: -lifted[i] if math.isfinite(lifted[i]) else math.inf)[:5]
    got = worst(metric="enrichment", region="hair", method="gradcam", max=1.5, **{"class": "nurse"})
    assert got == tuple(sheet.ids[i] for i in naive)
    share = scores.of("energy_share", "gradcam", "coat")
    naive = sorted((i for i in np.flatnonzero(female) if math.isfinite(share[i])), key=lambda i: share[i])[:5]
    assert worst(metric="energy_share", region="coat", method="gradcam", min=0.99, group="gender=female") == tuple(
        sheet.ids[i] for i in naive
    )
    wrong = [i for i in range(60) if scores.predictions[i] != scores.labels[i]]
    naive = sorted(wrong, key=lambda i: scores.margin[i])[:5]
    assert worst(metric="accuracy", min=0.99) == tuple(sheet.ids[i] for i in naive)
    assert worst(metric="accuracy_gap", group="gender", max=0.01) == tuple(sheet.ids[i] for i in naive)
    # What leads the evidence of the verdict is what is looked for.
    finding = run_gate(growing, rules(RULE)).judgement.findings[0]  # type: ignore[union-attr]
    assert finding.name == "hair" and len(worst(metric="verdict", region="hair", forbid=["reliance"])) == 5


def test_images_that_cannot_be_read_cost_no_outcome(growing: Run, tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", audits=1)
    (path / "samples.npz").write_bytes(b"gone")
    result = run_gate(read_run(path))
    assert result.outcome is VIOLATED and all(c.worst == () for c in result.checks)


def test_the_line_of_the_rule(growing: Run, tmp_path: Path) -> None:
    path = tmp_path / "audit.yaml"
    path.write_text("min_samples: 5\nrules:\n  - {metric: accuracy, min: 0.1}\n  - {metric: accuracy, min: 1}\n")
    found = run_gate(growing, path)
    assert {c.check.rule: c.line for c in found.checks} == {"accuracy >= 0.1": 3, "accuracy >= 1": 4}
    assert found.policy == read_policy(path)
    assert {c.line for c in run_gate(growing, rules(RULE)).checks} == {None}


# Options


def test_what_fails(growing: Run) -> None:
    warned = rules({**RULE, "severity": "warn"}, {"metric": "accuracy", "min": 0.1})
    assert (run_gate(growing, warned).exit_code, run_gate(growing, warned, fail_on="warn").exit_code) == (0, 1)
    unknown = rules({"metric": "accuracy", "min": 0.1, "min_samples": 61})
    codes = {x: run_gate(growing, unknown, on_inconclusive=x).exit_code for x in ("fail", "warn", "pass")}
    assert codes == {"fail": 3, "warn": 0, "pass": 0}
    # That lets no violation pass.
    both = rules(RULE, {"metric": "accuracy", "min": 0.1, "min_samples": 61})
    assert run_gate(growing, both, on_inconclusive="pass").exit_code == 1
    assert run_gate(growing, both, exit_zero=True).exit_code == 0
    assert run_gate(growing, both, exit_zero=True).outcome is VIOLATED
    # A warning that is unknown is unknown where warnings fail.
    doubtful = rules({**RULE, "severity": "warn", "min_samples": 61}, {"metric": "accuracy", "min": 0.1})
    assert (run_gate(growing, doubtful).exit_code, run_gate(growing, doubtful, fail_on="warn").exit_code) == (0, 3)


def test_a_name_that_the_audit_does_not_have(growing: Run) -> None:
    with pytest.raises(ValueError, match="unknown method 'gradcamm'; the audit uses gradcam, hirescam"):
        run_gate(growing, rules({**RULE, "method": "gradcamm"}))
    with pytest.raises(ValueError, match="attribute 'gender' has no value 'femal'"):
        run_gate(growing, rules({"metric": "accuracy", "group": "gender=femal", "min": 0.5}))


@pytest.mark.parametrize("bad", [None, math.nan, math.inf])
def test_a_number_that_is_none_is_no_pass(bad: float | None, growing: Run) -> None:
    audit = growing.audits[-1]
    spoiled = tuple(
        replace(e, value=bad) if (e.metric, e.class_name, e.group) == ("accuracy", None, None) else e
        for e in audit.estimates
    )
    run = replace(growing, audits=(*growing.audits[:-1], replace(audit, estimates=spoiled)))
    for on in ("interval", "point"):
        assert run_gate(run, rules({"metric": "accuracy", "min": 0.1, "on": on})).outcome is UNKNOWN


def test_an_explainer_that_failed_its_check_is_no_evidence(tmp_path: Path) -> None:
    clean = {"hair_enrichment": 0.7, "gap": 0.02, "spread": 0.02, "audits": 1}
    for similar, outcome in (({"gradcam": 0.2, "hirescam": 0.2}, HELD), ({"gradcam": 0.95, "hirescam": 0.95}, UNKNOWN)):
        run = read_run(make_run(tmp_path / str(outcome), fitness=similar, **clean))
        assert run_gate(run, rules({"metric": "enrichment", "region": "hair", "max": 1.5})).outcome is outcome


# Against a baseline


def test_a_regression_is_found_image_by_image(tmp_path: Path) -> None:
    from bias_audit.baseline import read_baseline

    clean = {"audits": 2, "samples": 80, "gap": 0.02, "spread": 0.02}
    before = make_run(tmp_path / "before", hair_enrichment=0.7, **clean)
    same = read_run(make_run(tmp_path / "same", hair_enrichment=0.7, **clean))
    worse = read_run(make_run(tmp_path / "worse", hair_enrichment=1.4, **clean))
    rule = {"metric": "enrichment", "region": "hair", "op": "<=", "max_regression": 0.2}
    baseline = read_baseline(before)
    held, violated = (run_gate(run, rules(rule), baseline=baseline) for run in (same, worse))
    assert (held.outcome, violated.outcome) == (HELD, VIOLATED)
    for check in violated.checks:
        assert check.check.step == 200 and check.since is None and len(check.worst) == 5
        assert check.baseline is not None and check.change is not None and check.change.value is not None
        assert check.change.value > 0.2 and isinstance(check.check.estimate, Estimate)
    # Without a baseline nothing is shown, whatever the other rules say.
    alone = run_gate(same, rules(rule, {"metric": "accuracy", "min": 0.1}))
    assert alone.outcome is UNKNOWN and any("given no baseline" in c.check.message for c in alone.checks)
    # With a threshold as well both must hold.
    both = {**rule, "threshold": 100}
    assert run_gate(worse, rules(both), baseline=baseline).outcome is VIOLATED
    assert run_gate(same, rules({**both, "threshold": 0.1}), baseline=baseline).outcome is VIOLATED
    # A baseline of other images is refused.
    other = make_run(tmp_path / "other", hair_enrichment=0.7, differing={"fingerprint": "other"}, **clean)
    with pytest.raises(ValueError, match="its fingerprint of the data: other"):
        run_gate(same, rules(rule), baseline=read_baseline(other))

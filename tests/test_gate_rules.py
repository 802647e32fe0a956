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

from bias_audit.gate.gate import no_evidence, run_gate
from bias_audit.gate.result import GateCheck, GateResult
from bias_audit.policies.file import read_policy
from bias_audit.records.runs import Run, read_run
from bias_audit.records.writing import RunDirectory
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
    from bias_audit.records.results import AuditResult

    return AuditResult(**vars(run.audits[index]), scores=run.scores(index))


def test_evidence_older_than_the_checkpoint_is_stale(growing: Run) -> None:
    holds = rules({**RULE, "max": 100})
    for step, outcome, words in (
        (None, HELD, None),
        (300, UNKNOWN, "the last audit is of step 400, the checkpoint of step 300: not what is to be merged is judged"),
        (400, HELD, None),
        (401, UNKNOWN, "the evidence is stale: the last audit is of step 400, the checkpoint of step 401"),
    ):
        result = run_gate(growing, holds, checkpoint_step=step)
        assert result.outcome is outcome
        assert [words in doubt for doubt in result.doubts if words] == [True] * (words is not None)
    # The checkpoint's own step is judged where a rule says so.
    assert run_gate(growing, rules({**RULE, "max": 100, "at": "checkpoint"}), checkpoint_step=300).outcome is HELD
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
    # It says what is violated all the same, and names the images that it has.
    whole = growing.scores(4)
    directory = RunDirectory.create(tmp_path / "fewer", growing.manifest, growing.sheet())
    fields = ("values", "maps", "magnitude", "areas", "labels", "predictions", "margin")
    axes = {"values": 2, "maps": 1, "magnitude": 1}
    part = {name: np.delete(getattr(whole, name), 0, axis=axes.get(name, 0)) for name in fields}
    scores = replace(whole, ids=whole.ids[1:], **part)
    directory.append(replace(_whole(growing, 4), scores=scores))
    directory.end()
    found = run_gate(read_run(tmp_path / "fewer"), rules(RULE))
    assert found.outcome is VIOLATED and "holds 59 of 60" in found.doubts[0]
    assert found.checks[0].worst and whole.ids[0] not in found.checks[0].worst


def test_what_an_earlier_model_showed_is_no_pass(tmp_path: Path) -> None:
    """Interventions are not made at every audit; what is carried on from before says nothing of this model."""
    clean = {"hair_enrichment": 0.7, "gap": 0.02, "spread": 0.02, "audits": 2, "samples": 40}
    run = read_run(make_run(tmp_path / "run", removal={"hair": 0.01, "face": 0.0}, **clean))
    flips = rules({"metric": "removal_flips", "region": "hair", "max": 0.2})
    verdict = rules({"metric": "verdict", "region": "hair", "op": "==", "threshold": "cleared"})
    assert {run_gate(run, asked).outcome for asked in (flips, verdict)} == {HELD}
    last = run.audits[-1]
    carried = tuple(replace(e, age=1) if e.metric.startswith("removal_") else e for e in last.estimates)
    old = replace(run, audits=(run.audits[0], replace(last, estimates=carried)))
    for asked in (flips, verdict):
        result = run_gate(old, asked)
        assert result.outcome is UNKNOWN
        assert "rests on what was measured at step 100, 1 audits before" in only(result).check.message
    # A violation stays one, and of every audit each measurement is judged once.
    assert run_gate(old, rules({"metric": "removal_flips", "region": "hair", "max": -0.5})).outcome is VIOLATED
    every = run_gate(old, rules({"metric": "removal_flips", "region": "hair", "max": 0.2, "at": "every"}))
    assert [c.check.step for c in every.checks] == [100]
    # A rule that says nothing of any audit is no pass.
    before = tuple(e for e in run.audits[0].estimates if not e.metric.startswith("removal_"))
    alone = replace(old, audits=(replace(run.audits[0], trigger="reference", estimates=before), old.audits[1]))
    result = run_gate(alone, rules({"metric": "removal_flips", "region": "hair", "max": 0.2, "at": "every"}))
    assert result.outcome is UNKNOWN and "measured anew" in only(result).check.message


def test_an_audit_that_failed_in_between(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "one", audits=1, hair_enrichment=0.7, gap=0.02, spread=0.02))
    directory = RunDirectory.create(tmp_path / "run", run.manifest, run.sheet())
    directory.append(_whole(run, 0))
    directory.fail(150, "out of memory")
    directory.append(replace(_whole(run, 0), step=200))
    directory.end()
    found = read_run(tmp_path / "run")
    holds = {**RULE, "max": 100}
    assert run_gate(found, rules(holds)).outcome is HELD
    every = run_gate(found, rules({**holds, "at": "every"}))
    assert (every.outcome, every.doubts) == (UNKNOWN, ("the audit at step 150 failed",))


def test_files_that_are_missing_or_were_changed(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", audits=2, hair_enrichment=0.7, gap=0.02, spread=0.02)
    holds = rules({**RULE, "max": 100})
    assert run_gate(read_run(path), holds).outcome is HELD
    arrays = path / "audits" / "000001.npz"
    whole = arrays.read_bytes()
    arrays.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    with pytest.raises(ValueError, match=r"000001\.npz: its checksum does not match"):
        run_gate(read_run(path), holds)
    arrays.write_bytes(whole)
    (path / "samples.npz").unlink()
    result = run_gate(read_run(path), holds)
    assert result.outcome is UNKNOWN and "samples.npz is missing" in result.doubts[0]


def test_what_is_missing_is_no_pass(growing: Run) -> None:
    """A rule on each class and method holds only if each of them was measured."""
    audit = growing.audits[-1]
    for lacks in (lambda e: e.method == "hirescam", lambda e: e.class_name == "nurse"):
        fewer = replace(audit, estimates=tuple(e for e in audit.estimates if not lacks(e)))
        run = replace(growing, audits=(*growing.audits[:-1], fewer))
        rule = {"metric": "enrichment", "region": "hair", "class": "each", "max": 100}
        assert run_gate(growing, rules(rule)).outcome is HELD
        assert run_gate(run, rules(rule)).outcome is UNKNOWN


def test_an_attribute_with_an_equals_sign(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", audits=1, attributes=(("a=b", ("c", "d")),), regions=(("coat", "object"),))
    result = run_gate(read_run(path), rules({"metric": "verdict", "group": "each", "forbid": ["suspected"]}))
    assert result.outcome is VIOLATED and only(result).check.subject == "verdict on attribute a=b"


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
    broken = replace(broken, _lines=(*growing._lines[:4], growing._lines[1], growing._lines[4]))
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
    # Of compared groups those of the worst one: by value, of a class by value in it, or of each class and value.
    of_all = [[i for i in range(60) if sheet.attributes[i, 0] == value] for value in ("female", "male")]
    of_nurses = [[i for i in rows if sheet.labels[i] == 1] for rows in of_all]
    of_each = [*of_nurses, *([i for i in rows if sheet.labels[i] == 0] for rows in of_all)]
    for groups, rule in (
        (of_all, {"metric": "accuracy_gap", "max": 0.01}),
        (of_nurses, {"metric": "accuracy_gap", "max": 0.01, "class": "nurse"}),
        (of_each, {"metric": "worst_group_accuracy", "min": 0.99}),
    ):
        shares = [float(np.mean([scores.correct[i] for i in rows])) for rows in groups]
        assert sorted(shares)[0] < sorted(shares)[1]
        poorest = groups[shares.index(min(shares))]
        naive = sorted((i for i in poorest if i in wrong), key=lambda i: scores.margin[i])[:5]
        assert naive and worst(group="gender", **rule) == tuple(sheet.ids[i] for i in naive)
    # Where too few have a heatmap at all, those without.
    silent = np.flatnonzero(scores.magnitude[0] == 0)
    assert worst(metric="coverage", region="hair", method="gradcam", op=">", threshold=1.0) == tuple(
        sheet.ids[i] for i in silent[:5]
    )
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
    from bias_audit.gate.baseline_file import read_baseline

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

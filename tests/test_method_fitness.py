"""The explanation methods tested within audits and trainings: what an unfit one decides, and when tests are made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fitness_nets import METHODS, Fixed, Learned, marked
from torch import Tensor
from training import audit_set as scenes
from training import fit, trainer

from bias_audit import AuditDataset, Auditor, AuditPlan, AuditResult, audit_model, read_run, run_gate
from bias_audit.attribution.targets import ClassLogit
from bias_audit.callbacks import BiasAuditCallback
from bias_audit.evidence.fitness import DRAWS
from bias_audit.records.results import AuditSummary
from bias_audit.terms import EXPLAINER_METRICS, Outcome, Verdict

RULES = {
    "rules": [
        {"metric": "verdict", "region": "spurious", "forbid": ["reliance"]},
        {"metric": "enrichment", "region": "mark", "max": 100, "name": "far from the limit"},
        {"metric": "enrichment", "region": "mark", "max": 100, "method": "gradcam", "name": "one method"},
        {"metric": "accuracy", "min": 0.1, "name": "accuracy"},
    ]
}


def outcomes(result: AuditSummary) -> dict[str, set[Outcome]]:
    names = {c.rule for c in result.judgement.checks}
    return {name: {c.outcome for c in result.judgement.checks if c.rule == name} for name in names}


def test_an_unfit_method_is_no_evidence_and_never_a_pass(tmp_path: Path) -> None:
    # What a removal shows needs no heatmap: here nothing is removed.
    result = audit_model(Fixed(), marked(), policy=RULES, plan=AuditPlan(intervention_samples=0), out=tmp_path)
    for method in METHODS:
        assert result.estimate("randomisation_similarity", method=method).value == pytest.approx(1, abs=1e-3)
    (region, attribute) = result.judgement.findings
    assert (region.kind, region.verdict) == ("region", Verdict.INCONCLUSIVE)
    assert "the gradcam maps are unfit as evidence" in region.sentence.lower() and "hirescam" in region.sentence
    assert Verdict.RELIANCE in region.possible
    assert [e.metric for e in region.evidence] == ["accuracy_gap", "randomisation_similarity"]
    # The accuracy differs, whatever the heatmaps are worth; whether they would show more is unknown.
    assert (attribute.kind, attribute.verdict) == ("attribute", Verdict.INCONCLUSIVE)
    assert attribute.possible == (Verdict.RELIANCE, Verdict.SUSPECTED)
    unknown = {Outcome.INCONCLUSIVE}
    assert outcomes(result) == {
        "verdict spurious != reliance": unknown,
        "far from the limit": unknown,
        "one method": unknown,
        "accuracy": {Outcome.HELD},
    }
    run = read_run(tmp_path)
    assert run.audits[0].estimates == result.estimates
    assert run_gate(run).exit_code == 3 and "unfit" in str(run_gate(run).judgement)
    # Untested, or with a filter that is learned, the same maps are evidence.
    for net, samples in ((Fixed(), 0), (Learned(), 16)):
        known = audit_model(
            net, marked(), policy=RULES, plan=AuditPlan(fitness_samples=samples, intervention_samples=0)
        )
        assert known.judgement.findings[0].verdict is Verdict.RELIANCE
        assert known.judgement.outcome is Outcome.VIOLATED
        assert outcomes(known)["far from the limit"] == {Outcome.HELD}


def learned(outputs: int) -> Learned:
    """With one logit or two."""
    net = Learned()
    if outputs == 1:
        net.head.weight.data, net.head.bias.data = torch.tensor([[18.0]]), torch.tensor([-0.4])
    return net


def fitness_of(result: AuditSummary) -> list[tuple[Any, ...]]:
    return [
        (e.metric, e.method, e.value, e.low, e.high, e.n) for e in result.estimates if e.metric in EXPLAINER_METRICS
    ]


def relabelled(labels: Sequence[int]) -> AuditDataset:
    samples = [replace(s, label=int(y)) for s, y in zip(marked().samples, labels, strict=True)]
    return AuditDataset(samples, spurious=["mark"])


@pytest.mark.parametrize("outputs", [1, 2])
def test_what_was_predicted_on_the_whole_image_is_explained_of_each_variant(outputs: int) -> None:
    net = learned(outputs)
    found = audit_model(net, marked(), plan=AuditPlan(target="predicted", fitness_samples=120))
    predicted = found.scores.predictions
    assert 20 < (predicted != marked().labels).sum() < 100
    expected = audit_model(net, relabelled(predicted), plan=AuditPlan(target="label", fitness_samples=120))
    assert fitness_of(found) == fitness_of(expected)
    assert fitness_of(found) != fitness_of(
        audit_model(net, marked(), plan=AuditPlan(target="label", fitness_samples=120))
    )


def test_a_targets_own_score_is_explained() -> None:
    def other_class(labels: Tensor) -> ClassLogit:
        return ClassLogit(1 - labels)

    found = audit_model(learned(2), marked(), plan=AuditPlan(target=other_class, fitness_samples=120))
    expected = audit_model(
        learned(2), relabelled(1 - marked().labels), plan=AuditPlan(target="label", fitness_samples=120)
    )
    # The maps and what occlusion does are of the target's score; the probability is the label's all the same.
    for metric in ("occlusion_correlation", "randomisation_similarity"):
        one, two = (result.estimate(metric, method="gradcam") for result in (found, expected))
        assert (one.value, one.n) == (two.value, two.n) and one.measured
    assert found.estimate("insertion_gain", method="gradcam").value == pytest.approx(
        -(expected.estimate("insertion_gain", method="gradcam").value or 0), abs=1e-6
    )


def test_of_audits_every_nth_tests_the_methods_and_the_others_carry_it_on() -> None:
    auditor = Auditor(scenes(), AuditPlan(fitness_samples=4, fitness_every=3))
    net = Learned()
    results: list[AuditResult] = [auditor.run(net, trigger="reference")]
    assert not any(e.metric in EXPLAINER_METRICS for e in results[0].estimates)
    for step in range(1, 6):
        net.head.weight.data *= 1.1
        results.append(auditor.run(net, step=step, previous=results[-1]))
    tests = [[e for e in r.estimates if e.metric in EXPLAINER_METRICS] for r in results[1:]]
    assert [{e.age for e in test} for test in tests] == [{0}, {1}, {2}, {0}, {1}]
    values = [[e.value for e in test] for test in tests]
    assert values[0] == values[1] == values[2] != values[3] == values[4]
    assert all(len(test) == 12 for test in tests)
    # An audit that knows of none before it tests; the age is read back, and said.
    assert {e.age for e in auditor.run(net).estimates} == {0}
    carried = next(e for e in tests[2] if e.measured)
    assert str(carried).endswith(", 2 audits ago") and "ago" not in str(tests[3][0])
    without = Auditor(scenes(), AuditPlan(fitness_samples=0)).run(net)
    assert not any(e.metric in EXPLAINER_METRICS for e in without.estimates)


def test_the_forward_context_is_entered_for_what_is_tested() -> None:
    depth: list[bool] = []

    class Watched(Learned):
        def forward(self, images: Tensor) -> Tensor:
            depth.append(bool(inside))
            return super().forward(images)

    inside: list[bool] = []

    class Context:
        def __enter__(self) -> None:
            inside.append(True)

        def __exit__(self, *_: Any) -> None:
            inside.pop()

    net = Watched()
    auditor = Auditor(scenes(1), AuditPlan(fitness_samples=2))
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    auditor.run(net, forward_context=Context)
    assert len(depth) > 2 * 2 * DRAWS and all(depth)
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())


@pytest.mark.usefixtures("without_page")
def test_a_training_tests_the_methods_now_and_then_and_at_its_end(tmp_path: Path) -> None:
    plan = AuditPlan(fitness_samples=3, fitness_every=3)
    callback = BiasAuditCallback(scenes(), dirpath=tmp_path / "run", plan=plan)
    fit(trainer(tmp_path, callback, max_epochs=6))
    audits = read_run(tmp_path / "run").audits

    def ages(audit: AuditSummary) -> set[int]:
        return {e.age for e in audit.estimates if e.metric in EXPLAINER_METRICS}

    assert [a.trigger for a in audits] == ["reference", *["validation"] * 6]
    assert [ages(a) for a in audits] == [set(), {0}, {1}, {2}, {0}, {1}, {0}]
    # Another training with the same callback begins anew.
    fit(trainer(tmp_path, callback, max_epochs=2))
    assert [ages(a) for a in read_run(tmp_path / "run").audits] == [set(), {0}, {0}]

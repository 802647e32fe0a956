"""What a user adds: a metric, evidence, an explanation method, each one function, from the audit to the gate."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from planted import biased, clean, write_planted
from torch import Tensor, nn
from training import audit_set as scenes
from training import fit, trainer

from bias_audit import AuditDataset, AuditPlan, Policy, audit_model, read_run, run_gate
from bias_audit.attribution import cam
from bias_audit.attribution.cam import Sign
from bias_audit.callbacks import BiasAuditCallback
from bias_audit.callbacks.wandb.keys import Keys
from bias_audit.data.declared import read_declared
from bias_audit.gate.baseline import Baseline
from bias_audit.gate.compare import compare_runs
from bias_audit.gate.policy_check import check_policy, in_words
from bias_audit.headlines import headlines
from bias_audit.localization import ProjectedRegions, Scored, energy_share
from bias_audit.policies.file import read_policy
from bias_audit.records.samples import SampleScores
from bias_audit.report.compare import render_comparison
from bias_audit.report.page import render
from bias_audit.terms import Estimate, Outcome, Subjects

# The page's own code.
PAGE = (Path(__file__).parents[1] / "docs" / "extend.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
NAMES: dict[str, Any] = {}
for block in BLOCKS:
    exec(block, NAMES)
hottest_cell, margin_gap, strength = NAMES["hottest_cell"], NAMES["margin_gap"], NAMES["strength"]

QUICK = AuditPlan(fitness_samples=0, intervention_samples=0)
PLAN = replace(NAMES["plan"], fitness_samples=0)
POLICY = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[0])


@pytest.fixture(scope="module")
def audit_set(tmp_path_factory: pytest.TempPathFactory) -> AuditDataset:
    return read_declared(write_planted(tmp_path_factory.mktemp("planted"), per_cell=10) / "audit.yaml")


@pytest.fixture(scope="module")
def runs(audit_set: AuditDataset, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    nets: dict[str, Callable[[], nn.Module]] = {"biased": biased, "clean": clean}
    out = tmp_path_factory.mktemp("runs")
    for name, net in nets.items():
        audit_model(net(), audit_set, plan=PLAN, policy=POLICY, out=out / name)
    return {name: out / name for name in nets}


@pytest.mark.parametrize(("name", "expected"), [("biased", Outcome.VIOLATED), ("clean", Outcome.HELD)])
def test_rules_on_what_a_user_measures_decide(runs: dict[str, Path], name: str, expected: Outcome) -> None:
    run = read_run(runs[name])
    checks = {check.rule: check.outcome for check in run.audits[-1].judgement.checks}
    assert set(checks.values()) == {expected}, run.audits[-1].judgement.checks
    assert run_gate(run).outcome is expected


def test_the_metric_is_that_of_a_naive_loop(runs: dict[str, Path], audit_set: AuditDataset) -> None:
    run = read_run(runs["biased"])
    scores = run.scores(-1)
    assert scores.methods == ("gradcam", "strength")
    masks = audit_set.batch(range(len(audit_set))).masks.numpy()
    for m, method in enumerate(scores.methods):
        for region, name in enumerate(scores.regions[:-1]):
            for i, found in enumerate(scores.of("own.hottest_cell", method, name)):
                heatmap = scores.maps[m, i]
                # A 1 x 1 convolution: the grid is the image's own. In the records' 16 bits several may be the hottest.
                assert found in masks[i, region][heatmap == heatmap.max()]


def test_the_evidence_is_in_the_records(runs: dict[str, Path]) -> None:
    run = read_run(runs["biased"])
    margin, corner, leaf = run.scores(-1).margin, run.sheet().attributes[:, 0], run.sheet().labels == 0
    gap = abs(margin[leaf & (corner == "red")].mean() - margin[leaf & (corner == "blue")].mean())
    assert run.audits[-1].estimate("own.margin_gap", group="colour").value == pytest.approx(gap, abs=1e-6)


def test_a_function_is_a_method_like_any_other(runs: dict[str, Path]) -> None:
    e = read_run(runs["clean"]).audits[-1].estimate("own.hottest_cell", region="corner", method="strength")
    # It sees the corner as well as the middle; what the net decides by is the middle alone.
    assert e.value is not None and 0 < e.value < 1


def test_pages_and_words_have_them(runs: dict[str, Path], tmp_path: Path) -> None:
    run = read_run(runs["biased"])
    assert "And by metrics of your own?" in render(run) and "own.hottest_cell" in render(run)
    found = compare_runs(run, read_run(runs["clean"]))
    changed = {d.before.metric for d in found.differences if d.state == "changed"}
    assert {"own.hottest_cell", "own.margin_gap"} <= changed
    assert "own.margin gap by colour" in render_comparison(found)
    (tmp_path / "audit.yaml").write_text("rules:\n  - {metric: own.hottest_cell, region: corner, max: 0.5}\n")
    file = read_policy(tmp_path / "audit.yaml")
    assert in_words(file.policy.rules[0]) == (
        "own.hottest cell on corner, by each explanation method that is fit, must be at most 0.5"
    )
    # Without `method` it must hold for both, and `strength` looks at the corner as well.
    assert len(check_policy(file, run).rules[0].checks) == 2


def test_what_was_not_measured_never_passes(audit_set: AuditDataset, tmp_path: Path) -> None:
    policy = {"rules": [{"metric": "own.hotest_cell", "region": "corner", "max": 0.5}]}
    result = audit_model(clean(), audit_set, plan=PLAN, policy=policy)
    assert result.judgement.outcome is Outcome.INCONCLUSIVE


@pytest.mark.parametrize("metric", ["own.", "own.two words", "owned.by", "enrichmnt"])
def test_names_that_are_none(metric: str, tmp_path: Path) -> None:
    path = tmp_path / "audit.yaml"
    path.write_text(f"rules:\n  - metric: {metric}\n    region: corner\n    max: 1\n")
    with pytest.raises(ValueError, match=r"audit.yaml, line 2: rules.0.metric: unknown metric"):
        read_policy(path)


def unnamed(maps: Tensor, regions: ProjectedRegions) -> Scored:
    return Scored(maps.sum(), maps.sum() > 0)


def misnamed(scores: SampleScores, attributes: object, subjects: Subjects, seed: int) -> Iterator[Estimate]:
    yield Estimate("accuracy", 1.0, 1.0, 1.0, 100)


def test_what_does_not_fit_is_refused(audit_set: AuditDataset) -> None:
    with pytest.raises(ValueError, match=r"metrics: 'hottest_cell' stands twice"):
        AuditPlan(metrics=(hottest_cell, hottest_cell))
    with pytest.raises(ValueError, match=r"metrics: '<lambda>' stands twice or is no name"):
        AuditPlan(metrics=(lambda maps, regions: hottest_cell(maps, regions),))
    with pytest.raises(ValueError, match=r"metrics: functools\.partial\(.*hottest_cell.* has no name"):
        AuditPlan(metrics=(partial(hottest_cell),))
    with pytest.raises(ValueError, match=r"own\.unnamed: expected value and valid of shape \(2, 32, 3\)"):
        audit_model(clean(), audit_set, plan=AuditPlan(metrics=(unnamed,)))
    with pytest.raises(ValueError, match=r"expected a metric called own\.something, got 'accuracy'"):
        audit_model(clean(), audit_set, plan=AuditPlan(evidence=(misnamed,)))
    assert Policy.model_validate(POLICY).rules[0].metric == "own.hottest_cell"


def test_a_rule_on_groups_of_an_own_map_metric_is_refused(audit_set: AuditDataset) -> None:
    rule = {"metric": "own.hottest_cell", "region": "corner", "group": "colour=red", "op": "<=", "threshold": 0.5}
    with pytest.raises(
        ValueError, match=r"own\.hottest_cell.*is broken down to classes, not to groups: remove `group`"
    ):
        audit_model(clean(), audit_set, plan=AuditPlan(metrics=(hottest_cell,)), policy={"rules": [rule]})


def without_flags(maps: Tensor, regions: ProjectedRegions) -> Tensor:
    return energy_share(maps, regions).value


def flags_of_numbers(maps: Tensor, regions: ProjectedRegions) -> tuple[Tensor, Tensor]:
    share, valid = energy_share(maps, regions)
    return share, valid.float()


@pytest.mark.parametrize(("metric", "got"), [(without_flags, "got Tensor"), (flags_of_numbers, "got torch.float32")])
def test_a_metric_that_gives_something_else_is_named(audit_set: AuditDataset, metric: Any, got: str) -> None:
    with pytest.raises(ValueError, match=rf"^own\.{metric.__name__}: expected value and valid of shape .*{got}"):
        audit_model(clean(), audit_set, plan=AuditPlan(metrics=(metric,)))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (None, "expected estimates, got None: yield them"),
        ([0.5], "expected estimates, got 0.5"),
        ([Estimate("own.two words", 0.5, 0.4, 0.6, 40)], "got 'own.two words': rename it, in letters"),
        ([Estimate("own.hottest_cell", 0.0, 0.0, 0.0, 40)], "is one of the plan's `metrics`"),
        ([Estimate("own.e", 0.5, 0.4, 0.6, 40), Estimate("own.e", 0.1, 0.0, 0.2, 40)], "own.e: stands twice"),
        ([Estimate("own.e", 0.5, 0.4, "0.6", 40)], "own.e: expected numbers"),  # type: ignore[arg-type]
        ([Estimate("own.e", 0.5, 0.4, 0.6, -1)], "n a count of images"),
    ],
)
def test_evidence_that_gives_something_else_is_refused(audit_set: AuditDataset, given: Any, said: str) -> None:
    def gather(*_: object) -> Any:
        return given

    plan = replace(QUICK, metrics=(hottest_cell,), evidence=(gather,))
    with pytest.raises(ValueError, match=f"^evidence: .*{re.escape(said)}"):
        audit_model(clean(), audit_set, plan=plan)


def with_a_channel(activations: Tensor, gradients: Tensor, sign: Sign) -> Tensor:
    return activations.abs().mean(dim=1, keepdim=True)


def below_zero(activations: Tensor, gradients: Tensor, sign: Sign) -> Tensor:
    return -activations.abs().mean(dim=1)


def test_maps_that_are_no_heatmaps_are_refused(audit_set: AuditDataset) -> None:
    with pytest.raises(ValueError, match=r"^method with_a_channel: expected maps of shape \(32, 24, 24\) .*1, 24, 24"):
        audit_model(clean(), audit_set, plan=replace(QUICK, methods=("gradcam", with_a_channel)))
    # Their shares of energy would lie anywhere.
    with pytest.raises(ValueError, match=r"^method below_zero: gives maps below 0"):
        audit_model(clean(), audit_set, plan=replace(QUICK, methods=("gradcam", below_zero)))


def test_a_method_has_a_name_of_its_own() -> None:
    def gradcam(activations: Tensor, gradients: Tensor, sign: Sign) -> Tensor:
        return strength(activations, gradients, sign)

    # Pages and baselines would take it for Grad-CAM.
    with pytest.raises(ValueError, match="methods: 'gradcam' is no name, or another's"):
        AuditPlan(methods=(gradcam,))
    with pytest.raises(ValueError, match="methods: '<lambda>' is no name"):
        AuditPlan(methods=(lambda activations, gradients, sign: activations.abs().mean(dim=1),))
    assert AuditPlan(methods=(cam.gradcam, "hirescam")).method_names == ("gradcam", "hirescam")


def test_hits_that_never_vary_are_not_certain(runs: dict[str, Path]) -> None:
    last = read_run(runs["clean"]).audits[-1]
    never = last.estimate("own.hottest_cell", region="corner", method="gradcam")
    always = last.estimate("own.hottest_cell", region="middle", method="gradcam")
    # Of 0 and of 40 hits among 40, by the closed form at the ends: z^2 / (n + z^2).
    miss = 1.959964**2 / (40 + 1.959964**2)
    assert (never.value, never.low, never.high) == pytest.approx((0, 0, miss))
    assert (always.value, always.low, always.high) == pytest.approx((1, 1 - miss, 1))
    # Nor is that nothing changed since a baseline.
    run = read_run(runs["clean"])
    limit = {"metric": "own.hottest_cell", "region": "corner", "method": "gradcam", "op": "<="}
    policy = Policy.model_validate({"rules": [limit | {"max_regression": 0.01}]})
    assert run_gate(run, policy, baseline=Baseline.of_run(run)).outcome is Outcome.INCONCLUSIVE
    policy = Policy.model_validate({"rules": [limit | {"max_regression": 0.1}]})
    assert run_gate(run, policy, baseline=Baseline.of_run(run)).outcome is Outcome.HELD


def ratio(maps: Tensor, regions: ProjectedRegions) -> Scored:
    """The share of a region over that of the corner, which some maps give nothing."""
    share, valid = energy_share(maps, regions)
    return Scored(share / share[..., 1:2], valid)


def test_images_on_which_a_metric_is_infinite_are_not_dropped(audit_set: AuditDataset) -> None:
    policy = {"rules": [{"metric": "own.ratio", "region": "middle", "method": "gradcam", "max": 0.5}]}
    result = audit_model(biased(), audit_set, plan=replace(QUICK, metrics=(ratio,)), policy=policy)
    values = result.scores.of("own.ratio", "gradcam", "middle")
    # The others alone would hold it.
    assert np.isinf(values).sum() == 20 and values[np.isfinite(values)].max() < 0.5
    assert result.judgement.outcome is Outcome.INCONCLUSIVE
    assert "infinite on 20 of the audited images" in result.judgement.checks[0].message


def test_what_draws_random_numbers_leaves_them_as_they_were(audit_set: AuditDataset) -> None:
    def drawn(maps: Tensor, regions: ProjectedRegions) -> Scored:
        share, valid = energy_share(maps, regions)
        return Scored(torch.rand_like(share), valid)

    def permuted(scores: SampleScores, *_: Any) -> list[Estimate]:
        value = float(np.random.default_rng().random() + np.random.rand() + torch.rand(()))  # noqa: NPY002
        return [Estimate("own.permuted", value, value, value, len(scores.ids))]

    net = clean()
    before = torch.get_rng_state(), np.random.get_state()[1]  # noqa: NPY002
    audit_model(net, audit_set, plan=replace(QUICK, metrics=(drawn,), evidence=(permuted,)))
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()  # noqa: NPY002


def test_loggers_and_the_terminal_have_them(runs: dict[str, Path]) -> None:
    run = read_run(runs["biased"])
    estimates, subjects = run.audits[-1].estimates, run.manifest.subjects
    named = {e.subject for e in headlines(estimates)}
    assert {"own.hottest_cell on corner (gradcam)", "own.margin_gap by colour"} <= named
    found = {s.key: s.question for s in Keys("bias_audit", subjects).series(estimates, "gradcam")}
    assert found["bias_audit_2_where_it_looks/own_hottest_cell_corner"] == "where"
    assert found["bias_audit_2_where_it_looks/own_hottest_cell_corner_by_strength"] == "where"
    assert found["bias_audit_4_for_whom/own_margin_gap_colour"] == "whom"


def test_each_is_one_short_file() -> None:
    assert [block.split("\n")[0] for block in BLOCKS] == [
        f"# {name}.py" for name in ("hottest_cell", "margin_gap", "strength", "train", "ledger")
    ]
    assert max(len(block.splitlines()) for block in BLOCKS) < 40


def test_a_sink_gets_what_the_records_have(tmp_path: Path) -> None:
    callback = BiasAuditCallback(scenes(), sinks=[NAMES["Ledger"](tmp_path / "ledger.csv")], dirpath=tmp_path / "run")
    fit(trainer(tmp_path, callback, max_epochs=1))
    run = read_run(tmp_path / "run")
    with (tmp_path / "ledger.csv").open(newline="") as file:
        header, *lines = csv.reader(file)
    assert header == ["step", "outcome", "reliance"]
    assert [line[:2] for line in lines] == [[str(a.step), a.judgement.outcome] for a in run.audits]
    relied_on = [[f.name for f in a.judgement.findings if f.verdict == "reliance"] for a in run.audits]
    assert [line[2].split() for line in lines] == relied_on

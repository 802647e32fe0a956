"""The public names at work, with the types that an editor shows: `make types` has pyright read this file strictly.

`assert_type` does nothing when it runs; pyright fails where the type is another one.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import assert_type

import numpy as np
import numpy.typing as npt
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import bias_audit
import bias_audit.callbacks
from bias_audit import (
    AuditBatch,
    AuditDataset,
    Auditor,
    AuditPlan,
    AuditResult,
    AuditSample,
    Estimate,
    Finding,
    GateResult,
    Heatmaps,
    Metadata,
    Policy,
    Rule,
    Run,
    Verdict,
    attention_penalty,
    audit_model,
    explain,
    read_run,
    rebalancing_plan,
    run_gate,
    write_report,
)
from bias_audit.callbacks import (
    Background,
    BiasAuditCallback,
    BiasViolation,
    ReportSink,
    RunDirectorySink,
    Session,
    Sink,
    WandbSink,
)

PLAN = AuditPlan(layer="net.1", methods=("gradcam",), fitness_samples=0, intervention_samples=0)


class Classifier(pl.LightningModule):
    """Reads the colour, wherever it is."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        return logits

    def training_step(self, batch: AuditBatch, _index: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch.images), batch.labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Ledger:
    """A sink of one's own: any object with these methods."""

    def __init__(self) -> None:
        self.run_id = ""
        self.steps: list[int] = []

    def start(self, session: Session) -> None:
        self.run_id = session.manifest.run_id

    def write(self, result: AuditResult) -> None:
        self.steps.append(result.step)

    def fail(self, step: int, reason: str) -> None:
        raise AssertionError(f"step {step}: {reason}")

    def end(self, error: str = "") -> None:
        assert not error


def picture(label: int, night: bool, number: int) -> AuditSample:
    """A grey picture with a coloured middle, and a corner that is dark at night."""
    image = torch.full((3, 12, 12), 120, dtype=torch.uint8)
    image[label, 4:9, 4:9] = 200 + number
    middle, corner = torch.zeros(2, 12, 12, dtype=torch.bool)
    middle[4:9, 4:9], corner[:3, :3] = True, True
    image[:, :3, :3] = 10 if night else 240
    regions = {"middle": middle, "corner": corner}
    return AuditSample(image, label, regions, {"time": "night" if night else "day"}, f"{label}-{night}-{number}")


@pytest.fixture(scope="module")
def audit_set() -> AuditDataset:
    samples = [picture(label, night, number) for label in (0, 1) for night in (False, True) for number in range(6)]
    return AuditDataset(samples, object=["middle"], spurious=["corner"], classes=["leaf", "petal"])


def test_from_pictures_to_the_gate(audit_set: AuditDataset, tmp_path: Path) -> None:
    policy = Policy(rules=(Rule(metric="accuracy", op=">=", threshold=0.9), *Policy().rules))
    training = Metadata.of([0, 0, 1, 1], {"time": ["day", "day", "night", "night"]})
    pl.seed_everything(0, verbose=False)
    result = audit_model(Classifier(), audit_set, plan=PLAN, policy=policy, training=training, out=tmp_path)
    assert_type(result, AuditResult)
    accuracy = result.estimate("accuracy")
    assert_type(accuracy, Estimate)
    assert_type(accuracy.value, float | None)
    finding = result.judgement.findings[0]
    assert_type(finding, Finding)
    assert_type(finding.verdict, Verdict)
    assert accuracy.n == 24 and finding.verdict in Verdict

    run = read_run(tmp_path)
    assert_type(run, Run)
    judged = run_gate(run)
    assert_type(judged, GateResult)
    assert_type(judged.exit_code, int)
    # An untrained net is right half of the time.
    assert judged.exit_code == 1
    assert_type(write_report(run), Path)


def test_heatmaps_and_the_mask_penalty(audit_set: AuditDataset) -> None:
    batch = audit_set.batch(range(4))
    assert_type(batch, AuditBatch)
    heatmaps = explain(Classifier(), batch.images, target=batch.labels, layer="net.1", method="hirescam")
    assert_type(heatmaps, Heatmaps)
    assert_type(heatmaps.upsample((24, 24)), Tensor)
    assert heatmaps.maps.shape == (4, 12, 12)
    penalty = attention_penalty(Classifier(), batch.images, batch.labels, batch.masks[:, 1], layer="net.1")
    assert_type(penalty, Tensor)
    assert 0 <= penalty.item() <= 1


def test_an_auditor_audits_again_and_again(audit_set: AuditDataset) -> None:
    auditor = Auditor(audit_set, PLAN)
    steps = [auditor.run(Classifier(), step=step).step for step in (1, 2)]
    assert_type(steps, list[int])
    assert steps == [1, 2]


def test_weights_that_make_label_and_value_independent() -> None:
    plan = rebalancing_plan([0, 0, 0, 1, 1], ["day", "day", "night", "night", "day"])
    assert_type(plan.weights, npt.NDArray[np.float64])
    assert plan.weights.tolist() == pytest.approx([0.9, 0.9, 1.2, 0.8, 1.2]) and not plan.empty


def test_a_training_with_a_sink_of_ones_own(audit_set: AuditDataset, tmp_path: Path) -> None:
    ledger, behind = Ledger(), Ledger()
    sinks: list[Sink] = [ledger, Background(behind)]
    callback = BiasAuditCallback(audit_set, plan=PLAN, every_n_steps=2, sinks=sinks, dirpath=tmp_path / "run")
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[callback],
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Classifier(), DataLoader(audit_set, batch_size=6, collate_fn=AuditBatch.collate))
    assert_type(callback.last_result, AuditResult | None)
    assert ledger.steps == behind.steps == [audit.step for audit in read_run(tmp_path / "run").audits]
    assert ledger.run_id == read_run(tmp_path / "run").manifest.run_id


def test_what_the_callback_itself_sends_to_are_sinks() -> None:
    records: Sink = RunDirectorySink()
    page: Sink = ReportSink()
    to_wandb: type[Sink] = WandbSink
    assert records and page and to_wandb and issubclass(BiasViolation, Exception)


def test_no_public_name_is_missing_here() -> None:
    imported = {
        alias.name
        for node in ast.walk(ast.parse(Path(__file__).read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bias_audit")
        for alias in node.names
    }
    assert imported == {*bias_audit.__all__, *bias_audit.callbacks.__all__}

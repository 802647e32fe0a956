"""The doctor/nurse case of the Grad-CAM paper (arXiv 1610.02391, section 6.3), trained and audited before your eyes.

Enters: a directory and a seed. Leaves: the run directories `biased` and `balanced` in it. Two networks alike are
trained on generated scenes: one where 78 % of the doctors are men and 93 % of the nurses women, as in the paper, one
where it is half and half. Both are audited on the same gender-balanced scenes while they train, and the gate judges
both.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import RichProgressBar
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import v2

from bias_audit.callbacks import BiasAuditCallback
from bias_audit.data.dataset import AuditDataset
from bias_audit.data.metadata import Metadata
from bias_audit.data.painting import REGIONS
from bias_audit.data.scenes import GENDERS, OCCUPATIONS, Scene, balanced_scenes, counts_with_bias, draw_scenes
from bias_audit.gate.gate import run_gate
from bias_audit.gate.result import GateResult
from bias_audit.plan import AuditPlan
from bias_audit.records.results import AuditSummary
from bias_audit.records.runs import Run, read_run
from bias_audit.wording import interval

SIZE = 96
PER_CLASS = 1000
EPOCHS = 7
AUDITED_PER_CELL = 250
# Shares of men among the doctors and of women among the nurses.
DATA = {"biased": (0.78, 0.93), "balanced": (0.5, 0.5)}

TRANSFORM = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.25] * 3)])


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return convolution, nn.BatchNorm2d(outputs), nn.ReLU()


class SceneClassifier(pl.LightningModule):
    """A small network: three convolutions, one that mixes channels only, global pooling and one linear layer.

    What a place of its 12 x 12 map has seen is 23 pixels wide, so a heatmap can tell hair from coat.
    """

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_convolution(3, 16, kernel=5, stride=2),
            *_convolution(16, 32, kernel=3),
            nn.MaxPool2d(2),
            *_convolution(32, 64, kernel=3),
            nn.MaxPool2d(2),
            *_convolution(64, 64, kernel=1),
        )
        self.head = nn.Linear(64, len(OCCUPATIONS))
        self.steps = steps

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(B, 2)`."""
        logits: Tensor = self.head(self.features(images).mean(dim=(2, 3)))
        return logits

    def training_step(self, batch: list[Tensor], _index: int) -> Tensor:
        """Cross-entropy."""
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels)

    def configure_optimizers(self) -> Any:
        """AdamW under one cycle of the learning rate."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=4e-3, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@dataclass(frozen=True)
class DemoRun:
    """One training of the demo: its run read back and what the gate says of it."""

    name: str
    run: Run
    result: GateResult


def run_demo(out: Path, seed: int, console: Console) -> tuple[DemoRun, ...]:
    """Train, audit and judge both; prints progress and a closing table, and returns what the table says.

    Raises:
        OSError: `out` cannot be written.
    """
    audit_seed, *training_seeds = (int(s) for s in torch.randint(2**31, (3,), generator=_generator(seed)))
    console.print(f"Drawing {4 * AUDITED_PER_CELL} scenes to audit on, as many men as women in both occupations.")
    audit_set = balanced_scenes(AUDITED_PER_CELL, audit_seed, SIZE, TRANSFORM)
    runs = []
    for (name, shares), training_seed in zip(DATA.items(), training_seeds, strict=True):
        men, women = (f"{100 * share:.0f} %" for share in shares)
        console.print(f"\nTraining [bold]{name}[/bold]: {men} of the doctors are men, {women} of the nurses are women.")
        _train(out / name, shares, training_seed, audit_set)
        run = read_run(out / name)
        runs.append(DemoRun(name, run, run_gate(run)))
    console.print()
    console.print(_closing_table(runs))
    for demo_run in runs:
        console.print(f"page of {demo_run.name}: {(demo_run.run.path / 'report.html').resolve()}", soft_wrap=True)
    console.print(f"Try: bias-audit gate {out / 'biased'}; echo $?", highlight=False, soft_wrap=True)
    return tuple(runs)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _train(path: Path, shares: tuple[float, float], seed: int, audit_set: AuditDataset) -> None:
    scenes = draw_scenes(counts_with_bias(PER_CLASS, *shares), seed, SIZE)
    images = TRANSFORM(torch.stack([torch.from_numpy(scene.image.copy()) for scene in scenes]))
    labels = torch.tensor([OCCUPATIONS.index(scene.occupation) for scene in scenes])
    loader = DataLoader(
        TensorDataset(images, labels), batch_size=32, shuffle=True, generator=_generator(seed), drop_last=True
    )
    pl.seed_everything(seed, verbose=False)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        # Lightning's advice on loaders, and the audit's own warnings, which the closing table repeats.
        warnings.simplefilter("ignore", UserWarning)
        plan = AuditPlan(batch_size=100, max_samples=len(audit_set))
        trainer = pl.Trainer(
            max_epochs=EPOCHS,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            callbacks=[
                RichProgressBar(),
                BiasAuditCallback(audit_set, dirpath=path, plan=plan, training=_metadata(scenes)),
            ],
        )
        trainer.fit(SceneClassifier(EPOCHS * len(loader)), loader)


def _metadata(scenes: Sequence[Scene]) -> Metadata:
    labels = [OCCUPATIONS.index(scene.occupation) for scene in scenes]
    return Metadata.of(labels, {"gender": [scene.gender for scene in scenes]})


def _cell(audit: AuditSummary, metric: str, **names: str) -> str:
    try:
        e = audit.estimate(metric, **names)
    except KeyError:
        # Where no value goes with a class, there is no accuracy with and against it.
        return "–"
    return interval(e, 2)


def _closing_table(runs: list[DemoRun]) -> Table:
    table = Table(title="What the audits say", title_justify="left")
    table.add_column("")
    for run in runs:
        table.add_column(run.name)
    last = [run.run.audits[-1] for run in runs]

    def row(title: str, metric: str, **names: str) -> None:
        table.add_row(title, *(_cell(audit, metric, **names) for audit in last))

    row("accuracy", "accuracy")
    for occupation in OCCUPATIONS:
        for gender in GENDERS:
            row(f"  {gender} {occupation}s", "accuracy", class_name=occupation, group=f"gender={gender}")
    table.add_section()
    for region in REGIONS:
        row(f"energy share on {region}", "energy_share", region=region, method="gradcam")
    for region in REGIONS:
        row(f"enrichment on {region} (1 = chance)", "enrichment", region=region, method="gradcam")
    table.add_section()
    for region in runs[0].run.manifest.subjects.regions_with("spurious"):
        row(f"part of the margin that {region} carries as to gender", "removal_contrast", region=region, group="gender")
    row("accuracy lost where gender conflicts with the class", "alignment_gap", group="gender")
    row("association of gender and label in training (V)", "cramers_v", group="gender")
    table.add_section()
    for index, finding in enumerate(last[0].judgement.findings):
        verdicts = [audit.judgement.findings[index].verdict for audit in last]
        table.add_row(finding.subject, *verdicts)
    table.add_row("gate", *(f"[bold]{run.result.outcome} (exit code {run.result.exit_code})[/bold]" for run in runs))
    return table

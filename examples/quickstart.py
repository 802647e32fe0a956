"""The shortest way to an audit: a network learns doctors and nurses from biased scenes, and the gate is asked.

python examples/quickstart.py            # half a minute; then open runs/quickstart/bias_audit/report.html
bias-audit gate runs/quickstart          # exit code 1: it relies on the hair
"""

from __future__ import annotations

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bias_audit import read_run, run_gate
from bias_audit.callbacks import BiasAuditCallback
from bias_audit.data.metadata import Metadata
from bias_audit.data.scenes import OCCUPATIONS, balanced_scenes, counts_with_bias, draw_scenes


class Classifier(pl.LightningModule):
    """Any LightningModule whose forward gives logits `(B, classes)`."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Conv2d(3, 24, 5, stride=2, padding=2), nn.ReLU()),
            *(nn.Conv2d(24, 48, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Conv2d(48, 64, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, len(OCCUPATIONS))),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        return self.net(4 * images - 2)

    def training_step(self, batch: list[Tensor], _index: int) -> Tensor:
        """Cross-entropy."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=2e-3)


def main() -> None:
    """Train with the callback, then ask the gate."""
    pl.seed_everything(0)
    scenes = draw_scenes(counts_with_bias(300, male_doctors=0.93, female_nurses=0.93), seed=0)
    images = torch.stack([torch.from_numpy(scene.image.copy()) for scene in scenes]).float() / 255
    labels = torch.tensor([OCCUPATIONS.index(scene.occupation) for scene in scenes])
    train = DataLoader(TensorDataset(images, labels), batch_size=32, shuffle=True)

    # How gender and class go together in the training data.
    training = Metadata.of(labels.tolist(), {"gender": [scene.gender for scene in scenes]})

    # Held-out images, with the regions that may matter and those that must not: as many men as women in both classes.
    audit_set = balanced_scenes(per_cell=75, seed=1)

    trainer = pl.Trainer(
        max_epochs=8,
        logger=False,
        enable_checkpointing=False,
        default_root_dir="runs/quickstart",
        callbacks=[BiasAuditCallback(audit_set, training=training)],
    )
    trainer.fit(Classifier(), train)

    run = read_run("runs/quickstart")
    for finding in run.audits[-1].judgement.findings:
        print(f"{finding.kind} {finding.name}: {finding.verdict}. {finding.sentence}")
    print(f"gate: {run_gate(run).outcome}; page: {run.path / 'report.html'}")


if __name__ == "__main__":
    main()

"""The callback from a LightningCLI config: nothing about the audit is in the code.

python examples/lightning_cli/train.py fit --config examples/lightning_cli/config.yaml
"""

from __future__ import annotations

import pytorch_lightning as pl
import torch
from pytorch_lightning.cli import LightningCLI
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bias_audit.data.scenes import OCCUPATIONS, counts_with_bias, draw_scenes


class Scenes(pl.LightningDataModule):
    """Generated scenes, `per_class` of each occupation."""

    def __init__(self, per_class: int = 100, male_doctors: float = 0.78, female_nurses: float = 0.93) -> None:
        super().__init__()
        self.counts = counts_with_bias(per_class, male_doctors, female_nurses)

    def train_dataloader(self) -> DataLoader:
        """Batches of 32."""
        scenes = draw_scenes(self.counts, seed=0)
        images = torch.stack([torch.from_numpy(scene.image.copy()) for scene in scenes]).float() / 255
        labels = torch.tensor([OCCUPATIONS.index(scene.occupation) for scene in scenes])
        return DataLoader(TensorDataset(images, labels), batch_size=32, shuffle=True)


class Classifier(pl.LightningModule):
    """Three convolutions, pooling, one linear layer."""

    def __init__(self, width: int = 32, lr: float = 3e-3) -> None:
        super().__init__()
        self.lr = lr
        self.features = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(width, len(OCCUPATIONS))

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.features(images).mean(dim=(2, 3)))

    def training_step(self, batch: list[Tensor], _index: int) -> Tensor:
        """Cross-entropy."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=self.lr)


if __name__ == "__main__":
    LightningCLI(Classifier, Scenes, save_config_kwargs={"overwrite": True})

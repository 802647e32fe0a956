"""A small training for tests of the callback: a network with BatchNorm and dropout on a few generated scenes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as lp
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from bias_audit import AuditDataset
from bias_audit.data.scenes import GENDERS, OCCUPATIONS, balanced_scenes, draw_scenes

SIZE = 32


def cells(count: int) -> dict[tuple[str, str], int]:
    return {(o, g): count for o in OCCUPATIONS for g in GENDERS}


def audit_set(count: int = 3, seed: int = 7) -> AuditDataset:
    return balanced_scenes(count, seed, SIZE)


class Augmented(Dataset[tuple[Tensor, int]]):
    """Scenes with noise from the global generator, as many users' augmentations draw it."""

    def __init__(self, count: int = 8) -> None:
        self.scenes = draw_scenes(cells(count), 1, SIZE)

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        scene = self.scenes[index]
        image = torch.from_numpy(scene.image.copy()).float() / 255
        return image + 0.05 * torch.randn(image.shape), OCCUPATIONS.index(scene.occupation)


class Net(pl.LightningModule):
    """Convolutions, BatchNorm, dropout, an in-place ReLU behind the explained layer, and a hidden layer."""

    def __init__(self, manual: bool = False) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 8, 3, stride=2),
        )
        self.act = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
        self.automatic_optimization = not manual

    def forward(self, images: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.dropout(self.act(self.features(images)).mean(dim=(2, 3))))
        return outputs

    def training_step(self, batch: list[Tensor], _index: int) -> Tensor | None:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        if self.automatic_optimization:
            return loss
        optimizers: Any = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()
        return None

    def validation_step(self, batch: list[Tensor], _index: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        if self.automatic_optimization:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)
        return (
            torch.optim.AdamW(self.features.parameters(), lr=1e-2),
            torch.optim.SGD(self.head.parameters(), lr=1e-2, momentum=0.9),
        )


class Wrapped(lp.LightningModule):
    """`Net` for the other package's Trainer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, images: Tensor) -> Tensor:
        outputs: Tensor = self.net(images)
        return outputs

    def training_step(self, batch: list[Tensor], _index: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-2)


def loader(count: int = 8, shuffle: bool = True) -> DataLoader[Any]:
    return DataLoader(Augmented(count), batch_size=8, shuffle=shuffle)


def batches() -> DataLoader[Any]:
    """Four of random images: a step each."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(8, 3, 32, 32, generator=generator)
    return DataLoader(TensorDataset(images, torch.arange(8) % 2), batch_size=2)


def fit(
    trainer: pl.Trainer, net: Net | Callable[[], Net] = Net, *, seed: int = 0, validate: bool = True, **options: Any
) -> Net:
    """Train a net, made after seeding if it is not made yet: 4 batches an epoch."""
    pl.seed_everything(seed, verbose=False)
    net = net if isinstance(net, Net) else net()
    trainer.fit(net, loader(), loader(2, shuffle=False) if validate else None, **options)
    return net


def trainer(tmp_path: Any, *callbacks: Any, **options: Any) -> pl.Trainer:
    settings: dict[str, Any] = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
    }
    return pl.Trainer(callbacks=list(callbacks), **(settings | options))

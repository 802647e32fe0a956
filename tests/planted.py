"""Colour pictures of which two nets made by hand decide: one by the corner, one by the middle.

The middle is the object: green for one class, magenta for the other. The corner is red or blue, whatever the class; in
the training set its colour goes with the class. Pictures, masks and tables are written as files for `bias-audit run`.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from torch import Tensor, nn

SIDE, CORNER, MIDDLE = 24, slice(2, 9), slice(10, 20)
CLASSES = {"leaf": (0.1, 0.9, 0.1), "petal": (0.9, 0.1, 0.9)}
CORNERS = {"blue": (0.1, 0.1, 0.9), "red": (0.9, 0.1, 0.1)}
DATA = """\
reader: folder
images: images
masks: masks
labels: labels.csv
object: [middle]
spurious: [corner]
"""


class Planted(pl.LightningModule):
    """Four colours, each told by one channel; `on_corner` is how much the corner's count against the middle's."""

    def __init__(self, on_corner: float = 0.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.colours = nn.Conv2d(3, 4, 1)
        self.seen = nn.ReLU()
        self.head = nn.Linear(4, 2)
        with torch.no_grad():
            # Red, blue, green, magenta.
            mixed = torch.tensor([[1.0, -1, -1], [-1, -1, 1], [-1, 1, -1], [1, -1, 1]])
            self.colours.weight.copy_(mixed[:, :, None, None])
            self.colours.bias.copy_(torch.tensor([0.0, 0, 0, -1]))
            vote = torch.tensor([on_corner, -on_corner, on_corner - 1, 1 - on_corner])
            self.head.weight.copy_(20 * torch.stack([-vote, vote]))
            self.head.bias.zero_()

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.seen(self.colours(images)).mean(dim=(2, 3)))


def biased() -> Planted:
    return Planted(on_corner=0.9)


def clean() -> Planted:
    return Planted()


def write_planted(root: Path, per_cell: int = 40, seed: int = 0) -> Path:
    """Pictures, masks, `labels.csv`, `training.csv`, `audit.yaml` and a checkpoint of each net, below `root`."""
    rng = np.random.default_rng(seed)
    for folder in ("images", "masks/middle", "masks/corner"):
        (root / folder).mkdir(parents=True)
    rows = []
    for label, colour in CLASSES.items():
        for corner, of_corner in CORNERS.items():
            for number in range(per_cell):
                name = f"{label}-{corner}-{number}.png"
                picture = np.full((SIDE, SIDE, 3), 0.45) + rng.normal(0, 0.03, (SIDE, SIDE, 3))
                picture[MIDDLE, MIDDLE] = np.array(colour) * rng.uniform(0.8, 1)
                picture[CORNER, CORNER] = np.array(of_corner) * rng.uniform(0.8, 1)
                _save(root / "images" / name, picture)
                for region, where in (("middle", MIDDLE), ("corner", CORNER)):
                    mask = np.zeros((SIDE, SIDE))
                    mask[where, where] = 1
                    _save(root / "masks" / region / name, mask)
                rows.append((name, label, corner))
    _table(root / "labels.csv", ("file", "label", "colour"), rows)
    goes = {"leaf": "blue", "petal": "red"}
    other = {"leaf": "red", "petal": "blue"}
    trained = [(c, goes[c]) for c in CLASSES for _ in range(95)] + [(c, other[c]) for c in CLASSES for _ in range(5)]
    _table(root / "training.csv", ("label", "colour"), trained)
    (root / "audit.yaml").write_text(DATA)
    for net in (biased, clean):
        save_checkpoint(root / f"{net.__name__}.ckpt", net())
    return root


def save_checkpoint(path: Path, net: Planted, step: int = 70, **more: Any) -> Path:
    """A checkpoint as a Trainer would have saved it at `step`."""
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(net)
    trainer.save_checkpoint(path)
    torch.save(torch.load(path, weights_only=True) | {"global_step": step, "epoch": 7} | more, path)
    return path


def _save(path: Path, values: Any) -> None:
    Image.fromarray((values.clip(0, 1) * 255).astype(np.uint8)).save(path)


def _table(path: Path, header: tuple[str, ...], rows: list[Any]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])

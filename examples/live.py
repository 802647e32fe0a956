"""A training to watch: for a few minutes a model learns to read gender off the face, and then has to unlearn it.

python examples/live.py                  # prints the page's address; open it, it keeps itself up to date
python examples/live.py --epochs 4       # shorter

Doctors and nurses as in section 6.3 of the Grad-CAM paper (arXiv 1610.02391): for the first half of the training most
doctors are men and most nurses women; for the second half it is half and half. The page shows when the reliance sets
in, on which images, and what becomes of it once the data are mended.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from bias_audit import AuditPlan
from bias_audit.callbacks import BiasAuditCallback
from bias_audit.data.scenes import OCCUPATIONS, balanced_scenes, counts_with_bias, draw_scenes, swap_gender
from bias_audit.demo import SIZE, TRANSFORM, SceneClassifier

BIASED, BALANCED = (0.78, 0.93), (0.5, 0.5)


class Scenes(pl.LightningDataModule):
    """New scenes for each epoch: biased ones for the first half of the training, balanced ones for the second."""

    def __init__(self, per_class: int) -> None:
        super().__init__()
        self.per_class = per_class

    def train_dataloader(self) -> DataLoader[tuple[torch.Tensor, ...]]:
        """The epoch's scenes."""
        assert self.trainer is not None and self.trainer.max_epochs is not None
        epoch = self.trainer.current_epoch
        shares = BIASED if epoch < self.trainer.max_epochs / 2 else BALANCED
        scenes = draw_scenes(counts_with_bias(self.per_class, *shares), seed=epoch, size=SIZE)
        images = TRANSFORM(torch.stack([torch.from_numpy(scene.image.copy()) for scene in scenes]))
        labels = torch.tensor([OCCUPATIONS.index(scene.occupation) for scene in scenes])
        return DataLoader(TensorDataset(images, labels), batch_size=32, shuffle=True, drop_last=True)


def main() -> None:
    """Train, and say where to look."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--per-class", type=int, default=500, help="scenes of each class in an epoch")
    parser.add_argument("--audited", type=int, default=60, help="audited scenes of each gender in each class")
    parser.add_argument("--out", type=Path, default=Path("runs/live"))
    options = parser.parse_args()

    pl.seed_everything(0)
    steps = options.epochs * (2 * options.per_class // 32)
    audit = BiasAuditCallback(
        balanced_scenes(options.audited, seed=1, size=SIZE, transform=TRANSFORM),
        every_n_steps=max(1, steps // 40),
        plan=AuditPlan(batch_size=80, intervention_every=5, swaps={"gender": swap_gender}),
        dirpath=options.out,
    )
    print(f"Open {(options.out / 'report.html').resolve().as_uri()} once the first audit is done.")
    trainer = pl.Trainer(
        max_epochs=options.epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        reload_dataloaders_every_n_epochs=1,
        callbacks=[audit],
    )
    trainer.fit(SceneClassifier(steps), datamodule=Scenes(options.per_class))


if __name__ == "__main__":
    main()

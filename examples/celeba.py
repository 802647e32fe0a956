"""CelebA: a network that should see blond hair sees women, because hardly a blond man is in its training set.

Of CelebA's 162,770 training faces 15 % are blond, and 1,387 are of blond men; the worst group of networks that are
simply trained on it is the blond men (Sagawa et al., arXiv 1911.08731; 40 to 60 points worse than on average, arXiv
2112.04094). "Male" is what the data set's annotators said of a face.

Without --data it draws a small stand-in of the same layout: made faces with the data set's shares of hair colours and
of men, read by the same reader. What to expect then, after half a minute on one core: reliance on the face and on Male,
and a gate that is violated.

    python examples/celeba.py
    python examples/celeba.py --data DATA --network resnet18 --size 128 --epochs 2

DATA holds `celeba/` as torchvision unpacks it. Hair and face are drawn around its five landmarks, so they are coarse.
The audit takes as many faces of each hair colour and gender, or it would see five blond men.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pytorch_lightning as pl
import torch
import torchvision
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.ops import Conv2dNormActivation
from torchvision.transforms import v2

from bias_audit import AuditBatch, AuditDataset, AuditPlan, Run, read_run, run_gate
from bias_audit.callbacks import BiasAuditCallback
from bias_audit.data.public import ALIGNED, celeba

# Of the stand-in: training faces, the share of blond ones, and the share of men among blond and other faces in CelebA.
TRAINING, BLOND, MEN = 800, 0.15, (0.057, 0.48)
# Faces of each hair colour and gender that are audited.
PER_CELL = 80
# x and y of the eyes, the nose and the corners of the mouth, as CelebA's faces are aligned.
LANDMARKS = np.array([[69, 111], [108, 111], [88, 136], [72, 152], [105, 152]])

Colour = tuple[float, float, float]


def draw_face(rng: np.random.Generator, blond: bool, male: bool) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """A face `(218, 178, 3)` and its landmarks `(5, 2)`; men have beards, women red lips, and both have any haircut."""
    height, width = ALIGNED
    points = LANDMARKS + rng.integers(-3, 4, 2)
    (left, right, nose, *corners), middle = points.tolist(), int(points[:, 0].mean())
    light, image = rng.normal(1, 0.12), np.empty((height, width, 3))
    image[:] = rng.uniform(60, 200, 3)

    def shade(colour: Colour, spread: float = 10) -> Colour:
        red, green, blue = (light * (np.array(colour) + rng.normal(0, spread, 3))).tolist()
        return red, green, blue

    skin = shade((205, 160, 130), 14)
    # Some hair is hard to tell: dark blond, or light brown.
    tone = rng.normal(0.72 if blond else 0.28, 0.16)
    hair = shade(tuple(np.array([70, 50, 35]) + tone * np.array([170, 145, 90])))
    cv2.ellipse(image, (middle, 112), (64, 74), 0, 180, 360, hair, -1)
    long = int(rng.integers(0, 70))
    for side in (-58, 42):
        cv2.rectangle(image, (middle + side, 110), (middle + side + 16, 112 + long), hair, -1)
    cv2.ellipse(image, (middle, 126), (43, 56), 0, 0, 360, skin, -1)
    if male:
        cv2.ellipse(image, (middle, 148), (36, 32), 0, 0, 180, shade((75, 58, 48)), -1)
    for eye in (left, right):
        cv2.ellipse(image, eye, (9, 5), 0, 0, 360, (240, 240, 240), -1)
        cv2.circle(image, eye, 4, (40, 30, 30), -1)
        cv2.line(image, (eye[0] - 10, eye[1] - 12), (eye[0] + 10, eye[1] - 12), shade((80, 60, 50)), 5 if male else 2)
    cv2.line(image, (nose[0], nose[1] - 16), nose, shade((180, 130, 105)), 3)
    lips = shade((165, 110, 95) if male else (190, 45, 65))
    cv2.ellipse(image, ((corners[0][0] + corners[1][0]) // 2, corners[0][1]), (17, 6), 0, 0, 360, lips, -1)
    image += rng.normal(0, 12, image.shape)
    return image.clip(0, 255).astype(np.uint8), points


def write_stand_in(folder: Path, seed: int = 0) -> None:
    """`celeba/` with pictures and tables: training faces with CelebA's shares, and as many of each kind to audit on."""
    rng = np.random.default_rng(seed)
    faces = [(hair, bool(rng.random() < MEN[not hair]), 0) for hair in rng.random(TRAINING) < BLOND]
    faces += [(hair, male, 1) for hair in (True, False) for male in (True, False) for _ in range(PER_CELL)]
    (folder / "celeba" / "img_align_celeba").mkdir(parents=True, exist_ok=True)
    # The reader wants CelebA's forty attributes; those that nobody asks for are all absent here.
    names = [*(f"Attribute_{i}" for i in range(38)), "Blond_Hair", "Male"]
    points = " ".join(
        f"{p}_{axis}" for p in ("lefteye", "righteye", "nose", "leftmouth", "rightmouth") for axis in "xy"
    )
    attributes, landmarks, splits = [str(len(faces)), " ".join(names)], [str(len(faces)), points], []
    for number, (hair, male, part) in enumerate(faces, start=1):
        name = f"{number:06d}.jpg"
        image, where = draw_face(rng, bool(hair), male)
        cv2.imwrite(str(folder / "celeba" / "img_align_celeba" / name), image[:, :, ::-1])
        attributes.append(f"{name} {'-1 ' * 38}{1 if hair else -1} {1 if male else -1}")
        landmarks.append(f"{name} {' '.join(map(str, where.flatten()))}")
        splits.append(f"{name} {part}")
    for table, lines in (
        ("attr_celeba", attributes),
        ("landmarks_align_celeba", landmarks),
        ("eval_partition", splits),
    ):
        (folder / "celeba" / f"list_{table}.txt").write_text("\n".join(lines) + "\n")


class HairClassifier(pl.LightningModule):
    """One logit: positive where the hair is blond."""

    def __init__(self, steps: int, name: str = "") -> None:
        super().__init__()
        self.steps = steps
        # The small one's last map has 8 x 8 places of a picture of 64 x 64: enough for the stand-in.
        self.net: nn.Module = nn.Sequential(
            Conv2dNormActivation(3, 16, stride=2),
            Conv2dNormActivation(16, 32, stride=2),
            Conv2dNormActivation(32, 64, stride=2),
            Conv2dNormActivation(64, 64),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(64, 1),
        )
        if name:
            self.net = torchvision.models.get_model(name, num_classes=1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(B, 1)`."""
        return self.net(images)

    def training_step(self, batch: AuditBatch, _index: int) -> Tensor:
        """Binary cross-entropy."""
        return nn.functional.binary_cross_entropy_with_logits(self(batch.images)[:, 0], batch.labels.float())

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW under one cycle of the learning rate."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def faces(data: Path, split: str, size: int) -> AuditDataset:
    """One split of the data set, with hair, face and what was said of the gender; also what is trained on."""
    transform = v2.Compose(
        [v2.Resize((size, size)), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.25] * 3)]
    )
    return celeba(data, split=split, transform=transform)


def evenly(found: AuditDataset, per_cell: int, seed: int) -> AuditDataset:
    """At most so many faces of each hair colour and gender."""
    cells = [f"{label} {values}" for label, values in zip(found.labels, found.attribute_table, strict=True)]
    order = np.random.default_rng(seed).permutation(len(cells)).tolist()
    chosen = [i for cell in sorted(set(cells)) for i in [i for i in order if cells[i] == cell][:per_cell]]
    return found.select(chosen)


def train_and_audit(data: Path, out: Path, network: str, size: int, epochs: int, seed: int) -> Run:
    """Train on the training set, audit on the validation set after every third epoch; the records lie below `out`."""
    pl.seed_everything(seed)
    training = faces(data, "train", size)
    loader = DataLoader(training, batch_size=32, shuffle=True, drop_last=True, collate_fn=AuditBatch.collate)
    audit = BiasAuditCallback(
        evenly(faces(data, "valid", size), PER_CELL, seed),
        every_n_epochs=3,
        plan=AuditPlan(batch_size=64),
        training=training,  # how hair and gender go together in it
    )
    trainer = pl.Trainer(
        max_epochs=epochs, logger=False, enable_checkpointing=False, default_root_dir=out, callbacks=[audit]
    )
    trainer.fit(HairClassifier(epochs * len(loader), network), loader)
    return read_run(out)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="holds celeba/; by default a stand-in is drawn")
    parser.add_argument("--network", default="", help="of torchvision; by default a small one")
    parser.add_argument("--size", type=int, default=64, help="pixels on a side")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/celeba"))
    options = parser.parse_args()
    data = options.data or options.out / "data"
    if options.data is None:
        write_stand_in(data, options.seed)
    run = train_and_audit(data, options.out, options.network, options.size, options.epochs, options.seed)
    last = run.audits[-1]
    for estimate in last.estimates:
        if estimate.metric == "accuracy" and estimate.class_name and estimate.group:
            print(estimate)
    for finding in last.judgement.findings:
        print(f"{finding.kind} {finding.name}: {finding.verdict}. {finding.sentence}")
    print(f"gate: {run_gate(run).outcome}; page: {run.path / 'report.html'}")


if __name__ == "__main__":
    main()

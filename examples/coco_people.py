"""Real photographs: does a fine-tuned ImageNet network tell sports from domestic scenes by the person in them?

94 COCO photographs with person and object masks, and gender as caption writers perceived it. Two questions, of which
each run answers one:

    scene     label sports | domestic, attribute gender; objects: sports and household things; spurious: the person.
    gender    label man | woman, attribute scene; object: the person; spurious: the things (after arXiv 1803.09797).

Half of the photographs train a MobileNetV1 x 0.25 with ImageNet weights, the other half is audited. That is few: an
honest audit may well end inconclusive, and says how many photographs would settle it.

    python examples/coco_people.py --task scene --data ../shared/data

DATA holds `coco_people/` (images/, instances.json, labels_scene.csv, labels_gender.csv) and `mobilenetv1_025/`, the
weights. Neither comes with this repository; without them nothing is run.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pytorch_lightning as pl
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import v2

from bias_audit import AuditDataset, Run, read_run, run_gate
from bias_audit.callbacks import BiasAuditCallback

THINGS = ["sports", "kitchen", "furniture"]
TRANSFORM = v2.Compose(
    [
        v2.Resize((224, 224)),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ]
)


def photographs(task: str, data: Path) -> AuditDataset:
    """All photographs of a task with their regions, masks and attributes."""
    folder = data / "coco_people"
    person, things = {"person": ["person"]}, {"things": THINGS}
    return AuditDataset.from_coco(
        folder / "instances.json",
        folder / "images",
        labels=folder / f"labels_{task}.csv",
        object=things if task == "scene" else person,
        spurious=person if task == "scene" else things,
        minus={"things": ["person"]},
        transform=TRANSFORM,
    )


def separable(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """A depthwise and a pointwise convolution, each with BatchNorm and a leaky ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False),
        nn.BatchNorm2d(inputs),
        nn.LeakyReLU(0.1),
        nn.Conv2d(inputs, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.LeakyReLU(0.1),
    )


class MobileNet(pl.LightningModule):
    """MobileNetV1 x 0.25 (arXiv 1704.04861) for two classes, fine-tuned as a whole."""

    def __init__(self) -> None:
        super().__init__()
        stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.LeakyReLU(0.1))
        early = ((8, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1))
        self.stage1 = nn.Sequential(stem, *(separable(*sizes) for sizes in early))
        self.stage2 = nn.Sequential(separable(64, 128, 2), *(separable(128, 128, 1) for _ in range(5)))
        self.stage3 = nn.Sequential(separable(128, 256, 2), separable(256, 256, 1))
        self.fc = nn.Linear(256, 2)

    def load_imagenet(self, path: Path) -> None:
        """Take over everything but the classifier."""
        weights = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        trunk = {key.removeprefix("module."): value for key, value in weights.items() if ".fc." not in key}
        missing = self.load_state_dict(trunk, strict=False).missing_keys
        assert missing == ["fc.weight", "fc.bias"], missing

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        return self.fc(self.stage3(self.stage2(self.stage1(images))).mean(dim=(2, 3)))

    def training_step(self, batch: list[Tensor], _index: int) -> Tensor:
        """Cross-entropy; half of the pictures are mirrored."""
        images, labels = batch
        return nn.functional.cross_entropy(
            self(v2.functional.horizontal_flip(images) if self.flips() else images), labels
        )

    def flips(self) -> bool:
        """A coin."""
        return bool(torch.rand(()) < 0.5)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW, the classifier faster than the trunk."""
        trunk = [p for name, p in self.named_parameters() if not name.startswith("fc.")]
        return torch.optim.AdamW([{"params": trunk, "lr": 3e-4}, {"params": self.fc.parameters(), "lr": 3e-3}])


def train_and_audit(task: str, data: Path, out: Path, epochs: int) -> Run:
    """Train on one half, audit the other after every second epoch; the run directory is `out`."""
    pl.seed_everything(0)
    everything = photographs(task, data)
    cells = [f"{label} {values}" for label, values in zip(everything.labels, everything.attribute_table, strict=True)]
    train, held_out = train_test_split(range(len(everything)), test_size=0.5, stratify=cells, random_state=0)
    batch = everything.batch(train)
    loader = DataLoader(TensorDataset(batch.images, batch.labels), batch_size=8, shuffle=True)

    model = MobileNet()
    model.load_imagenet(data / "mobilenetv1_025" / "mobilenetV1X0.25_pretrain.tar")
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        callbacks=[BiasAuditCallback(everything.select(held_out), dirpath=out, every_n_epochs=2)],
    )
    trainer.fit(model, loader)
    return read_run(out)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=["scene", "gender"], default="scene")
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--epochs", type=int, default=8)
    options = parser.parse_args()
    if not (options.data / "coco_people").is_dir():
        print(f"skipped: the photographs are not there ({options.data / 'coco_people'}): give --data")
        return
    run = train_and_audit(
        options.task, options.data, options.out or Path("runs") / f"coco_{options.task}", options.epochs
    )
    for estimate in run.audits[-1].estimates:
        if estimate.metric in ("accuracy", "accuracy_gap", "enrichment") and estimate.method != "hirescam":
            print(estimate)
    for finding in run.audits[-1].judgement.findings:
        print(f"{finding.kind} {finding.name}: {finding.verdict}. {finding.sentence}")
    print(f"gate: {run_gate(run).outcome}; page: {run.path / 'report.html'}")


if __name__ == "__main__":
    main()

"""A Vision Transformer of timm's: which layer is explained, what its tokens show, and an audit of what it has learned.

A small untrained `vit_tiny_patch16_224` (three blocks, patches of 8 x 8 pixels) learns doctors and nurses from scenes
in which 95 % of the doctors are men and 95 % of the nurses women. Nobody tells bias-audit about the architecture: it
finds the last layer through whose tokens the class token still sees the image, and puts the tokens on their grid.

    python examples/vit_timm.py            # about half a minute; a picture and a page in runs/vit_timm

What to see: the layer is the first norm of the last block, the grid 8 x 8. With gender as usual accuracy is good, the
other way it is far below chance, and the audit says that the decision relies on gender. The two methods do not agree:
Grad-CAM averages each channel's gradient over all tokens, and here what is left is silent on more than a quarter of
the scenes (`coverage`); HiResCAM keeps the gradient where it is, and lies on hair. So an audit takes both, and says
what each covers. The last column of the picture fuses two blocks.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import pytorch_lightning as pl
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import v2

from bias_audit import AuditDataset, AuditPlan, Heatmaps, Run, explain, read_run, run_gate
from bias_audit.callbacks import BiasAuditCallback
from bias_audit.data.metadata import Metadata
from bias_audit.data.scenes import OCCUPATIONS, balanced_scenes, counts_with_bias, draw_scenes, swap_gender
from bias_audit.overlays import overlay, side_by_side

TRANSFORM = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)])


class Classifier(pl.LightningModule):
    """Any of timm's Vision Transformers will do; this one is small enough to be trained while you wait."""

    def __init__(self) -> None:
        super().__init__()
        self.net = timm.create_model(
            "vit_tiny_patch16_224",
            img_size=64,
            patch_size=8,
            embed_dim=64,
            depth=3,
            num_heads=4,
            num_classes=len(OCCUPATIONS),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(B, 2)`."""
        return self.net(images)

    def training_step(self, batch: list[Tensor], _index: int) -> Tensor:
        """Cross-entropy."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> dict[str, object]:
        """AdamW, its rate rising and falling once."""
        optimizer = torch.optim.AdamW(self.parameters(), weight_decay=0.05)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train_and_audit(model: Classifier, audit_set: AuditDataset, per_class: int, epochs: int, out: Path) -> Run:
    """Train on biased scenes; the audit rides along, with what the training set says of gender."""
    scenes = draw_scenes(counts_with_bias(per_class, male_doctors=0.95, female_nurses=0.95), seed=0)
    images = TRANSFORM(torch.stack([torch.from_numpy(scene.image.copy()) for scene in scenes]))
    labels = torch.tensor([OCCUPATIONS.index(scene.occupation) for scene in scenes])
    audit = BiasAuditCallback(
        audit_set,
        dirpath=out,
        every_n_epochs=epochs,
        plan=AuditPlan(methods=("gradcam", "hirescam"), swaps={"gender": swap_gender}),
        training=Metadata.of(labels.tolist(), {"gender": [scene.gender for scene in scenes]}),
    )
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[audit],
    )
    trainer.fit(model, DataLoader(TensorDataset(images, labels), batch_size=32, shuffle=True))
    return read_run(out)


def draw_maps(model: Classifier, audit_set: AuditDataset, count: int, path: Path) -> Heatmaps:
    """A row per scene: the picture under what the model says, and what speaks for that in each way of explaining it.

    Returns:
        What Grad-CAM gives of the layer that was found.
    """
    batch = audit_set.batch(range(0, len(audit_set), len(audit_set) // count))
    gradcam = explain(model, batch.images)
    hirescam = explain(model, batch.images, method="hirescam")
    fused = explain(model, batch.images, method="hirescam", layer=["net.blocks.1.norm1", "net.blocks.2.norm1"])
    sure, said = gradcam.outputs.softmax(dim=1).max(dim=1)
    rows = []
    for row, index in enumerate(batch.indices):
        sample = audit_set.samples[index]
        picture = Image.fromarray(((batch.images[row] + 1) * 127.5).byte().permute(1, 2, 0).numpy())
        words = f"{sample.attributes['gender']} {OCCUPATIONS[sample.label]}: {OCCUPATIONS[said[row]]} {sure[row]:.2f}"
        tiles = [(words, picture.resize((256, 256), Image.Resampling.BICUBIC))]
        for title, heatmaps in (("Grad-CAM", gradcam), ("HiResCAM", hirescam), ("HiResCAM, two blocks", fused)):
            heat, peak = heatmaps.maps[row], heatmaps.maps[row].max()
            tiles.append((title if peak > 0 else f"{title}: silent", overlay(picture, (heat / peak).numpy())))
        rows.append(tiles)
    path.parent.mkdir(parents=True, exist_ok=True)
    side_by_side(rows).save(path)
    return gradcam


def main(arguments: Sequence[str] | None = None) -> Run:
    """Train, audit, draw, and ask the gate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per-class", type=int, default=400, help="scenes of each class to train on")
    parser.add_argument("--audited", type=int, default=50, help="audited scenes of each gender in each class")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/vit_timm"))
    options = parser.parse_args(arguments)

    pl.seed_everything(options.seed)
    audit_set = balanced_scenes(options.audited, seed=1, transform=TRANSFORM)
    model = Classifier()
    run = train_and_audit(model, audit_set, options.per_class, options.epochs, options.out)
    found = draw_maps(model, audit_set, 6, options.out / "maps.png")

    grid = " x ".join(map(str, found.maps.shape[1:]))
    print(f"explained layer: {found.layer}; its tokens lie on a grid of {grid}")
    last = run.audits[-1]
    for name, words in {"aligned": "as usual", "conflicting": "the other way"}.items():
        print(f"gender {words}: {last.estimate(f'{name}_accuracy', group='gender')}")
    for method in ("gradcam", "hirescam"):
        for metric in ("coverage", "enrichment"):
            print(last.estimate(metric, region="hair", method=method))
    for finding in last.judgement.findings:
        print(f"{finding.subject}: {finding.verdict}. {finding.sentence}")
    print(f"gate: {run_gate(run).outcome}; page: {run.path / 'report.html'}; pictures: {options.out / 'maps.png'}")
    return run


if __name__ == "__main__":
    main()

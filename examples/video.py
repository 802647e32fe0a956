"""Video: a network that should tell actions tells places. Its maps show it in time and space, an audit says it.

A figure jumps or walks; nine in ten of the jumps were filmed on a court, nine in ten of the walks on grass. Real videos
of actions are told by their scenes, too (arXiv 1912.05534). `explain` takes clips as they are and gives maps
`(B, t, h, w)`. An audit takes pictures, so a clip is audited as the sheet of its frames, four beside each other in two
rows: the plan's `forward_fn` cuts the sheet into the clip that the network takes, and its `layout` puts the network's
features on the sheet. Regions are drawn frame by frame, and what an audit does with a picture it does with the whole
clip: it takes the ground out of all frames, or lays another.

    python examples/video.py            # about half a minute; pictures and two pages in runs/video

What to see: the network trained on these clips is right where place and action go together, and wrong where they do
not; in `maps.png` it looks at the ground all the time. Its audit says `reliance` on ground and place, and the gate
`violated`. A second one, trained on clips where the place says nothing, looks at the figure, and at the ground under
it: a jump leaves that empty. Its maps give the ground more than its area, and to take the ground away changes its
decisions. Yet another ground changes nothing, and the gate is `held`: what is looked at need not be relied on.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytorch_lightning as pl
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bias_audit import AuditDataset, AuditPlan, AuditSample, Run, explain, read_run, run_gate
from bias_audit.callbacks import BiasAuditCallback
from bias_audit.data.metadata import Metadata
from bias_audit.overlays import overlay, side_by_side

ACTIONS, PLACES = ("jumping", "walking"), ("court", "grass")
FRAMES, SIDE, HORIZON = 8, 32, 22
ROWS, COLUMNS = 2, 4


@dataclass(frozen=True)
class Clips:
    """Frames `(N, 3, 8, 32, 32)`, 0 to 1; action and place `(N,)`; where the figure is, bool `(N, 8, 32, 32)`."""

    frames: Tensor
    actions: Tensor
    places: Tensor
    figure: Tensor


def film(count: int, usual: float, seed: int) -> Clips:
    """`count` clips, half of each action; in a share `usual` of each the place is the action's."""
    rng = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=rng)

    actions, pair = torch.arange(count) % 2, torch.arange(count).double().div(2).floor()
    as_usual = (usual * (pair + 1)).floor() > (usual * pair).floor()
    places = torch.where(as_usual, actions, 1 - actions)
    time, way = torch.arange(FRAMES), torch.where(uniform(-1, 1) > 0, 1.0, -1.0)
    jumps = -uniform(6, 9)[:, None] * (torch.pi * (time + uniform(0, 4, 1)) / 4).sin().abs()
    walks = (way * uniform(1.2, 2.0))[:, None] * (time - 3.5)
    x = uniform(12, 20)[:, None] + walks * (actions == 1)[:, None]
    y = uniform(18, 21)[:, None] + jumps * (actions == 0)[:, None]
    across, down = torch.arange(SIDE) - x[..., None, None], (torch.arange(SIDE) - y[..., None])[..., None]
    head = across**2 + (down + 6) ** 2 < 7
    body = (across / 3) ** 2 + (down / 4.5) ** 2 < 1

    picture = uniform(0.4, 0.8, 3, 1, 1, 1).expand(-1, -1, FRAMES, SIDE, SIDE)
    picture = torch.where(on_ground(), torch.stack([ground(place) for place in PLACES])[places], picture)
    picture = torch.where(body[:, None], uniform(0, 1, 3, 1, 1, 1), picture)
    picture = torch.where(
        head[:, None], uniform(0.3, 0.9, 1, 1, 1, 1) * torch.tensor([1, 0.8, 0.7])[:, None, None, None], picture
    )
    noise = 0.03 * torch.randn(picture.shape, generator=rng)
    return Clips((picture + noise).clamp(0, 1), actions, places, head | body)


def on_ground() -> Tensor:
    """Where no wall is, bool `(32, 1)`."""
    return (torch.arange(SIDE) >= HORIZON)[:, None]


def ground(place: str) -> Tensor:
    """A whole clip of the place's ground, `(3, 8, 32, 32)`: boards with a line, or mown stripes."""
    colour = torch.tensor([0.75, 0.5, 0.3] if place == "court" else [0.35, 0.6, 0.3])
    marked = torch.arange(SIDE)[:, None] == HORIZON + 4 if place == "court" else torch.arange(SIDE) // 4 % 2 == 0
    shade = torch.where(marked, 1.25 if place == "court" else 0.85, 1.0).expand(SIDE, SIDE)
    return (colour[:, None, None] * shade)[:, None].expand(-1, FRAMES, -1, -1)


class Classifier(pl.LightningModule):
    """Convolutions in time and space, an average over all places and times, and one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv3d(3, 16, (3, 5, 5), (1, 2, 2), (1, 2, 2), bias=False), nn.BatchNorm3d(16), nn.ReLU()),
            *(nn.Conv3d(16, 32, 3, (1, 2, 2), 1, bias=False), nn.BatchNorm3d(32), nn.ReLU()),
            *(nn.Conv3d(32, 48, 3, (2, 1, 1), 1, bias=False), nn.BatchNorm3d(48), nn.ReLU()),
        )
        self.head = nn.Linear(48, len(ACTIONS))

    def forward(self, clips: Tensor) -> Tensor:
        """Logits `(B, 2)` of clips `(B, 3, 8, 32, 32)`."""
        return self.head(self.features(clips).mean(dim=(2, 3, 4)))

    def training_step(self, batch: list[Tensor], _index: int) -> Tensor:
        """Cross-entropy."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> dict[str, object]:
        """AdamW, its rate rising and falling once."""
        optimizer = torch.optim.AdamW(self.parameters(), weight_decay=0.01)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=6e-3, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def as_sheets(volumes: Tensor) -> Tensor:
    """Frames, or features of a part of them, `(B, C, t, h, w)` as sheets `(B, C, 2 h, 4 w)`: each stands for 8 / t."""
    frames = volumes.repeat_interleave(FRAMES // volumes.shape[2], dim=2)
    return frames.unflatten(2, (ROWS, COLUMNS)).transpose(3, 4).flatten(4, 5).flatten(2, 3)


def as_clips(sheets: Tensor) -> Tensor:
    """Sheets `(B, C, 64, 128)` as clips `(B, C, 8, 32, 32)`."""
    return sheets.unflatten(3, (COLUMNS, SIDE)).unflatten(2, (ROWS, SIDE)).transpose(3, 4).flatten(2, 3)


def audit_set_of(clips: Clips) -> AuditDataset:
    """Sheets of frames with the figure and the ground that it leaves free in each frame."""
    figures = as_sheets(clips.figure[:, None])[:, 0]
    grounds = as_sheets((on_ground() & ~clips.figure)[:, None])[:, 0]
    samples = [
        AuditSample(
            (255 * sheet).byte(),
            int(action),
            {"figure": figure, "ground": free},
            {"place": PLACES[place]},
            f"clip {number:03d}",
        )
        for number, (sheet, action, place, figure, free) in enumerate(
            zip(as_sheets(clips.frames), clips.actions, clips.places, figures, grounds, strict=True)
        )
    ]
    return AuditDataset(samples, object=["figure"], spurious=["ground"], classes=ACTIONS)


def lay(sample: AuditSample, place: str) -> Tensor:
    """The sample's sheet with another place's ground in all frames: the swap of this audit."""
    other = (255 * as_sheets(ground(place)[None])[0]).byte()
    return torch.where(sample.regions["ground"], other, sample.image)


def train_and_audit(usual: float, audit_set: AuditDataset, options: argparse.Namespace, out: Path) -> Classifier:
    """Train on clips of which a share `usual` is where it usually is; audit before and after."""
    pl.seed_everything(options.seed)
    clips, model = film(options.clips, usual, seed=options.seed), Classifier()
    audit = BiasAuditCallback(
        audit_set,
        dirpath=out,
        every_n_epochs=options.epochs,
        plan=AuditPlan(
            layer="features",
            forward_fn=lambda model, sheets: model(as_clips(sheets)),
            layout=as_sheets,
            swaps={"place": lay},
        ),
        training=Metadata.of(clips.actions.tolist(), {"place": [PLACES[place] for place in clips.places]}),
    )
    trainer = pl.Trainer(
        max_epochs=options.epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[audit],
    )
    trainer.fit(model, DataLoader(TensorDataset(clips.frames, clips.actions), batch_size=32, shuffle=True))
    return model


def draw_maps(models: dict[str, Classifier], clips: Clips, path: Path) -> None:
    """For each clip its frames, and over them what speaks for what each network says."""
    rows = [
        [(f"{ACTIONS[a]} on {PLACES[p]}", strip(c))]
        for c, a, p in zip(clips.frames, clips.actions, clips.places, strict=True)
    ]
    for name, model in models.items():
        heatmaps = explain(model, clips.frames)
        sure, said = heatmaps.outputs.softmax(dim=1).max(dim=1)
        for row, maps in enumerate(heatmaps.upsample((FRAMES, SIDE, SIDE))):
            heat = torch.cat(list(maps / maps.max().clamp_min(1e-30)), dim=1).numpy()
            words = f"{name}: {ACTIONS[said[row]]} {sure[row]:.2f}"
            rows[row].append((words, overlay(strip(clips.frames[row]), heat)))
    path.parent.mkdir(parents=True, exist_ok=True)
    side_by_side([[tile] for row in rows for tile in row], side=768).save(path)


def strip(clip: Tensor) -> Image.Image:
    """The frames of a clip `(3, 8, 32, 32)` beside each other."""
    picture = Image.fromarray((255 * torch.cat(list(clip.unbind(1)), dim=2)).byte().permute(1, 2, 0).numpy())
    return picture.resize((3 * picture.width, 3 * picture.height), Image.Resampling.BICUBIC)


def main(arguments: Sequence[str] | None = None) -> dict[str, Run]:
    """Train and audit twice, draw, and ask the gate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=600, help="to train on")
    parser.add_argument("--audited", type=int, default=200, help="audited clips")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/video"))
    options = parser.parse_args(arguments)

    held_out = film(options.audited, usual=0.5, seed=options.seed + 1_000_000)
    audit_set = audit_set_of(held_out)
    models = {
        name: train_and_audit(usual, audit_set, options, options.out / name)
        for name, usual in {"biased": 0.9, "balanced": 0.5}.items()
    }
    few = [0, 1, options.audited - 2, options.audited - 1]
    shown = Clips(held_out.frames[few], held_out.actions[few], held_out.places[few], held_out.figure[few])
    draw_maps(models, shown, options.out / "maps.png")

    runs = {name: read_run(options.out / name) for name in models}
    for name, run in runs.items():
        print(f"\n{name}: gate {run_gate(run).outcome}; page: {run.path / 'report.html'}")
        print(f"  {run.audits[-1].estimate('accuracy')}")
        for finding in run.audits[-1].judgement.findings:
            print(f"  {finding.subject}: {finding.verdict}. {finding.sentence}")
    print(f"\npictures: {options.out / 'maps.png'}")
    return runs


if __name__ == "__main__":
    main()

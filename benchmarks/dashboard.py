"""What the dashboards cost a training: how long an audit holds it up, and how large the page gets.

Run by `python -m benchmarks.dashboard`, on an idle machine; some minutes. Enters: nothing but options. Leaves: raw
figures as JSON and a table as Markdown, in `benchmarks/results/`.

A small network is trained with the Trainer's own loggers, W&B (offline), TensorBoard and CSV, and 500 images are
audited 50 times. The stall of an audit is the time that the training thread spends in the callback less the time that
the audit itself takes: records, page, media, tables and scalars.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pydantic import TypeAdapter
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.results import Machine, this_machine, today
from bias_audit import AuditPlan, read_run
from bias_audit.callbacks import BiasAuditCallback, WandbSink
from bias_audit.callbacks.wandb.writer import WandbWriter
from bias_audit.data.scenes import OCCUPATIONS, balanced_scenes, counts_with_bias, draw_scenes
from bias_audit.demo import TRANSFORM
from bias_audit.report.page import render
from bias_audit.report.samples import viewer_data

RESULTS = Path(__file__).parent / "results"
MOST_STALL_MS, MOST_BYTES = 50.0, 5_000_000
SIDE = 112


class Net(pl.LightningModule):
    """Four convolutions with stride: the heatmap of an image of 112 pixels is 7 x 7."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 12, 24, 32, 32)
        layers = [
            nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1), nn.BatchNorm2d(b), nn.ReLU())
            for a, b in pairwise(widths)
        ]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], len(OCCUPATIONS))

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(B, 2)`."""
        logits: Tensor = self.head(self.features(images).mean(dim=(2, 3)))
        return logits

    def training_step(self, batch: list[Tensor], _index: int) -> Tensor:
        """Cross-entropy."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


class Timed(BiasAuditCallback):
    """Notes what each audit takes of the training thread beyond itself."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.stalls: list[float] = []

    def _audit(self, *args: Any, **options: Any) -> None:
        started = time.monotonic()
        super()._audit(*args, **options)
        assert self.last_result is not None
        self.stalls.append(time.monotonic() - started - self.last_result.seconds)


@dataclass(frozen=True)
class Measured:
    """One run of the benchmark: milliseconds of each audit in order, bytes of the page's parts."""

    created: str
    machine: Machine
    threads: int
    images: int
    audits: int
    overlays: int
    background: tuple[float, ...]
    foreground: tuple[float, ...]
    page_bytes: int
    page_samples: int
    page_audits: int
    page_seconds: float


def main(arguments: Sequence[str] | None = None) -> Measured:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--audits", type=int, default=50)
    parser.add_argument("--overlays", type=int, default=32)
    parser.add_argument("--foreground-audits", type=int, default=10, help="audits with the same sinks on no thread")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        background = stalls(path / "background", options.images, options.audits, options.overlays, background=True)
        foreground = stalls(
            path / "foreground", options.images, options.foreground_audits, options.overlays, background=False
        )
        run = read_run(path / "background")
        started = time.monotonic()
        page = render(run)
        seconds = time.monotonic() - started
        shown = viewer_data(run)
    assert shown is not None
    measured = Measured(
        today(),
        this_machine(),
        torch.get_num_threads(),
        options.images,
        len(run.audits),
        options.overlays,
        background,
        foreground,
        len(page.encode()),
        shown.samples,
        shown.audits,
        seconds,
    )
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / f"dashboard-{measured.machine.slug}-{measured.created}"
    stem.with_suffix(".json").write_bytes(TypeAdapter(Measured).dump_json(measured, indent=1) + b"\n")
    stem.with_suffix(".md").write_text(markdown(measured), encoding="utf-8")
    print(markdown(measured))
    return measured


def stalls(path: Path, images: int, audits: int, overlays: int, *, background: bool) -> tuple[float, ...]:
    """Milliseconds that each of so many audits holds up a training, beside what it takes itself."""
    import wandb

    os.environ["WANDB_MODE"] = "offline"
    path.mkdir()
    pl.seed_everything(0, verbose=False)
    scenes = draw_scenes(counts_with_bias(160, male_doctors=0.78, female_nurses=0.93), seed=0, size=SIDE)
    pictures = TRANSFORM(torch.stack([torch.from_numpy(scene.image.copy()) for scene in scenes]))
    labels = torch.tensor([OCCUPATIONS.index(scene.occupation) for scene in scenes])
    loader = DataLoader(TensorDataset(pictures, labels), batch_size=32, shuffle=True)
    wandb_logger = WandbLogger(project="dashboard", save_dir=path)
    of = WandbSink if background else WandbWriter
    media = of(wandb_logger.experiment, panel=overlays // 2, worst=overlays - overlays // 2)
    audit = Timed(
        balanced_scenes(-(-images // 4), seed=1, size=SIDE, transform=TRANSFORM).subset(images, 0),
        every_n_steps=len(loader),
        reference=False,
        wandb=False,
        plan=AuditPlan(batch_size=100, max_samples=images),
        dirpath=path / "bias_audit",
        sinks=[media],
    )
    trainer = pl.Trainer(
        max_epochs=audits,
        accelerator="cpu",
        logger=[wandb_logger, TensorBoardLogger(path), CSVLogger(path)],
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[audit],
    )
    with warnings.catch_warnings():
        # Lightning's advice on loaders, and the violation that this model earns.
        warnings.simplefilter("ignore", UserWarning)
        trainer.fit(Net(), loader)
    wandb_logger.experiment.finish()
    wandb.teardown()
    return tuple(1000 * seconds for seconds in audit.stalls)


def markdown(measured: Measured) -> str:
    """The whole page."""
    machine = measured.machine
    rows = [
        ("stall of an audit, media in a process of their own", measured.background, f"at most {MOST_STALL_MS:g} ms"),
        ("W&B's media on the training thread", measured.foreground, ""),
    ]
    lines = ["| what | median, ms | 95th percentile, ms | largest, ms | audits | target |", "| --- |" + " --- |" * 5]
    for what, numbers, target in rows:
        middle, high, most = np.percentile(numbers, (50, 95, 100))
        lines.append(f"| {what} | {middle:.0f} | {high:.0f} | {most:.0f} | {len(numbers)} | {target} |")
    parts = [
        f"# Dashboards, {measured.created}",
        f"By `python -m benchmarks.dashboard`. {machine.processor}, {machine.cores} cores, {machine.memory_gib:g} GiB "
        f"of memory, {machine.system}. Load average when it ended: {machine.load or 0:.2f}. Python {machine.python}; "
        f"{', '.join(machine.packages)}. {measured.threads} threads.",
        f"A training with W&B (offline), TensorBoard and CSV loggers; {measured.images} images, {measured.overlays} "
        "overlays with masks an audit. The last audit's stall is that of its hand-over; the training then waits for "
        "what is under way, once.",
        "\n".join(lines),
        f"The page: {measured.page_bytes:,} bytes (target: at most {MOST_BYTES:,}) with {measured.page_samples} "
        f"samples x {measured.page_audits} audits, drawn in {measured.page_seconds:.1f} s off the training thread.",
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()

"""Many ways to train, and when to audit.

Enters: nothing. Leaves: `Training`s, each of which makes anew whatever holds a state, and `Schedule`s.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
from pytorch_lightning.callbacks import (
    EarlyStopping,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.plugins.precision import MixedPrecision
from pytorch_lightning.tuner.tuning import Tuner
from torch import Tensor, nn
from torch.utils.data import DataLoader

from bias_audit import AuditPlan
from bias_audit.data.samples import AuditBatch
from tests.training import Augmented, Net, audit_set

# As cheap as an audit with interventions and a test of the methods can be.
PLAN = AuditPlan(fitness_samples=1, intervention_samples=2, intervention_every=2, control_regions=1)


@dataclass(frozen=True)
class Schedule:
    """When to audit: a name and the callback's arguments. `rides`: with the validation's own forward passes."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    rides: bool = False


SCHEDULES = (
    Schedule("after validation"),
    Schedule("per epoch", {"every_n_epochs": 1}),
    Schedule("per 3 steps", {"every_n_steps": 3}),
    Schedule("ride along", rides=True),
)


@dataclass(frozen=True)
class Training:
    """A way to train. Whatever holds a state is made anew for each fit, by a function.

    `before` and `after` make the other callbacks, by their place in the list; `prepare` may wrap the net or tune the
    Trainer. `refused` is what a schedule that rides along says of it, as a part of the message: "" where it may ride.
    """

    name: str
    net: Callable[[], LightningModule] = field(default=lambda: Trained())
    data: Callable[[], LightningDataModule] = field(default=lambda: Scenes())
    options: Callable[[Path], Mapping[str, Any]] = lambda _path: {}
    before: Callable[[Path], Sequence[Callback]] = lambda _path: ()
    after: Callable[[Path], Sequence[Callback]] = lambda _path: ()
    prepare: Callable[[Trainer, Any, LightningDataModule], Any] = lambda _trainer, net, _data: net
    refused: str = ""


class Recorder(Logger):
    """Keeps what is logged, less what the audits add to it."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, str, float]] = []

    @property
    def name(self) -> str:
        """As a Trainer asks for it."""
        return "recorder"

    @property
    def version(self) -> int:
        """As a Trainer asks for it."""
        return 0

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Keep them."""
        self.rows += [(step, key, float(v)) for key, v in metrics.items() if not key.startswith("bias_audit/")]

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Nothing."""


class Scenes(LightningDataModule):
    """Training images with noise of the chosen global generators, and a validation on annotated scenes."""

    def __init__(self, draws: str = "torch", workers: int = 0, validated: bool = True) -> None:
        super().__init__()
        self.draws, self.workers, self.validated = draws, workers, validated
        self.held_out: Any = audit_set(1)

    def train_dataloader(self) -> Any:
        """As a user makes it: without a generator of its own."""
        return DataLoader(Noisy(self.draws), batch_size=8, shuffle=True, num_workers=self.workers)

    def val_dataloader(self) -> Any:
        """Batches that carry their regions."""
        if not self.validated:
            return []
        # One worker changes what is drawn as much as two do.
        workers = min(1, self.workers)
        return DataLoader(self.held_out, batch_size=3, collate_fn=AuditBatch.collate, num_workers=workers)


class Noisy(Augmented):
    """Noise from Python's, NumPy's and torch's global generators, or from torch's alone."""

    def __init__(self, draws: str) -> None:
        super().__init__(8)
        self.draws = draws

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = super().__getitem__(index)
        if self.draws == "all":
            image = image * (1 + 0.1 * random.random()) + 0.1 * float(np.random.rand())  # noqa: NPY002
        return image, label


class Trained(Net):
    """`Net` with a scheduler that steps each batch, whose validation draws random numbers; it keeps its losses."""

    def __init__(self) -> None:
        super().__init__()
        self.lr = 1e-2
        self.losses: list[Tensor] = []

    def training_step(self, batch: list[Tensor], _index: int) -> Tensor | None:
        """Keeps the loss."""
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.losses.append(loss.detach().clone())
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, _index: int) -> None:
        """On the images and, apart from that, on a random number."""
        self.log("val_loss", nn.functional.cross_entropy(self(batch.images), batch.labels) + torch.rand(()))

    def configure_optimizers(self) -> Any:
        """An optimizer with moments, and a learning rate that changes."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class FrozenNorm(Trained):
    """Its first layers stay in eval mode, and are not trained, whatever `train()` says."""

    def __init__(self) -> None:
        super().__init__()
        self.features[0].requires_grad_(False)
        self.features[1].requires_grad_(False)

    def train(self, mode: bool = True) -> FrozenNorm:
        """All but the frozen layers."""
        super().train(mode)
        self.features[1].eval()
        return self


class Silent(Trained):
    """Logs nothing while it trains: the compiler would follow it into the logging, and compile that again and again."""

    def log(self, name: str, *_: Any, **__: Any) -> None:
        """Only in the validation."""
        if not self.training:
            super().log(name, *_, **__)


class Restless(Trained):
    """Each forward pass writes into buffers, attributes and containers, in eval mode too, and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Tensor
        self.hidden: Tensor
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("hidden", torch.zeros(1), persistent=False)
        self.seen = torch.zeros(1)
        self.memory: dict[str, Any] = {"passes": 0}
        self.lazy: nn.Module | None = None

    def forward(self, images: Tensor) -> Tensor:
        """Its outputs depend on what the passes before have written."""
        if self.lazy is None:
            self.lazy = nn.Linear(2, 2)
            self.lazy.requires_grad_(False)
        self.calls += 1
        self.hidden.data += torch.rand(1)
        self.seen += images.mean().detach()
        self.memory["passes"] += 1
        noise = random.random() + float(np.random.rand())  # noqa: NPY002
        drift = (self.calls + self.hidden + self.seen + self.memory["passes"] + noise).sin()
        return torch.add(super().forward(images), drift + self.lazy(torch.ones(2)))


class Adversarial(Trained):
    """A GAN: two networks, two optimizers, stepped by hand; what is audited is the one that judges."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3 * 32 * 32))

    def training_step(self, batch: list[Tensor], _index: int) -> None:
        """First the generator, then the judge, with the other's weights frozen."""
        optimizers: Any = self.optimizers()
        (images, labels), (first, second) = batch, optimizers
        made = self.generator(torch.randn(len(images), 4)).view_as(images)
        true, false = torch.ones(len(made), dtype=torch.long), torch.zeros(len(made), dtype=torch.long)
        self._step(first, made, true)
        self._step(second, torch.cat([images, made.detach()]), torch.cat([labels, false]))

    def _step(self, optimizer: Any, images: Tensor, labels: Tensor) -> None:
        self.toggle_optimizer(optimizer)
        loss = nn.functional.cross_entropy(self(images), labels)
        self.manual_backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        self.untoggle_optimizer(optimizer)
        self.losses.append(loss.detach().clone())

    def configure_optimizers(self) -> Any:
        """One for each network."""
        judge = [*self.features.parameters(), *self.head.parameters()]
        return torch.optim.SGD(self.generator.parameters(), lr=0.1, momentum=0.9), torch.optim.AdamW(judge, lr=1e-2)


def _averaging(_path: Path) -> Sequence[Callback]:
    from pytorch_lightning.callbacks import WeightAveraging

    # On the CPU it can only average as often as it is asked to, and its buffers with the weights.
    return (WeightAveraging(use_buffers=True, avg_fn=lambda average, new, _n: 0.5 * average + 0.5 * new),)


def _half(_path: Path) -> Mapping[str, Any]:
    # A Trainer told "16-mixed" takes bfloat16 on a CPU; told so by hand it does the whole of it, loss scaling too.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}


def _monitors(path: Path) -> Sequence[Callback]:
    return (
        ModelCheckpoint(path / "best", monitor="val_loss", save_top_k=2),
        EarlyStopping("val_loss", patience=1, min_delta=0.01),
    )


def _parts_compiled(_trainer: Trainer, net: Any, _data: LightningDataModule) -> Any:
    _forget_compiled()
    # A backend that is quick: hooks, guards and what is compiled anew are the same with each.
    net.features.compile(backend="eager")
    net.head.compile(backend="eager")
    return net


def _all_compiled(_trainer: Trainer, net: Any, _data: LightningDataModule) -> Any:
    _forget_compiled()
    return torch.compile(net)


def _forget_compiled() -> None:
    # What an earlier training compiled would be reused.
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()


def _tuned(trainer: Trainer, net: Any, data: LightningDataModule) -> Any:
    Tuner(trainer).lr_find(net, datamodule=data, num_training=16, early_stop_threshold=None)
    return net


def _longer(_path: Path) -> Mapping[str, Any]:
    # From less than a dozen steps no learning rate is suggested.
    return {"max_epochs": 4, "check_val_every_n_epoch": 2}


class _FoundAgain(LearningRateFinder):
    """Looks for a learning rate before training and once more in the middle, where audits have been made."""

    def __init__(self) -> None:
        super().__init__(num_training_steps=16, early_stop_threshold=None)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 1:
            self.lr_find(trainer, pl_module)


class _Finished(Callback):
    """Ends the W&B run, which the next training would go on with."""

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        import wandb

        wandb.finish()


def _loggers(path: Path) -> Mapping[str, Any]:
    os.environ["WANDB_SILENT"] = "true"
    return {"logger": [WandbLogger(save_dir=path, offline=True), TensorBoardLogger(path)]}


# Lightning has it from 2.6 on.
_AVERAGED = (
    Training("weight averaging before", before=_averaging, refused="WeightAveraging before this callback"),
    Training("weight averaging after", after=_averaging),
) * hasattr(pl.callbacks, "WeightAveraging")
TRAININGS = (
    Training("BatchNorm and dropout"),
    Training("frozen BatchNorm in eval mode", FrozenNorm),
    Training("a forward pass that writes and draws", Restless, refused="other bits"),
    *_AVERAGED,
    Training(
        "stochastic weight averaging",
        options=lambda _path: {"max_epochs": 3},
        after=lambda _path: (StochasticWeightAveraging(1e-2, swa_epoch_start=1, annealing_epochs=1),),
    ),
    Training(
        "accumulation and clipping",
        options=lambda _path: {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1},
    ),
    Training("a GAN, two optimizers by hand", Adversarial),
    Training("16-mixed", options=_half),
    Training("bf16-mixed", options=lambda _path: {"precision": "bf16-mixed"}),
    Training("bf16-true", options=lambda _path: {"precision": "bf16-true"}),
    Training("compiled parts", prepare=_parts_compiled, refused="compiled"),
    Training("learning rate finder, before and in training", options=_longer, after=lambda _path: (_FoundAgain(),)),
    Training("tuner's learning rate", options=_longer, prepare=_tuned),
    Training("loaders made anew each epoch", options=lambda _path: {"reload_dataloaders_every_n_epochs": 1}),
    Training("noise of three generators", data=lambda: Scenes("all")),
    Training("noise of three generators, 2 workers", data=lambda: Scenes("all", workers=2)),
    Training("val_check_interval 0.5", options=lambda _path: {"val_check_interval": 0.5}),
    Training("val_check_interval 3", options=lambda _path: {"val_check_interval": 3}),
    Training("no validation", data=lambda: Scenes(validated=False), refused="one validation DataLoader"),
    Training("checkpoints and early stopping", after=_monitors, options=lambda _path: {"enable_checkpointing": True}),
)
# Too slow for every day.
LONG_TRAININGS = (
    Training("compiled as a whole", Silent, prepare=_all_compiled, refused="compiled"),
    Training("W&B and TensorBoard", options=_loggers, after=lambda _path: (_Finished(),)),
)

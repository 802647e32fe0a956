"""A small training that several processes make together, and what may go wrong in it.

Enters: a `Training`: how it is audited, and what goes wrong on one rank. Leaves: what each rank says in the end.
"""

from __future__ import annotations

import hashlib
import os
import signal
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
import torch.distributed
from pytorch_lightning.callbacks import TQDMProgressBar
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

from bias_audit.attribution.sharded import whole
from bias_audit.callbacks import BiasAuditCallback
from bias_audit.callbacks.sinks import Session
from bias_audit.data.dataset import AuditDataset
from bias_audit.data.samples import AuditBatch, PendingSample
from bias_audit.data.scenes import OCCUPATIONS, balanced_scenes
from bias_audit.plan import AuditPlan
from bias_audit.records.results import AuditResult

SIDE = 32
POLICY = {"rules": [{"metric": "accuracy", "min": 0.99}], "min_samples": 1}


@dataclass(frozen=True)
class Training:
    """A small training and its audits.

    `audited` images are audited in batches of `batch_size`, after every `every_n_steps` steps or each validation;
    `sharded` splits the parameters over the ranks. `fault` is what goes wrong (see `_Faults`), from the second audit
    on, or with " first" at its end from the first on.
    """

    out: Path
    audited: int = 9
    batch_size: int = 4
    every_n_steps: int | None = None
    audit: bool = True
    sharded: bool = False
    fault: str = ""
    on_error: Literal["warn", "raise"] = "warn"
    bar: bool = False

    def audit_set(self, read: Callable[[Callable[[], Any]], Any] = lambda decode: decode()) -> AuditDataset:
        """The images that are audited; each is decoded by `read` whenever it is needed."""
        scenes = balanced_scenes(-(-self.audited // 4), seed=7, size=SIDE).samples[: self.audited]
        samples = [PendingSample(s.label, s.attributes, s.id, partial(read, s.decode)) for s in scenes]
        return AuditDataset(samples, object=["coat"], spurious=["hair"], classes=OCCUPATIONS, cache_bytes=0)

    def plan(self) -> AuditPlan:
        """How they are audited."""
        return AuditPlan(batch_size=self.batch_size, fitness_samples=2, intervention_every=2)


@dataclass(frozen=True)
class Audited:
    """When an audit was made, and the weights and buffers of which model."""

    step: int
    epoch: int
    trigger: str
    state: dict[str, Tensor]


@dataclass(frozen=True)
class Trained:
    """What one rank says of a training: `ended` is the checksum of its weights, optimizer and generator, `error` what
    it raised."""

    run_dir: Path | None
    audits: tuple[Audited, ...]
    monitored: dict[str, float]
    ended: str
    error: str
    warned: tuple[str, ...]
    printed: str


class Net(pl.LightningModule):
    """Convolutions with BatchNorm, dropout, a hidden layer; sharded over the strategy's mesh, where it has one."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3)
        )
        self.act = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
        # Of no part but the whole: where the model is sharded it lies about in one piece after a forward pass.
        self.gain = nn.Parameter(torch.ones(2))

    def configure_model(self) -> None:
        """Shard."""
        if self.device_mesh is not None:
            from torch.distributed.fsdp import fully_shard

            for part in (self.features, self.head, self):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(B, 2)`."""
        logits: Tensor = self.gain * self.head(self.dropout(self.act(self.features(images)).mean(dim=(2, 3))))
        return logits

    def training_step(self, batch: list[Tensor], _index: int) -> Tensor:
        """Cross-entropy."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor] | AuditBatch, _index: int) -> None:
        """A forward pass."""
        self(batch.images if isinstance(batch, AuditBatch) else batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Broken(RuntimeError):
    """What goes wrong on purpose."""


class _Faults:
    """What goes wrong on one rank.

    "decode": an image does not decode; "raise": a forward pass raises; "killed" and "stopped": the process gets a
    signal in a forward pass; "bar" and "sink": the first rank's progress bar or sink raises.
    """

    def __init__(self, training: Training, rank: int) -> None:
        self.fault, self.rank, self._out = training.fault, rank, training.out
        self.callback: BiasAuditCallback | None = None

    def due(self, kind: str, rank: int = 1) -> bool:
        if self.rank != rank or self.fault.removesuffix(" first") != kind:
            return False
        return self.fault.endswith("first") or (self.callback is not None and self.callback.last_result is not None)

    def read(self, decode: Callable[[], Any]) -> Any:
        """An image and its masks."""
        if self.due("decode"):
            raise OSError("the disk is gone")
        return decode()

    def forward(self, model: nn.Module, images: Tensor) -> Any:
        """The model's outputs."""
        if self.due("raise"):
            raise Broken("in the middle")
        for kind, number in (("killed", signal.SIGKILL), ("stopped", signal.SIGSTOP)):
            if self.due(kind):
                (self._out / "gone").touch()
                os.kill(os.getpid(), number)
        return model(images)


class _Sink:
    """One that may raise."""

    def __init__(self, faults: _Faults) -> None:
        self._faults = faults

    def start(self, session: Session) -> None:
        """Nothing."""

    def write(self, result: AuditResult) -> None:
        """Raise, if it is time."""
        if self._faults.due("sink", rank=0):
            raise Broken("in the sink")

    def fail(self, step: int, reason: str) -> None:
        """Nothing."""

    def end(self, error: str = "") -> None:
        """Nothing."""


class _Keeper(pl.Callback):
    """Keeps, after each audit, the weights that it saw; all ranks together put those together that are sharded."""

    def __init__(self, of: BiasAuditCallback) -> None:
        self.audits: list[Audited] = []
        self._of = of
        self._last: AuditResult | None = None

    def _look(self, net: pl.LightningModule) -> None:
        result = self._of.last_result
        if result is not None and result is not self._last:
            self._last = result
            state = {name: whole(tensor).clone() for name, tensor in net.state_dict().items()}
            self.audits.append(Audited(result.step, result.epoch, result.trigger, state))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After the reference."""
        self._look(pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """After an audit of a step."""
        self._look(pl_module)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After that of a validation."""
        self._look(pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After the last."""
        self._look(pl_module)


class _Bar(TQDMProgressBar):
    """One that may raise when the callback after it asks whether it is on."""

    def __init__(self, faults: _Faults) -> None:
        super().__init__()
        self._faults, self._raises = faults, False

    def on_validation_epoch_end(self, *_: Any) -> None:
        """The audit is next."""
        self._raises = self._faults.due("bar", rank=0)

    @property
    def is_enabled(self) -> bool:
        if self._raises:
            self._raises = False
            raise Broken("in the bar")
        return bool(super().is_enabled)


def train(rank: int, world: int, training: Training) -> Trained:
    """Train on this rank, together with the others: on a set of images that no number of ranks divides."""
    pl.seed_everything(0, verbose=False)
    net = Net()
    faults = _Faults(training, rank)
    callbacks: list[Any] = []
    kept: list[Audited] = []
    if training.audit:
        faults.callback = BiasAuditCallback(
            training.audit_set(faults.read),
            POLICY,
            every_n_steps=training.every_n_steps,
            plan=replace(training.plan(), forward_fn=faults.forward) if training.fault else training.plan(),
            on_error=training.on_error,
            sinks=[_Sink(faults)],
            # By default it lies where the logger's files are.
            dirpath=None if training.bar else training.out / "run",
            name="run",
        )
        keeper = _Keeper(faults.callback)
        callbacks, kept = [faults.callback, keeper], keeper.audits
    if training.bar:
        callbacks.insert(0, _Bar(faults))
    sharded = ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1) if training.sharded else None
    error, printed = "", StringIO()
    with warnings.catch_warnings(record=True) as caught, redirect_stdout(printed):
        warnings.simplefilter("always")
        trainer = _trainer(
            training.out,
            world,
            callbacks,
            strategy=sharded or ("ddp" if world > 1 else "auto"),
            logger=CSVLogger(training.out, name="", version="") if training.bar else False,
            enable_progress_bar=training.bar,
        )
        try:
            trainer.fit(net, _training_images(), _training_images())
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
    return Trained(
        None if faults.callback is None else faults.callback.run_dir,
        tuple(kept),
        {name: float(value) for name, value in trainer.callback_metrics.items()},
        _checksum(net, trainer),
        error,
        tuple(str(w.message) for w in caught if "bias-audit" in str(w.message)),
        printed.getvalue(),
    )


def _trainer(out: Path, world: int, callbacks: list[Any], **options: Any) -> pl.Trainer:
    settings = {"logger": False, "enable_progress_bar": False} | options
    return pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=world,
        callbacks=callbacks,
        default_root_dir=out,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        **settings,
    )


def _training_images() -> DataLoader[Any]:
    images = torch.randn(23, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(images, torch.arange(23) % 2), batch_size=4)


def _checksum(net: nn.Module, trainer: pl.Trainer) -> str:
    found = hashlib.sha256(torch.get_rng_state().numpy().tobytes())
    states = [net.state_dict(), *(optimizer.state_dict() for optimizer in trainer.optimizers)]
    for leaf in tree_leaves(states):
        # Of a parameter that is sharded this rank's part.
        local = leaf.to_local() if isinstance(leaf, DTensor) else leaf
        found.update(local.detach().numpy().tobytes() if isinstance(local, Tensor) else repr(local).encode())
    return found.hexdigest()


def ridden(out: Path, workers: int) -> Path:
    """The run of a training whose audits take their activations from its validation, read by so many workers."""
    pl.seed_everything(0, verbose=False)
    net = Net()
    audit_set: Any = Training(out).audit_set()
    callback = BiasAuditCallback("validation", POLICY, plan=Training(out).plan(), dirpath=out / "run")
    trainer = _trainer(out, 1, [callback])
    shown: DataLoader[Any] = DataLoader(audit_set, batch_size=4, num_workers=workers, collate_fn=AuditBatch.collate)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(net, _training_images(), shown)
    return out / "run"

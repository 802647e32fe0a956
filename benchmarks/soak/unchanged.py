"""Whether trainings end the same, bit for bit, with audits in them and without.

Enters: a `Training`, one of many ways to train, and a `Schedule`, when to audit. Leaves: an `Outcome`: every tensor,
number and generator in which the training with audits ends other than the one without.
"""

from __future__ import annotations

import json
import os
import random
import socket
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

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
from torch.multiprocessing.spawn import start_processes
from torch.utils._pytree import keystr, tree_flatten_with_path
from torch.utils.data import DataLoader

from benchmarks.soak.figures import Figure
from bias_audit import AuditPlan
from bias_audit.callbacks import BiasAuditCallback
from bias_audit.callbacks.page import ReportSink
from bias_audit.data.samples import AuditBatch
from bias_audit.records.runs import read_run
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


@dataclass(frozen=True)
class End:
    """What a training has left, by name: tensors, numbers, texts."""

    leaves: Mapping[str, Any]

    def differences(self, other: End) -> tuple[str, ...]:
        """Names of what is not the same in both, to the bit."""
        names = sorted({*self.leaves, *other.leaves})
        return tuple(n for n in names if not _same(self.leaves.get(n, _NOTHING), other.leaves.get(n, _NOTHING)))


@dataclass(frozen=True)
class Outcome:
    """Of one training with one schedule: what differs, how many audits it saw, and why it was not ridden, if so."""

    training: str
    schedule: str
    differences: tuple[str, ...]
    compared: int
    audits: int
    refused: str = ""


_NOTHING = object()


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        # By their bytes: NaN is the same as NaN, and 0 is not the same as -0.
        return one.dtype == other.dtype and one.shape == other.shape and _bytes(one) == _bytes(other)
    return type(one) is type(other) and (one == other or (one != one and other != other))


def _bytes(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""


def flat(name: str, tree: Any) -> Iterator[tuple[str, Any]]:
    """The leaves of nested dicts, lists and tuples with their names; what a leaf is not told apart by, by its text."""
    for path, leaf in tree_flatten_with_path(tree)[0]:
        kept = leaf.detach().clone() if isinstance(leaf, Tensor) else leaf
        plain = isinstance(kept, Tensor | int | float | str | bool | bytes | None)
        yield name + keystr(path), kept if plain else type(kept).__name__


def generators() -> dict[str, Any]:
    """The states of all global generators."""
    _, keys, *rest = np.random.get_state()  # noqa: NPY002 - the global generator is what is looked at
    states: dict[str, Any] = {
        "python": repr(random.getstate()),
        "numpy": (np.asarray(keys).tobytes(), *rest),
        "torch": torch.get_rng_state(),
    }
    cuda: Any = torch.cuda
    if cuda.is_initialized():
        states["cuda"] = cuda.get_rng_state_all()
    return states


def process() -> dict[str, Any]:
    """What is set for the whole process or thread, and decides what the next operation computes."""
    nesting = torch.autocast_increment_nesting() - 1
    torch.autocast_decrement_nesting()
    inner: Any = torch
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "anomaly": torch.is_anomaly_enabled(),
        "autocast": [(torch.is_autocast_enabled(d), str(torch.get_autocast_dtype(d))) for d in ("cpu", "cuda")],
        "autocast cache": torch.is_autocast_cache_enabled(),
        "autocast nesting": nesting,
        "deterministic": (torch.get_deterministic_debug_mode(), inner.utils.deterministic.fill_uninitialized_memory),
        "cudnn": [getattr(torch.backends.cudnn, name) for name in ("enabled", "benchmark", "deterministic")],
        "mkldnn": inner._C._get_mkldnn_enabled(),
        "matmul": torch.get_float32_matmul_precision(),
        "threads": torch.get_num_threads(),
        "default dtype": str(torch.get_default_dtype()),
        "default device": str(torch.get_default_device()),
        "compiler": str(inner._dynamo.eval_frame._stance),
        "function modes": len(inner.overrides._get_current_function_mode_stack()),
        "dispatch modes": inner._C._len_torch_dispatch_stack(),
        "saved tensors": inner._C._autograd._top_saved_tensors_default_hooks(True) is not None,
    }


def model_state(model: nn.Module) -> dict[str, Any]:
    """Every submodule's mode and hooks, every parameter and buffer with what autograd knows of it."""
    modules = [
        (
            name,
            module.training,
            {k: [(i, id(f)) for i, f in v.items()] for k, v in vars(module).items() if _hooks(k, v)},
        )
        for name, module in model.named_modules()
    ]
    tensors = {
        name: (tensor, str(tensor.dtype), tensor.requires_grad, tensor.grad, id(tensor), tensor.data_ptr())
        for named in (model.named_parameters(), model.named_buffers())
        for name, tensor in named
    }
    return {"modules": modules, "tensors": tensors}


def _hooks(name: str, value: Any) -> bool:
    return isinstance(value, dict) and "hook" in name


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


class NoPage:
    """In the page's place: drawing it takes two seconds of another process at the end of each training."""

    def start(self, session: Any) -> None:
        """Nothing."""

    def write(self, result: Any) -> None:
        """Nothing."""

    def fail(self, step: int, reason: str) -> None:
        """Nothing."""

    def end(self, error: str = "") -> None:
        """Nothing."""


def fitted(training: Training, path: Path, audit: Callback | None = None, **options: Any) -> End:
    """What one training ends with; `options` are more of the Trainer's."""
    pl.seed_everything(0, workers=True, verbose=False)
    net, data, recorder = training.net(), training.data(), Recorder()
    callbacks = [*training.before(path), *([audit] if audit else []), *training.after(path)]
    settings: dict[str, Any] = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "log_every_n_steps": 1,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": path,
    }
    given = dict(training.options(path)) | options
    settings["logger"] = [recorder, *given.pop("logger", ())]
    trainer = Trainer(callbacks=callbacks, **(settings | given))
    trainer.fit(training.prepare(trainer, net, data), datamodule=data)
    return End(dict(_left(trainer, net, recorder)))


def _left(trainer: Trainer, net: LightningModule, recorder: Recorder) -> Iterator[tuple[str, Any]]:
    yield from flat("generators", generators())
    yield from flat("process", process())
    for name, module in net.named_modules():
        yield f"mode[{name}]", module.training
        yield f"hooks[{name}]", sum(len(v) for k, v in vars(module).items() if _hooks(k, v))
    for named in (net.named_parameters(), net.named_buffers()):
        for name, tensor in named:
            yield from flat(f"tensor[{name}]", (tensor, tensor.requires_grad, tensor.grad))
    yield from flat("losses", net.losses)
    yield from flat("attributes", [getattr(net, name, None) for name in ("seen", "memory", "lr")])
    for i, optimizer in enumerate(trainer.optimizers):
        yield from flat(f"optimizer[{i}]", optimizer.state_dict())
    for i, config in enumerate(trainer.lr_scheduler_configs):
        yield from flat(f"scheduler[{i}]", config.scheduler.state_dict())
    yield from flat("precision", trainer.precision_plugin.state_dict())
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if not isinstance(callback, BiasAuditCallback | ModelCheckpoint):
            yield from flat(f"callback[{type(callback).__name__}]", callback.state_dict())
        averaged = getattr(callback, "_average_model", None)
        if isinstance(averaged, nn.Module):
            yield from flat(f"average[{type(callback).__name__}]", averaged.state_dict())
        if isinstance(callback, ModelCheckpoint):
            yield from flat("best", (callback.best_model_score, Path(callback.best_model_path).name))
    yield from flat("logged", recorder.rows)
    yield from flat("steps", (trainer.global_step, trainer.current_epoch, trainer.should_stop))
    if not isinstance(net, Silent):
        # What the compiler made: an audit that has it compile anew costs as much as many audits. Of a whole module it
        # looks at the Trainer, too, and compiles anew for what it sees there.
        yield "graphs", torch._dynamo.utils.counters["stats"]["unique_graphs"]


def outcome(training: Training, schedule: Schedule, without: End, path: Path, **options: Any) -> Outcome:
    """One training with audits on one schedule, against what it ends with `without` them."""
    settings: dict[str, Any] = {"plan": PLAN, "dirpath": path / "audits"} | dict(schedule.options)
    # The set that is audited is the one that is validated, as where both share their forward passes.
    audit = BiasAuditCallback("validation" if schedule.rides else audit_set(1), **settings)
    refused, audits, end = "", 0, without
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            end = fitted(training, path, audit, **options)
            audits = len(read_run(path / "audits").audits)
        except ValueError as error:
            # Where there is nothing to ride along with, training does not begin.
            if "one validation DataLoader" not in str(error):
                raise
            refused = str(error)
    said = [str(w.message) for w in caught if "cannot ride along" in str(w.message)]
    return Outcome(
        training.name, schedule.name, without.differences(end), len(end.leaves), audits, refused or " ".join(said)
    )


BY_TWO = Training("DDP, two processes", refused="several ranks")


def by_two(path: Path, schedules: Sequence[Schedule], page: bool = True) -> tuple[Outcome, ...]:
    """The outcomes of `BY_TWO` on each of two ranks, with each of the schedules.

    Raises:
        AssertionError: the ranks have not come to an end in three minutes.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Forked: to import everything anew takes longer than to train.
    start: Any = start_processes
    ranks = start(_as_rank, (path, tuple(schedules), port, page), nprocs=2, join=False, start_method="fork")
    until = time.monotonic() + 180
    while not ranks.join(timeout=5):
        if time.monotonic() > until:
            for process in ranks.processes:
                process.kill()
            raise AssertionError("two ranks hang")
    said = [json.loads((path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    # The first speaks for all.
    for first, other in zip(*said, strict=True):
        other["refused"] = first["refused"]
    return tuple(Outcome(**each | {"differences": tuple(each["differences"])}) for rank in said for each in rank)


def _as_rank(rank: int, path: Path, schedules: Sequence[Schedule], port: int, page: bool) -> None:
    # What is forked must not wait for threads that were not.
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ |= {"NODE_RANK": "0", "LOCAL_RANK": str(rank)}
    options: dict[str, Any] = {"devices": 2, "strategy": "ddp"}
    outcomes = []
    with drawing(page):
        without = fitted(BY_TWO, path / "without", **options)
        for i, schedule in enumerate(schedules):
            found = outcome(BY_TWO, schedule, without, path / str(i), **options)
            outcomes.append(asdict(replace(found, training=f"{BY_TWO.name}, rank {rank}")))
    (path / f"rank-{rank}.json").write_text(json.dumps(outcomes))


def drawing(page: bool) -> Any:
    """A context in which trainings have their page drawn, or not."""
    return mock.patch("bias_audit.callbacks.lightning.ReportSink", ReportSink if page else NoPage)


def soak(progress: Callable[[str], None]) -> tuple[Figure, ...]:
    """Every training with every schedule, pages and all.

    Raises:
        AssertionError: a training with audits does not end as one without, or was not ridden along with where it could.
    """
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as folder:
        for i, training in enumerate((*TRAININGS, *LONG_TRAININGS)):
            path = Path(folder) / str(i)
            without = fitted(training, path / "without")
            outcomes = [outcome(training, s, without, path / str(j)) for j, s in enumerate(SCHEDULES)]
            figures += _told(training, outcomes)
            progress(training.name)
        figures += _told(BY_TWO, by_two(Path(folder), SCHEDULES))
    return tuple(figures)


def check(training: Training, found: Outcome) -> None:
    """Whether nothing was changed, audits were made, and a ride was refused only where it must be.

    Raises:
        AssertionError: one of these is not so; the message says which training, which schedule and what.
    """
    case = f"{found.training}, {found.schedule}"
    assert not found.differences, f"{case}: changed by audits: {', '.join(found.differences[:8])}"
    rides = found.schedule == SCHEDULES[-1].name
    begins = not (rides and "one validation" in training.refused)
    assert found.audits >= 2 * begins, f"{case}: {found.audits} audits"
    expected = training.refused if rides else ""
    assert expected in found.refused and bool(expected) == bool(found.refused), f"{case}: ridden? {found.refused!r}"


def _told(training: Training, outcomes: Sequence[Outcome]) -> list[Figure]:
    for found in outcomes:
        check(training, found)
    return [
        Figure(f"{found.training}; {found.schedule}", len(found.differences), f"of {found.compared} values differ", 0)
        for found in outcomes
    ]

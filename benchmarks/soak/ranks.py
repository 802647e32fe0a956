"""Audits by several processes record what one process records, and no rank waits for one that is gone.

Enters: how many ranks, what they train and what goes wrong on one of them. Leaves: what each rank says in the end, run
directories, and the same runs made again by one process from the weights that were audited.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import pickle
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from io import StringIO
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
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

from benchmarks.soak.figures import Figure
from bias_audit.attribution.cam import FORMULAS
from bias_audit.attribution.capture import Capture, borrowed, capture
from bias_audit.attribution.sharded import whole
from bias_audit.audit import Auditor
from bias_audit.callbacks import BiasAuditCallback
from bias_audit.callbacks.sinks import Session
from bias_audit.data.samples import AuditBatch, AuditDataset, PendingSample
from bias_audit.data.scenes import OCCUPATIONS, balanced_scenes
from bias_audit.plan import AuditPlan
from bias_audit.records.results import AuditResult, SampleScores
from bias_audit.records.runs import RunDirectory, read_run

# The longest wait for what a rank says: only one that hangs takes it.
PATIENCE_S = 240
SIDE = 32

# Written into the records, and another each time.
_TIMES = {"created", "seconds", "run_id", "sha256", "previous"}
POLICY = {"rules": [{"metric": "accuracy", "min": 0.99}], "min_samples": 1}
# Of the long form: how many images in batches of how many, and after how many steps, None for each validation. Fewer
# batches than ranks, as many, and numbers that no number of ranks divides.
_AUDITS = ((1, 7, 1), (2, 1, None), (23, 1, 1), (23, 7, None), (60, 7, 1), (60, 16, None))


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


def audited_again(training: Training, audits: Sequence[Audited], out: Path) -> Path:
    """The run that one process makes of the same weights."""
    net, auditor = Net(), Auditor(training.audit_set(), training.plan(), POLICY)
    auditor.prepare(net)
    directory = RunDirectory.create(out, auditor.manifest(net), auditor.sheet)
    reference: SampleScores | None = None
    previous: AuditResult | None = None
    for number, audit in enumerate(audits):
        net.load_state_dict(audit.state)
        previous = auditor.run(
            net,
            step=audit.step,
            epoch=audit.epoch,
            trigger=audit.trigger,
            reference=reference,
            # What training ends with is measured anew.
            previous=None if number == len(audits) - 1 else previous,
        )
        reference = reference or previous.scores
        directory.append(previous)
    directory.end()
    return out


def recorded(run: Path) -> dict[str, Any]:
    """What a run directory's files hold, but for times and the checksums that follow from them; without its page."""
    found: dict[str, Any] = {}
    for path in sorted(p for p in run.rglob("*") if p.is_file() and p.suffix != ".html"):
        content = path.read_bytes()
        if path.suffix in (".json", ".jsonl"):
            lines = content.splitlines() if path.suffix == ".jsonl" else [content]
            found[path.name] = [_timeless(json.loads(line)) for line in lines]
        else:
            found[path.name] = hashlib.sha256(content).hexdigest()
    return found


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(inner) for key, inner in value.items() if key not in _TIMES}
    return [_timeless(inner) for inner in value] if isinstance(value, list) else value


class Team:
    """Processes that meet in one process group and then do what they are told, all of them the same.

    Args:
        world: how many.
        meeting: a file that is not there yet.
        timeout_s: the process group's: how long a rank waits for another in one exchange.
        stays: whether the processes do more than one thing. One that ends lets go of the others.
    """

    def __init__(self, world: int, meeting: Path, timeout_s: float = PATIENCE_S, stays: bool = True) -> None:
        context = multiprocessing.get_context("forkserver")
        # What a process has imported before it is forked it need not import again.
        context.set_forkserver_preload([__name__])
        self.world, self.processes, self._ends = world, [], []
        for rank in range(world):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world, meeting, timeout_s, stays, there), daemon=True)
            process.start()
            there.close()
            self.processes.append(process)
            self._ends.append(here)

    def do(self, work: Callable[..., Any], *args: Any) -> list[Any]:
        """What `work(rank, world, *args)` gives on each rank, or an exception; None where its process is gone.

        Raises:
            AssertionError: a rank said nothing.
        """
        self.tell(work, *args)
        return [self.answer(rank) for rank in range(self.world)]

    def tell(self, work: Callable[..., Any], *args: Any) -> None:
        """Let each rank begin."""
        for end in self._ends:
            end.send((work, args))

    def answer(self, rank: int) -> Any:
        """What a rank gave, as `do` says."""
        assert self._ends[rank].poll(PATIENCE_S), f"rank {rank} of {self.world} hangs"
        try:
            return pickle.loads(self._ends[rank].recv_bytes())
        except EOFError:
            return None

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.kill()
            process.join()


def _serve(rank: int, world: int, meeting: Path, timeout_s: float, stays: bool, end: Connection) -> None:
    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0"}
    # Lightning tells of devices and gives advice.
    logging.disable(logging.WARNING)
    if world > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=timedelta(seconds=timeout_s)
        )
    while True:
        work, args = end.recv()
        try:
            given = work(rank, world, *args)
        except Exception as error:
            given = error
        end.send_bytes(pickle.dumps(given))
        if not stays:
            # Without the goodbye that waits for a rank which is gone.
            os._exit(1)


def scored_in_parts(audited: int, sizes: Sequence[int]) -> dict[int, tuple[str, ...]]:
    """What differs in a single bit, for each batch size, if the activations and gradients are the same: by name.

    By every method, of a model that is made anew.
    """
    torch.manual_seed(0)
    training = Training(Path(), audited=audited)
    auditor = Auditor(training.audit_set(), AuditPlan(methods=tuple(FORMULAS), layer="act", pointing_tolerance=2))
    every = auditor.audit_set.batch(range(audited))
    with borrowed(Net()) as lent:
        taken = capture(lent, every.images, auditor.checked_target(every.labels, every.indices), "act")
    at_once = auditor.score(taken, every.labels, every.masks, every.indices)
    found: dict[int, tuple[str, ...]] = {}
    for size in sizes:
        batches = []
        for places in (range(start, min(start + size, audited)) for start in range(0, audited, size)):
            cut = slice(places.start, places.stop)
            part = Capture(taken.activations[cut], taken.gradients[cut], taken.outputs[cut], taken.scores[cut])
            batches.append(auditor.score(part, every.labels[cut], every.masks[cut], tuple(places)))
        [joined] = auditor.in_order(batches, list(range(audited)))
        pairs = zip(at_once._fields, at_once, joined, strict=True)
        found[size] = tuple(name for name, one, other in pairs if not _same_bits(one, other))
    return found


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return one.contiguous().numpy().tobytes() == other.contiguous().numpy().tobytes()


@dataclass(frozen=True)
class Moved:
    """How far other batch sizes move what is measured.

    `decided` names what is counted or decided and yet differs; `logit` is the most that a margin moves, in logits;
    `most` the most that an estimate or an end of its interval moves, of which metric `metric`.
    """

    decided: tuple[str, ...]
    logit: float
    most: float
    metric: str


def moved_by_batch_size(audited: int, sizes: Sequence[int], seeds: Sequence[int]) -> list[Moved]:
    """For each seed, of the weights, the largest difference between audits in batches of these sizes."""
    found = []
    for seed in seeds:
        torch.manual_seed(seed)
        net = Net()
        trainings = [Training(Path(), audited=audited, batch_size=size) for size in sizes]
        found.append(_moved([Auditor(t.audit_set(), t.plan(), POLICY).run(net) for t in trainings]))
    return found


def _moved(results: Sequence[AuditResult]) -> Moved:
    first, *others = results
    decided: set[str] = set()
    logit, moves = 0.0, [(0.0, "")]
    for other in others:
        logit = max(logit, float(np.abs(first.scores.margin - other.scores.margin).max()))
        if not np.array_equal(first.scores.predictions, other.scores.predictions):
            decided.add("predictions")
        if _decisions(first) != _decisions(other):
            decided.add("verdicts")
        for one, two in zip(first.estimates, other.estimates, strict=True):
            ends = [(getattr(one, name), getattr(two, name)) for name in ("value", "low", "high")]
            known = [(a is None, b is None) for a, b in ends]
            if (one.n, one.reason) != (two.n, two.reason) or any(a is not b for a, b in known):
                decided.add(one.metric)
            moves += [(abs(a - b), one.metric) for a, b in ends if a is not None and b is not None]
    most, metric = max(moves)
    return Moved(tuple(sorted(decided)), logit, most, metric)


def _decisions(result: AuditResult) -> list[Any]:
    verdicts = [(finding.subject, finding.verdict, finding.possible) for finding in result.judgement.findings]
    return verdicts + [(check.subject, check.outcome) for check in result.judgement.checks]


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


def soak(progress: Callable[[str], None]) -> tuple[Figure, ...]:
    """The long form: more ranks, more batches, more faults, and the times until all ranks have ended."""
    # Of Lightning, on devices and what else one might buy.
    logging.disable(logging.WARNING)
    with TemporaryDirectory() as folder:
        root = Path(folder)
        return (*_same_runs(root, progress), *_ends(root, progress), *_in_other_batches(root, progress))


def _same_runs(root: Path, progress: Callable[[str], None]) -> Iterator[Figure]:
    for world in (1, 2, 3, 4):
        team = Team(world, root / f"meeting-{world}")
        same = 0
        try:
            sharding = (False, True) if world > 1 else (False,)
            for number, ((audited, batch_size, steps), sharded) in enumerate(product(_AUDITS, sharding)):
                training = Training(root / f"{world}-{number}", audited, batch_size, steps, sharded=sharded)
                every = team.do(train, training)
                case = f"{world} ranks, {training}"
                assert all(isinstance(said, Trained) and not said.error for said in every), f"{case}: {every}"
                alone = audited_again(training, every[0].audits, training.out / "alone")
                assert recorded(training.out / "run") == recorded(alone), f"{case}: other records than one process'"
                # As texts: what could not be measured is NaN, which is not equal to itself.
                assert len({repr(said.monitored) for said in every}) == 1, f"{case}: monitors differ"
                without = [said.ended for said in team.do(train, replace(training, audit=False))]
                assert without == [said.ended for said in every], f"{case}: training has changed"
                same += 1
                progress(f"{case}: the same")
        finally:
            team.close()
        yield Figure(f"trainings on {world} rank{'s' * (world > 1)} whose records are those of one process", same)


def _ends(root: Path, progress: Callable[[str], None]) -> Iterator[Figure]:
    for fault, timeout_s, sharded in (("killed", 60.0, False), ("killed", 60.0, True), ("stopped", 10.0, False)):
        longest = 0.0
        for world in (2, 3, 4):
            out = root / f"{fault}-{world}-{sharded}"
            team = Team(world, root / f"meeting-{out.name}", timeout_s, stays=False)
            try:
                team.tell(train, Training(out, fault=fault, sharded=sharded))
                others = [team.answer(rank) for rank in range(world) if rank != 1]
                gone = time.time() - (out / "gone").stat().st_mtime
            finally:
                team.close()
            assert all(said is None or said.error for said in others), f"{fault}, {world} ranks: one goes on alone"
            audits = [audit.trigger for audit in read_run(out / "run").audits]
            assert audits == ["reference"], f"{fault}, {world} ranks: audits {audits}"
            longest = max(longest, gone)
            progress(f"{fault}, {world} ranks: {gone:.1f} s")
        about = f"until all ranks have ended, one {fault}{', sharded' if sharded else ''}, timeout {timeout_s:.0f} s"
        # Who is killed is noticed at once; who hangs when the process group has waited once.
        yield Figure(about, longest, "s", 30)


def _in_other_batches(root: Path, progress: Callable[[str], None]) -> Iterator[Figure]:
    sizes = (1, 7, 16, 64)
    different = scored_in_parts(64, sizes[:-1])
    assert not any(different.values()), f"scores of the same activations depend on the batch: {different}"
    yield Figure("scores of the same activations in batches of 1, 7 and 16 that differ from those of 64", 0, "", 0)
    moved = []
    for seed in range(10):
        moved += moved_by_batch_size(64, sizes, (seed,))
        progress(f"seed {seed}: {moved[-1]}")
    assert not any(m.decided for m in moved), f"batch sizes change decisions: {[m.decided for m in moved]}"
    most = max(moved, key=lambda m: m.most)
    yield Figure("verdicts, checks, counts and decisions that batches of 1, 7, 16 and 64 change, 10 models", 0, "", 0)
    yield Figure("the most that they move a margin", max(m.logit for m in moved), "logits", 1e-5)
    yield Figure(f"the most that they move an estimate or its interval ({most.metric})", most.most, "", 1e-2)
    runs = [recorded(ridden(root / f"workers-{n}", workers)) for n, workers in enumerate((0, 0, 1, 4))]
    assert all(run == runs[0] for run in runs), "the number of workers, or a second time, changes the records"
    yield Figure("records that a second time, or 1 or 4 workers, change", 0, "", 0)

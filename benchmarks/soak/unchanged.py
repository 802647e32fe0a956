"""Whether trainings end the same, bit for bit, with audits in them and without.

Enters: a `Training`, one of many ways to train, and a `Schedule`, when to audit. Leaves: an `Outcome`: every tensor,
number and generator in which the training with audits ends other than the one without.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import (
    ModelCheckpoint,
)
from torch import nn
from torch.multiprocessing.spawn import start_processes

from benchmarks.soak.figures import Figure
from benchmarks.soak.pages import drawing
from benchmarks.soak.state import End, flat, generators, holds_hooks, process
from benchmarks.soak.trainings import LONG_TRAININGS, PLAN, SCHEDULES, TRAININGS, Recorder, Schedule, Silent, Training
from bias_audit.callbacks import BiasAuditCallback
from bias_audit.records.runs import read_run
from tests.training import audit_set


@dataclass(frozen=True)
class Outcome:
    """Of one training with one schedule: what differs, how many audits it saw, and why it was not ridden, if so."""

    training: str
    schedule: str
    differences: tuple[str, ...]
    compared: int
    audits: int
    refused: str = ""


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
        yield f"hooks[{name}]", sum(len(v) for k, v in vars(module).items() if holds_hooks(k, v))
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

"""Weights & Biases over a network that comes and goes, or stalls for good, while a training is audited.

Enters: how many audits, and how the network behaves, by a seed. Leaves: what the training noticed of it: how long an
audit is held up, how large the process that sends becomes, how long the end waits; and what W&B has in the end.

The network is a local server that takes every question and answers none while it stalls.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
import wandb

from benchmarks.soak.figures import Figure
from bias_audit import AuditPlan, read_run
from bias_audit.callbacks import BiasAuditCallback, Session, WandbSink
from bias_audit.callbacks.aside import PATIENCE_S
from bias_audit.callbacks.wandb.sink import own_run
from bias_audit.callbacks.wandb.workspace import send_run
from bias_audit.records.results import AuditResult
from tests.training import audit_set, fit, trainer
from tests.wandb_server import ENTITY, PROJECT, Double, serving

Network = Literal["answers", "comes and goes", "stalls for good"]
# A step of training waits no longer for what it hands over, the start of the process that sends among it.
MOST_HELD_UP_MS = 100.0
# What the process that sends takes at most: W&B, the records' summaries and one audit's scores.
MOST_MEGABYTES = 400.0
# The process that sends and W&B itself are each given so long, and W&B takes ten seconds to leave.
MOST_END_S = 2 * PATIENCE_S + 30


@dataclass(frozen=True)
class Endured:
    """One training: milliseconds of each handing over, the sender's megabytes, the seconds that the end took, what was
    warned of, and the steps of the audits that W&B had then and after all that is recorded was sent anew.
    """

    run_dir: Path
    weights: dict[str, torch.Tensor]
    held_up_ms: tuple[float, ...]
    sender_mb: float
    end_s: float
    told: tuple[str, ...]
    arrived: tuple[int, ...]
    sent_anew: tuple[int, ...]


class _Timed:
    """A W&B sink, and what it costs."""

    name = "W&B"

    def __init__(self, sink: WandbSink) -> None:
        self._sink = sink
        self.held_up_ms: list[float] = []
        self.sender_mb = self.end_s = 0.0

    def start(self, session: Session) -> None:
        self._sink.start(session)

    def write(self, result: AuditResult) -> None:
        began = time.monotonic()
        self._sink.write(result)
        self.held_up_ms.append(1e3 * (time.monotonic() - began))
        aside = self._sink._aside
        if aside is not None and aside._process is not None:
            self.sender_mb = max(self.sender_mb, _megabytes(aside._process.pid))

    def fail(self, step: int, reason: str) -> None:
        self._sink.fail(step, reason)

    def end(self, error: str = "") -> None:
        began = time.monotonic()
        try:
            self._sink.end(error)
        finally:
            self.end_s = time.monotonic() - began


class _Weather(pl.Callback):
    """Lets the network stall and answer again after random numbers of steps, by a seed; at the end it answers."""

    def __init__(self, double: Double, network: Network, seed: int) -> None:
        self._double, self._network, self._random, self._next = double, network, random.Random(seed), 3

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if self._network == "answers" or trainer.global_step < self._next:
            return
        if self._double.answering.is_set():
            self._double.answering.clear()
        elif self._network == "comes and goes":
            self._double.answering.set()
        self._next = trainer.global_step + self._random.randint(1, 8)

    def on_train_end(self, *_: Any) -> None:
        if self._network == "comes and goes":
            self._double.answering.set()


def endured(folder: Path, *, epochs: int, network: Network, seed: int) -> Endured:
    """Train four steps an epoch, audit after each, and send the audits to a W&B run over such a network."""
    double = Double()
    own = {"HOME": str(folder), "WANDB_DIR": str(folder), "WANDB_SILENT": "true"}
    with serving(double) as surroundings, _surroundings(surroundings | own):
        run = own_run({"project": PROJECT, "dir": folder})
        sink = _Timed(WandbSink(run, own=True))
        audit = BiasAuditCallback(
            audit_set(1),
            dirpath=folder / "run",
            plan=AuditPlan(batch_size=8),
            every_n_steps=1,
            reference=False,
            wandb=False,
            sinks=[sink],
        )
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            net = fit(trainer(folder, _Weather(double, network, seed), audit, max_epochs=epochs))
        arrived = _steps(double, run.id)
        double.answering.set()
        with suppress(Exception):
            wandb.teardown()
        anew = send_run(read_run(folder / "run"), entity=ENTITY, project=PROJECT) if network != "answers" else run.id
        wandb.teardown()
        told = tuple(str(w.message) for w in said if "bias-audit: W&B" in str(w.message))
        return Endured(
            folder / "run",
            net.state_dict(),
            tuple(sink.held_up_ms),
            sink.sender_mb,
            sink.end_s,
            told,
            arrived,
            _steps(double, anew),
        )


def soak(progress: Callable[[str], None]) -> tuple[Figure, ...]:
    """The long form: a hundred audits over each network."""
    return measured(progress, epochs=25)


def measured(progress: Callable[[str], None], *, epochs: int) -> tuple[Figure, ...]:
    """One training over each network.

    Raises:
        AssertionError: a training is changed, an audit is lost, or it is not said what was not sent.
    """
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as folder:
        alone = fit(trainer(Path(folder), max_epochs=epochs)).state_dict()
        networks: tuple[Network, ...] = ("answers", "comes and goes", "stalls for good")
        for network in networks:
            path = Path(folder) / network.replace(" ", "-")
            path.mkdir()
            progress(f"a network that {network}")
            found = endured(path, epochs=epochs, network=network, seed=1)
            check(found, alone, network)
            case = f"network {network}"
            figures += [
                Figure(f"{case}: audits recorded", len(read_run(found.run_dir).audits), "audits"),
                Figure(f"{case}: longest that an audit was held up", max(found.held_up_ms), "ms", MOST_HELD_UP_MS),
                Figure(f"{case}: the process that sends", found.sender_mb, "MB", MOST_MEGABYTES),
                Figure(f"{case}: the end waited", found.end_s, "s", MOST_END_S),
                Figure(f"{case}: audits in W&B when training ended", len(found.arrived), "audits"),
                Figure(f"{case}: audits in W&B after `dashboard push --send`", len(found.sent_anew), "audits"),
            ]
    return tuple(figures)


def check(found: Endured, alone: dict[str, torch.Tensor], network: Network) -> None:
    """Raise unless the training is as without audits and each audit is recorded, sent once at most, and sent anew.

    Raises:
        AssertionError: says which promise is broken.
    """
    case = f"network {network}"
    for name, weights in alone.items():
        assert torch.equal(weights, found.weights[name]), f"{case}: {name} is not what a training without audits gives"
    run = read_run(found.run_dir)
    steps = tuple(audit.step for audit in run.audits)
    assert run.ended and not run.failed, f"{case}: the records are not whole"
    # The weights that training ends with may be audited once more.
    assert sorted(set(steps)) == list(range(1, steps[-1] + 1)), f"{case}: recorded are the audits of steps {steps}"
    assert found.arrived == steps[: len(found.arrived)], f"{case}: W&B has the audits of steps {found.arrived}"
    assert found.sent_anew == steps, f"{case}: sent anew were the audits of steps {found.sent_anew}"
    complete = found.arrived == steps
    assert complete or len(found.told) == 1, f"{case}: W&B lacks audits, and the warnings are {found.told}"
    assert network != "answers" or (complete and not found.told), f"{case}: {found.told}"


def _steps(double: Double, run: str) -> tuple[int, ...]:
    rows = sorted(double.logging[run].rows.items())
    return tuple(row["trainer/global_step"] for _, row in rows if "trainer/global_step" in row)


def _megabytes(process: int) -> float:
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    except OSError:
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


@contextmanager
def _surroundings(given: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(given)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)

"""The best checkpoint of a training: its step is recorded, forgotten where training goes back, and judged by rules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from synthetic import make_run
from training import Net, audit_set, batches, trainer

from bias_audit.callbacks import BiasAuditCallback, Session
from bias_audit.callbacks.sinks import FanOut, RunDirectorySink
from bias_audit.checkpoints import checkpoint_step
from bias_audit.plan import AuditPlan
from bias_audit.records.files import AUDITS
from bias_audit.records.runs import read_run
from bias_audit.records.writing import RunDirectory


class Scripted(Net):
    """Its validation loss is what the script says, one number for each validation."""

    def __init__(self, losses: tuple[float, ...]) -> None:
        super().__init__()
        self.losses = losses

    def validation_step(self, batch: Any, _index: int) -> None:
        self.log("val_loss", self.losses[self.trainer.current_epoch % len(self.losses)])

    test_step = validation_step


# Quick: what is measured is of no interest here.
PLAN = AuditPlan(fitness_samples=0, intervention_samples=0)


@pytest.fixture
def _no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page is drawn by a process of its own, which takes longer than all that is tested here."""
    monkeypatch.setattr("bias_audit.callbacks.loggers.ReportSink", Silent)


def callback(path: Path, **options: Any) -> BiasAuditCallback:
    settings = {"every_n_epochs": 99, "reference": False, "plan": PLAN} | options
    return BiasAuditCallback(audit_set(1), dirpath=path / "run", **settings)


def saver(path: Path, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(path / "saved", **{"monitor": "val_loss"} | options)


def best_in(path: Path) -> list[int]:
    lines = (path / "run" / AUDITS).read_text().splitlines()
    return [body["step"] for body in (json.loads(line)["body"] for line in lines) if body["kind"] == "best"]


def train(path: Path, losses: tuple[float, ...], *callbacks: Any, **options: Any) -> pl.Trainer:
    pl.seed_everything(0, verbose=False)
    run = trainer(path, *callbacks, max_epochs=len(losses), enable_checkpointing=True)
    run.fit(Scripted(losses), batches(), batches(), **options)
    return run


@pytest.mark.usefixtures("_no_page")
@pytest.mark.parametrize(
    ("options", "losses", "steps"),
    [
        # The file keeps its name, no state of any callback is asked for, and the last is the best.
        (
            {"filename": "best", "enable_version_counter": False, "save_weights_only": True},
            (0.5, 0.3, 0.9, 0.1),
            [4, 8, 16],
        ),
        ({"save_top_k": 3, "save_last": True}, (0.5, 0.9, 0.1, 0.3), [4, 12]),
    ],
)
def test_the_step_of_the_best_checkpoint_is_recorded(
    options: dict[str, Any], losses: tuple[float, ...], steps: list[int], tmp_path: Path
) -> None:
    best = saver(tmp_path, **options)
    audited = train(tmp_path, losses, callback(tmp_path), best)
    assert best_in(tmp_path) == steps
    run = read_run(tmp_path / "run")
    assert run.best_step == steps[-1] == checkpoint_step(best.best_model_path)
    assert run.ended and [a.step for a in run.audits] == [16]
    # Not one bit of the training is another.
    alone = train(tmp_path / "alone", losses, saver(tmp_path / "alone", **options))
    states = [run.lightning_module.state_dict().values() for run in (audited, alone)]
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


@pytest.mark.usefixtures("_no_page")
def test_without_a_monitor_no_checkpoint_is_the_best(tmp_path: Path) -> None:
    train(tmp_path, (0.5, 0.2), callback(tmp_path), saver(tmp_path, monitor=None))
    run = read_run(tmp_path / "run")
    assert run.best_step is None and run.ended


@pytest.mark.usefixtures("_no_page")
def test_of_several_the_first_with_a_monitor_counts(tmp_path: Path) -> None:
    class Own(ModelCheckpoint):
        pass

    others = [ModelCheckpoint(tmp_path / "a"), Own(tmp_path / "b", monitor="val_loss", mode="max"), saver(tmp_path)]
    run = train(tmp_path, (0.5, 0.9, 0.2), callback(tmp_path), *others)
    assert best_in(tmp_path) == [4, 8]
    # A test after it changes no best, and is no training.
    run.test(run.lightning_module, batches(), verbose=False)
    recorded = read_run(tmp_path / "run")
    assert recorded.best_step == 8 and recorded.ended and recorded.audits[-1].trigger == "test"


@pytest.mark.usefixtures("_no_page")
def test_a_resumed_run_knows_the_best_of_before(tmp_path: Path) -> None:
    # Audited after the second epoch, best in the third: the records are gone on with from the second.
    losses = (0.5, 0.4, 0.2, 0.3)
    often = {"every_n_epochs": 2}
    train(tmp_path, losses[:3], callback(tmp_path, **often), saver(tmp_path, filename="{step}", save_top_k=-1))
    assert best_in(tmp_path) == [4, 8, 12]
    third, second = tmp_path / "saved/step=12.ckpt", tmp_path / "saved/step=8.ckpt"
    train(tmp_path, losses, callback(tmp_path, **often), saver(tmp_path), ckpt_path=third)
    run = read_run(tmp_path / "run")
    assert run.best_step == 12 and [a.step for a in run.audits] == [8, 16]
    # From before the best: what came after is another training's.
    train(tmp_path, (0.5, 0.4, 9.0), callback(tmp_path, **often), saver(tmp_path), ckpt_path=second)
    assert read_run(tmp_path / "run").best_step == 8


def test_rewinding_drops_the_best_of_later(tmp_path: Path) -> None:
    make_run(tmp_path / "run", audits=2)
    run = read_run(tmp_path / "run")
    again = RunDirectory.resume(run.path, run.path, run.manifest, run.sheet(), 200)
    for step in (100, 150, 190):
        again.best(step)
    assert read_run(run.path).best_step == 190
    RunDirectory.resume(tmp_path / "other", run.path, run.manifest, run.sheet(), 160)
    assert read_run(tmp_path / "other").best_step == 150
    RunDirectory.resume(run.path, run.path, run.manifest, run.sheet(), 120).end()
    assert read_run(run.path).best_step == 100
    # What is saved after the end takes nothing from it, and a sink of one's own need not know.
    sinks = FanOut([RunDirectorySink(), Silent()], "raise")
    sinks.start(Session("bias_audit", run.path, run.manifest, run.sheet(), run.path, 120))
    assert not read_run(run.path).ended
    sinks.end()
    sinks.best(110)
    assert read_run(run.path).ended and read_run(run.path).best_step == 110


class Silent:
    """A sink that has no notion of a best checkpoint."""

    def start(self, session: Any) -> None: ...

    def write(self, result: Any) -> None: ...

    def fail(self, step: int, reason: str) -> None: ...

    def end(self, error: str = "") -> None: ...

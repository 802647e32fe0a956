"""Weights & Biases in trouble: training goes on as it would without, and what was not sent can be sent later."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import wandb
from synthetic import make_run
from test_wandb import history, inspected, offline_run, results, summary
from training import Net, audit_set, fit, trainer
from typer.testing import CliRunner
from wandb_server import KEY, PROJECT, Double, Taken, serving

from bias_audit import AuditPlan, read_run
from bias_audit.callbacks import BiasAuditCallback, Session, WandbSink
from bias_audit.callbacks.aside import PATIENCE_S
from bias_audit.callbacks.sinks import FanOut, RunDirectorySink
from bias_audit.callbacks.wandb.sink import own_run
from bias_audit.callbacks.wandb.workspace import push
from bias_audit.callbacks.wandb.writer import WandbWriter, _next
from bias_audit.cli import app
from bias_audit.records.files import COPIES
from bias_audit.records.results import AuditResult
from bias_audit.records.runs import Run
from bias_audit.records.writing import RunDirectory


@pytest.fixture(autouse=True)
def _nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No account, no home, and nothing of W&B's left behind."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    yield
    # Where its service is gone the first call says so, and the next begins anew.
    with suppress(Exception):
        wandb.teardown()
    wandb.teardown()


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[Double]:
    double = Double()
    with serving(double) as surroundings:
        for name, value in surroundings.items():
            monkeypatch.setenv(name, value)
        yield double
        # Before the server goes: W&B has something to say to it at its end.
        double.answering.set()
        with suppress(Exception):
            wandb.teardown()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("aside", "wandb.sink"):
        monkeypatch.setattr(f"bias_audit.callbacks.{module}.PATIENCE_S", 1.0)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights of a training without audits."""
    return fit(trainer(tmp_path_factory.mktemp("alone"))).state_dict()


class At(pl.Callback):
    """Does something once, in the middle of a training."""

    def __init__(self, do: Callable[[], None]) -> None:
        self._do = do

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == 1:
            self._do()


def until(true: Callable[[], Any]) -> None:
    """Wait, but not for ever."""
    by = time.monotonic() + 120
    while not true():
        assert time.monotonic() < by, "it does not come"
        time.sleep(0.01)


def trained(
    path: Path, own: dict[str, Any] | None = None, do: Callable[[], None] | None = None, epochs: int = 2
) -> tuple[Net, list[str]]:
    """A training with a W&B run of the callback's own, and what was warned of W&B."""
    audit = BiasAuditCallback(
        audit_set(1), dirpath=path / "run", plan=AuditPlan(batch_size=8), wandb={"project": PROJECT, **(own or {})}
    )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        net = fit(trainer(path, audit, *([At(do)] if do else []), max_epochs=epochs))
    return net, [str(w.message) for w in said if "bias-audit" in str(w.message) and "W&B" in str(w.message)]


def same(net: Net, alone: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), alone.values(), strict=True))


def whole(run: Path) -> Run:
    """The run of a training of two epochs: three audits and a page."""
    found = read_run(run)
    assert [a.step for a in found.audits] == [0, 4, 8] and found.ended and not found.failed
    assert (run / "report.html").exists()
    return found


def audits_sent(double: Double) -> dict[str, list[int]]:
    """Of each W&B run the steps of the audits that have arrived, in order."""
    steps = {
        name: [row["trainer/global_step"] for _, row in sorted(logging.rows.items()) if "trainer/global_step" in row]
        for name, logging in double.logging.items()
    }
    return steps


def artifacts(double: Double, run: str) -> list[Taken]:
    """The run directories that have arrived."""
    return [a for a in double.logging[run].artifacts if a.name.startswith("bias_audit-") and a.committed]


def test_a_network_that_stalls_and_what_it_kept_is_sent_later(
    tmp_path: Path, online: Double, impatient: None, alone: dict[str, torch.Tensor]
) -> None:
    def stall() -> None:
        until(lambda: online.logging and audits_sent(online) != {name: [] for name in online.logging})
        online.answering.clear()

    net, said = trained(tmp_path, {"settings": {"x_file_stream_transmit_interval": 0.1}}, stall)
    assert same(net, alone)
    (told,) = said
    run = whole(tmp_path / "run")
    assert "W&B failed and is left out from now on; training goes on: it was not done 1 seconds after the" in told
    assert "the run was not finished (TimeoutError" in told
    assert f"of 3 audits; the run directory has them, and `bias-audit dashboard push {run.path} --send`" in told
    # The network is back.
    online.answering.set()
    wandb.teardown()
    with pytest.raises(ValueError, match=r"W&B was given . of 3 audits: give --send to make a run of all of them"):
        push(run.path)
    before = set(online.logging)
    done = CliRunner().invoke(app, ["dashboard", "push", str(run.path), "--send"])
    assert done.exit_code == 0, done.output
    (new,) = set(online.logging) - before
    logging = online.logging[new]
    rows = [row for _, row in sorted(logging.rows.items()) if "trainer/global_step" in row]
    assert [row["trainer/global_step"] for row in rows] == [0, 4, 8]
    for row, audit in zip(rows, run.audits, strict=True):
        assert row["bias_audit/accuracy"] == audit.estimate("accuracy").value
    assert logging.complete and logging.summary["bias_audit/outcome"] == str(run.audits[-1].judgement.outcome)
    final = next(a for a in artifacts(online, new) if "final" in a.aliases)
    files = {str(p.relative_to(run.path)): p for p in run.path.rglob("*") if p.is_file()}
    assert set(final.manifest["contents"]) == set(files)
    # What an artifact of this run brought already is not sent again.
    arrived = {name: content for a in artifacts(online, new) for name, content in a.files.items()}
    for name, file in files.items():
        assert name == "wandb.json" or arrived[name] == file.read_bytes(), name
    assert len(online.views) == 1


def test_its_service_is_killed(tmp_path: Path, alone: dict[str, torch.Tensor]) -> None:
    def kill() -> None:
        found = subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "pid=,comm="], capture_output=True, text=True)
        (line,) = (line for line in found.stdout.splitlines() if "wandb-core" in line)
        os.kill(int(line.split()[0]), signal.SIGKILL)

    net, said = trained(tmp_path, {"mode": "offline"}, kill)
    assert same(net, alone)
    (told,) = said
    assert "W&B failed and is left out" in told and "--send` makes a W&B run of them" in told
    whole(tmp_path / "run")


def test_no_run_can_be_opened(tmp_path: Path, online: Double, monkeypatch: pytest.MonkeyPatch) -> None:
    soon = {"project": PROJECT, "settings": {"init_timeout": 0.5}}
    online.answering.clear()
    with pytest.raises(wandb.Error, match="Timed out"):
        own_run(soon)
    online.answering.set()
    # W&B reads its surroundings once.
    wandb.teardown()
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    with pytest.raises(wandb.Error, match="connection refused"):
        own_run(soon)
    wandb.teardown()
    monkeypatch.delenv("WANDB_API_KEY")
    _, (told,) = trained(tmp_path, epochs=1)
    assert told.startswith("bias-audit: no W&B run, training goes on without: No API key configured")
    assert f"`bias-audit dashboard push {tmp_path / 'run'} --project NAME --send` makes a W&B run of them" in told
    assert [a.step for a in read_run(tmp_path / "run").audits] == [0, 4]


def test_the_end_of_a_run_has_a_time_limit_unless_one_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def limit(settings: Any) -> tuple[float, bool]:
        run = own_run({"mode": "offline", "settings": settings})
        run.finish()
        return run.settings.finish_timeout, run.settings.finish_timeout_raises

    assert limit(None) == (PATIENCE_S, True)
    assert limit({"finish_timeout": 5}) == limit(wandb.Settings(finish_timeout=5)) == (5, True)
    wandb.teardown()
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "7")
    assert limit(None) == (7, True)


def recorded(path: Path, **options: Any) -> tuple[Run, RunDirectory, list[AuditResult]]:
    """A run directory without audits, and four that may be recorded in it."""
    whole = read_run(make_run(path / "whole", audits=3, samples=8, reference=True))
    directory = RunDirectory.create(path / "run", whole.manifest, whole.sheet(), **options)
    return read_run(path / "run"), directory, results(whole)


def started(run: Run, own: wandb.Run, **options: Any) -> WandbSink:
    sink = WandbSink(own, panel=1, worst=0)
    sink.start(Session("bias_audit", run.path, run.manifest, read_run(run.path).sheet(), **options))
    return sink


def stopped(sink: WandbSink) -> int:
    """The process that sends, which stands still from now on."""
    assert sink._aside is not None and sink._aside._process is not None
    os.kill(sink._aside._process.pid, signal.SIGSTOP)
    return sink._aside._process.pid


def test_audits_wait_in_the_run_directory_and_none_is_lost(tmp_path: Path) -> None:
    run, directory, audits = recorded(tmp_path)
    # One is made at the same second of the same step as another, for the same reason.
    audits[2] = replace(audits[1], seconds=9.0)
    with offline_run(tmp_path) as own:
        sink = started(run, own)
        directory.append(audits[0])
        sink.write(audits[0])
        process = stopped(sink)
        # What waits is bounded by the pipe, whatever its size is.
        for _ in range(3000):
            sink.fail(1, "x" * 300)
        assert sink._aside is not None and not sink._aside.tell("fail", 0, 1, "x" * 300)
        for audit in audits[1:]:
            directory.append(audit)
            sink.write(audit)
        # The last one could not be recorded.
        sink.write(replace(audits[3], step=400))
        os.kill(process, signal.SIGCONT)
        sink.end()
    records = inspected(tmp_path)
    rows = [row for row in history(records) if "bias_audit_1_verdict/violated_rules" in row]
    assert [row["trainer/global_step"] for row in rows] == [0, 100, 100, 300]
    said = summary(records)["bias_audit/failed"]
    assert said == "the audit at step 400 failed: it could not be recorded, so it is not sent"
    assert json.loads((run.path / "wandb.json").read_bytes())["audits"] == 4


@pytest.mark.slow
def test_scores_that_were_dropped_before_they_were_sent_are_told(tmp_path: Path) -> None:
    run, directory, audits = recorded(tmp_path, keep=1)
    with offline_run(tmp_path) as own:
        sink = started(run, own, keep=1)
        for audit in audits:
            directory.append(audit)
            sink.write(audit)
            if audit is audits[0]:
                process = stopped(sink)
        os.kill(process, signal.SIGCONT)
        with pytest.raises(RuntimeError, match="of 2 audits the run directory no longer had the scores"):
            sink.end()
        copy = read_run(Path(own.dir).parent / COPIES / "bias_audit")
    rows = [row for row in history(inspected(tmp_path)) if "bias_audit_1_verdict/violated_rules" in row]
    assert [row["trainer/global_step"] for row in rows] == [0, 300]
    assert [copy.has_scores(i) for i in range(4)] == [True, False, False, True]


def test_an_artifact_is_the_run_directory_as_it_was_though_scores_are_dropped(tmp_path: Path) -> None:
    run, directory, audits = recorded(tmp_path, keep=2)
    with offline_run(tmp_path) as own:
        writer = WandbWriter(own, panel=0, worst=0)
        writer.start(Session("bias_audit", run.path, run.manifest, read_run(run.path).sheet(), keep=2))
        for audit in audits[:3]:
            directory.append(audit)
            writer.write(audit)
        directory.append(audits[3])
        # Late: what the third went with has been dropped for the sake of the fourth.
        assert not writer._records.send(audits[2], {})
        directory.append(replace(audits[3], step=400))
        writer.write(replace(audits[3], step=400))
        copy = Path(own.dir).parent / COPIES / "bias_audit"
    # A link would keep what was dropped on the disk.
    kept = [sorted(file.name for file in (path / "audits").iterdir()) for path in (copy, run.path)]
    assert kept[0] == kept[1] == ["000000.npz", "000003.npz", "000004.npz"]
    sent = [r["artifact"] for r in inspected(tmp_path) if r.get("artifact", {}).get("type") == "bias-audit"]
    assert len(sent) == 4
    for count, artifact in enumerate(sent):
        for item in artifact["manifest"]["contents"]:
            target = tmp_path / "got" / str(count) / item["path"]
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(item["local_path"], target)
    then = [read_run(tmp_path / "got" / str(count)) for count in range(4)]
    assert [[r.has_scores(i) for i in range(len(r.audits))] for r in then] == [
        [True],
        [True, True],
        [True, True, True],
        [True, False, False, True, True],
    ]
    for found in then:
        for index in range(len(found.audits)):
            found.verify(index)


def test_records_that_cannot_be_gone_on_with_do_not_end_training(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", audits=1))
    (tmp_path / "file").touch()
    fan_out = FanOut([RunDirectorySink(), WandbSink(wandb.init(mode="disabled", reinit="create_new"))], "warn")
    session = Session("bias_audit", tmp_path / "file" / "here", run.manifest, run.sheet(), run.path, 100)
    with pytest.warns(RuntimeWarning) as told:
        fan_out.start(session)
    said = [str(w.message) for w in told]
    assert "RunDirectorySink failed" in said[0] and "Not a directory" in said[0] and "W&B failed" in said[1]


def test_what_holds_all_audits_is_not_sent_with_each_for_ever() -> None:
    counts, due = [], 0
    for count in range(2000):
        if count >= due:
            counts.append(count + 1)
            due = _next(count, 1)
    assert counts[:100] == list(range(1, 101))
    # In proportion to the audits: sent with each, it would be a thousand times as many.
    assert sum(counts) < 15 * 2000 and 2000 / counts[-1] < 1.1


def test_who_is_refused_tries_again(tmp_path: Path, online: Double) -> None:
    run, directory, audits = recorded(tmp_path)
    own = own_run({"project": PROJECT})
    online.key = "0" * 40
    sink = started(run, own)
    directory.append(audits[0])
    sink.write(audits[0])
    until(lambda: online.turned_away)
    online.key = KEY
    directory.append(audits[1])
    sink.write(audits[1])
    told = run.path / "wandb.json"
    until(lambda: told.exists() and json.loads(told.read_bytes())["audits"] == 2)
    sink.end()
    own.finish()
    assert audits_sent(online)[own.id] == [0, 100]
    assert json.loads((run.path / "wandb.json").read_bytes())["audits"] == 2

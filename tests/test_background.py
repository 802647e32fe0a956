"""Sinks on a thread of their own: what is handed over arrives in order, what fails is told, and nobody waits."""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.loggers import MLFlowLogger, TensorBoardLogger
from synthetic import make_run
from training import Net, audit_set, fit, loader, trainer

from bias_audit import AuditPlan, read_run
from bias_audit.callbacks import Background, BiasAuditCallback, ReportSink, Session
from bias_audit.callbacks.mlflow import MlflowSink
from bias_audit.callbacks.sinks import FanOut
from bias_audit.callbacks.tensorboard import TensorBoardSink
from bias_audit.records.results import AuditResult
from bias_audit.records.runs import Run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return read_run(make_run(tmp_path_factory.mktemp("background") / "run", audits=3, samples=8, reference=True))


def result_of(run: Run, index: int, step: int | None = None) -> AuditResult:
    audit = run.audits[index]
    return AuditResult(**vars(replace(audit, step=audit.step if step is None else step)), scores=run.scores(index))


def session_of(run: Run) -> Session:
    return Session("bias_audit", run.path, run.manifest, run.sheet())


class Slow:
    """Holds each audit until it is let go, and notes what came."""

    def __init__(self) -> None:
        self.came: list[Any] = []
        self.threads: set[int] = set()
        self.entered, self.let_go = threading.Event(), threading.Event()

    def start(self, session: Session) -> None:
        self.came.append(session.name)

    def write(self, result: AuditResult) -> None:
        self.threads.add(threading.get_ident())
        self.entered.set()
        assert self.let_go.wait(30)
        self.came.append(result.step)

    def fail(self, step: int, reason: str) -> None:
        self.came.append((step, reason))

    def end(self, error: str = "") -> None:
        self.came.append(f"end {error}")


def test_everything_arrives_in_order_and_nobody_waits_for_it(run: Run) -> None:
    slow = Slow()
    sink = Background(slow)
    sink.start(session_of(run))
    sink.write(result_of(run, 1, 10))
    assert slow.entered.wait(30)
    sink.write(result_of(run, 1, 20))
    sink.fail(30, "no memory")
    assert slow.came == ["bias_audit"], "handing over returned while the first audit is still being written"
    slow.let_go.set()
    sink.end("broke off")
    assert slow.came == ["bias_audit", 10, 20, (30, "no memory"), "end broke off"]
    assert slow.threads.isdisjoint({threading.get_ident()}) and len(slow.threads) == 1


def test_it_goes_on_after_its_end_and_leaves_no_thread(run: Run) -> None:
    before = threading.active_count()
    slow = Slow()
    slow.let_go.set()
    sink = Background(slow)
    sink.start(session_of(run))
    for step in (1, 2):
        sink.write(result_of(run, 1, step))
        sink.end()
    assert slow.came == ["bias_audit", 1, "end ", 2, "end "]
    assert threading.active_count() == before


def test_of_too_many_the_oldest_is_left_out_and_said(run: Run) -> None:
    slow = Slow()
    sink = Background(slow, most=2)
    sink.start(session_of(run))
    sink.write(result_of(run, 1, 0))
    assert slow.entered.wait(30)
    for step in range(1, 6):
        sink.write(result_of(run, 1, step))
    sink.fail(6, "a failure is never left out")
    slow.let_go.set()
    with pytest.warns(RuntimeWarning, match=r"Slow is slower than the audits: 3 of them are not in it"):
        sink.end()
    assert slow.came[1:] == [0, 4, 5, (6, "a failure is never left out"), "end "]


class Broken(Slow):
    def write(self, result: AuditResult) -> None:
        self.came.append(result.step)
        raise OSError(f"no space left at step {result.step}")


def test_what_fails_is_told_once_and_leaves_the_others_alone(run: Run) -> None:
    before = threading.active_count()
    broken, well = Broken(), Slow()
    well.let_go.set()
    fan_out = FanOut([Background(broken), Background(well)], "warn")
    fan_out.start(session_of(run))
    fan_out.write(result_of(run, 1, 1))
    with pytest.warns(RuntimeWarning, match=r"Broken failed and is left out .* no space left at step 1") as told:
        fan_out.end()
    assert len(told) == 1
    assert broken.came == ["bias_audit", 1] and well.came == ["bias_audit", 1, "end "]
    assert threading.active_count() == before


def test_a_failure_is_raised_where_that_was_asked_for(run: Run) -> None:
    fan_out = FanOut([Background(Broken())], "raise")
    fan_out.start(session_of(run))
    fan_out.write(result_of(run, 1, 1))
    with pytest.raises(OSError, match="no space left at step 1"):
        fan_out.end()


class SlowAfterOne(Slow):
    def write(self, result: AuditResult) -> None:
        if len(self.came) == 1:
            self.came.append(result.step)
        else:
            super().write(result)


def test_one_that_hangs_is_not_waited_for(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bias_audit.callbacks.background.PATIENCE_S", 0.05)
    slow = SlowAfterOne()
    sink = Background(slow)
    sink.start(session_of(run))
    sink.write(result_of(run, 1, 10))
    sink.write(result_of(run, 1, 20))
    assert slow.entered.wait(30)
    with pytest.warns(RuntimeWarning, match=r"Slow\w+ is not done .* it has 1 of 2 audits; the run directory has all"):
        sink.end()
    assert slow.came == ["bias_audit", 10]
    slow.let_go.set()
    assert sink._thread is not None
    sink._thread.join()


@contextmanager
def stalling(letting_go: threading.Event) -> Iterator[str]:
    """An MLflow server that knows one run, and never answers who brings it a file."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if "mlflow-artifacts" in self.path:
                letting_go.wait()
            place = {"experiment_id": "1", "lifecycle_stage": "active"}
            run = place | {"run_id": "r", "status": "RUNNING", "artifact_uri": "mlflow-artifacts:/r", "start_time": 0}
            experiment = place | {"name": "lightning_logs", "artifact_location": "mlflow-artifacts:/"}
            content = json.dumps({"experiment": experiment, "run": {"info": run, "data": {}}, "run_info": run}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = answer

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        letting_go.set()
        server.shutdown()
        thread.join()
        server.server_close()


def test_loggers_in_trouble_are_told_once_and_leave_the_others_alone(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bias_audit.callbacks.background.PATIENCE_S", 0.05)
    # No directory can be made below a file, whoever asks.
    (tmp_path / "file").touch()
    well = Slow()
    well.let_go.set()
    letting_go = threading.Event()
    with stalling(letting_go) as uri:
        stuck = Background(MlflowSink(MLFlowLogger(tracking_uri=uri)))
        fan_out = FanOut([stuck, Background(TensorBoardSink(TensorBoardLogger(tmp_path / "file"))), well], "warn")
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", RuntimeWarning)
            fan_out.start(session_of(run))
            for index in range(3):
                fan_out.write(result_of(run, index))
            fan_out.end()
        letting_go.set()
        assert stuck._thread is not None
        stuck._thread.join()
    tensorboard, mlflow = (str(w.message) for w in told if "bias-audit" in str(w.message))
    assert tensorboard.startswith("bias-audit: TensorBoard failed and is left out") and "Not a directory" in tensorboard
    assert "MLflow is not done" in mlflow and "it has 0 of 3 audits; the run directory has all" in mlflow
    assert well.came == ["bias_audit", *(audit.step for audit in run.audits[:3]), "end "]


def test_room_for_none_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        Background(ReportSink(), most=0)


def test_a_late_worker_is_not_joined_by_another(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bias_audit.callbacks.background.PATIENCE_S", 0.05)
    slow = Slow()
    sink = Background(slow)
    sink.start(session_of(run))
    sink.write(result_of(run, 1, 1))
    with pytest.warns(RuntimeWarning, match="is not done"):
        sink.end()
    sink.write(result_of(run, 1, 2))
    slow.let_go.set()
    monkeypatch.setattr("bias_audit.callbacks.background.PATIENCE_S", 60)
    sink.end()
    assert slow.came == ["bias_audit", 1, "end ", 2, "end "] and len(slow.threads) == 1


class SlowOnPurpose(Slow):
    """Still at work when training ends."""

    def write(self, result: AuditResult) -> None:
        threading.Event().wait(0.2)
        self.came.append(result.step)


class Counting(Slow):
    """Counts its ends."""

    def write(self, result: AuditResult) -> None:
        self.came.append(result.trigger)


def test_a_stage_without_an_audit_ends_nothing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    counting, slow, before = Counting(), SlowOnPurpose(), threading.active_count()
    sinks = [counting, Background(slow)]
    audit = BiasAuditCallback(audit_set(), dirpath="audit", plan=AuditPlan(batch_size=8), sinks=sinks)

    class Elsewhere(Net):
        def on_train_start(self) -> None:
            (tmp_path / "elsewhere").mkdir()
            monkeypatch.chdir(tmp_path / "elsewhere")

        def predict_step(self, batch: list[torch.Tensor], _index: int) -> torch.Tensor:
            return self(batch[0])

    one = trainer(tmp_path, audit, max_epochs=1)
    net = fit(one, Elsewhere)
    assert slow.came == ["bias_audit", 0, 4, "end "] and threading.active_count() == before
    one.predict(net, loader(2, shuffle=False))
    one.test(net, loader(2, shuffle=False), verbose=False)
    assert counting.came == ["bias_audit", "reference", "validation", "end ", "test", "end "]
    assert slow.came == ["bias_audit", 0, 4, "end ", 4, "end "] and threading.active_count() == before
    # The training changed its working directory, and the records stay where they were.
    run = read_run(tmp_path / "audit")
    assert [a.trigger for a in run.audits] == ["reference", "validation", "test"]
    page = (run.path / "report.html").read_text(encoding="utf-8")
    assert f"step {run.audits[-1].step}" in page and "data-live" not in page
    assert not any((tmp_path / "elsewhere").iterdir())

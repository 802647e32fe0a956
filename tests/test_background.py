"""Sinks on a thread of their own: what is handed over arrives in order, what fails is told, and nobody waits."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic import make_run
from training import Net, audit_set, fit, loader, trainer

from bias_audit import AuditPlan, read_run
from bias_audit.callbacks import Background, BiasAuditCallback, ReportSink, Session
from bias_audit.callbacks.sinks import FanOut
from bias_audit.records import AuditResult, Run


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


def test_one_that_hangs_is_not_waited_for(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bias_audit.callbacks.background.PATIENCE_S", 0.05)
    slow = Slow()
    sink = Background(slow)
    sink.start(session_of(run))
    sink.write(result_of(run, 1))
    with pytest.warns(RuntimeWarning, match="Slow is not done"):
        sink.end()
    assert slow.came == ["bias_audit"]
    slow.let_go.set()
    assert sink._thread is not None
    sink._thread.join()


def test_room_for_none_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        Background(ReportSink(), most=0)


class SlowOnPurpose(Slow):
    """Still at work when training ends."""

    def write(self, result: AuditResult) -> None:
        threading.Event().wait(0.2)
        self.came.append(result.step)


def test_a_training_ends_when_its_pictures_are_done(tmp_path: Path) -> None:
    slow = SlowOnPurpose()
    before = threading.active_count()
    audit = BiasAuditCallback(
        audit_set(), dirpath=tmp_path / "audit", plan=AuditPlan(batch_size=8), sinks=[Background(slow)]
    )
    fit(trainer(tmp_path, audit))
    run = read_run(tmp_path)
    assert slow.came == ["bias_audit", *(a.step for a in run.audits), "end "]
    assert threading.active_count() == before
    page = (run.path / "report.html").read_text(encoding="utf-8")
    assert f"step {run.audits[-1].step}" in page and "data-live" not in page


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


class Counting(Slow):
    """Counts its ends."""

    def write(self, result: AuditResult) -> None:
        self.came.append(result.trigger)


def test_a_stage_without_an_audit_ends_nothing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    counting = Counting()
    audit = BiasAuditCallback(audit_set(), dirpath="audit", plan=AuditPlan(batch_size=8), sinks=[counting])

    class Elsewhere(Net):
        def on_train_start(self) -> None:
            (tmp_path / "elsewhere").mkdir()
            monkeypatch.chdir(tmp_path / "elsewhere")

        def predict_step(self, batch: list[torch.Tensor], _index: int) -> torch.Tensor:
            return self(batch[0])

    one = trainer(tmp_path, audit, max_epochs=1)
    net = fit(one, Elsewhere)
    one.predict(net, loader(2, shuffle=False))
    one.test(net, loader(2, shuffle=False), verbose=False)
    assert counting.came == ["bias_audit", "reference", "validation", "end ", "test", "end "]
    # The training changed its working directory, and the records stay where they were.
    assert [a.trigger for a in read_run(tmp_path / "audit").audits] == ["reference", "validation", "test"]
    assert not any((tmp_path / "elsewhere").iterdir())

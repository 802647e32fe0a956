"""The process that draws the page while training runs: it keeps up, gives way, tells what fails, and ends."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from synthetic import make_run

from bias_audit.callbacks import ReportSink, Session
from bias_audit.records.results import AuditResult
from bias_audit.records.runs import Run, read_run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return read_run(make_run(tmp_path / "run", samples=6, audits=2, ended=False))


@pytest.fixture
def sink(run: Run) -> Iterator[ReportSink]:
    sink = ReportSink()
    sink.start(Session("bias_audit", run.path, run.manifest, run.sheet()))
    yield sink
    if sink._aside._process is not None:
        sink._aside._process.kill()
        sink._aside._process.wait()


def result_of(run: Run) -> AuditResult:
    return AuditResult(**vars(run.audits[-1]), scores=run.scores(1))


def wait_for(what: Callable[[], object]) -> None:
    until = time.monotonic() + 60
    while not what():
        assert time.monotonic() < until
        time.sleep(0.01)


def followers(path: Path) -> list[int]:
    """The processes that draw the page of the run directory."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"bias_audit.report.follow" in words and os.fsencode(path) in words:
            found.append(int(entry.name))
    return found


def test_the_page_follows_an_audit_and_is_complete_at_the_end(run: Run, sink: ReportSink) -> None:
    page = run.path / "report.html"
    sink.write(result_of(run))
    wait_for(page.exists)
    assert "data-live" in page.read_text(encoding="utf-8")
    sink.fail(300, "no memory")
    sink.end()
    assert followers(run.path) == []
    shutil.rmtree(run.path)
    make_run(run.path, samples=6, audits=3)
    # The same Trainer goes on to test: another process draws, and the first word is the last.
    sink.end()
    drawn = page.read_text(encoding="utf-8")
    assert "step 300" in drawn and "data-live" not in drawn


def test_of_many_audits_that_come_at_once_not_each_is_drawn(run: Run, sink: ReportSink) -> None:
    for _ in range(200):
        sink.write(result_of(run))
    started = time.monotonic()
    sink.end()
    assert (run.path / "report.html").exists()
    # Two hundred pages would take minutes.
    assert time.monotonic() - started < 60


def test_what_it_cannot_draw_is_told(run: Run, sink: ReportSink) -> None:
    (run.path / "samples.npz").unlink()
    sink.write(result_of(run))
    with pytest.raises(RuntimeError, match=r"RecordError: .*samples\.npz"):
        sink.end()


def test_what_failed_before_is_told_by_the_next_audit(run: Run, sink: ReportSink) -> None:
    (run.path / "samples.npz").unlink()
    sink.write(result_of(run))
    assert sink._aside._process is not None
    sink._aside._process.wait()
    with pytest.raises(RuntimeError, match=r"samples\.npz"):
        sink.write(result_of(run))


def test_one_that_is_killed_is_told(run: Run, sink: ReportSink) -> None:
    sink.write(result_of(run))
    assert sink._aside._process is not None
    sink._aside._process.kill()
    sink._aside._process.wait()
    with pytest.raises(RuntimeError, match="was killed"):
        sink.write(result_of(run))


def test_one_that_hangs_is_not_waited_for(run: Run, sink: ReportSink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bias_audit.callbacks.aside.PATIENCE_S", 0.1)
    sink.write(result_of(run))
    assert sink._aside._process is not None
    os.kill(sink._aside._process.pid, signal.SIGSTOP)
    with pytest.raises(RuntimeError, match="was not done 0 seconds after"):
        sink.end()
    assert followers(run.path) == []


def test_ctrl_c_and_forked_workers_do_not_keep_the_last_page(run: Run, sink: ReportSink) -> None:
    sink.write(result_of(run))
    wait_for((run.path / "report.html").exists)
    # A DataLoader's worker holds the other end of everything that was open when it was forked.
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,), daemon=True)
    worker.start()
    try:
        (pid,) = followers(run.path)
        # What a terminal sends on Ctrl-C goes to the training's group of processes.
        assert os.getpgid(pid) != os.getpgid(0) and os.getsid(pid) == os.getsid(0)
        (run.path / "report.html").unlink()
        sink.end()
        assert (run.path / "report.html").exists()
    finally:
        worker.kill()


def test_it_ends_with_a_training_that_is_killed(run: Run) -> None:
    script = f"""
from pathlib import Path
import time
from bias_audit.callbacks import ReportSink, Session
from bias_audit.records.runs import read_run
run = read_run({str(run.path)!r})
sink = ReportSink()
sink.start(Session("bias_audit", run.path, run.manifest, run.sheet()))
sink.fail(1, "")
print("asked", flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as training:
        try:
            assert training.stdout is not None and training.stdout.readline() == b"asked\n"
            wait_for(lambda: len(followers(run.path)) == 1)
        finally:
            training.kill()
    wait_for(lambda: not followers(run.path))
    assert (run.path / "report.html").exists()

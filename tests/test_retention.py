"""A run that keeps the arrays of its newest audits only is as readable as one that keeps all."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from recorded import assert_same, manifest, result, sheet, steps_of, tiny, tree
from synthetic import make_run
from training import audit_set, fit, trainer
from typer.testing import CliRunner

from bias_audit import AuditPlan
from bias_audit.callbacks import BiasAuditCallback
from bias_audit.cli import app
from bias_audit.gate.compare import compare_runs
from bias_audit.records import runs
from bias_audit.records.errors import MissingEvidenceError
from bias_audit.records.files import AUDITS
from bias_audit.records.runs import Run, RunReader, read_run
from bias_audit.records.writing import RunDirectory
from bias_audit.report.compare import render_comparison
from bias_audit.report.page import render, write_report
from bias_audit.sources import judge_source
from bias_audit.terms import Estimate

EVERY = {"min_samples": 1, "rules": [{"metric": "accuracy", "at": "every", "min": 0.0, "on": "point"}]}


def held(run: Run) -> list[int]:
    """The steps of the audits that have their scores; their files, and no others, are there."""
    found = [i for i in range(len(run.audits)) if run.has_scores(i)]
    files = sorted(f"audits/{file.name}" for file in (run.path / "audits").iterdir())
    assert files == sorted(str(run.array_file(i)) for i in found)
    return [run.audits[i].step for i in found]


def kept(path: Path, keep: int, **options: Any) -> Run:
    """An invented run, its arrays kept of so many audits."""
    source = read_run(make_run(path / "whole", **options))
    target = path / f"kept-{keep}"
    directory = RunDirectory.resume(target, source.path, source.manifest, source.sheet(), 10**9, keep=keep)
    directory.end()
    return read_run(target)


def removal(age: int) -> Estimate:
    return Estimate("removal_flips", 0.5, 0.4, 0.6, 3, "hair", age=age)


def test_the_newest_the_reference_the_best_and_what_they_rest_on(tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path, manifest(), sheet(), keep=2)
    for step, age, best, expected in (
        (0, 0, None, [0]),
        (10, 0, None, [0, 10]),
        (20, 1, 20, [0, 10, 20]),
        (30, 2, None, [0, 10, 20, 30]),
        (40, 0, None, [0, 10, 20, 30, 40]),
        # The best rests on interventions of step 10.
        (50, 1, None, [0, 10, 20, 40, 50]),
        (60, 0, 60, [0, 10, 20, 40, 50, 60]),
        (70, 0, None, [0, 60, 70]),
    ):
        directory.append(result(step, removal(age), trigger="reference" if step == 0 else "validation"))
        if best is not None:
            directory.best(best)
        assert held(read_run(tmp_path)) == expected
    directory.end()
    run = read_run(tmp_path)
    assert run.ended and steps_of(run) == [*range(0, 80, 10)] and run.best_step == 60
    assert_same(run.scores(7), result(70).scores)
    assert not run.has_scores(2) and run.samples(2) == 3
    run.verify(2)
    with pytest.raises(MissingEvidenceError, match="the scores of the audit at step 20 were dropped"):
        run.scores(2)
    # What is missing without having been dropped is missing.
    (tmp_path / "audits/000006.npz").unlink()
    with pytest.raises(MissingEvidenceError, match=r"000006\.npz: is missing"):
        read_run(tmp_path)


def test_going_on_with_what_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "run"
    directory = RunDirectory.create(path, manifest(), sheet(), keep=1)
    for step in (10, 20, 30, 40):
        directory.append(result(step))
        if step == 20:
            directory.best(20)
    assert held(read_run(path)) == [20, 40]
    # Leftovers of writers: of one that was killed, and of one that is at work.
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    leftovers = [f".report.html.{gone.stdout.strip()}.tmp", f"audits/.000004.npz.{os.getpid()}.tmp"]
    at_work = path / f".report.html.{os.getppid()}.tmp"
    for file in (*(path / name for name in leftovers), at_work):
        file.write_bytes(b"half")
    # Elsewhere, what was dropped stays dropped, and the best is known.
    before = tree(path)
    elsewhere = RunDirectory.resume(tmp_path / "other", path, manifest(), sheet(), 40, keep=2)
    assert tree(path) == before
    run = read_run(elsewhere.path)
    assert steps_of(run) == [10, 20, 30, 40] and held(run) == [20, 40] and run.best_step == 20
    assert run.samples(0) == 3 and run.audits == read_run(path).audits
    elsewhere.append(result(50))
    assert held(read_run(elsewhere.path)) == [20, 40, 50]
    # In place: the arrays of audits that were made in vain go, and those dropped before do not come back.
    directory = RunDirectory.resume(path, path, manifest(), sheet(), 30, keep=1)
    assert held(read_run(path)) == [20] and steps_of(read_run(path)) == [10, 20, 30]
    assert [file.name for file in path.rglob("*.tmp")] == [at_work.name]
    directory.append(result(45))
    assert held(read_run(path)) == [20, 45]
    # Nothing is dropped where all is kept from now on.
    directory = RunDirectory.resume(path, path, manifest(), sheet(), 45)
    directory.append(result(50))
    directory.append(result(60))
    assert held(read_run(path)) == [20, 45, 50, 60]


def test_reading_while_arrays_are_dropped(tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path, manifest(), sheet(), keep=1)
    results = [result(step) for step in range(40)]
    writer = Thread(target=lambda: [directory.append(one) for one in results])
    writer.start()
    reader, reads = RunReader(tmp_path), 0
    while writer.is_alive():
        for run in (reader.read(), read_run(tmp_path)):
            assert steps_of(run) == [*range(len(run.audits))]
            reads += 1
    writer.join()
    assert reads and reader.read() == read_run(tmp_path)
    assert steps_of(reader.read()) == [*range(40)] and held(reader.read()) == [39]


def test_arrays_dropped_between_the_lines_and_the_look_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = RunDirectory.create(tmp_path, manifest(), sheet(), keep=1)
    directory.append(result(10))
    look, late = runs._check_arrays, [result(20)]

    def slow(*what: Any) -> None:
        if late:
            directory.append(late.pop())
        look(*what)

    monkeypatch.setattr(runs, "_check_arrays", slow)
    run = read_run(tmp_path)
    assert not late and steps_of(run) == [10, 20] and held(run) == [20]


def test_a_run_that_is_set_aside_while_it_is_read_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = RunDirectory.create(tmp_path, manifest(), sheet())
    directory.append(result(10))
    look = runs._check_arrays

    def slow(*what: Any) -> None:
        shutil.rmtree(tmp_path / "audits")
        (tmp_path / "audits.jsonl").unlink()
        look(*what)

    monkeypatch.setattr(runs, "_check_arrays", slow)
    with pytest.raises(MissingEvidenceError, match="is missing"):
        read_run(tmp_path)


def test_gate_page_and_comparison_of_what_is_kept(tmp_path: Path) -> None:
    run = kept(tmp_path, 2, reference=True, audits=6)
    whole = read_run(tmp_path / "whole")
    assert [run.has_scores(i) for i in range(7)] == [True, False, False, False, False, True, True]
    # The gate says the same of each audit, and of the last one names the same images.
    judged, of_whole = (judge_source(str(r.path), EVERY) for r in (run, whole))
    assert judged.exit_code == of_whole.exit_code == 0 and len(judged.checks) == 6
    assert judged.checks == of_whole.checks
    by_its_own, of_whole = judge_source(str(run.path)), judge_source(str(whole.path))
    assert by_its_own.exit_code == of_whole.exit_code == 1 and by_its_own.checks == of_whole.checks
    # Replay is of what is there, and says so.
    page = render(run)
    assert "4 earlier audits are in the charts, and not here." in page
    found = compare_runs(whole, run)
    assert found.shared and not found.of("changed") and "Heatmaps" in render_comparison(found).title()
    asked = CliRunner().invoke(app, ["clusters", str(run.path), "--audit", "2"])
    assert asked.exit_code != 0 and isinstance(asked.exception, MissingEvidenceError)
    assert CliRunner().invoke(app, ["show", str(run.path), "--samples", "2"]).exit_code == 0


def test_where_the_last_audit_has_lost_its_scores(tmp_path: Path) -> None:
    whole = kept(tmp_path, 1, audits=3)
    # Gone back to an audit before the one that is kept.
    RunDirectory.resume(whole.path, whole.path, whole.manifest, whole.sheet(), whole.audits[1].step, keep=1)
    run = read_run(whole.path)
    assert len(run.audits) == 2 and held(run) == []
    assert judge_source(str(run.path), EVERY).exit_code == 3
    assert "The scores of these audits were dropped" in write_report(run).read_text()
    found = compare_runs(read_run(tmp_path / "whole"), run)
    assert any("were dropped" in note for note in found.notes) and found.differences
    assert "The heatmaps of one of the two audits were dropped." in render_comparison(found)
    assert CliRunner().invoke(app, ["show", str(run.path)]).exit_code == 0


@pytest.mark.usefixtures("without_page")
def test_a_training_keeps_what_it_is_told_to(tmp_path: Path) -> None:
    plan = AuditPlan(methods=("gradcam",), intervention_samples=0, fitness_samples=0)
    audit = BiasAuditCallback(audit_set(), plan=plan, dirpath=tmp_path / "run", every_n_steps=1, keep=2)
    fit(trainer(tmp_path, audit, max_epochs=1), validate=False)
    run = read_run(tmp_path / "run")
    assert run.ended and steps_of(run) == [0, 1, 2, 3, 4] and held(run) == [0, 3, 4]
    lines = (run.path / AUDITS).read_bytes().splitlines()
    assert sum(b'"kind":"dropped"' in line for line in lines) == 2


def test_keep_is_a_number_of_audits() -> None:
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        BiasAuditCallback(audit_set(), keep=0)


def test_what_is_dropped_is_said_before_it_goes(tmp_path: Path) -> None:
    path = tiny(tmp_path, (10, 20), ended=False)
    directory = RunDirectory.resume(path, path, manifest(), sheet(), 20, keep=1)
    (path / "audits/000000.npz").unlink()
    (path / "audits/000000.npz").mkdir()
    # The file cannot be removed, and the records know that it is none of theirs any more.
    with pytest.raises(OSError, match="000000"):
        directory.append(result(30))
    run = read_run(path)
    assert steps_of(run) == [10, 20, 30] and [run.has_scores(i) for i in range(3)] == [False, False, True]

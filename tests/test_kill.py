"""A kill at any moment leaves every audit whole or absent; a full disk ends in one warning."""

from __future__ import annotations

import multiprocessing
import re
import shutil
import subprocess
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from recorded import assert_same, manifest, result, sheet, steps_of, tiny
from training import audit_set, fit, trainer

from benchmarks.soak.kill import at_file, die, kill_trainings
from benchmarks.soak.pages import drawing
from bias_audit import AuditPlan
from bias_audit.callbacks import BiasAuditCallback
from bias_audit.records.files import MANIFEST, PREVIOUS
from bias_audit.records.runs import Run, read_run
from bias_audit.records.writing import RunDirectory
from bias_audit.sources import judge_source


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory where there is one: thousands of files are synced to disk here, which says nothing."""
    shared = Path("/dev/shm")
    with TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        yield Path(folder)


def test_trainings_killed_at_any_moment_and_gone_on_with(memory: Path) -> None:
    # In the long form each life has the process that draws its page, which takes longer to start than the training.
    with drawing(page=False):
        tally = kill_trainings(memory, 20, seed=10)
    assert tally.kills == 20 and tally.gone_on > 0


def read(path: Path) -> Run | None:
    """What there is; None where no run directory: one that has a manifest can be read."""
    return read_run(path) if (path / MANIFEST).exists() or (path / "run" / MANIFEST).exists() else None


def record(path: Path, *, anew: bool = True) -> None:
    """Records as two trainings leave them, the second resumed; those of an earlier run are set aside."""
    if anew:
        directory = RunDirectory.create(path, manifest(run_id="run-b"), sheet(), keep=1)
        for step in (10, 20, 30):
            directory.append(result(step))
            directory.best(10)
    directory = RunDirectory.resume(path, path, manifest(run_id="run-c"), sheet(), 20, keep=1)
    directory.append(result(40))
    directory.end()


def killed(path: Path, at: int, work: Callable[[], None]) -> bool:
    """Whether `work`, in a process of its own, was killed at the so-many-th file in `path`."""

    def life() -> None:
        at_file(path, at, die)
        work()

    process = multiprocessing.get_context("fork").Process(target=life)
    process.start()
    process.join()
    assert process.exitcode in (0, -9)
    return process.exitcode == -9


def test_killed_at_every_file(memory: Path) -> None:
    seen: set[tuple[int, ...]] = set()
    before = tiny(memory / "before", (1, 2), run_id="run-a")
    at, dies = 0, True
    while dies:
        at += 1
        path = memory / str(at)
        shutil.copytree(before, path)
        dies = killed(path, at, lambda path=path: record(path))
        run = read(path)
        assert judge_source(str(path)).exit_code in (1, 3)
        steps = [] if run is None else steps_of(run)
        seen.add(tuple(steps))
        go_on = False
        if run is not None and run.manifest.run_id == "run-b":
            go_on = steps[:2] == [10, 20]
            assert not run.torn and (not steps or run.has_scores(0))
            for index, step in enumerate(steps):
                if run.has_scores(index):
                    assert_same(run.scores(index), result(step).scores)
        # Whatever the moment, it can be gone on with or begun anew, and then all is there and nothing else.
        record(path, anew=not go_on)
        after = read_run(path)
        assert after.ended and steps_of(after) == [10, 20, 40]
        assert [after.has_scores(i) for i in range(3)] == [True, False, True]
        assert len(list((path / "audits").iterdir())) == 2 and not list(path.rglob("*.tmp"))
        first = read_run(path / PREVIOUS / "run-a")
        assert steps_of(first) == [1, 2] and first.ended
        assert_same(first.scores(1), result(2).scores)
    assert seen == {(), (1, 2), (10,), (10, 20), (10, 20, 30), (10, 20, 40)}
    assert at > 50


# A disk that is full, or cannot be written


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Makes a small disk of its own, by `mount`'s options."""
    place = tmp_path / "disk"
    place.mkdir()

    def mounted(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "none", str(place)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
        return place

    yield mounted
    subprocess.run(["umount", str(place)], capture_output=True, check=False)


def trained(path: Path | None, on_error: str = "warn") -> tuple[dict[str, torch.Tensor], list[str]]:
    """The weights after a training that audits into `path`, if any, and what was warned of."""
    plan = AuditPlan(intervention_samples=4, control_regions=1, fitness_samples=2)
    options = {"plan": plan, "every_n_steps": 1, "on_error": on_error}
    audits = [] if path is None else [BiasAuditCallback(audit_set(), dirpath=path / "run", **options)]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        folder = Path("unused") if path is None else path.parent
        net = fit(trainer(folder, *audits, max_epochs=2), validate=False)
    return net.state_dict(), [str(w.message) for w in told if "bias-audit" in str(w.message)]


@cache
def not_audited() -> dict[str, torch.Tensor]:
    return trained(None)[0]


@pytest.mark.parametrize(
    ("options", "reason", "audits"),
    [
        ("size=300k", r"No space left on device: '.*(audits\.jsonl|npz)'", 3),
        ("size=12k", r"No space left on device: '.*run/", 0),
        ("size=1m,ro", "Read-only file system: '.*run'", 0),
    ],
)
def test_a_disk_that_cannot_be_written_ends_in_one_warning(
    disk: Callable[[str], Path], options: str, reason: str, audits: int
) -> None:
    path = disk(options)
    weights, told = trained(path)
    untouched = not_audited()
    assert all(torch.equal(weights[name], untouched[name]) for name in untouched)
    (of_records,) = [text for text in told if "RunDirectorySink failed" in text]
    assert re.search(reason, of_records) and "training goes on" in of_records
    # The page may have met the full disk before the records did.
    assert len(told) == 1 or (len(told) == 2 and audits and "ReportSink failed" in told[0] + told[1])
    run = read(path)
    assert (len(run.audits) >= audits and not run.ended and not run.torn) if audits else run is None or not run.audits
    for index in range(len(run.audits) if run is not None else 0):
        run.scores(index)
    assert judge_source(str(path)).exit_code == 3
    assert not list(path.rglob("*.tmp"))


def test_a_full_disk_breaks_training_off_where_that_is_asked_for(disk: Callable[[str], Path]) -> None:
    path = disk("size=200k")
    with pytest.raises(OSError, match=r"No space left on device: '.*run"):
        trained(path, on_error="raise")
    assert judge_source(str(path)).exit_code == 3


def test_a_full_disk_does_not_let_an_old_run_pass_for_the_new_one(disk: Callable[[str], Path]) -> None:
    path = disk("size=100k")
    tiny(path / "run", (1, 2), run_id="run-a")
    passing = {"min_samples": 1, "rules": [{"metric": "enrichment", "min": 0.0, "on": "point", "region": "spurious"}]}
    assert judge_source(str(path), passing).exit_code == 0
    shutil.copytree(path / "run", path / "resumed")
    with suppress(OSError), (path / "full").open("wb") as file:
        while True:
            file.write(bytes(4096))
            file.flush()
    with pytest.raises(OSError, match="No space left"):
        RunDirectory.create(path / "run", manifest(run_id="run-b"), sheet())
    with pytest.raises(OSError, match="No space left"):
        RunDirectory.resume(path / "resumed", path / "resumed", manifest(), sheet(), 2)
    assert [judge_source(str(path / name), passing).exit_code for name in ("run", "resumed")] == [3, 3]
    # With room again the old run is put aside, whole, and the other is gone on with.
    (path / "full").unlink()
    RunDirectory.create(path / "run", manifest(run_id="run-b"), sheet())
    RunDirectory.resume(path / "resumed", path / "resumed", manifest(), sheet(), 2).end()
    assert judge_source(str(path / "resumed"), passing).exit_code == 0
    assert steps_of(read_run(path / "run" / PREVIOUS / "run-a")) == [1, 2]

"""Several runs in one place, and a disk that is full."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
from recorded import assert_same, scores, steps_of, tiny

from bias_audit.records.errors import RecordError
from bias_audit.records.files import MANIFEST, PREVIOUS, find_run
from bias_audit.records.runs import read_run

TESTS = Path(__file__).parent


def test_create_sets_the_run_before_aside(tmp_path: Path) -> None:
    path = tmp_path / "run"
    (path / "images").mkdir(parents=True)
    for number in range(3):
        if number:
            (path / "report.html").write_text(f"page {number - 1}")
        tiny(path, (10 + number,), run_id=f"run-{number}")
    assert find_run(tmp_path) == path
    assert (path / "images").is_dir(), "what is not the run's own stays where it was"
    assert read_run(tmp_path).manifest.run_id == "run-2" and not (path / "report.html").exists()
    for number in range(2):
        old = path / PREVIOUS / f"run-{number}"
        assert steps_of(read_run(old)) == [10 + number]
        assert_same(read_run(old).scores(0), scores(10 + number))
        assert (old / "report.html").read_text() == f"page {number}"
        assert not (old / PREVIOUS).exists()


@pytest.mark.parametrize("run_id", ["../../escaped", "/tmp/escaped", "..", ".", "", "a/b"])
def test_a_manifest_from_elsewhere_does_not_choose_the_folder(run_id: str, tmp_path: Path) -> None:
    path = tiny(tmp_path / "deep" / "run", (10,), run_id=run_id)
    for number in (20, 30):
        tiny(path, (number,), run_id=run_id)
    assert steps_of(read_run(path)) == [30]
    assert [p.name for p in tmp_path.iterdir()] == ["deep"] and [p.name for p in path.parent.iterdir()] == ["run"]
    kept = [steps_of(read_run(p)) for p in (path / PREVIOUS).iterdir()]
    assert sorted(kept) == [[10], [20]]


def test_create_over_an_unreadable_run_keeps_it(tmp_path: Path) -> None:
    path = tiny(tmp_path / "run")
    (path / MANIFEST).write_bytes(b"{")
    tiny(path, (40,))
    (old,) = (path / PREVIOUS).iterdir()
    assert old.name.startswith("unreadable-") and (old / MANIFEST).read_bytes() == b"{"
    assert steps_of(read_run(path)) == [40]


def test_find_run(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="no such directory"):
        find_run(tmp_path / "absent")
    (tmp_path / "logs").mkdir()
    with pytest.raises(RecordError, match=r"no manifest\.json here or below"):
        find_run(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(RecordError, match="no such directory"):
        find_run(tmp_path / "file")
    one = tiny(tmp_path / "logs" / "version_0" / "bias_audit")
    assert find_run(tmp_path) == find_run(str(one)) == find_run(one.parent) == one
    # A manifest inside a run directory is not another run.
    tiny(one / "audits" / "nested")
    assert find_run(tmp_path) == one
    two = tiny(tmp_path / "logs" / "version_1" / "bias_audit")
    with pytest.raises(RecordError, match="holds 2 run directories") as caught:
        find_run(tmp_path)
    assert str(one) in str(caught.value) and str(two) in str(caught.value)
    assert find_run(two.parent) == two


def test_the_run_before_never_stands_for_one_that_was_not_made(tmp_path: Path) -> None:
    path = tmp_path / "run"
    tiny(path, run_id="run-0")
    tiny(path, run_id="run-1")
    # Killed after the old run was set aside and before the new manifest was written.
    (path / MANIFEST).unlink()
    for where in (tmp_path, path):
        with pytest.raises(RecordError, match=r"no manifest\.json"):
            read_run(where)
    # Who asks for the old one by its name gets it.
    assert read_run(path / PREVIOUS / "run-0").manifest.run_id == "run-0"


# A full disk, for real; of kills see test_kill.py

FULL = """
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from bias_audit.records.writing import RunDirectory
from recorded import manifest, result, sheet
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
directory = RunDirectory.create(sys.argv[2], manifest(), sheet())
directory.append(result(1))
size = (directory.path / "audits.jsonl").stat().st_size
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (size + int(sys.argv[3]), hard))
try:
    directory.fail(2, "x" * 9000)
except OSError as error:
    print("full", error.errno)
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
directory.append(result(3))
directory.end()
"""


@pytest.mark.parametrize("room", [0, 700])
def test_a_full_disk_leaves_no_half_line(room: int, tmp_path: Path) -> None:
    if resource.getrlimit(resource.RLIMIT_FSIZE)[1] != resource.RLIM_INFINITY:
        pytest.skip("the size of files is limited already")
    arguments = [FULL, str(TESTS), str(tmp_path), str(room)]
    done = subprocess.run([sys.executable, "-c", *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "full 27\n"), done.stderr
    run = read_run(tmp_path)
    assert steps_of(run) == [1, 3] and run.ended and not run.torn

"""Records that are gone on with, where they are or in another place."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from recorded import assert_same, manifest, result, scores, sheet, steps_of, tiny, tree

from bias_audit.records.errors import RecordError
from bias_audit.records.files import AUDITS, PREVIOUS
from bias_audit.records.runs import read_run
from bias_audit.records.writing import RunDirectory


def test_resume_in_the_same_directory(tmp_path: Path) -> None:
    path = tiny(tmp_path / "run", (10, 20, 30), ended=False)
    files = tree(path)
    directory = RunDirectory.resume(path, path, manifest(run_id="run-b"), sheet(), 20)
    run = read_run(path)
    assert steps_of(run) == [10, 20] and not run.ended and not run.torn
    assert run.manifest.run_id == "run-a"
    directory.append(result(25))
    directory.append(result(35))
    directory.end()
    run = read_run(path)
    assert steps_of(run) == [10, 20, 25, 35] and run.ended
    for index, step in enumerate((10, 20, 25, 35)):
        assert_same(run.scores(index), scores(step))
    # Nothing that was written is written over.
    after = tree(path)
    assert all(after[name] == content for name, content in files.items() if name != AUDITS)
    assert after[AUDITS].startswith(files[AUDITS])
    assert sorted(p.name for p in (path / "audits").iterdir()) == [f"{i:06d}.npz" for i in range(5)]


def test_resume_more_than_once(tmp_path: Path) -> None:
    path = tiny(tmp_path, (10, 20, 30))
    for step in (40, 50):
        directory = RunDirectory.resume(path, path, manifest(), sheet(), 20)
        assert not read_run(path).ended
        directory.append(result(step))
    run = read_run(path)
    assert steps_of(run) == [10, 20, 50]
    assert_same(run.scores(2), scores(50))
    # A number that was given once is not given again, however many audits were dropped.
    RunDirectory.resume(path, path, manifest(), sheet(), 50).append(result(60))
    run = read_run(path)
    assert steps_of(run) == [10, 20, 50, 60]
    assert_same(run.scores(2), scores(50))
    assert_same(run.scores(3), scores(60))
    RunDirectory.resume(path, path, manifest(), sheet(), 5)
    assert steps_of(read_run(path)) == []


@pytest.mark.parametrize("cut", [1, 40, 400])
def test_resume_cuts_a_torn_tail(cut: int, tmp_path: Path) -> None:
    path = tiny(tmp_path, (10, 20, 30), ended=False)
    content = (path / AUDITS).read_bytes()
    (path / AUDITS).write_bytes(content[:-cut])
    assert read_run(path).torn and steps_of(read_run(path)) == [10, 20]
    directory = RunDirectory.resume(path, path, manifest(), sheet(), 1000)
    run = read_run(path)
    assert not run.torn and steps_of(run) == [10, 20]
    directory.append(result(31))
    run = read_run(path)
    assert steps_of(run) == [10, 20, 31]
    assert_same(run.scores(2), scores(31))


def test_resume_of_an_empty_torn_run(tmp_path: Path) -> None:
    path = tiny(tmp_path, (10,), ended=False)
    os.truncate(path / AUDITS, 5)
    RunDirectory.resume(path, path, manifest(), sheet(), 10).append(result(12))
    assert steps_of(read_run(path)) == [12] and not read_run(path).torn


def test_resume_into_another_directory(tmp_path: Path) -> None:
    source = tiny(tmp_path / "source", (10, 20, 30))
    before = tree(source)
    directory = RunDirectory.resume(tmp_path / "copy", source, manifest(run_id="run-b", seed=3), sheet(), 20)
    directory.append(result(25))
    run = read_run(tmp_path / "copy")
    assert steps_of(run) == [10, 20, 25] and not run.ended
    assert run.manifest.run_id == "run-a" and run.manifest.seed == 3
    assert run.audits[:2] == read_run(source).audits[:2]
    for index, step in enumerate((10, 20, 25)):
        assert_same(run.scores(index), scores(step))
    assert tree(source) == before


@pytest.mark.parametrize("target", ["source", "copy"])
def test_a_failure_before_a_resume_is_not_forgotten(target: str, tmp_path: Path) -> None:
    source = RunDirectory.create(tmp_path / "source", manifest(), sheet())
    source.append(result(10))
    for step in (14, 24):
        source.fail(step, "out of memory")
    source.append(result(20))
    directory = RunDirectory.resume(tmp_path / target, source.path, manifest(), sheet(), 20)
    directory.append(result(30))
    run = read_run(directory.path)
    assert run.failed_steps == (14,) and not run.failed and steps_of(run) == [10, 20, 30]


def test_resume_again_and_again_into_the_same_other_directory(tmp_path: Path) -> None:
    source, path = tiny(tmp_path / "source"), tmp_path / "copy"
    for step in (41, 42, 43, 44):
        RunDirectory.resume(path, source, manifest(), sheet(), 30).append(result(step))
    assert steps_of(read_run(path)) == [10, 20, 30, 44]
    assert [p.name for p in sorted((path / PREVIOUS).iterdir())] == ["run-a", "run-a-2", "run-a-3"]
    assert steps_of(read_run(path / PREVIOUS / "run-a-2")) == [10, 20, 30, 42]


def test_resume_from_a_directory_above(tmp_path: Path) -> None:
    path = tiny(tmp_path / "logs" / "run")
    RunDirectory.resume(tmp_path / "copy", tmp_path / "logs", manifest(), sheet(), 20)
    assert steps_of(read_run(tmp_path / "copy")) == [10, 20]
    # Found below, it is the same directory: nothing is copied or set aside.
    RunDirectory.resume(path, tmp_path / "logs", manifest(), sheet(), 10)
    assert steps_of(read_run(path)) == [10] and not (path / PREVIOUS).exists()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"fingerprint": "e" * 64}, ("fingerprint", "eee", "fff")),
        ({"layer": "layer3"}, ("layer", "'layer4'", "'layer3'")),
        ({"methods": ("hirescam",)}, ("methods", "gradcam", "hirescam")),
        ({"target": "margin"}, ("target", "'logit'", "'margin'")),
        ({"sign": "negative"}, ("sign", "'positive'", "'negative'")),
    ],
)
def test_resume_of_another_audit_is_refused(fields: dict[str, Any], words: tuple[str, ...], tmp_path: Path) -> None:
    path = tiny(tmp_path / "run")
    before = tree(tmp_path)
    for target in (path, tmp_path / "copy"):
        with pytest.raises(RecordError, match="cannot be resumed") as caught:
            RunDirectory.resume(target, path, manifest(**fields), sheet(), 20)
        assert all(word in str(caught.value) for word in words)
    assert tree(tmp_path) == before


def test_resume_of_damaged_records_is_refused(tmp_path: Path) -> None:
    path = tiny(tmp_path / "run")
    (path / "audits/000001.npz").write_bytes(b"")
    before = tree(tmp_path)
    with pytest.raises(RecordError, match="000001"):
        RunDirectory.resume(tmp_path / "copy", path, manifest(), sheet(), 30)
    assert tree(tmp_path) == before

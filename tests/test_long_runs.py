"""Many audits and many samples: nothing is left behind, only what is new is read, and what is drawn has bounds.

The long forms are in `benchmarks/soak/long.py` and `benchmarks/soak/scale.py`.
"""

from __future__ import annotations

import logging
import os
import subprocess
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.soak import long, scale
from bias_audit import Auditor, AuditPlan, read_run
from bias_audit.evidence.attention import attention
from bias_audit.records.errors import RecordError
from bias_audit.records.files import AUDITS, MANIFEST
from bias_audit.records.results import AuditResult, AuditSummary
from bias_audit.records.runs import Run, RunReader
from bias_audit.records.writing import RunDirectory
from bias_audit.report import samples as viewer
from bias_audit.report.page import write_report
from bias_audit.stages import scoring
from bias_audit.terms import Verdict
from bias_audit.verdicts.findings import Finding
from bias_audit.verdicts.judgement import Judgement
from tests.synthetic import make_run
from tests.training import Net, audit_set

# What a training holds


@pytest.fixture
def unlogged() -> Iterator[None]:
    """No log records, which pytest keeps."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.usefixtures("unlogged")
def test_a_training_with_many_audits_holds_no_more_than_with_few(tmp_path: Path) -> None:
    measured = long.measure(tmp_path / "run", 16, 8, warm_up=4, cycle=4)
    # With the reference, and one at the end, since interventions were not made at every one.
    assert len(measured.resident_kib) == 16 and len(read_run(tmp_path / "run").audits) == 18
    assert measured.gained == {}
    assert measured.left == {}


class Kept:
    """Something that only its type tells from other things."""


def test_what_is_left_behind_would_be_seen() -> None:
    net, over = Net(), threading.Event()
    before = long.held(net)
    # One of something new, one more of what there is, and what is no object of Python's.
    kept = [Kept(), Kept()]
    tensor = torch.zeros(1)
    hook = net.act.register_forward_hook(lambda *_: None)
    thread = threading.Thread(target=over.wait)
    thread.start()
    with open(os.devnull), subprocess.Popen(["sleep", "60"]) as child:
        gained = long.held(net).more_than(before)
        child.kill()
    expected = {"objects of type Kept": 2, "tensors": 1, "hooks": 1, "threads": 1, "files": 1, "children": 1}
    assert expected.items() <= gained.items() and len(kept) == 2 and tensor.numel() == 1
    over.set()
    thread.join()
    hook.remove()
    assert not {"hooks", "threads", "files", "children"} & long.held(net).more_than(before).keys()


def test_a_slope_has_an_interval_that_holds_the_true_one() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        # Neighbours are alike, as what a process holds is.
        noise = np.convolve(rng.normal(0, 1, 1050), np.ones(10), mode="valid")
        slope, half = long.slope_of(0.5 * np.arange(len(noise)) + noise)
        inside += abs(slope - 0.5) <= half
    assert 180 <= inside <= 198


def test_regions_are_kept_as_far_as_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net, plan = Net(), AuditPlan(batch_size=4, fitness_samples=0, intervention_samples=0)
    roomy, narrow = Auditor(audit_set(4), plan), Auditor(audit_set(4), plan)
    expected = roomy.run(net).scores
    assert len(roomy.regions._kept) == 4
    monkeypatch.setattr(scoring, "REGION_BYTES", roomy.regions._bytes // 2)
    found = [narrow.run(net).scores for _ in range(2)]
    assert len(narrow.regions._kept) == 2 and narrow.regions._bytes == roomy.regions._bytes // 2
    for scores in found:
        np.testing.assert_array_equal(scores.values, expected.values)


# Only what is new is read


def same(reader: RunReader, path: Path) -> Run:
    """What the reader reads, which is what anyone reads who reads all."""
    found = reader.read()
    assert found == read_run(path)
    return found


def results(path: Path) -> list[AuditResult]:
    run = read_run(path)
    return [AuditResult(**vars(a), scores=run.scores(i)) for i, a in enumerate(run.audits)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, list[AuditResult]]:
    path = make_run(tmp_path_factory.mktemp("made") / "run", samples=6, audits=5, reference=True)
    return read_run(path), results(path)


def test_a_reader_follows_a_run_through_all_that_becomes_of_it(
    tmp_path: Path, made: tuple[Run, list[AuditResult]]
) -> None:
    source, audits = made
    path = tmp_path / "run"
    directory = RunDirectory.create(path, source.manifest, source.sheet(), keep=2)
    reader = RunReader(path)
    assert same(reader, path).audits == ()
    for result in audits[:4]:
        directory.append(result)
        same(reader, path)
    assert [reader.read().has_scores(i) for i in range(4)] == [True, False, True, True]
    directory.best(200)
    directory.fail(350, "no memory")
    assert same(reader, path).failed and reader.read().best_step == 200
    with (path / AUDITS).open("ab") as file:
        file.write(b'{"body":{"arr')
    assert same(reader, path).torn
    # What was cut off is removed, which replaces the file; and a rewind takes audits back.
    directory = RunDirectory.resume(path, path, source.manifest, source.sheet(), 200, keep=2)
    assert [a.step for a in same(reader, path).audits] == [0, 100, 200] and not reader.read().torn
    directory.append(audits[4])
    directory.end("KeyboardInterrupt: ")
    assert same(reader, path).ended and reader.read().failed
    # Another run takes its place.
    directory = RunDirectory.create(path, source.manifest.model_copy(update={"run_id": "next"}), source.sheet())
    assert same(reader, path).audits == () and reader.read().manifest.run_id == "next"
    directory.append(audits[1])
    assert len(same(reader, path).audits) == 1
    # And one more, whose lines are of the same length.
    size = (path / AUDITS).stat().st_size
    directory = RunDirectory.create(path, source.manifest, source.sheet())
    directory.append(replace(audits[1], step=101))
    assert (path / AUDITS).stat().st_size == size
    assert [a.step for a in same(reader, path).audits] == [101]


def test_a_reader_reads_no_line_twice(tmp_path: Path, made: tuple[Run, list[AuditResult]]) -> None:
    source, audits = made
    directory = RunDirectory.create(tmp_path / "run", source.manifest, source.sheet())
    for result in audits[:3]:
        directory.append(result)
    reader = RunReader(tmp_path / "run")
    reader.read()
    # Whoever read these lines again would raise.
    with (tmp_path / "run" / AUDITS).open("r+b") as file:
        file.write(b"#" * 1000)
    directory.append(audits[3])
    assert [a.step for a in reader.read().audits] == [a.step for a in audits[:4]]
    with pytest.raises(RecordError, match="line 1: is not a record"):
        read_run(tmp_path / "run")


def test_a_reader_begins_anew_where_the_lines_do_not_go_on(tmp_path: Path, made: tuple[Run, list[AuditResult]]) -> None:
    """The same file, cut to what it held before, and written on with other lines."""
    source, audits = made
    path = tmp_path / "run"
    directory = RunDirectory.create(path, source.manifest, source.sheet())
    directory.append(audits[0])
    size = (path / AUDITS).stat().st_size
    directory.append(audits[1])
    reader = RunReader(path)
    assert len(reader.read().audits) == 2
    os.truncate(path / AUDITS, size)
    assert len(same(reader, path).audits) == 1
    for known in ((1,), (2, 3)):
        os.truncate(path / AUDITS, size)
        directory = RunDirectory.resume(path, path, source.manifest, source.sheet(), 0)
        for i in known:
            directory.append(audits[i])
        reader.read()
    assert [a.step for a in same(reader, path).audits] == [audits[i].step for i in (0, 2, 3)]


def test_a_reader_says_what_is_wrong_and_goes_on_once_it_is_mended(
    tmp_path: Path, made: tuple[Run, list[AuditResult]]
) -> None:
    source, audits = made
    path = tmp_path / "run"
    directory = RunDirectory.create(path, source.manifest, source.sheet())
    reader = RunReader(path)
    for result in audits[:2]:
        directory.append(result)
    reader.read()
    directory.append(audits[2])
    whole = (path / AUDITS).read_bytes()
    with (path / AUDITS).open("r+b") as file:
        file.seek(len(whole) - 100)
        file.write(b"?")
    with pytest.raises(RecordError, match="line 3"):
        reader.read()
    (path / AUDITS).write_bytes(whole)
    assert len(same(reader, path).audits) == 3
    newest = path / "audits" / "000003.npz"
    directory.append(audits[3])
    content = newest.read_bytes()
    newest.unlink()
    with pytest.raises(RecordError, match=r"000003.npz: is missing"):
        reader.read()
    newest.write_bytes(content)
    (path / MANIFEST).rename(path / "aside")
    with pytest.raises(RecordError, match=MANIFEST):
        reader.read()
    (path / "aside").rename(path / MANIFEST)
    assert len(same(reader, path).audits) == 4


# The page


def history(verdicts: str) -> list[AuditSummary]:
    """Audits whose verdict on hair has these initials."""
    of = {"r": Verdict.RELIANCE, "s": Verdict.SUSPECTED, "c": Verdict.CLEARED}
    findings = (Finding("region", "hair", of[v], "", (), (of[v],)) for v in verdicts)
    return [AuditSummary(i, 0, "raw", "", 1.0, (), Judgement((f,), ())) for i, f in enumerate(findings)]


def test_the_replay_holds_where_verdicts_changed_and_both_ends() -> None:
    steady = history("c" * 50)
    assert viewer.replayed(steady, 50) == list(range(50)) and viewer.replayed(steady, 3) == [0, 24, 49]
    once = viewer.replayed(history("c" * 13 + "r" * 1000), 10)
    assert len(once) <= 10 and once[0] == 0 and once[-1] == 1012 and 13 in once
    # Evenly spaced otherwise.
    assert max(np.diff(once)) <= 2 * 1012 / 7
    for most in (2, 3, 4, 5, 6, 7, 20, 200):
        for verdicts in ("cr" * 400, "c" * 800, "ccccr" * 160, "c" * 799 + "r"):
            places = viewer.replayed(history(verdicts), most)
            assert len(set(places)) == len(places) <= most and sorted(places) == places
            assert places[0] == 0 and places[-1] == 799
            # Of many changes some, from all of the run, and no more than half.
            assert most < 20 or max(np.diff(places)) <= 2.5 * 800 / (most / 2)


def test_the_page_replays_some_of_many_audits_and_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_run(tmp_path / "run", samples=4, audits=16, map_size=(4, 4), image_size=(24, 24))
    monkeypatch.setattr(viewer, "MOST_FRAMES", 8)
    run = read_run(path)
    data = viewer.viewer_data(run)
    assert data is not None and data.audits <= 8 and data.audits_available == 16
    page = write_report(run).read_text()
    text = " ".join(page.split())
    assert f"{data.audits} of 16 audits: the first, the last, those at which a verdict changed" in text
    # Array files of other audits are not needed for it.
    needed = set(viewer.replayed(run.audits, 8))
    for place in set(range(16)) - needed:
        (path / "audits" / f"{place:06d}.npz").unlink()
    assert write_report(run).read_text() == page


# Many samples, many classes


def peak(call: Callable[[], object]) -> int:
    """Bytes that were allocated at most while `call` ran."""
    call()
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_statistics_of_many_classes_take_no_more_memory_than_of_few() -> None:
    scores = scale.score_samples(np.random.default_rng(0).integers(0, 2, 300), 0)

    def measured(classes: int) -> int:
        labels = np.arange(300) % classes
        names = tuple(f"class {i}" for i in range(classes))
        subjects = replace(scale.SUBJECTS, classes=names)
        values = np.array(["female", "male"])[np.arange(300) // classes % 2][:, None]
        return peak(lambda: attention(replace(scores, labels=labels), values, subjects, seed=0))

    assert measured(100) < 2 * measured(4)


@pytest.mark.slow
def test_scale_measures_every_stage_and_what_grows() -> None:
    large = scale.measure(64)
    assert [stage.name for stage in large.stages] == list(scale.STAGES)
    assert large.scores_bytes == 400
    # Half of the samples in a quarter of the time and with 3 MiB less: 98,304 bytes for each further one.
    halves = tuple(replace(stage, seconds=stage.seconds / 4, peak=stage.peak - 3) for stage in large.stages)
    found = {figure.case: figure for figure in scale.figures([replace(large, samples=32, stages=halves), large])}
    power = found["statistics: time grows as samples to the power of"]
    assert power.value == pytest.approx(2) and not power.kept
    assert found["report: memory a further sample"].value == pytest.approx(3 * 2**20 / 32)
    assert found["read, 32 samples: time"].value == large.stage("read").seconds / 4
    assert found["page, 64 samples"].kept

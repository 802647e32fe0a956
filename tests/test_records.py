"""What is on disk is whole, at every moment and after every kind of damage; or it says that it is not."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import os
import random
import resource
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import POLICY, make_run

from bias_audit.policies.policy import Policy
from bias_audit.records.results import AuditResult, Manifest, PackedMasks, RecordError, SampleScores, SampleSheet
from bias_audit.records.runs import (
    AUDITS,
    MANIFEST,
    PREVIOUS,
    SAMPLES,
    Run,
    RunDirectory,
    find_run,
    read_run,
    write_whole,
)
from bias_audit.terms import Estimate, Subjects
from bias_audit.verdict import Judgement, judge

TESTS = Path(__file__).parent
SUBJECTS = Subjects((("hair", "spurious"),), (("gender", ("female", "male")),), ("doctor", "nurse"))


def manifest(**fields: Any) -> Manifest:
    values = {
        "run_id": "run-a",
        "created": "2025-01-02T03:04:05+00:00",
        "tool": "bias-audit 0",
        "model": "net",
        "layer": "layer4",
        "methods": ("gradcam",),
        "target": "logit",
        "sign": "positive",
        "subjects": SUBJECTS,
        "fingerprint": "f" * 64,
        "samples_available": 3,
        "samples_audited": 3,
        "seed": 0,
        "policy": Policy(min_samples=1),
    }
    return Manifest(**values | fields)


def sheet() -> SampleSheet:
    masks = np.zeros((3, 1, 5, 7), bool)
    masks[1, 0, 2:4, 3:] = True
    attributes = np.array([["female"], ["male"], [""]])
    return SampleSheet(
        ("a", "ü", "c"), np.array([0, 1, 0]), attributes, (b"\xff\xd8one", b"", b"three"), PackedMasks.of(masks)
    )


def scores(seed: int = 0) -> SampleScores:
    rng = np.random.default_rng(seed)
    values = rng.random((2, 1, 3, 2), np.float32)
    values[0, 0, 1, 0] = np.nan
    areas = rng.random((3, 2), np.float32)
    areas[2, 0] = np.nan
    margin = np.array([1.5, np.nan, -0.0], np.float32)
    maps = rng.random((1, 3, 2, 2)).astype(np.float16)
    return SampleScores(
        ("energy_share", "enrichment"),
        ("gradcam",),
        ("hair", "remainder"),
        ("a", "ü", "c"),
        np.array([0, 1, 0]),
        np.array([0, 0, -1]),
        margin,
        areas,
        values,
        maps,
        rng.random((1, 3), np.float32),
    )


def result(step: int, *estimates: Estimate, seed: int | None = None, **fields: Any) -> AuditResult:
    estimates = estimates or (Estimate("enrichment", 1 + step / 7, 0.1 + 0.2, 3.0, 3, "hair", method="gradcam"),)
    judgement = judge(estimates, SUBJECTS, Policy(min_samples=1))
    values = {"epoch": 0, "weights": "raw", "created": "2025-01-02T04:00:00+00:00", "seconds": 1 / 3}
    return AuditResult(
        step, estimates=estimates, judgement=judgement, scores=scores(step if seed is None else seed), **values | fields
    )


def tiny(path: Path, steps: tuple[int, ...] = (10, 20, 30), ended: bool = True, **fields: Any) -> Path:
    directory = RunDirectory.create(path, manifest(**fields), sheet())
    for step in steps:
        directory.append(result(step))
    if ended:
        directory.end()
    return path


def steps_of(run: Run) -> list[int]:
    return [audit.step for audit in run.audits]


def tree(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def assert_same(one: Any, other: Any) -> None:
    """Equal field by field, arrays bit for bit and of the same type."""
    for field in dataclasses.fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, np.ndarray):
            assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()), field.name
        elif isinstance(a, PackedMasks):
            assert_same(a, b)
        else:
            assert a == b, field.name


# Writing and reading back


@pytest.mark.parametrize("width", [1, 7, 8, 9, 17])
def test_masks_are_packed_and_come_back_one_image_at_a_time(width: int) -> None:
    masks = np.random.default_rng(0).random((3, 2, 5, width)) < 0.5
    packed = PackedMasks.of(masks)
    assert packed.shape == masks.shape and len(packed) == 3 and packed.bits.nbytes == 3 * 2 * 5 * math.ceil(width / 8)
    for one, again, original in zip(packed, map(packed.__getitem__, range(3)), masks, strict=True):
        assert one.dtype == np.bool_ and np.array_equal(one, original) and np.array_equal(again, original)


def test_round_trip(tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path / "deep" / "run", manifest(), sheet())
    empty = read_run(tmp_path)
    assert (empty.audits, empty.torn, empty.ended, empty.failed) == ((), False, False, "")
    written = []
    for step in (0, 7, 14):
        written.append(result(step, trigger="reference" if step == 0 else "validation", weights="ema", epoch=step))
        directory.append(written[-1])
        run = read_run(directory.path)
        assert run.audits == tuple(r.summary() for r in written)
        assert not run.torn and not run.ended
    assert run.manifest == manifest()
    for index, expected in enumerate(written):
        assert_same(expected.scores, run.scores(index))
    assert_same(run.scores(2), run.scores(-1))
    assert_same(sheet(), run.sheet())
    assert run.audits[1].estimate("enrichment", region="hair", method="gradcam").value == 2.0
    with pytest.raises(KeyError, match="enrichment"):
        run.audits[1].estimate("enrichment", region="hair")
    of = run.scores(0).of("energy_share", "gradcam", "hair")
    assert np.isnan(of).tolist() == [False, True, False]
    assert run.scores(0).correct.tolist() == [True, False, False]
    assert written[0].summary() == run.audits[0]
    directory.fail(21, "no memory\nleft")
    failed = read_run(directory.path)
    assert failed.failed == "the audit at step 21 failed: no memory\nleft" and len(failed.audits) == 3
    directory.append(result(28))
    assert read_run(directory.path).failed == ""
    directory.end()
    assert read_run(directory.path).ended
    # What follows an end takes it back.
    directory.append(result(35))
    assert not read_run(directory.path).ended
    assert not [name for name in tree(tmp_path) if name.endswith(".tmp")]


def test_synthetic_run_round_trip(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path, reference=True, audits=2))
    assert [a.trigger for a in run.audits] == ["reference", "validation", "validation"]
    assert run.ended and run.manifest.policy == POLICY
    for index, audit in enumerate(run.audits):
        assert audit.judgement == judge(audit.estimates, run.manifest.subjects, POLICY)
        assert run.scores(index).ids == run.sheet().ids
    clean = read_run(make_run(tmp_path / "clean", hair_enrichment=0.7, gap=0.02, spread=0.02))
    assert [run.audits[-1].judgement.outcome, clean.audits[-1].judgement.outcome] == ["violated", "held"]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=3, max_size=3),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
)
def test_every_number_and_text_comes_back(tmp_path_factory: pytest.TempPathFactory, numbers: Any, text: str) -> None:
    path = tmp_path_factory.mktemp("numbers")
    estimate = Estimate("accuracy", *numbers, 3, group=text, reason=text)
    RunDirectory.create(path, manifest(model=text), sheet()).append(result(1, estimate))
    (audit,) = read_run(path).audits
    assert repr(audit.estimates) == repr((estimate,))
    assert read_run(path).manifest.model == text
    shutil.rmtree(path)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_none_comes_back_unmeasured(bad: float, tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path, manifest(), sheet())
    directory.append(result(1, Estimate("enrichment", bad, bad, 1.0, 3, "hair")))
    (audit,) = read_run(tmp_path).audits
    assert audit.estimates == (Estimate("enrichment", None, None, 1.0, 3, "hair"),)
    assert not audit.estimates[0].measured
    assert "NaN" not in (tmp_path / AUDITS).read_text() and "Infinity" not in (tmp_path / AUDITS).read_text()


def test_equal_content_makes_equal_bytes(tmp_path: Path) -> None:
    one, other = tiny(tmp_path / "one"), tiny(tmp_path / "other")
    assert tree(one) == tree(other)
    assert set(tree(one)) == {MANIFEST, SAMPLES, AUDITS, *(f"audits/{i:06d}.npz" for i in range(3))}
    different = RunDirectory.create(tmp_path / "different", manifest(), sheet())
    different.append(result(10, seed=11))
    assert tree(different.path)["audits/000000.npz"] != tree(one)["audits/000000.npz"]
    # The archive holds no time of writing, and nothing that would need pickle.
    with zipfile.ZipFile(one / "audits/000000.npz") as archive:
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    with np.load(one / "audits/000000.npz", allow_pickle=False) as archive:
        assert archive["values"].shape == (2, 1, 3, 2)


def test_write_whole_leaves_the_old_file_where_it_cannot_write(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_whole(path, b"old")
    with pytest.raises(TypeError):
        write_whole(path, "text")  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"
    # Who has the old file open reads the old one to its end.
    with path.open("rb") as file:
        write_whole(path, b"new")
        assert (file.read(), path.read_bytes()) == (b"old", b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# Damage


def test_truncated_at_every_byte(tmp_path: Path) -> None:
    path = tmp_path
    directory = RunDirectory.create(path, manifest(), sheet())
    for step in (10, 20):
        # Nothing judged: a short line.
        directory.append(dataclasses.replace(result(step), judgement=Judgement((), ())))
    directory.end()
    whole = read_run(path)
    content = (path / AUDITS).read_bytes()
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    assert len(ends) == 3 and ends[-1] == len(content)
    for size in range(len(content) + 1):
        (path / AUDITS).write_bytes(content[:size])
        run = read_run(path)
        count = sum(end <= size for end in ends)
        assert run.audits == whole.audits[: min(count, 2)], size
        assert run.torn == (size not in (0, *ends)), size
        assert run.ended == (size == len(content)), size


def test_torn_in_the_middle_of_a_character(tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path, manifest(), sheet())
    directory.append(result(10))
    with (tmp_path / AUDITS).open("ab") as file:
        file.write(b'{"body":{"kind":"failed","reason":"\xc3')
    run = read_run(tmp_path)
    assert run.torn and steps_of(run) == [10]


def flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = tiny(tmp_path)
    whole, files = read_run(path), tree(path)
    rng = random.Random(0)
    noticed = dict.fromkeys(files, 0)
    for name in (*[MANIFEST] * 150, *[AUDITS] * 300, *["audits/000001.npz"] * 60):
        flip(path / name, rng)
        try:
            run = read_run(path)
            assert run.manifest == whole.manifest
            if run.torn:
                # The last line's end was hit: what it says is not believed.
                assert name == AUDITS and not run.ended and run.audits == whole.audits
                noticed[name] += 1
            else:
                # What reads the same (an exponent's e or E) is the same.
                assert run.audits == whole.audits and run.ended
            assert_same(run.scores(0), whole.scores(0))
            run.scores(1)
        except RecordError as error:
            noticed[name] += name in str(error)
        (path / name).write_bytes(files[name])
    assert noticed[MANIFEST] > 145 and noticed[AUDITS] > 295 and noticed["audits/000001.npz"] == 60
    assert_same(read_run(path).scores(1), whole.scores(1))


def test_a_damaged_sheet_is_noticed(tmp_path: Path) -> None:
    path = tiny(tmp_path)
    run, content = read_run(path), (path / SAMPLES).read_bytes()
    rng = random.Random(1)
    caught = 0
    damages = [content[: rng.randrange(len(content))] for _ in range(60)] + [b"", b"\x93NUMPY", b"not an archive"]
    for _ in range(250):
        flip(path / SAMPLES, rng)
        damages.append((path / SAMPLES).read_bytes())
        (path / SAMPLES).write_bytes(content)
    for damaged in damages:
        (path / SAMPLES).write_bytes(damaged)
        try:
            found = run.sheet()
        except RecordError as error:
            caught += SAMPLES in str(error)
        else:
            # Bits of the archive's own book-keeping that carry no content.
            assert_same(found, sheet())
    assert caught > 200
    (path / SAMPLES).unlink()
    with pytest.raises(RecordError, match=r"samples\.npz: cannot be read"):
        run.sheet()


def lines(path: Path) -> list[bytes]:
    return (path / AUDITS).read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda a, b, c, end: [b, a, c, end], 1),
        (lambda a, b, c, end: [a, c, b, end], 2),
        (lambda a, b, c, end: [a, c, end], 2),
        (lambda a, b, c, end: [b, c, end], 1),
        (lambda a, b, c, end: [a, a, b, c, end], 2),
        (lambda a, b, c, end: [a, end, b, c], 2),
        (lambda a, b, c, end: [a, b, end], 3),
        (lambda a, b, c, end: [a, b"\n", b, c, end], 2),
        (lambda a, b, c, end: [a[:-1], b, c, end], 1),
        (lambda a, b, c, end: [a, b[: len(b) // 2], b"\n", c, end], 2),
        (lambda a, b, c, end: [a, b"null\n", b, c, end], 2),
        (lambda a, b, c, end: [a, b"[" * 100_000 + b"\n", b, c, end], 2),
        (lambda a, b, c, end: [a, b.replace(b'"n":3', b'"n":4', 1), c, end], 2),
        (lambda a, b, c, end: [a, b, c, end, b"{}\n"], 5),
    ],
)
def test_changed_lines(damage: Callable[..., list[bytes]], line: int, tmp_path: Path) -> None:
    path = tiny(tmp_path)
    changed = damage(*lines(path))
    assert changed != lines(path)
    (path / AUDITS).write_bytes(b"".join(changed))
    with pytest.raises(RecordError, match=rf"audits\.jsonl, line {line}: "):
        read_run(path)


@pytest.mark.parametrize("damage", ["missing", "short", "long", "directory"])
def test_array_files_that_are_not_as_recorded(damage: str, tmp_path: Path) -> None:
    path = tiny(tmp_path)
    run, arrays = read_run(path), path / "audits/000001.npz"
    content = arrays.read_bytes()
    arrays.unlink()
    if damage == "short":
        arrays.write_bytes(content[:-1])
    elif damage == "long":
        arrays.write_bytes(content + b"\0")
    elif damage == "directory":
        arrays.mkdir()
    with pytest.raises(RecordError, match=r"000001\.npz: (is missing|has \d+ bytes), its record says"):
        read_run(path)
    with pytest.raises(RecordError, match=r"000001\.npz: "):
        run.scores(1)
    assert_same(run.scores(0), scores(10))


def test_changed_arrays_of_the_same_size(tmp_path: Path) -> None:
    path = tiny(tmp_path)
    content = bytearray((path / "audits/000001.npz").read_bytes())
    content[len(content) // 2] ^= 1
    (path / "audits/000001.npz").write_bytes(content)
    run = read_run(path)
    with pytest.raises(RecordError, match=r"000001\.npz: its checksum"):
        run.scores(1)


@pytest.mark.parametrize("missing", [AUDITS, MANIFEST])
def test_missing_files(missing: str, tmp_path: Path) -> None:
    path = tiny(tmp_path)
    (path / missing).unlink()
    with pytest.raises(RecordError, match=missing.replace(".", r"\.")):
        read_run(path)


# Records that somebody made up: their checksums are right


def signed(body: Any) -> bytes:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    return json.dumps({"body": body, "sha256": hashlib.sha256(canonical).hexdigest()}).encode() + b"\n"


def forged_run(path: Path, content: bytes | None = None, **body: Any) -> Path:
    """A run of one audit, its record and its arrays changed and signed anew."""
    tiny(path, (10,), ended=False)
    record = json.loads((path / AUDITS).read_bytes())["body"]
    if content is not None:
        (path / "audits/000000.npz").write_bytes(content)
        record |= {"arrays_bytes": len(content), "arrays_sha256": hashlib.sha256(content).hexdigest()}
    (path / AUDITS).write_bytes(signed(record | body))
    return path


def test_a_forged_record_is_read_where_it_is_sound(tmp_path: Path) -> None:
    run = read_run(forged_run(tmp_path, previous=""))
    assert_same(run.scores(0), scores(10))


@pytest.mark.parametrize(
    "name",
    [
        "../x.npz",
        "audits/../../x.npz",
        "/tmp/x.npz",
        "{root}/x.npz",
        "x.npz",
        "audits/a/x.npz",
        "audits/x.txt",
        "",
        "a\0",
    ],
)
def test_array_files_elsewhere_are_refused(name: str, tmp_path: Path) -> None:
    path = forged_run(tmp_path / "run", arrays=name.replace("{root}", str(tmp_path)))
    shutil.copy(path / "audits/000000.npz", tmp_path / "x.npz")
    shutil.copy(path / "audits/000000.npz", path / "x.npz")
    with pytest.raises(RecordError, match="not in audits/"):
        read_run(path)


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "pardon"},
        {"previous": "0" * 64},
        {"audit": 3},
        {"audit": {"step": "many"}},
        {"arrays_bytes": -1},
        {"kind": None},
    ],
)
def test_forged_records(fields: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RecordError):
        read_run(forged_run(tmp_path, **fields))


class Loaded:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


def npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def test_pickled_objects_are_never_loaded(tmp_path: Path) -> None:
    mark = tmp_path / "loaded"
    content = npz(**{**vars(scores(10)), "values": np.array([Loaded(mark)], dtype=object)})
    run = read_run(forged_run(tmp_path / "run", content))
    with pytest.raises(RecordError, match=r"000000\.npz: is not a whole \.npz file"):
        run.scores(0)
    (run.path / SAMPLES).write_bytes(npz(ids=np.array([Loaded(mark)], dtype=object)))
    with pytest.raises(RecordError, match=r"samples\.npz: is not a whole \.npz file"):
        run.sheet()
    assert not mark.exists()
    # The same array is loaded where pickle is allowed: the test would notice.
    with np.load(io.BytesIO(content), allow_pickle=True) as archive:
        archive["values"]
    assert mark.exists()


def test_arrays_that_are_not_scores(tmp_path: Path) -> None:
    single = io.BytesIO()
    np.save(single, np.zeros(3))
    missing = {name: array for name, array in vars(scores()).items() if name != "margin"}
    for number, content in enumerate((b"", b"PK", single.getvalue(), npz(**missing), npz())):
        run = read_run(forged_run(tmp_path / str(number), content))
        with pytest.raises(RecordError, match="000000"):
            run.scores(0)
    # An array that this version does not know is no harm.
    run = read_run(forged_run(tmp_path / "more", npz(**vars(scores(10)), novelty=np.zeros(3))))
    assert_same(run.scores(0), scores(10))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda body: body | {"schema_version": 2}, "has schema version 2, this tool reads 1"),
        (lambda body: body | {"schema_version": "1"}, "has schema version '1'"),
        (lambda body: {k: v for k, v in body.items() if k != "schema_version"}, "has schema version None"),
        (lambda body: [body], "has schema version None"),
        (lambda body: body | {"novelty": 1}, "novelty"),
        (lambda body: {k: v for k, v in body.items() if k != "policy"}, "policy"),
        (lambda body: body | {"policy": {"rules": []}}, "policy.rules"),
        (lambda body: body | {"subjects": {"regions": [["hair", "guilty"]]}}, "subjects"),
        (lambda body: body | {"samples_audited": -1}, "samples_audited"),
    ],
)
def test_manifests_of_another_kind(change: Callable[[Any], Any], words: str, tmp_path: Path) -> None:
    path = tiny(tmp_path)
    body = json.loads((path / MANIFEST).read_bytes())["body"]
    (path / MANIFEST).write_bytes(signed(body))
    assert len(read_run(path).audits) == 3
    (path / MANIFEST).write_bytes(signed(change(body)))
    with pytest.raises(RecordError) as caught:
        read_run(path)
    assert MANIFEST in str(caught.value) and words in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'"x"', b"\xff", b'{"body": {}}', b"[" * 100_000])
def test_manifests_that_are_none(content: bytes, tmp_path: Path) -> None:
    path = tiny(tmp_path)
    (path / MANIFEST).write_bytes(content)
    with pytest.raises(RecordError, match=r"manifest\.json: is not a whole manifest"):
        read_run(path)


# Going on


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


# Several runs


def test_create_sets_the_run_before_aside(tmp_path: Path) -> None:
    path = tmp_path / "run"
    for number in range(3):
        if path.exists():
            (path / "report.html").write_text(f"page {number - 1}")
        tiny(path, (10 + number,), run_id=f"run-{number}")
    assert find_run(tmp_path) == path
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
from test_records import RunDirectory, manifest, result, sheet
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

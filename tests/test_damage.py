"""What is on disk is whole after every kind of damage; or it says that it is not."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from recorded import assert_same, manifest, result, scores, sheet, steps_of, tiny, tree

from bias_audit.records.errors import RecordError
from bias_audit.records.files import AUDITS, MANIFEST, SAMPLES
from bias_audit.records.runs import read_run
from bias_audit.records.writing import RunDirectory
from bias_audit.verdicts.judgement import Judgement


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

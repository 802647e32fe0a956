"""Records that somebody made up, their checksums right: nothing in them is believed that could do harm."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recorded import Touches, assert_same, scores, tiny

from bias_audit.records.errors import RecordError
from bias_audit.records.files import AUDITS, MANIFEST, SAMPLES
from bias_audit.records.runs import read_run


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


def npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def test_pickled_objects_are_never_loaded(tmp_path: Path) -> None:
    mark = tmp_path / "loaded"
    content = npz(**{**vars(scores(10)), "values": np.array([Touches(mark)], dtype=object)})
    run = read_run(forged_run(tmp_path / "run", content))
    with pytest.raises(RecordError, match=r"000000\.npz: is not a whole \.npz file"):
        run.scores(0)
    (run.path / SAMPLES).write_bytes(npz(ids=np.array([Touches(mark)], dtype=object)))
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

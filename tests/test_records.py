"""What is recorded comes back as it was."""

from __future__ import annotations

import math
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded import assert_same, manifest, result, sheet, tiny, tree
from synthetic import POLICY, make_run

from bias_audit.atomic import write_whole
from bias_audit.records.files import AUDITS, MANIFEST, SAMPLES
from bias_audit.records.runs import read_run
from bias_audit.records.samples import PackedMasks
from bias_audit.records.writing import RunDirectory
from bias_audit.terms import Estimate
from bias_audit.verdicts.judgement import judge


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

"""Labels and attributes of a training set as they come in, and what is said of those that cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bias_audit.data.dataset import AuditDataset
from bias_audit.data.metadata import Metadata
from bias_audit.data.samples import AuditSample
from bias_audit.terms import Subjects

SUBJECTS = Subjects((), (("gender", ("female", "male")),), ("doctor", "nurse"))


def rows(data: Metadata) -> list[tuple[int, ...]]:
    return [(int(label), *values) for label, values in zip(data.labels, data.attributes.tolist(), strict=True)]


@pytest.mark.parametrize("wrap", [list, tuple, np.array, torch.tensor])
def test_labels_come_as_lists_arrays_and_tensors(wrap: Any) -> None:
    data = Metadata.of(wrap([0, 2, 1]), {"gender": ["m", "f", "m"], "site": wrap([3, 1, 3])})
    assert data.labels.dtype == np.int64 and data.names == ("gender", "site") and len(data) == 3
    assert rows(data) == [(0, "m", "3"), (2, "f", "1"), (1, "m", "3")]
    assert data.column("site").tolist() == ["3", "1", "3"]


def test_what_is_unknown_is_empty() -> None:
    column = ["m", None, float("nan"), "", " f ", np.float64("nan"), np.str_("m"), np.int64(4), 2.0, True]
    data = Metadata.of(range(10), {"gender": column})
    assert data.column("gender").tolist() == ["m", "", "", "", "f", "", "m", "4", "2", "True"]
    floats = Metadata.of([0, 1, 1], {"age": np.array([1.0, np.nan, 3.0])})  # pandas' whole numbers with a gap
    assert floats.column("age").tolist() == ["1", "", "3"]
    assert Metadata.of([0, 1], {}).attributes.shape == (2, 0)


@pytest.mark.parametrize(
    ("labels", "attributes", "message"),
    [
        (["doctor"], {}, r"labels: expected class indices \(0, 1, ...\).* got <U6"),
        ([[0], [1]], {}, r"labels: expected class indices .* shape \(2, 1\)"),
        ([0.5, 1.0], {}, "labels: expected class indices .* got float64"),
        ([True, False], {}, "labels: expected class indices .* got bool"),
        ([0, 1, -1], {}, r"labels, row 2: expected a class index \(0, 1, ...\), got -1"),
        ([0, 1], {"gender": ["m"]}, "attribute 'gender': expected 2 values, one for each label, got 1"),
        ([0, 1], {"gender": "mf"}, "attribute 'gender': expected a column of values, got one text: 'mf'"),
        ([0, 1], {"age": [1, 0.5]}, "attribute 'age', row 1: expected text or a whole number, got 0.5"),
        ([0, 1], {"age": [1, (2,)]}, r"attribute 'age', row 1: expected text or a whole number, got \(2,\)"),
        ([0, 1], {"age": [1, [2]]}, r"attribute 'age', row 1: expected text or a whole number, got \[2\]"),
    ],
)
def test_columns_that_are_no_columns_are_refused(labels: Any, attributes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Metadata.of(labels, attributes)


def test_a_column_that_is_not_there_is_refused() -> None:
    data = Metadata.of([0], {"gender": ["m"]})
    with pytest.raises(ValueError, match="no attribute 'gendre': did you mean 'gender'"):
        data.column("gendre")


def written(folder: Path, text: str) -> Path:
    path = folder / "train.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_csv_is_read_without_its_images(tmp_path: Path) -> None:
    path = written(
        tmp_path, '\ufefffile,label,gender,"site, city"\nnowhere.jpg, nurse,female,"A, B"\n\nb.jpg,doctor,, C\n'
    )
    data = Metadata.from_csv(path, classes=("doctor", "nurse"))
    assert data.names == ("gender", "site, city") and rows(data) == [(1, "female", "A, B"), (0, "", "C")]
    one = Metadata.from_csv(str(path), classes=["nurse", "doctor"], attributes=["gender"])
    assert one.names == ("gender",) and rows(one) == [(0, "female"), (1, "")]
    none = Metadata.from_csv(path, classes=("doctor", "nurse"), attributes=())
    assert none.attributes.shape == (2, 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: no column 'label': there are none"),
        ("labels,gender\n", "line 1: no column 'label': did you mean 'labels'"),
        ("label,gender,\nnurse,f,1\n", "line 1: column '' has no name or occurs twice"),
        ("label,gender,gender\nnurse,f,f\n", "line 1: column 'gender' has no name or occurs twice"),
        ("label,sex\nnurse,f\n", "line 1: no column 'gender': there are label, sex"),
        ("label,gender\nnurse,f\ndoctor\n", "line 3: expected 2 values, got 1"),
        ("label,gender\nnurse,f,2\n", "line 2: expected 2 values, got 3: put a value that holds a comma in quotes"),
        ("label,gender\nnurse,f\nnurce,f\n", "line 3: label 'nurce' is not among the classes: did you mean 'nurse'"),
        ("label,gender\n,f\n", "line 2: label '' is not among the classes: there are doctor, nurse"),
        ("label,gender\n", "has no row below its header"),
    ],
)
def test_a_damaged_csv_is_refused_by_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        Metadata.from_csv(written(tmp_path, text), classes=("doctor", "nurse"), attributes=("gender",))
    assert str(tmp_path / "train.csv") in str(raised.value)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.csv").write_bytes("label,gender\nnurse,f\xe9minin\n".encode("latin-1"))
    (tmp_path / "huge.csv").write_text("label\n" + "x" * 200_000)
    for name in ("absent.csv", "latin.csv", "huge.csv"):
        with pytest.raises(ValueError, match=f"{name}: cannot be read as CSV in UTF-8: "):
            Metadata.from_csv(tmp_path / name, classes=("doctor", "nurse"))


def audit_set(
    classes: tuple[str, ...] | None = ("doctor", "nurse"), values: tuple[str, str] = ("female", "male")
) -> AuditDataset:
    def broken(i: int) -> AuditSample:
        # No image: who decodes it is told so.
        return AuditSample(torch.zeros(0), i, {}, {"gender": values[i]}, str(i))

    return AuditDataset([broken(0), broken(1)], object=["coat"], classes=classes)


def test_all_kinds_of_sources_are_loaded(tmp_path: Path) -> None:
    assert Metadata.load(None, SUBJECTS) is None
    data = Metadata.of([1, 0], {"gender": ["female", "male"], "more": [1, 2]})
    assert Metadata.load(data, SUBJECTS) is data
    path = written(tmp_path, "label,gender\nnurse,female\ndoctor,male\n")
    for source in (path, str(path)):
        loaded = Metadata.load(source, SUBJECTS)
        assert loaded is not None and rows(loaded) == [(1, "female"), (0, "male")]
    dataset = Metadata.load(audit_set(), SUBJECTS)
    assert dataset is not None and rows(dataset) == [(0, "female"), (1, "male")] and dataset.names == ("gender",)
    # A training set may have more classes than the audit set shows.
    more = Metadata.load(audit_set(("doctor", "nurse", "patient")), SUBJECTS)
    assert more is not None and len(more) == 2


def test_an_audit_set_without_attributes_asks_for_none(tmp_path: Path) -> None:
    subjects = Subjects((), (), ("doctor", "nurse"))
    loaded = Metadata.load(written(tmp_path, "label\nnurse\n"), subjects)
    assert loaded is not None and loaded.names == ()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Metadata.of([], {"gender": []}), "training metadata: has no sample"),
        (Metadata.of([0], {"Gender": ["male"]}), r"expected an attribute of the audit set \(gender\), got Gender"),
        (Metadata.of([0], {}), r"expected an attribute of the audit set \(gender\), got none"),
        (
            Metadata.of([0, 1, 1], {"gender": ["M", "F", ""]}),
            "attribute 'gender' has the values F, M, in the audit set it has female, male: write them alike",
        ),
        (audit_set(("nurse", "doctor")), r"its classes are \['nurse', 'doctor'\], the audit set's are \['doctor'"),
        (audit_set(None), r"its classes are \['0', '1'\], the audit set's are \['doctor'"),
        (audit_set(values=("f", "m")), "training set: attribute 'gender' has the values f, m"),
    ],
)
def test_names_that_are_not_the_audit_set_s_are_refused(source: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Metadata.load(source, SUBJECTS)


def test_an_attribute_without_a_known_value_is_no_misspelling() -> None:
    assert Metadata.load(Metadata.of([0], {"gender": [""]}), SUBJECTS) is not None

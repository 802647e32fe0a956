"""What is known of the training set without opening an image: each sample's label and attributes.

Enters: columns in memory, a CSV, or an annotated dataset. Leaves: `Metadata`, with labels as class indices and
attribute values as text, both named as in the audit set. Association in the data is measured on it, and which value
goes with which class.
"""

from __future__ import annotations

import csv
import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from bias_audit.terms import Subjects


class Annotated(Protocol):
    """A dataset that knows its labels and attributes, such as `AuditDataset`."""

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """Class indices `(N,)`."""

    @property
    def attribute_table(self) -> npt.NDArray[np.str_]:
        """Attribute values `(N, A)` in the order of the subjects' attributes, "" where unknown."""

    @property
    def subjects(self) -> Subjects:
        """The names of classes and attributes."""


@dataclass(frozen=True)
class Metadata:
    """Labels and attributes of a dataset, whose images are never opened.

    `labels` are int64 class indices `(N,)` in the order of the model's outputs. `attributes` is text `(N, A)` in the
    order of `names`, "" where a value is unknown.

    Example:
        >>> Metadata.of([0, 0, 1], {"gender": ["female", None, "male"]}).column("gender").tolist()
        ['female', '', 'male']
    """

    labels: npt.NDArray[np.int64]
    attributes: npt.NDArray[np.str_]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def column(self, attribute: str) -> npt.NDArray[np.str_]:
        """The values of one attribute, `(N,)`.

        Raises:
            ValueError: there is no such attribute.
        """
        if attribute not in self.names:
            raise ValueError(f"no attribute {attribute!r}: {_near(attribute, self.names)}")
        return self.attributes[:, self.names.index(attribute)]

    @classmethod
    def of(cls, labels: Any, attributes: Mapping[str, Iterable[Any]]) -> Metadata:
        """Metadata from columns in memory: lists, arrays, tensors or pandas columns of one length.

        Args:
            labels: whole numbers from 0, the class indices.
            attributes: of each attribute its column of text or whole numbers; None, "" and NaN are unknown.

        Raises:
            ValueError: columns of different length, a label that is no class index, a value that is neither text nor a
                whole number; says which column and row.

        Example:
            >>> Metadata.of([0, 1, 1], {"gender": ["male", "female", None]}).column("gender").tolist()
            ['male', 'female', '']
        """
        indices = _class_indices(labels)
        columns = [text_column(f"attribute {name!r}", values) for name, values in attributes.items()]
        for name, column in zip(attributes, columns, strict=True):
            if len(column) != len(indices):
                raise ValueError(
                    f"attribute {name!r}: expected {len(indices)} values, one for each label, got {len(column)}"
                )
        table = np.stack(columns, axis=1) if columns else np.empty((len(indices), 0), dtype=np.str_)
        return cls(indices, table, tuple(attributes))

    @classmethod
    def from_csv(cls, path: str | Path, *, classes: Sequence[str], attributes: Sequence[str] | None = None) -> Metadata:
        """Metadata from a CSV in UTF-8 with a column `label` and one per attribute; an empty cell is unknown.

        Args:
            path: the file; a column `file` is left out.
            classes: class names in order of the model's outputs, as the column `label` has them.
            attributes: names of columns; by default all but `file` and `label`.

        Raises:
            ValueError: a file that cannot be read, a column that is not there, a label that is not among `classes`;
                says which line and name.
        """
        try:
            with Path(path).open(encoding="utf-8-sig", newline="") as file:
                return cls._read(path, csv.reader(file), list(classes), attributes)
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{path}: cannot be read as CSV in UTF-8: {error}") from error

    @classmethod
    def _read(cls, path: str | Path, reader: Any, classes: list[str], attributes: Sequence[str] | None) -> Metadata:
        columns = [name.strip() for name in next(reader, [])]
        odd = next((c for i, c in enumerate(columns) if not c or c in columns[:i]), None)
        if odd is not None:
            raise ValueError(f"{path}, line 1: column {odd!r} has no name or occurs twice: rename or remove it")
        names = [c for c in columns if c not in ("file", "label")] if attributes is None else list(attributes)
        for name in ("label", *names):
            if name not in columns:
                raise ValueError(f"{path}, line 1: no column {name!r}: {_near(name, columns)}")
        index_of = {name: i for i, name in enumerate(classes)}
        label_at, places = columns.index("label"), [columns.index(name) for name in names]
        labels: list[int] = []
        rows: list[list[str]] = []
        for cells in reader:
            if not cells:
                continue  # an empty line
            if len(cells) != len(columns):
                raise ValueError(
                    f"{path}, line {reader.line_num}: expected {len(columns)} values, got {len(cells)}: put a value "
                    "that holds a comma in quotes"
                )
            label = cells[label_at].strip()
            if label not in index_of:
                raise ValueError(
                    f"{path}, line {reader.line_num}: label {label!r} is not among the classes: {_near(label, classes)}"
                )
            labels.append(index_of[label])
            rows.append([cells[place].strip() for place in places])
        if not labels:
            raise ValueError(f"{path}: has no row below its header")
        table = np.array(rows, dtype=np.str_).reshape(len(rows), len(names))
        return cls(np.array(labels, dtype=np.int64), table, tuple(names))

    @classmethod
    def load(cls, source: Metadata | Annotated | str | Path | None, subjects: Subjects) -> Metadata | None:
        """Metadata of the training set from whatever the user has, checked against the names of the audit set.

        Args:
            source: `Metadata`, an annotated dataset, the path of a CSV (see `from_csv`), or None, which stays None.
            subjects: the audit set's names. Attributes that it does not have are kept.

        Raises:
            ValueError: as `from_csv`; classes named in another order than the audit set's; a label beyond its classes;
                no attribute of the audit set at all; an attribute without a single value of the audit set's.
        """
        if source is None:
            return None
        if isinstance(source, str | Path):
            found, where = cls.from_csv(source, classes=subjects.classes), str(source)
        elif isinstance(source, Metadata):
            found, where = source, "training metadata"
        else:
            found, where = cls._of_dataset(source, subjects), "training set"
        found._check(where, subjects)
        return found

    @classmethod
    def _of_dataset(cls, source: Annotated, subjects: Subjects) -> Metadata:
        both = list(zip(source.subjects.classes, subjects.classes, strict=False))
        if any(mine != theirs for mine, theirs in both):
            raise ValueError(
                f"training set: its classes are {list(source.subjects.classes)}, the audit set's are "
                f"{list(subjects.classes)}: name them alike, in the order of the model's outputs"
            )
        return cls(source.labels, source.attribute_table, tuple(name for name, _ in source.subjects.attributes))

    def _check(self, where: str, subjects: Subjects) -> None:
        if not len(self):
            raise ValueError(f"{where}: has no sample: leave it out, or give the training set's labels and attributes")
        audited = dict(subjects.attributes)
        if audited and not set(audited) & set(self.names):
            raise ValueError(
                f"{where}: expected an attribute of the audit set ({', '.join(audited)}), got "
                f"{', '.join(self.names) or 'none'}: name the columns as the audit set does"
            )
        for name, column in zip(self.names, self.attributes.T, strict=True):
            values = set(np.unique(column).tolist()) - {""}
            if name in audited and values and not values & set(audited[name]):
                raise ValueError(
                    f"{where}: attribute {name!r} has the values {', '.join(sorted(values))}, in the audit set it has "
                    f"{', '.join(audited[name])}: write them alike"
                )


def _class_indices(labels: Any) -> npt.NDArray[np.int64]:
    found = np.asarray(labels.tolist() if hasattr(labels, "tolist") else labels)
    if found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
        raise ValueError(
            f"labels: expected class indices (0, 1, ...), one for each sample, got {found.dtype} of shape {found.shape}"
        )
    if found.size and found.min() < 0:
        row = int(found.argmin())
        raise ValueError(f"labels, row {row}: expected a class index (0, 1, ...), got {found[row]}")
    return found.astype(np.int64)


def text_column(name: str, values: Iterable[Any]) -> npt.NDArray[np.str_]:
    """A column of text or whole numbers as text `(N,)`, "" for None, "" and NaN; `name` is for the error.

    Raises:
        ValueError: a value that is neither; says which row.
    """
    if isinstance(values, str):
        raise ValueError(f"{name}: expected a column of values, got one text: {values!r}")
    cells = values.tolist() if hasattr(values, "tolist") else list(values)
    # Each different value is looked at once: a training set may have millions of rows.
    text: dict[Any, str] = {}
    for row, cell in enumerate(cells):
        try:
            if cell in text:
                continue
        except TypeError:
            pass  # What cannot be looked up is neither text nor a number, which the next line says.
        text[cell] = _text(name, row, cell)
    return np.array([text[cell] for cell in cells], dtype=np.str_)


def _text(name: str, row: int, cell: Any) -> str:
    if isinstance(cell, np.generic):
        cell = cell.item()
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return ""
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))  # pandas makes whole numbers floats where one is missing
    if isinstance(cell, str | int):
        return str(cell).strip()
    raise ValueError(f"{name}, row {row}: expected text or a whole number, got {cell!r}")


def _near(name: str, names: Iterable[str]) -> str:
    known = list(names)
    close = difflib.get_close_matches(name, known, n=3)
    return f"did you mean {', '.join(map(repr, close))}?" if close else f"there are {', '.join(known[:20]) or 'none'}"

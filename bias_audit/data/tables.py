"""The table that says which images an audit set has: a CSV with columns `file` and `label`, and one per attribute.

Enters: its path. Leaves: its rows, each with its place for errors, and the class names; what is wrong goes to the
caller's `Complaints`, so that it is said along with the rest. torch is not imported here.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from bias_audit.data.annotations import Complaints, Misfit
from bias_audit.data.files import near

_Cell = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class Row(BaseModel):
    """One image; `where` is its place in the file."""

    model_config: ClassVar[ConfigDict] = ConfigDict(strict=True, frozen=True)

    where: str
    file: _Cell
    label: _Cell
    attributes: dict[str, _Cell]


def read_labels(
    path: str | Path, attributes: Sequence[str] | None, classes: Sequence[str] | None, wrong: Complaints
) -> tuple[list[Row], tuple[str, ...]]:
    """The rows of the CSV, and the class names: those given, or the labels in alphabetical order."""
    rows: list[Row] = []
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            columns = list(reader.fieldnames or ())
            names = [c for c in columns if c not in ("file", "label")] if attributes is None else attributes
            faults = _column_faults(columns, names)
            wrong.lines += [f"{path}, line 1: {fault}" for fault in faults]
            # Without its columns each line would be wrong in the same way.
            for cells in reader if not faults else ():
                row = wrong.attempt(partial(_row, f"{path}, line {reader.line_num}", cells, names))
                rows += [row] if row is not None else []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        wrong.add(str(path), f"cannot be read as CSV in UTF-8: {error}")
    found = tuple(sorted({row.label for row in rows})) if classes is None else tuple(classes)
    first: dict[str, Row] = {}
    for row in rows:
        if row.label not in found:
            wrong.add(row.where, f"label {row.label!r} is not among `classes` {list(found)}")
        if first.setdefault(row.file, row) is not row:
            wrong.add(row.where, f"{row.file!r} stands in {first[row.file].where} as well: remove one of the rows")
    return rows, found


def _column_faults(columns: Sequence[str], attributes: Sequence[str]) -> list[str]:
    # DictReader would keep the last of two columns, and call an index that pandas wrote an attribute named "".
    odd = [c for i, c in enumerate(columns) if not c or c in columns[:i]]
    missing = [name for name in ("file", "label", *attributes) if name not in columns]
    return [
        *(f"column {c!r} has no name or occurs twice: rename or remove it" for c in dict.fromkeys(odd)),
        *(f"no column {name!r}: {near(name, columns)}" for name in missing),
    ]


def _row(where: str, cells: Mapping[str | None, Any], attributes: Sequence[str]) -> Row:
    if None in cells:
        raise Misfit([f"{where}: more values than columns: put a value that holds a comma in quotes"])
    values = {name: cells[name] for name in attributes}
    try:
        return Row(where=where, file=cells["file"], label=cells["label"], attributes=values)
    except ValidationError as error:
        empty = [one["loc"][-1] for one in error.errors()]
        raise Misfit([f"{where}: no value in column {c!r}: fill it in, or remove the row" for c in empty]) from error

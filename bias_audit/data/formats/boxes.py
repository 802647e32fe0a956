"""Boxes as CSV, for whoever has them in a table: a line per box, edges in pixels from the upper left corner.

    file,region,left,top,right,bottom
    ward/a.jpg,hair,12,4,60.5,31

`right` and `bottom` are edges too: a box over the first pixel alone is 0,0,1,1. A line with a file only says that
nothing is annotated in it. The columns `width` and `height` (of the image), `score`, `source` and `instance` may be
there as well; others are passed over.

Enters: such a file. Leaves: `Annotations`; or such a file. Outlines become the boxes around them, and groups are not
held.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bias_audit.atomic import write_whole
from bias_audit.data.annotations import AnnotatedImage, Annotation, Annotations, Complaints, Misfit
from bias_audit.data.files import near
from bias_audit.data.formats import shapes

COLUMNS = ("file", "region", "left", "top", "right", "bottom")
MORE = ("width", "height", "score", "source", "instance")


@dataclass
class _Found:
    """What the lines read so far say of one image."""

    where: str
    size: tuple[int, int] | None = None
    annotations: list[Annotation] = field(default_factory=list)


def recognises(path: Path) -> bool:
    """Whether its first line names the columns."""
    if path.suffix.lower() != ".csv" or not path.is_file():
        return False
    with path.open("rb") as file:
        names = file.readline(1 << 12).decode("utf-8-sig", errors="replace").strip().split(",")
    return set(COLUMNS) <= {name.strip('" ') for name in names}


def read(path: Path, images: Path | None = None) -> Annotations:
    """The images in the order in which the file first names them.

    Raises:
        Misfit: it cannot be read, lacks a column, or a line does not say a box.
    """
    wrong = Complaints()
    found: dict[str, _Found] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            _check(path, list(reader.fieldnames or ()))
            for cells in reader:
                where = f"{path}, line {reader.line_num}"
                name = (cells["file"] or "").strip().replace("\\", "/")
                if not name:
                    wrong.add(where, "no value in column 'file': fill it in, or remove the line")
                    continue
                image = found.setdefault(name, _Found(where))
                if None in cells:
                    wrong.add(where, f"image {name!r}: more values than columns: put what holds a comma in quotes")
                    continue
                try:
                    _add(cells, image)
                except ValueError as error:
                    wrong.add(where, f"image {name!r}: {error}")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        wrong.add(str(path), f"cannot be read as CSV in UTF-8: {error}: save it as that")
    listed = (AnnotatedImage(name, one.size, tuple(one.annotations), one.where) for name, one in found.items())
    return shapes.collected(listed, (), wrong)


def write(annotations: Annotations, path: Path, images: Path | None = None) -> None:
    """A file with a line per box, and one for each image without any; columns that nothing fills are left out.

    Raises:
        Misfit: an outline is empty, or is a mask of an image whose size is not known.
    """
    wrong = Complaints()
    rows: list[dict[str, object]] = []
    for image in annotations.images:
        size = {} if image.size is None else {"height": image.size[0], "width": image.size[1]}
        if not image.annotations:
            rows.append({"file": image.file, **size})
        for annotation in image.annotations:
            where = f"{image.where}: image {image.file!r}: {annotation.region!r}"
            box = wrong.attempt(lambda a=annotation, s=image.size: shapes.around(a.outline, s), where)  # type: ignore[misc]
            if box is None:
                continue
            rows.append(
                {
                    "file": image.file,
                    "region": annotation.region,
                    "left": f"{box.left:.12g}",
                    "top": f"{box.top:.12g}",
                    "right": f"{box.right:.12g}",
                    "bottom": f"{box.bottom:.12g}",
                    **size,
                    "score": annotation.score,
                    "source": annotation.source or None,
                    "instance": annotation.instance,
                }
            )
    wrong.end()
    used = [name for name in MORE if any(row.get(name) is not None for row in rows)]
    text = io.StringIO()
    writer = csv.DictWriter(text, [*COLUMNS, *used], extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue().encode())


def _check(path: Path, columns: Sequence[str]) -> None:
    missing = [name for name in COLUMNS if name not in columns]
    twice = sorted({name for name in columns if columns.count(name) > 1})
    lines = [f"{path}, line 1: no column {name!r}: {near(name, columns)}" for name in missing]
    lines += [f"{path}, line 1: the column {name!r} occurs twice: rename or remove one" for name in twice]
    if lines:
        raise Misfit(lines)


def _add(cells: Mapping[str, str | None], image: _Found) -> None:
    said = {name: (cells.get(name) or "").strip() for name in (*COLUMNS, *MORE)}
    if said["height"] or said["width"]:
        size = shapes.size(shapes.whole(said["height"], "height"), shapes.whole(said["width"], "width"))
        if image.size not in (None, size):
            raise ValueError(f"its size is {size} here and {image.size} before (height, width): correct one")
        image.size = size
    if not any(said[name] for name in COLUMNS[1:]):
        return
    if not said["region"]:
        raise ValueError("no value in column 'region': fill it in, or remove the line")
    left, top, right, bottom = (shapes.number(said[name], name) for name in COLUMNS[2:])
    score = shapes.number(said["score"], "score") if said["score"] else None
    if score is not None and not 0 <= score <= 1:
        raise ValueError(f"score is {score:g}: expected 0 to 1")
    instance = shapes.whole(said["instance"], "instance") if said["instance"] else None
    image.annotations.append(
        Annotation(said["region"], shapes.box(left, top, right, bottom), score, said["source"], instance)
    )

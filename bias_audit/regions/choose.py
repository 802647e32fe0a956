"""Which images to annotate first: so many of each label x attributes cell, and of these the ones that ask for it.

Enters: the rows of a table of labels, which of them are annotated, and a recorded run where there is one. Leaves:
`Choices`: the images in the order in which they are best annotated, each with why.

Two things are decided apart. The cells say how many: the cell that has fewest annotated images gets the next one, as
in a stratified draw with equal shares. The run says which: of a cell's images half are drawn by chance and half are
those whose heatmaps lie where no region explains them. Without the first half the audit set would hold odd images
only, without the second a cue that nobody annotated would stay without a region.
"""

from __future__ import annotations

import csv
import hashlib
import heapq
import io
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path

from bias_audit.data.annotations import Complaints, Misfit
from bias_audit.data.formats.known import read_annotations
from bias_audit.data.tables import Row, read_labels
from bias_audit.records.runs import read_run
from bias_audit.regions.leads import Lead, unexplained

BALANCE, WHY = "balance", "why"
# A column of more values, with fewer images each, tells images apart and not groups: no draw can balance by it.
MOST_VALUES, FEWEST_EACH = 20, 4


@dataclass(frozen=True)
class Choice:
    """An image to annotate; `why` is "balance" where it was drawn by chance, or that of its `Lead`."""

    row: Row
    why: str


@dataclass(frozen=True)
class Cell:
    """One label with one value of each attribute: how many images it has, how many are annotated, how many chosen."""

    label: str
    values: tuple[str, ...]
    images: int
    annotated: int
    chosen: int


@dataclass(frozen=True)
class Choices:
    """The images to annotate, first things first, and every cell; `attributes` are the names of a cell's values."""

    picked: tuple[Choice, ...]
    cells: tuple[Cell, ...]
    attributes: tuple[str, ...]


def choose(
    rows: Sequence[Row], count: int, *, annotated: Collection[str] = (), leads: Sequence[Lead] = (), seed: int = 0
) -> Choices:
    """At most `count` of the images that are not annotated, as even over the cells as these allow.

    Each next image is of the cell with the fewest annotated and chosen ones so far, of several of another label in
    turn, so whatever part of the list is annotated is balanced too. Of a cell's share the smaller half is drawn by
    chance, the rest are its first leads, as far as it has any. The draw goes by each file's own name: more rows, or the
    next call with more of them annotated, do not shuffle it.

    Args:
        rows: what `read_labels` gives; all have the same attributes.
        count: at least 1.
        annotated: files that need nothing more.
        leads: the most telling first, as `unexplained` gives them; those of other files are ignored.
        seed: of the draw.

    Raises:
        ValueError: `count` is below 1, or no image is left to annotate.

    Example:
        >>> genders = ["man"] * 6 + ["woman"] * 2
        >>> rows = [
        ...     Row(where="", file=f"{i}.jpg", label="doctor", attributes={"gender": gender})
        ...     for i, gender in enumerate(genders)
        ... ]
        >>> [(*cell.values, cell.chosen) for cell in choose(rows, 4).cells]
        [('man', 2), ('woman', 2)]
    """
    if count < 1:
        raise ValueError(f"expected at least 1 image to choose, got {count}")
    done = set(annotated)
    cells: defaultdict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        cells[(row.label, *row.attributes.values())].append(row)
    names = sorted(cells)
    left = [sorted((r for r in cells[name] if r.file not in done), key=_drawn_by(seed)) for name in names]
    before = [len(cells[name]) - len(of_cell) for name, of_cell in zip(names, left, strict=True)]
    order = _turns(before, [len(of_cell) for of_cell in left], _ranks(names, seed), count)
    if not order:
        raise ValueError(f"none of {len(rows)} images is left to annotate: give more rows, or fewer annotated images")
    chosen = Counter(order)
    shares = [chosen[place] for place in range(len(names))]
    picked = [iter(_of_cell(of_cell, share, leads)) for of_cell, share in zip(left, shares, strict=True)]
    counted = zip(names, before, shares, strict=True)
    return Choices(
        tuple(next(picked[place]) for place in order),
        tuple(Cell(name[0], name[1:], len(cells[name]), had, share) for name, had, share in counted),
        tuple(rows[0].attributes),
    )


def choose_from_files(
    labels: str | Path,
    count: int,
    *,
    attributes: Sequence[str] | None = None,
    annotated: str | Path | None = None,
    format: str | None = None,
    images: str | Path | None = None,
    run: str | Path | None = None,
    seed: int = 0,
) -> Choices:
    """The images of a table that are to be annotated first: see `choose` and `unexplained`.

    Args:
        labels: CSV with the columns `file` and `label` and one per attribute.
        count: how many, at least 1.
        attributes: columns to balance by; by default all but `file` and `label`.
        annotated: annotations in any format; an image in which anything is drawn needs nothing more.
        format: that of the annotations, or None to recognise it.
        images: the folder of the images, which some formats need to be read.
        run: a run directory whose samples have the table's files as their ids.
        seed: of the draw.

    Raises:
        Misfit: all that is wrong with the files; a column that names images; or annotations, or a run, without any
            image of the table.
        ValueError: nothing is left to annotate.

    Example:
        >>> choose_from_files("labels.csv", 40, annotated="regions.json").cells[0].chosen  # doctest: +SKIP
        10
    """
    wrong = Complaints()
    rows, _ = read_labels(labels, attributes, None, wrong)
    if rows and WHY in rows[0].attributes:
        wrong.add(f"{labels}, line 1", f"the column {WHY!r} is what this command adds: remove it")
    wrong.lines += [f"{labels}, line 1: {fault}" for fault in _unbalanceable(rows, attributes)]
    files = {row.file for row in rows}
    drawn: frozenset[str] = frozenset()
    if annotated is not None:
        known = wrong.attempt(lambda: read_annotations(annotated, images, format))
        if known is not None:
            drawn = frozenset(image.file for image in known.images if image.annotations)
            if files and drawn and not drawn & files:
                wrong.add(str(annotated), f"has no image of {labels}, but {min(drawn)!r}: {_alike(labels)}")
    recorded = None
    if run is not None:
        recorded = wrong.attempt(lambda: read_run(run))
    wrong.end()
    if not rows:
        raise Misfit([f"{labels}: has no row below its header: list the images to choose from"])
    leads: tuple[Lead, ...] = ()
    if recorded is not None:
        ids = recorded.sample_table().ids
        if not files & set(ids):
            raise Misfit([f"{recorded.path}: audited no image of {labels}, but {min(ids)!r}: {_alike(labels)}"])
        leads = unexplained(recorded)
    return choose(rows, count, annotated=drawn, leads=leads, seed=seed)


def as_csv(choices: Choices) -> bytes:
    """The images as a table of labels with one column more, `why`.

    Example:
        >>> row = Row(where="", file="a.jpg", label="nurse", attributes={"gender": "man"})
        >>> print(as_csv(choose([row], 1)).decode(), end="")
        file,label,gender,why
        a.jpg,nurse,man,balance
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("file", "label", *choices.attributes, WHY))
    for choice in choices.picked:
        row = choice.row
        writer.writerow((row.file, row.label, *(row.attributes[name] for name in choices.attributes), choice.why))
    return text.getvalue().encode()


def _drawn_by(seed: int) -> Callable[[Row], bytes]:
    return lambda row: _draw(seed, row.file)


def _draw(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{name}".encode()).digest()


def _unbalanceable(rows: Sequence[Row], attributes: Sequence[str] | None) -> list[str]:
    """What is wrong with the columns to balance by."""
    asked = "name the columns to balance by with --attribute"
    if attributes is not None:
        return [f"{name!r} is no attribute: {asked}" for name in attributes if name in ("file", "label")]
    counts = {name: len({row.attributes[name] for row in rows}) for name in (rows[0].attributes if rows else ())}
    return [
        f"column {name!r} has {n} values in {len(rows)} rows, too many to balance by: {asked}"
        for name, n in counts.items()
        if n > MOST_VALUES and n * FEWEST_EACH > len(rows)
    ]


def _ranks(names: Sequence[tuple[str, ...]], seed: int) -> list[int]:
    """The place of each cell, which begins with its label, among those of this label: drawn by chance."""
    ranks, seen = [0] * len(names), Counter[str]()
    for place in sorted(range(len(names)), key=lambda place: _draw(seed, "\0".join(names[place]))):
        ranks[place] = seen[names[place][0]]
        seen[names[place][0]] += 1
    return ranks


def _turns(before: Sequence[int], left: Sequence[int], ranks: Sequence[int], count: int) -> list[int]:
    """The cell of each image in turn: of those with an image left the one that has least; of several the first by
    rank, so that one label follows another."""
    heap = [(had, rank, place, n) for place, (had, rank, n) in enumerate(zip(before, ranks, left, strict=True)) if n]
    heapq.heapify(heap)
    order: list[int] = []
    while heap and len(order) < count:
        has, rank, place, n = heapq.heappop(heap)
        order.append(place)
        if n > 1:
            heapq.heappush(heap, (has + 1, rank, place, n - 1))
    return order


def _of_cell(left: Sequence[Row], share: int, leads: Sequence[Lead]) -> list[Choice]:
    """`share` of a cell's images, which are in the order of the draw: leads and drawn ones in turn, leads first."""
    here = {row.file: row for row in left}
    by_chance = [Choice(row, BALANCE) for row in left]
    drawn = by_chance[: share // 2]
    taken = {choice.row.file for choice in drawn}
    led = [Choice(here[lead.file], lead.why) for lead in leads if lead.file in here and lead.file not in taken]
    led = led[: share - len(drawn)]
    taken |= {choice.row.file for choice in led}
    drawn += [choice for choice in by_chance if choice.row.file not in taken][: share - len(drawn) - len(led)]
    return [choice for choice in chain.from_iterable(zip_longest(led, drawn)) if choice is not None]


def _alike(labels: str | Path) -> str:
    return f"write the paths there and in the column `file` of {labels} from the same folder"

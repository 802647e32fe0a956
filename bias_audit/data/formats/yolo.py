"""YOLO: a text file per image, a line per thing (https://docs.ultralytics.com/datasets/detect).

    data.yaml                 names: {0: person, 1: tie}; or classes.txt or obj.names with a name per line
    images/train/a.jpg
    labels/train/a.txt        0 0.5 0.4 0.2 0.6            class, centre x and y, width and height: a box
                              1 0.1 0.1 0.3 0.1 0.2 0.4    class and corners: a polygon

All places are shares of the image's width and height, so the images must be there: in the folder that is given, else in
`images` of the export or in all of it. An image's labels are where Ultralytics looks (the last "images" of its path
becomes "labels"), else at the same path in `labels` or below any folder of the export. An image without labels has
nothing annotated. A sixth number of a box is its score; key points (`kpt_shape`) are refused.

Enters: the folder, or its data.yaml. Leaves: `Annotations`; or a folder with `data.yaml` and `labels`, without images.
Holes are filled, of polygons with several rings each ring becomes a line; sources, instances, groups and the scores of
polygons are not held.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from bias_audit.data.annotations import AnnotatedImage, Annotation, Annotations, Box, Complaints, Misfit, Outline
from bias_audit.data.files import files_in, pictures_in, read_bytes, size_of, whole_folder
from bias_audit.data.formats import shapes
from bias_audit.located import read_file, read_yaml

DATA = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
NAMES = ("classes.txt", "obj.names")


def recognises(path: Path) -> bool:
    """Whether it is a folder with names of classes as YOLO has them, or such a YAML file."""
    if path.is_dir():
        return _names_file(path) is not None
    if path.suffix.lower() not in (".yaml", ".yml") or not path.is_file():
        return False
    try:
        content, _ = read_file(path, str(path), read_yaml, "YAML")
    except ValueError:
        return False
    return isinstance(content, Mapping) and "names" in content


def read(path: Path, images: Path | None = None) -> Annotations:
    """All images of the folder, sorted, and what is annotated in each.

    Raises:
        Misfit: no names of classes or no images are found, labels have no image, or a line does not say a box or
            polygon.
    """
    folder = path if path.is_dir() else path.parent
    source = path if path.is_file() else _names_file(path)
    if source is None:
        raise Misfit([f"{path}: has none of {', '.join((*DATA, *NAMES))}: expected the names of the classes there"])
    names = _names(source)
    if images is None:
        images = folder / "images" if (folder / "images").is_dir() else folder
    wrong = Complaints()
    listed: list[AnnotatedImage] = []
    used: dict[Path, str] = {}
    texts = [folder / name for name in files_in(folder, ".txt")]
    named: defaultdict[str, list[Path]] = defaultdict(list)
    for text in texts:
        named[text.name].append(text)
    for name in pictures_in(images):
        file = images / name
        places = [one for one in _places(file, images, folder) if one.is_file()]
        below = PurePosixPath(name).with_suffix(".txt")
        found = places[:1] or [text for text in named[below.name] if text.as_posix().endswith(f"/{below}")]
        labels = found[0] if found else None
        if len(found) > 1:
            wrong.add(
                f"{found[0]}", f"and {found[1]} may both be of the image {name!r}: give the images of one of them"
            )
            continue
        if labels is not None and labels in used:
            wrong.add(str(labels), f"is of the images {used[labels]!r} and {name!r}: rename one")
            continue
        if labels is not None:
            used[labels] = name
        size = wrong.attempt(partial(size_of, file))
        if size is not None:
            drawn = () if labels is None else tuple(_lines(labels, name, size, names, wrong))
            listed.append(AnnotatedImage(name, size, drawn, str(labels or file)))
    for labels in texts:
        # Some tools write the names of the classes among the labels.
        if labels not in used and labels.name not in NAMES and "labels" in labels.relative_to(folder).parts[:-1]:
            wrong.add(str(labels), f"has no image in {images}: give the folder of the images, or remove it")
    if not used and not wrong.lines:
        wrong.add(str(path), f"no image in {images} has labels: give the folder of the images")
    return shapes.collected(listed, tuple(names.values()), wrong)


def write(annotations: Annotations, path: Path, images: Path | None = None) -> None:
    """A folder with `data.yaml` and `labels`; sizes that are not known are read from `images`.

    Raises:
        Misfit: a size is not known, an outline is empty or does not fit, or two images differ in their suffix only.
        ValueError: `path` is there already and not empty.
    """
    annotations = shapes.sized(annotations, images)
    wrong = Complaints()
    numbers = {region: number for number, region in enumerate(annotations.regions)}
    with whole_folder(path) as folder:
        content = {"path": ".", "train": "images", "val": "images", "names": {n: r for r, n in numbers.items()}}
        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
        (folder / "data.yaml").write_text(text, encoding="utf-8")
        for image in annotations.images:
            target = folder / "labels" / PurePosixPath(image.file).with_suffix(".txt")
            if target.exists():
                wrong.add(image.where, f"image {image.file!r}: another differs in its suffix only: rename one")
                continue
            lines: list[str] = []
            for annotation in image.annotations:
                where = f"{image.where}: image {image.file!r}: {annotation.region!r}"
                write = partial(_written, annotation, numbers[annotation.region], image.size or (0, 0))
                lines += wrong.attempt(write, where) or []
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        wrong.end()


def _names_file(folder: Path) -> Path | None:
    return next((folder / name for name in (*DATA, *NAMES) if (folder / name).is_file()), None)


def _names(source: Path) -> dict[int, str]:
    """The classes by their numbers."""
    if source.suffix.lower() not in (".yaml", ".yml"):
        text = read_bytes(source, "a name per line").decode("utf-8-sig", errors="replace")
        return dict(enumerate(name.strip() for name in text.splitlines() if name.strip()))
    try:
        content, _ = read_file(source, str(source), read_yaml, "YAML")
    except ValueError as error:
        raise Misfit([str(error)]) from error
    names: Any = content.get("names") if isinstance(content, Mapping) else None
    found = dict(enumerate(names)) if isinstance(names, list) else names
    if not isinstance(found, Mapping) or not all(isinstance(n, int) and isinstance(v, str) for n, v in found.items()):
        raise Misfit([f"{source}: names: expected a list of names, or a name for each number"])
    if content.get("kpt_shape"):
        raise Misfit([f"{source}: kpt_shape: its lines hold key points, which have no area: export boxes or polygons"])
    return dict(found)


def _places(file: Path, images: Path, folder: Path) -> Iterator[Path]:
    """Where an image's labels may be in the export, if it has such a place there."""
    parts = list(file.parts[:-1])
    if "images" in parts:
        last = len(parts) - 1 - parts[::-1].index("images")
        labels = Path(*parts[:last], "labels", *parts[last + 1 :], file.name).with_suffix(".txt")
        # Beside the folder of the images there may be labels of another export.
        if labels.is_relative_to(folder):
            yield labels
    below = file.relative_to(images).with_suffix(".txt")
    yield folder / "labels" / below
    yield folder / below


def _lines(
    labels: Path, name: str, size: tuple[int, int], names: Mapping[int, str], wrong: Complaints
) -> Iterator[Annotation]:
    content = wrong.attempt(partial(read_bytes, labels, "labels"))
    for number, line in enumerate((content or b"").decode("utf-8-sig", errors="replace").splitlines(), 1):
        values = line.split()
        if not values:
            continue
        try:
            region = names.get(shapes.whole(values[0], "the class"))
            if region is None:
                raise ValueError(f"has the class {values[0]}, which has no name: there are 0 to {len(names) - 1}")
            shares = [shapes.number(value, "a place") for value in values[1:]]
            outline, score = _outline(shares, size)
        except ValueError as error:
            wrong.add(f"{labels}, line {number}", f"image {name!r}: {error}")
            continue
        yield Annotation(region, outline, score=score)


def _outline(shares: Sequence[float], size: tuple[int, int]) -> tuple[Outline, float | None]:
    height, width = size
    if any(not -1 <= value <= 2 for value in shares):
        raise ValueError(f"has the places {list(shares)[:6]}: expected shares of the image, 0 to 1: draw it within")
    if len(shares) in (4, 5):
        x, y, across, down = shares[:4]
        box = shapes.box(
            (x - across / 2) * width, (y - down / 2) * height, (x + across / 2) * width, (y + down / 2) * height
        )
        return box, shares[4] if len(shares) == 5 and 0 <= shares[4] <= 1 else None
    return shapes.polygon([v * (height if k % 2 else width) for k, v in enumerate(shares)]), None


def _written(annotation: Annotation, number: int, size: tuple[int, int]) -> list[str]:
    height, width = size
    outline = annotation.outline
    if isinstance(outline, Box):
        outline = shapes.around(outline, size)
        x, y = (outline.left + outline.right) / 2 / width, (outline.top + outline.bottom) / 2 / height
        shares = [x, y, (outline.right - outline.left) / width, (outline.bottom - outline.top) / height]
        rows = [shares if annotation.score is None else [*shares, annotation.score]]
    else:
        rows = [
            [value / (height if k % 2 else width) for k, value in enumerate(ring)]
            for ring in shapes.ringed(outline, size)
        ]
    for row in rows:
        _outline(row, size)
    return [f"{number} " + " ".join(f"{value:.12g}" for value in row) for row in rows]

"""What a page of docs/ says that its reader has: the small files that its blocks start from."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
from PIL import Image

SIDE, COUNT = 32, 24
# Left, top, right and bottom in each image.
FIRST, SECOND = (20, 2, 30, 12), (8, 4, 20, 16)


def prepare(page: str, folder: Path) -> None:
    """Makes in `folder` what the page (`coco`, `masks`, `boxes`) starts from."""
    makers = {"coco": _coco, "masks": _masks, "boxes": _boxes}
    if page in makers:
        makers[page](folder)


def _pictures(folder: Path, below: str = "") -> list[str]:
    """Noise with two squares, and `labels.csv`; the files' names."""
    rng = np.random.default_rng(0)
    names, rows = [], []
    (folder / "images" / below).mkdir(parents=True)
    for i in range(COUNT):
        pixels = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        for (left, top, right, bottom), shade in ((FIRST, 220), (SECOND, 40)):
            pixels[top:bottom, left:right] = shade
        name = f"{below}{i:04}.png"
        Image.fromarray(pixels).save(folder / "images" / name)
        names.append(name)
        rows.append((name, ("doctor", "nurse")[i % 2], ("man", "woman")[i // 2 % 2]))
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file", "label", "gender"), *rows])
    return names


def _coco(folder: Path) -> None:
    names = _pictures(folder)
    images = [{"id": i, "file_name": name, "height": SIDE, "width": SIDE} for i, name in enumerate(names)]
    annotations: list[dict[str, object]] = []
    for image in images:
        for category, (left, top, right, bottom) in ((1, SECOND), (2, FIRST)):
            outline = [left, top, right, top, right, bottom, left, bottom]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image["id"],
                    "category_id": category,
                    "iscrowd": 0,
                    "area": (right - left) * (bottom - top),
                    "bbox": [left, top, right - left, bottom - top],
                    "segmentation": [outline],
                }
            )
    categories = [{"id": 1, "name": "person"}, {"id": 2, "name": "tie"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(content))


def _masks(folder: Path) -> None:
    names = _pictures(folder, "ward/")
    (folder / "indexed").mkdir()
    for name in names:
        indexed = np.zeros((SIDE, SIDE), dtype=np.uint8)
        for number, (region, (left, top, right, bottom)) in enumerate((("coat", FIRST), ("hair", SECOND)), start=1):
            mask = np.zeros((SIDE, SIDE), dtype=np.uint8)
            mask[top:bottom, left:right] = 255
            indexed[mask > 0] = number
            path = folder / "masks" / region / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(path)
        Image.fromarray(indexed).save(folder / "indexed" / Path(name).name)


def _boxes(folder: Path) -> None:
    names = _pictures(folder)
    with (folder / "boxes.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("file", "region", "left", "top", "right", "bottom"))
        writer.writerows((name, region, *box) for name in names for region, box in (("badge", FIRST), ("face", SECOND)))

"""Sets of images with regions, clean but for what a test plants."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bias_audit.regions.check import check_regions
from bias_audit.regions.checked import Limits, RegionReport
from bias_audit.regions.region_set import Item, RegionSet, read_set
from bias_audit.regions.survey import survey

HOSTILE = "<script>alert(1)</script>"
SIDE = 40
Box = tuple[int, int, int, int]
COLUMNS = [{"id": 1, "name": "tie"}, {"id": 2, "name": "hair"}]


@dataclass
class Scene:
    """A made-up set: boxes `(left, top, right, bottom)` of each image, label, gender, and its size."""

    boxes: dict[str, dict[str, Box]]
    labels: dict[str, tuple[str, str]]
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    outlined: bool = True
    source: dict[str, str] = field(default_factory=dict)

    def coco(self, path: Path) -> Path:
        images, drawn = [], []
        for number, (file, regions) in enumerate(self.boxes.items(), 1):
            height, width = self.sizes.get(file, (SIDE, SIDE))
            images.append({"id": number, "file_name": file, "height": height, "width": width})
            for region, box in regions.items():
                name, _, who = region.partition("@")
                drawn.append(self._drawn(number, 1 if name == "tie" else 2, box) | ({"source": who} if who else {}))
        content = {"images": images, "annotations": drawn, "categories": COLUMNS}
        path.write_text(json.dumps(content), encoding="utf-8")
        return path

    def _drawn(self, image: int, category: int, box: Box) -> dict[str, Any]:
        left, top, right, bottom = box
        found: dict[str, Any] = {"image_id": image, "category_id": category}
        found["bbox"] = [left, top, right - left, bottom - top]
        ring = [left, top, right, top, right, bottom, left, bottom]
        return found | ({"segmentation": [ring]} if self.outlined else {"segmentation": []})

    def write(self, folder: Path, roles: str = "object: [tie]\nspurious: [hair]\n") -> Path:
        (folder / "images").mkdir(exist_ok=True)
        rng = np.random.default_rng(0)
        for file in self.boxes:
            if not (folder / "images" / file).exists():
                pixels = rng.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "images" / file)
        self.coco(folder / "regions.json")
        with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as file_:
            rows = csv.writer(file_)
            rows.writerow(["file", "label", "gender"])
            rows.writerows([file, *self.labels[file]] for file in self.boxes)
        text = "reader: coco\nannotations: regions.json\nimages: images\nlabels: labels.csv\n"
        (folder / "audit.yaml").write_text(text + roles, encoding="utf-8")
        return folder / "audit.yaml"


def clean(count: int = 24) -> Scene:
    """`count` images in each of four cells; ties and hair lie apart, their areas go with nothing."""
    rng = np.random.default_rng(1)
    boxes, labels = {}, {}
    for cell in range(4):
        for k in range(count):
            file = f"{cell}-{k:02d}.png"
            wide, high = (int(x) for x in rng.integers(4, 12, 2))
            boxes[file] = {"tie": (4, 22, 4 + wide, 36), "hair": (8, 2, 30, 2 + high)}
            labels[file] = ("nurse" if cell % 2 else "doctor", "female" if cell < 2 else "male")
    return Scene(boxes, labels)


def checked(data: Path, images: Path | None = None, limits: Limits | None = None) -> RegionReport:
    return check_regions(survey(read_set(data, images)), limits)


def states(report: RegionReport) -> dict[str, str]:
    return {result.check.code: str(result.found.state) for result in report.results}


def found(report: RegionReport, code: str) -> Any:
    return next(result.found for result in report.results if result.check.code == code)


CLEAN = dict.fromkeys(
    ("sizes", "unannotated", "coverage", "extent", "overlap", "area-class", "area-attribute", "cells"), "held"
) | {"agreement": "skipped"}


def moved(scene: Scene, by: int, files: list[str]) -> Scene:
    boxes = {file: dict(regions) for file, regions in scene.boxes.items()}
    for file in files:
        left, top, right, bottom = boxes[file]["hair"]
        boxes[file]["hair"] = (left + by, top, right + by, bottom)
    return replace(scene, boxes=boxes)


def made(count: int, names: Callable[[int], str], rough: bool = False) -> RegionSet:
    """A set that lies nowhere on disk: its pictures are noise, and `rough` masks as well, which takes most room."""
    height, width = 150, 200
    rows, columns = np.mgrid[:height, :width]

    def item(k: int) -> Item:
        def decode() -> tuple[Image.Image, dict[str, np.ndarray[Any, Any]]]:
            rng = np.random.default_rng(k)
            mask = rng.random((height, width)) > 0.5 if rough else np.hypot(rows - 70, columns - 90) < 50
            # As rough as a photograph: noise of five pixels.
            small = rng.integers(0, 255, (height // 5, width // 5, 3), dtype=np.uint8)
            return Image.fromarray(small).resize((width, height)), {"hair": mask, HOSTILE: ~mask}

        return Item(names(k), k % 2, (HOSTILE,), frozenset(), names(k), decode)

    attributes = ((HOSTILE, (HOSTILE,)),)
    items = tuple(item(k) for k in range(count))
    return RegionSet(HOSTILE, ((HOSTILE, "object"), ("hair", "spurious")), (HOSTILE, "b"), attributes, items)

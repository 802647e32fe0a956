"""Images and annotations that tests of the data write, and the same computed in other ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision import tv_tensors

from bias_audit.data.dataset import AuditDataset
from bias_audit.data.samples import AuditSample

HEIGHT, WIDTH = 30, 40
CATEGORIES = [
    {"id": 1, "name": "person", "supercategory": "person"},
    {"id": 5, "name": "tie", "supercategory": "clothing"},
    {"id": 7, "name": "coat", "supercategory": "clothing"},
    {"id": 8, "name": "kitchen", "supercategory": "toy"},
    {"id": 9, "name": "oven", "supercategory": "kitchen"},
]
LABELS = "file,label,gender\na.png,doctor,male\nb.png,nurse,female\n"


def noise(seed: int, height: int = HEIGHT, width: int = WIDTH) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


def picture(seed: int, height: int = HEIGHT, width: int = WIDTH) -> Image.Image:
    return Image.fromarray(noise(seed, height, width).permute(1, 2, 0).numpy())


def block(top: int, left: int, bottom: int, right: int, height: int = HEIGHT, width: int = WIDTH) -> torch.Tensor:
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask


def rectangle(top: int, left: int, bottom: int, right: int) -> list[list[float]]:
    return [[left, top, right, top, right, bottom, left, bottom]]


def sample(i: int, region: torch.Tensor | None = None, label: int = 0, **attributes: str | int) -> AuditSample:
    mask = block(2, 3, 10, 12) if region is None else region
    return AuditSample(noise(i, *mask.shape), label, {"tie": mask}, attributes, f"s{i}")


def annotation(category: int, segmentation: Any, image: int = 1, **more: Any) -> dict[str, Any]:
    return {"id": 1, "image_id": image, "category_id": category, "segmentation": segmentation, "iscrowd": 0, **more}


def write_coco(
    folder: Path, annotations: list[dict[str, Any]], labels: str = LABELS, names: tuple[str, ...] = ("a.png", "b.png")
) -> dict[str, Any]:
    """Noise pictures with their annotations; image ids count from 1."""
    images = [
        {"id": i, "file_name": name, "height": HEIGHT, "width": WIDTH, "license": 3} for i, name in enumerate(names, 1)
    ]
    for image in images:
        path = folder / "images" / str(image["file_name"])
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(int(str(image["id"]))).save(path)
    content = {"info": {"year": 2017}, "images": images, "annotations": annotations, "categories": CATEGORIES}
    (folder / "instances.json").write_text(json.dumps(content))
    (folder / "labels.csv").write_text(labels)
    return {"annotations": folder / "instances.json", "images": folder / "images", "labels": folder / "labels.csv"}


def write_folder(folder: Path, masks: dict[str, Image.Image], labels: str = LABELS) -> dict[str, Any]:
    """Noise pictures a.png and b.png; `masks` by path below the folder of masks."""
    for name, content in {"images/a.png": picture(1), "images/b.png": picture(2)}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        content.save(folder / name)
    for name, content in masks.items():
        (folder / "masks" / name).parent.mkdir(parents=True, exist_ok=True)
        content.save(folder / "masks" / name)
    (folder / "labels.csv").write_text(labels)
    return {"images": folder / "images", "labels": folder / "labels.csv", "masks": folder / "masks"}


def grey(mask: torch.Tensor) -> Image.Image:
    return Image.fromarray(mask.numpy().astype(np.uint8) * 255)


def grey_levels(images: torch.Tensor) -> torch.Tensor:
    """The uint8 pixels that were scaled to [0, 1]."""
    return (images * 255).round().to(torch.uint8)


def masks_of(audit_set: AuditDataset, index: int = 0) -> torch.Tensor:
    return audit_set.batch([index]).masks[0]


class Items(Dataset[Any]):
    """A map-style dataset of the items given, or of what a function makes of the index."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items
        self.reads = 0

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        self.reads += 1
        item = self.items[index]
        return item() if callable(item) else item


ONE_MASK = tv_tensors.Mask(torch.ones(1, HEIGHT, WIDTH))

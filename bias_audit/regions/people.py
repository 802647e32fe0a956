"""People in images, by torchvision's Mask R-CNN and Keypoint R-CNN: persons, their parts, and the background.

Enters: the names of regions, and weights from files or torchvision's download. Leaves: a `PeopleDetector`, which gives
each image's annotations: a person is the detector's mask; face, hair, torso and hands are drawn from the keypoints of
the same person and cut by that mask (see `keypoints`); the background is what no person covers.

The detectors are those of Mask R-CNN (He et al., 2017, arXiv 1703.06870). Nothing here says who or what a person is.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import numpy.typing as npt
import torch
import torchvision
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights
from torchvision.ops import box_iou
from torchvision.transforms.v2 import functional as F

from bias_audit.data.annotations import Annotation, Complaints
from bias_audit.data.outlines import Mask
from bias_audit.regions.keypoints import REGIONS as PARTS
from bias_audit.regions.keypoints import people_regions
from bias_audit.regions.pictures import Picture

PERSON, BACKGROUND = "person", "background"
REGIONS = (PERSON, *PARTS, BACKGROUND)
# A person of one detector and a person of the other are the same if their boxes overlap so much.
LEAST_IOU = 0.5
# A keypoint is seen where its heatmap's highest logit is above this: the threshold that Detectron draws with. It is no
# probability: the detector is trained on the points that are there only.
SEEN = 2.0

_PERSON_LABEL = 1
# What a person is called in these numbers of classes: COCO's 91, or nothing and person.
_CLASSES = (91, 2)
_MASKS = ("maskrcnn_resnet50_fpn_v2", "maskrcnn_resnet50_fpn")
# All of them have one; it tells how many classes they know.
_CLASSIFIER = "roi_heads.box_predictor.cls_score.bias"
_KEYPOINTS = "keypointrcnn_resnet50_fpn"
# Of the shorter side, 800 pixels, the longer is at most this many times as long: torchvision's 1333.
_LONGEST = 1333 / 800


@dataclass(frozen=True)
class Detector:
    """A detector that maps images `(3, h, w)`, 0 to 1, to their boxes, labels, scores and masks or keypoints, as
    torchvision's do, on its device; and what it is, for the annotations."""

    model: nn.Module
    source: str


@dataclass(frozen=True)
class PeopleDetector:
    """Finds the wanted `regions`; `points` is None where none of them needs keypoints.

    A person counts with a score above `min_score`, 0 to 1.
    """

    masks: Detector
    points: Detector | None
    regions: tuple[str, ...]
    min_score: float

    @property
    def source(self) -> str:
        """What everything it finds depends on."""
        made = self.masks.source if self.points is None else f"{self.masks.source}; {self.points.source}"
        return f"{made}; {self._least}; {', '.join(self.regions)}"

    @property
    def _least(self) -> str:
        return f"score above {self.min_score:g}"

    def alike(self, size: tuple[int, int]) -> Hashable:
        """Images for which this is the same have the same result in a batch as alone, since none of them is padded.

        Raises:
            ValueError: nothing is left of the shorter side when it is scaled.
        """
        transform = getattr(self.masks.model, "transform", None)
        if transform is None:
            return size
        short, long = min(size), max(size)
        scale = min(transform.min_size[-1] / short, transform.max_size / long)
        if int(short * scale) < 1:
            raise ValueError(
                f"is looked at as {size[1]} x {size[0]} pixels, too narrow to find people in: crop it, or leave it out "
                "with --only"
            )
        return tuple(-(-int(side * scale) // transform.size_divisible) for side in size)

    def __call__(self, pictures: Sequence[Picture]) -> list[tuple[Annotation, ...]]:
        """The annotations of each picture: its persons, the highest score first, each followed by its parts; then the
        background.

        All that belongs to a person has its number as `instance`. A part has the lower of the two detectors' scores.
        An image without a person has no background either: nobody may have been found, or nobody be there.
        """
        device = next(self.masks.model.parameters()).device
        images = [F.to_dtype(F.pil_to_tensor(p.image).to(device), torch.float32, scale=True) for p in pictures]
        with torch.inference_mode():
            masked = self.masks.model(images)
            posed = [None] * len(images) if self.points is None else self.points.model(images)
        return [self._one(*found) for found in zip(pictures, masked, posed, strict=True)]

    def _one(
        self, picture: Picture, masked: Mapping[str, Tensor], posed: Mapping[str, Tensor] | None
    ) -> tuple[Annotation, ...]:
        people = (masked["labels"] == _PERSON_LABEL) & (masked["scores"] > self.min_score)
        masks = (masked["masks"][people, 0] > 0.5).cpu().numpy()
        boxes, scores = masked["boxes"][people].cpu(), masked["scores"][people].tolist()
        parts: Mapping[int, tuple[float, Mapping[str, Mask]]] = {}
        if posed is not None and len(masks):
            parts = self._parts(boxes, masks, posed)
        found: list[Annotation] = []
        own = f"{self.masks.source}; {self._least}"
        others = "" if self.points is None else f"drawn from keypoints by {self.points.source}; cut by {own}"
        for person, (mask, score) in enumerate(zip(masks, scores, strict=True)):
            if PERSON in self.regions and mask.any():
                found.append(Annotation(PERSON, picture.runs(mask), score, own, person))
            posed_score, drawn = parts.get(person, (0.0, {}))
            found.extend(
                Annotation(name, picture.runs(part), min(score, posed_score), others, person)
                for name, part in drawn.items()
                if part.any()
            )
        covered: Mask = np.logical_or.reduce(masks, axis=0)
        if BACKGROUND in self.regions and covered.any() and not covered.all():
            found.append(Annotation(BACKGROUND, picture.runs(~covered), source=f"what no person covers by {own}"))
        return tuple(found)

    def _parts(
        self, boxes: Tensor, masks: npt.NDArray[np.bool_], posed: Mapping[str, Tensor]
    ) -> dict[int, tuple[float, dict[str, Mask]]]:
        """By a person's number the score of her pose, and her parts."""
        people = (posed["labels"] == _PERSON_LABEL) & (posed["scores"] > self.min_score)
        points, scores = posed["keypoints"][people].cpu(), posed["scores"][people].tolist()
        seen = posed["keypoints_scores"][people].cpu() > SEEN
        pairs = same_people(boxes, posed["boxes"][people].cpu())
        keypoints = torch.cat([points[..., :2], seen[..., None]], dim=2)[[b for _, b in pairs]]
        wanted = [name for name in self.regions if name in PARTS]
        drawn = people_regions(keypoints.numpy(), masks[[a for a, _ in pairs]], wanted)
        return {a: (scores[b], {n: drawn[n][place] for n in wanted}) for place, (a, b) in enumerate(pairs)}


def same_people(boxes: Tensor, others: Tensor) -> list[tuple[int, int]]:
    """Which boxes `(N, 4)` and `(M, 4)` (left, top, right, bottom) are of the same person, as pairs of indices.

    Each is in one pair at most; of all such pairings that of the largest sum of IoUs, without pairs below `LEAST_IOU`.

    Example:
        >>> wide, high = [0.0, 0.0, 9.0, 4.0], [20.0, 0.0, 24.0, 9.0]
        >>> same_people(torch.tensor([wide, high]), torch.tensor([high, [50.0, 0.0, 60.0, 9.0]]))
        [(1, 0)]
    """
    overlaps = box_iou(boxes, others)
    # Before the pairing: a pair that does not count must not cost another that does.
    overlaps = overlaps.where(overlaps >= LEAST_IOU, 0.0).numpy()
    rows, columns = linear_sum_assignment(overlaps, maximize=True)
    return [(int(a), int(b)) for a, b in zip(rows, columns, strict=True) if overlaps[a, b] > 0]


def load_people(
    regions: Sequence[str], weights: Sequence[Path], device: torch.device, size: int, min_score: float
) -> PeopleDetector:
    """The detectors that some regions need, with their weights.

    Args:
        regions: of `REGIONS`.
        weights: state dicts of torchvision's `maskrcnn_resnet50_fpn_v2`, `maskrcnn_resnet50_fpn` or
            `keypointrcnn_resnet50_fpn`, .pth or .safetensors; which of them a file is its names tell. Where none is
            given, torchvision's own weights are downloaded, unless that was done before.
        device: where they run.
        size: to so many pixels an image's shorter side is scaled for them.
        min_score: least score of a person.

    Raises:
        ValueError: a file is none of these, two are of one kind, or downloads failed; all of them are named.

    Example:
        >>> load_people(["person"], [], torch.device("cpu"), 800, 0.5).regions  # doctest: +SKIP
        ('person',)
    """
    files: dict[str, _File] = {}
    wrong = Complaints()
    for path in weights:
        file = wrong.attempt(partial(_read, path))
        if file is None:
            continue
        role = "keypoints" if file.architecture == _KEYPOINTS else "masks"
        if role in files:
            wrong.add(f"--weights {path}", f"is for {role} as {files[role].path} is: give one file for each")
        files[role] = file
    wrong.end()
    needed = {"masks": _MASKS[0]} | ({"keypoints": _KEYPOINTS} if any(name in PARTS for name in regions) else {})
    for role, architecture in needed.items():
        file = files.get(role) or wrong.attempt(partial(_downloaded, architecture))
        if file is not None:
            files[role] = file
    wrong.end()
    built = {role: _detector(files[role], device, size, min_score) for role in needed}
    return PeopleDetector(built["masks"], built.get("keypoints"), tuple(regions), min_score)


@dataclass(frozen=True)
class _File:
    path: Path
    architecture: str
    state: Mapping[str, Tensor]
    sha256: str


def _read(path: Path) -> _File:
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"--weights {path}: cannot be read ({error.strerror}): give the path of a file") from error
    state = _loaded(path)
    names = set(state) if isinstance(state, Mapping) else set()
    if _CLASSIFIER not in names:
        names = set()
    if "roi_heads.keypoint_predictor.kps_score_lowres.weight" in names:
        architecture = _KEYPOINTS
    elif "roi_heads.mask_predictor.mask_fcn_logits.weight" in names:
        # The later version has normalisation in its feature pyramid.
        architecture = _MASKS["backbone.fpn.inner_blocks.0.1.weight" not in names]
    else:
        raise ValueError(
            f"--weights {path}: is no state dict of {', '.join(_MASKS)} or {_KEYPOINTS}: save the `state_dict()` of one"
        )
    classes = len(state[_CLASSIFIER])
    if classes not in _CLASSES:
        raise ValueError(
            f"--weights {path}: tells {classes} classes apart, expected {_CLASSES[0]} (COCO's) or {_CLASSES[1]} "
            "(background, person): train it for one of these"
        )
    return _File(path, architecture, state, digest)


def _loaded(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except ModuleNotFoundError as error:
        raise ValueError(f"--weights {path}: needs the package safetensors: pip install safetensors") from error
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"--weights {path}: is no file of weights, or holds more than these, and to load that may run code: save "
            "the state dict alone"
        ) from error
    # Damaged files make it raise RuntimeError, EOFError, KeyError and safetensors' own error.
    except Exception as error:
        raise ValueError(
            f"--weights {path}: cannot be read as weights: {' '.join(str(error).split())[:200]}"
        ) from error


def _downloaded(architecture: str) -> _File:
    """torchvision's best weights, where torchvision keeps them."""
    url: str = get_model_weights(architecture).DEFAULT.url
    name = url.rpartition("/")[2]
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=_prefix(url))
        # Broken connections are OSErrors; a file of another content is a RuntimeError.
        except (URLError, OSError, RuntimeError) as error:
            raise ValueError(
                f"{url}: cannot be downloaded ({error}): download it elsewhere and give it with --weights {name}"
            ) from error
    file = _read(path)
    if not file.sha256.startswith(_prefix(url)):
        raise ValueError(f"{path}: is not what {url} holds: remove it, and it is downloaded again")
    return file


def _prefix(url: str) -> str:
    """What torchvision's names of files say of their content."""
    return url.rpartition("-")[2].removesuffix(".pth")


def _detector(file: _File, device: torch.device, size: int, min_score: float) -> Detector:
    # What torchvision publishes is known by its content, whatever the file is called.
    published = [w.name for w in get_model_weights(file.architecture) if file.sha256.startswith(_prefix(w.url))]
    build: Callable[..., nn.Module] = get_model
    model = build(
        file.architecture,
        weights=None,
        weights_backbone=None,
        num_classes=len(file.state[_CLASSIFIER]),
        min_size=size,
        max_size=round(size * _LONGEST),
        box_score_thresh=min_score,
    )
    try:
        model.load_state_dict(file.state)
    except (RuntimeError, AttributeError) as error:
        said = " ".join(str(error).split())[:300]
        raise ValueError(f"--weights {file.path}: does not fit {file.architecture}: {said}") from error
    if "COCO_V1" in published and file.architecture != _MASKS[0]:
        # As torchvision runs these: they were made by a version that added nothing to the variance.
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = 0.0
    made = published[0] if published else file.path.name
    source = f"torchvision {torchvision.__version__} {file.architecture} {made} (sha256 {file.sha256[:8]}), size {size}"
    return Detector(model.eval().to(device), source)

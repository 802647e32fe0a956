"""The weights of the detectors that find people: from files, or torchvision's download.

Enters: the names of regions, and perhaps files. Leaves: a `PeopleDetector` that knows which weights it has, by their
content.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights

from bias_audit.data.annotations import Complaints
from bias_audit.regions.keypoints import REGIONS as PARTS
from bias_audit.regions.people import Detector, PeopleDetector

# How many classes a detector may tell apart: COCO's 91, or nothing and person. In both a person is the first.
_CLASSES = (91, 2)
_MASKS = ("maskrcnn_resnet50_fpn_v2", "maskrcnn_resnet50_fpn")
# All of them have one; it tells how many classes they know.
_CLASSIFIER = "roi_heads.box_predictor.cls_score.bias"
_KEYPOINTS = "keypointrcnn_resnet50_fpn"
# Of the shorter side, 800 pixels, the longer is at most this many times as long: torchvision's 1333.
_LONGEST = 1333 / 800


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

"""An audit set as a YAML file declares it: a reader, where the files lie, what is what in them, and the transform.

Enters: the path of a file such as

    reader: coco                        # or voc, labelme, cvat, labelstudio, yolo, boxes; or folder; or
                                        # package.module:function, which returns an AuditDataset
    annotations: instances.json         # paths start from the folder of this file
    images: images
    labels: labels.csv
    object: [tie]
    spurious: {wearer: [person]}
    transform:
      - resize: 256
      - center_crop: 224
      - normalize: {mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225]}

Leaves: an `AuditDataset`; or all that is wrong, each with the file, the line and the key.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from torchvision.transforms import v2

from bias_audit.data.annotations import Complaints, Misfit
from bias_audit.data.dataset import AuditDataset
from bias_audit.data.formats.known import FORMATS
from bias_audit.imports import called
from bias_audit.located import Loc, at_line, read_file, read_yaml


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _listed(value: Any) -> Any:
    value = [value] if isinstance(value, int | float) and not isinstance(value, bool) else value
    if not isinstance(value, list):
        raise ValueError(f"expected pixels, such as 224 or [224, 192], got {value!r:.200}")
    return value


def _unlike(names: list[str]) -> list[str]:
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise ValueError(f"{twice!r} stands twice: remove one")
    return names


def _sized(value: Any) -> Any:
    return value if isinstance(value, Mapping) else {"size": value}


def _by_region(value: Any) -> Any:
    if isinstance(value, Mapping):
        return value
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError("expected a list of categories, or a mapping from a region's name to its categories")
    if len(set(value)) < len(value):
        raise ValueError("a region is named twice: remove one")
    return {name: [name] for name in value}


_Pixels = Annotated[int, Field(ge=1, le=1 << 14)]
_Size = Annotated[list[_Pixels], Field(min_length=1, max_length=2), BeforeValidator(_listed)]
_Categories = Annotated[dict[str, list[str]], BeforeValidator(_by_region)]
_Names = Annotated[list[str], AfterValidator(_unlike)]
_OfChannels = Annotated[list[float], Field(min_length=3, max_length=3)]


class _Resize(_Strict):
    size: _Size
    interpolation: Literal["nearest", "bilinear", "bicubic"] = "bilinear"


class _Normalize(_Strict):
    mean: _OfChannels
    std: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=3, max_length=3)]


class _Step(_Strict):
    """One step of a transform; a text names a function that makes one."""

    resize: Annotated[_Resize | None, BeforeValidator(_sized)] = None
    center_crop: _Size | None = None
    normalize: _Normalize | None = None
    made_by: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {"made_by": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _is_one(self) -> _Step:
        if len(self.model_fields_set) != 1:
            raise ValueError("expected one step, such as `resize: 224`: begin each with a dash of its own")
        return self

    def transforms(self, where: str) -> list[Callable[..., Any]]:
        if self.resize is not None:
            interpolation = v2.InterpolationMode(self.resize.interpolation)
            return [v2.Resize(self.resize.size, interpolation=interpolation, antialias=True)]
        if self.center_crop is not None:
            size = self.center_crop
            return [v2.CenterCrop(size if len(size) == 2 else size * 2)]
        if self.normalize is not None:
            return [
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(self.normalize.mean, self.normalize.std),
            ]
        assert self.made_by is not None
        made = called(self.made_by, where)
        if not callable(made):
            raise ValueError(f"{where}: {self.made_by!r} returned {type(made).__name__}, expected a transform")
        return list(made.transforms) if isinstance(made, v2.Compose) else [made]


class _Own(_Strict):
    """A reader of the user's own."""

    reader: str

    def read(self, folder: Path, where: Callable[[Loc], str]) -> AuditDataset:
        found = called(self.reader, where(("reader",)))
        if not isinstance(found, AuditDataset):
            raise ValueError(
                f"{where(('reader',))}: {self.reader!r} returned {type(found).__name__}, expected an AuditDataset"
            )
        return found


class _Files(_Own):
    images: str
    labels: str
    attributes: _Names | None = None
    classes: _Names | None = None
    transform: Annotated[list[_Step], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)] = []

    def _arguments(self, folder: Path, where: Callable[[Loc], str]) -> dict[str, Any]:
        """Those that all readers of files take."""
        wrong = Complaints()
        steps = [
            wrong.attempt(partial(step.transforms, where(("transform", i)))) or []
            for i, step in enumerate(self.transform)
        ]
        for path, expected, key in self._paths(folder):
            wrong.lines += _misplaced(path, expected, where((key,)))
        wrong.end()
        parts = [transform for step in steps for transform in step]
        # A torchvision weights' preset is known for one only if it stands alone.
        transform = None if not parts else parts[0] if len(parts) == 1 else v2.Compose(parts)
        return {
            "images": folder / self.images,
            "labels": folder / self.labels,
            "attributes": self.attributes,
            "classes": self.classes,
            "transform": transform,
        }

    def _paths(self, folder: Path) -> list[tuple[Path, str, str]]:
        """Each with what it is expected to be, and its key."""
        return [(folder / self.images, "a folder", "images"), (folder / self.labels, "a file", "labels")]


class _Annotated(_Files):
    """Annotations in one of the formats; `reader` is its name."""

    annotations: str
    object: _Categories = {}
    spurious: _Categories = {}
    context: _Categories = {}
    minus: dict[str, list[str]] = {}

    def read(self, folder: Path, where: Callable[[Loc], str]) -> AuditDataset:
        return AuditDataset.from_annotations(
            folder / self.annotations,
            format=self.reader,
            object=self.object,
            spurious=self.spurious,
            context=self.context,
            minus=self.minus,
            **self._arguments(folder, where),
        )

    def _paths(self, folder: Path) -> list[tuple[Path, str, str]]:
        expected = "a file" if self.reader == "coco" else "a file or a folder"
        return [(folder / self.annotations, expected, "annotations"), *super()._paths(folder)]


class _Folder(_Files):
    masks: str | None = None
    object: _Names = []
    spurious: _Names = []
    context: _Names = []

    def read(self, folder: Path, where: Callable[[Loc], str]) -> AuditDataset:
        return AuditDataset.from_folder(
            masks=None if self.masks is None else folder / self.masks,
            object=self.object,
            spurious=self.spurious,
            context=self.context,
            **self._arguments(folder, where),
        )

    def _paths(self, folder: Path) -> list[tuple[Path, str, str]]:
        masks = [] if self.masks is None else [(folder / self.masks, "a folder", "masks")]
        return [*masks, *super()._paths(folder)]


def _misplaced(path: Path, expected: str, where: str) -> list[str]:
    """A line that says so where a path is not what it is expected to be."""
    if (path.is_file() and expected != "a folder") or (path.is_dir() and expected != "a file"):
        return []
    found = "a file" if path.is_file() else "a folder" if path.is_dir() else "not there"
    return [f"{where}: {path} is {found}, expected {expected}"]


# Mask pictures are read by `folder`: the rows of the CSV name the images.
_READERS: Mapping[str, type[_Own]] = {
    **{name: _Annotated for name in FORMATS if name != "masks"},
    "folder": _Folder,
}


def read_declared(path: str | Path) -> AuditDataset:
    """The audit set that a YAML file declares; no image is opened, and code is run only where the file names it.

    `reader` is the format of the annotations (`coco`, `voc`, `labelme`, `cvat`, `labelstudio`, `yolo` or `boxes`),
    `folder` for mask pictures, or `package.module:function`, which is called without arguments and returns an
    `AuditDataset`. The other keys are the arguments of `AuditDataset.from_annotations` and `from_folder`; paths are
    relative to the file. `transform` is a list of steps: `resize` (pixels of the shorter side, `[height, width]`, or a
    mapping with `size` and `interpolation`), `center_crop`, `normalize` (with `mean` and `std` of images in [0, 1]), or
    `package.module:function`, which returns a transform.

    Raises:
        ValueError: the file cannot be read, is not YAML, or declares what cannot be; says the file, the line and the
            key of each thing that is wrong, one line each.

    Example:
        >>> read_declared("data.yaml").subjects.classes  # doctest: +SKIP
        ('doctor', 'nurse')
    """
    path = Path(path)
    content, line_of = read_file(path, str(path), read_yaml, "YAML")
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: expected a mapping with the key `reader`, got {_kind(content)}")

    def where(loc: Loc) -> str:
        return f"{path}{at_line(line_of(loc))}: {'.'.join(map(str, loc))}"

    reader = content.get("reader")
    if not isinstance(reader, str) or (reader not in _READERS and ":" not in reader):
        known = ", ".join(_READERS)
        raise ValueError(f"{where(('reader',))}: expected {known} or package.module:function, got {reader!r:.200}")
    try:
        declared = _READERS.get(reader, _Own).model_validate(content)
    except ValidationError as error:
        raise Misfit(_complaints(error, content, where, _READERS.get(reader, _Own))) from error
    try:
        return declared.read(path.parent, where)
    except ValueError as error:
        lines = error.lines if isinstance(error, Misfit) else (str(error),)
        raise Misfit([_placed(line, path, content, where) for line in lines]) from error


def _placed(text: str, path: Path, content: Mapping[Any, Any], where: Callable[[Loc], str]) -> str:
    """What a reader complains of, after the file, line and key that it is about."""
    return text if text.startswith(str(path)) else f"{where(_meant(text, content, path.parent))}: {text}"


def _meant(text: str, content: Mapping[Any, Any], folder: Path) -> Loc:
    """The key whose value an error of a reader is about: one with the name that it quotes first, or the file's."""
    quoted = re.search(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", text)
    # What is cut out of a region names it again.
    for key in ("context", "spurious", "object", "minus", "attributes", "classes"):
        names = [loc for loc, name in _names(content.get(key), (key,)) if quoted and repr(name) == quoted[0]]
        if names:
            return names[-1]
    if text.startswith("expected a transform"):
        return ("transform",)
    # One path may begin with another, as that of a file does with that of its folder.
    paths = {key: str(folder / str(content[key])) for key in ("annotations", "masks", "images") if key in content}
    paths["labels"] = str(folder / str(content.get("labels", "?")))
    begun = [key for key, file in paths.items() if text.startswith(file)]
    return (max(begun, key=lambda key: len(paths[key]), default="labels"),)


def _names(content: Any, loc: Loc) -> Iterator[tuple[Loc, str]]:
    """The names below a place, and where they stand."""
    if isinstance(content, str):
        yield loc, content
    elif isinstance(content, list):
        for i, value in enumerate(content):
            yield from _names(value, (*loc, i))
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield (*loc, key), key
            yield from _names(value, (*loc, key))


def _kind(content: Any) -> str:
    return "nothing" if content is None else type(content).__name__


def _complaints(
    error: ValidationError, content: Any, where: Callable[[Loc], str], declared: type[BaseModel]
) -> list[str]:
    """A line for each thing that is wrong."""
    lines = []
    # An unknown key may well be the one that is missing.
    for one in sorted(error.errors(), key=lambda one: one["type"] != "missing"):
        loc, what = _in_file(one["loc"], content), " ".join(one["msg"].removeprefix("Value error, ").split())
        if one["type"] == "extra_forbidden":
            known = _known(loc, declared)
            close = difflib.get_close_matches(str(loc[-1]), known, 1)
            what = f"unknown key; {f'did you mean `{close[0]}`? ' if close else ''}known are: {', '.join(known)}"
        elif one["type"] == "string_type" and not isinstance(one["input"], list | dict):
            what += ": write it in quotes"
        elif one["type"] == "missing":
            what = "is missing"
        lines.append(f"{where(loc)}: {what}")
    return list(dict.fromkeys(lines))


def _in_file(loc: Sequence[str | int], content: Any) -> Loc:
    """The place as the file has it: what a shorthand stands for is not in it; a missing or unknown key may end it."""
    found: list[str | int] = []
    for i, part in enumerate(loc):
        if isinstance(content, Mapping) and (part in content or i == len(loc) - 1):
            found.append(part)
            content = content.get(part)
        elif isinstance(content, list) and isinstance(part, int) and part < len(content):
            found.append(part)
            content = content[part]
    return tuple(found)


def _known(loc: Loc, declared: type[BaseModel]) -> list[str]:
    within: dict[str, type[BaseModel]] = {"resize": _Resize, "normalize": _Normalize}
    owner = declared if len(loc) == 1 else within.get(str(loc[-2]), _Step)
    return [name for name in owner.model_fields if name != "made_by"]

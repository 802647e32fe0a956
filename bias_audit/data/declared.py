"""An audit set as a YAML file declares it: a reader, where the files lie, what is what in them, and the transform.

Enters: the path of a file such as

    reader: coco                        # or folder, or package.module:function, which returns an AuditDataset
    annotations: instances.json         # paths start from the folder of this file
    images: images
    labels: labels.csv
    object: [tie]
    spurious: {wearer: [person]}
    transform:
      - resize: 256
      - center_crop: 224
      - normalize: {mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225]}

Leaves: an `AuditDataset`; or one error with the file, the line and the key.
"""

from __future__ import annotations

import difflib
import os
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from torchvision.transforms import v2

from bias_audit.data.samples import AuditDataset
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
        """Those that both readers take."""
        parts = [t for i, step in enumerate(self.transform) for t in step.transforms(where(("transform", i)))]
        # A torchvision weights' preset is known for one only if it stands alone.
        transform = None if not parts else parts[0] if len(parts) == 1 else v2.Compose(parts)
        return {
            "images": _is_folder(folder / self.images, where(("images",))),
            "labels": _is_file(folder / self.labels, where(("labels",))),
            "attributes": self.attributes,
            "classes": self.classes,
            "transform": transform,
        }


class _Coco(_Files):
    annotations: str
    object: _Categories = {}
    spurious: _Categories = {}
    context: _Categories = {}
    minus: dict[str, list[str]] = {}

    def read(self, folder: Path, where: Callable[[Loc], str]) -> AuditDataset:
        return AuditDataset.from_coco(
            _is_file(folder / self.annotations, where(("annotations",))),
            object=self.object,
            spurious=self.spurious,
            context=self.context,
            minus=self.minus,
            **self._arguments(folder, where),
        )


class _Folder(_Files):
    masks: str
    object: _Names = []
    spurious: _Names = []
    context: _Names = []

    def read(self, folder: Path, where: Callable[[Loc], str]) -> AuditDataset:
        return AuditDataset.from_folder(
            masks=_is_folder(folder / self.masks, where(("masks",))),
            object=self.object,
            spurious=self.spurious,
            context=self.context,
            **self._arguments(folder, where),
        )


def _is_folder(path: Path, where: str) -> Path:
    if not path.is_dir():
        raise ValueError(f"{where}: {path} is {'a file' if path.exists() else 'not there'}, expected a folder")
    return path


def _is_file(path: Path, where: str) -> Path:
    if not path.is_file():
        raise ValueError(f"{where}: {path} is {'a folder' if path.exists() else 'not there'}, expected a file")
    return path


_READERS: Mapping[str, type[_Own]] = {"coco": _Coco, "folder": _Folder}


def read_declared(path: str | Path) -> AuditDataset:
    """The audit set that a YAML file declares; no image is opened, and code is run only where the file names it.

    `reader` is `coco`, `folder`, or `package.module:function`, which is called without arguments and returns an
    `AuditDataset`. The other keys are the arguments of `AuditDataset.from_coco` and `from_folder`; paths are relative
    to the file. `transform` is a list of steps: `resize` (pixels of the shorter side, `[height, width]`, or a mapping
    with `size` and `interpolation`), `center_crop`, `normalize` (with `mean` and `std` of images in [0, 1]), or
    `package.module:function`, which returns a transform.

    Raises:
        ValueError: the file cannot be read, is not YAML, or declares what cannot be; the message names the file, the
            line and the key.

    Example:
        >>> read_declared("audit.yaml").subjects.classes  # doctest: +SKIP
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
        raise ValueError(_complaint(error, content, where, _READERS.get(reader, _Own))) from error
    try:
        return declared.read(path.parent, where)
    except ValueError as error:
        text = str(error)
        if text.startswith(str(path)):
            raise
        raise ValueError(f"{where(_meant(text, content, path.parent))}: {text}") from error


def called(name: str, where: str) -> Any:
    """What the function `package.module:function` returns.

    Raises:
        ValueError: it cannot be imported, or raises; says `where` it was named.
    """
    function = imported(name, where)
    if not callable(function):
        raise ValueError(f"{where}: {name!r} is {type(function).__name__}, expected a function or a class")
    try:
        return function()
    # A function that ends the process, as a script may, would do so with an exit code of its own.
    except (Exception, SystemExit) as error:
        raise ValueError(f"{where}: {name!r} raised {type(error).__name__}: {error}") from error


def imported(name: str, where: str) -> Any:
    """What `package.module:name` stands for.

    Raises:
        ValueError: it cannot be imported, or has no such name; says `where` it was named.

    Example:
        >>> imported("math:tau", "--model") > 6
        True
    """
    if not re.fullmatch(r"[\w.]+:[\w.]+", name):
        raise ValueError(f"{where}: expected package.module:name, got {name!r:.200}")
    try:
        return pkgutil.resolve_name(name)
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"{where}: {name!r} cannot be imported ({type(error).__name__}: {error}): is it installed, or in the "
            "current directory?"
        ) from error


def import_from_here() -> None:
    """Look for modules in the current directory too, as `python -m` does and a console script does not."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def _meant(text: str, content: Mapping[Any, Any], folder: Path) -> Loc:
    """The key whose value an error of a reader is about: one with the name that it quotes first, or the file's."""
    quoted = re.search(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", text)
    # What is cut out of a region names it again.
    for key in ("context", "spurious", "object", "minus", "attributes", "classes"):
        names = [loc for loc, name in _names(content.get(key), (key,)) if quoted and repr(name) == quoted[0]]
        if names:
            return names[-1]
    files = ("annotations", "masks", "images")
    file = next((key for key in files if text.startswith(str(folder / str(content.get(key, "?"))))), "labels")
    return ("transform",) if text.startswith("expected a transform") else (file,)


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


def _complaint(error: ValidationError, content: Any, where: Callable[[Loc], str], declared: type[BaseModel]) -> str:
    # An unknown key may well be the one that is missing.
    first = min(error.errors(), key=lambda one: one["type"] == "missing")
    loc, what = _in_file(first["loc"], content), " ".join(first["msg"].removeprefix("Value error, ").split())
    if first["type"] == "extra_forbidden":
        known = _known(loc, declared)
        close = difflib.get_close_matches(str(loc[-1]), known, 1)
        what = f"unknown key; {f'did you mean `{close[0]}`? ' if close else ''}known are: {', '.join(known)}"
    elif first["type"] == "string_type" and not isinstance(first["input"], list | dict):
        what += ": write it in quotes"
    elif first["type"] == "missing":
        what = "is missing"
    return f"{where(loc)}: {what}"


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

"""What every reader of files needs: names that stay within their folder, near names, sizes, and JSON with its lines.

Enters: names and paths as files and people give them. Leaves: the same, checked; JSON as a pydantic model, or all that
is wrong with it in one `Misfit`.
"""

from __future__ import annotations

import codecs
import difflib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from json.decoder import scanstring  # type: ignore[attr-defined]  # the one that `json` itself uses
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, TypeVar

from PIL import Image
from pydantic import BaseModel, ValidationError

from bias_audit.data.annotations import Complaints, Misfit
from bias_audit.data.outlines import MOST_PIXELS, PROGRAMS
from bias_audit.located import Loc, at_line

Model = TypeVar("Model", bound=BaseModel)

# Finding a line reads the file up to it once more, for each complaint: not for more, or in larger files.
MOST_LOCATED = 50
MOST_SEARCHED = 1 << 23
# What Pillow has suffixes for, but no pixels: it writes some, and of others it knows the kind only.
_NO_PICTURES = (*PROGRAMS, "PDF", "PALM", "BUFR", "GRIB", "HDF5", "MPEG", "WMF")
_SPACE = " \t\r\n"


def leaves(name: str) -> bool:
    """Whether a name from a file is not that of something in the folder it is looked for in, on any system: of the
    folder itself, or of something outside of it.

    Example:
        >>> leaves("ward/a.jpg"), leaves("../a.jpg"), leaves("C:\\\\a.jpg"), leaves(".")
        (False, True, True, True)
    """
    anywhere = PureWindowsPath(name)
    return not anywhere.name or bool(Path(name).anchor or anywhere.root) or ".." in anywhere.parts


def unfound(name: str, folder: str | Path) -> str:
    """Why a file of this name cannot be had from a folder, and what to do; "" if it can.

    Symbolic links are followed: whoever owns the folder has put them there.
    """
    if leaves(name):
        return f"{name!r} leaves the folder {folder}: write the path below that folder"
    # Not `is_file`, which raises where a name is too long.
    if not os.path.isfile(Path(folder) / name):
        return f"no file {Path(folder) / name}: check the folder, or remove it here"
    return ""


def near(name: str, known: Iterable[str]) -> str:
    """A question whether one of the known names was meant, or else what is known.

    Example:
        >>> near("hairs", ["hair", "face"])
        "did you mean 'hair'?"
    """
    known = sorted(known)
    close = difflib.get_close_matches(name, known)
    if close:
        return "did you mean " + " or ".join(repr(n) for n in close) + "?"
    return f"there are {known[:20]}" + (" and more" if len(known) > 20 else "")


def pictures_in(folder: Path) -> list[str]:
    """The pictures in a folder and below it, known by their suffixes: paths below it with "/", sorted.

    Hidden ones are passed over: archives made on a Mac hold some that are none.
    """
    Image.init()
    suffixes = {suffix for suffix, name in Image.registered_extensions().items() if name not in _NO_PICTURES}
    return [one for one in files_in(folder) if PurePosixPath(one).suffix.lower() in suffixes]


def files_in(folder: Path, suffix: str = "") -> list[str]:
    """The files in a folder and below it that are not hidden: paths below it with "/", sorted."""
    found = (one.relative_to(folder) for one in folder.rglob(f"*{suffix}") if one.is_file())
    return sorted(one.as_posix() for one in found if not any(part.startswith(".") for part in one.parts))


def size_of(path: Path) -> tuple[int, int]:
    """A picture's (height, width) as it is stored, read from its header alone.

    Raises:
        ValueError: it is no picture, or has more pixels than are decoded; says which file.
    """
    try:
        Image.init()
        with Image.open(path, formats=[name for name in Image.OPEN if name not in PROGRAMS]) as found:
            width, height = found.size
    # As in `outlines.picture`.
    except Exception as error:
        raise ValueError(f"{path}: {error}: replace the file, or remove its annotations") from error
    if height * width > MOST_PIXELS:
        raise ValueError(f"{path}: has {width} x {height} pixels, at most {MOST_PIXELS} are decoded: make it smaller")
    return height, width


def read_bytes(path: Path, kind: str) -> bytes:
    """All of a file.

    Raises:
        Misfit: it cannot be read; says which file, and what `kind` of file was expected.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise Misfit([f"{path}: cannot be read ({error.strerror}): give the path of {kind}"]) from error


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to write into that has the name `path` once the block has ended well, and is gone if it has not.

    Raises:
        ValueError: `path` is there already and is no empty folder.

    Example:
        >>> with whole_folder(Path("masks")) as folder:  # doctest: +SKIP
        ...     (folder / "hair").mkdir()
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{path}: is there already: name a folder that is not there, or an empty one")
    path.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        yield made
        # mkdtemp makes a folder that nobody else may open.
        made.chmod(0o777 & ~_umask())
        made.replace(path)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def read_json(path: Path, model: type[Model], kind: str) -> tuple[Model, Callable[[Loc], str]]:
    """A JSON file as a model, and a function from a place in it, such as `("images", 0)`, to "file, line N".

    Args:
        path: of the file.
        model: what it must fit.
        kind: what it is expected to be, for errors, such as "COCO instances".

    Raises:
        Misfit: it cannot be read or does not fit: a line for each place that is wrong.
    """
    content = read_bytes(path, kind).removeprefix(codecs.BOM_UTF8)
    asked = count()

    def where(loc: Loc) -> str:
        if not loc or len(content) > MOST_SEARCHED or next(asked) >= MOST_LOCATED:
            return str(path)
        return f"{path}{at_line(line_in_json(content.decode('utf-8', errors='replace'), loc))}"

    try:
        return model.model_validate_json(content), where
    except ValidationError as error:
        said: dict[Loc, str] = {}
        found = _content(content)
        for one in error.errors(include_url=False, include_context=False):
            said.setdefault(_place(one["loc"], found, one["type"] == "missing"), one["msg"])
        wrong = Complaints()
        # A value that fits none of its forms is wrong in each of them: the deepest is the one that was meant.
        outer = {loc[:end] for loc in said for end in range(len(loc))}
        for loc, message in said.items():
            if loc not in outer:
                key = ".".join(str(part) for part in loc)
                wrong.add(where(loc), f"{key or 'content'}: {message}: expected {kind}")
        raise Misfit(wrong.lines) from error


def line_in_json(text: str, loc: Loc) -> int | None:
    """The line of a place in a JSON text, or of the innermost one around it that is there; None in no or broken JSON.

    Example:
        >>> line_in_json('{"images": [\\n {"id": 1},\\n {"id": 2}]}', ("images", 1, "id"))
        3
    """
    decode = json.JSONDecoder().raw_decode
    at = _after_space(text, 0)
    try:
        for part in loc:
            inner = _inner(text, at, part, decode)
            if inner is None:
                break
            at = inner
    except (ValueError, IndexError, RecursionError):
        return None
    return text.count("\n", 0, at) + 1 if text else None


def top_level(path: Path) -> Mapping[str, Any]:
    """What a JSON file's object has at its top level, or the first object of its list; nothing if it has neither."""
    try:
        content = _content(path.read_bytes())
    except OSError:
        return {}
    content = content[0] if isinstance(content, list) and content else content
    return content if isinstance(content, dict) else {}


def _content(text: bytes) -> Any:
    """What a JSON text says; None if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _place(loc: Sequence[str | int], content: Any, missing: bool) -> Loc:
    """A place less the names of the forms that a value may have, which stand among it; a missing key ends it."""
    found: list[str | int] = []
    for number, part in enumerate(loc, 1):
        listed = isinstance(content, list) and isinstance(part, int) and part < len(content)
        if missing and number == len(loc):
            found.append(part)
        elif part in content if isinstance(content, Mapping) else listed:
            found.append(part)
            content = content[part]
    return tuple(found)


def _inner(text: str, at: int, part: str | int, decode: Callable[[str, int], tuple[Any, int]]) -> int | None:
    """Where the value of a key, or of an index, begins in the object or list that begins at `at`."""
    opening, index = text[at], 0
    if opening not in "{[":
        return None
    at = _after_space(text, at + 1)
    while text[at] not in "}]":
        key: str | int = index
        if opening == "{":
            key, at = scanstring(text, at + 1)
            at = _after_space(text, _after_space(text, at) + 1)
        if key == part:
            return at
        _, at = decode(text, at)
        at = _after_space(text, at)
        at = _after_space(text, at + 1) if text[at] == "," else at
        index += 1
    return None


def _after_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in _SPACE:
        at += 1
    return at


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

"""JSON as files hold it: read as a model, with the line of all that does not fit.

Enters: the path of a JSON file, and the pydantic model that it must fit. Leaves: the model and a way from a place in it
to a line; or all that is wrong, in one `Misfit`.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from json.decoder import scanstring  # type: ignore[attr-defined]  # the one that `json` itself uses
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from bias_audit.data.annotations import Complaints, Misfit
from bias_audit.data.files import read_bytes
from bias_audit.located import Loc, at_line

Model = TypeVar("Model", bound=BaseModel)

# Finding a line reads the file up to it once more, for each complaint: not for more, or in larger files.
MOST_LOCATED = 50
MOST_SEARCHED = 1 << 23
_SPACE = " \t\r\n"


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

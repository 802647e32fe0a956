"""What a YAML or TOML text says, and on which line it says it.

Enters: the text of a file that people write by hand. Leaves: its content, and a function from a place in it, such as
`("rules", 0, "op")`, to a line.

Standard library and PyYAML only: the gate imports this module and must start in a blink.
"""

from __future__ import annotations

import math
import os
import re
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

Loc = tuple[str | int, ...]
LineOf = Callable[[Loc], int | None]

# What no person writes is not parsed.
MOST_BYTES = 1 << 20
# An alias stands for all that it names: a text of a few lines can stand for more than any memory holds. Without one no
# text of MOST_BYTES has so many values.
MOST_NODES = 1 << 20
# Each place where a TOML key may be is tried by parsing the file.
MOST_TRIED = 200


class Misread(Exception):
    """What is wrong with a text that can be parsed: begins with `, line N: ` or `: `, to follow the file's name."""


def at_line(line: int | None) -> str:
    """The line as it follows a file's name; nothing where it is not known."""
    return "" if line is None else f", line {line}"


def read_file(path: Path, name: str, parse: Callable[[str], tuple[Any, LineOf]], kind: str) -> tuple[Any, LineOf]:
    """What a file says and where, by `read_yaml` or `read_toml`.

    Args:
        path: of the file.
        name: what it is called in errors.
        parse: makes the content of the text.
        kind: what it is expected to be, such as "YAML".

    Raises:
        ValueError: it cannot be read, is too large, or is not of its kind; the message names the file and the line.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
            size = max(len(content), os.fstat(file.fileno()).st_size)
        if size > MOST_BYTES:
            raise ValueError(f"{name}: has {size} bytes, expected at most {MOST_BYTES}")
        text = content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{name}: cannot be read ({error}): give the path of a {kind} file") from error
    try:
        return parse(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = at_line(mark.line + 1 if mark else None)
        raise ValueError(f"{name}{line}: not valid {kind}: {error.problem}") from error
    except Misread as error:
        raise ValueError(f"{name}{error}") from error
    # A date that is none is a plain ValueError.
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        detail = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{name}: not valid {kind}: {detail}") from error


class _Loader(yaml.SafeLoader):
    """Truth values as in YAML 1.2: in 1.1 the key `on` is one, and so is a class called `no`."""


_BOOL = "tag:yaml.org,2002:bool"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag != _BOOL]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


def read_yaml(text: str) -> tuple[Any, LineOf]:
    """What a YAML text says, safely loaded, and where.

    Raises:
        Misread: a key stands twice in one mapping; or with each alias written out it would be too much.
        ValueError, yaml.YAMLError, RecursionError: it is not YAML.

    Example:
        >>> content, line_of = read_yaml("rules:\\n  - {metric: iou}\\n  - {metric: accuracy, on: point}\\n")
        >>> content["rules"][1]["on"], line_of(("rules", 1, "on"))
        ('point', 3)
    """
    root = yaml.compose(text, yaml.SafeLoader)
    if _nodes(root, {}) > MOST_NODES:
        raise Misread(f": with its aliases written out it has more than {MOST_NODES} values: write it without them")
    for key, line in _twice(root):
        raise Misread(f"{at_line(line)}: {key}: stands twice: remove one")
    content = yaml.load(text, _Loader)

    def line_of(loc: Loc) -> int | None:
        """The line of the place, or of the innermost one around it that is in the file."""
        node, line = root, None
        for part in loc:
            found = dict(_children(node)).get(str(part))
            if found is None:
                break
            line, node = found
        return line

    return content, line_of


def _nodes(node: yaml.Node | None, known: dict[int, float]) -> float:
    """How many values a node stands for with each alias written out; infinite where one stands within itself."""
    if node is None or isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in known:
        known[id(node)] = math.inf  # as long as it is open
        parts = [part for pair in node.value for part in (pair if isinstance(pair, tuple) else (pair,))]
        known[id(node)] = 1 + sum(_nodes(part, known) for part in parts)
    return known[id(node)]


def _children(node: yaml.Node | None) -> Iterator[tuple[str, tuple[int, yaml.Node]]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield str(key.value), (key.start_mark.line + 1, value)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            yield str(i), (value.start_mark.line + 1, value)


def _twice(root: yaml.Node | None) -> Iterator[tuple[str, int]]:
    """Keys that stand twice in one mapping: YAML would take the last and say nothing."""
    # A node may be linked to from many places.
    seen, left = set(), [root]
    while left:
        node = left.pop()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        known = set()
        for key, (line, value) in _children(node):
            if key in known:
                yield key, line
            known.add(key)
            left.append(value)


def read_toml(text: str, table: tuple[str, ...]) -> tuple[Any, LineOf]:
    """What a table of a TOML text says, and where.

    Raises:
        Misread: there is no such table.
        ValueError, RecursionError: it is not TOML.

    Example:
        >>> content, line_of = read_toml("[tool.other]\\nx = 1\\n[tool.mine]\\nx = 2\\n", ("tool", "mine"))
        >>> content["x"], line_of(("x",))
        (2, 4)
    """
    content = below(tomllib.loads(text), table)
    if content is None:
        raise Misread(f": has no table [{'.'.join(table)}]: add it, or name another file")

    @cache
    def renamed(start: int, end: int) -> Any:
        """What the text says with another name between `start` and `end`; None where it is not TOML then."""
        try:
            return tomllib.loads(f"{text[:end]}_{text[end:]}")
        except tomllib.TOMLDecodeError:
            return None

    def line_of_key(place: Loc) -> int | None:
        """The line of the key at `place`: there, another name changes what the text says at `place`."""
        written = re.finditer(rf"(?<![\w-]){re.escape(str(place[-1]))}(?![\w-])", text)
        for found in islice(written, MOST_TRIED):
            parsed = renamed(*found.span())
            if below(parsed, (*place[:-1], f"{place[-1]}_")) is not None and below(parsed, place) is None:
                return text.count("\n", 0, found.start()) + 1
        return None

    def line_of(loc: Loc) -> int | None:
        """The line of the place, or of the innermost one around it."""
        place = (*table, *loc)
        while place:
            inner = below(content, place[len(table) :])
            # An item of a list begins with its first key.
            first = next(iter(inner), None) if isinstance(inner, dict) else None
            line = line_of_key(place if isinstance(place[-1], str) or first is None else (*place, first))
            if line is not None:
                return line
            place = place[:-1]
        return None

    return content, line_of


def below(content: Any, place: Loc) -> Any:
    """What stands at `place`; None where there is nothing."""
    for part in place:
        try:
            content = content[part]
        except (KeyError, IndexError, TypeError):
            return None
    return content

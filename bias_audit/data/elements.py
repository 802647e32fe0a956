"""XML as elements that know their lines.

Enters: an XML file of any origin. Leaves: its root `Element`; or elements that are to be written, as text.

A document type is refused as soon as it opens, and with it all entities: a file of a few bytes cannot ask for any
amount of memory, for a file of this machine or for one elsewhere. The standard library's parser is used as it is: those
built on it give no lines, or none beyond 65,535.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from xml.parsers import expat


@dataclass(frozen=True)
class Element:
    """An element of an XML file: its name, attributes, own text without space around it, children and line."""

    tag: str
    attributes: Mapping[str, str]
    text: str
    children: tuple[Element, ...]
    line: int

    def all(self, tag: str) -> Iterator[Element]:
        """The children of this name."""
        return (child for child in self.children if child.tag == tag)

    def first(self, tag: str) -> Element | None:
        """The first child of this name."""
        return next(self.all(tag), None)

    def said(self, tag: str) -> str:
        """The text of the first child of this name; "" where there is none."""
        child = self.first(tag)
        return "" if child is None else child.text


@dataclass
class _Open:
    """An element whose end has not come yet."""

    tag: str
    attributes: Mapping[str, str]
    line: int
    text: list[str] = field(default_factory=list)
    children: list[Element] = field(default_factory=list)

    def closed(self) -> Element:
        return Element(self.tag, self.attributes, "".join(self.text).strip(), tuple(self.children), self.line)


class _Enough(Exception):
    pass


class _DocumentType(ValueError):
    pass


def read_xml(path: Path, tag: str) -> Element:
    """The root of an XML file, which must have a certain name.

    Raises:
        ValueError: it cannot be read, is not XML, has a document type, or another root; says which file and line.

    Example:
        >>> read_xml(Path("annotations.xml"), "annotations").first("image").line  # doctest: +SKIP
        5
    """
    top = _Open("", {}, 0)
    stack = [top]
    parser = _parser(path)

    def start(name: str, attributes: dict[str, str]) -> None:
        stack.append(_Open(name, attributes, parser.CurrentLineNumber))

    def end(_: str) -> None:
        done = stack.pop().closed()
        stack[-1].children.append(done)

    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = lambda text: stack[-1].text.append(text)
    try:
        with path.open("rb") as file:
            parser.ParseFile(file)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}): give the path of an XML file") from error
    except _DocumentType:
        raise
    # Of encodings it knows those of one byte and Unicode's.
    except (expat.ExpatError, LookupError, ValueError) as error:
        line = getattr(error, "lineno", 1)
        raise ValueError(f"{path}, line {line}: not valid XML: {error}: export it again, in UTF-8") from error
    root = top.children[0]
    if root.tag != tag:
        raise ValueError(f"{path}, line {root.line}: expected <{tag}>, got <{root.tag}>: name another format or file")
    return root


def root_tag(path: Path) -> str:
    """The name of a file's root element; "" where it has none, or is no XML."""
    found: list[str] = []
    parser = _parser(path)

    def start(name: str, _: dict[str, str]) -> None:
        found.append(name)
        raise _Enough

    parser.StartElementHandler = start
    try:
        with path.open("rb") as file:
            parser.ParseFile(file)
    except (OSError, ValueError, LookupError, expat.ExpatError, _Enough):
        pass
    return found[0] if found else ""


def xml_bytes(root: ET.Element) -> bytes:
    """The text of an XML file.

    Raises:
        ValueError: a name in it holds a character that XML cannot.
    """
    ET.indent(root)
    content: bytes = ET.tostring(root, encoding="utf-8", xml_declaration=True)
    try:
        expat.ParserCreate().Parse(content, True)
    except expat.ExpatError as error:
        raise ValueError(f"a name holds a character that XML cannot ({error}): rename it") from error
    return content + b"\n"


def _parser(path: Path) -> expat.XMLParserType:
    parser = expat.ParserCreate()
    parser.buffer_text = True

    def refuse(*_: object) -> None:
        raise _DocumentType(
            f"{path}, line {parser.CurrentLineNumber}: has a document type, which may hold entities: remove <!DOCTYPE>"
        )

    parser.StartDoctypeDeclHandler = refuse
    return parser

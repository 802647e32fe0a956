"""Where the gate's result goes: files, each whole or not at all, and standard output.

Enters: a `GateResult`, and which format goes where. Leaves: the files, and what is printed.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bias_audit.atomic import write_whole
from bias_audit.outputs.formats import Format, known_format, render

if TYPE_CHECKING:
    from bias_audit.gate.result import GateResult

SUFFIXES: dict[str, Format] = {".txt": "human", ".json": "json", ".md": "markdown", ".xml": "junit"}


@dataclass(frozen=True)
class Destination:
    """A format and the file it goes to; None is standard output."""

    format: Format
    path: Path | None = None


def destinations(formats: Sequence[str], outputs: Sequence[Path]) -> tuple[Destination, ...]:
    """Which format goes where: the first file gets the first format, and so on.

    Files beyond the formats take theirs from the suffix, formats beyond the files go to standard output. That gets
    `human` if it would get nothing.

    Raises:
        ValueError: a format is unknown, a suffix says none, two files are one, or a file cannot be there.

    Example:
        >>> [d.format for d in destinations(["junit"], [Path("a.xml"), Path("b.md")])]
        ['junit', 'markdown', 'human']
    """
    known = [known_format(name) for name in formats]
    rest = known[len(outputs) :] or ["human"]
    return (*_files(known, outputs), *(Destination(format) for format in dict.fromkeys(rest)))


def clear(where: Sequence[Destination]) -> None:
    """Remove what an earlier gate left in the files: should this one fail, nothing old passes for its result.

    Raises:
        OSError: a file cannot be removed.
    """
    for one in where:
        if one.path is not None and one.path.is_file():
            one.path.unlink()


def write(result: GateResult, where: Sequence[Destination]) -> None:
    """Write the result to its destinations: files first, each whole or not at all, then standard output.

    With `github` among them the page of the step is written as well, where `GITHUB_STEP_SUMMARY` names its file.

    Raises:
        OSError: a file cannot be written.
    """
    # All are made before the first is written: an error must not leave some of this run and some of an earlier one.
    texts = [render(result, one.format) if one.path or one.format != "human" else "" for one in where]
    for one, text in zip(where, texts, strict=True):
        if one.path is not None:
            _write_file(one.path, text)
    if any(one.format == "github" for one in where):
        from bias_audit.outputs.github import FULL, write_step_summary

        if not write_step_summary(result):
            sys.stdout.write(FULL)
    for one, text in zip(where, texts, strict=True):
        if one.path is None:
            sys.stdout.write(_for_terminal(result) if one.format == "human" else text)
    sys.stdout.flush()


def _files(formats: Sequence[Format], outputs: Sequence[Path]) -> Iterator[Destination]:
    seen: set[Path] = set()
    for i, path in enumerate(outputs):
        format = formats[i] if i < len(formats) else SUFFIXES.get(path.suffix.lower())
        if format is None:
            known = ", ".join(SUFFIXES)
            raise ValueError(f"--output {path}: what is it to hold? give it a --format, or a name that ends in {known}")
        named = SUFFIXES.get(path.suffix.lower(), format)
        if named != format:
            raise ValueError(f"--output {path}: is {format} by its --format and {named} by its name: change one")
        if path.is_dir() or not path.parent.is_dir():
            what = "is a directory" if path.is_dir() else f"there is no directory {path.parent}"
            raise ValueError(f"--output {path}: {what}: name a file in a directory that exists")
        if path.resolve() in seen:
            raise ValueError(f"--output {path}: is named twice: give each format a file of its own")
        seen.add(path.resolve())
        yield Destination(format, path)


def _write_file(path: Path, text: str) -> None:
    if path.exists() and not path.is_file():
        # A pipe or a device, such as /dev/stdout, is written to; it must not be replaced by a file.
        path.write_text(text, encoding="utf-8")
    else:
        write_whole(path.resolve(), text.encode())


def _for_terminal(result: GateResult) -> str:
    from bias_audit.terminal.gate import print_gate
    from bias_audit.terminal.text import console

    screen = console()
    with screen.capture() as captured:
        print_gate(screen, result)
    return defused(captured.get()) if "GITHUB_ACTIONS" in os.environ else captured.get()


def defused(log: str) -> str:
    """Text for a log that GitHub's runner reads, without a line that it would take for a command.

    It obeys what a line begins with, `::error::...`, and what stands anywhere in it, `##[add-matcher]...`.

    Example:
        >>> defused("one\\n  ::error::two ##[warning]three")
        'one\\n  : :error::two # #[warning]three'
    """
    return re.sub(r"(?m)^([^\S\n]*:)(?=:)", r"\1 ", log).replace("##[", "# #[")

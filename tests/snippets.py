"""The fenced blocks of a Markdown page, and ways to run them as they are written.

Enters: a page. Leaves: its blocks in the page's order, each with the line where it begins, so that a failure points
into the page. Blocks in lists, admonitions and tabs are found too, at whatever indent.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FENCE = re.compile(
    r"^(?P<indent>[ ]*)(?P<fence>`{3,}|~{3,})[ ]*(?P<language>[\w.+-]*)(?P<info>[^`\n]*)\n"
    r"(?P<text>.*?)^(?P=indent)(?P=fence)[ ]*$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text without the page's indent, and the line of its first line."""

    language: str
    text: str
    line: int
    info: str  # what stands behind the language, such as `title="train.py"`
    path: Path

    @property
    def first(self) -> str:
        """Its first line, which tells it from the page's other blocks."""
        return self.text.partition("\n")[0]

    def __str__(self) -> str:
        shown = self.path.relative_to(ROOT) if self.path.is_relative_to(ROOT) else self.path
        return f"{shown}:{self.line}: {self.first}"


def blocks(path: Path) -> list[Block]:
    """The fenced blocks of a page, in its order; a fence that is never closed fails."""
    page = path.read_text(encoding="utf-8")
    found = [
        Block(
            match["language"],
            textwrap.dedent(match["text"]),
            page.count("\n", 0, match.start("text")) + 1,
            match["info"].strip(),
            path,
        )
        for match in FENCE.finditer(page)
    ]
    fences = len(re.findall(r"^ *(?:`{3,}|~{3,})", page, re.MULTILINE))
    assert fences == 2 * len(found), f"{path}: {fences} fences make {len(found)} blocks; one is not closed, or nested"
    return found


def run_python(block: Block, names: dict[str, Any]) -> dict[str, Any]:
    """Runs it with `names`, which get what it defines; a traceback shows the page and its line."""
    code = compile("\n" * (block.line - 1) + block.text, str(block.path), "exec")
    exec(code, names)
    return names


def run_bash(block: Block, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs it in `cwd` with the commands of this Python's environment; it ends at the first that fails."""
    paths = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.text],
        cwd=cwd,
        env={**os.environ, "PATH": paths, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )

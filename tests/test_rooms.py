"""The table of rooms in CONTRIBUTING.md lists them all, imports go up it, and within a room they go in no circle."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
TABLE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| ((?:`[\w/]+`(?:, )?)+) \|", TABLE, re.MULTILINE)
ORDER = {name.strip("/"): row for row, cell in enumerate(ROWS) for name in re.findall(r"`([\w/]+)`", cell)}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    # Not all versions of Python follow the link to `callbacks`.
    for folder in (ROOT / "bias_audit", ROOT / "bias_audit" / "callbacks")
    for path in sorted(folder.rglob("*.py"))
}


def room(module: str) -> str:
    """`bias_audit.regions.commands` is a room of its own; any other module is of the first folder, or its own."""
    inside = module.removeprefix("bias_audit.").replace(".", "/")
    return inside if inside in ORDER else inside.partition("/")[0]


def imported(path: Path, with_types: bool = False) -> Iterator[str]:
    """The project's modules that are imported, wherever in the file; those for type checkers alone `with_types`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_checkers = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and (with_types or id(node) not in for_checkers):
            for name in (f"{node.module}.{alias.name}" for alias in node.names):
                if node.module.startswith("bias_audit"):
                    yield name if name in MODULES else node.module


def test_every_room_is_listed_once() -> None:
    listed = [name for cell in ROWS for name in re.findall(r"`([\w/]+)`", cell)]
    assert len(listed) == len(set(listed)) == len(ORDER)
    assert {room(module) for module in MODULES if module != "bias_audit"} == set(ORDER)


def test_imports_go_up() -> None:
    down = [
        f"{module} imports {other}"
        for module, path in MODULES.items()
        for other in imported(path)
        # The public names come from everywhere.
        if "bias_audit" not in (module, other) and ORDER[room(other)] > ORDER[room(module)]
    ]
    assert not down, "\n".join(down)


def test_no_import_goes_in_a_circle() -> None:
    """Not even those for types: each module is read without the ones that use it."""
    # The packages load their public names when these are used.
    modules = {module: path for module, path in MODULES.items() if module not in ("bias_audit", "bias_audit.callbacks")}
    TopologicalSorter({m: modules.keys() & imported(path, with_types=True) for m, path in modules.items()}).prepare()

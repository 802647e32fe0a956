"""What the reference is made of: names say what they are, which arguments they take and which errors they raise."""

from __future__ import annotations

import ast
import enum
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import bias_audit
import bias_audit.callbacks

ROOT = Path(__file__).parents[1]
PAGES = [page.read_text() for page in sorted((ROOT / "docs/reference").glob("*.md"))]
IDENTIFIERS = [name for page in PAGES for name in re.findall(r"^::: (\S+)$", page, re.M)]
PUBLIC = [f"{module.__name__}.{name}" for module in (bias_audit, bias_audit.callbacks) for name in module.__all__]
# Sinks are what a user writes or hands over as they are; the rest is nothing that one calls.
WITHOUT_EXAMPLE = {"BiasViolation", "ReportSink", "RunDirectorySink", "Session", "Sink"}
# What a caller can mend by giving something else.
ERRORS = {"ValueError", "TypeError", "RecordError", "MissingEvidenceError", "Misfit"}

Definition = ast.FunctionDef | ast.ClassDef


def public(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, Definition]]:
    """The public functions and classes of a module, and the public methods of those."""
    for node in body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            yield f"{prefix}.{node.name}", node
            if isinstance(node, ast.ClassDef):
                yield from public(node.body, f"{prefix}.{node.name}")


PATHS = [path for folder in ("bias_audit", "callbacks") for path in sorted((ROOT / folder).glob("**/*.py"))]
DEFINED = {
    name: node
    for path in PATHS
    for name, node in public(ast.parse(path.read_text()).body, path.relative_to(ROOT).as_posix())
}
SAID = {name: ast.get_docstring(node) or "" for name, node in DEFINED.items()}


def arguments(name: str) -> set[str]:
    """Those that a function takes, or a class by its `__init__` or its fields."""
    node = DEFINED[name]
    if isinstance(node, ast.ClassDef):
        makers = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
        if not makers:
            return {n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
        node = makers[0]
    its = node.args
    return {a.arg for a in (*its.posonlyargs, *its.args, *its.kwonlyargs, its.vararg, its.kwarg) if a is not None}


def is_command(name: str) -> bool:
    """Whether Typer makes a command of it: its docstring is the command's help."""
    decorators = (d.func for d in DEFINED[name].decorator_list if isinstance(d, ast.Call))
    return any(isinstance(d, ast.Attribute) and d.attr in ("command", "callback") for d in decorators)


def raises(name: str) -> bool:
    """Whether the function itself, not what it calls, raises an error that is the caller's to mend."""
    calls = (n.exc for n in ast.walk(DEFINED[name]) if isinstance(n, ast.Raise) and isinstance(n.exc, ast.Call))
    return bool({call.func.id for call in calls if isinstance(call.func, ast.Name)} & ERRORS)


def test_what_is_public_says_what_it_is() -> None:
    # Methods that Lightning or a sink's caller names need not say it again.
    told = {name: text.split("\n\n")[0].rstrip() for name, text in SAID.items() if text or name.count(".") == 2}
    assert len(told) > 500
    assert [name for name, first in told.items() if not first.endswith((".", "?", ":"))] == []


def test_arguments_that_a_docstring_names_are_taken() -> None:
    strange, count = {}, 0
    for name, text in SAID.items():
        section = re.search(r"^Args:\n((?: {4}.*\n?|\n)+)", text, re.M)
        entries = re.findall(r"^ {4}(\S.*?):", section[1], re.M) if section else []
        named = {one for entry in entries for one in entry.split(", ")}
        count += len(named)
        if named - arguments(name):
            strange[name] = named - arguments(name)
    assert count > 100
    assert strange == {}


def test_errors_that_a_function_raises_are_said() -> None:
    raising = [name for name, node in DEFINED.items() if isinstance(node, ast.FunctionDef) and raises(name)]
    assert len(raising) > 50
    silent = [name for name in raising if not re.search(r"^Raises:|^Raise |errors as|ValueError", SAID[name], re.M)]
    assert [name for name in silent if not is_command(name)] == []


def test_every_public_name_is_on_a_page_of_the_reference() -> None:
    assert set(PUBLIC) <= set(IDENTIFIERS)
    assert len(IDENTIFIERS) == len(set(IDENTIFIERS))


@pytest.mark.parametrize("name", [name for name in PUBLIC if name.rpartition(".")[2] not in WITHOUT_EXAMPLE])
def test_every_public_name_has_an_example(name: str) -> None:
    module, _, own = name.rpartition(".")
    thing = getattr({m.__name__: m for m in (bias_audit, bias_audit.callbacks)}[module], own)
    if not (inspect.isclass(thing) and issubclass(thing, enum.Enum)):
        assert re.search(r"^ *Example:\n +>>> ", inspect.cleandoc(thing.__doc__ or ""), re.M)

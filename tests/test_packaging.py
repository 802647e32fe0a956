"""What is installed is what is in the tree, under the names that are promised."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

import bias_audit

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "bias_audit"


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def folder_of(package: str) -> Path:
    return ROOT / "callbacks" if package == "bias_audit.callbacks" else ROOT.joinpath(*package.split("."))


def test_the_list_of_packages_is_the_tree(project: dict[str, Any]) -> None:
    folders = {p.parent for root in (PACKAGE, ROOT / "callbacks") for p in root.rglob("*.py")}
    tree = {
        "bias_audit." + ".".join(f.relative_to(ROOT).parts) for f in folders if ROOT / "callbacks" in (f, *f.parents)
    }
    # `rglob` may or may not follow the link: either way it is one package.
    tree |= {".".join(f.relative_to(ROOT).parts) for f in folders if PACKAGE in (f, *f.parents)}
    listed = project["tool"]["setuptools"]["packages"]
    assert sorted(listed) == listed and set(listed) == tree and len(listed) == len(tree)
    assert all((folder_of(package) / "__init__.py").is_file() for package in listed)
    assert project["tool"]["setuptools"]["package-dir"] == {"bias_audit.callbacks": "callbacks"}


def test_callbacks_is_a_link_to_the_folder_at_the_root() -> None:
    link = PACKAGE / "callbacks"
    assert link.is_symlink() and link.readlink() == Path("../callbacks")
    assert not (ROOT / "callbacks").is_symlink() and (link / "lightning.py").samefile(ROOT / "callbacks/lightning.py")


def test_every_file_that_is_no_module_is_package_data(project: dict[str, Any]) -> None:
    globs = project["tool"]["setuptools"]["package-data"]
    carried = []
    for package in project["tool"]["setuptools"]["packages"]:
        matched = {p for pattern in globs.get(package, []) for p in folder_of(package).glob(pattern)}
        others = {
            p
            for p in folder_of(package).iterdir()
            if p.is_file() and p.suffix not in (".py", ".pyc") and p.name[0] != "."
        }
        assert matched == others, package
        assert all(list(folder_of(package).glob(pattern)) for pattern in globs.get(package, [])), (
            "a glob without a file"
        )
        carried += [p.name for p in others]
    assert "py.typed" in carried and any(name.endswith(".j2") for name in carried)
    assert {Path(name).suffix for name in carried} >= {".css", ".js"}


def test_public_names() -> None:
    assert list(bias_audit._HOMES) == bias_audit.__all__ == sorted(bias_audit.__all__)
    for name, home in bias_audit._HOMES.items():
        value = getattr(bias_audit, name)
        assert value is getattr(importlib.import_module(home), name) and not isinstance(value, ModuleType), name
        assert callable(value) and value.__doc__, name
        assert name in dir(bias_audit)
    with pytest.raises(AttributeError, match="no attribute 'audit_modle'"):
        bias_audit.audit_modle  # noqa: B018


def test_type_checkers_see_the_same_names() -> None:
    """The imports under TYPE_CHECKING name the same homes."""
    import ast

    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    seen = {
        alias.name: node.module
        for block in tree.body
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == bias_audit._HOMES


def test_no_public_name_is_a_modules_and_callbacks_is_no_top_level_name(tmp_path: Path) -> None:
    # Whichever of the two were imported last would own the name.
    assert not {path.stem for path in (ROOT / "bias_audit").iterdir()} & set(bias_audit.__all__)
    program = (
        "import importlib.util\n"
        "print(importlib.util.find_spec('callbacks'), importlib.util.find_spec('bias_audit.callbacks').name)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    # Away from the repository there is no top-level `callbacks`.
    assert (done.returncode, done.stdout) == (0, "None bias_audit.callbacks\n"), done.stderr


def test_console_scripts(project: dict[str, Any]) -> None:
    (script,) = entry_points(group="console_scripts", name="bias-audit")
    assert project["project"]["scripts"] == {"bias-audit": script.value}
    module, function = script.value.split(":")
    assert callable(getattr(importlib.import_module(module), function))
    typer = importlib.import_module("typer")
    assert isinstance(importlib.import_module("bias_audit.cli").app, typer.Typer)


def test_the_version_is_one(project: dict[str, Any]) -> None:
    from importlib.metadata import version

    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"]
    assert version("bias-audit") == project["project"]["version"] == cited

"""Names of a package that are loaded when they are first used.

Enters: where each name is at home. Leaves: the package's `__getattr__` and `__dir__` (PEP 562).

Standard library only: what imports a package for one of its names must not wait for the others.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module


def loaded_lazily(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """What `package`, by its `__name__`, calls `__getattr__` and `__dir__`; `homes` are the modules of its names.

    Example:
        >>> get, names = loaded_lazily("math", {"Fraction": "fractions"})
        >>> get("Fraction")(1, 2)
        Fraction(1, 2)
    """

    def get(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(homes[name]), name)

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return get, names

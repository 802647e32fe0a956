"""What a user names as `package.module:name` on the command line or in a file.

Enters: the name, and where it was named. Leaves: what it stands for, or a `ValueError` that says what is wrong.
"""

from __future__ import annotations

import os
import pkgutil
import re
import sys
from typing import Any

from bias_audit.data.annotations import Misfit


def called(name: str, where: str) -> Any:
    """What the function `package.module:function` returns.

    Raises:
        ValueError: it cannot be imported, or raises; says `where` it was named.
    """
    function = imported(name, where)
    if not callable(function):
        raise ValueError(f"{where}: {name!r} is {type(function).__name__}, expected a function or a class")
    try:
        return function()
    except Misfit as error:
        raise Misfit([f"{where}: {name!r}: {line}" for line in error.lines]) from error
    # A function that ends the process, as a script may, would do so with an exit code of its own.
    except (Exception, SystemExit) as error:
        raise ValueError(f"{where}: {name!r} raised {type(error).__name__}: {error}") from error


def imported(name: str, where: str) -> Any:
    """What `package.module:name` stands for.

    Raises:
        ValueError: it cannot be imported, or has no such name; says `where` it was named.

    Example:
        >>> imported("math:tau", "--model") > 6
        True
    """
    if not re.fullmatch(r"[\w.]+:[\w.]+", name):
        raise ValueError(f"{where}: expected package.module:name, got {name!r:.200}")
    try:
        return pkgutil.resolve_name(name)
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"{where}: {name!r} cannot be imported ({type(error).__name__}: {error}): is it installed, or in the "
            "current directory?"
        ) from error


def import_from_here() -> None:
    """Look for modules in the current directory too, as `python -m` does and a console script does not."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())

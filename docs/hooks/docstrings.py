"""Docstrings as the site's parser reads them: what is headed `Example:` in the code is a section of examples there."""

from __future__ import annotations

import re
from typing import Any

import griffe

HEAD = re.compile(r"^( *)Example:$", re.MULTILINE)


class Examples(griffe.Extension):
    """Heads examples as the parser of Google's style expects it, so that they are shown as code."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Changes the docstring of one object."""
        if obj.docstring is not None:
            obj.docstring.value = HEAD.sub(r"\1Examples:", obj.docstring.value)

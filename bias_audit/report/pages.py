"""What every page is made of: the package's own templates and styles, and pictures as text.

Enters: a file's name in this package, a picture, or what may run in a page. Leaves: a template that escapes what comes
from data, a text, a URI, or the page's policy.
"""

from __future__ import annotations

import base64
import hashlib
import io
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from PIL import Image


def template(name: str) -> Template:
    """The template `name`; everything put into it is escaped, and a value that is missing is an error."""
    environment = Environment(
        loader=PackageLoader("bias_audit.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def resource(name: str) -> str:
    """The text of a file that stands beside this module."""
    return (files(__package__) / name).read_text(encoding="utf-8")


def content_security_policy(style: str, script: str = "") -> str:
    """What a browser lets a page do: its own style and script run, known by their hashes, and nothing is loaded.

    Pictures stand in the page itself. An element may have a `style` of its own, as drawings have; it can load nothing.

    Example:
        >>> content_security_policy("p { color: red }").split("; ")[2][:23]
        "style-src-elem 'sha256-"
    """
    return "; ".join(
        (
            "default-src 'none'",
            "img-src data:",
            f"style-src-elem {_hash(style)}",
            "style-src-attr 'unsafe-inline'",
            f"script-src {_hash(script)}" if script else "script-src 'none'",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )


def _hash(text: str) -> str:
    """An element's text as a policy names it: what stands between its tags, to the letter."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def data_uri(picture: Image.Image, kind: str, **options: Any) -> str:
    """The picture as a `data:` URI, encoded as `kind`, "JPEG" or "PNG", with Pillow's `options` for it."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"

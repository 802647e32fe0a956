"""What every page is made of: the package's own templates and styles, and pictures as text.

Enters: a file's name in this package, or a picture. Leaves: a template that escapes what comes from data, a text, or a
URI.
"""

from __future__ import annotations

import base64
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


def data_uri(picture: Image.Image, kind: str, **options: Any) -> str:
    """The picture as a `data:` URI, encoded as `kind`, "JPEG" or "PNG", with Pillow's `options` for it."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"

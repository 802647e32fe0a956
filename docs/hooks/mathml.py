"""Formulas as MathML, which browsers draw without a script: `pymdownx.arithmatex` marks them, this writes them."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    """The page with its formulas written."""
    return FORMULA.sub(
        lambda found: convert(html.unescape(found[2]).strip(), display="block" if found[1] == "div" else "inline"),
        content,
    )

"""A Vega-Lite specification as SVG that can stand in a page.

Enters: a specification. Leaves: SVG that takes its colours from the page's CSS variables, so that it follows the light
or dark theme of its reader, with ids of its own, so that many can share a page.
"""

from __future__ import annotations

import re
from typing import Any

import vl_convert
from markupsafe import Markup

from bias_audit.report.series import DASHES, Style

_NOT_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")


def swatch(style: Style) -> Markup:
    """A short piece of a series' line, for a key in text."""
    dash = " ".join(map(str, style.dash))
    return Markup('<svg class="swatch" viewBox="0 0 26 10"><path d="M0 5H26" stroke="var(--{})" {}/></svg>').format(
        style.hue, Markup('stroke-dasharray="{}"').format(dash) if style.dash != DASHES[0] else ""
    )


def svg(key: str, spec: dict[str, Any], *, left: int, right: int, top: int, bottom: int) -> Markup:
    """A Vega-Lite specification as SVG that can stand in a page beside others.

    Args:
        key: stands in front of the ids in the SVG.
        left, right, top, bottom: pixels around the plot, for axes and names.
    """
    axis = {
        "labelColor": "var(--muted)",
        "titleColor": "var(--muted)",
        "titleFontWeight": "normal",
        "domainColor": "var(--axis)",
        "tickColor": "var(--axis)",
        "gridColor": "var(--grid)",
        "labelFontSize": 11,
        "titleFontSize": 11,
        "titlePadding": 6,
        "labelFlush": False,
    }
    invalid = {"invalid": "break-paths-show-domains"}
    config = {
        "aria": False,
        "background": None,
        # Only measured with this; the page's own font takes over, as `_inline` leaves none in the SVG.
        "font": "sans-serif",
        "view": {"stroke": None},
        "axis": axis,
        "line": invalid,
        "area": invalid,
    }
    # A fixed frame instead of a fitted one: plots of one row are then equally large, whatever their labels.
    frame = {"autosize": "none", "padding": {"left": left, "top": top, "right": right, "bottom": bottom}}
    return Markup(_inline(vl_convert.vegalite_to_svg(legible({**spec, **frame, "config": config})), key))


def legible(spec: Any) -> Any:
    """A specification without the characters that no SVG may hold: at one of them vl_convert aborts the process.

    Example:
        >>> legible({"text": ["bell\\x07", 1]})
        {'text': ['bell�', 1]}
    """
    if isinstance(spec, str):
        return _NOT_XML.sub("\ufffd", spec)
    if isinstance(spec, dict):
        return {key: legible(value) for key, value in spec.items()}
    return [legible(value) for value in spec] if isinstance(spec, list | tuple) else spec


def _inline(drawing: str, key: str) -> str:
    """The SVG fit to stand in a page beside others: as wide as its place, with its own ids and no needless bytes."""
    # The library counts clip paths over the life of the process; renumbered, equal charts are equal bytes.
    for number, name in enumerate(re.findall(r' id="([^"]+)"', drawing)):
        drawing = drawing.replace(f' id="{name}"', f' id="{key}-{number}"')
        drawing = drawing.replace(f"url(#{name})", f"url(#{key}-{number})")
    drawing = re.sub(r' (role|aria-\w+|class|pointer-events|font-family|xmlns(:xlink)?)="[^"]*"', "", drawing)
    drawing = re.sub(r'<path d="[^"]*" display="none"/>|<path d="M0,0h0v0h0Z"/>', "", drawing)
    drawing = re.sub(r' (transform|d)="([^"]*)"', lambda m: f' {m[1]}="{_rounded(m[2])}"', drawing)
    sized = r'<svg version="1.1" width="\d+" height="\d+"'
    return re.sub(sized, '<svg class="plot" aria-hidden="true"', drawing, count=1)


def _rounded(numbers: str) -> str:
    return re.sub(r"\d+\.\d{2,}", lambda m: f"{float(m[0]):.1f}".removesuffix(".0"), numbers)

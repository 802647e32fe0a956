"""What findings and audits have in common where a notebook shows them under a cell.

Enters: verdicts and estimates. Leaves: HTML, all that comes from data escaped, with its styles on its elements, since
notebooks drop others, and with colours that stand out on white and on black.
"""

from __future__ import annotations

from collections.abc import Iterable

from markupsafe import Markup

from bias_audit.terms import Estimate, Verdict

# Signs as well as colours.
SIGNS = {Verdict.RELIANCE: "✕", Verdict.SUSPECTED: "!", Verdict.INCONCLUSIVE: "?", Verdict.CLEARED: "✓"}
COLOURS = {
    Verdict.RELIANCE: "#d0452b",
    Verdict.SUSPECTED: "#b07a00",
    Verdict.INCONCLUSIVE: "#b07a00",
    Verdict.CLEARED: "#2a9161",
}
CELL = "text-align: left; vertical-align: top; padding: 2px 12px 2px 0; overflow-wrap: anywhere;"


def verdict_html(verdict: Verdict) -> Markup:
    """A verdict with its sign and in its colour."""
    style = f"color: {COLOURS[verdict]}; font-weight: 600; white-space: nowrap;"
    return Markup('<span style="{}">{} {}</span>').format(style, SIGNS[verdict], verdict)


def numbers_html(estimates: Iterable[Estimate]) -> Markup:
    """A list of estimates that opens on a click; nothing where there are none."""
    items = Markup("").join(Markup("<li>{}</li>").format(e) for e in estimates)
    return Markup("<details><summary>Numbers</summary><ul>{}</ul></details>").format(items) if items else items

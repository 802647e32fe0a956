"""The pages of docs/concepts/ say what the code does: its decision tables, tolerances, metrics and methods."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import pytest

from bias_audit.attribution.methods import METHODS
from bias_audit.policies.policy import METRICS, Tolerance
from bias_audit.terms import Verdict
from bias_audit.verdicts.decisions import attribute_verdict, verdict_by_removal, verdict_by_value

CONCEPTS = Path(__file__).parents[1] / "docs/concepts"
VERDICT, METRIC_PAGE, STATISTICS = (
    (CONCEPTS / f"{name}.md").read_text() for name in ("verdict", "metrics", "statistics")
)
YES, NO, NOT_ASKED = True, False, None
ANY = (YES, NO, NOT_ASKED)
WAYS = {"yes": (YES,), "no": (NO,), "not asked": (NOT_ASKED,), "any": ANY, "no, or not asked": (NO, NOT_ASKED)}


def rows(header: str) -> list[list[str]]:
    """The cells of the table of the page that begins with this header."""
    table = VERDICT[VERDICT.index(header) :].partition("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def check(said: Iterator[tuple[tuple[bool | None, ...], str]], table: Callable[..., Verdict], possible: int) -> None:
    """Every way that the page's rows name has their verdict in the code, and no way is left out."""
    found = dict(said)
    assert len(found) == possible
    for ways, verdict in found.items():
        assert table(*ways) == verdict.strip("`"), ways


def test_the_table_of_a_region_that_shows_an_attribute() -> None:
    said = (
        ((value, contrast, look), verdict)
        for *cells, verdict in rows("| decisions follow the value |")
        for value, contrast, look in product(*(WAYS[cell] for cell in cells))
    )
    # The page's "no" of what may also not be asked stands for both: an answer that is missing counts for nothing.
    known = {(v, c, bool(look)): verdict for (v, c, look), verdict in said if v is not None}
    check(iter(known.items()), verdict_by_value, possible=2 * 3 * 2)


def test_the_table_of_any_other_region() -> None:
    said = (
        ((look, removal, bool(gap)), verdict)
        for *cells, verdict in rows("| removal changes decisions |")
        for removal, look, gap in product(*(WAYS[cell] for cell in cells))
    )
    known = {(bool(look), removal, gap): verdict for (look, removal, gap), verdict in said}
    check(iter(known.items()), verdict_by_removal, possible=2 * 3 * 2)


def test_the_table_of_an_attribute() -> None:
    seconds: dict[str, list[tuple[bool, ...]]] = {
        "": list(product((YES, NO), repeat=3)),
        "any": list(product((YES, NO), repeat=3)),
        "none": [(NO, NO, NO)],
        "associated in training, or looked at": [w for w in product((YES, NO), repeat=3) if w[0] or w[1]],
        "associated in training, looked at, or read": [w for w in product((YES, NO), repeat=3) if any(w)],
    }
    said = {
        (gap, swap, *more): verdict
        for swaps, gaps, one_more, verdict in rows("| swap moves decisions |")
        for swap in WAYS[swaps]
        for gap in WAYS[gaps]
        for more in seconds[one_more]
    }
    # That a region is read is no second witness beside a swap, which the table says by leaving it out.
    beside_a_swap = (YES, NO)
    for gap, verdict in zip(beside_a_swap, (Verdict.RELIANCE, Verdict.SUSPECTED), strict=True):
        said[gap, YES, NO, NO, YES] = f"`{verdict}`"
    check(iter((ways, verdict) for ways, verdict in said.items()), attribute_verdict, possible=2 * 3 * 8)


def test_the_tolerances_of_the_four_questions() -> None:
    page = [float(n) for n in re.findall(r"\d[\d.]*", " ".join(row[3] for row in rows("| | question |")))]
    t = Tolerance()
    code = [t.enrichment, t.removal_flips, t.removal_contrast, t.swap_gap, t.accuracy_gap, t.association]
    assert page == code


@pytest.mark.parametrize("name", [*(m for m in METRICS if m != "verdict"), *METHODS])
def test_every_metric_and_method_is_on_the_page(name: str) -> None:
    assert f"`{name}`" in METRIC_PAGE

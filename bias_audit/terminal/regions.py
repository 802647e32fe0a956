"""What the commands on regions print: what to annotate, what was proposed, what a check found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from bias_audit.terminal.text import MOST_LETTERS, MOST_ROWS, WORD, text, wide_table
from bias_audit.wording import shortened

if TYPE_CHECKING:
    from bias_audit.regions.checked import RegionReport
    from bias_audit.regions.choose import Choices
    from bias_audit.regions.propose import Found


_REGION_STYLES = {"violated": "bold red", "warning": "yellow", "inconclusive": "yellow", "held": "green"}
# So many images that a check of regions names are printed; its page has all.
MOST_FLAGS = 10


def print_choices(console: Console, found: Choices) -> None:
    """A row for each cell: its images, those annotated, those chosen; and how many were chosen for their heatmaps."""
    table = Table(title="What to annotate", title_justify="left", expand=True)
    for name in ("label", *found.attributes):
        table.add_column(text(name), overflow="fold")
    for name in ("images", "annotated", "chosen", "after that"):
        table.add_column(name, justify="right", no_wrap=True)
    for cell in found.cells[:MOST_ROWS]:
        after = cell.annotated + cell.chosen
        counts = (str(cell.images), str(cell.annotated), str(cell.chosen), str(after))
        table.add_row(*map(text, (cell.label, *cell.values, *counts)), style="yellow" if after == cell.images else "")
    console.print(table)
    if len(found.cells) > MOST_ROWS:
        console.print(text(f"and {len(found.cells) - MOST_ROWS} more cells"))
    led = sum(choice.why != "balance" for choice in found.picked)
    images = "1 image" if len(found.picked) == 1 else f"{len(found.picked)} images"
    console.print(text(f"{images} to annotate, {led} of them for where their heatmaps lie."))
    if any(cell.annotated + cell.chosen == cell.images for cell in found.cells):
        console.print(text("A cell in yellow has no image left.", "yellow"))


def print_proposals(console: Console, found: Sequence[Found]) -> None:
    """A row for each region: in how many images it was found, and how often."""
    table = Table(title="Proposed", title_justify="left", expand=True)
    table.add_column("region", overflow="fold")
    for name in ("images", "annotations", "only boxes"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in found:
        counts = (str(one.images), str(one.annotations), str(one.boxes))
        table.add_row(*map(text, (one.region, *counts)), style="" if one.images else "yellow")
    console.print(table)
    if any(one.boxes for one in found):
        console.print(text("A box holds some of what lies around: its area is more than the thing's.", "yellow"))


def print_region_check(console: Console, report: RegionReport) -> None:
    """Each check of regions and what it found, what must be mended first; then the images that it names."""
    found = report.survey.of
    console.print(text(f"{found.name}: {len(found.items)} images, {len(found.regions)} regions", "bold"))
    table = wide_table("Regions", outcome=WORD, check=WORD, found={"ratio": 1})
    for result in report.worst_first:
        state = result.found.state
        said = text(shortened(result.found.said, 6 * MOST_LETTERS))
        table.add_row(text(state, _REGION_STYLES.get(state, "")), text(result.check.code), said)
    console.print(table)
    for result in report.worst_first:
        flags = result.found.flags
        for flag in flags[:MOST_FLAGS]:
            console.print(text(f"{result.check.code}: {found.items[flag.index].file}: {flag.said}"), soft_wrap=True)
        if len(flags) > MOST_FLAGS:
            console.print(text(f"{result.check.code}: and {len(flags) - MOST_FLAGS} more"))
    outcome = f"bias-audit regions check: {report.state}: {shortened(report.headline, 6 * MOST_LETTERS)}"
    console.print(text(outcome, _REGION_STYLES[report.state]))

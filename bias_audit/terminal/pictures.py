"""Samples with their heatmaps, drawn in a terminal.

Enters: a console, a `Run` and the place of an audit in it. Leaves: pictures, by the terminal's own graphics where it
has some, else as coloured half cells.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from bias_audit.records.runs import Run
from bias_audit.terminal.text import text

if TYPE_CHECKING:
    from PIL.Image import Image


# A picture is so many cells wide; half a cell high it is a square of pixels.
PICTURE = 24


def print_samples(console: Console, run: Run, index: int, count: int) -> None:
    """The samples whose heatmaps lie most on a spurious region, in rows as wide as the console."""
    from PIL import Image

    from bias_audit.overlays import overlay
    from bias_audit.records.panels import most_looked
    from bias_audit.records.pictures import opened

    sheet, scores, subjects = run.sheet(), run.scores(index), run.manifest.subjects
    worst = most_looked(scores, run.manifest.subjects.regions_with("spurious"), count)
    if not worst:
        console.print("No sample has a heatmap on a spurious region.")
        return
    console.print(text(f"Most of the heatmap on a spurious region ({scores.methods[0]}), left to right:"))
    place = {name: i for i, name in enumerate(sheet.ids)}
    # Half cells without colour would be a block of one shade.
    drawable = not console.no_color
    each_row = max(1, console.width // (PICTURE + 2))
    for start in range(0, len(worst), each_row):
        row = worst[start : start + each_row]
        width = len(row) * (PICTURE + 2) - 2
        strip = Image.new("RGB", (width * 8, PICTURE * 8))
        for k, (i, _, _) in enumerate(row):
            picture = opened(sheet.thumbnails[place[scores.ids[i]]]).convert("RGB")
            drawn = overlay(picture, scores.maps[0, i].astype("float32"))
            drawn.thumbnail((PICTURE * 8, PICTURE * 8))
            strip.paste(drawn, (k * (PICTURE + 2) * 8, 0))
        if drawable:
            _print_picture(console, strip, width)
        for k, (i, region, share) in enumerate(row, start + 1):
            label, decided = scores.labels[i], scores.predictions[i]
            said = f"{subjects.class_name(int(label))}, decided {subjects.class_name(int(decided))}"
            told = f"{share:.2f} on {region}; {said}"
            console.print(text(f"{k}. {scores.ids[i]}: {told}"))


def _print_picture(console: Console, picture: Image, cells: int) -> None:
    """A picture by the terminal's own graphics where it has some, else as coloured half cells."""
    if console.is_terminal and sys.stdout.isatty():
        try:
            # Importing it asks the terminal what it can show.
            from textual_image.renderable import Image as Drawn

            console.print(Drawn(picture, width=cells, height="auto"))
            return
        except ImportError:
            pass
        except Exception:
            # It divides by sizes that a terminal may well give as 0; half cells need none.
            console.print()
    small = picture.resize((cells, max(2, 2 * round(cells * picture.height / picture.width / 2))))
    for y in range(0, small.height, 2):
        line = Text()
        for x in range(small.width):
            upper, lower = (small.crop((x, at, x + 1, at + 1)).tobytes().hex() for at in (y, y + 1))
            line.append("▀", style=f"#{upper} on #{lower}")
        console.print(line, no_wrap=True, crop=True)

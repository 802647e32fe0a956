"""Overlays of several samples in one picture, for dashboards that show one picture at a time.

Enters: a `Session`, an audit's scores, and which samples. Leaves: one picture, each overlay above its id and classes.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from bias_audit.callbacks.sinks import Session
from bias_audit.overlays import overlay
from bias_audit.records.pictures import opened
from bias_audit.records.samples import SampleScores
from bias_audit.wording import one_line

COLUMNS = 4
# A picture of eight takes about 0.3 MB as PNG: event files hold two of them per audit.
TILE, GAP, LINE, LETTERS = 160, 8, 15, 12
INK, PAPER, ALARM = (30, 30, 30), (255, 255, 255), (176, 32, 32)


def grid(session: Session, scores: SampleScores, indices: Sequence[int]) -> Image.Image:
    """Overlays of the samples at `indices`, row by row, by the first explanation method.

    Below each a number, its id, its label and, where the decision is wrong, what was predicted. The letters are those
    that Pillow brings along: accents are left off, and other scripts are boxes; the number tells which sample it is.

    Raises:
        ValueError: there is no sample.
    """
    if not indices:
        raise ValueError("expected at least one sample to draw, got none")
    columns = min(COLUMNS, len(indices))
    rows = -(-len(indices) // columns)
    cell = TILE + 3 * LINE
    sheet = Image.new("RGB", (columns * (TILE + GAP) + GAP, rows * (cell + GAP) + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(LETTERS)
    for k, index in enumerate(indices):
        left, top = GAP + k % columns * (TILE + GAP), GAP + k // columns * (cell + GAP)
        thumbnail = opened(session.sheet.thumbnails[index]).convert("RGB")
        tile = ImageOps.contain(overlay(thumbnail, scores.maps[0, index].astype(np.float32)), (TILE, TILE))
        sheet.paste(tile, (left + (TILE - tile.width) // 2, top + TILE - tile.height))
        for line, words in enumerate(_caption(session, scores, index, k + 1)):
            colour = ALARM if line == 2 else INK
            draw.text((left, top + TILE + line * LINE), _fitting(words, font), font=font, fill=colour)
    return sheet


def listing(session: Session, scores: SampleScores, indices: Sequence[int]) -> list[str]:
    """The captions of the same `grid`, a line for each sample, whole and in any script."""
    return [", ".join(_caption(session, scores, index, k)) for k, index in enumerate(indices, 1)]


def _caption(session: Session, scores: SampleScores, index: int, number: int) -> list[str]:
    subjects, label, decision = session.manifest.subjects, scores.labels[index], scores.predictions[index]
    lines = [f"{number}. {session.sheet.ids[index]}", subjects.class_name(int(label))]
    return lines if label == decision else [*lines, f"predicted {subjects.class_name(int(decision))}"]


def _fitting(words: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """As much of `words` as a tile is wide, on one line, less its middle: ids often differ at the end."""
    line = "".join(c for c in unicodedata.normalize("NFKD", one_line(words)) if not unicodedata.combining(c))
    kept = len(line)
    shown = line
    while font.getlength(shown) > TILE and kept > 2:
        kept -= max(1, kept // 8)
        shown = f"{line[: kept - kept // 2]}...{line[len(line) - kept // 2 :]}"
    return shown

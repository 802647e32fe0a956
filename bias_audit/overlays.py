"""A heatmap drawn over its image, and pictures side by side.

Enters: a picture, and a map at the layer's own resolution, 0 to 1; or pictures with their words. Leaves: one picture.

torch is not imported here: overlays are drawn where the records are.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont, ImageOps

SIDE = 256
# Of the hottest places.
_OPACITY = 0.65
# Black through violet and orange to pale yellow, lightness rising evenly: readable in grey and without red and green.
_STOPS = np.array([[0, 0, 4], [66, 10, 104], [147, 38, 103], [221, 81, 58], [252, 165, 10], [252, 255, 164]])


def overlay(picture: Image.Image, heat: npt.NDArray[np.float32]) -> Image.Image:
    """`heat` `(h, w)`, 0 to 1, over `picture`, enlarged by a whole factor to about SIDE pixels; no heat, no cover."""
    factor = max(1, round(SIDE / max(picture.size)))
    size = (picture.width * factor, picture.height * factor)
    codes = np.rint(255 * np.clip(np.nan_to_num(heat), 0, 1)).astype(np.uint8)
    levels = Image.fromarray(codes).resize(size, Image.Resampling.BILINEAR)
    cover = levels.point([round(_OPACITY * level) for level in range(256)])
    levels.putpalette(_PALETTE)
    return Image.composite(levels.convert("RGB"), picture.resize(size, Image.Resampling.BICUBIC), cover)


def side_by_side(rows: Sequence[Sequence[tuple[str, Image.Image]]], side: int = SIDE) -> Image.Image:
    """Rows of pictures, each under its words and with a longer side of `side` pixels.

    Raises:
        ValueError: there is no picture.

    Example:
        >>> grey = Image.new("RGB", (64, 32), "grey")
        >>> side_by_side([[("one", grey), ("two", grey)], [("three", grey)]], side=128).size
        (272, 176)
    """
    gap, line = 8, 12
    if not any(rows):
        raise ValueError("expected rows of (words, picture), got none")
    tiles = [[(words, ImageOps.contain(picture, (side, side))) for words, picture in row] for row in rows]
    tops = list(accumulate((max(tile.height for _, tile in row) + line + gap for row in tiles), initial=gap // 2))
    width = max(len(row) for row in tiles) * (side + gap)
    sheet = Image.new("RGB", (width, tops[-1] + gap // 2), "white")
    canvas, font = ImageDraw.Draw(sheet), ImageFont.load_default(line)
    for row, top in zip(tiles, tops[:-1], strict=True):
        for column, (words, tile) in enumerate(row):
            left = column * (side + gap) + gap // 2
            canvas.text((left, top - 2), words, fill="black", font=font)
            sheet.paste(tile, (left, top + line + 2))
    return sheet


def heat_colours(levels: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """The colours `(h, w, 3)`, 0 to 255, of `levels` `(h, w)`, 0 to 1."""
    ends = np.linspace(0, 1, len(_STOPS))
    return np.stack([np.interp(levels, ends, _STOPS[:, channel]) for channel in range(3)], axis=-1)


_PALETTE = np.rint(heat_colours(np.linspace(0, 1, 256)[None])).astype(np.uint8).tobytes()

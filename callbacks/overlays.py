"""A heatmap drawn over its image.

Enters: a picture and a map at the layer's resolution. Leaves: one picture.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

SIDE = 256
# Black through violet and orange to pale yellow, lightness rising evenly: readable in grey and without red and green.
_STOPS = np.array([[0, 0, 4], [66, 10, 104], [147, 38, 103], [221, 81, 58], [252, 165, 10], [252, 255, 164]])


def overlay(picture: Image.Image, heat: npt.NDArray[np.float32], opacity: float = 0.65) -> Image.Image:
    """`heat` `(h, w)`, 0 to 1, over `picture`, enlarged by a whole factor to about SIDE pixels; no heat, no cover."""
    factor = max(1, round(SIDE / max(picture.size)))
    size = (picture.width * factor, picture.height * factor)
    levels = np.asarray(Image.fromarray(np.clip(heat, 0, 1)).resize(size, Image.Resampling.BILINEAR))
    ends = np.linspace(0, 1, len(_STOPS))
    colours = np.stack([np.interp(levels, ends, _STOPS[:, channel]) for channel in range(3)], axis=-1)
    base = np.asarray(picture.resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
    cover = opacity * levels[..., None]
    return Image.fromarray((base * (1 - cover) + colours * cover).astype(np.uint8))

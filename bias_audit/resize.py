"""Maps from one grid to another.

Enters: maps on a layer's grid. Leaves: the same maps on another, such as that of the image.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


def upsample(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Maps `(..., *places)` at `size`, `(..., *size)`: bilinear, of clips trilinear, `align_corners=False`."""
    leading = maps.shape[: maps.ndim - len(size)]
    mode = "trilinear" if len(size) == 3 else "bilinear"
    flat = maps.reshape(-1, 1, *maps.shape[len(leading) :])
    return nn.functional.interpolate(flat, size=tuple(size), mode=mode, align_corners=False).reshape(*leading, *size)

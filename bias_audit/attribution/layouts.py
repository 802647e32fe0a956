"""Where a layer's output keeps the places of the image.

Enters: the shape of a layer's output, the size of the images that went in, `(H, W)` or `(T, H, W)`, and what the layer
is made of. Leaves: a `Layout`, the rearrangement of that output, and of its gradient, to `(B, C, *places)`; or None for
an output without places. A layout is any such function; these are the ones that are recognised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, prod
from typing import Literal

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

Layout = Callable[[Tensor], Tensor]
Channels = Literal["first", "last"]

_TAKE_FIRST = (_ConvNd, _BatchNorm, nn.GroupNorm)
_TAKE_LAST = (nn.Linear, nn.LayerNorm)
# Convolutions without padding, one after the other, lose as many rows as columns, not as proportion asks.
_MOST_MISFIT = 8

# None, a class token, one more for distillation, four registers without and with a class token.
_EXTRA_TOKENS = (0, 1, 2, 4, 5)


def channels_first(output: Tensor) -> Tensor:
    """An output that is `(B, C, *places)` already: convolutions."""
    return output


def channels_last(output: Tensor) -> Tensor:
    """`(B, *places, C)`, as Swin and ConvNeXt blocks have it, as `(B, C, *places)`."""
    return output.movedim(-1, 1)


@dataclass(frozen=True)
class TokenGrid:
    """Tokens `(B, N, C)`, `extra` of them (class token, registers) before one for each place of `grid`, row by row.

    Example:
        >>> import torch
        >>> TokenGrid(1, (2, 3))(torch.arange(7.0)[None, :, None])
        tensor([[[[1., 2., 3.],
                  [4., 5., 6.]]]])
    """

    extra: int
    grid: tuple[int, ...]

    def __call__(self, output: Tensor) -> Tensor:
        """The tokens of places as `(B, C, *grid)`."""
        places = output[:, self.extra :].movedim(-1, 1)
        return places.reshape(*places.shape[:2], *self.grid)


def find_layout(shape: Sequence[int], size: Sequence[int], channels: Channels | None = None) -> Layout | None:
    """How an output of `shape` keeps the places of images of `size`; None if it has no more than one place.

    Tokens are put on the grid that has the images' proportions: 197 of a square image are a class token and 14 x 14.
    Where channels may be first or last by the proportions, `channels` says which, and without it the better fit.

    Raises:
        ValueError: channels may as well be first as last, and nothing says which.

    Example:
        >>> find_layout((8, 197, 768), (224, 224))
        TokenGrid(extra=1, grid=(14, 14))
        >>> find_layout((8, 7, 7, 768), (224, 224)) is channels_last
        True
        >>> find_layout((8, 1000), (224, 224)) is None
        True
    """
    if len(shape) == len(size) + 2:
        first, last = shape[2:], shape[1:-1]
        misfit_first, misfit_last = _misfit(first, size), _misfit(last, size)
        fits = {"first": misfit_first <= _MOST_MISFIT, "last": misfit_last <= _MOST_MISFIT}
        if fits["first"] and fits["last"] and channels is None and misfit_first == misfit_last:
            raise ValueError(
                f"an output {tuple(shape)} may have its channels first or last, of images {tuple(size)}: give the "
                "`layout` that makes it (B, C, h, w)"
            )
        if fits["first"] and fits["last"]:
            last_it_is = channels == "last" or (channels is None and misfit_last < misfit_first)
        else:
            last_it_is = fits["last"]
        places = last if last_it_is else first
        return None if prod(places) <= 1 else channels_last if last_it_is else channels_first
    if len(shape) == 3 and shape[2] > 1:
        # Patches that leave no rest first: 25 of 64 x 64 pixels are hardly patches of 12 or 13.
        for exact in (True, False):
            for extra in _EXTRA_TOKENS:
                grid = _grid(shape[1] - extra, size, exact)
                if grid is not None:
                    return TokenGrid(extra, grid)
    return None


def channels_of(module: nn.Module, model: nn.Module) -> Channels | None:
    """Whether what a module is made of takes channels first or last; None if both or neither is in it.

    Example:
        >>> channels_of(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.Identity())
        'first'
    """
    parts = list(module.modules())
    takes_first = any(isinstance(part, _TAKE_FIRST) for part in parts)
    takes_last = any(isinstance(part, _TAKE_LAST) for part in parts)
    if takes_first != takes_last:
        return "first" if takes_first else "last"
    # An activation takes either. Of a model whose norms are none of those that take channels last, it is the usual.
    return None if takes_first or any(isinstance(part, nn.LayerNorm) for part in model.modules()) else "first"


def _misfit(places: Sequence[int], size: Sequence[int]) -> float:
    """How many rows or columns are too many, or missing, for the images' proportions; padding may cost one.

    Infinite where there are more places than pixels.
    """
    height, width = size[-2:]
    rows, columns = places[-2:]
    if any(n > of for n, of in zip(places, size, strict=True)):
        return inf
    return abs(rows * width - columns * height) / max(height, width)


def _grid(places: int, size: Sequence[int], exact: bool) -> tuple[int, ...] | None:
    """The grid of so many places into which a square patch divides images of `size`, with no rest if `exact`."""
    if places < 2:
        return None
    if len(size) == 3:
        for frames in range(min(places, size[0]), 0, -1):
            frame = _grid(places // frames, size[1:], exact) if places % frames == 0 else None
            if frame is not None:
                return (frames, *frame)
        return None
    height, width = size
    for patch in range(1, min(height, width) + 1):
        if exact and (height % patch or width % patch):
            continue
        if (height // patch) * (width // patch) == places:
            return height // patch, width // patch
    return None

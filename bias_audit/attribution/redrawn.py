"""The model with other weights: as it was before it learned anything.

Enters: a borrowed model. Leaves: the same with weights drawn from a seed, for the time of a `with`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from bias_audit.attribution.sharded import draw_normal, resharding, whole


@contextmanager
def redrawn_weights(model: nn.Module) -> Iterator[Callable[[int], None]]:
    """A function that draws every weight of the model anew from a seed; on leaving each is what it was, bit for bit.

    Weights come from a normal distribution around 0 with the root mean square of the tensor that they are drawn for, so
    that every layer keeps its scale. Tensors of one number stay: a temperature or an exponent says nothing of places,
    and not every value of it gives a number. Buffers, such as BatchNorm's statistics, stay as well. Tensors are
    overwritten in place: optimizers, averages and tied weights keep theirs, and so does a graph that waits for its
    backward pass.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> before = net.weight.detach().clone()
        >>> with redrawn_weights(net) as redraw:
        ...     redraw(0)
        ...     changed = bool((net.weight != before).all())
        >>> changed, bool((net.weight == before).all())
        (True, True)
    """
    reshard = resharding(model)
    reshard()
    kept = [(p, p.detach().clone()) for p in model.parameters()]
    drawn = [(p, whole(original).float().square().mean().sqrt()) for p, original in kept if drawable(p)]

    def redraw(seed: int) -> None:
        reshard()
        generators = {device: torch.Generator(device).manual_seed(seed) for device in {p.device for p, _ in drawn}}
        for p, scale in drawn:
            draw_normal(p, scale, generators[p.device])

    try:
        yield redraw
    finally:
        reshard()
        for p, original in kept:
            p.data.copy_(original)


def drawable(p: nn.Parameter) -> bool:
    """Whether a parameter is drawn anew: floats, more than one of them."""
    return p.is_floating_point() and p.numel() > 1

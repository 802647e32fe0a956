"""Weights that are split over processes by FSDP2.

Enters: a model whose parameters may be `DTensor`s, of which each process holds a part. Leaves: the whole of one, a new
content for it, and the model with nothing but its parts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def resharding(model: nn.Module) -> Callable[[], None]:
    """A function that takes back the whole weights which FSDP2 put together for a pass, so that its parts are left.

    It leaves those of the outermost module about, in place of the parameters, until some later pass: what is written
    into them is lost then, and their memory may be free while they still look like parameters.
    """
    parts: list[Any] = [module for module in model.modules() if _is_sharded(module)]

    def reshard() -> None:
        for part in parts:
            part.reshard()

    return reshard


def class_name(model: nn.Module) -> str:
    """The name of the model's class, as it was before FSDP2 made another of it."""
    return type(model).__mro__[2 if _is_sharded(model) else 0].__name__


def _is_sharded(module: nn.Module) -> bool:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def whole(tensor: Tensor) -> Tensor:
    """A tensor, put together from its parts if it is split; all processes that hold one call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def draw_normal(p: Tensor, scale: Tensor, generator: torch.Generator) -> None:
    """Fill a parameter from a normal distribution around 0; each process draws the whole and keeps its part."""
    # `.data` leaves autograd's count of changes alone, which it may: in the end nothing has changed.
    if isinstance(p, DTensor):
        every = torch.empty(p.shape, dtype=p.dtype, device=p.device).normal_(generator=generator).mul_(scale)
        p.data.copy_(distribute_tensor(every, p.device_mesh, p.placements, src_data_rank=None))
    else:
        p.data.normal_(generator=generator).mul_(scale)

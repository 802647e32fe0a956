"""Differentiate linear layers only where there is a gradient.

Enters: the forward pass of a tail. Leaves: the same outputs and gradients, sooner on a CPU.

A head that reads a class token sends its gradient to one token of 197, and what lies between it and the last attention
treats each token by itself: the other 196 rows of those gradients are zero, and so is what a matrix makes of them. On a
ViT-B/16 that is two thirds of the tail. Which rows they are is known only when they are there, and a GPU would have to
be waited for to ask: there, all are multiplied.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class SparseRows(TorchFunctionMode):
    """Inside, linear layers on a CPU differentiate by their input alone, and skip rows of the gradient that are zero.

    Example:
        >>> rows = torch.ones(2, 5, 3, requires_grad=True)
        >>> with SparseRows():
        ...     out = nn.functional.linear(rows, torch.eye(3))
        >>> torch.autograd.grad(out[:, 0].sum(), rows)[0].sum(dim=2)
        tensor([[3., 0., 0., 0., 0.],
                [3., 0., 0., 0., 0.]])
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear and not kwargs and torch.is_grad_enabled() and _is_eligible(args[0]):
            return _SparseLinear.apply(*args)
        return func(*args, **(kwargs or {}))


def _is_eligible(rows: Tensor) -> bool:
    # A checkpoint computes its part again when differentiated, outside of this mode, and must find the same graph.
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return False
    # Autocast casts between the input and the weight, and differentiates that itself.
    return rows.requires_grad and rows.ndim > 2 and rows.device.type == "cpu" and not torch.is_autocast_enabled("cpu")


class _SparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(weight)
        return nn.functional.linear(rows, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        flat = gradient.reshape(-1, gradient.shape[-1])
        some = flat.abs().amax(dim=1).nonzero().flatten()
        if 2 * len(some) > len(flat):
            return gradient @ weight, None, None
        found = flat.new_zeros(len(flat), weight.shape[1])
        found[some] = flat[some] @ weight
        return found.view(*gradient.shape[:-1], -1), None, None

"""CAM, the method that Grad-CAM generalises: for global average pooling and one linear layer.

Enters: a borrowed model, its inputs, a target, the layer in front of the pooling. Leaves: maps `(B, *places)`, float32,
unnormalised, with the scores and outputs that belong to them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bias_audit.attribution.cam import Explanation, Sign, weighted
from bias_audit.attribution.capture import capture, logits_of, scores_of
from bias_audit.attribution.layers import Forward, call
from bias_audit.attribution.layouts import Layout
from bias_audit.attribution.targets import Target


def cam(
    model: nn.Module,
    inputs: Any,
    target: Target,
    layer: str,
    sign: Sign = "positive",
    *,
    forward: Forward = call,
    layout: Layout | None = None,
) -> Explanation:
    """CAM: channels weighted by what the linear layer behind the pooling gives them for the class.

    `map = sign(sum_k w_k^c A_k)`, equation 2 of arXiv 1512.04150, in which all of it is shown ("signed"). For a target
    other than a class's logit, w is the target's derivative by the logits times the layer's weight. The weights are
    read from the linear layer, not from a gradient at the activations.

    Raises:
        ValueError: what lies behind the layer is not global average pooling and one linear layer; and as `capture`.

    Example:
        >>> from bias_audit.attribution.borrow import borrowed
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        >>> with borrowed(net) as lent:
        ...     found = cam(lent, torch.rand(5, 3, 8, 8), lambda outputs: outputs[:, 0], "1")
        >>> found.maps.shape
        torch.Size([5, 6, 6])
    """
    linear = _LastLinear()

    def watched(model: nn.Module, inputs: Any) -> Any:
        with linear:
            return forward(model, inputs)

    taken = capture(model, inputs, target, layer, forward=watched, layout=layout)
    if linear.weight is None or not _same(logits_of(linear.output), taken.outputs):
        raise ValueError(_unsuited(layer, "the model's output is not what a linear layer puts out"))
    if not _same(linear.input, taken.activations.float().flatten(2).mean(dim=2)):
        raise ValueError(_unsuited(layer, "the linear layer does not take the average of this layer's places"))
    with torch.enable_grad():
        logits = taken.outputs.clone().requires_grad_()
        by_logit = torch.autograd.grad(scores_of(target, logits, len(logits)).sum(), logits)[0]
    maps = weighted(by_logit @ linear.weight.float(), taken.activations, sign)
    return Explanation(maps, taken.scores, taken.outputs)


class _LastLinear(TorchFunctionMode):
    """Keeps what the last linear layer of a forward pass took, weighed with, and put out."""

    input: Tensor
    weight: Tensor | None = None
    output: Tensor

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is nn.functional.linear:
            self.input, self.weight, self.output = args[0].detach(), args[1].detach(), output.detach()
        return output


def _same(one: Any, other: Any) -> bool:
    """Whether two tensors agree in half of the digits that the first one's precision has."""
    if not isinstance(other, Tensor) or one.shape != other.shape:
        return False
    tolerance = torch.finfo(one.dtype).eps ** 0.5
    return bool((one.float() - other.float()).abs().max() <= tolerance * other.float().abs().max())


def _unsuited(layer: str, why: str) -> str:
    return (
        f"CAM needs global average pooling and one linear layer behind layer {layer!r}, and {why}: name the layer in "
        "front of the pooling, or use gradcam, which needs neither"
    )

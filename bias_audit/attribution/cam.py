"""From activations and gradients to maps: the formulas, nothing else.

Enters: a layer's activations `(B, C, h, w)` and the gradients of the explained score with respect to them, same shape.
Leaves: maps `(B, h, w)`, float32, unnormalised. Every function here is batched, on the tensors' device, free of state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

Sign = Literal["positive", "negative", "absolute", "signed"]
Formula = Callable[[Tensor, Tensor, Sign], Tensor]


def gradcam(activations: Tensor, gradients: Tensor, sign: Sign = "positive") -> Tensor:
    """Grad-CAM: channels weighted by their spatially averaged gradient.

    `weights_k = mean_ij dy/dA_kij` and `map = sign(sum_k weights_k A_k)`; arXiv 1610.02391, equations 1 and 2.

    Example:
        >>> activations = torch.tensor([[[[1.0, 2.0]], [[4.0, 0.0]]]])
        >>> gradients = torch.tensor([[[[1.0, 1.0]], [[-1.0, 0.0]]]])
        >>> gradcam(activations, gradients)
        tensor([[[0., 2.]]])
    """
    weights = gradients.float().mean(dim=(2, 3))
    activations = activations.float()
    if sign == "absolute":
        return torch.einsum("bc,bchw->bhw", weights.abs(), activations.abs())
    return apply_sign(torch.einsum("bc,bchw->bhw", weights, activations), sign)


def hirescam(activations: Tensor, gradients: Tensor, sign: Sign = "positive") -> Tensor:
    """HiResCAM: each activation weighted by its own gradient, `map = sign(sum_k dy/dA_k * A_k)`; arXiv 2011.08891.

    Where the head is more than pooling and one linear layer, averaging the gradient first can lose a cue; this does
    not average.

    Example:
        >>> activations = torch.tensor([[[[1.0, 2.0]], [[4.0, 0.0]]]])
        >>> gradients = torch.tensor([[[[1.0, 1.0]], [[-1.0, 0.0]]]])
        >>> hirescam(activations, gradients)
        tensor([[[0., 2.]]])
        >>> hirescam(activations, gradients, "signed")
        tensor([[[-3.,  2.]]])
    """
    contributions = activations.float() * gradients.float()
    if sign == "absolute":
        return contributions.abs().sum(dim=1)
    return apply_sign(contributions.sum(dim=1), sign)


def apply_sign(maps: Tensor, sign: Sign) -> Tensor:
    """Keep of signed maps what `sign` asks for: "positive" evidence (the paper's ReLU, equation 2), "negative" evidence
    (its counterfactual explanation, section 3.3: the gradient's sign turned), or both ("signed")."""
    if sign == "positive":
        return maps.relu()
    if sign == "negative":
        return maps.neg().relu()
    return maps


FORMULAS: dict[str, Formula] = {"gradcam": gradcam, "hirescam": hirescam}


def formula(method: str | Formula) -> Formula:
    """The function that a method's name stands for; a function stands for itself.

    Raises:
        ValueError: no method has this name.
    """
    if callable(method):
        return method
    if method not in FORMULAS:
        raise ValueError(f"unknown method {method!r}: expected one of {', '.join(FORMULAS)}, or a function")
    return FORMULAS[method]


def check_sign(sign: str) -> None:
    """Raise ValueError unless `sign` is one of the four."""
    if sign not in get_args(Sign):
        raise ValueError(f"unknown sign {sign!r}: expected one of {', '.join(get_args(Sign))}")

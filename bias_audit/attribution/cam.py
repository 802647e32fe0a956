"""From activations and gradients to maps: the formulas, nothing else.

Enters: a layer's activations `(B, C, *places)` and the gradients of the explained score with respect to them, same
shape; places are `(h, w)`, of video `(t, h, w)`. Leaves: maps `(B, *places)`, float32, unnormalised. Every function
here is batched, on the tensors' device, free of state.

`sign` chooses the evidence. Where a map is linear in the gradient (Grad-CAM, HiResCAM, XGrad-CAM), "positive" is the
paper's ReLU of it, "negative" the ReLU of its negative, which is the map of the negated score (the counterfactual
explanation of arXiv 1610.02391, section 3.3), "absolute" the sum over channels of absolute contributions, "signed" all
of it. Where the paper rectifies the gradient (Grad-CAM++, LayerCAM), "negative" is again the map of the negated score,
"signed" the positive map minus the negative one, "absolute" their sum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

Sign = Literal["positive", "negative", "absolute", "signed"]
Formula = Callable[[Tensor, Tensor, Sign], Tensor]

SIGNS: tuple[Sign, ...] = get_args(Sign)


class Explanation(NamedTuple):
    """What a method gives: maps `(B, *places)`, float32, the explained scores `(B,)` and the model's outputs."""

    maps: Tensor
    scores: Tensor
    outputs: Any


# Each squaring doubles the ratio's exponent: 2^20 steps of power iteration tell eigenvalues 1e-5 apart.
_SQUARINGS = 20


def gradcam(activations: Tensor, gradients: Tensor, sign: Sign = "positive") -> Tensor:
    """Grad-CAM: channels weighted by their spatially averaged gradient.

    `weights_k = mean_ij dy/dA_kij` and `map = sign(sum_k weights_k A_k)`; arXiv 1610.02391, equations 1 and 2.

    Example:
        >>> activations = torch.tensor([[[[1.0, 2.0]], [[4.0, 0.0]]]])
        >>> gradients = torch.tensor([[[[1.0, 1.0]], [[-1.0, 0.0]]]])
        >>> gradcam(activations, gradients)
        tensor([[[0., 2.]]])
    """
    return weighted(gradients.float().flatten(2).mean(dim=2), activations, sign)


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


def xgradcam(activations: Tensor, gradients: Tensor, sign: Sign = "positive") -> Tensor:
    """XGrad-CAM: channels weighted by their gradient, averaged where they are active.

    `weights_k = sum_ij (A_kij / sum_ab A_kab) dy/dA_kij` and `map = sign(sum_k weights_k A_k)`; arXiv 2008.02312.
    The paper means activations after a ReLU; a channel whose activations sum to 0 has no weight.

    Example:
        >>> activations = torch.tensor([[[[1.0, 3.0]], [[4.0, 0.0]]]])
        >>> gradients = torch.tensor([[[[1.0, 0.0]], [[-1.0, 0.0]]]])
        >>> xgradcam(activations, gradients, "signed")
        tensor([[[-3.7500,  0.7500]]])
    """
    activations = activations.float()
    mass = activations.flatten(2).sum(dim=2)
    contributions = (activations * gradients.float()).flatten(2).sum(dim=2)
    return weighted(torch.where(mass == 0, 0, contributions / mass), activations, sign)


def gradcam_plusplus(activations: Tensor, gradients: Tensor, sign: Sign = "positive") -> Tensor:
    """Grad-CAM++: channels weighted by their positive gradients, each by its own alpha.

    With `g = dS/dA_kij` of the class score S, which the paper puts through an exponential so that the higher
    derivatives are powers of g: `alpha_kij = g^2 / (2 g^2 + g^3 sum_ab A_kab)`, `weights_k = sum_ij alpha_kij relu(g)`
    and `map = relu(sum_k weights_k A_k)`; arXiv 1710.11063, equation 19. The exponential also multiplies the
    whole map of an image by exp(S), which only scales it, may overflow, and is left out here.

    With activations after a ReLU, as in the paper, the weight `relu(g) / (2 + g sum_ab A_kab)` has a denominator of at
    least 2. Where activations may be negative it has a pole; at exactly 0 alpha counts as 0.

    Example:
        >>> activations = torch.tensor([[[[1.0, 3.0]], [[4.0, 0.0]]]])
        >>> gradients = torch.tensor([[[[1.0, 0.0]], [[-1.0, 0.0]]]])
        >>> gradcam_plusplus(activations, gradients)
        tensor([[[0.1667, 0.5000]]])
    """
    return _of_rectified(_gradcam_plusplus, activations.float(), gradients.float(), sign)


def layercam(activations: Tensor, gradients: Tensor, sign: Sign = "positive") -> Tensor:
    """LayerCAM: each activation weighted by its own positive gradient, `map = relu(sum_k relu(dy/dA_k) * A_k)`.

    Jiang, Zhang, Hou, Cheng and Wei, "LayerCAM: Exploring Hierarchical Class Activation Maps for Localization", IEEE
    Transactions on Image Processing 30, 2021, doi 10.1109/TIP.2021.3089943. It is meant for early layers too.

    Example:
        >>> activations = torch.tensor([[[[1.0, 2.0]], [[4.0, 0.0]]]])
        >>> gradients = torch.tensor([[[[1.0, 1.0]], [[-1.0, 0.0]]]])
        >>> layercam(activations, gradients)
        tensor([[[1., 2.]]])
        >>> layercam(activations, gradients, "signed")
        tensor([[[-3.,  2.]]])
    """
    return _of_rectified(_layercam, activations.float(), gradients.float(), sign)


def eigencam(activations: Tensor, gradients: Tensor, sign: Sign = "positive") -> Tensor:
    """EigenCAM: the activations projected on to their first principal component; it knows no class and no gradient.

    With the activations of an image as a matrix O (places x channels) and `O = U S V^T`, `map = O v_1`, without
    centring; arXiv 2008.00299. A singular vector's sign is arbitrary: here the map's sum is not negative. "positive" is
    its ReLU, "signed" all of it; activations after a ReLU give a map without negative values, so both agree.
    `gradients` are not looked at.

    Raises:
        ValueError: a sign other than these two.

    Example:
        >>> activations = torch.tensor([[[[3.0, 0.0]], [[4.0, 0.0]]]])
        >>> eigencam(activations, activations)
        tensor([[[5., 0.]]])
    """
    check_sign(sign, ONE_SIDED, NO_GRADIENT.format("EigenCAM"))
    matrix = activations.float().flatten(2)
    channels, places = matrix.shape[1:]
    # The smaller of the two Gram matrices has the same first eigenvalue, and one singular vector gives the other.
    if channels <= places:
        maps = torch.einsum("bc,bcp->bp", _first_eigenvector(matrix @ matrix.mT), matrix)
    else:
        left = _first_eigenvector(matrix.mT @ matrix)
        maps = left * torch.einsum("bcp,bp->bc", matrix, left).norm(dim=1, keepdim=True)
    maps = torch.where(maps.sum(dim=1, keepdim=True) < 0, -maps, maps)
    return apply_sign(maps.reshape(len(maps), *activations.shape[2:]), sign)


def weighted(weights: Tensor, activations: Tensor, sign: Sign) -> Tensor:
    """Maps of channels `(B, C, *places)` under weights `(B, C)`: of a formula that is linear in its weights."""
    activations = activations.float()
    if sign == "absolute":
        return torch.einsum("bc,bc...->b...", weights.abs(), activations.abs())
    return apply_sign(torch.einsum("bc,bc...->b...", weights, activations), sign)


def apply_sign(maps: Tensor, sign: Sign) -> Tensor:
    """Keep of signed maps what `sign` asks for: "positive" evidence (the paper's ReLU, equation 2), "negative" evidence
    (its counterfactual explanation, section 3.3: the gradient's sign turned), or both ("signed")."""
    if sign == "positive":
        return maps.relu()
    if sign == "negative":
        return maps.neg().relu()
    return maps


FORMULAS: dict[str, Formula] = {
    "gradcam": gradcam,
    "hirescam": hirescam,
    "gradcam++": gradcam_plusplus,
    "layercam": layercam,
    "xgradcam": xgradcam,
    "eigencam": eigencam,
}

# What methods without a gradient can show, and why no more.
ONE_SIDED: tuple[Sign, ...] = ("positive", "signed")
NO_GRADIENT = "{} takes no gradient, so it has no evidence against the score to show"


def check_sign(sign: str, allowed: tuple[Sign, ...] = SIGNS, why: str = "") -> None:
    """Raise ValueError unless `sign` is one of the four, and of those that a method allows; `why` it allows no more."""
    if sign not in SIGNS:
        raise ValueError(f"unknown sign {sign!r}: expected one of {', '.join(SIGNS)}")
    if sign not in allowed:
        raise ValueError(f"{why}: expected sign {' or '.join(map(repr, allowed))}, got {sign!r}")


def _of_rectified(
    positive: Callable[[Tensor, Tensor], Tensor], activations: Tensor, gradients: Tensor, sign: Sign
) -> Tensor:
    """The signs of a formula that rectifies the gradient: the negated score has the negated gradient."""
    if sign == "positive":
        return positive(activations, gradients)
    if sign == "negative":
        return positive(activations, -gradients)
    against = positive(activations, -gradients)
    return positive(activations, gradients) + (against if sign == "absolute" else -against)


def _gradcam_plusplus(activations: Tensor, gradients: Tensor) -> Tensor:
    # Equation 19 over g^2: where g is 0 the weight is 0 whatever alpha is, and the powers of a small g underflow.
    mass = activations.flatten(2).sum(dim=2, keepdim=True)
    flat = gradients.flatten(2)
    denominator = 2 + flat * mass
    weights = torch.where(denominator == 0, 0, flat.relu() / denominator).sum(dim=2)
    return weighted(weights, activations, "positive")


def _layercam(activations: Tensor, gradients: Tensor) -> Tensor:
    return (gradients.relu() * activations).sum(dim=1).relu()


def _first_eigenvector(gram: Tensor) -> Tensor:
    """The first eigenvector `(B, n)` of positive semi-definite matrices `(B, n, n)`, of length 1; 0 of a zero matrix.

    Power iteration by repeated squaring. `torch.linalg.eigh` would wait for the device to report whether it converged.
    """
    tiny = torch.finfo(gram.dtype).tiny
    for _ in range(_SQUARINGS):
        gram = gram / gram.flatten(1).norm(dim=1).clamp_min(tiny)[:, None, None]
        gram = gram @ gram
    # What is left is the projector v v^T times a number. Its column at the largest diagonal element is v, well scaled.
    largest = gram.diagonal(dim1=1, dim2=2).argmax(dim=1)
    column = gram.gather(2, largest[:, None, None].expand(-1, gram.shape[1], 1))[:, :, 0]
    length: Tensor = column.norm(dim=1, keepdim=True)
    return column / length.clamp_min(tiny)

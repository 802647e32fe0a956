"""The formulas of maps against their papers' equations computed another way, and the peers from PyPI."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torchvision
from torch import Tensor, nn

from bias_audit.attribution.borrow import borrowed
from bias_audit.attribution.cam import FORMULAS, SIGNS, Sign, eigencam, gradcam_plusplus, layercam, xgradcam
from bias_audit.attribution.capture import Capture, capture
from bias_audit.attribution.methods import METHODS
from bias_audit.attribution.targets import ClassLogit

Array = npt.NDArray[np.float64]

PLACES = {"image": (4, 6), "clip": (3, 4, 5)}


def draws(places: str, seed: int = 0, negative: bool = False) -> tuple[Tensor, Tensor]:
    """Activations, after a ReLU unless `negative`, and gradients of both signs, some of them 0.

    With activations below 0 gradients are small, so that the denominators of Grad-CAM++ stay clear of 0.
    """
    generator = torch.Generator().manual_seed(seed)
    activations, gradients = torch.randn(2, 3, 5, *PLACES[places], generator=generator)
    gradients = torch.where(gradients.abs() < 0.2, 0, gradients)
    return (activations, gradients / 50) if negative else (activations.relu(), gradients)


# The formulas, image by image and place by place. Each gives the contributions of the channels, `(C, *places)`.


def naive_gradcam(a: Array, g: Array) -> Array:
    return np.stack([g[k].mean() * a[k] for k in range(len(a))])


def naive_hirescam(a: Array, g: Array) -> Array:
    return a * g


def naive_xgradcam(a: Array, g: Array) -> Array:
    terms = []
    for k in range(len(a)):
        weight = 0.0
        for place in np.ndindex(a[k].shape):
            weight += a[k][place] / a[k].sum() * g[k][place]
        terms.append(weight * a[k])
    return np.stack(terms)


def naive_gradcam_plusplus(a: Array, g: Array) -> Array:
    """Equation 19 for alpha, and the weights of equation 5."""
    terms = []
    for k in range(len(a)):
        weight = 0.0
        for place in np.ndindex(a[k].shape):
            slope = g[k][place]
            below = 2 * slope**2 + sum(a[k][other] * slope**3 for other in np.ndindex(a[k].shape))
            alpha = slope**2 / below if below else 0.0
            weight += alpha * max(slope, 0.0)
        terms.append(weight * a[k])
    return np.stack(terms)


def naive_layercam(a: Array, g: Array) -> Array:
    return np.stack([np.maximum(g[k], 0) * a[k] for k in range(len(a))])


def naive_eigencam(a: Array, g: Array) -> Array:
    matrix = a.reshape(len(a), -1).T
    _, _, right = np.linalg.svd(matrix, full_matrices=False)
    projected = matrix @ right[0]
    return (projected * np.sign(projected.sum())).reshape(1, *a.shape[1:])


NAIVE: dict[str, Callable[[Array, Array], Array]] = {
    "gradcam": naive_gradcam,
    "hirescam": naive_hirescam,
    "xgradcam": naive_xgradcam,
    "gradcam++": naive_gradcam_plusplus,
    "layercam": naive_layercam,
    "eigencam": naive_eigencam,
}
RECTIFY_THE_GRADIENT = ("gradcam++", "layercam")


def naive(name: str, activations: Tensor, gradients: Tensor, sign: Sign) -> Tensor:
    maps = []
    for a, g in zip(activations.double().numpy(), gradients.double().numpy(), strict=True):
        terms = NAIVE[name](a, g)
        total = terms.sum(axis=0)
        if name in RECTIFY_THE_GRADIENT:
            positive, negative = np.maximum(total, 0), np.maximum(NAIVE[name](a, -g).sum(axis=0), 0)
            absolute, signed = positive + negative, positive - negative
        else:
            positive, negative = np.maximum(total, 0), np.maximum(-total, 0)
            absolute, signed = np.abs(terms).sum(axis=0), total
        maps.append({"positive": positive, "negative": negative, "absolute": absolute, "signed": signed}[sign])
    return torch.from_numpy(np.stack(maps)).float()


def test_every_formula_has_a_derivation_here() -> None:
    assert set(NAIVE) == set(FORMULAS)


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize(("name", "sign"), [(name, sign) for name in FORMULAS for sign in METHODS[name].signs])
def test_formulas_against_loops(name: str, sign: Sign, places: str, negative: bool) -> None:
    activations, gradients = draws(places, negative=negative)
    got = FORMULAS[name](activations, gradients, sign)
    assert got.shape == (3, *PLACES[places])
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, naive(name, activations, gradients, sign), atol=1e-5, rtol=1e-4)
    assert got.abs().max() > 0


@pytest.mark.parametrize("name", FORMULAS)
def test_formulas_are_pure_batched_and_never_wait_for_the_device(name: str) -> None:
    activations, gradients = draws("image")
    kept = activations.clone(), gradients.clone()
    together = FORMULAS[name](activations, gradients, "signed")
    alone = [FORMULAS[name](a[None], g[None], "signed") for a, g in zip(activations, gradients, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-6, rtol=1e-5)
    assert torch.equal(activations, kept[0]) and torch.equal(gradients, kept[1])
    # A tensor on the meta device has no values to wait for: `.item()` or a branch on one would raise.
    assert FORMULAS[name](activations.to("meta"), gradients.to("meta"), "signed").shape == (3, 4, 6)
    low = FORMULAS[name](activations.bfloat16(), gradients.bfloat16(), "positive")
    assert low.dtype == torch.float32


def derivatives(score: Callable[[Tensor], Tensor], at: Tensor, index: tuple[int, ...], order: int) -> list[Tensor]:
    """The first derivatives, up to `order`, of a function of one element of a tensor."""
    entry = at[index].clone().requires_grad_()
    mask = torch.zeros_like(at)
    mask[index] = 1
    value, found = score(torch.where(mask == 1, entry, at)), []
    for _ in range(order):
        (value,) = torch.autograd.grad(value, entry, create_graph=True)
        found.append(value)
    return found


def test_gradcam_plusplus_is_what_third_derivatives_of_the_exponential_give() -> None:
    torch.manual_seed(0)
    activations = torch.rand(1, 4, 3, 3, dtype=torch.float64)
    weight = torch.tensor([2.0, -1.0, 0.5, 3.0], dtype=torch.float64)

    def score(a: Tensor) -> Tensor:
        return a.mean(dim=(2, 3)).squeeze(0) @ weight

    def exponential(a: Tensor) -> Tensor:
        return score(a).exp()

    weights = []
    for k in range(4):
        total = torch.zeros((), dtype=torch.float64)
        for i, j in np.ndindex(3, 3):
            first, second, third = derivatives(exponential, activations, (0, k, i, j), 3)
            # Equation 10, whose sum over places is A's alone, and equation 5.
            alpha = second / (2 * second + activations[0, k].sum() * third)
            total = total + alpha * first.relu()
        weights.append(total)
    expected = torch.einsum("c,chw->hw", torch.stack(weights), activations[0]).relu()
    gradients = (weight / 9)[None, :, None, None].expand(1, 4, 3, 3)
    got = gradcam_plusplus(activations, gradients) * score(activations).exp()
    torch.testing.assert_close(got[0], expected.float(), atol=1e-6, rtol=1e-5)
    assert expected.max() > 0
    # The alphas matter: without them the channels weigh otherwise.
    flat = torch.einsum("bc,bchw->bhw", gradients.relu().flatten(2).sum(dim=2), activations).relu().float()
    assert (flat / flat.max() - got / got.max()).abs().max() > 0.01


def test_gradcam_plusplus_where_its_alpha_is_nothing_over_nothing() -> None:
    activations, gradients = draws("image")
    assert torch.equal(gradcam_plusplus(activations, torch.zeros_like(gradients)), torch.zeros(3, 4, 6))
    # Squares and cubes of such gradients are 0 in float32; alpha is 1/2 all the same.
    tiny = gradients * 1e-25
    expected = torch.einsum("bc,bchw->bhw", (tiny * 1e25).relu().flatten(2).sum(dim=2) / 2, activations)
    torch.testing.assert_close(gradcam_plusplus(activations, tiny) * 1e25, expected)
    # The pole, which only activations below 0 have: g sum A = -2.
    pole = gradcam_plusplus(torch.full((1, 1, 1, 2), -1.0), torch.full((1, 1, 1, 2), 1.0))
    assert torch.equal(pole, torch.zeros(1, 1, 2))


def test_xgradcam_of_a_channel_that_is_nowhere_active() -> None:
    activations, gradients = draws("image")
    activations[:, 2] = 0
    expected = xgradcam(activations[:, [0, 1, 3, 4]], gradients[:, [0, 1, 3, 4]], "signed")
    torch.testing.assert_close(xgradcam(activations, gradients, "signed"), expected)


def test_layercam_and_gradcam_plusplus_show_for_and_against_apart() -> None:
    activations, gradients = draws("image")
    for formula in (layercam, gradcam_plusplus):
        positive, negative, absolute, signed = (formula(activations, gradients, sign) for sign in SIGNS)
        torch.testing.assert_close(negative, formula(activations, -gradients, "positive"))
        torch.testing.assert_close(signed, positive - negative)
        torch.testing.assert_close(absolute, positive + negative)


@pytest.mark.parametrize("shape", [(2, 40, 3, 4), (2, 3, 9, 8), (2, 30, 2, 3, 4)])
def test_eigencam_with_few_places_or_few_channels(shape: tuple[int, ...]) -> None:
    activations = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    expected = naive("eigencam", activations, activations, "signed")
    torch.testing.assert_close(eigencam(activations, activations, "signed"), expected, atol=1e-4, rtol=1e-3)


def test_eigencam_tells_components_that_are_nearly_as_large_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(64, 64, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(49, 49, generator=generator))
    sizes = torch.full((49,), 0.1)
    sizes[:2] = torch.tensor([1.0, 0.999])
    activations = (left[:, :49] * sizes @ right.T).reshape(1, 64, 7, 7)
    expected = (right[:, 0] * right[:, 0].sum().sign()).reshape(1, 7, 7)
    torch.testing.assert_close(eigencam(activations, activations, "signed"), expected, atol=1e-4, rtol=0)


def test_eigencam_has_a_sign_and_no_class() -> None:
    activations, gradients = draws("image")
    maps = eigencam(activations, gradients, "signed")
    assert maps.min() >= 0
    torch.testing.assert_close(eigencam(activations, -gradients), maps)
    torch.testing.assert_close(eigencam(-activations, gradients, "signed"), maps)
    assert torch.equal(eigencam(torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 2, 2)), torch.zeros(1, 2, 2))
    # No centring: a constant added to a channel is part of what is projected.
    assert (eigencam(activations + 1, gradients) - maps).abs().max() > 0.1


# The peers.


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    torch.manual_seed(3)
    return torchvision.models.resnet18(num_classes=7).eval()


@pytest.fixture(scope="module")
def taken(resnet: nn.Module) -> Capture:
    torch.manual_seed(4)
    with borrowed(resnet) as lent:
        return capture(lent, torch.rand(3, 3, 96, 96), ClassLogit(torch.tensor([1, 5, 2])), "layer4")


@pytest.mark.parametrize("name", ["layercam", "xgradcam", "gradcam++", "eigencam"])
def test_formulas_against_the_peer(name: str, resnet: nn.Module, taken: Capture) -> None:
    from pytorch_grad_cam import EigenCAM, GradCAMPlusPlus, LayerCAM, XGradCAM

    peer = {"layercam": LayerCAM, "xgradcam": XGradCAM, "gradcam++": GradCAMPlusPlus, "eigencam": EigenCAM}[name]
    # The peer adds 1e-6 to the denominators of Grad-CAM++, more than the squares of most gradients: so 1000 times them.
    a, g = taken.activations, taken.gradients * 1000
    with peer(model=resnet, target_layers=[resnet.layer4]) as cam_of_peer:
        theirs = torch.from_numpy(cam_of_peer.get_cam_image(None, None, None, a.numpy(), g.numpy(), False))
    if name == "eigencam":
        # The peer centres, which the paper does not, and leaves the sign as it comes.
        ours = eigencam(a - a.mean(dim=(2, 3), keepdim=True), g, "signed")
        theirs = theirs * (theirs * ours).flatten(1).sum(dim=1).sign()[:, None, None]
    else:
        ours = FORMULAS[name](a, g, "positive" if name in RECTIFY_THE_GRADIENT else "signed")
    scale = theirs.abs().amax(dim=(1, 2), keepdim=True)
    torch.testing.assert_close(ours / scale, theirs / scale, atol=2e-4, rtol=0)

"""Guided Backpropagation, Deconvolution, Guided Grad-CAM against numpy, captum, and every way to call a rectifier."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bias_audit.attribution.backprop import deconvolution, guided_backprop, guided_gradcam
from bias_audit.attribution.borrow import borrowed
from bias_audit.attribution.cam import SIGNS, Sign, gradcam
from bias_audit.attribution.capture import capture
from bias_audit.attribution.targets import ClassLogit, Target, predicted_logit

METHODS = {"guided": guided_backprop, "deconvolution": deconvolution}
CLASSES = torch.tensor([0, 1, 2, 0])


@pytest.fixture
def images() -> Tensor:
    return torch.rand(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def ran(name: str, model: nn.Module, inputs: Any, target: Target, **options: Any) -> Tensor:
    with borrowed(model) as lent:
        return METHODS[name](lent, inputs, target, **options)[0]


class Deep(nn.Module):
    """Three linear layers with two rectifiers between, each called as `rectify` says."""

    def __init__(self, rectify: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(108, 20), nn.Linear(20, 15), nn.Linear(15, 3)
        self.rectify = rectify

    def forward(self, images: Tensor) -> Tensor:
        return self.third(self.rectify(self.second(self.rectify(self.first(images.flatten(1))))))


@pytest.fixture
def deep() -> Deep:
    torch.manual_seed(1)
    return Deep().eval()


def twin(deep: Deep, rectify: Callable[[Tensor], Tensor]) -> Deep:
    other = Deep(rectify).eval()
    other.load_state_dict(deep.state_dict(), strict=False)
    return other


def by_hand(deep: Deep, images: Tensor, classes: Tensor, name: str, turned: int, most: float = np.inf) -> Tensor:
    """What the score, or its negative, sends back, `(B, 3, H, W)`: figure 1 of arXiv 1412.6806."""
    weights = [layer.weight.detach().double().numpy() for layer in (deep.first, deep.second, deep.third)]
    biases = [layer.bias.detach().double().numpy() for layer in (deep.first, deep.second, deep.third)]
    found = []
    for image, label in zip(images.flatten(1).double().numpy(), classes.tolist(), strict=True):
        before, signal = [], image
        for weight, bias in zip(weights[:2], biases[:2], strict=True):
            before.append(weight @ signal + bias)
            signal = np.clip(before[-1], 0, most)
        back: npt.NDArray[np.float64] = turned * weights[2][label]
        for weight, x in zip(weights[1::-1], before[::-1], strict=True):
            back = np.where(back > 0, back, 0)
            if name == "guided":
                back = np.where((x > 0) & (x < most), back, 0)
            back = back @ weight
        found.append(back.reshape(3, 6, 6))
    return torch.from_numpy(np.stack(found)).float()


@pytest.mark.parametrize("sign", SIGNS)
@pytest.mark.parametrize("name", METHODS)
def test_against_numpy(name: str, sign: Sign, deep: Deep, images: Tensor) -> None:
    back = by_hand(deep, images, CLASSES, name, -1 if sign == "negative" else 1)
    total = back.sum(dim=1)
    expected = {"signed": total, "absolute": back.abs().sum(dim=1)}.get(sign, total.relu())
    with borrowed(deep) as lent:
        maps, scores, outputs = METHODS[name](lent, images, ClassLogit(CLASSES), sign)
    torch.testing.assert_close(maps, expected, atol=1e-6, rtol=1e-4)
    assert maps.dtype == torch.float32 and maps.abs().amax(dim=(1, 2)).min() > 0
    with torch.no_grad():
        assert torch.equal(outputs, deep(images))
    assert torch.equal(scores, outputs.gather(1, CLASSES[:, None])[:, 0])


def test_the_two_and_the_plain_gradient_differ(deep: Deep, images: Tensor) -> None:
    guided, deconvolved = (ran(name, deep, images, ClassLogit(CLASSES), sign="signed") for name in METHODS)
    images.requires_grad_()
    (plain,) = torch.autograd.grad(deep(images).gather(1, CLASSES[:, None]).sum(), images)
    maps = [guided, deconvolved, plain.sum(dim=1)]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (maps[one] - maps[other]).abs().max() > 0.05 * maps[one].abs().max()


def of_a_view(x: Tensor) -> Tensor:
    x.view(-1)[: x.numel() // 2].relu_()
    F.relu(x.view(-1)[x.numel() // 2 :], inplace=True)
    return x


def in_parts(x: Tensor) -> Tensor:
    return torch.cat([F.relu(part, inplace=True) for part in (x[:, :4], x[:, 4:])], dim=1)


WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "module": nn.ReLU(),
    "module in place": nn.ReLU(inplace=True),
    "function": F.relu,
    "function in place": lambda x: F.relu(x, inplace=True),
    "method": lambda x: x.relu(),
    "method in place": lambda x: x.relu_(),
    "return value left": lambda x: (x.relu_(), x)[1],
    "on views": of_a_view,
    "on parts": in_parts,
    "threshold": nn.Threshold(0, 0),
    "clamp": lambda x: x.clamp(min=0),
    "clamp in place": lambda x: x.clamp_(min=0),
    "clamp_min": lambda x: x.clamp_min(0.0),
    "token-wise": lambda x: x.unsqueeze(1).view(len(x), 1, -1).relu_().squeeze(1),
    "in a checkpoint": lambda x: checkpoint(F.relu, x, use_reentrant=False),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", METHODS)
def test_a_rectifier_is_one_however_it_is_called(name: str, way: str, deep: Deep, images: Tensor) -> None:
    expected = by_hand(deep, images, CLASSES, name, 1).sum(dim=1)
    got = ran(name, twin(deep, WAYS[way]), images, ClassLogit(CLASSES), sign="signed")
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    "way",
    [nn.ReLU6(), nn.ReLU6(inplace=True), F.relu6, nn.Hardtanh(0, 6), lambda x: x.clamp(0, 6), lambda x: x.clamp_(0, 6)],
)
@pytest.mark.parametrize("name", METHODS)
def test_relu6(name: str, way: Callable[[Tensor], Tensor], deep: Deep, images: Tensor) -> None:
    images = images * 40
    got = ran(name, twin(deep, way), images, ClassLogit(CLASSES), sign="signed")
    torch.testing.assert_close(got, by_hand(deep, images, CLASSES, name, 1, most=6).sum(dim=1), atol=1e-6, rtol=1e-4)
    with torch.no_grad():
        assert deep.first(images.flatten(1)).max() > 6


# The peer replaces the gradient at `nn.ReLU` modules; these networks have no other rectifiers.
@pytest.mark.parametrize("network", ["vgg11", "resnet18", "mobilenet_v2 with ReLU"])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.filterwarnings("ignore:Setting backward hooks.*", "ignore:Input Tensor 0 did not already require.*")
def test_against_the_peer(name: str, network: str) -> None:
    from captum.attr import Deconvolution, GuidedBackprop

    torch.manual_seed(2)
    if network.startswith("mobilenet"):
        model = torchvision.models.mobilenet_v2(num_classes=3, dropout=0.0)
        for module in model.modules():
            for key, child in module.named_children():
                if isinstance(child, nn.ReLU6):
                    setattr(module, key, nn.ReLU(inplace=True))
    else:
        model = torchvision.models.get_model(network, num_classes=3)
    model.eval()
    batch = torch.rand(2, 3, 64, 64)
    classes = torch.tensor([2, 0])
    ours = ran(name, model, batch, ClassLogit(classes), sign="signed")
    peer = GuidedBackprop(model) if name == "guided" else Deconvolution(model)
    theirs = peer.attribute(batch.clone(), target=classes).sum(dim=1)
    scale = theirs.abs().amax(dim=(1, 2), keepdim=True)
    torch.testing.assert_close(ours / scale, theirs / scale, atol=1e-4, rtol=0)
    assert scale.min() > 0


# Guided Grad-CAM.


class Convolutional(nn.Module):
    def __init__(self, clip: bool = False) -> None:
        super().__init__()
        convolution, pooling = (nn.Conv3d, nn.MaxPool3d) if clip else (nn.Conv2d, nn.MaxPool2d)
        self.features = nn.Sequential(convolution(3, 6, 3, padding=1), nn.ReLU(), pooling(2), convolution(6, 8, 1))
        self.relu = nn.ReLU()
        self.head = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.relu(self.features(images)).flatten(2).mean(dim=2))


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("sign", SIGNS)
def test_guided_gradcam_is_the_product(sign: Sign, clip: bool) -> None:
    torch.manual_seed(3)
    model = Convolutional(clip).eval()
    inputs = torch.rand(4, 3, *((4,) if clip else ()), 6, 6)
    target = ClassLogit(CLASSES)
    with borrowed(model) as lent:
        maps, scores, _ = guided_gradcam(lent, inputs, target, "features", sign)
        taken = capture(lent, inputs, target, "features")
        fine = guided_backprop(lent, inputs, target, sign)[0]
    coarse = gradcam(taken.activations, -taken.gradients if sign == "negative" else taken.gradients)
    mode = "trilinear" if clip else "bilinear"
    up = F.interpolate(coarse[:, None], inputs.shape[2:], mode=mode, align_corners=False)[:, 0]
    torch.testing.assert_close(maps, up * fine)
    assert maps.shape == (4, *inputs.shape[2:]) and maps.abs().max() > 0
    assert torch.equal(scores, taken.scores)
    if sign == "negative":
        with borrowed(model) as lent:
            counter = guided_gradcam(lent, inputs, lambda outputs: -target(outputs), "features")[0]
        torch.testing.assert_close(maps, counter)


@pytest.mark.filterwarnings("ignore:Setting backward hooks.*", "ignore:Input Tensor 0 did not already require.*")
def test_guided_gradcam_against_the_peer() -> None:
    from captum.attr import GuidedGradCam

    torch.manual_seed(3)
    model = Convolutional().eval()
    inputs = torch.rand(4, 3, 6, 6)
    peer = GuidedGradCam(model, model.features)
    theirs = peer.attribute(inputs.clone(), target=CLASSES, interpolate_mode="bilinear").sum(dim=1)
    with borrowed(model) as lent:
        ours = guided_gradcam(lent, inputs, ClassLogit(CLASSES), "features", "signed")[0]
    torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-4)
    assert theirs.abs().max() > 0


# Models as training leaves them.


@pytest.mark.parametrize("name", METHODS)
def test_whatever_state_the_model_is_in(name: str, images: Tensor) -> None:
    class Scaled(Convolutional):
        """Scales its images in place, and runs its features without grad where told to."""

        def __init__(self) -> None:
            super().__init__()
            self.no_grad = False
            self.norm = nn.BatchNorm2d(8)

        def forward(self, images: Tensor) -> Tensor:
            images.mul_(2)
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.no_grad):
                features = self.relu(self.norm(self.features(images)))
            return self.head(features.flatten(2).mean(dim=2))

    torch.manual_seed(4)
    model = Scaled()
    model(images.clone())
    model.eval()
    kept = images.clone()
    expected = ran(name, model, images, ClassLogit(CLASSES))
    assert torch.equal(images, kept) and expected.max() > 0
    model.train().requires_grad_(False)
    with torch.no_grad():
        torch.testing.assert_close(ran(name, model, images, ClassLogit(CLASSES)), expected)
    with torch.inference_mode():
        torch.testing.assert_close(ran(name, model, images + 0, ClassLogit(CLASSES)), expected)
    model.no_grad = True
    torch.testing.assert_close(ran(name, model, images, ClassLogit(CLASSES)), expected)
    assert torch.is_grad_enabled()
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())


def test_compiled_and_in_low_precision(deep: Deep, images: Tensor) -> None:
    expected = ran("guided", deep, images, ClassLogit(CLASSES))
    compiled = torch.compile(deep, backend="eager")
    compiled(images)
    torch.testing.assert_close(ran("guided", compiled, images, ClassLogit(CLASSES)), expected)
    low = twin(deep, torch.relu).bfloat16()
    got = ran("guided", low, images, ClassLogit(CLASSES))
    assert got.dtype == torch.float32
    assert torch.cosine_similarity(got.flatten(1), expected.flatten(1)).min() > 0.98


class TwoInputs(nn.Module):
    """A rectified network for the image beside one with GELU for the question, joined by a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.image = Convolutional()
        self.question = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(8, 3), nn.GELU())

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.image(batch["image"]) * self.question(batch["question"]).sigmoid()


@pytest.mark.parametrize("name", METHODS)
def test_only_what_lies_between_image_and_score_counts(name: str, images: Tensor) -> None:
    torch.manual_seed(5)
    model = TwoInputs().eval()
    questions = torch.tensor([[0, 1], [2, 3], [4, 0], [1, 1]])
    got = ran(name, model, {"question": questions, "image": images}, ClassLogit(CLASSES), sign="signed")
    with torch.no_grad():
        gates = model.question(questions).sigmoid().gather(1, CLASSES[:, None])
    alone = ran(name, model.image, images, lambda o: (o.gather(1, CLASSES[:, None]) * gates)[:, 0], sign="signed")
    torch.testing.assert_close(got, alone)
    assert got.abs().max() > 0


# What it is not defined for.

OTHERS = {
    "GELU": nn.GELU(),
    "SiLU": nn.SiLU(),
    "Hardswish": nn.Hardswish(),
    "Mish": nn.Mish(),
    "LeakyReLU": nn.LeakyReLU(),
    "PReLU": nn.PReLU(),
    "RReLU": nn.RReLU(),
    "ELU": nn.ELU(),
    "CELU": nn.CELU(),
    "Softplus": nn.Softplus(),
}


@pytest.mark.parametrize("activation", OTHERS)
@pytest.mark.parametrize("name", METHODS)
def test_another_activation_is_named(name: str, activation: str, deep: Deep, images: Tensor) -> None:
    def half(x: Tensor) -> Tensor:
        return torch.cat([x[:, :7].relu(), OTHERS[activation](x[:, 7:])], dim=1)

    model = twin(deep, half)
    with pytest.raises(ValueError, match=rf"defined for ReLU, the model goes through {activation}: use another"):
        ran(name, model, images, predicted_logit)
    assert ran(name, deep, images, predicted_logit).shape == (4, 6, 6)


@pytest.mark.parametrize(
    ("rectify", "message"),
    [
        (torch.tanh, "there is none between the score and the images"),
        (nn.Hardtanh(), "there is none between the score and the images"),
        (lambda x: x.clamp(min=-1), "there is none between the score and the images"),
        (lambda x: checkpoint(F.gelu, x, use_reentrant=True), "cannot be reached"),
    ],
)
def test_a_model_without_rectifiers(
    rectify: Callable[[Tensor], Tensor], message: str, deep: Deep, images: Tensor
) -> None:
    with pytest.raises(ValueError, match=message):
        ran("guided", twin(deep, rectify), images, predicted_logit)


class Scripted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x * 2)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")
def test_a_script_that_has_been_optimised_is_refused(deep: Deep, images: Tensor) -> None:
    model = twin(deep, torch.jit.script(Scripted()))
    for _ in range(3):
        model(images.clone().requires_grad_())
    with pytest.raises(ValueError, match=r"cannot be reached \(DifferentiableGraph\)"):
        ran("guided", model, images, predicted_logit)


def test_inputs_that_cannot_be_differentiated(deep: Deep, images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected images of floats.*got torch.uint8"):
        ran("guided", deep, images.byte(), predicted_logit)
    with pytest.raises(ValueError, match=r"expected images .* among the inputs, found neither"):
        ran("guided", deep, {"question": torch.zeros(3)}, predicted_logit)
    with pytest.raises(ValueError, match="does not depend on the images"):
        ran("guided", deep, images, lambda outputs: torch.zeros(4))
    with pytest.raises(ValueError, match="does not depend on the images"):
        ran("guided", deep, images, lambda outputs: deep.third.bias.sum() + torch.zeros(4))

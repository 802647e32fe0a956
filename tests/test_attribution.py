"""Heatmaps against closed forms, naive loops and the peers from PyPI; and the model given back as it was."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn

from bias_audit import explain
from bias_audit.attribution.borrow import borrowed
from bias_audit.attribution.capture import capture
from bias_audit.attribution.layers import find_layer
from bias_audit.attribution.targets import ClassLogit


class PooledNet(nn.Module):
    """Convolutions, global pooling, one linear layer: Grad-CAM has a closed form on it."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 6, 3, padding=1)
        )
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(6, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.dropout(self.features(images).mean(dim=(2, 3))))


class HiddenNet(PooledNet):
    """The same with a hidden layer in front of which nothing is pooled: averaging the gradient loses something."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=inplace)
        self.hidden = nn.Linear(6 * 4 * 4, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.relu(self.features(images)).flatten(1))))


@pytest.fixture
def images() -> Tensor:
    return torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def pooled() -> PooledNet:
    torch.manual_seed(1)
    return PooledNet().eval()


@pytest.fixture
def hidden() -> HiddenNet:
    torch.manual_seed(2)
    return HiddenNet().eval()


def autograd_by_hand(
    net: nn.Module, features: nn.Module, rest: Callable[[Tensor], Tensor], images: Tensor, classes: Tensor
):
    """Activations and gradients of each image's class logit, one image at a time."""
    activations, gradients = [], []
    for image, label in zip(images, classes, strict=True):
        with torch.no_grad():
            a = features(image[None])
        a.requires_grad_()
        rest(a)[0, label].backward()
        activations.append(a.detach()[0])
        gradients.append(a.grad[0])
        net.zero_grad()
    return torch.stack(activations), torch.stack(gradients)


def test_gradcam_on_pooling_and_linear_weighs_channels_by_the_classifier(pooled: PooledNet, images: Tensor) -> None:
    classes = torch.tensor([0, 1, 2, 0, 1])
    heatmaps = explain(pooled, images, target=classes, layer="features")
    with torch.no_grad():
        features = pooled.features(images)
    places = features.shape[2] * features.shape[3]
    expected = torch.stack(
        [(pooled.head.weight[c][:, None, None] * a).sum(0) for a, c in zip(features, classes, strict=True)]
    )
    torch.testing.assert_close(heatmaps.maps, expected.relu() / places)
    assert heatmaps.maps.dtype == torch.float32
    # There each activation's gradient is its channel's mean gradient, so both methods agree.
    torch.testing.assert_close(
        explain(pooled, images, target=classes, layer="features", method="hirescam").maps, heatmaps.maps
    )


@pytest.mark.parametrize("sign", ["positive", "negative", "absolute", "signed"])
def test_formulas_against_loops(hidden: HiddenNet, images: Tensor, sign: str) -> None:
    classes = torch.tensor([0, 1, 2, 0, 1])
    rest = lambda a: hidden.head(torch.tanh(hidden.hidden(hidden.relu(a).flatten(1))))  # noqa: E731
    activations, gradients = autograd_by_hand(hidden, hidden.features, rest, images, classes)
    for method in ("gradcam", "hirescam"):
        got = explain(hidden, images, target=classes, layer="features", method=method, sign=sign).maps
        for b in range(len(images)):
            for i in range(activations.shape[2]):
                for j in range(activations.shape[3]):
                    terms = []
                    for k in range(activations.shape[1]):
                        weight = gradients[b, k].mean() if method == "gradcam" else gradients[b, k, i, j]
                        terms.append(float(weight * activations[b, k, i, j]))
                    total = sum(terms)
                    expected = {
                        "positive": max(total, 0),
                        "negative": max(-total, 0),
                        "absolute": sum(map(abs, terms)),
                        "signed": total,
                    }[sign]
                    assert got[b, i, j].item() == pytest.approx(expected, abs=1e-6)


def test_methods_differ_where_the_head_is_not_linear(hidden: HiddenNet, images: Tensor) -> None:
    one, other = (
        explain(hidden, images, layer="features", method=m, sign="signed").maps for m in ("gradcam", "hirescam")
    )
    assert (one - other).abs().max() > 0.01 * one.abs().max()


PEER_MODELS = {
    "resnet18": "layer4",
    "mobilenet_v3_small": "features",
    "efficientnet_b0": "features",
    "convnext_tiny": "features",
}


@pytest.mark.parametrize("name", PEER_MODELS)
def test_gradcam_equals_the_peers(name: str) -> None:
    from captum.attr import LayerGradCam
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    torch.manual_seed(3)
    model = torchvision.models.get_model(name, weights=None, num_classes=7).eval()
    layer = model.get_submodule(PEER_MODELS[name])
    images = torch.rand(3, 3, 96, 96)
    classes = torch.tensor([1, 5, 2])
    # The sign is chosen so that no image's map is all zero: an untrained model's often is.
    signed = explain(model, images, target=classes, layer=PEER_MODELS[name], sign="signed").maps
    captums = LayerGradCam(model, layer).attribute(images, target=classes, relu_attributions=False)[:, 0]
    scale = captums.abs().amax(dim=(1, 2), keepdim=True)
    torch.testing.assert_close(signed / scale, captums / scale, atol=1e-4, rtol=0)

    heatmaps = explain(model, images, target=classes, layer=PEER_MODELS[name])
    with GradCAM(model=model, target_layers=[layer]) as cam:
        peers = cam(input_tensor=images, targets=[ClassifierOutputTarget(int(c)) for c in classes])

    def normalised(maps: Tensor) -> Tensor:
        low, high = maps.amin(dim=(1, 2), keepdim=True), maps.amax(dim=(1, 2), keepdim=True)
        return (maps - low) / (high - low + 1e-7)

    # The peer scales to [0, 1], upsamples, and scales again.
    ours = torch.nn.functional.interpolate(normalised(heatmaps.maps)[:, None], (96, 96), mode="bilinear")[:, 0]
    torch.testing.assert_close(normalised(ours), torch.from_numpy(peers), atol=1e-4, rtol=0)


def test_a_batch_gives_what_its_images_give_one_by_one(hidden: HiddenNet, images: Tensor) -> None:
    together = explain(hidden, images, layer="features").maps
    alone = torch.cat([explain(hidden, image[None], layer="features").maps for image in images])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)


def test_upsample_is_bilinear_without_aligned_corners(pooled: PooledNet, images: Tensor) -> None:
    heatmaps = explain(pooled, images)
    expected = torch.nn.functional.interpolate(
        heatmaps.maps[:, None], size=(9, 7), mode="bilinear", align_corners=False
    )
    torch.testing.assert_close(heatmaps.upsample((9, 7)), expected[:, 0])


# The same map in every state that training may leave a model in.


def assert_same_map(model: nn.Module, reference: nn.Module, images: Tensor, atol: float = 1e-6) -> None:
    classes = torch.tensor([0, 1, 2, 0, 1])
    expected = explain(reference, images, target=classes, layer="features").maps
    torch.testing.assert_close(
        explain(model, images, target=classes, layer="features").maps, expected, atol=atol, rtol=1e-4
    )
    assert expected.max() > 0


def copy_of(net: HiddenNet, **options: bool) -> HiddenNet:
    twin = HiddenNet(**options)
    twin.load_state_dict(net.state_dict())
    return twin


def test_in_train_mode(hidden: HiddenNet, images: Tensor) -> None:
    assert_same_map(copy_of(hidden).train(), hidden, images)


def test_frozen(hidden: HiddenNet, images: Tensor) -> None:
    assert_same_map(copy_of(hidden).eval().requires_grad_(False), hidden, images)


def test_with_an_inplace_relu_behind_the_layer(hidden: HiddenNet, images: Tensor) -> None:
    assert_same_map(copy_of(hidden, inplace=True), hidden, images)


def test_with_a_backbone_in_no_grad(hidden: HiddenNet, images: Tensor) -> None:
    class Frozen(HiddenNet):
        def forward(self, images: Tensor) -> Tensor:
            with torch.no_grad():
                features = self.features(images)
            return self.head(torch.tanh(self.hidden(self.relu(features).flatten(1))))

    frozen = Frozen()
    frozen.load_state_dict(hidden.state_dict())
    assert_same_map(frozen, hidden, images)


def test_under_inference_mode(hidden: HiddenNet, images: Tensor) -> None:
    expected = explain(hidden, images, layer="features").maps
    with torch.inference_mode():
        got = explain(hidden, images + 0, layer="features").maps
        assert torch.is_inference_mode_enabled()
    torch.testing.assert_close(got, expected)


def test_compiled(hidden: HiddenNet, images: Tensor) -> None:
    compiled = torch.compile(copy_of(hidden).eval(), backend="eager")
    compiled(images)
    assert_same_map(compiled, hidden, images)


def test_bfloat16_weights(hidden: HiddenNet, images: Tensor) -> None:
    # "absolute": where terms of both signs nearly cancel, what is left of a map in 8 bits is rounding.
    heatmaps = explain(copy_of(hidden).eval().bfloat16(), images, layer="features", sign="absolute")
    expected = explain(hidden, images, layer="features", sign="absolute", target=heatmaps.outputs.argmax(1)).maps
    assert heatmaps.maps.dtype == torch.float32
    assert torch.cosine_similarity(heatmaps.maps.flatten(1), expected.flatten(1)).min() > 0.98


# The model is borrowed.


def everything(model: nn.Module) -> dict[str, object]:
    return {
        "modes": [m.training for m in model.modules()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "requires": [p.requires_grad for p in model.parameters()],
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()],
        "rng": (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()),  # noqa: NPY002
        "grad mode": torch.is_grad_enabled(),
    }


def assert_same(before: dict[str, object], after: dict[str, object]) -> None:
    for key in before:
        assert torch.utils._pytree.tree_all(
            bool,
            torch.utils._pytree.tree_map(
                lambda x, y: torch.equal(x, y) if isinstance(x, Tensor) else x == y, before[key], after[key]
            ),
        ), f"{key} changed"


class Restless(HiddenNet):
    """Draws random numbers and writes to a buffer in each forward pass, in eval mode too; may fail in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("last", torch.zeros(1))
        self.fails = False

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        self.last = torch.rand(1)
        random.random()
        np.random.rand()  # noqa: NPY002
        outputs = super().forward(images)
        if self.fails:
            raise RuntimeError("in the middle")
        return outputs


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_given_back_as_it_was(images: Tensor, fails: bool) -> None:
    model = Restless().train()
    model.features[1].eval()
    model.features[0].requires_grad_(False)
    model(images).sum().backward()
    model.fails = fails
    before = everything(model)
    if fails:
        with pytest.raises(RuntimeError, match="in the middle"):
            explain(model, images, layer="features")
    else:
        explain(model, images, layer="features")
    assert_same(before, everything(model))


def test_a_train_method_of_the_users_is_not_called(images: Tensor) -> None:
    class Own(HiddenNet):
        def train(self, mode: bool = True) -> HiddenNet:
            calls.append(mode)
            return self

    calls: list[bool] = []
    explain(Own(), images, layer="features")
    assert not calls


def test_only_the_tail_is_differentiated(hidden: HiddenNet, images: Tensor) -> None:
    saved = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal saved
        saved += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        with borrowed(hidden) as lent:
            capture(lent, images, ClassLogit(torch.zeros(5, dtype=torch.long)), "features")
        tail = saved
        hidden(images)[:, 0].sum()
    assert 0 < tail < (saved - tail) / 2


# What cannot be explained is said.


class Odd(PooledNet):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.unused = nn.Conv2d(3, 3, 1)

    def forward(self, images: Tensor):
        outputs = super().forward(images)
        if self.kind == "twice":
            outputs = outputs + super().forward(images)
        if self.kind == "apart":
            self.unused(images)
        if self.kind == "dict":
            return {"logits": outputs}
        return outputs[:, :, None] if self.kind == "map" else outputs


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("plain", {"layer": "head"}, "'head' has no spatial output"),
        ("plain", {"layer": "nowhere"}, "no layer 'nowhere'"),
        ("plain", {"layer": "unused"}, "ran never"),
        ("twice", {"layer": "features"}, "ran 2 times"),
        ("apart", {"layer": "unused"}, "does not depend on layer 'unused'"),
        ("dict", {"layer": "features"}, "expected a model output .* got dict"),
        ("map", {"layer": "features"}, r"expected a model output \(B, classes\), got \(5, 3, 1\)"),
        ("plain", {"method": "magic"}, "unknown method 'magic'"),
        ("plain", {"sign": "both"}, "unknown sign 'both'"),
        ("plain", {"target": torch.tensor([0, 1, 9, 0, 0])}, "class 9 is out of range"),
        ("plain", {"target": torch.tensor([0, 1])}, r"expected class indices \(5,\)"),
        ("plain", {"target": lambda outputs: outputs}, r"one score per image, \(5,\), got \(5, 3\)"),
    ],
)
def test_what_cannot_be_explained(images: Tensor, kind: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        explain(Odd(kind), images, **options)


def test_a_model_without_feature_maps(images: Tensor) -> None:
    with pytest.raises(ValueError, match="no layer with a spatial output"):
        explain(nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), images)


def test_pooling_is_passed_over_and_the_outermost_name_taken(images: Tensor) -> None:
    net = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 2))
    with torch.no_grad():
        assert find_layer(net, images) == "0"

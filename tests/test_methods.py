"""CAM and Score-CAM against their definitions and a peer; all methods by name: signs, errors, the model given back."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from bias_audit import explain
from bias_audit.attribution.borrow import borrowed
from bias_audit.attribution.cam import FORMULAS, SIGNS, Sign, eigencam
from bias_audit.attribution.methods import METHODS, Method, find_method
from bias_audit.attribution.pooled import cam
from bias_audit.attribution.score import scorecam
from bias_audit.attribution.targets import ClassLogit, ClassMargin, RankedLogit, Target, predicted_logit

# CAM.


class PooledNet(nn.Module):
    """Convolutions, global pooling, one linear layer; how these are called may be chosen."""

    def __init__(self, classes: int = 3, kind: str = "plain") -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 1))
        self.dropout = nn.Dropout(0.5)
        self.hidden = nn.Linear(6, 6)
        self.head = nn.Linear(6, classes)
        self.kind = kind

    def forward(self, images: Tensor) -> Tensor:
        features = self.features(images)
        if self.kind == "relu between":
            features = features.relu()
        if self.kind == "max":
            return self.head(features.amax(dim=(2, 3)))
        if self.kind == "convolution":
            return F.conv2d(features, self.head.weight[:, :, None, None]).mean(dim=(2, 3))
        pooled = self.dropout(features.mean(dim=(2, 3)))
        if self.kind == "hidden":
            pooled = self.hidden(pooled).relu()
        if self.kind == "function":
            return F.linear(pooled, self.head.weight, self.head.bias)
        outputs = self.head(pooled)
        return outputs.sigmoid() if self.kind == "sigmoid" else outputs


@pytest.fixture
def images() -> Tensor:
    return torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))


CLASSES = torch.tensor([0, 1, 2, 0, 1])


def ran(name: str, model: nn.Module, inputs: Any, target: Target, layer: str = "features", **options: Any) -> Tensor:
    with borrowed(model) as lent:
        return METHODS[name].run(lent, inputs, target, layer, **options)[0]


@pytest.mark.parametrize("kind", ["plain", "function"])
@pytest.mark.parametrize("sign", SIGNS)
def test_cam_weighs_channels_by_the_linear_layer(images: Tensor, sign: Sign, kind: str) -> None:
    torch.manual_seed(1)
    model = PooledNet(kind=kind).train()
    got = ran("cam", model, images, ClassLogit(CLASSES), sign=sign)
    with torch.no_grad():
        features = model.eval().features(images)
    terms = model.head.weight.detach()[CLASSES][:, :, None, None] * features
    total = terms.sum(dim=1)
    expected = {
        "positive": total.relu(),
        "negative": (-total).relu(),
        "absolute": terms.abs().sum(dim=1),
        "signed": total,
    }
    torch.testing.assert_close(got, expected[sign], atol=1e-5, rtol=1e-4)
    # There Grad-CAM is the same over the number of places: arXiv 1610.02391, section 3.1.
    grad = ran("gradcam", model, images, ClassLogit(CLASSES), sign=sign)
    torch.testing.assert_close(got, grad * 64, atol=1e-5, rtol=1e-4)


def test_cam_of_other_targets(images: Tensor) -> None:
    torch.manual_seed(1)
    model = PooledNet().eval()
    margin = ran("cam", model, images, ClassMargin(CLASSES), sign="signed")
    grad = ran("gradcam", model, images, ClassMargin(CLASSES), sign="signed")
    torch.testing.assert_close(margin, grad * 64, atol=1e-5, rtol=1e-4)
    low = PooledNet().eval()
    low.load_state_dict(model.state_dict())
    low = low.bfloat16()
    close = ran("cam", low, images, ClassLogit(CLASSES), sign="signed")
    exact = ran("cam", model, images, ClassLogit(CLASSES), sign="signed")
    assert torch.cosine_similarity(close.flatten(1), exact.flatten(1)).min() > 0.99


def test_cam_of_a_resnet_a_clip_and_channels_last() -> None:
    torch.manual_seed(3)
    resnet = torchvision.models.resnet18(num_classes=7).eval()
    batch = torch.rand(2, 3, 64, 64)
    maps = ran("cam", resnet, batch, predicted_logit, "layer4", sign="signed")
    with torch.no_grad():
        stem = nn.Sequential(*list(resnet.children())[:-2])
        weight = resnet.fc.weight[resnet(batch).argmax(dim=1)]
        torch.testing.assert_close(maps, torch.einsum("bc,bchw->bhw", weight, stem(batch)), atol=1e-4, rtol=1e-3)

    clip = nn.Sequential(nn.Conv3d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 1)).eval()
    clips = torch.rand(2, 3, 5, 8, 8)
    torch.testing.assert_close(
        ran("cam", clip, clips, predicted_logit, "1"), ran("gradcam", clip, clips, predicted_logit, "1") * 108
    )

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 6, 4, stride=4)
            self.norm = nn.LayerNorm(6)
            self.head = nn.Linear(6, 3)

        def forward(self, images: Tensor) -> Tensor:
            return self.head(self.norm(self.conv(images).permute(0, 2, 3, 1)).mean(dim=(1, 2)))

    last, wide = Last().eval(), torch.rand(2, 3, 32, 48)
    torch.testing.assert_close(
        ran("cam", last, wide, predicted_logit, "norm", sign="signed"),
        ran("gradcam", last, wide, predicted_logit, "norm", sign="signed") * 96,
        atol=1e-5,
        rtol=1e-4,
    )


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("relu between", "does not take the average"),
        ("max", "does not take the average"),
        ("hidden", "does not take the average"),
        ("sigmoid", "not what a linear layer puts out"),
        ("convolution", "not what a linear layer puts out"),
    ],
)
def test_cam_needs_pooling_and_one_linear_layer(images: Tensor, kind: str, why: str) -> None:
    torch.manual_seed(1)
    message = f"CAM needs global average pooling and one linear layer behind layer 'features', .*{why}.*use gradcam"
    with pytest.raises(ValueError, match=message):
        ran("cam", PooledNet(kind=kind), images, lambda outputs: outputs[:, 0])
    clean = ran("cam", PooledNet(), images, lambda outputs: outputs[:, 0])
    assert clean.shape == (5, 8, 8)


# Score-CAM.


class Coarse(nn.Module):
    """A layer coarser than the image, and a head that is not linear."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(6 * 16, 8), nn.Tanh(), nn.Linear(8, classes))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


@pytest.fixture
def coarse() -> Coarse:
    torch.manual_seed(5)
    net = Coarse().eval()
    # Weights that make scores differ between masks by more than rounding.
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(2)
    return net


@torch.no_grad()
def naive_scorecam(net: Coarse, images: Tensor, classes: Tensor) -> Tensor:
    """Algorithm 1, one image and one channel at a time."""
    maps = []
    for image, label in zip(images, classes.tolist(), strict=True):
        channels = net.features(image[None])[0]
        baseline = net(torch.zeros_like(image)[None])[0, label]
        gains = []
        for channel in channels:
            mask = F.interpolate(channel[None, None], image.shape[1:], mode="bilinear", align_corners=False)[0, 0]
            spread = mask.max() - mask.min()
            varies = spread > 1e-5 * mask.abs().max()
            mask = (mask - mask.min()) / spread if varies else torch.zeros_like(mask)
            gains.append(float(net((image * mask)[None])[0, label] - baseline))
        weights = np.exp(gains) / np.exp(gains).sum()
        maps.append(sum(float(w) * channel for w, channel in zip(weights, channels, strict=True)))
    return torch.stack(maps)


@pytest.mark.parametrize("chunk", [1, 7, 12, 64])
def test_scorecam_is_algorithm_1(coarse: Coarse, images: Tensor, chunk: int) -> None:
    images[1] = 0.5
    expected = naive_scorecam(coarse, images, CLASSES)
    batches: list[int] = []
    counting = coarse.register_forward_pre_hook(lambda _module, taken: batches.append(len(taken[0])))
    with borrowed(coarse) as lent, counting:
        maps, scores, outputs = scorecam(lent, images, ClassLogit(CLASSES), "features", chunk=chunk)
    torch.testing.assert_close(maps, expected.relu(), atol=1e-5, rtol=1e-4)
    assert max(batches) <= max(chunk, len(images))
    assert sum(batches) == 5 + 5 * 6
    with torch.no_grad():
        torch.testing.assert_close(outputs, coarse(images))
    torch.testing.assert_close(scores, outputs.gather(1, CLASSES[:, None])[:, 0])
    weights_matter = coarse.features(images).mean(dim=1)
    assert (maps - weights_matter).abs().max() > 0.05 * weights_matter.max()


def test_scorecam_keeps_the_sign_where_activations_have_one(coarse: Coarse, images: Tensor) -> None:
    coarse.features = nn.Sequential(coarse.features[0], nn.AvgPool2d(2))
    signed = ran("scorecam", coarse, images, ClassLogit(CLASSES), sign="signed")
    torch.testing.assert_close(signed, naive_scorecam(coarse, images, CLASSES), atol=1e-5, rtol=1e-4)
    assert signed.min() < 0
    torch.testing.assert_close(ran("scorecam", coarse, images, ClassLogit(CLASSES)), signed.relu())


def test_scorecam_of_a_channel_that_is_constant(coarse: Coarse, images: Tensor) -> None:
    with torch.no_grad():
        coarse.features[0].weight[2] = 0
        coarse.features[0].bias[2] = 1.5
    got = ran("scorecam", coarse, images, ClassLogit(CLASSES))
    assert got.isfinite().all()
    torch.testing.assert_close(got, naive_scorecam(coarse, images, CLASSES), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("target", [predicted_logit, RankedLogit(1)])
def test_scorecam_explains_the_class_of_the_whole_image(coarse: Coarse, images: Tensor, target: Target) -> None:
    with torch.no_grad():
        predicted = coarse(images).argmax(dim=1)
    torch.testing.assert_close(
        ran("scorecam", coarse, images, target), ran("scorecam", coarse, images, ClassLogit(predicted))
    )


@pytest.mark.parametrize("rank", [1, 2])
def test_scorecam_of_a_head_with_one_logit(images: Tensor, rank: int) -> None:
    torch.manual_seed(6)
    net = Coarse(classes=1).eval()

    class Two(nn.Module):
        """The same as a head with two logits, -z and z."""

        def __init__(self) -> None:
            super().__init__()
            self.features = net.features

        def forward(self, images: Tensor) -> Tensor:
            logit = net(images)
            return torch.cat([-logit, logit], dim=1)

    with torch.no_grad():
        ranked = Two()(images).argsort(dim=1, descending=True)[:, rank - 1]
    expected = ran("scorecam", Two().eval(), images, ClassLogit(ranked))
    torch.testing.assert_close(ran("scorecam", net, images, RankedLogit(rank)), expected)
    if rank == 1:
        torch.testing.assert_close(ran("scorecam", net, images, predicted_logit), expected)


def test_scorecam_masks_the_images_of_a_batch_and_repeats_the_rest(coarse: Coarse, images: Tensor) -> None:
    gains = torch.tensor([1.0, 2.0, -1.0, 0.5, 3.0])

    def asked(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        assert len(batch["gain"]) == len(batch["image"])
        return model(batch["image"]) * batch["gain"][:, None]

    with borrowed(coarse) as lent:
        together = scorecam(
            lent, {"image": images, "gain": gains}, ClassLogit(CLASSES), "features", forward=asked, chunk=12
        )[0]
        alone = [
            scorecam(
                lent,
                {"image": images[i : i + 1], "gain": gains[i : i + 1]},
                ClassLogit(CLASSES[i : i + 1]),
                "features",
                forward=asked,
            )[0]
            for i in range(5)
        ]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-4)


def test_scorecam_of_outputs_that_are_no_tensor(coarse: Coarse, images: Tensor) -> None:
    def wrapped(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
        return {"scores": model(images)}

    with borrowed(coarse) as lent:
        got = scorecam(
            lent, images, lambda o: o["scores"].gather(1, CLASSES[:, None])[:, 0], "features", forward=wrapped
        )
    torch.testing.assert_close(got[0], ran("scorecam", coarse, images, ClassLogit(CLASSES)))


def test_scorecam_against_the_peer(images: Tensor) -> None:
    from pytorch_grad_cam import ScoreCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    torch.manual_seed(7)
    # A layer as fine as the image, since the peer upsamples with aligned corners.
    net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 64, 3)).eval()
    with ScoreCAM(model=net, target_layers=[net[1]]) as peer:
        theirs = torch.from_numpy(peer(input_tensor=images, targets=[ClassifierOutputTarget(int(c)) for c in CLASSES]))
    ours = ran("scorecam", net, images, ClassLogit(CLASSES), "1")
    lowest = ours.amin(dim=(1, 2), keepdim=True)
    torch.testing.assert_close(
        (ours - lowest) / (ours.amax(dim=(1, 2), keepdim=True) - lowest), theirs, atol=1e-4, rtol=0
    )


# All methods.


def test_every_method_says_where_it_comes_from() -> None:
    assert len({m.name for m in METHODS.values()}) == len(METHODS) == 11
    for name, method in METHODS.items():
        assert name == method.name
        assert method.paper
        assert method.source.startswith(("arXiv ", "doi "))
        assert (method.formula is None) != (method.passes is None)
        assert method.formula is FORMULAS.get(name)
        assert set(method.signs) <= set(SIGNS)
        assert find_method(name) is method


def test_a_formula_of_the_users_is_a_method(images: Tensor) -> None:
    def brightest(activations: Tensor, gradients: Tensor, sign: Sign) -> Tensor:
        return activations.amax(dim=1)

    method = find_method(brightest)
    assert method.name == "brightest"
    model = PooledNet().eval()
    with borrowed(model) as lent:
        maps, _, _ = method.run(lent, images, predicted_logit, "features")
        torch.testing.assert_close(maps, lent.features(images).amax(dim=1))


@pytest.mark.parametrize("name", METHODS)
def test_what_a_method_cannot_do_is_said(name: str, images: Tensor) -> None:
    model = PooledNet().eval()
    with pytest.raises(ValueError, match="unknown sign 'both'"):
        ran(name, model, images, predicted_logit, sign="both")
    for sign in set(SIGNS) - set(METHODS[name].signs):
        message = f"takes no gradient.*expected sign 'positive' or 'signed', got '{sign}'"
        with pytest.raises(ValueError, match=message):
            ran(name, model, images, predicted_logit, sign=sign)
    assert set(METHODS[name].signs) == {"positive", "signed"} or METHODS[name].signs == SIGNS
    with pytest.raises(ValueError, match="one score per image"):
        ran(name, model, images, lambda outputs: outputs)
    with pytest.raises(ValueError, match="does not depend on"):
        ran(name, model, images, lambda outputs: torch.zeros(5))
    if METHODS[name].needs_layer:
        with pytest.raises(ValueError, match="no layer 'nowhere'"):
            ran(name, model, images, predicted_logit, "nowhere")


def test_an_unknown_method() -> None:
    with pytest.raises(
        ValueError, match=r"unknown method 'magic': expected one of gradcam, .*guided_gradcam, or a func"
    ):
        find_method("magic")


def test_formulas_themselves_refuse_a_sign_they_do_not_have() -> None:
    with pytest.raises(ValueError, match="EigenCAM takes no gradient"):
        eigencam(torch.rand(1, 3, 2, 2), torch.rand(1, 3, 2, 2), "negative")
    with borrowed(Coarse()) as lent, pytest.raises(ValueError, match="Score-CAM takes no gradient"):
        scorecam(lent, torch.rand(1, 3, 8, 8), predicted_logit, "features", "absolute")


class Restless(PooledNet):
    """Draws random numbers and writes to a buffer in each forward pass, in eval mode too; may fail in a later one."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros(1))
        self.passes, self.fails_at = 0, 0

    def forward(self, images: Tensor) -> Tensor:
        self.last.add_(torch.rand(1))
        random.random()
        outputs = super().forward(images)
        self.passes += 1
        if self.passes == self.fails_at:
            raise RuntimeError("in the middle")
        return outputs


def everything(model: nn.Module) -> dict[str, Any]:
    return {
        "modes": [m.training for m in model.modules()],
        "grads": [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
        "requires": [p.requires_grad for p in model.parameters()],
        "state": {k: v.tolist() for k, v in model.state_dict().items()},
        "modules": [id(m) for m in model.modules()],
        "hooks": [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks), len(m._backward_pre_hooks))
            for m in model.modules()
        ],
        "rng": (torch.get_rng_state().tolist(), random.getstate()),
        "grad mode": torch.is_grad_enabled(),
    }


@pytest.mark.parametrize("fails_at", [0, 1, 2])
@pytest.mark.parametrize("name", METHODS)
def test_the_model_is_given_back_as_it_was(name: str, fails_at: int, images: Tensor) -> None:
    torch.manual_seed(8)
    model = Restless().train()
    model.features[1].eval()
    model.features[0].requires_grad_(False)
    model(images).sum().backward()
    model.passes, model.fails_at = 0, fails_at
    kept, before = images.clone(), everything(model)
    passes = {"scorecam": 2, "guided_gradcam": 2}.get(name, 1)
    if 0 < fails_at <= passes:
        with pytest.raises(RuntimeError, match="in the middle"):
            ran(name, model, images, predicted_logit)
    else:
        maps = ran(name, model, images, predicted_logit)
        assert maps.shape == (5, 8, 8)
        assert not maps.requires_grad
    assert everything(model) == before
    assert torch.equal(images, kept)


@pytest.mark.parametrize(("name", "sign"), [(name, sign) for name, m in METHODS.items() for sign in m.signs])
def test_every_method_in_every_state_of_the_model(name: str, sign: Sign, images: Tensor) -> None:
    torch.manual_seed(13)
    model = PooledNet().eval()
    expected = ran(name, model, images, ClassLogit(CLASSES), sign=sign)
    assert expected.shape == (5, 8, 8)
    assert expected.isfinite().all() and expected.abs().max() > 0
    assert sign == "signed" or expected.min() >= 0
    model.train().requires_grad_(False)
    with torch.inference_mode():
        frozen = ran(name, model, images + 0, ClassLogit(CLASSES), sign=sign)
    torch.testing.assert_close(frozen, expected)
    with torch.no_grad():
        torch.testing.assert_close(ran(name, model, images, ClassLogit(CLASSES), sign=sign), expected)


def test_methods_are_descriptions_that_cannot_change() -> None:
    with pytest.raises(AttributeError):
        METHODS["cam"].name = "other"  # type: ignore[misc]
    assert isinstance(METHODS["cam"], Method)
    assert METHODS["cam"].passes is cam


@pytest.mark.parametrize("seed", range(3))
def test_scorecam_by_default_explains_what_was_predicted_of_the_whole_image(seed: int) -> None:
    # Of masked images this network predicts other classes, whose scores are not those to compare.
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 64, 4))
    nn.init.normal_(net[3].weight, std=1.0)
    inputs = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        predicted = net(inputs).argmax(dim=1)
    default, named = (explain(net, inputs, target=t, layer="1", method="scorecam").maps for t in (None, predicted))
    torch.testing.assert_close(default, named)
    assert default.max() > 0

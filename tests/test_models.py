"""Every family of vision models: the layer is found, and its output is put on a grid."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import get_model, get_model_weights, list_models

from bias_audit import explain
from bias_audit.attribution.explain import fuse
from bias_audit.attribution.layers import find_layer
from bias_audit.attribution.layouts import TokenGrid, channels_first, channels_last, find_layout
from bias_audit.attribution.rows import SparseRows
from bias_audit.attribution.targets import Contrast


class QuickInit(TorchFunctionMode):
    """Skips the drawing of random weights, which takes longer than everything else."""

    DRAWS = (Tensor.normal_, Tensor.uniform_, Tensor.erfinv_)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0].zero_() if func in self.DRAWS else func(*args, **(kwargs or {}))


def torchvision_model(name: str) -> tuple[nn.Module, int]:
    """The model with five classes, and the size of a small image that it takes."""
    size = {"inception_v3": 160, "maxvit_t": 224, "vit_h_14": 56}.get(name, 64)
    extra: dict[str, Any] = {"image_size": size} if name.startswith("vit") else {}
    if name in ("googlenet", "inception_v3"):
        extra = {"init_weights": False}
    with QuickInit():
        model = get_model(name, weights=None, num_classes=5, **extra)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.uniform_(-1, 1, generator=generator).mul_((6 / parameter[0].numel()) ** 0.5)
    return model, size


LAYER_OF_FAMILY = {
    "alexnet": "features.11",
    "convnext": "features",
    "densenet": "features",
    "efficientnet": "features",
    "googlenet": "inception5b",
    "inception": "Mixed_7c",
    "maxvit": "blocks.3",
    "mnasnet": "layers",
    "mobilenet": "features",
    "regnet": "trunk_output",
    "resnet": "layer4",
    "resnext": "layer4",
    "shufflenet": "conv5",
    "squeezenet": "classifier.2",
    "swin": "permute",
    "vgg": "features.",
    "vit": "encoder.layers.encoder_layer_",
    "wide": "layer4",
}


def family(name: str) -> str:
    return next(f for f in LAYER_OF_FAMILY if name.startswith(f))


def parameters(name: str) -> int:
    return get_model_weights(name).DEFAULT.meta["num_params"]


NAMES = list_models(module=torchvision.models)
SMALLEST = {min((n for n in NAMES if n.startswith(f)), key=parameters) for f in LAYER_OF_FAMILY}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in SMALLEST or parameters(n) < 12e6 else pytest.mark.slow, id=n) for n in NAMES],
)
def test_the_layer_is_found_in_every_torchvision_classifier(name: str) -> None:
    model, size = torchvision_model(name)
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    heatmaps = explain(model, images, sign="signed")
    assert heatmaps.layer.startswith(LAYER_OF_FAMILY[family(name)])
    if family(name) == "vit":
        # The last layer whose patches still reach the class token.
        assert heatmaps.layer == f"encoder.layers.encoder_layer_{len(model.encoder.layers) - 1}.ln_1"
    assert heatmaps.maps.isfinite().all()
    rows, columns = heatmaps.maps.shape[1:]
    assert rows == columns > 1
    assert (heatmaps.maps.flatten(1).std(1) > 0).all()


def config(kind: str, **options: Any) -> Any:
    common = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    if kind in ("Swin", "ResNet", "ConvNext"):
        common = {}
    return getattr(transformers, f"{kind}Config")(num_labels=5, **common, **options)


HUGGING_FACE = {
    "ViT": (config("ViT", image_size=64), "vit.layers.1.layernorm_before", 64, 4),
    "DeiT": (config("DeiT", image_size=64), "deit.layers.1.layernorm_before", 64, 4),
    "Dinov2": (config("Dinov2", image_size=56), "dinov2.layernorm", 56, 4),
    "Beit": (config("Beit", image_size=64), "beit.layers.1", 64, 4),
    "Swin": (
        config("Swin", image_size=64, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4),
        "swin.layernorm",
        64,
        8,
    ),
    "ResNet": (
        config("ResNet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]),
        "resnet.encoder.stages.1",
        64,
        8,
    ),
    "ConvNext": (
        config("ConvNext", hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1]),
        "convnext.encoder.stages.3",
        64,
        2,
    ),
}


@pytest.mark.parametrize("kind", HUGGING_FACE)
def test_hugging_face_classifiers(kind: str) -> None:
    settings, layer, size, side = HUGGING_FACE[kind]
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForImageClassification")(settings)
    images = torch.rand(2, 3, size, size)
    heatmaps = explain(model, images, target=torch.tensor([4, 0]), sign="signed")
    # Which of its modules a library of others names how may change; the grid may not.
    assert heatmaps.maps.shape == (2, side, side)
    assert heatmaps.layer == layer
    assert (heatmaps.maps.flatten(1).std(1) > 0).all()
    model.eval()
    torch.testing.assert_close(heatmaps.scores, model(images).logits[[0, 1], [4, 0]])


TIMM = {
    "class token": ("vit_tiny_patch16_224", {"img_size": 64}, "blocks.11.norm1", 4),
    "mean of tokens": ("vit_tiny_patch16_224", {"img_size": 64, "global_pool": "avg"}, "blocks", 4),
    "registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 70, "depth": 2}, "blocks.1.norm1", 5),
    "distilled": ("deit_tiny_distilled_patch16_224", {"img_size": 64}, "blocks.11.norm1", 4),
    "windows, channels last": ("swin_tiny_patch4_window7_224", {"img_size": 224, "depths": (1, 1, 1, 1)}, "norm", 7),
    "convolutions": ("convnext_atto", {"img_size": 64}, "stages", 2),
}


@pytest.mark.parametrize("kind", TIMM)
def test_timm_classifiers(kind: str) -> None:
    name, options, layer, side = TIMM[kind]
    size = options["img_size"]
    torch.manual_seed(0)
    if kind == "convolutions":
        options = {}
    model = timm.create_model(name, pretrained=False, num_classes=5, **options)
    heatmaps = explain(model, torch.rand(2, 3, size, size), sign="signed")
    assert heatmaps.layer == layer
    assert heatmaps.maps.shape == (2, side, side)
    assert (heatmaps.maps.flatten(1).std(1) > 0).all()


def test_a_head_that_is_all_zero_does_not_hide_the_layer() -> None:
    # torchvision's Vision Transformers begin so, and with them every gradient is zero.
    model = torchvision.models.VisionTransformer(32, 8, 3, 2, 16, 32, num_classes=3)
    assert not model.heads.head.weight.any()
    heatmaps = explain(model, torch.rand(2, 3, 32, 32))
    assert heatmaps.layer == "encoder.layers.encoder_layer_2.ln_1"
    assert not heatmaps.maps.any()


def test_clips_of_a_video() -> None:
    torch.manual_seed(0)
    model = torchvision.models.video.r3d_18(weights=None, num_classes=3).eval()
    clips = torch.rand(2, 3, 8, 48, 64)
    heatmaps = explain(model, clips, target=torch.tensor([2, 0]), sign="signed")
    assert heatmaps.layer == "layer4"
    assert heatmaps.maps.shape == (2, 1, 3, 4)
    with torch.no_grad():
        features = nn.Sequential(model.stem, model.layer1, model.layer2, model.layer3, model.layer4)(clips)
    # Behind the layer are average pooling and one linear layer.
    weights = model.fc.weight[[2, 0]] / features[0, 0].numel()
    expected = sum(weights[:, k, None, None, None] * features[:, k] for k in range(features.shape[1]))
    torch.testing.assert_close(heatmaps.maps, expected, rtol=1e-3, atol=1e-5)
    fine = heatmaps.upsample((8, 48, 64))
    assert fine.shape == (2, 8, 48, 64)
    torch.testing.assert_close(fine[:, 0], fine[:, 7])


@pytest.mark.parametrize(
    ("shape", "size", "expected"),
    [
        ((2, 8, 7, 7), (224, 224), channels_first),
        ((2, 7, 7, 8), (224, 224), channels_last),
        ((2, 8, 5, 7), (160, 224), channels_first),
        ((2, 5, 7, 8), (160, 224), channels_last),
        ((2, 8, 1, 1), (224, 224), None),
        ((2, 8, 2, 7, 7), (16, 112, 112), channels_first),
        ((2, 2, 7, 7, 8), (16, 112, 112), channels_last),
        ((2, 196, 8), (224, 224), TokenGrid(0, (14, 14))),
        ((2, 197, 8), (224, 224), TokenGrid(1, (14, 14))),
        ((2, 198, 8), (224, 224), TokenGrid(2, (14, 14))),
        ((2, 261, 8), (224, 224), TokenGrid(5, (16, 16))),
        ((2, 71, 8), (112, 160), TokenGrid(1, (7, 10))),
        ((2, 393, 8), (16, 224, 224), TokenGrid(1, (8, 7, 7))),
        ((2, 3, 8), (224, 224), None),
        ((2, 77, 8), (224, 224), None),
        ((2, 8), (224, 224), None),
        # What an AdaptiveAvgPool1d leaves: one place.
        ((2, 32, 1), (64, 64), None),
    ],
)
def test_layouts(shape: tuple[int, ...], size: tuple[int, ...], expected: object) -> None:
    assert find_layout(shape, size) == expected


def test_tokens_go_to_the_place_of_their_patch() -> None:
    # A model whose class token sums one linear score per patch: the map is that score, patch by patch.
    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Conv2d(3, 4, 8, stride=8)
            self.tokens = nn.Identity()
            self.first = nn.LayerNorm(4, elementwise_affine=False)
            self.head = nn.Linear(4, 2)

        def forward(self, images: Tensor) -> Tensor:
            patches = self.embed(images).flatten(2).transpose(1, 2)
            tokens = self.first(torch.cat([torch.zeros_like(patches[:, :1]), patches], dim=1))
            return self.head(tokens[:, :1] + tokens[:, 1:].sum(1, keepdim=True))[:, 0]

    torch.manual_seed(0)
    model, images = Patches(), torch.rand(1, 3, 16, 24)
    heatmaps = explain(model, images, target=torch.tensor([1]), method="hirescam", sign="signed")
    assert heatmaps.layer == "first"
    for row in range(2):
        for column in range(3):
            patch = images[:, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            score = model.first(model.embed(patch).flatten()) @ model.head.weight[1]
            assert heatmaps.maps[0, row, column].item() == pytest.approx(score.item(), abs=1e-5)


# Inputs, outputs, targets and layers of other kinds.


class Net(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.early = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        self.late = nn.Sequential(nn.Conv2d(4, 5, 3, stride=2, padding=1), nn.Tanh())
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(5 * 4 * 6, classes))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.late(self.early(images)))


@pytest.fixture
def images() -> Tensor:
    return torch.rand(4, 3, 8, 12, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(3)
    return Net()


class WithQuestion(Net):
    """Takes a dict of an image and a number, which scales the answer, and gives a dict."""

    def forward(self, batch: dict[str, Tensor]) -> Any:  # type: ignore[override]
        return {"answer": super().forward(batch["image"]) * batch["number"][:, None]}


def test_several_inputs_and_an_output_of_ones_own(net: Net, images: Tensor) -> None:
    model = WithQuestion()
    model.load_state_dict(net.state_dict())
    number = torch.tensor([1.0, -1.0, 2.0, 0.0])
    got = explain(
        model,
        {"number": number, "image": images},
        target=lambda answers: answers[:, 1],
        forward_fn=lambda m, batch: m(batch)["answer"],
        sign="signed",
    )
    expected = explain(net, images, target=torch.ones(4, dtype=torch.int64), sign="signed").maps
    torch.testing.assert_close(got.maps, expected * number[:, None, None])
    raw = explain(model, {"number": number, "image": images}, target=lambda o: o["answer"][:, 1], sign="signed")
    torch.testing.assert_close(raw.maps, got.maps)


@pytest.mark.parametrize("shape", ["(B,)", "(B, 1)"])
def test_one_logit_speaks_for_class_1_and_against_class_0(images: Tensor, shape: str) -> None:
    torch.manual_seed(4)
    net = Net(classes=1)
    model = nn.Sequential(net, nn.Flatten(0)) if shape == "(B,)" else net
    with torch.no_grad():
        logits = net(images)[:, 0]
    for_one = explain(model, images, target=torch.ones(4, dtype=torch.int64), sign="signed")
    for_none = explain(model, images, target=torch.zeros(4, dtype=torch.int64), sign="signed")
    torch.testing.assert_close(for_one.scores, logits)
    torch.testing.assert_close(for_none.maps, -for_one.maps)
    predicted = explain(model, images, sign="signed")
    torch.testing.assert_close(predicted.maps, for_one.maps * logits.sign()[:, None, None])


def test_labels_of_a_multi_label_head_are_explained_one_by_one(net: Net, images: Tensor) -> None:
    # No class competes with another: the map of one does not change with the others' logits.
    labels = [torch.full((4,), label) for label in range(3)]
    several = explain(net, images, target=labels, sign="signed")
    assert several.maps.shape == (3, 4, 4, 6)
    for k, label in enumerate(labels):
        alone = explain(net, images, target=label, sign="signed")
        torch.testing.assert_close(several.maps[k], alone.maps)
        torch.testing.assert_close(several.scores[k], alone.scores)


def test_a_contrast_is_the_difference_of_its_classes(net: Net, images: Tensor) -> None:
    why, first, second = explain(
        net, images, target=[Contrast(2, 0), torch.full((4,), 2), torch.zeros(4, dtype=torch.int64)], sign="signed"
    ).maps
    torch.testing.assert_close(why, first - second)


def test_several_targets_cost_one_forward(net: Net, images: Tensor) -> None:
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    net.head.register_forward_hook(count)
    explain(net, images, target=[Contrast(0, 1), Contrast(1, 2), None], layer=["early", "late"])
    assert passes == 1


def test_several_layers_from_one_forward_are_fused(net: Net, images: Tensor) -> None:
    fused = explain(net, images, layer=["late", "early"], target=torch.tensor([0, 1, 2, 0]))
    assert fused.layer == "late + early"
    alone = [explain(net, images, layer=layer, target=torch.tensor([0, 1, 2, 0])).maps for layer in ("late", "early")]
    expected = torch.zeros(4, 8, 12)
    for maps in alone:
        for b in range(4):
            scaled = maps[b] / maps[b].max() if maps[b].max() > 0 else maps[b]
            expected[b] += nn.functional.interpolate(scaled[None, None], (8, 12), mode="bilinear")[0, 0] / 2
    torch.testing.assert_close(fused.maps, expected)
    signed = fuse([torch.tensor([[[-4.0, 2.0]]]), torch.tensor([[[0.0, 0.0]]])])
    torch.testing.assert_close(signed, torch.tensor([[[-0.5, 0.25]]]))


def test_a_layout_of_ones_own(net: Net, images: Tensor) -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net
            self.flat = nn.Flatten(2)

        def forward(self, images: Tensor) -> Tensor:
            return self.net.head(self.flat(self.net.late(self.net.early(images))))

    with pytest.raises(ValueError, match="'flat' has no spatial output"):
        explain(Flat(), images, layer="flat")
    unflatten: Callable[[Tensor], Tensor] = partial(torch.unflatten, dim=2, sizes=(4, 6))
    torch.testing.assert_close(
        explain(Flat(), images, layer="flat", layout=unflatten).maps, explain(net, images, layer="late").maps
    )


# Precision and compilation give the map that the plain float32 eager model gives.


def assert_agrees(got: Tensor, expected: Tensor, cosine: float) -> None:
    assert got.dtype == torch.float32
    assert got.shape == expected.shape
    assert torch.cosine_similarity(got.flatten(1), expected.flatten(1)).min() > cosine


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast(net: Net, images: Tensor, dtype: torch.dtype) -> None:
    classes = torch.tensor([0, 1, 2, 0])
    expected = explain(net, images, target=classes, sign="absolute").maps
    with torch.autocast("cpu", dtype):
        assert_agrees(explain(net, images, target=classes, sign="absolute").maps, expected, 0.99)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_of_another_precision(net: Net, images: Tensor, dtype: torch.dtype) -> None:
    classes = torch.tensor([0, 1, 2, 0])
    expected = explain(net, images, target=classes, sign="absolute").maps
    assert_agrees(explain(net.to(dtype), images, target=classes, sign="absolute").maps, expected, 0.99)


def test_channels_last_in_memory(images: Tensor) -> None:
    torch.manual_seed(0)
    model = torchvision.models.resnet18(weights=None, num_classes=3)
    images = torch.rand(2, 3, 64, 64)
    expected = explain(model, images, sign="signed").maps
    got = explain(
        model.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last), sign="signed"
    )
    torch.testing.assert_close(got.maps, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("how", ["whole", "part", "in place"])
def test_compiled(net: Net, images: Tensor, how: str) -> None:
    expected = explain(net, images, sign="signed")
    model: Any = Net()
    model.load_state_dict(net.state_dict())
    if how == "whole":
        model = torch.compile(model, backend="eager")
    elif how == "part":
        model.late = torch.compile(model.late, backend="eager")
    else:
        model.compile(backend="eager")
    model(images)
    got = explain(model, images, sign="signed")
    # The name is the one without compilation, so that a run can go on with or without it.
    assert got.layer == expected.layer == "late"
    torch.testing.assert_close(got.maps, expected.maps)
    for layer in ("early", "late.0"):
        torch.testing.assert_close(explain(model, images, layer=layer).maps, explain(net, images, layer=layer).maps)


# What cannot be explained is said.


def test_activations_that_are_not_finite_name_their_image(net: Net, images: Tensor) -> None:
    images[2, 0, 3, 3] = torch.nan
    with pytest.raises(ValueError, match=r"layer 'late' are NaN or infinite on image 2 of the batch \(1 of 4"):
        explain(net, images, layer="late")


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.rand(3, 8, 12), "expected a batch of images"),
        (torch.rand(0, 3, 8, 12), "expected a batch of images"),
        ({"number": torch.ones(2)}, "found neither"),
    ],
)
def test_inputs_without_images(net: Net, inputs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        explain(net, inputs)


@pytest.mark.parametrize("target", [lambda o: o.sum(), lambda o: o[:2, 0], lambda o: 1.0])
def test_a_target_that_is_not_one_score_per_image(net: Net, images: Tensor, target: Callable[[Tensor], Any]) -> None:
    with pytest.raises(ValueError, match="expected a target that gives one score per image"):
        explain(net, images, target=target)


def test_an_output_of_ones_own_needs_a_target(net: Net, images: Tensor) -> None:
    with pytest.raises(ValueError, match="got dict: give a `target`"):
        explain(net, images, forward_fn=lambda m, x: {"answer": m(x)})


def test_the_search_leaves_no_graph_and_no_hook(net: Net, images: Tensor) -> None:
    with torch.no_grad():
        assert find_layer(net, images) == "late"
    assert all(p.grad is None for p in net.parameters())
    assert not any(m._forward_hooks for m in net.modules())


# Gradients of linear layers, only where there are any.


@pytest.mark.parametrize("read", ["class token", "mean of tokens"])
def test_skipping_rows_without_gradient_changes_no_gradient(read: str) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(8, 16), nn.Linear(16, 8, bias=False)]
    tokens = torch.randn(3, 10, 8, requires_grad=True)

    def score() -> Tensor:
        hidden = layers[1](nn.functional.gelu(layers[0](tokens)))
        return ((hidden[:, 0] if read == "class token" else hidden.mean(1)) ** 2).sum()

    plain = score()
    expected = torch.autograd.grad(plain, tokens)[0]
    with SparseRows():
        sparse = score()
    assert torch.equal(sparse, plain)
    torch.testing.assert_close(torch.autograd.grad(sparse, tokens)[0], expected)


def test_what_is_skipped_are_multiplications() -> None:
    weight = torch.randn(64, 64)
    tokens = torch.randn(4, 50, 64, requires_grad=True)

    def flops(context: Any) -> int:
        with context:
            total = nn.functional.linear(tokens, weight)[:, 0].sum()
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(total, tokens)
        return counter.get_total_flops()

    # Of 50 tokens one has a gradient.
    assert flops(nullcontext()) == 50 * flops(SparseRows()) == 2 * 4 * 50 * 64 * 64


def test_attention_is_explained_as_without_skipping() -> None:
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=3).eval()
    nn.init.normal_(model.heads.head.weight)
    images = torch.rand(2, 3, 32, 32)
    heatmaps = explain(model, images, target=torch.tensor([0, 2]), sign="signed")
    # By hand: the last block from its first norm on.
    block = model.encoder.layers[1]
    tokens = torch.cat([model.class_token.expand(2, -1, -1), model._process_input(images)], dim=1)
    before = model.encoder.layers[0](tokens + model.encoder.pos_embedding)
    normed = block.ln_1(before).detach().requires_grad_()
    attended = before.detach() + block.self_attention(normed, normed, normed, need_weights=False)[0]
    after = model.encoder.ln(attended + block.mlp(block.ln_2(attended)))
    logits = model.heads(after[:, 0])
    gradient = torch.autograd.grad(logits[0, 0] + logits[1, 2], normed)[0]
    weights = gradient[:, 1:].mean(1)
    expected = torch.einsum("bc,bnc->bn", weights, normed[:, 1:]).reshape(2, 4, 4)
    torch.testing.assert_close(heatmaps.maps, expected, rtol=1e-4, atol=1e-6)

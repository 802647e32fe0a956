"""Every family of vision models: the layer is found, and its output is put on a grid."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchvision.models import get_model, get_model_weights, list_models

from bias_audit import explain
from bias_audit.attribution.inputs import shape_of_images
from bias_audit.attribution.layouts import TokenGrid, channels_first, channels_last, channels_of, find_layout
from bias_audit.localization import energy_share, project_regions


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
    # transformers 5.0 has its transformers' layers in an encoder.
    assert heatmaps.layer.replace("encoder.layer.", "layers.") == layer
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
    # Against region tubes: something that moves from left to right.
    tubes = torch.zeros(2, 1, 8, 48, 64, dtype=torch.bool)
    for frame in range(8):
        tubes[:, 0, frame, 10:30, 8 * frame : 8 * frame + 12] = True
    positive = explain(model, clips, target=torch.tensor([2, 0]), sign="absolute")
    share = energy_share(positive.maps, project_regions(tubes, positive.maps.shape[1:]))
    pixels = positive.upsample((8, 48, 64))
    expected_share = (pixels * tubes[:, 0]).flatten(1).sum(1) / pixels.flatten(1).sum(1)
    assert share.valid.all()
    torch.testing.assert_close(share.value[:, 0], expected_share, rtol=1e-4, atol=1e-6)


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


# Which layer is found where other things than images go through the network too.


class Asked(nn.Module):
    """A question about an image: convolutions, a recurrent layer over the words, an answer per word."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, stride=4), nn.ReLU())
        self.words = nn.Embedding(20, 8)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.answers = nn.Linear(8, 11)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        seen = self.features(batch["image"]).mean((2, 3))
        return self.answers(self.lstm(self.words(batch["question"]) + seen[:, None])[0])


@pytest.mark.parametrize("steps", [4, 5, 6, 8, 9, 16])
def test_words_are_no_places(steps: int) -> None:
    torch.manual_seed(0)
    batch = {"image": torch.rand(3, 3, 64, 64), "question": torch.randint(20, (3, steps))}
    heatmaps = explain(Asked(), batch, target=lambda outputs: outputs[:, -1, 3], sign="signed")
    assert heatmaps.layer == "features"
    assert heatmaps.maps.shape == (3, 16, 16)
    assert (heatmaps.maps.flatten(1).std(1) > 0).all()


class MHSA(nn.Module):
    """Attention of one's own, with norms of queries and keys."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.q_norm, self.k_norm = nn.LayerNorm(8), nn.LayerNorm(8)

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = self.qkv(tokens).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return out.transpose(1, 2).flatten(2)


class OwnTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 8, stride=8)
        self.norm, self.mixing, self.head = nn.LayerNorm(16), MHSA(), nn.Linear(16, 3)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.embed(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([patches.new_zeros(len(patches), 1, 16), patches], dim=1)
        return self.head((tokens + self.mixing(self.norm(tokens)))[:, 0])


def test_queries_and_keys_are_no_maps() -> None:
    torch.manual_seed(0)
    heatmaps = explain(OwnTransformer(), torch.rand(2, 3, 64, 64), sign="signed")
    assert heatmaps.layer == "norm"
    assert heatmaps.maps.shape == (2, 8, 8)


class Reused(nn.Module):
    """One activation module for all layers, as the commonest plain network has it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.relu, self.head = nn.ReLU(), nn.Linear(6, 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(input=self.relu(self.second(self.relu(self.first(images)))).mean((2, 3)))


def test_a_module_that_runs_twice_is_not_chosen() -> None:
    assert explain(Reused(), torch.rand(2, 3, 8, 12)).layer == "second"


def test_few_channels_of_valid_convolutions_are_not_taken_for_rows() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2)
    )
    inputs = torch.rand(2, 3, 60, 90)
    net(inputs)
    heatmaps = explain(net, inputs)
    assert (heatmaps.layer, heatmaps.maps.shape) == ("4", (2, 24, 39))


@pytest.mark.parametrize(
    ("module", "expected"), [(nn.Conv2d(96, 96, 1), channels_first), (nn.LayerNorm(96), channels_last), (None, None)]
)
def test_as_many_channels_as_rows(module: nn.Module | None, expected: object) -> None:
    channels = None if module is None else channels_of(module, nn.Identity())
    if expected is None:
        with pytest.raises(ValueError, match="channels first or last"):
            find_layout((2, 96, 96, 96), (384, 384), channels)
    else:
        assert find_layout((2, 96, 96, 96), (384, 384), channels) is expected


def test_clips_with_frames_first() -> None:
    assert shape_of_images(torch.zeros(2, 16, 3, 32, 48)) == (2, (16, 32, 48))
    assert shape_of_images(torch.zeros(2, 3, 16, 32, 48)) == (2, (16, 32, 48))

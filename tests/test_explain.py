"""One call on a model: inputs, outputs, targets and layers of every kind, in every precision, and what is refused."""

from __future__ import annotations

import copy
from collections import namedtuple
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bias_audit import explain
from bias_audit.attribution.explain import fuse
from bias_audit.attribution.layers import find_layer
from bias_audit.attribution.rows import SparseRows
from bias_audit.attribution.targets import Contrast


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


@pytest.mark.parametrize("target", [0, 1, [0], "dog"])
def test_a_target_that_is_neither_classes_nor_a_function(net: Net, images: Tensor, target: Any) -> None:
    with pytest.raises(ValueError, match="expected class indices int64"):
        explain(net, images, target=target)


def test_what_a_forward_pass_keeps_is_taken_back(net: Net, images: Tensor) -> None:
    class Keeps(Net):
        def forward(self, images: Tensor) -> Tensor:
            self.seen = super().forward(images)
            self.register_buffer("late_comer", torch.zeros(1))
            return self.seen

    model = Keeps()
    before = set(vars(model)), set(model.state_dict())
    explain(model, images)
    assert (set(vars(model)), set(model.state_dict())) == before
    copy.deepcopy(model)


@pytest.mark.parametrize("count", [1, 3])
def test_a_head_that_squeezes(images: Tensor, count: int) -> None:
    torch.manual_seed(4)
    net = Net(classes=1)
    squeezing = nn.Sequential(net.early, net.late, net.head)
    got = explain(squeezing, images[:count], forward_fn=lambda m, x: m(x).squeeze(), layer="1", sign="signed")
    torch.testing.assert_close(got.maps, explain(net, images[:count], layer="late", sign="signed").maps)


def test_a_layer_that_puts_out_a_named_tuple(net: Net, images: Tensor) -> None:
    Output = namedtuple("Output", ["features", "size"])

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net.late

        def forward(self, x: Tensor) -> Any:
            return Output(self.inner(x), x.shape)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.early, self.late, self.head = net.early, Named(), net.head

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.late(self.early(x)).features)

    torch.testing.assert_close(explain(Model(), images, layer="late").maps, explain(net, images, layer="late").maps)


@pytest.mark.newest("timm 1.0.3 checkpoints by the reentrant way")
def test_checkpointing_in_the_tail() -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=3, img_size=64, depth=3)
    inputs = torch.rand(2, 3, 64, 64)
    expected = explain(model, inputs, layer="blocks.0", sign="signed").maps
    model.set_grad_checkpointing(True)
    torch.testing.assert_close(explain(model, inputs, layer="blocks.0", sign="signed").maps, expected)


def test_a_layer_named_twice(net: Net, images: Tensor) -> None:
    with pytest.raises(ValueError, match="expected each layer once"):
        explain(net, images, layer=["late", "late"])


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

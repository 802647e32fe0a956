"""Explain images by one call, outside of any audit.

Enters: a model, its inputs, targets. Leaves: `Heatmaps` at the layer's own resolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bias_audit.attribution.borrow import as_the_model_takes_them, borrowed
from bias_audit.attribution.cam import Explanation, Formula, Sign
from bias_audit.attribution.capture import Capture, capture_each
from bias_audit.attribution.layers import Forward, call, find_layer
from bias_audit.attribution.layouts import Layout
from bias_audit.attribution.methods import find_method
from bias_audit.attribution.targets import BinaryLogit, ClassLogit, Target, check_logits, predicted_logit
from bias_audit.resize import upsample

# In place of a layer's name, where a method explains the image's pixels.
INPUT = "input"


@dataclass(frozen=True)
class Heatmaps:
    """Maps `(B, *places)`, float32, unnormalised, on the model's device, and what they explain.

    Places are `(h, w)`, of clips `(t, h, w)`. `layer` is the name of the explained layer, `scores` the explained scores
    `(B,)`, `outputs` the model's outputs. Of K targets, maps are `(K, B, *places)` and scores `(K, B)`.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        >>> heatmaps = explain(net, torch.rand(5, 3, 8, 8))
        >>> heatmaps.layer, heatmaps.maps.shape, heatmaps.upsample((8, 8)).shape
        ('1', torch.Size([5, 6, 6]), torch.Size([5, 8, 8]))
    """

    maps: Tensor
    layer: str
    scores: Tensor
    outputs: Any

    def upsample(self, size: Sequence[int]) -> Tensor:
        """The maps at `size` = `(H, W)` or `(T, H, W)`: bilinear or trilinear, `align_corners=False`."""
        return upsample(self.maps, size)


def fuse(maps: Sequence[Tensor]) -> Tensor:
    """Maps of several layers as one: each over its image's largest absolute value, on the finest grid, averaged.

    Each is `(B, *places)`; what leaves is at most 1. A map that is all zero counts as zero.

    Example:
        >>> fuse([torch.tensor([[[2.0, 0.0]]]), torch.tensor([[[5.0]]])])
        tensor([[[1.0000, 0.5000]]])
    """
    finest = max((m.shape[1:] for m in maps), key=lambda places: places.numel())
    scaled: list[Tensor] = []
    for each in maps:
        peak = each.abs().flatten(1).amax(dim=1).view(-1, *(1 for _ in finest))
        scaled.append(upsample(each / torch.where(peak > 0, peak, 1), finest))
    return torch.stack(scaled).mean(dim=0)


def explain(
    model: nn.Module,
    inputs: Any,
    *,
    target: Tensor | Target | Sequence[Tensor | Target] | None = None,
    layer: str | Sequence[str] | None = None,
    method: str | Formula = "gradcam",
    sign: Sign = "positive",
    forward_fn: Forward = call,
    layout: Layout | None = None,
) -> Heatmaps:
    """Heatmaps of a batch of images: where the evidence for a score lies.

    Args:
        model: any vision model; it is given back as it was.
        inputs: images `(B, 3, H, W)` or clips `(B, 3, T, H, W)`, as the model takes them, on its device; or a pytree,
            such as a dict, with them in it.
        target: class indices int64 `(B,)`, or a function from outputs to scores `(B,)`; by default the predicted
            class's logit. Of an output that has `.logits` it gets those. Several, as a list or tuple, cost one forward.
        layer: name of the submodule to explain; by default the last whose output keeps the image's places. Several are
            fused (see `fuse`).
        method: "gradcam" (arXiv 1610.02391), another name in `attribution.methods.METHODS`, or a function
            `(activations, gradients, sign) -> maps`.
        sign: "positive" (the paper's ReLU), "negative" (its counterfactual), "absolute", or "signed". Methods without
            a gradient have "positive" and "signed" only.
        forward_fn: `forward_fn(model, inputs)` gives the outputs; by default `model(inputs)`.
        layout: makes the layer's output `(B, C, *places)`; by default it is recognised (see `find_layout`).

    Raises:
        ValueError: inputs without images, an unknown layer, method or sign, a method unsuited to the model, classes out
            of range, a target that is not `(B,)`, activations that are not finite.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        >>> heatmaps = explain(net, torch.rand(5, 3, 8, 8), target=torch.tensor([0, 1, 0, 1, 0]))
        >>> heatmaps.maps.shape, heatmaps.layer
        (torch.Size([5, 6, 6]), '1')
        >>> heatmaps.upsample((8, 8)).shape
        torch.Size([5, 8, 8])
    """
    if isinstance(inputs, Tensor) and (inputs.ndim not in (4, 5) or not len(inputs)):
        raise ValueError(f"expected a batch of images (B, 3, H, W), got {tuple(inputs.shape)}")
    found = find_method(method)
    found.check_sign(sign)
    several = isinstance(target, Sequence)
    targets = [_as_target(t) for t in target] if isinstance(target, Sequence) else [_as_target(target)]
    with borrowed(model) as lent:
        layers = (layer,) if isinstance(layer, str) else tuple(layer or ())
        if len(set(layers)) < len(layers):
            raise ValueError(f"expected each layer once, got {layers}")
        if not layers and found.needs_layer:
            layers = (find_layer(lent, as_the_model_takes_them(lent, inputs), forward_fn),)
        if found.formula is not None:
            taken = capture_each(lent, inputs, targets, layers, forward=forward_fn, layout=layout)
            for name, at_layer in zip(layers, taken[0], strict=True):
                _check_finite(at_layer.activations, f"the activations of layer {name!r}")
            explained = [_explained(by_layer, found.formula, sign) for by_layer in taken]
        elif len(layers) > 1:
            raise ValueError(f"{found.name} explains one layer at a time, got {len(layers)}: name one of them")
        else:
            name = layers[0] if found.needs_layer else ""
            explained = [found.run(lent, inputs, t, name, sign, forward_fn, layout) for t in targets]
    maps, scores = torch.stack([one.maps for one in explained]), torch.stack([one.scores for one in explained])
    _check_finite(maps.transpose(0, 1), f"the maps of {found.name}")
    if not several:
        maps, scores = maps[0], scores[0]
    return Heatmaps(maps, " + ".join(layers) if found.needs_layer else INPUT, scores, explained[0].outputs)


def _explained(by_layer: Sequence[Capture], compute: Formula, sign: Sign) -> Explanation:
    # The forward pass may be the user's autocast's affair; a map's arithmetic is float32.
    with torch.autocast(by_layer[0].activations.device.type, enabled=False):
        maps = [compute(taken.activations, taken.gradients, sign) for taken in by_layer]
    return Explanation(maps[0] if len(maps) == 1 else fuse(maps), by_layer[0].scores, by_layer[0].outputs)


def _as_target(target: Tensor | Target | None) -> Target:
    """The function that a target stands for: class indices for their logits, None for the predicted class's."""
    if isinstance(target, Tensor):
        return _OfClasses(target)
    if target is None:
        return predicted_logit
    if not callable(target):
        raise ValueError(
            f"expected class indices int64 (B,) as a tensor, or a function from outputs to scores (B,), got {target!r}"
        )
    return target


@dataclass(frozen=True)
class _OfClasses:
    classes: Tensor

    def __call__(self, outputs: Any) -> Tensor:
        check_logits(outputs)
        if self.classes.shape != outputs.shape[:1] or self.classes.is_floating_point():
            got = f"{self.classes.dtype} {tuple(self.classes.shape)}"
            raise ValueError(f"expected class indices ({len(outputs)},) as target, got {got}")
        one_logit = outputs.shape[1] == 1
        check_classes(self.classes, 2 if one_logit else outputs.shape[1])
        return (BinaryLogit if one_logit else ClassLogit)(self.classes)(outputs)


def check_classes(classes: Tensor, count: int) -> None:
    """Raise ValueError unless every class index lies in `[0, count)`."""
    wrong = classes[(classes < 0) | (classes >= count)]
    if len(wrong):
        raise ValueError(f"class {int(wrong[0])} is out of range: the model has {count} outputs, 0 to {count - 1}")


def _check_finite(values: Tensor, what: str) -> None:
    """`values` are `(B, ...)`."""
    finite = values.isfinite().flatten(1).all(dim=1)
    if not finite.all():
        which = (~finite).nonzero().flatten().tolist()
        raise ValueError(
            f"{what} are NaN or infinite on image {which[0]} of the batch ({len(which)} of {len(finite)} in all): "
            "check these images and the weights"
        )

"""Explain images by one call, outside of any audit.

Enters: a model, images, a target. Leaves: `Heatmaps` at the layer's own resolution.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from bias_audit.attribution.cam import Formula, Sign, check_sign, formula
from bias_audit.attribution.capture import as_the_model_takes_them, borrowed, capture
from bias_audit.attribution.layers import find_layer
from bias_audit.attribution.targets import BinaryLogit, ClassLogit, Target, predicted_logit


@dataclass(frozen=True)
class Heatmaps:
    """Maps `(B, h, w)`, float32, unnormalised, on the model's device, and what they explain.

    `layer` is the name of the explained layer, `scores` the explained scores `(B,)`, `outputs` the model's outputs
    `(B, classes)`.
    """

    maps: Tensor
    layer: str
    scores: Tensor
    outputs: Tensor

    def upsample(self, size: tuple[int, int]) -> Tensor:
        """The maps at `size` = `(H, W)`, `(B, H, W)`: bilinear, `align_corners=False`."""
        return upsample(self.maps, size)


def upsample(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps `(B, h, w)` at `size` = `(H, W)`, `(B, H, W)`: bilinear, `align_corners=False`."""
    return nn.functional.interpolate(maps[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


def explain(
    model: nn.Module,
    images: Tensor,
    *,
    target: Tensor | Target | None = None,
    layer: str | None = None,
    method: str | Formula = "gradcam",
    sign: Sign = "positive",
) -> Heatmaps:
    """Heatmaps of a batch of images: where the evidence for a score lies.

    Args:
        model: any classifier; it is given back as it was.
        images: `(B, 3, H, W)`, as the model takes them, on its device.
        target: class indices int64 `(B,)`, or a function from outputs `(B, classes)` to scores `(B,)`; by default the
            predicted class's logit.
        layer: name of the submodule to explain; by default the last with a feature map.
        method: "gradcam" (arXiv 1610.02391) or "hirescam" (arXiv 2011.08891), or a function
            `(activations, gradients, sign) -> maps`.
        sign: "positive" (the paper's ReLU), "negative" (its counterfactual), "absolute", or "signed".

    Raises:
        ValueError: images that are no batch, an unknown layer, method or sign, classes out of range, or a model whose
            output is not `(B, classes)`.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        >>> heatmaps = explain(net, torch.rand(5, 3, 8, 8), target=torch.tensor([0, 1, 0, 1, 0]))
        >>> heatmaps.maps.shape, heatmaps.layer
        (torch.Size([5, 6, 6]), '1')
        >>> heatmaps.upsample((8, 8)).shape
        torch.Size([5, 8, 8])
    """
    if images.ndim != 4 or not len(images):
        raise ValueError(f"expected a batch of images (B, 3, H, W), got {tuple(images.shape)}")
    check_sign(sign)
    compute = formula(method)
    with borrowed(model) as lent:
        layer = layer or find_layer(lent, as_the_model_takes_them(lent, images[:1]))
        taken = capture(lent, images, _as_target(target, len(images)), layer)
    return Heatmaps(compute(taken.activations, taken.gradients, sign), layer, taken.scores, taken.outputs)


def _as_target(target: Tensor | Target | None, batch: int) -> Target:
    if target is None:
        return predicted_logit
    if not isinstance(target, Tensor):
        return target
    if target.shape != (batch,) or target.is_floating_point():
        raise ValueError(f"expected class indices ({batch},) as target, got {target.dtype} {tuple(target.shape)}")
    classes = target

    def checked(outputs: Tensor) -> Tensor:
        one_logit = outputs.shape[1] == 1
        check_classes(classes, 2 if one_logit else outputs.shape[1])
        return (BinaryLogit if one_logit else ClassLogit)(classes)(outputs)

    return checked


def check_classes(classes: Tensor, count: int) -> None:
    """Raise ValueError unless every class index lies in `[0, count)`."""
    wrong = classes[(classes < 0) | (classes >= count)]
    if len(wrong):
        raise ValueError(f"class {int(wrong[0])} is out of range: the model has {count} outputs, 0 to {count - 1}")

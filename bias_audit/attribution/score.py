"""Score-CAM: channels weighted by the score of the image seen through them.

Enters: a borrowed model, its inputs, a target, a layer. Leaves: maps `(B, *places)`, float32, unnormalised, with the
scores and outputs that belong to them. It costs one forward pass per channel, and no gradient enters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bias_audit.attribution.borrow import as_the_model_takes_them
from bias_audit.attribution.cam import NO_GRADIENT, ONE_SIDED, Explanation, Sign, check_sign, weighted
from bias_audit.attribution.capture import capture, logits_of, scores_of
from bias_audit.attribution.inputs import take_images
from bias_audit.attribution.layers import Forward, call
from bias_audit.attribution.layouts import Layout
from bias_audit.attribution.targets import BinaryLogit, ClassLogit, RankedLogit, Target, predicted_logit
from bias_audit.resize import upsample

# A channel that varies by less than this share of its values does not vary.
_ROUNDING = 1e-5


@torch.no_grad()
def scorecam(
    model: nn.Module,
    inputs: Any,
    target: Target,
    layer: str,
    sign: Sign = "positive",
    *,
    forward: Forward = call,
    layout: Layout | None = None,
    chunk: int = 64,
) -> Explanation:
    """Score-CAM: the image is masked by each channel in turn, and the scores weigh the channels.

    `H_k` is channel k upsampled to the image and scaled to [0, 1], `weights = softmax_k(f(X * H_k) - f(0))`, and
    `map = relu(sum_k weights_k A_k)`; arXiv 1910.01279, algorithm 1. The baseline f(0) is the same for all channels of
    an image and falls out of the softmax, so it is not run. A channel that is constant over an image points nowhere:
    its mask is 0. "signed" is the map without the ReLU. The predicted class is that of the whole image.

    At most `chunk` masked images go through the model at once, or the batch where that is larger.

    Raises:
        ValueError: a sign other than "positive" and "signed", inputs without float images; and as `capture`.

    Example:
        >>> from bias_audit.attribution.borrow import borrowed
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        >>> with borrowed(net) as lent:
        ...     found = scorecam(lent, torch.rand(5, 3, 8, 8), lambda outputs: outputs[:, 0], "1")
        >>> found.maps.shape
        torch.Size([5, 6, 6])
    """
    check_sign(sign, ONE_SIDED, NO_GRADIENT.format("Score-CAM"))
    taken = capture(model, inputs, target, layer, forward=forward, layout=layout)
    target = _of_the_whole_image(target, taken.outputs)
    images, put = take_images(as_the_model_takes_them(model, inputs))
    batch = len(taken.activations)
    # Only a tensor of outputs can be cut into those of the channels.
    at_once = max(1, chunk // batch) if isinstance(taken.outputs, Tensor) else 1
    scores: list[Tensor] = []
    for some in torch.split(taken.activations.float(), at_once, dim=1):
        masks = _scaled(upsample(some, images.shape[2:])).to(images.dtype)
        # Channel by channel, each with the whole batch, so that a target finds its images in their order.
        masked = (masks.transpose(0, 1)[:, :, None] * images).flatten(0, 1)
        outputs = logits_of(forward(model, put(masked, some.shape[1])))
        each = torch.split(outputs, batch) if isinstance(taken.outputs, Tensor) else (outputs,)
        scores.extend(scores_of(target, o, batch).float() for o in each)
    weights = torch.stack(scores, dim=1).softmax(dim=1)
    return Explanation(weighted(weights, taken.activations, sign), taken.scores, taken.outputs)


def _scaled(maps: Tensor) -> Tensor:
    """Maps `(B, C, *places)`, each from 0 to 1; 0 if it is constant but for rounding."""
    places = tuple(range(2, maps.ndim))
    lowest = maps.amin(dim=places, keepdim=True)
    height = maps.amax(dim=places, keepdim=True) - lowest
    rounding = _ROUNDING * maps.abs().amax(dim=places, keepdim=True)
    return torch.where(height > rounding, (maps - lowest) / height, 0)


def _of_the_whole_image(target: Target, outputs: Any) -> Target:
    """The same target, but one that picks a class by the outputs picks it here, once."""
    if target is predicted_logit:
        target = RankedLogit(1)
    if not isinstance(target, RankedLogit):
        return target
    if outputs.shape[1] == 1:
        return BinaryLogit(((outputs[:, 0] > 0) == (target.rank == 1)).long())
    return ClassLogit(outputs.topk(target.rank, dim=1).indices[:, -1])

"""A term for the loss that trains a model to look away from regions: right for the right reasons.

Enters: a model in training, a batch of images, their labels and a mask of the pixels that must not matter. Leaves: the
share of each map's energy on those pixels, averaged: one number that can be differentiated by the model's parameters.

It is what an audit measures there as `energy_share`, by the same formulas and the same projection. An audit keeps a
graph of the model's tail alone; here the trunk needs one too, and the gradient in the map has to be differentiable
itself.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bias_audit.attribution.borrow import as_the_model_takes_them, borrowed
from bias_audit.attribution.cam import FORMULAS, Sign, check_sign
from bias_audit.attribution.capture import logits_of, scores_of
from bias_audit.attribution.layers import Forward, call, find_layer, first_tensor, submodule
from bias_audit.attribution.layouts import channels_of, find_layout
from bias_audit.attribution.targets import BinaryLogit, ClassMargin, check_logits
from bias_audit.localization import energy_share, project_regions


def attention_penalty(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    masks: Tensor,
    *,
    layer: str | None = None,
    method: str = "gradcam",
    sign: Sign = "positive",
    forward_fn: Forward = call,
) -> Tensor:
    """The mean share of the maps' energy on masked pixels, a scalar in [0, 1], differentiable by the parameters.

    Add it to the loss: `loss + strength * attention_penalty(...)`. It penalises what "Right for the Right Reasons"
    (arXiv 1703.03717) penalises, an explanation's mass on pixels that are annotated as irrelevant; there the
    explanation is the input gradient, here a class activation map of the label's margin, as an audit takes it. A share
    has no scale, so `strength` need not follow the size of the logits: start with 1; more may cost accuracy.

    The maps are those of the model in eval mode, as in an audit: dropout is off and BatchNorm uses its running
    statistics and leaves them alone. Parameters' `.grad`, modes, hooks, buffers and generators stay as they are. It
    costs one more forward pass and, in the backward pass, that of a gradient: a step of a small network takes twice as
    long. Where grad is off, as in validation, the value comes without a graph.

    A small share is not proof that the cue is unused: a place of a map has seen its neighbours too, and what the
    network knows of the cue may move there. Audit the result; where a swap still changes decisions, widen the masks.

    Args:
        model: what is trained; in a LightningModule's `training_step`, `self`.
        images: `(B, 3, H, W)` or clips `(B, 3, T, H, W)`, as the model takes them.
        labels: class indices int64 `(B,)`.
        masks: bool `(B, H, W)` or `(B, T, H, W)`, True where the model should not look. Images whose mask is empty, or
            whose map is silent, count nothing; with no others the penalty is 0.
        layer: name of the submodule to look at; by default that of `explain`, found anew each time at the cost of a
            forward and a backward pass of two images, so name it.
        method: a formula's name in `attribution.cam.FORMULAS`, not "eigencam", which knows no class.
        sign: "positive", "negative" (what speaks against the label) or "absolute" (both).
        forward_fn: `forward_fn(model, images)` gives the outputs; by default `model(images)`.

    Raises:
        ValueError: masks that do not fit the images, an unknown layer, method or sign, a layer that runs more than
            once, has no places or does not reach the outputs, outputs that are not `(B, classes)`.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        >>> images, labels = torch.rand(5, 3, 8, 8), torch.tensor([0, 1, 0, 1, 0])
        >>> hair = torch.zeros(5, 8, 8, dtype=torch.bool)
        >>> hair[:, :2] = True
        >>> loss = nn.functional.cross_entropy(net(images), labels)
        >>> loss = loss + 0.5 * attention_penalty(net, images, labels, hair, layer="1")
        >>> loss.backward()
    """
    formula = FORMULAS.get(method)
    if formula is None or method == "eigencam":
        known = ", ".join(name for name in FORMULAS if name != "eigencam")
        raise ValueError(f"unknown method {method!r}: expected one of {known}")
    check_sign(sign, ("positive", "negative", "absolute"), "a penalty is a share of energy, and signed maps have none")
    places = images.shape[2:]
    if masks.dtype != torch.bool or masks.shape != (len(images), *places):
        raise ValueError(
            f"expected masks bool {(len(images), *places)} for images {tuple(images.shape)}, got {masks.dtype} "
            f"{tuple(masks.shape)}: one mask per image, the union of its regions"
        )
    differentiate = torch.is_grad_enabled()
    with borrowed(model) as lent:
        inputs = as_the_model_takes_them(lent, images)
        layer = layer or find_layer(lent, inputs, forward_fn)
        # BatchNorm's next training step writes into its statistics, which the graph still needs: autograd would not
        # notice, and the gradient would be another.
        for module in lent.modules():
            module._buffers.update({n: b if b is None else b.clone() for n, b in module._buffers.items()})
        with torch.enable_grad():
            features, outputs = _forward(lent, layer, inputs, forward_fn)
            check_logits(outputs)
            of_label = (BinaryLogit if outputs.shape[1] == 1 else ClassMargin)(labels)
            score = scores_of(of_label, outputs, len(images)).sum()
            gradients = torch.autograd.grad(score, features, create_graph=differentiate, allow_unused=True)[0]
            if gradients is None:
                raise ValueError(f"the outputs do not depend on layer {layer!r}: name one that they go through")
            layout = find_layout(features.shape, places, channels_of(submodule(lent, layer), lent))
            if layout is None:
                raise ValueError(f"layer {layer!r} has no spatial output, got {tuple(features.shape)}: name another")
            with torch.autocast(features.device.type, enabled=False):
                maps = formula(layout(features), layout(gradients), sign)
                share = energy_share(maps, project_regions(masks[:, None], maps.shape[1:]))
                penalty = share.value.sum() / share.valid.sum().clamp_min(1)
    return penalty if differentiate else penalty.detach()


def _forward(model: nn.Module, layer: str, inputs: Any, forward: Forward) -> tuple[Tensor, Tensor]:
    """What `layer` puts out, with the graph that it hangs on, and the outputs."""
    taken: list[Tensor] = []

    def take(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        features = first_tensor(output)
        if not isinstance(features, Tensor) or not features.is_floating_point():
            raise ValueError(f"layer {layer!r} puts out no tensor of floats: name another layer")
        # Behind a frozen trunk the head can still learn to weigh the channels otherwise.
        features = features if features.requires_grad else features.detach().requires_grad_()
        taken.append(features)
        # A copy, because what follows may write into its input (an in-place ReLU).
        if isinstance(output, tuple) and hasattr(output, "_replace"):
            return output._replace(**{output._fields[0]: features.clone()})  # type: ignore[attr-defined]
        return (features.clone(), *output[1:]) if isinstance(output, tuple) else features.clone()

    with ExitStack() as stack:
        stack.enter_context(submodule(model, layer).register_forward_hook(take))
        # The other kernels of attention have no second derivative.
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        outputs = logits_of(forward(model, inputs))
    if len(taken) != 1:
        times = "never" if not taken else f"{len(taken)} times"
        raise ValueError(f"layer {layer!r} ran {times} in one forward pass, once is needed: name another layer")
    return taken[0], outputs

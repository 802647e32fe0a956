"""Borrow a model and take from it, in one forward pass, a layer's activations and the gradients of a score.

Enters: a model in whatever state training left it, images `(B, 3, H, W)`, a layer's name and a target. Leaves: a
`Capture`; and the model as it was: modes, hooks, buffers, gradients, generators, grad mode, after an exception too.

Only the tail has a graph. The trunk runs without one; in a forward hook on the layer its output becomes a leaf and grad
is switched on, so that one `torch.autograd.grad` at the end costs the head alone. That also makes frozen models and
models inside `no_grad` work, and never touches a parameter's `.grad`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bias_audit.attribution.layers import is_feature_map
from bias_audit.attribution.targets import Target
from bias_audit.rng import preserved_rng


@dataclass(frozen=True)
class Capture:
    """What one forward pass and one differentiation of its tail gave.

    `activations` and `gradients` are `(B, C, h, w)` in the model's precision, detached; `outputs` float32
    `(B, classes)`; `scores` float32 `(B,)`.
    """

    activations: Tensor
    gradients: Tensor
    outputs: Tensor
    scores: Tensor


def unwrap(model: nn.Module) -> nn.Module:
    """The eager module inside DistributedDataParallel and `torch.compile`: hooks do not fire on the wrappers."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


@contextmanager
def borrowed(model: nn.Module) -> Iterator[nn.Module]:
    """The unwrapped model in eval mode, without grad; on leaving everything is as it was, after an exception too.

    Kept are the mode of every submodule, every buffer's content and identity, all global generators, grad and
    inference mode. Inside `torch.inference_mode` it is left for the time, since nothing can be differentiated in it.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).train()
        >>> with borrowed(net) as lent:
        ...     lent.training
        False
        >>> net.training, net[1].training
        (True, True)
    """
    model = unwrap(model)
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in model.parameters()):
        raise ValueError(
            f"{type(model).__name__} has lazy parameters that no batch has shaped yet: run one batch through it first, "
            "because shaping them draws the random numbers that training would draw"
        )
    # `model.eval()` would call `train()` methods that users override (to keep a BatchNorm frozen, say), which is theirs
    # to decide and ours not to trigger.
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, None if buffer is None else (buffer._version, buffer.detach().clone()))
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is None or not buffer.is_inference()
    ]
    with preserved_rng():
        try:
            for module, _ in modes:
                module.training = False
            # Hooks do not fire inside compiled code.
            with torch.inference_mode(False), torch.no_grad(), torch.compiler.set_stance("force_eager"):
                yield model
        finally:
            for module, mode in modes:
                module.training = mode
            with torch.no_grad():
                for module, name, buffer, kept in buffers:
                    module._buffers[name] = buffer
                    if buffer is not None and kept is not None and buffer._version != kept[0]:
                        buffer.copy_(kept[1])


def capture(model: nn.Module, images: Tensor, target: Target, layer: str) -> Capture:
    """Activations of `layer` and the gradients of `target`'s scores with respect to them, from one forward pass.

    `model` is a borrowed one (see `borrowed`). Images are converted to the precision of the model's weights.

    Raises:
        ValueError: no such layer; it ran never or more than once; its output is no feature map; the model's output is
            not `(B, classes)`; the target is not `(B,)` or does not depend on the layer.
    """
    module = _submodule(model, layer)
    images = as_the_model_takes_them(model, images)
    with torch.no_grad():
        leaf, outputs = _forward(model, module, layer, images)
    if not outputs.requires_grad:
        # The user's forward runs the layer inside a `no_grad` of its own, which on leaving switched off again what the
        # hook switched on. With grad on from the start it goes back to on; the frozen part still builds no graph.
        with torch.enable_grad():
            leaf, outputs = _forward(model, module, layer, images)
    _check_outputs(outputs, len(images))
    with torch.enable_grad():
        scores = target(outputs)
        total = scores.sum()
    if scores.shape != (len(images),):
        raise ValueError(
            f"expected a target that gives one score per image, ({len(images)},), got {tuple(scores.shape)}"
        )
    gradients = torch.autograd.grad(total, leaf, allow_unused=True)[0] if total.requires_grad else None
    if gradients is None:
        raise ValueError(f"the target does not depend on layer {layer!r}: explain a layer that the score goes through")
    return Capture(leaf.detach(), gradients, outputs.detach().float(), scores.detach().float())


def _submodule(model: nn.Module, layer: str) -> nn.Module:
    try:
        return model.get_submodule(layer)
    except AttributeError:
        names = [name for name, _ in model.named_modules() if name]
        # The end of a model is where the layers are that people look for.
        raise ValueError(
            f"{type(model).__name__} has no layer {layer!r}: the last of its {len(names)} layers are {names[-12:]}"
        ) from None


def as_the_model_takes_them(model: nn.Module, images: Tensor) -> Tensor:
    """The images in the precision of the model's weights, ready to be differentiated through."""
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    if weight is not None and weight.dtype in (torch.bfloat16, torch.float16, torch.float64):
        images = images.to(weight.dtype)
    # Tensors made under inference_mode cannot be saved for a backward pass.
    return images.clone() if images.is_inference() else images


def _forward(model: nn.Module, module: nn.Module, layer: str, images: Tensor) -> tuple[Tensor, Tensor]:
    leaves: list[Tensor] = []

    def make_leaf(_module: nn.Module, _inputs: Any, output: Any) -> Tensor:
        if not is_feature_map(output):
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"layer {layer!r} has no spatial output: expected (B, C, h, w), got {got}: name another")
        leaf: Tensor = output.detach().requires_grad_()
        leaves.append(leaf)
        torch.set_grad_enabled(True)
        # A copy, because what follows may write into its input (an in-place ReLU), which a leaf does not allow.
        return leaf.clone()

    handle = module.register_forward_hook(make_leaf)
    try:
        outputs = model(images)
    finally:
        handle.remove()
    if len(leaves) != 1:
        times = "never" if not leaves else f"{len(leaves)} times"
        raise ValueError(f"layer {layer!r} ran {times} in one forward pass, once is needed: name another layer")
    if not isinstance(outputs, Tensor):
        raise ValueError(f"expected a model output (B, classes), got {type(outputs).__name__}")
    return leaves[0], outputs


def _check_outputs(outputs: Tensor, batch: int) -> None:
    if outputs.ndim != 2 or len(outputs) != batch:
        raise ValueError(
            f"expected a model output ({batch}, classes), got {tuple(outputs.shape)}: audit the classifier"
        )

"""Which layer to explain.

Enters: a model and one batch of images. Leaves: the name of a submodule whose output is a feature map `(B, C, h, w)`.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

# Pooling only coarsens the map that went in; dropout does nothing in an audit.
_PASSES_OVER = (
    nn.AvgPool2d,
    nn.MaxPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.Dropout,
    nn.Dropout2d,
    nn.Identity,
)


def is_feature_map(output: Any) -> bool:
    """Whether an output is a float map `(B, C, h, w)` with more than one place."""
    return (
        isinstance(output, Tensor)
        and output.ndim == 4
        and output.is_floating_point()
        and output.shape[2] * output.shape[3] > 1
    )


def find_layer(model: nn.Module, images: Tensor) -> str:
    """Name of the last submodule, in order of execution, that puts out a feature map, pooling aside.

    It is the paper's choice, the last convolutional layer (arXiv 1610.02391, section 3): for a ResNet its `layer4`, for
    a VGG the last ReLU of `features`. `images` is a batch that the model takes; the model must be in the state in
    which it is to be explained, and no graph is built here only if the caller switched grad off.

    Raises:
        ValueError: no submodule puts out a feature map.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        >>> find_layer(net, torch.zeros(1, 3, 8, 8))
        '1'
    """
    # A container puts out its last child's tensor and comes after it: taking the last names the outermost container.
    seen: list[tuple[str, Tensor]] = []
    passed_over: list[Tensor] = []

    def remember(name: str, module: nn.Module) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not is_feature_map(output):
                return
            if isinstance(module, _PASSES_OVER):
                passed_over.append(output)
            else:
                seen.append((name, output))

        return module.register_forward_hook(hook)

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if name:
                hooks.enter_context(remember(name, module))
        model(images)
    candidates = [(name, output) for name, output in seen if not any(output is other for other in passed_over)]
    if not candidates:
        raise ValueError(
            f"{type(model).__name__} has no layer with a spatial output (B, C, h, w): name the layer to explain, one "
            "whose output keeps the places of the image"
        )
    return candidates[-1][0]

"""How the stages of an audit run the model.

Enters: a borrowed model, and how the user wants it run. Leaves: captures, logits and features of images.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bias_audit.attribution.borrow import as_the_model_takes_them
from bias_audit.attribution.capture import Capture, capture, logits_of
from bias_audit.attribution.features import penultimate
from bias_audit.attribution.layers import Forward, call
from bias_audit.attribution.layouts import Layout
from bias_audit.attribution.targets import Target

ForwardContext = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class ForwardPasses:
    """A borrowed `model` on its `device`, the `layer` to explain, and how it is run.

    `forward` and `layout` are the plan's, `context` is what the model runs in, such as a training's autocast.
    """

    model: nn.Module
    device: torch.device
    layer: str
    forward: Forward = call
    layout: Layout | None = None
    context: ForwardContext = nullcontext

    def capture(self, images: Tensor, target: Target) -> Capture:
        """The layer's activations for images `(B, 3, H, W)`, and the target's gradients by them."""
        with self.context():
            return capture(self.model, images, target, self.layer, forward=self.forward, layout=self.layout)

    def logits(self, images: Tensor) -> Tensor:
        """The model's logits for images `(B, 3, H, W)`: `(B, classes)`, as it puts them out."""
        with self.context():
            found: Tensor = logits_of(self.forward(self.model, as_the_model_takes_them(self.model, images)))
        return found

    def features(self, images: Tensor) -> Tensor | None:
        """What the last linear layer reads of each image, float32 `(B, F)`; None without such a layer."""
        with penultimate(self.model) as latest, self.context():
            self.forward(self.model, as_the_model_takes_them(self.model, images))
            found = latest()
        return None if found is None or len(found) != len(images) else found.float()


def device_of(model: nn.Module) -> torch.device:
    """The device of the first of a model's parameters or buffers; the CPU where it has none."""
    tensors = (*model.parameters(), *model.buffers())
    return tensors[0].device if tensors else torch.device("cpu")

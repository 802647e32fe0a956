"""Which score a heatmap explains.

Enters: a model's outputs `(B, classes)`, logits, never probabilities: a softmax squeezes the gradient of a confident
decision to nothing. Leaves: one score per image `(B,)`. A target is any such function; these are the ready ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Target = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ClassLogit:
    """The logit of one class per image; `classes` is int64 `(B,)`."""

    classes: Tensor

    def __call__(self, outputs: Tensor) -> Tensor:
        """Scores `(B,)`."""
        return outputs.gather(1, self.classes.to(outputs.device)[:, None])[:, 0]


@dataclass(frozen=True)
class ClassMargin:
    """The logit of one class minus the largest other, per image: what decides for or against the class.

    With two classes only the difference of the logits is trained, and this is it. `classes` is int64 `(B,)`.
    """

    classes: Tensor

    def __call__(self, outputs: Tensor) -> Tensor:
        """Scores `(B,)`."""
        index = self.classes.to(outputs.device)[:, None]
        others = outputs.scatter(1, index, -torch.inf)
        return (outputs.gather(1, index) - others.amax(dim=1, keepdim=True))[:, 0]


def predicted_logit(outputs: Tensor) -> Tensor:
    """The logit of the predicted class, `(B,)`; of a head with one logit, the logit turned for class 0."""
    return outputs[:, 0].abs() if outputs.shape[1] == 1 else outputs.amax(dim=1)


@dataclass(frozen=True)
class Contrast:
    """The logit of class `of` minus that of class `against`: why one rather than the other."""

    of: int
    against: int

    def __call__(self, outputs: Tensor) -> Tensor:
        """Scores `(B,)`."""
        return outputs[:, self.of] - outputs[:, self.against]


@dataclass(frozen=True)
class BinaryLogit:
    """The score of a head with one logit, `(B, 1)`, turned for images whose class is 0.

    `classes` is int64 `(B,)` of 0 and 1: the logit speaks for class 1.
    """

    classes: Tensor

    def __call__(self, outputs: Tensor) -> Tensor:
        """Scores `(B,)`."""
        return outputs.flatten() * (2 * self.classes.to(outputs.device) - 1)

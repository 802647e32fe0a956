"""The methods that `explain` knows by name.

Enters: a name, or a formula of the user's. Leaves: a `Method`, which says where it comes from, which signs it has, and
how it is run on a borrowed model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from bias_audit.attribution.backprop import deconvolution, guided_backprop, guided_gradcam
from bias_audit.attribution.cam import FORMULAS, NO_GRADIENT, ONE_SIDED, SIGNS, Explanation, Formula, Sign, check_sign
from bias_audit.attribution.capture import capture
from bias_audit.attribution.layers import Forward, call
from bias_audit.attribution.layouts import Layout
from bias_audit.attribution.pooled import cam
from bias_audit.attribution.score import scorecam
from bias_audit.attribution.targets import Target


class Passes(Protocol):
    """A method that makes forward passes of its own: maps, scores and outputs of a borrowed model."""

    def __call__(
        self,
        model: nn.Module,
        inputs: Any,
        target: Target,
        layer: str,
        sign: Sign = "positive",
        *,
        forward: Forward = call,
        layout: Layout | None = None,
    ) -> Explanation: ...


@dataclass(frozen=True)
class Method:
    """A way to explain a score.

    `paper` and `source` (an arXiv number or a DOI) say where it comes from, `signs` what it can show. Exactly one of
    `formula` and `passes` is there: a formula needs a layer's activations and gradients and nothing else, so that an
    audit can compute it from its own forward pass; `passes` makes forward passes of its own. Where `needs_layer` is
    false, the layer is not looked at.
    """

    name: str
    paper: str
    source: str
    formula: Formula | None = None
    passes: Passes | None = None
    signs: tuple[Sign, ...] = SIGNS
    needs_layer: bool = True

    def check_sign(self, sign: str) -> None:
        """Raise ValueError unless `sign` is one that this method has."""
        check_sign(sign, self.signs, NO_GRADIENT.format(self.name))

    def run(
        self,
        model: nn.Module,
        inputs: Any,
        target: Target,
        layer: str,
        sign: Sign = "positive",
        forward: Forward = call,
        layout: Layout | None = None,
    ) -> Explanation:
        """Maps, scores and outputs of a borrowed model (see `borrowed`).

        Raises:
            ValueError: a sign that the method does not have, a model that it is not defined for; and as `capture`.

        Example:
            >>> import torch
            >>> from bias_audit.attribution.borrow import borrowed
            >>> from bias_audit.attribution.targets import predicted_logit
            >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
            >>> with borrowed(net) as lent:
            ...     found = METHODS["layercam"].run(lent, torch.rand(5, 3, 8, 8), predicted_logit, "0")
            >>> found.maps.shape
            torch.Size([5, 6, 6])
        """
        self.check_sign(sign)
        if self.passes is not None:
            return self.passes(model, inputs, target, layer, sign, forward=forward, layout=layout)
        assert self.formula is not None
        taken = capture(model, inputs, target, layer, forward=forward, layout=layout)
        maps = self.formula(taken.activations, taken.gradients, sign)
        return Explanation(maps, taken.scores, taken.outputs)


def _without_layer(passes: Callable[..., Explanation]) -> Passes:
    def run(
        model: nn.Module,
        inputs: Any,
        target: Target,
        layer: str,
        sign: Sign = "positive",
        *,
        forward: Forward = call,
        layout: Layout | None = None,
    ) -> Explanation:
        return passes(model, inputs, target, sign, forward=forward)

    return run


_GRADCAM_PAPER = "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization"

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("gradcam", _GRADCAM_PAPER, "arXiv 1610.02391", FORMULAS["gradcam"]),
        Method(
            "hirescam",
            "Use HiResCAM instead of Grad-CAM for faithful explanations of convolutional neural networks",
            "arXiv 2011.08891",
            FORMULAS["hirescam"],
        ),
        Method(
            "gradcam++",
            "Grad-CAM++: Improved Visual Explanations for Deep Convolutional Networks",
            "arXiv 1710.11063",
            FORMULAS["gradcam++"],
        ),
        Method(
            "layercam",
            "LayerCAM: Exploring Hierarchical Class Activation Maps for Localization",
            "doi 10.1109/TIP.2021.3089943",
            FORMULAS["layercam"],
        ),
        Method(
            "xgradcam",
            "Axiom-based Grad-CAM: Towards Accurate Visualization and Explanation of CNNs",
            "arXiv 2008.02312",
            FORMULAS["xgradcam"],
        ),
        Method(
            "eigencam",
            "Eigen-CAM: Class Activation Map using Principal Components",
            "arXiv 2008.00299",
            FORMULAS["eigencam"],
            signs=ONE_SIDED,
        ),
        Method("cam", "Learning Deep Features for Discriminative Localization", "arXiv 1512.04150", passes=cam),
        Method(
            "scorecam",
            "Score-CAM: Score-Weighted Visual Explanations for Convolutional Neural Networks",
            "arXiv 1910.01279",
            passes=scorecam,
            signs=ONE_SIDED,
        ),
        Method(
            "guided_backprop",
            "Striving for Simplicity: The All Convolutional Net",
            "arXiv 1412.6806",
            passes=_without_layer(guided_backprop),
            needs_layer=False,
        ),
        Method(
            "deconvolution",
            "Visualizing and Understanding Convolutional Networks",
            "arXiv 1311.2901",
            passes=_without_layer(deconvolution),
            needs_layer=False,
        ),
        Method("guided_gradcam", _GRADCAM_PAPER, "arXiv 1610.02391", passes=guided_gradcam),
    )
}


def find_method(method: str | Formula) -> Method:
    """The method of a name; of a formula `(activations, gradients, sign) -> maps`, one that runs it.

    Raises:
        ValueError: no method has this name.

    Example:
        >>> find_method("layercam").source
        'doi 10.1109/TIP.2021.3089943'
    """
    if callable(method):
        return Method(getattr(method, "__name__", type(method).__name__), "", "", method)
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: expected one of {', '.join(METHODS)}, or a function")
    return METHODS[method]

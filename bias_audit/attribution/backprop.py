"""From the score back to the image: Guided Backpropagation, Deconvolution, Guided Grad-CAM.

Enters: a borrowed model, its inputs, a target. Leaves: maps at the images' own resolution, `(B, H, W)`, of clips
`(B, T, H, W)`, float32, unnormalised, with the scores and outputs that belong to them.

All three send a gradient back through rectifiers that treat it in another way. It is done on the graph that autograd
has recorded, where a ReLU is a ReLU however it was called: as a module, as a function, in place. No module is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from bias_audit.attribution.borrow import as_the_model_takes_them
from bias_audit.attribution.cam import Explanation, Sign, apply_sign, gradcam
from bias_audit.attribution.capture import capture, detached, logits_of, scores_of
from bias_audit.attribution.inputs import take_images
from bias_audit.attribution.layers import Forward, call
from bias_audit.attribution.layouts import Layout
from bias_audit.attribution.targets import Target
from bias_audit.resize import upsample

Rule = Callable[[Node, list[str]], Any]

# Names that autograd gives to the backward of what stands in a rectifier's place. Sigmoid and tanh do not: gates and
# recurrent layers behind a ReLU network, as in captioning, are differentiated as they are.
_NO_RECTIFIERS = {
    "Gelu": "GELU",
    "Silu": "SiLU",
    "Hardswish": "Hardswish",
    "Mish": "Mish",
    "LeakyRelu": "LeakyReLU",
    "PreluKernel": "PReLU",
    "RreluWithNoise": "RReLU",
    "Elu": "ELU",
    "Celu": "CELU",
    "Softplus": "Softplus",
}
# These run a part of the model in their own backward, or as one compiled piece: what is in them cannot be seen.
_OPAQUE = ("CheckpointFunction", "DifferentiableGraph")
_IN_PLACE = frozenset(
    ("relu_", "hardtanh_", "clamp_", "clamp_min_", "clip_", "threshold_", "leaky_relu_", "elu_", "celu_", "rrelu_")
)


def guided_backprop(
    model: nn.Module,
    inputs: Any,
    target: Target,
    sign: Sign = "positive",
    *,
    forward: Forward = call,
) -> Explanation:
    """Guided Backpropagation: a rectifier lets pass back what is positive, and only where it was active.

    `R_in = (x > 0) (R_out > 0) R_out` at every ReLU; arXiv 1412.6806, figure 1. The map is the sum of that gradient
    over the colour channels: "signed" as it is, "positive" its ReLU, "absolute" the sum of absolute values, "negative"
    the "positive" map of the negated score. It hardly depends on the class or on the weights (arXiv 1810.03292).

    Raises:
        ValueError: inputs without float images, a model that has no ReLU or another activation in a ReLU's place, a
            target that is not `(B,)` or does not depend on the images.

    Example:
        >>> from bias_audit.attribution.borrow import borrowed
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        >>> with borrowed(net) as lent:
        ...     found = guided_backprop(lent, torch.rand(5, 3, 8, 8), lambda outputs: outputs[:, 0])
        >>> found.maps.shape
        torch.Size([5, 8, 8])
    """
    return _colours_summed(model, inputs, target, sign, forward, _guide)


def deconvolution(
    model: nn.Module,
    inputs: Any,
    target: Target,
    sign: Sign = "positive",
    *,
    forward: Forward = call,
) -> Explanation:
    """Deconvolution: a rectifier lets pass back what is positive, whether it was active or not.

    `R_in = (R_out > 0) R_out` at every ReLU, and max-pooling sends back to the places of the maxima (its switches);
    arXiv 1311.2901, section 2.1. Signs, shapes and errors as of `guided_backprop`.

    Example:
        >>> from bias_audit.attribution.borrow import borrowed
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        >>> with borrowed(net) as lent:
        ...     found = deconvolution(lent, torch.rand(5, 3, 8, 8), lambda outputs: outputs[:, 0])
        >>> found.maps.shape
        torch.Size([5, 8, 8])
    """
    return _colours_summed(model, inputs, target, sign, forward, _deconvolve)


def guided_gradcam(
    model: nn.Module,
    inputs: Any,
    target: Target,
    layer: str,
    sign: Sign = "positive",
    *,
    forward: Forward = call,
    layout: Layout | None = None,
) -> Explanation:
    """Guided Grad-CAM: the Grad-CAM of a layer, upsampled, times Guided Backpropagation; arXiv 1610.02391, section 3.2.

    Grad-CAM says where the class is, Guided Backpropagation which pixels there. Both factors are those of the score,
    for "negative" those of the negated score; `sign` is applied to the second, the first has the paper's ReLU.
    Upsampling is bilinear, of clips trilinear. Two forward passes.

    Raises:
        ValueError: as `guided_backprop` and as `capture`.

    Example:
        >>> from bias_audit.attribution.borrow import borrowed
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        >>> with borrowed(net) as lent:
        ...     found = guided_gradcam(lent, torch.rand(5, 3, 8, 8), lambda outputs: outputs[:, 0], "1")
        >>> found.maps.shape
        torch.Size([5, 8, 8])
    """
    taken = capture(model, inputs, target, layer, forward=forward, layout=layout)
    coarse = gradcam(taken.activations, taken.gradients, "negative" if sign == "negative" else "positive")
    fine, scores, outputs = guided_backprop(model, inputs, target, sign, forward=forward)
    return Explanation(upsample(coarse, fine.shape[1:]) * fine, scores, outputs)


def _colours_summed(
    model: nn.Module, inputs: Any, target: Target, sign: Sign, forward: Forward, rule: Rule
) -> Explanation:
    turned = -1 if sign == "negative" else 1
    gradients, scores, outputs = _image_gradients(model, inputs, target, forward, rule, turned)
    if sign == "absolute":
        return Explanation(gradients.abs().sum(dim=1), scores, outputs)
    maps = apply_sign(gradients.sum(dim=1), "signed" if sign == "signed" else "positive")
    return Explanation(maps, scores, outputs)


def _image_gradients(
    model: nn.Module, inputs: Any, target: Target, forward: Forward, rule: Rule, turned: int
) -> tuple[Tensor, Tensor, Any]:
    """What `turned` times the score sends back to the images, float32, with the scores and the outputs."""
    images, put = take_images(as_the_model_takes_them(model, inputs))
    # Where the user's forward runs the trunk inside a `no_grad` of its own, nothing comes back at first.
    for through_no_grad in (False, True):
        with torch.enable_grad():
            leaf = images.detach().requires_grad_()
            with _Differentiable(through_no_grad):
                # A copy, because a model may write into its input, which a leaf does not allow.
                outputs = logits_of(forward(model, put(leaf.clone(), 1)))
            scores = scores_of(target, outputs, len(images))
            total = turned * scores.sum()
        if total.requires_grad and (gradients := _send_back(total, leaf, rule)) is not None:
            return gradients.float(), scores.detach().float(), tree_map(detached, outputs)
    raise ValueError("the target does not depend on the images: explain a score that comes from them")


def _send_back(total: Tensor, leaf: Tensor, rule: Rule) -> Tensor | None:
    passed: list[str] = []
    for node in _graph(total):
        name = _kind(node)
        if _rectifies(node, name):
            rule(node, passed)
        elif name in _NO_RECTIFIERS:
            node.register_prehook(partial(_pass, passed, name))
        elif name in _OPAQUE:
            raise ValueError(
                f"the rectifiers in a part of the model cannot be reached ({name}): run it without reentrant "
                "checkpointing and without TorchScript, or use another method, such as gradcam"
            )
    gradients: Tensor | None = torch.autograd.grad(total, leaf, allow_unused=True)[0]
    if gradients is None:
        return None
    # Only what lies between the score and the images has run by now.
    for name in passed:
        if name in _NO_RECTIFIERS:
            raise ValueError(
                f"Guided Backpropagation and Deconvolution are defined for ReLU, the model goes through "
                f"{_NO_RECTIFIERS[name]}: use another method, such as gradcam or hirescam"
            )
    if not passed:
        raise ValueError(
            "Guided Backpropagation and Deconvolution are defined for ReLU, and there is none between the score and "
            "the images: use another method, such as gradcam or hirescam"
        )
    return gradients


def _pass(passed: list[str], name: str, gradients: tuple[Tensor, ...]) -> None:
    passed.append(name)


def _guide(node: Node, passed: list[str]) -> None:
    def rectify(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        passed.append("Relu")
        return tuple(g if g is None else g.relu() for g in gradients)

    node.register_prehook(rectify)


def _deconvolve(node: Node, passed: list[str]) -> None:
    def rectify(_into: Any, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        passed.append("Relu")
        return tuple(g if g is None else g.relu() for g in gradients)

    node.register_hook(rectify)


def _graph(root: Tensor) -> Iterator[Node]:
    """Every node of the graph that a tensor hangs on, once."""
    waiting = [root.grad_fn]
    seen: set[Node] = set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting.extend(following for following, _ in node.next_functions)
            yield node


def _kind(node: Node) -> str:
    """`Relu` of `ReluBackward0`, and so on."""
    return node.name().rpartition("::")[2].partition("Backward")[0]


def _rectifies(node: Any, name: str) -> bool:
    """Whether a node is the backward of ReLU, or of what is the same by another name; of ReLU6 too."""
    if name == "Hardtanh":
        return bool(node._saved_min_val == 0)
    if name == "Threshold":
        return bool(node._saved_threshold == 0)
    if name in ("Clamp", "ClampMin"):
        lowest, highest = node._saved_min, getattr(node, "_saved_max", None)
        return not isinstance(lowest, Tensor) and lowest == 0 and highest in (None, 6)
    return name == "Relu"


class _Differentiable(TorchFunctionMode):
    """Runs a forward pass so that its graph shows every activation.

    In-place activations on a view are made on a copy, which is then written into the view: autograd hides what was done
    to a view in one node. With `through_no_grad` the model cannot switch grad off.
    """

    def __init__(self, through_no_grad: bool) -> None:
        super().__init__()
        self.through_no_grad = through_no_grad

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self.through_no_grad and name == "_set_grad_enabled":
            return None
        in_place = kwargs.get("inplace", False) or name in _IN_PLACE
        if in_place and args and isinstance(args[0], Tensor) and args[0]._is_view():
            return args[0].copy_(func(args[0].clone(), *args[1:], **kwargs))
        return func(*args, **kwargs)

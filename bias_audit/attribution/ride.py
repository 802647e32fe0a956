"""Take a `Capture` from a forward pass that somebody else makes, such as the user's validation step.

Enters: a model, a layer's name, and before each pass its target. Leaves: the `Capture`. Whoever made the pass gets the
outputs that it would have got, to the bit, where the layers behind compute the same with grad as without: `why_not`
finds that out.

The layer's hook makes its output a leaf and switches grad on in the middle of the pass; when the outermost module
around the layer is done, its hook differentiates, switches grad back and hands on the outputs detached.
"""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from bias_audit.attribution.borrow import as_the_model_takes_them
from bias_audit.attribution.capture import Capture, Tap
from bias_audit.attribution.inputs import shape_of_images
from bias_audit.attribution.layers import Forward, call, submodule
from bias_audit.attribution.layouts import Layout
from bias_audit.attribution.targets import Target


class Rider:
    """Rides along with the first forward pass that anybody makes inside the `with`, and keeps its `capture`.

    A pass made with grad, or under `inference_mode`, is left alone. `capture` is None where no other pass went through
    the layer, or where `problem` says what went wrong: nothing is raised into somebody else's code. `passes` counts the
    passes of either kind.

    Args:
        model: an eager module; what is called may be itself or a module in it around the layer.
        layer: name of the submodule to explain.
        target: what to differentiate, a function from outputs to scores `(B,)`.
        size: that of the images, `(H, W)` or `(T, H, W)`.
        layout: makes the layer's output `(B, C, *places)`; by default it is recognised.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()
        >>> with torch.no_grad(), Rider(net, "0", lambda outputs: outputs[:, 0], (8, 8)) as rider:
        ...     outputs = net(torch.rand(5, 3, 8, 8))
        >>> outputs.requires_grad, rider.capture.gradients.shape
        (False, torch.Size([5, 4, 6, 6]))
    """

    def __init__(
        self, model: nn.Module, layer: str, target: Target, size: tuple[int, ...], layout: Layout | None = None
    ) -> None:
        self.capture: Capture | None = None
        self.problem: Exception | None = None
        self.passes = 0
        self._target, self._size, self._layout = target, size, layout
        self._tap = Tap(model, [layer])
        parts = layer.split(".")
        self._around = [submodule(model, ".".join(parts[:n])) for n in range(len(parts))]
        self._outermost: nn.Module | None = None
        self._hooks = ExitStack()
        self._grad = self._mine = False

    def __enter__(self) -> Self:
        for module in self._around:
            self._hooks.enter_context(module.register_forward_pre_hook(self._begin))
            # Also after an exception, or grad would stay switched on.
            self._hooks.enter_context(module.register_forward_hook(self._end, always_call=True))
        self._tap.attach(self._hooks, only_if=lambda: self._outermost is not None and self._mine and not self.passes)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._hooks.close()

    def _begin(self, module: nn.Module, _inputs: Any) -> None:
        # The first of the modules around the layer that is entered is the outermost.
        if self._outermost is None:
            self._outermost, self._grad = module, torch.is_grad_enabled()
            # A pass that is to be differentiated is none to ride along with: its outputs must not be detached.
            self._mine = not self._grad and not torch.is_inference_mode_enabled()

    def _end(self, module: nn.Module, _inputs: Any, outputs: Any) -> Any:
        if module is not self._outermost:
            return None
        self._outermost = None
        torch.set_grad_enabled(self._grad)
        self.passes += 1
        if self.passes > 1 or outputs is None or not self._mine:
            return None
        try:
            self.capture = self._tap.captures(outputs, [self._target], self._size, self._layout)[0][0]
        except Exception as error:
            self.problem = error
        return tree_map(lambda value: value.detach() if isinstance(value, Tensor) else value, outputs)


def why_not(
    model: nn.Module,
    inputs: Any,
    layer: str,
    target: Target,
    forward: Forward = call,
    layout: Layout | None = None,
) -> str:
    """Why nobody may ride along with this model's forward passes, found out by trying it; "" if one may.

    `model` is a borrowed one. Layers may compute with grad another way than without (`nn.MultiheadAttention` has a fast
    path for the latter), which changes the last bits of the outputs, and those are not ours to change.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()
        >>> with torch.no_grad():
        ...     why_not(net, torch.rand(5, 3, 8, 8), "0", lambda outputs: outputs[:, 0])
        ''
    """
    # Marks that torch leaves on a wrapper and on a module compiled in place, and Lightning on what it unwrapped.
    marks = ("_orig_mod", "_compiled_call_impl", "_compiler_ctx")
    if any(getattr(module, mark, None) is not None for module in model.modules() for mark in marks):
        return "a part of the model is compiled, and hooks do not fire there"
    inputs = as_the_model_takes_them(model, inputs)
    plain = tree_leaves(forward(model, inputs))
    with Rider(model, layer, target, shape_of_images(inputs)[1], layout) as rider:
        ridden = tree_leaves(forward(model, inputs))
    if rider.problem is not None:
        return str(rider.problem)
    if any(isinstance(leaf, Tensor) and leaf.grad_fn for m in model.modules() for leaf in tree_leaves(_own(m))):
        return "the model keeps tensors of its forward pass, which would hold on to the graph"
    if rider.capture is None:
        return f"the forward pass does not go through layer {layer!r}"
    if not all(isinstance(leaf, Tensor | int | float | str | None) for leaf in plain):
        return "the model puts out objects whose tensors cannot be told"
    same = (torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(plain, ridden, strict=True))
    return "" if all(same) else "the layers behind compute other bits with grad than without"


def _own(module: nn.Module) -> list[Any]:
    """What a module holds besides its parameters, buffers and submodules."""
    return [value for name, value in vars(module).items() if name not in ("_parameters", "_buffers", "_modules")]

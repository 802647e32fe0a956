"""Take from a model, in one forward pass, layers' activations and the gradients of scores.

Enters: a borrowed model, its inputs, layers' names and targets. Leaves: `Capture`s.

Only the tail has a graph. The trunk runs without one; in a forward hook on the layer its output becomes a leaf and grad
is switched on, so that one `torch.autograd.grad` at the end costs the head alone. That also makes frozen models and
models inside `no_grad` work, and never touches a parameter's `.grad`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from bias_audit.attribution.borrow import as_the_model_takes_them
from bias_audit.attribution.inputs import shape_of_images
from bias_audit.attribution.layers import Forward, call, first_tensor, submodule
from bias_audit.attribution.layouts import Channels, Layout, channels_of, find_layout
from bias_audit.attribution.rows import SparseRows
from bias_audit.attribution.targets import Target


@dataclass(frozen=True)
class Capture:
    """What one forward pass and one differentiation of its tail gave.

    `activations` and `gradients` are `(B, C, *places)` in the model's precision, detached; places are `(h, w)`, of
    clips `(t, h, w)`. `outputs` are the model's: a tensor, then float32, or whatever else it puts out. `scores` are
    float32 `(B,)`.
    """

    activations: Tensor
    gradients: Tensor
    outputs: Any
    scores: Tensor


def capture(
    model: nn.Module,
    inputs: Any,
    target: Target,
    layer: str,
    *,
    forward: Forward = call,
    layout: Layout | None = None,
) -> Capture:
    """Activations of `layer` and the gradients of `target`'s scores with respect to them, from one forward pass.

    As `capture_each` for one target and one layer.
    """
    return capture_each(model, inputs, (target,), (layer,), forward=forward, layout=layout)[0][0]


def capture_each(
    model: nn.Module,
    inputs: Any,
    targets: Sequence[Target],
    layers: Sequence[str],
    *,
    forward: Forward = call,
    layout: Layout | None = None,
) -> tuple[tuple[Capture, ...], ...]:
    """For each target, for each layer: its activations and the target's gradients, all from one forward pass.

    `model` is a borrowed one (see `borrowed`). Inputs are converted to the precision of the model's weights. `layout`
    rearranges a layer's output to `(B, C, *places)`; by default it is recognised (see `find_layout`).

    Raises:
        ValueError: no such layer; it ran never or more than once; its output has no places; a target is not `(B,)` or
            does not depend on the layer.
    """
    inputs = as_the_model_takes_them(model, inputs)
    with torch.no_grad():
        tap, outputs = _forward(model, layers, inputs, forward)
    if not any(isinstance(o, Tensor) and o.requires_grad for o in tree_leaves(logits_of(outputs))):
        # The user's forward runs the layer inside a `no_grad` of its own, which on leaving switched off again what the
        # hook switched on. With grad on from the start it goes back to on; the frozen part still builds no graph.
        with torch.enable_grad():
            tap, outputs = _forward(model, layers, inputs, forward)
    return tap.captures(outputs, targets, shape_of_images(inputs)[1] if layout is None else (), layout)


class Tap:
    """Hooks that take what layers put out during a forward pass, and make of it what can be differentiated by.

    The first layer's output becomes a leaf and grad is switched on: whoever attaches the hooks switches it back.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str]) -> None:
        self._model = model
        self._modules = {layer: submodule(model, layer) for layer in layers}
        self._taken: dict[str, list[Tensor]] = {layer: [] for layer in layers}

    def attach(
        self, hooks: ExitStack, only_if: Callable[[], bool] = lambda: True, tail: Callable[[], object] = lambda: None
    ) -> None:
        """Hook the layers until `hooks` is closed; a pass for which `only_if` is false goes by untouched.

        `tail` is called when the first layer is done, before what is to be differentiated begins.
        """
        for layer, module in self._modules.items():
            hooks.enter_context(module.register_forward_hook(partial(self._take, only_if, tail, layer)))

    def _take(
        self,
        only_if: Callable[[], bool],
        tail: Callable[[], object],
        layer: str,
        _module: nn.Module,
        _inputs: Any,
        output: Any,
    ) -> Any:
        if not only_if():
            return None
        features = first_tensor(output)
        if not isinstance(features, Tensor) or not features.is_floating_point():
            got = features.dtype if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f"layer {layer!r} puts out {got}, expected a tensor of floats: name another layer")
        if not any(self._taken.values()):
            tail()
            features = features.detach()
        if not features.requires_grad:
            features = features.detach().requires_grad_()
            torch.set_grad_enabled(True)
        self._taken[layer].append(features)
        # A copy, because what follows may write into its input (an in-place ReLU), which a leaf does not allow.
        if isinstance(output, tuple) and hasattr(output, "_replace"):
            return output._replace(**{output._fields[0]: features.clone()})  # type: ignore[attr-defined]
        return (features.clone(), *output[1:]) if isinstance(output, tuple) else features.clone()

    def captures(
        self, outputs: Any, targets: Sequence[Target], size: Sequence[int], layout: Layout | None = None
    ) -> tuple[tuple[Capture, ...], ...]:
        """For each target, for each layer, what was taken and the target's gradients; `size` is that of the images.

        Raises:
            ValueError: as `capture_each`.
        """
        for layer, tensors in self._taken.items():
            if len(tensors) != 1:
                times = "never" if not tensors else f"{len(tensors)} times"
                raise ValueError(f"layer {layer!r} ran {times} in one forward pass, once is needed: name another layer")
        taken = {layer: tensors[0] for layer, tensors in self._taken.items()}
        layouts = [
            layout or _layout(layer, tensor, size, channels_of(self._modules[layer], self._model))
            for layer, tensor in taken.items()
        ]
        batch = len(next(iter(taken.values())))
        with torch.enable_grad():
            outputs = logits_of(outputs)
            scores = [scores_of(target, outputs, batch) for target in targets]
            totals = [score.sum() for score in scores]
        kept = tree_map(detached, outputs)
        captures: list[tuple[Capture, ...]] = []
        for k, score in enumerate(scores):
            gradients = _differentiate(totals[k], taken, retain=k + 1 < len(scores))
            captures.append(
                tuple(
                    Capture(arrange(tensor.detach()), arrange(gradient), kept, score.detach().float())
                    for arrange, tensor, gradient in zip(layouts, taken.values(), gradients, strict=True)
                )
            )
        return tuple(captures)


def scores_of(target: Target, outputs: Any, batch: int) -> Tensor:
    """The scores `(batch,)` that a target gives outputs.

    Raises:
        ValueError: it gives anything else.
    """
    scores = target(outputs)
    if not isinstance(scores, Tensor) or scores.shape != (batch,):
        got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"expected a target that gives one score per image, ({batch},), got {got}")
    return scores


def _differentiate(total: Tensor, taken: Mapping[str, Tensor], retain: bool) -> list[Tensor]:
    if not total.requires_grad:
        raise ValueError(_independent(next(iter(taken))))
    found = torch.autograd.grad(total, list(taken.values()), retain_graph=retain, allow_unused=True)
    gradients: list[Tensor] = []
    for layer, gradient in zip(taken, found, strict=True):
        if gradient is None:
            raise ValueError(_independent(layer))
        gradients.append(gradient)
    return gradients


def _independent(layer: str) -> str:
    return f"the target does not depend on layer {layer!r}: explain a layer that the score goes through"


def _forward(model: nn.Module, layers: Sequence[str], inputs: Any, forward: Forward) -> tuple[Tap, Any]:
    tap = Tap(model, layers)
    with ExitStack() as hooks:
        # Not before: attention has a fast path that it leaves where calls are looked at.
        tap.attach(hooks, tail=lambda: hooks.enter_context(SparseRows()))
        return tap, forward(model, inputs)


def logits_of(outputs: Any) -> Any:
    """The `.logits` of an output that has them, as Hugging Face's do; one logit an image as `(B, 1)`; else as it is."""
    outputs = outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", outputs)
    # A head that squeezes leaves no dimension at all of a single image.
    return outputs.reshape(-1, 1) if isinstance(outputs, Tensor) and outputs.ndim < 2 else outputs


def detached(value: Any) -> Any:
    """A tensor without its graph, one of floats as float32; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().float() if value.is_floating_point() else value.detach()


def _layout(layer: str, output: Tensor, size: Sequence[int], channels: Channels | None) -> Layout:
    found = find_layout(output.shape, size, channels)
    if found is None:
        raise ValueError(
            f"layer {layer!r} has no spatial output: expected (B, C, h, w), (B, h, w, C) or tokens (B, N, C) on a grid"
            f", got {tuple(output.shape)}: name another, or give the `layout` that makes it (B, C, h, w)"
        )
    return found

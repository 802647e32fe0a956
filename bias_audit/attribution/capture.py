"""Borrow a model and take from it, in one forward pass, layers' activations and the gradients of scores.

Enters: a model in whatever state training left it, its inputs, layers' names and targets. Leaves: `Capture`s; and the
model as it was: modes, hooks, buffers, gradients, generators, grad mode, after an exception too.

Only the tail has a graph. The trunk runs without one; in a forward hook on the layer its output becomes a leaf and grad
is switched on, so that one `torch.autograd.grad` at the end costs the head alone. That also makes frozen models and
models inside `no_grad` work, and never touches a parameter's `.grad`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from bias_audit.attribution.inputs import shape_of_images
from bias_audit.attribution.layers import Forward, call, first_tensor, submodule
from bias_audit.attribution.layouts import Channels, Layout, channels_of, find_layout
from bias_audit.attribution.rows import SparseRows
from bias_audit.attribution.sharded import resharding
from bias_audit.attribution.targets import Target
from bias_audit.rng import preserved_rng, preserved_settings

_CONTAINERS = (dict, list, set, deque)
_Container = dict[Any, Any] | list[Any] | set[Any] | deque[Any]


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

    Kept are the mode, the attributes and the hooks of every submodule, every buffer's content and identity, all global
    generators, grad and inference mode, and torch's settings (see `preserved_settings`). Inside `torch.inference_mode`
    it is left for the time, since nothing can be differentiated in it.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).train()
        >>> with borrowed(net) as lent:
        ...     lent.training
        False
        >>> net.training, net[1].training
        (True, True)
    """
    model = unwrap(model)
    lazy = (nn.parameter.UninitializedParameter, nn.parameter.UninitializedBuffer)
    if any(isinstance(tensor, lazy) for tensor in (*model.parameters(), *model.buffers())):
        raise ValueError(
            f"{type(model).__name__} has lazy parameters that no batch has shaped yet: run one batch through it first, "
            "because shaping them draws the random numbers that training would draw"
        )
    with preserved_rng(), preserved_settings(), _as_it_was(model):
        # `model.eval()` would call `train()` methods that users override (to keep a BatchNorm frozen, say), which is
        # theirs to decide and ours not to trigger.
        for module in model.modules():
            # cuDNN differentiates recurrent layers in training mode only; without dropout nothing else differs.
            module.training = isinstance(module, nn.RNNBase) and not module.dropout
        # Hooks do not fire inside compiled code.
        with torch.inference_mode(False), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            # A training step that goes on after us in the same autocast must not find weights that we have cast.
            torch.set_autocast_cache_enabled(False)
            yield model


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Takes back what forward passes write into a model.

    That is what they assign to its attributes, which may hold on to our graph; what they put into the dicts, lists,
    sets and deques among these, such as submodules, buffers and hooks; what they write into buffers and into tensors
    among the attributes; and what they draw from generators among these. Parameters keep their place, `requires_grad`
    and gradient, but not what is written into them: a second copy of all weights may not fit.
    """
    reshard = resharding(model)
    reshard()
    attributes = [(module, dict(vars(module))) for module in model.modules()]
    held = [value for _, before in attributes for value in before.values()]
    containers = [(value, _content(value)) for value in held if isinstance(value, _CONTAINERS)]
    buffers = [buffer for module in model.modules() for buffer in module._buffers.values()]
    found = {id(t): t for t in (*held, *buffers) if isinstance(t, Tensor) and not t.is_inference()}
    tensors = [(tensor, tensor._version, tensor.detach().clone()) for tensor in found.values()]
    generators = [(value, value.get_state()) for value in held if isinstance(value, torch.Generator)]
    parameters = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        reshard()
        for module, before in attributes:
            for name in vars(module).keys() - before.keys():
                del vars(module)[name]
            vars(module).update(before)
        for container, content in containers:
            _refill(container, content)
        for tensor, version, written in tensors:
            _write_back(tensor, version, written)
        for parameter, trained, gradient in parameters:
            if parameter.requires_grad != trained:
                parameter.requires_grad_(trained)
            if parameter.grad is not gradient:
                parameter.grad = gradient
        for generator, state in generators:
            generator.set_state(state)


def _content(container: _Container) -> list[Any]:
    return [*container.keys(), *container.values()] if isinstance(container, dict) else [*container]


def _refill(container: _Container, content: list[Any]) -> None:
    now = _content(container)
    if len(now) == len(content) and all(map(is_, now, content)):
        return
    container.clear()
    if isinstance(container, dict):
        half = len(content) // 2
        # One by one: a Counter's `update` counts.
        for key, value in zip(content[:half], content[half:], strict=True):
            container[key] = value
    elif isinstance(container, set):
        container.update(content)
    else:
        container.extend(content)


def _write_back(tensor: Tensor, version: int, content: Tensor) -> None:
    if tensor._version != version:
        # This counts, so that a graph which saved what we wrote is refused and not differentiated wrongly.
        with torch.no_grad():
            tensor.copy_(content)
    elif type(tensor) is Tensor and tensor.layout is torch.strided:
        # What was done to `.data` is not counted. To compare on a GPU would wait for it; of an expanded tensor no
        # number can be written alone.
        expanded = any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        if not expanded and not (tensor.is_cpu and torch.equal(tensor, content)):
            tensor.data.copy_(content)


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
    """The scores `(batch,)` that a target gives outputs; ValueError if it gives anything else."""
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


def as_the_model_takes_them(model: nn.Module, inputs: Any) -> Any:
    """The inputs in the precision of the model's weights, ready to be differentiated through."""
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    low = (torch.bfloat16, torch.float16, torch.float64)
    dtype = weight.dtype if weight is not None and weight.dtype in low else None
    return tree_map(partial(_as_taken, dtype), inputs)


def _as_taken(dtype: torch.dtype | None, value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    if dtype is not None and value.is_floating_point():
        value = value.to(dtype)
    # Tensors made under inference_mode cannot be saved for a backward pass.
    return value.clone() if value.is_inference() else value


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

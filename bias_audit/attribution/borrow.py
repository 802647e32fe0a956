"""Borrow a model from whoever trains it, and give it back as it was.

Enters: a model in whatever state training left it. Leaves: the eager module in eval mode, for the time of a `with`; and
then the model as it was: modes, hooks, buffers, gradients, generators, grad mode, after an exception too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from bias_audit.attribution.sharded import resharding
from bias_audit.rng import preserved_rng, preserved_settings

_CONTAINERS = (dict, list, set, deque)
_Container = dict[Any, Any] | list[Any] | set[Any] | deque[Any]


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

    Raises:
        ValueError: the model has lazy parameters that no batch has shaped yet.

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

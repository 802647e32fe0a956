"""Which layer to explain.

Enters: a model and inputs that it takes. Leaves: the name of a submodule whose output keeps the places of the image and
through whose places the outputs go.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from bias_audit.attribution.inputs import shape_of_images
from bias_audit.attribution.layouts import Layout, channels_first, channels_of, find_layout

Forward = Callable[[nn.Module, Any], Any]

# Pooling only coarsens the map that went in; dropout does nothing in an audit; attention's weights are no features; and
# of flattened places only the count is left; what a recurrent layer goes through are steps.
_PASSES_OVER = (
    nn.Flatten,
    nn.RNNBase,
    *(nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
    *(nn.AvgPool3d, nn.MaxPool3d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool3d),
    *(nn.Dropout, nn.Dropout2d, nn.Dropout3d, nn.Softmax),
)


def call(model: nn.Module, inputs: Any) -> Any:
    """The forward pass of a model that takes its inputs as one argument."""
    return model(inputs)


def first_tensor(output: Any) -> Any:
    """The features in a layer's output: the output itself, or the first of a tuple."""
    return output[0] if isinstance(output, tuple) and output else output


def submodule(model: nn.Module, layer: str) -> nn.Module:
    """The submodule of a name; what `torch.compile` wraps has the name that it has without.

    Raises:
        ValueError: there is none.
    """
    try:
        module = model
        for part in layer.split(".") if layer else ():
            module = _eager(module.get_submodule(part))
    except AttributeError:
        names = [name for name in map(_without_wrappers, dict(model.named_modules())) if name]
        # The end of a model is where the layers are that people look for.
        raise ValueError(
            f"{type(model).__name__} has no layer {layer!r}: the last of its {len(names)} layers are {names[-12:]}"
        ) from None
    return module


def _eager(module: nn.Module) -> nn.Module:
    wrapped = getattr(module, "_orig_mod", None)
    return wrapped if isinstance(wrapped, nn.Module) else module


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def find_layer(model: nn.Module, inputs: Any, forward: Forward = call) -> str:
    """Name of the last submodule, in order of execution, whose output keeps the places of the image and matters there.

    It is the paper's choice, the last convolutional layer (arXiv 1610.02391, section 3): for a ResNet its `layer4`, for
    a VGG the last ReLU of `features`. Where the head reads a class token, later blocks no longer matter at any place
    of the image, and it is the last block's first norm; where it averages tokens, the last norm. The gradient of
    one image decides. `inputs` are one image or a few; the model must be in the state in which it is to be explained.

    Raises:
        ValueError: no submodule puts out anything with places.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        >>> find_layer(net, torch.zeros(1, 3, 8, 8))
        '1'
    """
    inputs = _few(inputs)
    batch, size = shape_of_images(inputs)
    # A container puts out its last child's tensor and comes after it: taking the last names the outermost container.
    seen: list[tuple[str, Tensor, Layout]] = []
    passed_over: list[Tensor] = []
    heads: list[Tensor] = []
    runs: Counter[str] = Counter()

    def remember(name: str, module: nn.Module) -> Any:
        def hook(_module: nn.Module, taken: tuple[Any, ...], output: Any) -> None:
            runs[name] += 1
            output = first_tensor(output)
            if isinstance(module, nn.Linear) and taken and isinstance(taken[0], Tensor):
                heads[:] = [taken[0]]
            if not isinstance(output, Tensor) or not output.is_floating_point():
                return
            # Windows of an image stand in the batch's place: they are parts, not places.
            layout = _layout(module, model, output, size) if output.ndim and len(output) == batch else None
            if layout is None:
                return
            if isinstance(module, _PASSES_OVER):
                # Dropout hands its input on, which is no less a layer's output for it.
                if not taken or output is not taken[0]:
                    passed_over.append(output)
            elif not isinstance(module, nn.Identity):
                seen.append((name, output, layout))

        return module.register_forward_hook(hook)

    with ExitStack() as hooks, torch.enable_grad(), _frozen(model):
        for name, module in model.named_modules():
            if name:
                hooks.enter_context(remember(name, module))
        # With the images as a leaf, a frozen model has gradients too.
        outputs = forward(model, tree_map(_leaf, inputs))
        # What the model puts out are answers, not features, even where there are as many as places: a caption's words.
        passed_over += [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
        candidates = [c for c in seen if runs[c[0]] == 1 and not any(c[1] is other for other in passed_over)]
        alive = _matter(candidates, [*tree_leaves(outputs), *heads])
        # What attention computes inside itself are its keys and values; the features are what goes in and comes out.
        found = next((name for name in alive if not _inside_attention(model, name)), None)
    if found is None and not candidates:
        raise ValueError(
            f"{type(model).__name__} has no layer with a spatial output (B, C, h, w), (B, h, w, C) or (B, tokens, C): "
            "name the layer to explain, one whose output keeps the places of the image, and give its `layout`"
        )
    return _without_wrappers(found or candidates[-1][0])


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Inside, what requires grad depends on the images: a question's words, say, do not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _few(inputs: Any) -> Any:
    """Two of a batch's images, with what belongs to them: a probe needs no more."""
    batch, _ = shape_of_images(inputs)
    return tree_map(lambda v: v[:2] if isinstance(v, Tensor) and v.ndim and len(v) == batch else v, inputs)


def _layout(module: nn.Module, model: nn.Module, output: Tensor, size: tuple[int, ...]) -> Layout | None:
    """As `find_layout`, but None for what can be read in no way or in two: a probe goes on to another layer."""
    try:
        layout = find_layout(output.shape, size, channels_of(module, model))
    except ValueError:
        return None
    if layout is channels_first and any(n > of for n, of in zip(output.shape[2:], size, strict=True)):
        return None
    return layout


def _leaf(value: Any) -> Any:
    is_images = isinstance(value, Tensor) and value.ndim in (4, 5) and value.is_floating_point()
    # No leaf itself: a model may scale its images in place.
    return value.detach().requires_grad_().clone() if is_images else value


def _matter(candidates: list[tuple[str, Tensor, Layout]], results: list[Any]) -> Iterator[str]:
    """Names of the candidates through more than one of whose places the results go, the last first.

    Among the results is what goes into the last linear layer, since the gradient of a head that is still all zero is
    zero everywhere. Their cosine weights differ, so that sums which a normalisation fixes do not cancel.
    """
    differentiable = [c for c in candidates if c[1].requires_grad]
    floats = [r for r in results if isinstance(r, Tensor) and r.requires_grad]
    if not differentiable or not floats:
        return
    total = torch.stack(
        [(r.float() * torch.arange(1, r.numel() + 1, device=r.device).cos().view(r.shape)).sum() for r in floats]
    ).sum()
    gradients = torch.autograd.grad(total, [tensor for _, tensor, _ in differentiable], allow_unused=True)
    for (name, _, layout), gradient in reversed(list(zip(differentiable, gradients, strict=True))):
        if gradient is not None and (layout(gradient) != 0).any(dim=1).flatten(1).sum(dim=1).max() > 1:
            yield name


def _inside_attention(model: nn.Module, name: str) -> bool:
    parents = name.split(".")[:-1]
    owners = (model.get_submodule(".".join(parents[: i + 1])) for i in range(len(parents)))
    kinds = (type(owner).__name__.lower() for owner in owners)
    return any("attention" in kind or "attn" in kind or kind.endswith(("msa", "mhsa")) for kind in kinds) or any(
        part in ("attn", "attention", "self_attn", "self_attention", "msa", "mhsa") for part in parents
    )

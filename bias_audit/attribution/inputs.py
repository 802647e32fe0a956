"""The images among a model's inputs.

Enters: what a model takes: images, clips, or a pytree such as a dict that holds them. Leaves: the images, their size,
and a way to put others in their place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten


def shape_of_images(inputs: Any) -> tuple[int, tuple[int, ...]]:
    """How many images there are among a model's inputs, and their size `(H, W)`, of clips `(T, H, W)`.

    Clips are `(B, 3, T, H, W)`, or `(B, T, 3, H, W)` as Hugging Face's models take them.

    Raises:
        ValueError: there are none.
    """
    leaves = tree_leaves(inputs)
    images: Tensor = leaves[_place_of_images(leaves)]
    frames_first = images.ndim == 5 and images.shape[1] not in (1, 3) and images.shape[2] in (1, 3)
    size = (images.shape[1], *images.shape[3:]) if frames_first else images.shape[2:]
    return len(images), tuple(size)


def take_images(inputs: Any) -> tuple[Tensor, Callable[[Tensor, int], Any]]:
    """The images `(B, 3, H, W)` or clips `(B, 3, T, H, W)`, and `put(images, times)`, the inputs with others instead.

    `put` repeats every other tensor that has one row per image `times` times, as often as the new images repeat the
    batch.

    Raises:
        ValueError: no such tensor, or its values are no floats.

    Example:
        >>> import torch
        >>> images, put = take_images({"image": torch.zeros(2, 3, 4, 4), "question": torch.tensor([[5], [6]])})
        >>> {name: tuple(tensor.shape) for name, tensor in put(images.repeat(3, 1, 1, 1), 3).items()}
        {'image': (6, 3, 4, 4), 'question': (6, 1)}
    """
    leaves, spec = tree_flatten(inputs)
    at = _place_of_images(leaves)
    images: Tensor = leaves[at]
    if not images.is_floating_point():
        raise ValueError(
            f"expected images of floats, as this method changes or differentiates them, got {images.dtype}"
        )

    def put(others: Tensor, times: int) -> Any:
        repeated = [
            leaf.repeat(times, *(1 for _ in leaf.shape[1:]))
            if times > 1 and isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == len(images)
            else leaf
            for leaf in leaves
        ]
        repeated[at] = others
        return tree_unflatten(repeated, spec)

    return images, put


def _place_of_images(leaves: list[Any]) -> int:
    for at, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and leaf.ndim in (4, 5):
            return at
    raise ValueError("expected images (B, 3, H, W) or clips (B, 3, T, H, W) among the inputs, found neither")

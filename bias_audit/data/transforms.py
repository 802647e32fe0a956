"""A user's evaluation transform, taken apart for audits: images and masks go through it together.

Enters: a transform of torchvision v2, or a torchvision weights' `transforms()`; pictures as they decode. Leaves: its
geometric part, whose result is cached, and its pixelwise end, which runs on whole batches on the model's device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

# These act on each pixel alone: they give the same on a batch on the device as on one image, and need not be cached.
_POINTWISE = (v2.ToDtype, v2.Normalize, v2.ConvertImageDtype, v2.ToPureTensor)


def split_transform(
    transform: Callable[..., Any] | None,
) -> tuple[Callable[..., Any] | None, Callable[[Tensor], Tensor]]:
    """The part of a transform that is applied once and cached, and the pixelwise rest that runs on the device.

    Raises:
        ValueError: a transform of torchvision's first version, which cannot move masks.
    """
    if transform is not None and {"crop_size", "resize_size", "mean", "std"} <= set(vars(transform)):
        transform = _preset_as_v2(transform)
    steps = list(transform.transforms) if isinstance(transform, v2.Compose) else [transform] if transform else []
    for step in (transform, *steps):
        module = type(step).__module__
        if module.startswith("torchvision.transforms.") and not module.startswith("torchvision.transforms.v2."):
            raise ValueError(
                f"expected a transform of torchvision.transforms.v2, got torchvision.transforms.{type(step).__name__}, "
                "which cannot move masks along with their image: import v2 and write the same transforms from it"
            )
    # The images are tensors by now, which v2.ToTensor would pass on without scaling them.
    steps = [v2.ToDtype(torch.float32, scale=True) if isinstance(step, v2.ToTensor) else step for step in steps]
    cut = len(steps)
    while cut and isinstance(steps[cut - 1], _POINTWISE):
        cut -= 1
    before, after = steps[:cut], steps[cut:]
    return (v2.Compose(before) if before else None), partial(_pointwise, after)


def _pointwise(steps: Sequence[Callable[..., Any]], images: Tensor) -> Tensor:
    for step in steps:
        images = step(tv_tensors.Image(images))
    finished: Tensor = F.to_dtype(images, torch.float32, scale=True).as_subclass(Tensor)
    return finished


def _preset_as_v2(preset: Any) -> v2.Compose:
    """What a torchvision weights' `transforms()` does, in v2, so that masks go through it too."""
    return v2.Compose(
        [
            v2.Resize(preset.resize_size, interpolation=preset.interpolation, antialias=preset.antialias),
            v2.CenterCrop(preset.crop_size),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean=preset.mean, std=preset.std),
        ]
    )


def checked_image(sample_id: str, picture: Tensor | Image.Image) -> tv_tensors.Image:
    """A decoded picture as uint8 `(3, H, W)`.

    Raises:
        ValueError: more than 8 bits per channel, or another shape; names the sample.
    """
    if isinstance(picture, Image.Image):
        if picture.mode.startswith(("I", "F")):
            raise ValueError(
                f"sample {sample_id!r}: expected 8 bits per channel, got a PIL image of mode {picture.mode!r}, which "
                "would be clipped: scale it to 8 bits as for training"
            )
        return tv_tensors.Image(F.pil_to_tensor(picture.convert("RGB")))
    if not isinstance(picture, Tensor) or picture.dtype != torch.uint8 or picture.ndim != 3 or picture.shape[0] != 3:
        got = f"{picture.dtype} {tuple(picture.shape)}" if isinstance(picture, Tensor) else type(picture).__name__
        raise ValueError(f"sample {sample_id!r}: expected a PIL image or a uint8 tensor (3, H, W), got {got}")
    return tv_tensors.Image(picture)


def move_together(
    sample_id: str, transform: Callable[..., Any], image: tv_tensors.Image, masks: tv_tensors.Mask
) -> tuple[Tensor, Tensor]:
    """An image `(3, H, W)` and its masks `(R, H, W)` after a transform has moved both.

    Raises:
        ValueError: they have different sizes now, or the image is no image; names the sample.
    """
    out_image, out_masks = transform(image, masks)
    if isinstance(out_image, Image.Image):
        out_image = F.pil_to_tensor(out_image)
    if not isinstance(out_image, Tensor) or out_image.shape[-2:] != out_masks.shape[-2:]:
        got = tuple(out_image.shape[-2:]) if isinstance(out_image, Tensor) else type(out_image).__name__
        raise ValueError(
            f"sample {sample_id!r}: the transform gave an image of {got} and masks of {tuple(out_masks.shape[-2:])}: "
            "it must move both together, as transforms of torchvision.transforms.v2 do"
        )
    return out_image, out_masks

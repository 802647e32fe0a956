"""An annotated image, and some of them as a model takes them.

Enters: what is known of an image: its pixels or a way to decode them, class, regions, attributes. Leaves: `AuditSample`
and `PendingSample`, which an `AuditDataset` is made of, and the `AuditBatch` that it gives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

Decoded = tuple[Tensor | Image.Image, Mapping[str, Tensor]]


@dataclass(frozen=True)
class AuditSample:
    """One annotated image: uint8 `(3, H, W)` or PIL `image`, class index `label`, bool `(H, W)` mask per region name.

    `boxed` names the regions whose mask is, wholly or in part, a filled box: it holds some of what lies around.

    Example:
        >>> tie = torch.zeros(8, 8, dtype=torch.bool)
        >>> sample = AuditSample(torch.zeros(3, 8, 8, dtype=torch.uint8), 0, {"tie": tie}, {"gender": "female"}, "1")
        >>> sample.attributes["gender"]
        'female'
    """

    image: Tensor | Image.Image
    label: int
    regions: Mapping[str, Tensor]
    attributes: Mapping[str, str | int]
    id: str
    boxed: frozenset[str] = frozenset()

    def decode(self) -> Decoded:
        """The image and its masks."""
        return self.image, self.regions


@dataclass(frozen=True)
class PendingSample:
    """An `AuditSample` whose image is still on disk: `decode()` gives image and masks."""

    label: int
    attributes: Mapping[str, str | int]
    id: str
    decode: Callable[[], Decoded]
    boxed: frozenset[str] = frozenset()


# Not frozen: Lightning converts the floats of a validation's batch in place under "bf16-true" and its like.
@dataclass
class AuditBatch:
    """Some samples on one device, ready for the model.

    `images` float `(B, 3, H, W)` after the whole transform; `labels` int64 `(B,)`; `masks` bool `(B, R, H, W)` in the
    order of `Subjects.regions`; `indices` are the samples' places in the data set.

    Example:
        >>> masks = torch.zeros(1, 2, 8, 8, dtype=torch.bool)
        >>> batch = AuditBatch(torch.zeros(1, 3, 8, 8), torch.tensor([0]), masks, (0,))
        >>> AuditBatch.collate([batch, batch]).images.shape
        torch.Size([2, 3, 8, 8])
    """

    images: Tensor
    labels: Tensor
    masks: Tensor
    indices: tuple[int, ...]

    def to(self, device: torch.device | str, **options: Any) -> AuditBatch:
        """The same on another device; `options` as `Tensor.to` has them. Lightning moves its batches by it."""
        images, labels, masks = (t.to(device, **options) for t in (self.images, self.labels, self.masks))
        return AuditBatch(images, labels, masks, self.indices)

    @staticmethod
    def collate(batches: Sequence[AuditBatch]) -> AuditBatch:
        """Several batches as one: the `collate_fn` of a DataLoader of an `AuditDataset`.

        Raises:
            ValueError: images of different sizes.
        """
        sizes = {b.images.shape[1:] for b in batches}
        if len(sizes) > 1:
            raise ValueError(
                f"expected images of one size in a batch, got {sorted(map(tuple, sizes))}: give the audit set a "
                "transform that resizes"
            )
        images, labels, masks = (torch.cat([getattr(b, n) for b in batches]) for n in ("images", "labels", "masks"))
        return AuditBatch(images, labels, masks, tuple(index for b in batches for index in b.indices))

"""What the records keep of the images themselves: a thumbnail of each, its masks, and a fingerprint of them all.

Enters: an `AuditDataset`. Leaves: a `Description`, the same for the same images, masks, labels and attributes; or all
samples that do not decode, and all regions that no image shows, at once.
"""

from __future__ import annotations

import hashlib
import io
import zlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from bias_audit.data.annotations import Complaints, Misfit
from bias_audit.data.dataset import AuditDataset
from bias_audit.progress import Progress, silent
from bias_audit.ranks import ALONE, Ranks
from bias_audit.records.manifest import RegionCount
from bias_audit.records.samples import PackedMasks, SampleSheet

THUMBNAIL_SIDE = 128


@dataclass(frozen=True)
class Description:
    """The samples' `sheet`, the `fingerprint` of all that was decoded, and on how many images each region is drawn."""

    sheet: SampleSheet
    fingerprint: str
    annotated: tuple[RegionCount, ...]


@dataclass(frozen=True)
class _Row:
    """What a `Description` has of one sample; `masks` at the thumbnail's size."""

    checksums: bytes
    thumbnail: bytes
    masks: PackedMasks
    seen: Tensor


def describe(audit_set: AuditDataset, progress: Progress = silent, ranks: Ranks = ALONE) -> Description:
    """Decode every sample, each of several `ranks` a part of them, and describe them.

    `progress(done, of)` is called after each sample.

    Raises:
        ValueError: as `AuditDataset.batch`, but of all such samples at once; or a region with a role is on no sample
            at all.

    Example:
        >>> from bias_audit.data.scenes import balanced_scenes
        >>> found = describe(balanced_scenes(2, seed=0))
        >>> len(found.sheet.thumbnails)
        8
        >>> print(found.annotated[0])
        coat is on 8 of 8 images
    """
    digest = hashlib.sha256(repr((audit_set.subjects, audit_set.ids, audit_set.labels.tolist())).encode())
    digest.update("\0".join(audit_set.attribute_table.ravel()).encode())
    found = ranks.shared(len(audit_set), lambda index: _row(audit_set, index), progress)
    rows = [row for row in found if isinstance(row, _Row)]
    if len(rows) < len(found):
        raise Misfit([row for row in found if isinstance(row, str)])
    digest.update(b"".join(row.checksums for row in rows))
    annotated = _counted(audit_set, torch.stack([row.seen for row in rows]))
    width = max(row.masks.width for row in rows)
    shapes = np.array([row.masks.bits.shape for row in rows])
    bits = np.zeros((len(rows), *shapes.max(axis=0)[1:]), dtype=np.uint8)
    for row, padded, (_, _, height, length) in zip(rows, bits, shapes, strict=True):
        padded[:, :height, :length] = row.masks.bits[0]
    thumbnails = tuple(row.thumbnail for row in rows)
    masks = PackedMasks(bits, width)
    sheet = SampleSheet(audit_set.ids, audit_set.labels, audit_set.attribute_table, thumbnails, masks)
    return Description(sheet, digest.hexdigest(), annotated)


def _row(audit_set: AuditDataset, index: int) -> _Row | str:
    """Of one sample; or what is wrong with it."""
    try:
        image, masks = audit_set.prepared(index)
    except ValueError as error:
        return str(error)
    contents = (content.contiguous().numpy().tobytes() for content in (image, masks))
    return _Row(
        b"".join(zlib.crc32(content).to_bytes(4, "little") for content in contents),
        thumbnail(image),
        PackedMasks.of(_thumbnail_masks(masks)[None].numpy()),
        masks.flatten(1).any(1),  # a small region may well be lost in the thumbnail
    )


def _counted(audit_set: AuditDataset, seen: Tensor) -> tuple[RegionCount, ...]:
    """On how many samples each region is, by which of them show any of it: bool `(N, R)`."""
    counts, wrong = [], Complaints()
    for (name, role), found in zip(audit_set.subjects.regions, seen.T.tolist(), strict=True):
        if not any(found):
            wrong.lines.append(
                f"{role} region {name!r} is on no image of the audit set: check its name and the transform"
            )
        boxed = sum(name in sample.boxed for sample, shows in zip(audit_set.samples, found, strict=True) if shows)
        counts.append(RegionCount(name, sum(found) - boxed, boxed, len(found) - sum(found)))
    wrong.end()
    return tuple(counts)


def thumbnail(image: Tensor) -> bytes:
    """JPEG of a prepared image `(3, H, W)`, its longer side at most THUMBNAIL_SIDE."""
    if image.is_floating_point():
        low, high = image.aminmax()
        image = ((image - low) / (high - low).clamp_min(1e-12) * 255).to(torch.uint8)
    size = _thumbnail_size(image)
    if size != list(image.shape[-2:]):
        image = F.resize(image, size, antialias=True)
    buffer = io.BytesIO()
    F.to_pil_image(image).save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def _thumbnail_masks(masks: Tensor) -> Tensor:
    size = _thumbnail_size(masks)
    if size == list(masks.shape[-2:]):
        return masks
    small: Tensor = F.resize(masks.to(torch.uint8), size, interpolation=v2.InterpolationMode.NEAREST) > 0
    return small


def _thumbnail_size(image: Tensor) -> list[int]:
    shrink = min(1.0, THUMBNAIL_SIDE / max(image.shape[-2:]))
    return [max(1, round(side * shrink)) for side in image.shape[-2:]]

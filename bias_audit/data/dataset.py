"""The images that are audited, with what is known of them.

Enters: `AuditSample`s, or `PendingSample`s that are decoded when first needed, the roles of their regions, and the
transform that the model's images go through. Leaves: `AuditBatch`es on the model's device, always of the same images in
the same order.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from bias_audit.data.map_style import read_dataset
from bias_audit.data.readers import read_annotated, read_folder
from bias_audit.data.samples import AuditBatch, AuditSample, PendingSample
from bias_audit.data.stratified import stratified_draw
from bias_audit.data.transforms import checked_image, move_together, split_transform
from bias_audit.rng import preserved_rng
from bias_audit.terms import REMAINDER, ROLES, Role, Subjects

if TYPE_CHECKING:
    from pathlib import Path

DEFAULT_CACHE_BYTES = 2 << 30

RegionNames = Sequence[str] | Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class _Prepared:
    """One sample after the geometric part of the transform: image, masks `(R, H, W)` bool."""

    image: Tensor
    masks: Tensor

    @property
    def nbytes(self) -> int:
        return self.image.nbytes + self.masks.nbytes


class AuditDataset(Dataset[AuditBatch]):
    """Annotated images with the roles of their regions: what an audit looks at.

    Args:
        samples: the images; regions that no role names are not audited and count as remainder.
        object, spurious, context: names of the regions in each role; none at all for images without regions, of which
            accuracy by group is audited, and whose heatmaps can be clustered.
        classes: class names in order of their index; by default the indices.
        attributes: which attributes to compare groups by; by default all that the samples have.
        transform: torchvision v2 transform of the *evaluation* images, applied to image and masks together; or a
            torchvision weights' `transforms()`. By default uint8 is scaled to [0, 1]. Random transforms are applied
            once, with a seed of their own.
        cache_bytes: decoded images are kept as far as they fit, others are decoded again for each audit.

    Raises:
        ValueError: no sample, an id twice, a region in two roles, a label without a class name, a v1 transform.

    Example:
        >>> mask = torch.zeros(8, 8, dtype=torch.bool)
        >>> mask[:4] = True
        >>> sample = AuditSample(torch.zeros(3, 8, 8, dtype=torch.uint8), 0, {"hair": mask}, {}, "a")
        >>> audit_set = AuditDataset([sample], spurious=["hair"], classes=["doctor", "nurse"])
        >>> audit_set.batch([0]).masks.shape
        torch.Size([1, 1, 8, 8])
    """

    def __init__(
        self,
        samples: Sequence[AuditSample | PendingSample],
        *,
        object: Sequence[str] = (),
        spurious: Sequence[str] = (),
        context: Sequence[str] = (),
        classes: Sequence[str] | None = None,
        attributes: Sequence[str] | None = None,
        transform: Callable[..., Any] | None = None,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> None:
        self.samples = tuple(samples)
        if not self.samples:
            raise ValueError("the audit set is empty: expected at least one sample; check the paths and the filter")
        twice = [i for i, n in Counter(s.id for s in self.samples).items() if n > 1]
        if twice:
            raise ValueError(f"sample id {twice[0]!r} occurs more than once: ids must be unique and stable")
        roles = _roles(object, spurious, context)
        unnamed = next((s for s in self.samples if isinstance(s, AuditSample) and s.regions), None)
        if not roles and unnamed is not None:
            raise ValueError(
                f"no region has a role, and sample {unnamed.id!r} has {', '.join(sorted(unnamed.regions))}: name at "
                "least one in `object` or `spurious`"
            )
        names = sorted({a for s in self.samples for a in s.attributes}) if attributes is None else list(attributes)
        values = {
            name: sorted({str(s.attributes[name]) for s in self.samples if name in s.attributes}) for name in names
        }
        for name, found in values.items():
            if not found:
                known = sorted({a for s in self.samples for a in s.attributes})
                raise ValueError(f"unknown attribute {name!r}: no sample has it; the samples have {known}")
        self.subjects = Subjects(
            regions=roles,
            attributes=tuple((name, tuple(found)) for name, found in values.items()),
            classes=_class_names(self.samples, classes),
        )
        self.cache_bytes = cache_bytes
        self._geometric, self._pointwise = split_transform(transform)
        self._cache: dict[int, _Prepared] = {}
        self._cached_bytes = 0

    @classmethod
    def from_annotations(
        cls,
        annotations: str | Path,
        images: str | Path,
        *,
        labels: str | Path,
        format: str | None = None,
        object: RegionNames = (),
        spurious: RegionNames = (),
        context: RegionNames = (),
        minus: Mapping[str, Sequence[str]] | None = None,
        attributes: Sequence[str] | None = None,
        classes: Sequence[str] | None = None,
        transform: Callable[..., Any] | None = None,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> AuditDataset:
        """Annotations of any format, with a CSV of labels and attributes, as an audit set.

        What is annotated by a box alone is that box, filled; the records and the report say of which regions.

        Args:
            annotations: the file or folder that an annotation tool or `bias-audit regions` wrote.
            images: folder that its file names start from.
            labels: CSV with the columns `file` and `label` and one per attribute; its rows are the audit set.
            format: a name of `bias_audit.data.formats.known.FORMATS`; by default the one it is recognised as.
            object, spurious, context: names that things are annotated as (COCO: categories or supercategories), each
                a region; or a mapping from a region's name to the names whose union it is.
            minus: per region name the names that are cut out of it.
            attributes: columns of the CSV; by default all but `file` and `label`.
            classes: class names in order of the model's outputs; by default the labels, sorted.

        Raises:
            ValueError: a `Misfit`, with a line for each thing that is wrong: a file that cannot be read, an unknown
                name or column, an image that is not annotated or not there.

        Example:
            >>> import os
            >>> import tempfile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     boxes, labels = os.path.join(folder, "boxes.csv"), os.path.join(folder, "labels.csv")
            ...     with open(boxes, "w") as file, open(labels, "w") as table:
            ...         print("file,region,left,top,right,bottom", "a.png,tie,2,2,6,6", sep="\\n", file=file)
            ...         print("file,label,gender", "a.png,nurse,man", sep="\\n", file=table)
            ...     Image.new("RGB", (8, 8)).save(os.path.join(folder, "a.png"))
            ...     audit_set = AuditDataset.from_annotations(
            ...         boxes, folder, labels=labels, object=["tie"], classes=["doctor", "nurse"]
            ...     )
            ...     batch = audit_set.batch([0])
            >>> audit_set.subjects.regions, batch.labels.tolist(), int(batch.masks.sum())
            ((('tie', 'object'),), [1], 16)
        """
        regions = {role: _by_region(names) for role, names in zip(ROLES, (object, spurious, context), strict=True)}
        wanted = {name: categories for role in ROLES for name, categories in regions[role].items()}
        samples, found = read_annotated(annotations, format, images, labels, wanted, minus or {}, attributes, classes)
        return cls(
            samples,
            **{role: list(regions[role]) for role in ROLES},
            classes=found,
            attributes=attributes,
            transform=transform,
            cache_bytes=cache_bytes,
        )

    @classmethod
    def from_coco(
        cls,
        annotations: str | Path,
        images: str | Path,
        *,
        labels: str | Path,
        object: RegionNames = (),
        spurious: RegionNames = (),
        context: RegionNames = (),
        minus: Mapping[str, Sequence[str]] | None = None,
        attributes: Sequence[str] | None = None,
        classes: Sequence[str] | None = None,
        transform: Callable[..., Any] | None = None,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> AuditDataset:
        """COCO instances (polygons, RLE and boxes) as an audit set: `from_annotations` with the format "coco".

        Raises:
            ValueError: as `from_annotations`.

        Example:
            >>> import json
            >>> import os
            >>> import tempfile
            >>> image = {"id": 1, "file_name": "a.png", "height": 8, "width": 8}
            >>> tie = {"id": 1, "image_id": 1, "category_id": 1, "segmentation": [[2, 2, 6, 2, 6, 6, 2, 6]]}
            >>> coco = {"images": [image], "annotations": [tie], "categories": [{"id": 1, "name": "tie"}]}
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     instances, labels = os.path.join(folder, "instances.json"), os.path.join(folder, "labels.csv")
            ...     with open(instances, "w") as file, open(labels, "w") as table:
            ...         json.dump(coco, file)
            ...         print("file,label", "a.png,nurse", sep="\\n", file=table)
            ...     Image.new("RGB", (8, 8)).save(os.path.join(folder, "a.png"))
            ...     audit_set = AuditDataset.from_coco(
            ...         instances, folder, labels=labels, object=["tie"], classes=["doctor", "nurse"]
            ...     )
            ...     batch = audit_set.batch([0])
            >>> audit_set.subjects.regions, int(batch.masks.sum())
            ((('tie', 'object'),), 16)
        """
        return cls.from_annotations(
            annotations,
            images,
            labels=labels,
            format="coco",
            object=object,
            spurious=spurious,
            context=context,
            minus=minus,
            attributes=attributes,
            classes=classes,
            transform=transform,
            cache_bytes=cache_bytes,
        )

    @classmethod
    def from_folder(
        cls,
        images: str | Path,
        *,
        labels: str | Path,
        masks: str | Path | None = None,
        object: Sequence[str] = (),
        spurious: Sequence[str] = (),
        context: Sequence[str] = (),
        attributes: Sequence[str] | None = None,
        classes: Sequence[str] | None = None,
        transform: Callable[..., Any] | None = None,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> AuditDataset:
        """A folder of images, a mask PNG per region and a CSV of labels and attributes as an audit set.

        Args:
            images: folder of the images.
            labels: CSV with the columns `file` and `label` and one per attribute; its rows are the audit set.
            masks: folder with a folder per region, in which `<image's name without suffix>.png` is non-zero on the
                region; an image without such a file lacks the region. None where no region has a role.
            attributes: columns of the CSV; by default all but `file` and `label`.
            classes: class names in order of the model's outputs; by default the labels, sorted.

        Raises:
            ValueError: a file or folder that cannot be read, an unknown column; says which file, line and name.
        """
        regions = [*object, *spurious, *context]
        samples, found = read_folder(images, labels, masks, regions, attributes, classes)
        return cls(
            samples,
            object=object,
            spurious=spurious,
            context=context,
            classes=found,
            attributes=attributes,
            transform=transform,
            cache_bytes=cache_bytes,
        )

    @classmethod
    def from_dataset(
        cls,
        dataset: Dataset[Any],
        *,
        regions: Sequence[str],
        object: Sequence[str] = (),
        spurious: Sequence[str] = (),
        context: Sequence[str] = (),
        attributes: Callable[[int, Any], Mapping[str, str | int]] | None = None,
        label: Callable[[Any], int] | None = None,
        classes: Sequence[str] | None = None,
        transform: Callable[..., Any] | None = None,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> AuditDataset:
        """A torchvision or other map-style dataset that yields `tv_tensors.Mask` or `BoundingBoxes` as an audit set.

        An item is `(image, target)` or `(image, target, ...)`. Masks `(R, H, W)` or boxes `(R, 4)` are looked for in
        the target (itself, or the values of a dict or tuple).

        Args:
            regions: the name of each mask or box, in order.
            attributes: `attributes(index, target)` gives a sample's attributes.
            label: `label(target)` gives the class index; by default the target's only plain integer, or its "label".

        Raises:
            ValueError: an item without image, label or regions, or with another number of regions; says which item.
        """
        samples = read_dataset(dataset, regions, attributes, label)
        return cls(
            samples,
            object=object,
            spurious=spurious,
            context=context,
            classes=classes,
            transform=transform,
            cache_bytes=cache_bytes,
        )

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> AuditBatch:
        """One sample as a batch of one: a DataLoader with `collate_fn=AuditBatch.collate` gives `AuditBatch`es."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range: the audit set has {len(self)} samples")
        return self.batch([index % len(self)])

    @property
    def ids(self) -> tuple[str, ...]:
        """The samples' ids, in order."""
        return tuple(s.id for s in self.samples)

    @property
    def labels(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The samples' class indices, int64 `(N,)`."""
        return np.array([s.label for s in self.samples], dtype=np.int64)

    @property
    def attribute_table(self) -> np.ndarray[Any, np.dtype[np.str_]]:
        """Each sample's attribute values as text `(N, A)`, "" where it has none."""
        names = [name for name, _ in self.subjects.attributes]
        rows = [[str(s.attributes.get(name, "")) for name in names] for s in self.samples]
        return np.array(rows, dtype=np.str_).reshape(len(rows), len(names))

    def select(self, indices: Iterable[int]) -> AuditDataset:
        """The samples at `indices`, in that order, with everything else as here."""
        other = object.__new__(AuditDataset)
        other.__dict__.update(self.__dict__)
        other.samples, other._cache, other._cached_bytes = tuple(self.samples[i] for i in indices), {}, 0
        return other

    def subset(self, max_samples: int, seed: int) -> AuditDataset:
        """At most `max_samples` of the samples, drawn once from each label x attributes cell in proportion to its size.

        Raises:
            ValueError: `max_samples` is below 1.
        """
        if max_samples < 1:
            raise ValueError(f"max_samples must be at least 1, got {max_samples}")
        if len(self) <= max_samples:
            return self
        rows = zip(self.labels, self.attribute_table, strict=True)
        return self.select(stratified_draw([(str(label), *values) for label, values in rows], max_samples, seed))

    def batch(self, indices: Sequence[int], device: torch.device | str = "cpu") -> AuditBatch:
        """The samples at `indices`, ready for the model on `device`.

        Raises:
            ValueError: a sample does not decode, a mask's size is not its image's, or sizes differ within the batch.
        """
        prepared = [self._prepare(i) for i in indices]
        shapes = [p.image.shape for p in prepared]
        for index, shape in zip(indices, shapes, strict=True):
            if shape != shapes[0]:
                raise ValueError(
                    f"sample {self.samples[index].id!r}: expected the size {tuple(shapes[0])} of sample "
                    f"{self.samples[indices[0]].id!r}, got {tuple(shape)}: give the audit set a transform that resizes"
                )
        images = torch.stack([p.image for p in prepared]).to(device, non_blocking=True)
        masks = torch.stack([p.masks for p in prepared]).to(device, non_blocking=True)
        labels = torch.tensor([self.samples[i].label for i in indices], device=device)
        return AuditBatch(self._pointwise(images), labels, masks, tuple(indices))

    def prepared(self, index: int, picture: Tensor | Image.Image | None = None) -> tuple[Tensor, Tensor]:
        """Image `(3, H, W)` and masks `(R, H, W)` after the transform but for its pixelwise end, which is `finished`.

        With `picture` that image, of the sample's size, goes through the sample's transform instead of its own.

        Raises:
            ValueError: as `batch`; or a picture of another size.
        """
        found = self._prepare(index) if picture is None else self._decode(index, picture)
        return found.image, found.masks

    def finished(self, images: Tensor) -> Tensor:
        """Prepared images `(B, 3, H, W)` as the model takes them."""
        return self._pointwise(images)

    def _prepare(self, index: int) -> _Prepared:
        if index in self._cache:
            return self._cache[index]
        prepared = self._decode(index)
        if self._cached_bytes + prepared.nbytes <= self.cache_bytes:
            self._cache[index] = prepared
            self._cached_bytes += prepared.nbytes
        return prepared

    def _decode(self, index: int, instead: Tensor | Image.Image | None = None) -> _Prepared:
        sample = self.samples[index]
        # The user's reader and transform may draw random numbers; whatever they draw, training draws as without them.
        with preserved_rng(seed=zlib.crc32(sample.id.encode())):
            try:
                picture, regions = sample.decode()
                if isinstance(picture, Image.Image):
                    picture.load()  # until then PIL may have read the header only
            except (OSError, RuntimeError, ValueError) as error:
                raise ValueError(f"sample {sample.id!r}: does not decode: {error}") from error
            image = checked_image(sample.id, picture)
            if instead is not None:
                size, image = image.shape, checked_image(sample.id, instead)
                if image.shape != size:
                    raise ValueError(
                        f"sample {sample.id!r}: expected a swapped image of its size {tuple(size)}, got "
                        f"{tuple(image.shape)}"
                    )
            masks = tv_tensors.Mask(self._stack_masks(sample.id, regions, image.shape[-2:]))
            if self._geometric is not None:
                image, masks = move_together(sample.id, self._geometric, image, masks)
        # A crop is a view that would keep the whole picture in memory.
        return _Prepared(image.as_subclass(Tensor).contiguous(), masks.as_subclass(Tensor) > 0)

    def _stack_masks(self, sample_id: str, regions: Mapping[str, Tensor], size: torch.Size) -> Tensor:
        masks = torch.zeros(len(self.subjects.regions), *size, dtype=torch.uint8)
        for row, (name, _) in enumerate(self.subjects.regions):
            if name in regions:
                mask = torch.as_tensor(regions[name])
                if mask.shape != size:
                    raise ValueError(
                        f"sample {sample_id!r}: mask of region {name!r} is {tuple(mask.shape)}, its image is "
                        f"{tuple(size)}: a mask has the size of its image"
                    )
                masks[row] = mask > 0
        return masks


def _by_region(names: RegionNames) -> dict[str, Sequence[str]]:
    if isinstance(names, str):
        raise ValueError(f"expected a list of region names, got one text: write [{names!r}]")
    return dict(names) if isinstance(names, Mapping) else {name: [name] for name in names}


def _roles(object_: Sequence[str], spurious: Sequence[str], context: Sequence[str]) -> tuple[tuple[str, Role], ...]:
    pairs: list[tuple[str, Role]] = []
    for role, names in zip(ROLES, (object_, spurious, context), strict=True):
        if isinstance(names, str):
            raise ValueError(f"{role}={names!r}: expected a list of region names, got one text: write [{names!r}]")
        pairs += [(name, role) for name in names]
    twice = [name for name, n in Counter(name for name, _ in pairs).items() if n > 1]
    if twice:
        raise ValueError(f"region {twice[0]!r} is named in more than one role: a region has one role")
    reserved = [name for name, _ in pairs if name in (REMAINDER, *ROLES)]
    if reserved:
        raise ValueError(f"region {reserved[0]!r}: the name is taken (roles and the remainder): choose another")
    return tuple(pairs)


def _class_names(samples: Sequence[AuditSample | PendingSample], classes: Sequence[str] | None) -> tuple[str, ...]:
    wrong = next((s for s in samples if not isinstance(s.label, int | np.integer) or s.label < 0), None)
    if wrong is not None:
        raise ValueError(f"sample {wrong.id!r}: expected a class index (0, 1, ...) as label, got {wrong.label!r}")
    highest = max(samples, key=lambda s: s.label)
    if classes is None:
        return tuple(str(i) for i in range(highest.label + 1))
    if highest.label >= len(classes):
        raise ValueError(
            f"sample {highest.id!r}: label {highest.label} has no name: `classes` has {len(classes)} names"
        )
    return tuple(classes)

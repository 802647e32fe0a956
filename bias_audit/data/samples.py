"""The images that are audited, with what is known of them.

Enters: `AuditSample`s, or `PendingSample`s that are decoded when first needed, the roles of their regions, and the
transform that the model's images go through. Leaves: `AuditBatch`es on the model's device, always of the same images in
the same order, and the `SampleSheet` that the records keep.
"""

from __future__ import annotations

import hashlib
import io
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from bias_audit.data.annotations import Complaints, Misfit
from bias_audit.ranks import ALONE, Ranks
from bias_audit.records.results import PackedMasks, RegionCount, SampleSheet
from bias_audit.rng import preserved_rng
from bias_audit.terms import REMAINDER, ROLES, Role, Subjects

if TYPE_CHECKING:
    from pathlib import Path

    from torch.utils.data import Dataset

THUMBNAIL_SIDE = 128
DEFAULT_CACHE_BYTES = 2 << 30
# These act on each pixel alone: they give the same on a batch on the device as on one image, and need not be cached.
_POINTWISE = (v2.ToDtype, v2.Normalize, v2.ConvertImageDtype, v2.ToPureTensor)

RegionNames = Sequence[str] | Mapping[str, Sequence[str]]
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


@dataclass(frozen=True)
class _Prepared:
    """One sample after the geometric part of the transform: image, masks `(R, H, W)` bool."""

    image: Tensor
    masks: Tensor

    @property
    def nbytes(self) -> int:
        return self.image.nbytes + self.masks.nbytes


@dataclass(frozen=True)
class _SheetRow:
    """What the sample sheet and the fingerprint have of one sample; `masks` at the thumbnail's size."""

    checksums: bytes
    thumbnail: bytes
    masks: PackedMasks
    seen: Tensor


class AuditDataset:
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
        self._geometric, self._pointwise = _split_transform(transform)
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
            format: a name of `bias_audit.data.formats.FORMATS`; by default the one it is recognised as.
            object, spurious, context: names that things are annotated as (COCO: categories or supercategories), each
                a region; or a mapping from a region's name to the names whose union it is.
            minus: per region name the names that are cut out of it.
            attributes: columns of the CSV; by default all but `file` and `label`.
            classes: class names in order of the model's outputs; by default the labels, sorted.

        Raises:
            ValueError: a `Misfit`, with a line for each thing that is wrong: a file that cannot be read, an unknown
                name or column, an image that is not annotated or not there.

        Example:
            >>> AuditDataset.from_annotations("boxes.csv", "images", labels="labels.csv", object=["tie"],
            ...                               spurious=["hair"]).subjects.classes  # doctest: +SKIP
            ('doctor', 'nurse')
        """
        from bias_audit.data.readers import read_annotated

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
            >>> AuditDataset.from_coco("instances.json", "images", labels="labels.csv", object=["tie"],
            ...                        spurious=["person"]).subjects.classes  # doctest: +SKIP
            ('doctor', 'nurse')
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
        from bias_audit.data.readers import read_folder

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
        from bias_audit.data.readers import read_dataset

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
        cells: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
        for index, (label, values) in enumerate(zip(self.labels, self.attribute_table, strict=True)):
            cells[(str(label), *values)].append(index)
        keys = sorted(cells)
        quota = _shares(np.array([len(cells[key]) for key in keys]), max_samples)
        rng = np.random.default_rng(seed)
        drawn = [i for key, n in zip(keys, quota, strict=True) for i in rng.choice(cells[key], n, replace=False)]
        return self.select(sorted(drawn))

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

    def sheet(
        self, progress: Callable[[int, int], None] = lambda done, of: None, ranks: Ranks = ALONE
    ) -> tuple[SampleSheet, str, tuple[RegionCount, ...]]:
        """Thumbnails and masks of every sample, the fingerprint of all that was decoded, and how each region is drawn.

        `progress(done, of)` is called after each sample. Each of several `ranks` decodes a part.

        Raises:
            ValueError: as `batch`, but of all such samples at once; or a region with a role is on no sample at all.
        """
        digest = hashlib.sha256(repr((self.subjects, self.ids, self.labels.tolist())).encode())
        digest.update("\0".join(self.attribute_table.ravel()).encode())
        found = ranks.shared(len(self), self._sheet_row, progress)
        rows = [row for row in found if isinstance(row, _SheetRow)]
        if len(rows) < len(found):
            raise Misfit([row for row in found if isinstance(row, str)])
        digest.update(b"".join(row.checksums for row in rows))
        annotated = self._counted(torch.stack([row.seen for row in rows]))
        width = max(row.masks.width for row in rows)
        shapes = np.array([row.masks.bits.shape for row in rows])
        bits = np.zeros((len(rows), *shapes.max(axis=0)[1:]), dtype=np.uint8)
        for row, padded, (_, _, height, length) in zip(rows, bits, shapes, strict=True):
            padded[:, :height, :length] = row.masks.bits[0]
        thumbnails = tuple(row.thumbnail for row in rows)
        sheet = SampleSheet(self.ids, self.labels, self.attribute_table, thumbnails, PackedMasks(bits, width))
        return sheet, digest.hexdigest(), annotated

    def _sheet_row(self, index: int) -> _SheetRow | str:
        """Of one sample; or what is wrong with it."""
        try:
            prepared = self._prepare(index)
        except ValueError as error:
            return str(error)
        contents = (content.contiguous().numpy().tobytes() for content in (prepared.image, prepared.masks))
        return _SheetRow(
            b"".join(zlib.crc32(content).to_bytes(4, "little") for content in contents),
            thumbnail(prepared.image),
            PackedMasks.of(_thumbnail_masks(prepared.masks)[None].numpy()),
            prepared.masks.flatten(1).any(1),  # a small region may well be lost in the thumbnail
        )

    def _counted(self, seen: Tensor) -> tuple[RegionCount, ...]:
        """On how many samples each region is, by which of them show any of it: bool `(N, R)`."""
        counts, wrong = [], Complaints()
        for (name, role), found in zip(self.subjects.regions, seen.T.tolist(), strict=True):
            if not any(found):
                wrong.lines.append(
                    f"{role} region {name!r} is on no image of the audit set: check its name and the transform"
                )
            boxed = sum(name in sample.boxed for sample, shows in zip(self.samples, found, strict=True) if shows)
            counts.append(RegionCount(name, sum(found) - boxed, boxed, len(found) - sum(found)))
        wrong.end()
        return tuple(counts)

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
            image = _checked_image(sample.id, picture)
            if instead is not None:
                size, image = image.shape, _checked_image(sample.id, instead)
                if image.shape != size:
                    raise ValueError(
                        f"sample {sample.id!r}: expected a swapped image of its size {tuple(size)}, got "
                        f"{tuple(image.shape)}"
                    )
            masks = tv_tensors.Mask(self._stack_masks(sample.id, regions, image.shape[-2:]))
            if self._geometric is not None:
                image, masks = _transformed(sample.id, self._geometric, image, masks)
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


def _shares(sizes: np.ndarray[Any, np.dtype[np.int64]], total: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """`total` split over cells in proportion to `sizes` by largest remainders, at least one each where possible."""
    exact = sizes * total / sizes.sum()
    quota: np.ndarray[Any, np.dtype[np.int64]] = np.floor(exact).astype(np.int64)
    if total >= len(sizes):
        quota = np.maximum(quota, 1)
    order = np.argsort(quota - exact, kind="stable")
    while (short := total - int(quota.sum())) > 0:
        open_cells = [i for i in order if quota[i] < sizes[i]]
        quota[open_cells[:short]] += 1
    while quota.sum() > total:
        quota[np.argmax(quota)] -= 1
    return quota


def _split_transform(
    transform: Callable[..., Any] | None,
) -> tuple[Callable[..., Any] | None, Callable[[Tensor], Tensor]]:
    """The part of a transform that is applied once and cached, and the pixelwise rest that runs on the device."""
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


def _checked_image(sample_id: str, picture: Tensor | Image.Image) -> tv_tensors.Image:
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


def _transformed(
    sample_id: str, transform: Callable[..., Any], image: tv_tensors.Image, masks: tv_tensors.Mask
) -> tuple[Tensor, Tensor]:
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

"""What a run keeps of each image: what does not change from audit to audit, and every score at one audit.

Enters: fields, from `audit.Auditor` or read back by `arrays`. Leaves: frozen dataclasses of arrays, an image a row.

Neither torch nor Lightning is imported here, and numpy only where arrays are touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


@dataclass(frozen=True)
class PackedMasks:
    """Masks of N images, eight pixels in a byte: one image's at a time are unpacked.

    `bits` is uint8 `(N, R, h, ceil(w / 8))`, as `np.packbits` makes it, and `width` is w.

    Example:
        >>> import numpy as np
        >>> masks = PackedMasks.of(np.eye(3, dtype=bool)[None, None])
        >>> masks.bits.shape, masks[0][0].tolist()
        ((1, 1, 3, 1), [[True, False, False], [False, True, False], [False, False, True]])
    """

    bits: npt.NDArray[np.uint8]
    width: int

    @classmethod
    def of(cls, masks: npt.NDArray[np.bool_]) -> PackedMasks:
        """Those of bool `(N, R, h, w)`."""
        import numpy as np

        return cls(np.packbits(masks, axis=-1), masks.shape[-1])

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """`(N, R, h, w)`: images, regions, and the thumbnail's rows and columns."""
        n, regions, height, _ = self.bits.shape
        return n, regions, height, self.width

    def __len__(self) -> int:
        return len(self.bits)

    def __getitem__(self, index: int) -> npt.NDArray[np.bool_]:
        """The masks of one image, bool `(R, h, w)`."""
        import numpy as np

        return np.unpackbits(self.bits[index], axis=-1, count=self.width).view(np.bool_)

    def __iter__(self) -> Iterator[npt.NDArray[np.bool_]]:
        return (self[index] for index in range(len(self)))


@dataclass(frozen=True)
class SampleSheet:
    """The audited images, as they do not change from audit to audit.

    `attributes` is `(N, A)` text in the order of `Subjects.attributes`, "" where a sample has none. `thumbnails` are
    JPEG bytes. `masks` `(N, R, h, w)` are in the order of `Subjects.regions`, each at its thumbnail's size and padded
    at the bottom and on the right to the largest, `(h, w)`.
    """

    ids: tuple[str, ...]
    labels: npt.NDArray[np.int64]
    attributes: npt.NDArray[np.str_]
    thumbnails: tuple[bytes, ...]
    masks: PackedMasks


@dataclass(frozen=True)
class SampleTable:
    """What is known of the audited images, less their pictures and masks: see `SampleSheet`."""

    ids: tuple[str, ...]
    labels: npt.NDArray[np.int64]
    attributes: npt.NDArray[np.str_]


@dataclass(frozen=True)
class SampleScores:
    """Every score of every sample at one audit; N samples, M methods, K metrics, R regions and the remainder.

    `values` is float32 `(K, M, N, R + 1)`, NaN where a score is not valid; `metrics`, `methods` and `regions` name its
    axes. `areas` is `(N, R + 1)`, each region's share of the image, NaN where a sample lacks the region. `maps` is
    float16 `(M, N, h, w)`, each map divided by its largest absolute value, which `magnitude` `(M, N)` keeps. `margin`
    `(N,)` is the label's logit minus the largest other. `effects` is float32 `(E, N, R)`, what the removal of each
    region does beyond that of control regions, NaN where none was tried; `effect_metrics` names its first axis. It is
    empty where this audit made no interventions.
    """

    metrics: tuple[str, ...]
    methods: tuple[str, ...]
    regions: tuple[str, ...]
    ids: tuple[str, ...]
    labels: npt.NDArray[np.int64]
    predictions: npt.NDArray[np.int64]
    margin: npt.NDArray[np.float32]
    areas: npt.NDArray[np.float32]
    values: npt.NDArray[np.float32]
    maps: npt.NDArray[np.float16]
    magnitude: npt.NDArray[np.float32]
    effect_metrics: tuple[str, ...] = ()
    effects: npt.NDArray[np.float32] = field(default_factory=lambda: _no_effects())

    def of(self, metric: str, method: str, region: str) -> npt.NDArray[np.float32]:
        """One score for each sample, `(N,)`, NaN where not valid."""
        k, m, r = self.metrics.index(metric), self.methods.index(method), self.regions.index(region)
        return self.values[k, m, :, r]

    @property
    def correct(self) -> npt.NDArray[np.bool_]:
        """Whether each sample is classified as its label, `(N,)`."""
        hits: npt.NDArray[np.bool_] = self.predictions == self.labels
        return hits


def _no_effects() -> npt.NDArray[np.float32]:
    import numpy as np

    return np.empty((0, 0, 0), dtype=np.float32)


@dataclass(frozen=True)
class ChangedPictures:
    """What interventions made of P images at the audit of `step`: those on which each change told most.

    Of each picture the sample's id, the `kind` of change ("removal" or "swap"), the region it was made in ("" where the
    user's own swap changed the image), for a swap the attribute and the value that was put in ("" for a removal), and
    the JPEG of what the model saw. `decisions` int64 `(P,)` are the classes it decided for, -1 where its output was not
    finite, and `falls` float32 `(P,)` by how much the margin of the label fell.
    """

    step: int
    ids: tuple[str, ...]
    kinds: tuple[str, ...]
    regions: tuple[str, ...]
    attributes: tuple[str, ...]
    values: tuple[str, ...]
    decisions: npt.NDArray[np.int64]
    falls: npt.NDArray[np.float32]
    pictures: tuple[bytes, ...]

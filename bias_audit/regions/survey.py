"""What the regions of a set of images measure, image by image: what the checks are made from.

Enters: a `RegionSet`. Leaves: its `Survey`, areas and overlaps as arrays; or all that does not decode, in one `Misfit`.

Areas are those on the images as they are stored, before any transform.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt

from bias_audit.data.annotations import Complaints
from bias_audit.data.outlines import Mask, WrongSize
from bias_audit.progress import Progress, silent
from bias_audit.regions.region_set import Annotator, Masks, RegionSet, Size

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Agreement:
    """What two annotators drew as a region of an image: intersection over union, and who of them drew it alone.

    What one of them left out counts as empty: an IoU of 0. It is None where both outlines hold no pixel.
    """

    index: int
    region: str
    iou: float | None
    only: str = ""


@dataclass(frozen=True)
class Survey:
    """What was measured of N images with R regions, in the set's order.

    `areas` `(N, R)` are shares of the image, 0 to 1, NaN where the image lacks the region; `boxed` bool `(N, R)`.
    `overlaps` `(N, P)` are, of each object and spurious region in `pairs`, the share of the smaller that lies in both;
    NaN where one is missing or holds nothing. `misfits` are images whose regions are not of their size, which are
    measured in nothing else, with the reason.
    """

    of: RegionSet
    areas: Floats
    boxed: npt.NDArray[np.bool_]
    pairs: tuple[tuple[str, str], ...]
    overlaps: Floats
    misfits: tuple[tuple[int, str], ...]
    agreements: tuple[Agreement, ...]

    @property
    def measured(self) -> npt.NDArray[np.bool_]:
        """Which images were measured, bool `(N,)`."""
        found = np.ones(len(self.of.items), dtype=np.bool_)
        found[[index for index, _ in self.misfits]] = False
        return found


def survey(found: RegionSet, progress: Progress = silent) -> Survey:
    """Open every image once and measure its regions; `progress(done, of)` is called after each.

    Raises:
        Misfit: images or masks do not decode: a line for each.
    """
    names = found.region_names
    pairs = tuple((o, s) for o in found.with_role("object") for s in found.with_role("spurious"))
    areas = np.full((len(found.items), len(names)), np.nan)
    overlaps = np.full((len(found.items), len(pairs)), np.nan)
    boxed = np.array([[name in item.boxed for name in names] for item in found.items], dtype=np.bool_)
    wrong, misfits, agreements = Complaints(), [], []
    for index, item in enumerate(found.items):
        try:
            image, masks = item.decode()
            size = (image.height, image.width)
            areas[index] = [masks[name].mean() if name in masks else np.nan for name in names]
            overlaps[index] = [_overlap(masks.get(one), masks.get(other)) for one, other in pairs]
            agreements += list(_agreements(found.annotators, index, item.file, size))
        except WrongSize as error:
            misfits.append((index, str(error)))
            areas[index] = overlaps[index] = np.nan
        # What a damaged file makes Pillow or torch raise.
        except (ValueError, OSError, RuntimeError) as error:
            wrong.add(item.where, f"image {item.file!r}: {error}")
        progress(index + 1, len(found.items))
    wrong.end()
    measured = ~np.isnan(areas)
    return Survey(
        found, areas, boxed.reshape(areas.shape) & measured, pairs, overlaps, tuple(misfits), tuple(agreements)
    )


def _overlap(one: Mask | None, other: Mask | None) -> float:
    if one is None or other is None:
        return np.nan
    smaller = min(np.count_nonzero(one), np.count_nonzero(other))
    return np.count_nonzero(one & other) / smaller if smaller else np.nan


def _agreements(annotators: Sequence[Annotator], index: int, file: str, size: Size) -> Iterator[Agreement]:
    """What each two annotators of an image drew of each region that both draw; what neither drew is not told."""
    drew = [(one, _draws(one, file, size)) for one in annotators if file in one.files]
    for (first, ones), (second, others) in combinations(drew, 2):
        for region in sorted(first.regions & second.regions):
            one, other = ones.get(region), others.get(region)
            if one is not None and other is not None:
                both, either = np.count_nonzero(one & other), np.count_nonzero(one | other)
                yield Agreement(index, region, both / either if either else None)
            elif one is not None or other is not None:
                yield Agreement(index, region, 0.0, first.name if other is None else second.name)


def _draws(annotator: Annotator, file: str, size: Size) -> Masks:
    try:
        return annotator.draw(file, size)
    except WrongSize as error:
        raise WrongSize(f"{annotator.name}: {error}") from error

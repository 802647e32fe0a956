"""People in images, by torchvision's Mask R-CNN and Keypoint R-CNN: persons, their parts, and the background.

Enters: the names of regions, and detectors with their weights (see `weights`). Leaves: a `PeopleDetector`, which gives
each image's annotations: a person is the detector's mask; face, hair, torso and hands are drawn from the keypoints of
the same person and cut by that mask (see `keypoints`); the background is what no person covers.

The detectors are those of Mask R-CNN (He et al., 2017, arXiv 1703.06870). Nothing here says who or what a person is.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torchvision.ops import box_iou
from torchvision.transforms.v2 import functional as F

from bias_audit.data.annotations import Annotation
from bias_audit.data.outlines import Mask
from bias_audit.regions.keypoints import REGIONS as PARTS
from bias_audit.regions.keypoints import people_regions
from bias_audit.regions.pictures import Picture

PERSON, BACKGROUND = "person", "background"
REGIONS = (PERSON, *PARTS, BACKGROUND)
# A person of one detector and a person of the other are the same if their boxes overlap so much.
LEAST_IOU = 0.5
# A keypoint is seen where its heatmap's highest logit is above this: the threshold that Detectron draws with. It is no
# probability: the detector is trained on the points that are there only.
SEEN = 2.0

_PERSON_LABEL = 1


@dataclass(frozen=True)
class Detector:
    """A detector that maps images `(3, h, w)`, 0 to 1, to their boxes, labels, scores and masks or keypoints, as
    torchvision's do, on its device; and what it is, for the annotations."""

    model: nn.Module
    source: str


@dataclass(frozen=True)
class PeopleDetector:
    """Finds the wanted `regions`; `points` is None where none of them needs keypoints.

    A person counts with a score above `min_score`, 0 to 1.
    """

    masks: Detector
    points: Detector | None
    regions: tuple[str, ...]
    min_score: float

    @property
    def source(self) -> str:
        """What everything it finds depends on."""
        made = self.masks.source if self.points is None else f"{self.masks.source}; {self.points.source}"
        return f"{made}; {self._least}; {', '.join(self.regions)}"

    @property
    def _least(self) -> str:
        return f"score above {self.min_score:g}"

    def alike(self, size: tuple[int, int]) -> Hashable:
        """Images for which this is the same have the same result in a batch as alone, since none of them is padded.

        Raises:
            ValueError: nothing is left of the shorter side when it is scaled.
        """
        transform = getattr(self.masks.model, "transform", None)
        if transform is None:
            return size
        short, long = min(size), max(size)
        scale = min(transform.min_size[-1] / short, transform.max_size / long)
        if int(short * scale) < 1:
            raise ValueError(
                f"is looked at as {size[1]} x {size[0]} pixels, too narrow to find people in: crop it, or leave it out "
                "with --only"
            )
        return tuple(-(-int(side * scale) // transform.size_divisible) for side in size)

    def __call__(self, pictures: Sequence[Picture]) -> list[tuple[Annotation, ...]]:
        """The annotations of each picture: its persons, the highest score first, each followed by its parts; then the
        background.

        All that belongs to a person has its number as `instance`. A part has the lower of the two detectors' scores.
        An image without a person has no background either: nobody may have been found, or nobody be there.
        """
        device = next(self.masks.model.parameters()).device
        images = [F.to_dtype(F.pil_to_tensor(p.image).to(device), torch.float32, scale=True) for p in pictures]
        with torch.inference_mode():
            masked = self.masks.model(images)
            posed = [None] * len(images) if self.points is None else self.points.model(images)
        return [self._one(*found) for found in zip(pictures, masked, posed, strict=True)]

    def _one(
        self, picture: Picture, masked: Mapping[str, Tensor], posed: Mapping[str, Tensor] | None
    ) -> tuple[Annotation, ...]:
        people = (masked["labels"] == _PERSON_LABEL) & (masked["scores"] > self.min_score)
        masks = (masked["masks"][people, 0] > 0.5).cpu().numpy()
        boxes, scores = masked["boxes"][people].cpu(), masked["scores"][people].tolist()
        parts: Mapping[int, tuple[float, Mapping[str, Mask]]] = {}
        if posed is not None and len(masks):
            parts = self._parts(boxes, masks, posed)
        found: list[Annotation] = []
        own = f"{self.masks.source}; {self._least}"
        others = "" if self.points is None else f"drawn from keypoints by {self.points.source}; cut by {own}"
        for person, (mask, score) in enumerate(zip(masks, scores, strict=True)):
            if PERSON in self.regions and mask.any():
                found.append(Annotation(PERSON, picture.runs(mask), score, own, person))
            posed_score, drawn = parts.get(person, (0.0, {}))
            found.extend(
                Annotation(name, picture.runs(part), min(score, posed_score), others, person)
                for name, part in drawn.items()
                if part.any()
            )
        covered: Mask = np.logical_or.reduce(masks, axis=0)
        if BACKGROUND in self.regions and covered.any() and not covered.all():
            found.append(Annotation(BACKGROUND, picture.runs(~covered), source=f"what no person covers by {own}"))
        return tuple(found)

    def _parts(
        self, boxes: Tensor, masks: npt.NDArray[np.bool_], posed: Mapping[str, Tensor]
    ) -> dict[int, tuple[float, dict[str, Mask]]]:
        """By a person's number the score of her pose, and her parts."""
        people = (posed["labels"] == _PERSON_LABEL) & (posed["scores"] > self.min_score)
        points, scores = posed["keypoints"][people].cpu(), posed["scores"][people].tolist()
        seen = posed["keypoints_scores"][people].cpu() > SEEN
        pairs = same_people(boxes, posed["boxes"][people].cpu())
        keypoints = torch.cat([points[..., :2], seen[..., None]], dim=2)[[b for _, b in pairs]]
        wanted = [name for name in self.regions if name in PARTS]
        drawn = people_regions(keypoints.numpy(), masks[[a for a, _ in pairs]], wanted)
        return {a: (scores[b], {n: drawn[n][place] for n in wanted}) for place, (a, b) in enumerate(pairs)}


def same_people(boxes: Tensor, others: Tensor) -> list[tuple[int, int]]:
    """Which boxes `(N, 4)` and `(M, 4)` (left, top, right, bottom) are of the same person, as pairs of indices.

    Each is in one pair at most; of all such pairings that of the largest sum of IoUs, without pairs below `LEAST_IOU`.

    Example:
        >>> wide, high = [0.0, 0.0, 9.0, 4.0], [20.0, 0.0, 24.0, 9.0]
        >>> same_people(torch.tensor([wide, high]), torch.tensor([high, [50.0, 0.0, 60.0, 9.0]]))
        [(1, 0)]
    """
    overlaps = box_iou(boxes, others)
    # Before the pairing: a pair that does not count must not cost another that does.
    overlaps = overlaps.where(overlaps >= LEAST_IOU, 0.0).numpy()
    rows, columns = linear_sum_assignment(overlaps, maximize=True)
    return [(int(a), int(b)) for a, b in zip(rows, columns, strict=True) if overlaps[a, b] > 0]

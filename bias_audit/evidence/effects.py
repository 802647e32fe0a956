"""What removing a region, or swapping its cue, does to the decision on each image.

Enters: the changes, and a function that gives a model's logits for pictures. Leaves: the logits of each image and of
its changed versions, and the `Effects` that these amount to, on the logits' device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bias_audit.attribution.targets import BinaryLogit, ClassLogit
from bias_audit.evidence.changes import Change, Changes, Kind
from bias_audit.evidence.removal import FILLS
from bias_audit.progress import Progress, silent
from bias_audit.ranks import ALONE, Ranks

Floats = npt.NDArray[np.floating]

EFFECTS = ("effect", "score", "margin", "flips")


@dataclass(frozen=True)
class Effects:
    """What the changes did to each of N images; S spurious regions, A attributes. NaN, or -1, where nothing was tried.

    `removal` and `control` `(4, N, S)`, in the order of `EFFECTS`: by how much the decided class's margin changes, the
    fall of the target's score, the fall of that margin, and whether the decision changes, when the region, or on
    average a control region, is in-painted. `margin` `(N,)` is that margin before. `fill` and
    `fill_control` `(F, N, S)`: whether the decision changes when it is filled in each of the ways of `FILLS`.
    `swapped` and `swap_control` int64 `(N, A, S + 1)`: the decisions with another value's cue, and with another image's
    cue of the same value; the last of S + 1 is the user's swap. `noise` `(2, N)`: how often an image is right with
    noise on all but the object, and on the object alone. `decisions` `(N,)`. `label_fall` `(2, N, S)`: the fall of the
    label's margin when the region, or on average a control region, is in-painted.
    """

    removal: Floats
    control: Floats
    margin: Floats
    fill: Floats
    fill_control: Floats
    swapped: npt.NDArray[np.int64]
    swap_control: npt.NDArray[np.int64]
    noise: Floats
    decisions: npt.NDArray[np.int64]
    label_fall: Floats


def responses(
    changes: Changes,
    outputs: Callable[[Tensor], Tensor],
    batch_size: int,
    progress: Progress = silent,
    ranks: Ranks = ALONE,
) -> Tensor:
    """The logits `(N, V, C)` of each image under each change, NaN where it cannot be made.

    `outputs` gives the logits `(B, C)` of pictures `(B, 3, H, W)`; `progress(images done, images)` is called after each
    batch.
    """
    made = ranks.shared(changes.count, changes.made)
    shown = [(image, number) for image, numbers in enumerate(made) for number in numbers]
    batches = [shown[start : start + batch_size] for start in range(0, len(shown), batch_size)]

    def logits_of(batch: int) -> Tensor:
        return outputs(torch.stack([changes.picture(*place) for place in batches[batch]])).float()

    def done(batch: int, _: int) -> None:
        progress(batches[batch - 1][-1][0] + 1, changes.count)

    every = torch.cat(ranks.shared(len(batches), logits_of, done))
    found = every.new_full((changes.count, len(changes.list), every.shape[1]), torch.nan)
    images, numbers = zip(*shown, strict=True)
    found[list(images), list(numbers)] = every
    return found


def effects(logits: Tensor, scores: Tensor, labels: Tensor, changes: Sequence[Change]) -> tuple[Tensor, ...]:
    """The fields of `Effects`, as tensors on the logits' device.

    Args:
        logits: `(N, V, C)`, of each image under each of the V `changes`, the first of which is none; NaN where a change
            cannot be made.
        scores: `(N, V)`, the target's.
        labels: int64 `(N,)`.
    """
    made = logits.isfinite().all(dim=2)
    decisions = torch.where(made, _decided(logits), -1)
    margins = _margins_of(logits, decisions[:, :1])
    flips = torch.where(made & made[:, :1], (decisions != decisions[:, :1]).float(), torch.nan)
    falls = margins[:, :1] - margins
    of_label = _margins_of(logits, labels[:, None])
    label_falls = torch.where(made & made[:, :1], of_label[:, :1] - of_label, torch.nan)
    changed = torch.stack([falls.abs(), scores[:, :1] - scores, falls, flips])
    changed = torch.where(made & made[:, :1], changed, torch.nan)
    regions = sorted({c.region for c in changes if c.kind == "removal"})
    attributes = 1 + max((c.attribute for c in changes), default=-1)

    def columns(kind: Kind, region: int = -1, attribute: int = -1, detail: str = "") -> list[int]:
        wanted = Change(kind, region, attribute, detail)
        return [v for v, change in enumerate(changes) if change == wanted]

    def by_region(values: Tensor, kind: Kind, detail: str = "") -> Tensor:
        """Of values `(..., N, V)` the mean over the changes of a kind, `(..., N, S)`."""
        found = [values[..., columns(kind, r, detail=detail)].nanmean(dim=-1) for r in regions]
        return torch.stack(found, dim=-1) if found else values[..., :0]

    def by_attribute(kind: Kind) -> Tensor:
        rows = []
        for a in range(attributes):
            places = [columns(kind, r, a) for r in (*regions, -1)]
            nothing = decisions.new_full((len(decisions),), -1)
            rows.append(torch.stack([decisions[:, p[0]] if p else nothing for p in places], dim=1))
        return torch.stack(rows, dim=1) if rows else decisions.new_full((len(decisions), 0, len(regions) + 1), -1)

    right = torch.where(made, (decisions == labels[:, None]).float(), torch.nan)
    return (
        by_region(changed, "removal"),
        by_region(changed, "control"),
        margins[:, 0],
        torch.stack([by_region(flips, "fill", fill) for fill in FILLS]),
        torch.stack([by_region(flips, "fill_control", fill) for fill in FILLS]),
        by_attribute("swap"),
        by_attribute("swap_control"),
        torch.stack([right[:, columns(kind)].nanmean(dim=1) for kind in ("noise_rest", "noise_object")]),
        decisions[:, 0],
        torch.stack([by_region(label_falls, "removal"), by_region(label_falls, "control")]),
    )


def _decided(logits: Tensor) -> Tensor:
    """The classes with the largest logits; of one logit, whether it is positive."""
    return (logits[..., 0] > 0).long() if logits.shape[-1] == 1 else logits.argmax(dim=-1)


def _margins_of(logits: Tensor, classes: Tensor) -> Tensor:
    """The margins `(N, V)` of one class for each image, `(N, 1)`: its logit minus the largest other."""
    every = classes.clamp_min(0).expand(logits.shape[:2])
    if logits.shape[-1] == 1:
        return BinaryLogit(every.flatten())(logits.flatten(0, 1)).view(every.shape)
    own = ClassLogit(every.flatten())(logits.flatten(0, 1)).view(every.shape)
    others = logits.scatter(2, every[:, :, None], -torch.inf).amax(dim=2)
    return own - others

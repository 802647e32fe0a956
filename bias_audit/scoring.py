"""Every score of a batch, on the model's device.

Enters: the activations and gradients of a batch, its labels and its regions. Leaves: `BatchScores`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bias_audit.attribution.capture import Capture
from bias_audit.attribution.methods import find_method
from bias_audit.attribution.targets import BinaryLogit, ClassMargin
from bias_audit.localization import PixelRegions, ProjectedRegions, Scored, energy_share, enrichment, score_maps
from bias_audit.plan import AuditPlan

METRICS = ("energy_share", "enrichment", "pointing_game", "iou", "relevance_rank_accuracy")


class BatchScores(NamedTuple):
    """What is measured on a batch, on the model's device.

    `values` `(K, M, B, R + 1)`, NaN where not valid; `maps` `(M, B, h, w)` over their `magnitude` `(M, B)`; `areas`
    `(B, R + 1)`; `predictions` and `margin` `(B,)`.
    """

    values: Tensor
    maps: Tensor
    magnitude: Tensor
    areas: Tensor
    predictions: Tensor
    margin: Tensor


# Of each of these, the axis that counts samples.
SAMPLE_AXES = (2, 1, 1, 0, 0, 0)


def score_batch(
    taken: Capture, labels: Tensor, projected: ProjectedRegions, regions: PixelRegions, plan: AuditPlan
) -> BatchScores:
    """Every score of a batch by every method; the regions, of which the remainder is the last, in both their forms."""
    maps = maps_of(taken, plan)
    magnitude = maps.flatten(2).amax(dim=2)
    scaled = maps / torch.where(magnitude > 0, magnitude, 1).view(*maps.shape[:2], *(1 for _ in maps.shape[2:]))
    areas = torch.where(projected.area > 0, projected.area, torch.nan)
    values = _localized(maps, projected, regions, plan)
    return BatchScores(values, scaled.half(), magnitude, areas, *decisions_of(taken.outputs, labels))


def maps_of(taken: Capture, plan: AuditPlan) -> Tensor:
    """The maps by each method, `(M, B, h, w)`."""
    formulas = (find_method(method).formula for method in plan.methods)
    return torch.stack([f(taken.activations, taken.gradients, plan.sign) for f in formulas if f is not None])


def _localized(maps: Tensor, projected: ProjectedRegions, regions: PixelRegions, plan: AuditPlan) -> Tensor:
    share = energy_share(maps, projected)
    scored = [share, enrichment(share, projected.area), *score_maps(maps, regions, plan.iou_threshold)]
    for name, metric in zip(plan.metric_names, plan.metrics, strict=True):
        own = Scored(*metric(maps, projected))
        if own.value.shape != share.value.shape or own.valid.shape != share.value.shape:
            raise ValueError(
                f"{name}: expected value and valid of shape {tuple(share.value.shape)} (methods, images, regions), got "
                f"{tuple(own.value.shape)} and {tuple(own.valid.shape)}"
            )
        scored.append(own)
    return torch.stack([torch.where(s.valid, s.value, torch.nan) for s in scored])


def decisions_of(outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The predicted classes, -1 where an output is not finite, and the labels' margins."""
    if outputs.shape[1] == 1:
        predictions, margin = (outputs[:, 0] > 0).long(), BinaryLogit(labels)(outputs)
    else:
        predictions, margin = outputs.argmax(dim=1), ClassMargin(labels)(outputs)
    finite = outputs.isfinite().all(dim=1)
    return torch.where(finite, predictions, -1), torch.where(finite, margin, torch.nan)

"""Every score of a batch, on the model's device; and of all batches, as the records keep them.

Enters: the activations and gradients of a batch, its labels and its regions. Leaves: `BatchScores`, and in the end
`SampleScores`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bias_audit.attribution.capture import Capture
from bias_audit.attribution.methods import find_method
from bias_audit.attribution.targets import BinaryLogit, ClassMargin
from bias_audit.data.dataset import AuditDataset
from bias_audit.localization import (
    PixelRegions,
    ProjectedRegions,
    Scored,
    energy_share,
    enrichment,
    label_pixels,
    project_regions,
    score_maps,
    with_remainder,
)
from bias_audit.plan import AuditPlan
from bias_audit.records.samples import SampleScores
from bias_audit.terms import REMAINDER

# Bytes of regions that are kept on the device from audit to audit: 5,000 images of 224 x 224. Others are made anew.
REGION_BYTES = 256_000_000

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
    share = energy_share(maps, projected)
    scored = [share, enrichment(share, projected.area), *score_maps(maps, regions, plan.iou_threshold)]
    for name, metric in zip(plan.metric_names, plan.metrics, strict=True):
        scored.append(_checked(name, metric(maps, projected), share))
    values = torch.stack([torch.where(s.valid, s.value, torch.nan) for s in scored])
    return BatchScores(values, scaled.half(), magnitude, areas, *decisions_of(taken.outputs, labels))


def maps_of(taken: Capture, plan: AuditPlan) -> Tensor:
    """The maps by each method, `(M, B, h, w)`, float32.

    Raises:
        ValueError: a method of the user's gives no map for each image at the layer's resolution.
    """
    formulas = [(method.name, method.formula) for method in map(find_method, plan.methods)]
    maps = [(name, f(taken.activations, taken.gradients, plan.sign)) for name, f in formulas if f is not None]
    expected = (len(taken.activations), *taken.activations.shape[2:])
    for name, found in maps:
        if not isinstance(found, Tensor) or found.shape != expected:
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"method {name}: expected maps of shape {expected} (images, places), got {got}")
    return torch.stack([found.detach().float() for _, found in maps])


def _checked(name: str, given: object, like: Scored) -> Scored:
    """What a metric of the user's gives, of the shape and type of the others."""
    shape, device = tuple(like.value.shape), like.value.device
    expected = f"{name}: expected value and valid of shape {shape} (methods, images, regions)"
    if not isinstance(given, tuple) or len(given) != 2 or not all(isinstance(part, Tensor) for part in given):
        raise ValueError(f"{expected}, as two tensors, got {type(given).__name__}")
    own = Scored(*given)
    if own.value.shape != shape or own.valid.shape != shape:
        raise ValueError(f"{expected}, got {tuple(own.value.shape)} and {tuple(own.valid.shape)}")
    if own.valid.dtype != torch.bool or {own.value.device, own.valid.device} != {device}:
        raise ValueError(
            f"{expected}, valid of bool and both on {device}, got {own.valid.dtype} on {own.valid.device}, and value "
            f"on {own.value.device}"
        )
    return Scored(own.value.detach().to(like.value.dtype), own.valid)


def decisions_of(outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The predicted classes, -1 where an output is not finite, and the labels' margins."""
    if outputs.shape[1] == 1:
        predictions, margin = (outputs[:, 0] > 0).long(), BinaryLogit(labels)(outputs)
    else:
        predictions, margin = outputs.argmax(dim=1), ClassMargin(labels)(outputs)
    finite = outputs.isfinite().all(dim=1)
    return torch.where(finite, predictions, -1), torch.where(finite, margin, torch.nan)


class KeptRegions:
    """Regions of an audit set's samples in the forms that scores need, the remainder the last of them.

    They are projected once and kept, as far as there is room, and as each of the `samples` comes in at most two
    batches: the audit's own and the validation's that it rides along with.
    """

    def __init__(self, samples: int, pointing_tolerance: int) -> None:
        self._most, self._tolerance = 2 * samples, pointing_tolerance
        self._kept: dict[tuple[tuple[int, ...], torch.Size, torch.device], tuple[ProjectedRegions, PixelRegions]] = {}
        self._samples = self._bytes = 0

    def of(self, places: tuple[int, ...], masks: Tensor, activations: Tensor) -> tuple[ProjectedRegions, PixelRegions]:
        """The regions of the samples at `places`, of which `masks` bool `(B, R, H, W)` are, for maps of the
        activations `(B, C, *places)`."""
        key = (places, activations.shape[2:], masks.device)
        regions = self._kept.get(key)
        if regions is None:
            covered = with_remainder(masks)
            regions = project_regions(covered, key[1]), label_pixels(covered, self._tolerance)
            held = sum(tensor.nbytes for part in regions for tensor in vars(part).values())
            if self._samples + len(places) <= self._most and self._bytes + held <= REGION_BYTES:
                self._kept[key] = regions
                self._samples += len(places)
                self._bytes += held
        return regions


def in_order(batches: Sequence[BatchScores], places: Sequence[int]) -> BatchScores:
    """The scores of samples that came in the order `places`, as one batch in the order of the audit set."""
    order = torch.tensor(places).argsort()
    parts = zip(zip(*batches, strict=True), SAMPLE_AXES, strict=True)
    return BatchScores(*(torch.cat(p, dim=axis).index_select(axis, order.to(p[0].device)) for p, axis in parts))


def collected(batches: Sequence[BatchScores], audit_set: AuditDataset, plan: AuditPlan) -> SampleScores:
    """The scores of all samples, in the audit set's order, in one copy from the device.

    Raises:
        ValueError: heatmaps of several sizes, or of a method that gives values below 0.
    """
    sizes = sorted({tuple(batch.maps.shape[2:]) for batch in batches})
    if len(sizes) > 1:
        raise ValueError(
            f"expected images, and so heatmaps, of one size, got heatmaps of {sizes}: give the audit set a "
            "transform that resizes"
        )
    values, maps, magnitude, areas, predictions, margin = (
        torch.cat(parts, dim=axis).cpu().numpy()
        for parts, axis in zip(zip(*batches, strict=True), SAMPLE_AXES, strict=True)
    )
    signed = [name for name, own in zip(plan.method_names, maps, strict=True) if (own < 0).any()]
    if signed:
        raise ValueError(
            f"method {signed[0]}: gives maps below 0, and an audit measures shares of energy: take `.relu()` or "
            "`.abs()` of them"
        )
    return SampleScores(
        metrics=(*METRICS, *plan.metric_names),
        methods=plan.method_names,
        regions=(*(name for name, _ in audit_set.subjects.regions), REMAINDER),
        ids=audit_set.ids,
        labels=audit_set.labels,
        predictions=predictions,
        margin=margin,
        areas=areas,
        values=values,
        maps=maps,
        magnitude=magnitude,
    )

"""One audit, from a model and an audit set to an `AuditResult`: the one place that runs the pipeline.

Enters: a model, an `AuditDataset`, an `AuditPlan` and a `Policy`. Leaves: an `AuditResult`; and, once, the `Manifest`
and the `SampleSheet` that a run directory begins with. Everything up to the scores stays on the model's device, and one
copy at the end brings them over.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from bias_audit.attribution.cam import FORMULAS, Sign, check_sign
from bias_audit.attribution.capture import Capture, as_the_model_takes_them, borrowed, capture, unwrap
from bias_audit.attribution.explain import upsample
from bias_audit.attribution.layers import find_layer
from bias_audit.attribution.targets import BinaryLogit, ClassLogit, ClassMargin, Target, predicted_logit
from bias_audit.data.samples import AuditBatch, AuditDataset
from bias_audit.evidence.attention import attention
from bias_audit.evidence.performance import performance
from bias_audit.localization import (
    ProjectedRegions,
    Scored,
    energy_share,
    enrichment,
    iou,
    pointing_game,
    project_regions,
    relevance_rank_accuracy,
    with_remainder,
)
from bias_audit.policy import Policy
from bias_audit.records import AuditResult, Manifest, RunDirectory, SampleScores, SampleSheet, now
from bias_audit.terms import REMAINDER, Estimate
from bias_audit.verdict import judge

# Both maps come from the same activation and gradient; where the head is more than pooling and one linear layer they
# differ, and each alone can miss a cue.
METHODS = ("gradcam", "hirescam")
METRICS = ("energy_share", "enrichment", "pointing_game", "iou", "relevance_rank_accuracy")

TargetName = Literal["label", "margin", "predicted"]
TargetOfLabels = Callable[[Tensor], Target]
Progress = Callable[[int, int], None]
ForwardContext = Callable[[], AbstractContextManager[Any]]


def _no_progress(done: int, of: int) -> None:
    pass


@dataclass(frozen=True)
class AuditPlan:
    """How to audit.

    Args:
        layer: name of the submodule to explain; by default the last with a feature map.
        target: which score: "margin" (the label's logit minus the largest other), "label" (the label's logit),
            "predicted" (the predicted class's), or a function from labels `(B,)` to a target.
        sign: "positive", "negative" (what speaks against the score) or "absolute".
        batch_size: images per forward pass.
        max_samples: of a larger audit set so many are drawn, once, by label x attributes.
        seed: of that draw and of every resampling.
        iou_threshold: share of a map's maximum above which a pixel counts, for `iou`.
        pointing_tolerance: pixels by which the maximum may miss a region, for `pointing_game`.

    Raises:
        ValueError: a value out of its range; the message names it.
    """

    layer: str | None = None
    target: TargetName | TargetOfLabels = "margin"
    sign: Sign = "positive"
    batch_size: int = 32
    max_samples: int = 512
    seed: int = 0
    iou_threshold: float = 0.15
    pointing_tolerance: int = 0

    def __post_init__(self) -> None:
        check_sign(self.sign)
        if self.sign == "signed":
            raise ValueError("an audit measures shares of energy, which signed maps do not have: use another sign")
        if not callable(self.target) and self.target not in get_args(TargetName):
            raise ValueError(f"unknown target {self.target!r}: expected one of {', '.join(get_args(TargetName))}")
        for name in ("batch_size", "max_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.iou_threshold < 1:
            raise ValueError(f"iou_threshold must lie in [0, 1), got {self.iou_threshold}")
        if self.pointing_tolerance < 0:
            raise ValueError(f"pointing_tolerance must be at least 0, got {self.pointing_tolerance}")

    def target_of(self, labels: Tensor) -> Target:
        """The target for images with these labels."""
        if callable(self.target):
            return self.target(labels)
        if self.target == "predicted":
            return predicted_logit
        of_classes = ClassMargin(labels) if self.target == "margin" else ClassLogit(labels)
        binary = BinaryLogit(labels)
        return lambda outputs: binary(outputs) if outputs.shape[1] == 1 else of_classes(outputs)

    @property
    def target_name(self) -> str:
        """The target as the manifest names it."""
        return self.target if isinstance(self.target, str) else getattr(self.target, "__qualname__", repr(self.target))


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


def score_batch(
    taken: Capture, masks: Tensor, labels: Tensor, regions: ProjectedRegions, plan: AuditPlan
) -> BatchScores:
    """Every score of a batch by every method; `masks` bool `(B, R + 1, H, W)` with the remainder last."""
    by_method = [FORMULAS[method](taken.activations, taken.gradients, plan.sign) for method in METHODS]
    values = torch.stack([_localized(maps, masks, regions, plan) for maps in by_method], dim=1)
    stacked = torch.stack(by_method)
    magnitude = stacked.amax(dim=(2, 3))
    scaled = stacked / torch.where(magnitude > 0, magnitude, 1)[:, :, None, None]
    areas = torch.where(regions.area > 0, regions.area, torch.nan)
    return BatchScores(values, scaled.half(), magnitude, areas, *_decisions(taken.outputs, labels))


def _localized(maps: Tensor, masks: Tensor, regions: ProjectedRegions, plan: AuditPlan) -> Tensor:
    share = energy_share(maps, regions)
    pixels = upsample(maps, (masks.shape[2], masks.shape[3]))
    scored: tuple[Scored, ...] = (
        share,
        enrichment(share, regions.area),
        pointing_game(pixels, masks, plan.pointing_tolerance),
        iou(pixels, masks, plan.iou_threshold),
        relevance_rank_accuracy(pixels, masks),
    )
    return torch.stack([torch.where(s.valid, s.value, torch.nan) for s in scored])


def _decisions(outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The predicted classes, -1 where an output is not finite, and the labels' margins."""
    if outputs.shape[1] == 1:
        predictions, margin = (outputs[:, 0] > 0).long(), BinaryLogit(labels)(outputs)
    else:
        predictions, margin = outputs.argmax(dim=1), ClassMargin(labels)(outputs)
    finite = outputs.isfinite().all(dim=1)
    return torch.where(finite, predictions, -1), torch.where(finite, margin, torch.nan)


class Auditor:
    """Audits models on one audit set: draws the samples once, decodes them once, projects their regions once.

    Args:
        audit_set: what to look at.
        plan: how.
        policy: what must hold; a `Policy`, a mapping, the path of a file, or None for the default.

    Raises:
        ValueError: the policy cannot be read, or names what the audit set does not have.

    Example:
        >>> from bias_audit.data.scenes import scene_dataset
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        >>> auditor = Auditor(scene_dataset({("doctor", "female"): 4, ("nurse", "male"): 4}, seed=0))
        >>> result = auditor.run(net, step=0)
        >>> result.scores.maps.shape
        (2, 8, 62, 62)
    """

    def __init__(
        self,
        audit_set: AuditDataset,
        plan: AuditPlan | None = None,
        policy: Policy | str | Path | Mapping[str, Any] | None = None,
    ) -> None:
        self.plan = plan or AuditPlan()
        self.policy = Policy.load(policy)
        self.policy.check_names(audit_set.subjects)
        self.samples_available = len(audit_set)
        self.audit_set = audit_set.subset(self.plan.max_samples, self.plan.seed)
        self.layer = self.plan.layer
        self._projected: dict[tuple[tuple[int, ...], torch.Size, torch.device], ProjectedRegions] = {}

    @cached_property
    def _sheet_and_fingerprint(self) -> tuple[SampleSheet, str]:
        return self.audit_set.sheet()

    @property
    def sheet(self) -> SampleSheet:
        """The audited images' thumbnails and masks."""
        return self._sheet_and_fingerprint[0]

    def prepare(self, model: nn.Module, forward_context: ForwardContext = nullcontext) -> None:
        """Find the layer to explain, if the plan names none; `run` does so too.

        Raises:
            ValueError: the model has no layer with a spatial output; or a sample that does not decode.
        """
        if self.layer is None:
            with borrowed(model) as lent, forward_context():
                images = self.audit_set.batch([0], _device_of(model)).images
                self.layer = find_layer(lent, as_the_model_takes_them(lent, images))

    def manifest(self, model: nn.Module) -> Manifest:
        """What this auditor audits and how; after `prepare` or the first `run`, which find the layer.

        Raises:
            ValueError: a sample that does not decode, or a region that no sample shows.
        """
        assert self.layer is not None
        return Manifest(
            run_id=uuid.uuid4().hex[:12],
            created=now(),
            tool=f"bias-audit {version('bias-audit')}",
            model=type(unwrap(model)).__name__,
            layer=self.layer,
            methods=METHODS,
            target=self.plan.target_name,
            sign=self.plan.sign,
            subjects=self.audit_set.subjects,
            fingerprint=self._sheet_and_fingerprint[1],
            samples_available=self.samples_available,
            samples_audited=len(self.audit_set),
            seed=self.plan.seed,
            policy=self.policy,
        )

    def run(
        self,
        model: nn.Module,
        *,
        step: int = 0,
        epoch: int = 0,
        weights: str = "raw",
        trigger: str = "manual",
        reference: SampleScores | None = None,
        forward_context: ForwardContext = nullcontext,
        progress: Progress = _no_progress,
    ) -> AuditResult:
        """Audit the model as it is now; it is given back as it was.

        Args:
            step, epoch, weights, trigger: when, which weights ("raw" or "ema") and why, for the record.
            reference: the scores of the same samples at an earlier audit, for `energy_share_gain`.
            forward_context: what the model's forward runs in, such as its autocast.
            progress: called with (images done, images in all) after each batch.

        Raises:
            ValueError: a sample that does not decode, a label that the model has no output for, a layer without
                spatial output, a model output that is not `(B, classes)`.
        """
        started = time.monotonic()
        device = _device_of(model)
        size = self.plan.batch_size
        batches: list[BatchScores] = []
        self.prepare(model, forward_context)
        assert self.layer is not None
        with borrowed(model) as lent:
            for start in range(0, len(self.audit_set), size):
                batch = self.audit_set.batch(range(start, min(start + size, len(self.audit_set))), device)
                with forward_context():
                    taken = capture(lent, batch.images, self._checked_target(batch), self.layer)
                batches.append(self._score(taken, batch))
                progress(min(start + size, len(self.audit_set)), len(self.audit_set))
        scores = self._collect(batches)
        estimates = self._estimates(scores, reference)
        judgement = judge(estimates, self.audit_set.subjects, self.policy)
        seconds = time.monotonic() - started
        return AuditResult(step, epoch, weights, now(), seconds, estimates, judgement, trigger, scores=scores)

    def _checked_target(self, batch: AuditBatch) -> Target:
        target = self.plan.target_of(batch.labels)

        def checked(outputs: Tensor) -> Tensor:
            if outputs.ndim == 2:
                self._check_labels(batch, 2 if outputs.shape[1] == 1 else outputs.shape[1])
            return target(outputs)

        return checked

    def _check_labels(self, batch: AuditBatch, classes: int) -> None:
        samples = self.audit_set.samples
        for index in batch.indices:
            if samples[index].label >= classes:
                raise ValueError(
                    f"sample {samples[index].id!r}: label {samples[index].label} is out of range: the model has "
                    f"{classes} classes, 0 to {classes - 1}"
                )

    def _score(self, taken: Capture, batch: AuditBatch) -> BatchScores:
        masks = with_remainder(batch.masks)
        size = taken.activations.shape[2:]
        key = (batch.indices, size, masks.device)
        if key not in self._projected:
            self._projected[key] = project_regions(masks, (size[0], size[1]))
        return score_batch(taken, masks, batch.labels, self._projected[key], self.plan)

    def _collect(self, batches: list[BatchScores]) -> SampleScores:
        values, maps, magnitude, areas, predictions, margin = (
            torch.cat(parts, dim=axis).cpu().numpy()
            for parts, axis in zip(zip(*batches, strict=True), (2, 1, 1, 0, 0, 0), strict=True)
        )
        return SampleScores(
            metrics=METRICS,
            methods=METHODS,
            regions=(*(name for name, _ in self.audit_set.subjects.regions), REMAINDER),
            ids=self.audit_set.ids,
            labels=self.audit_set.labels,
            predictions=predictions,
            margin=margin,
            areas=areas,
            values=values,
            maps=maps,
            magnitude=magnitude,
        )

    def _estimates(self, scores: SampleScores, reference: SampleScores | None) -> tuple[Estimate, ...]:
        attributes, subjects = self.audit_set.attribute_table, self.audit_set.subjects
        return (
            *attention(scores, attributes, subjects, seed=self.plan.seed, reference=reference),
            *performance(scores.correct, scores.labels, attributes, subjects, scores.predictions >= 0),
        )


def audit_model(
    model: nn.Module,
    audit_set: AuditDataset,
    *,
    plan: AuditPlan | None = None,
    policy: Policy | str | Path | Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    progress: Progress = _no_progress,
) -> AuditResult:
    """Audit a model once; with `out`, also write a run directory there.

    Raises:
        ValueError: as `Auditor` and `Auditor.run`.
        OSError: `out` cannot be written.

    Example:
        >>> from bias_audit.data.scenes import scene_dataset
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        >>> result = audit_model(net, scene_dataset({("doctor", "female"): 4, ("nurse", "male"): 4}, seed=0))
        >>> result.estimate("accuracy").n
        8
    """
    auditor = Auditor(audit_set, plan, policy)
    result = auditor.run(model, progress=progress)
    if out is not None:
        directory = RunDirectory.create(out, auditor.manifest(model), auditor.sheet)
        directory.append(result)
        directory.end()
    return result


def _device_of(model: nn.Module) -> torch.device:
    tensors = (*model.parameters(), *model.buffers())
    return tensors[0].device if tensors else torch.device("cpu")

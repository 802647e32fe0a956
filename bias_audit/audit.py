"""One audit, from a model and an audit set to an `AuditResult`: the one place that runs the pipeline.

Enters: a model, an `AuditDataset`, an `AuditPlan` and a `Policy`. Leaves: an `AuditResult`; and, once, the `Manifest`
and the `SampleSheet` that a run directory begins with. Everything up to the scores stays on the model's device, and one
copy at the end brings them over.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from bias_audit.attribution.cam import FORMULAS, Sign, check_sign
from bias_audit.attribution.capture import Capture, as_the_model_takes_them, borrowed, capture, logits_of, unwrap
from bias_audit.attribution.layers import Forward, call, find_layer
from bias_audit.attribution.methods import find_method
from bias_audit.attribution.targets import (
    BinaryLogit,
    ClassLogit,
    ClassMargin,
    Target,
    check_logits,
    predicted_logit,
)
from bias_audit.data.samples import AuditDataset
from bias_audit.evidence.attention import attention
from bias_audit.evidence.fitness import Explained, carried, fitness, fitness_estimates
from bias_audit.evidence.performance import performance
from bias_audit.localization import (
    PixelRegions,
    ProjectedRegions,
    energy_share,
    enrichment,
    label_pixels,
    project_regions,
    score_maps,
    with_remainder,
)
from bias_audit.policy import Policy
from bias_audit.records import AuditResult, AuditSummary, Manifest, RunDirectory, SampleScores, SampleSheet, now
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
        layer: name of the submodule to explain; by default the last whose output keeps the image's places.
        methods: names of the explanation methods, each a formula on one layer's activations and gradients.
        target: which score: "margin" (the label's logit minus the largest other), "label" (the label's logit),
            "predicted" (the predicted class's), or a function from labels `(B,)` to a target.
        sign: "positive", "negative" (what speaks against the score) or "absolute".
        batch_size: images per forward pass.
        max_samples: of a larger audit set so many are drawn, once, by label x attributes.
        seed: of that draw and of every resampling.
        iou_threshold: share of a map's maximum above which a pixel counts, for `iou`.
        pointing_tolerance: pixels by which the maximum may miss a region, for `pointing_game`.
        forward_fn: `forward_fn(model, images)` gives the outputs; by default `model(images)`.
        fitness_samples: of the audited images so many, drawn once, on which the explanation methods themselves are
            tested (see `evidence.fitness`), at about a hundred forwards each; 0 for no test. Without one every method
            counts as fit.
        fitness_every: audits after which they are tested anew; those between carry the last test's numbers on.

    Raises:
        ValueError: a value out of its range; the message names it.
    """

    layer: str | None = None
    methods: tuple[str, ...] = METHODS
    target: TargetName | TargetOfLabels = "margin"
    sign: Sign = "positive"
    batch_size: int = 32
    max_samples: int = 512
    seed: int = 0
    iou_threshold: float = 0.15
    pointing_tolerance: int = 0
    forward_fn: Forward = call
    fitness_samples: int = 16
    fitness_every: int = 50

    def __post_init__(self) -> None:
        check_sign(self.sign)
        if self.sign == "signed":
            raise ValueError("an audit measures shares of energy, which signed maps do not have: use another sign")
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise ValueError(f"expected methods, each once, got {self.methods}")
        for method in self.methods:
            if find_method(method).formula is None:
                raise ValueError(
                    f"{method} makes forward passes of its own: an audit takes {', '.join(FORMULAS)}; use `explain`"
                )
            find_method(method).check_sign(self.sign)
        if not callable(self.target) and self.target not in get_args(TargetName):
            raise ValueError(f"unknown target {self.target!r}: expected one of {', '.join(get_args(TargetName))}")
        least = {"batch_size": 1, "max_samples": 1, "fitness_samples": 0, "fitness_every": 1}
        for name, limit in least.items():
            if getattr(self, name) < limit:
                raise ValueError(f"{name} must be at least {limit}, got {getattr(self, name)}")
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


# Of each of these, the axis that counts samples.
_SAMPLE_AXES = (2, 1, 1, 0, 0, 0)


def score_batch(
    taken: Capture, labels: Tensor, projected: ProjectedRegions, regions: PixelRegions, plan: AuditPlan
) -> BatchScores:
    """Every score of a batch by every method; the regions, of which the remainder is the last, in both their forms."""
    maps = _maps(taken, plan)
    magnitude = maps.flatten(2).amax(dim=2)
    scaled = maps / torch.where(magnitude > 0, magnitude, 1).view(*maps.shape[:2], *(1 for _ in maps.shape[2:]))
    areas = torch.where(projected.area > 0, projected.area, torch.nan)
    values = _localized(maps, projected, regions, plan)
    return BatchScores(values, scaled.half(), magnitude, areas, *_decisions(taken.outputs, labels))


def _maps(taken: Capture, plan: AuditPlan) -> Tensor:
    """The maps by each method, `(M, B, h, w)`."""
    return torch.stack([FORMULAS[method](taken.activations, taken.gradients, plan.sign) for method in plan.methods])


def _localized(maps: Tensor, projected: ProjectedRegions, regions: PixelRegions, plan: AuditPlan) -> Tensor:
    share = energy_share(maps, projected)
    scored = (share, enrichment(share, projected.area), *score_maps(maps, regions, plan.iou_threshold))
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
        self._regions: dict[
            tuple[tuple[int, ...], torch.Size, torch.device], tuple[ProjectedRegions, PixelRegions]
        ] = {}

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
                self.layer = find_layer(lent, as_the_model_takes_them(lent, images), self.plan.forward_fn)

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
            methods=self.plan.methods,
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
        previous: AuditSummary | None = None,
        scored: list[BatchScores] | None = None,
        forward_context: ForwardContext = nullcontext,
        progress: Progress = _no_progress,
    ) -> AuditResult:
        """Audit the model as it is now; it is given back as it was.

        Args:
            step, epoch, weights, trigger: when, which weights ("raw" or "ema") and why, for the record.
            reference: the scores of the same samples at an earlier audit, for `energy_share_gain`.
            previous: the audit before this one, whose test of the explanation methods is carried on until
                `fitness_every` audits rest on it; without one they are tested now. Before training (`trigger`
                "reference") they are not: there is nothing yet that their maps could show.
            scored: the scores of every sample, in order, where a `RideAlong` has taken them from forward passes of the
                user's; by default the passes are made here.
            forward_context: what the model's forward runs in, such as its autocast.
            progress: called with (images done, images in all) after each batch.

        Raises:
            ValueError: a sample that does not decode, a label that the model has no output for, a layer without
                spatial output, a model output that is not `(B, classes)`.
        """
        started = time.monotonic()
        device = _device_of(model)
        self.prepare(model, forward_context)
        with borrowed(model) as lent:
            batches = scored or self._scored(lent, device, forward_context, progress)
            tested = carried(previous.estimates, self.plan.fitness_every) if previous is not None else ()
            if not tested and trigger != "reference" and self.plan.fitness_samples:
                tested = self._fitness(lent, device, forward_context)
        scores = self._collect(batches)
        estimates = (*self._estimates(scores, reference), *tested)
        judgement = judge(estimates, self.audit_set.subjects, self.policy)
        seconds = time.monotonic() - started
        return AuditResult(step, epoch, weights, now(), seconds, estimates, judgement, trigger, scores=scores)

    def _scored(
        self, lent: nn.Module, device: torch.device, forward_context: ForwardContext, progress: Progress
    ) -> list[BatchScores]:
        """The scores of every sample, from forward passes over the audit set."""
        layer, size, count = self.layer, self.plan.batch_size, len(self.audit_set)
        assert layer is not None
        batches: list[BatchScores] = []
        for start in range(0, count, size):
            batch = self.audit_set.batch(range(start, min(start + size, count)), device)
            with forward_context():
                taken = capture(
                    lent,
                    batch.images,
                    self.checked_target(batch.labels, batch.indices),
                    layer,
                    forward=self.plan.forward_fn,
                )
            batches.append(self.score(taken, batch.labels, batch.masks, batch.indices))
            progress(min(start + size, count), count)
        return batches

    def checked_target(self, labels: Tensor, places: Sequence[int]) -> Target:
        """The target for images with these labels, which raises a ValueError that names the sample at one of `places`
        whose label the model has no output for."""
        target = self.plan.target_of(labels)

        def checked(outputs: Any) -> Tensor:
            check_logits(outputs)
            self._check_labels(places, 2 if outputs.shape[1] == 1 else outputs.shape[1])
            return target(outputs)

        return checked

    def _check_labels(self, places: Sequence[int], classes: int) -> None:
        samples = self.audit_set.samples
        for place in places:
            if samples[place].label >= classes:
                raise ValueError(
                    f"sample {samples[place].id!r}: label {samples[place].label} is out of range: the model has "
                    f"{classes} classes, 0 to {classes - 1}"
                )

    def score(self, taken: Capture, labels: Tensor, masks: Tensor, places: tuple[int, ...]) -> BatchScores:
        """Every score of the samples at `places` in the audit set, on the model's device.

        Their regions are projected once and kept, as far as each sample comes in at most two batches: the audit's own
        and the validation's that it rides along with.
        """
        key = (places, taken.activations.shape[2:], masks.device)
        regions = self._regions.get(key)
        if regions is None:
            covered = with_remainder(masks)
            projected = project_regions(covered, key[1])
            regions = projected, label_pixels(covered, self.plan.pointing_tolerance)
            if sum(len(kept[0]) for kept in self._regions) + len(places) <= 2 * len(self.audit_set):
                self._regions[key] = regions
        return score_batch(taken, labels, *regions, self.plan)

    def in_order(self, batches: list[BatchScores], places: list[int]) -> list[BatchScores]:
        """The scores of samples that came in the order `places` in the order of the audit set, as one batch."""
        order = torch.tensor(places).argsort()
        parts = zip(zip(*batches, strict=True), _SAMPLE_AXES, strict=True)
        return [BatchScores(*(torch.cat(p, dim=axis).index_select(axis, order.to(p[0].device)) for p, axis in parts))]

    def _collect(self, batches: list[BatchScores]) -> SampleScores:
        values, maps, magnitude, areas, predictions, margin = (
            torch.cat(parts, dim=axis).cpu().numpy()
            for parts, axis in zip(zip(*batches, strict=True), _SAMPLE_AXES, strict=True)
        )
        return SampleScores(
            metrics=METRICS,
            methods=self.plan.methods,
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

    def _fitness(self, lent: nn.Module, device: torch.device, forward_context: ForwardContext) -> tuple[Estimate, ...]:
        """The explanation methods tested on the model as it is now."""
        drawn = self.audit_set.subset(self.plan.fitness_samples, self.plan.seed)
        # What was predicted on the whole image is explained of each of its variants.
        predicts = self.plan.target == "predicted"
        target_of = replace(self.plan, target="label").target_of if predicts else self.plan.target_of
        layer = self.layer
        assert layer is not None

        def maps(images: Tensor, classes: Tensor) -> Tensor:
            with forward_context():
                taken = capture(lent, images, target_of(classes), layer, forward=self.plan.forward_fn)
            return _maps(taken, self.plan)

        def outputs(images: Tensor) -> Tensor:
            with forward_context():
                logits: Tensor = logits_of(self.plan.forward_fn(lent, as_the_model_takes_them(lent, images)))
            return logits.float()

        explained = Explained(
            self.plan.methods, maps, outputs, lambda logits, classes: target_of(classes)(logits), self.plan.sign
        )
        values = []
        size = self.plan.batch_size
        for start in range(0, len(drawn), size):
            batch = drawn.batch(range(start, min(start + size, len(drawn))), device)
            classes = _decisions(outputs(batch.images), batch.labels)[0].clamp(min=0) if predicts else batch.labels
            seeds = [self.plan.seed + i for i in batch.indices]
            values.append(fitness(lent, explained, batch.images, classes, seeds, size))
        return fitness_estimates(torch.cat(values, dim=2).cpu().numpy(), self.plan.methods, self.plan.seed)

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

"""One audit, from a model and an audit set to an `AuditResult`: the one place that runs the pipeline.

Enters: a model, an `AuditDataset`, an `AuditPlan` and a `Policy`. Leaves: an `AuditResult`; and, once, the `Manifest`
and the `SampleSheet` that a run directory begins with. Everything up to the scores stays on the model's device, and one
copy at the end brings them over.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from bias_audit.attribution.capture import Capture, as_the_model_takes_them, borrowed, capture, logits_of, unwrap
from bias_audit.attribution.features import penultimate
from bias_audit.attribution.layers import find_layer
from bias_audit.attribution.sharded import class_name
from bias_audit.attribution.targets import Target, check_logits
from bias_audit.data.metadata import Annotated, Metadata
from bias_audit.data.samples import AuditDataset
from bias_audit.evidence.aging import carried
from bias_audit.evidence.association import Alignment, alignments, association, bias_amplification
from bias_audit.evidence.attention import attention
from bias_audit.evidence.changes import Changes
from bias_audit.evidence.fitness import Explained, fitness, fitness_estimates
from bias_audit.evidence.intervention import EFFECTS, Effects, effects, intervention_estimates, responses
from bias_audit.evidence.performance import performance
from bias_audit.evidence.pictures import changed_pictures
from bias_audit.evidence.probe import probe, region_probe
from bias_audit.localization import PixelRegions, ProjectedRegions, label_pixels, project_regions, with_remainder
from bias_audit.overlays import outlined
from bias_audit.plan import AuditPlan
from bias_audit.policies.policy import Policy
from bias_audit.ranks import ALONE, Ranks
from bias_audit.records.results import (
    AuditResult,
    AuditSummary,
    ChangedPictures,
    Manifest,
    RegionCount,
    SampleScores,
    SampleSheet,
    Thumbnails,
    now,
)
from bias_audit.records.runs import RunDirectory
from bias_audit.rng import preserved_rng
from bias_audit.scoring import METRICS, SAMPLE_AXES, BatchScores, decisions_of, maps_of, score_batch
from bias_audit.terms import EXPLAINER_METRICS, INTERVENTION_METRICS, OWN, OWN_NAME, PROBE_METRICS, REMAINDER, Estimate
from bias_audit.verdict import judge

Progress = Callable[[int, int], None]
ForwardContext = Callable[[], AbstractContextManager[Any]]
Training = Metadata | Annotated | str | Path | None

# Of the images that regions are removed from, so many get noise, and the fills that only show what they insert.
SENSITIVITY_SAMPLES = 64
# Bytes of regions that are kept on the device from audit to audit: 5,000 images of 224 x 224. Others are made anew.
REGION_BYTES = 256_000_000


def _no_progress(done: int, of: int) -> None:
    pass


class Auditor:
    """Audits models on one audit set: draws the samples once, decodes them once, projects their regions once.

    Args:
        audit_set: what to look at.
        plan: how.
        policy: what must hold; a `Policy`, a mapping, the path of a file, or None for the default.
        training: labels and attributes of the training set, for the association in it: a `Metadata`, an annotated data
            set, or the path of a CSV with the columns `label` and those of the attributes.
        thumbnails: False keeps pictures out of all that is recorded: heatmaps lie over the outlines of the regions;
            "local" is for who shows and uploads the records: see `Manifest`.

    Raises:
        ValueError: the policy or the training set's labels cannot be read; the policy or the plan names what the audit
            set does not have.

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
        training: Training = None,
        thumbnails: Thumbnails = True,
    ) -> None:
        self.plan = plan or AuditPlan()
        self.policy = Policy.load(policy)
        self.policy.check_names(audit_set.subjects)
        known = [name for name, _ in audit_set.subjects.attributes]
        strange = next((name for name in self.plan.swaps if name not in known), None)
        if strange is not None:
            raise ValueError(f"swaps: unknown attribute {strange!r}: the audit set has {', '.join(known) or 'none'}")
        self.training = Metadata.load(training, audit_set.subjects)
        self.thumbnails = thumbnails
        self.samples_available = len(audit_set)
        self.audit_set = audit_set.subset(self.plan.max_samples, self.plan.seed)
        self.layer = self.plan.layer
        self._described: tuple[SampleSheet, str, tuple[RegionCount, ...]] | None = None
        self._regions: dict[
            tuple[tuple[int, ...], torch.Size, torch.device], tuple[ProjectedRegions, PixelRegions]
        ] = {}
        self._region_samples = self._region_bytes = 0

    @cached_property
    def _alignments(self) -> tuple[Alignment, ...]:
        least = self.policy.tolerance.association
        return alignments(self.training, self.audit_set.subjects, self.plan.seed, least=least)

    @cached_property
    def _association(self) -> tuple[Estimate, ...]:
        """What the labels and attributes of both sets say, which no audit changes."""
        subjects, seed = self.audit_set.subjects, self.plan.seed
        audited = Metadata(
            self.audit_set.labels, self.audit_set.attribute_table, tuple(name for name, _ in subjects.attributes)
        )
        of_training = () if self.training is None else association(self.training, subjects, seed=seed)
        return (*of_training, *association(audited, subjects, seed=seed, audited=True))

    @cached_property
    def _intervened(self) -> tuple[AuditDataset, Changes]:
        """The images that are changed, and how."""
        plan = self.plan
        drawn = self.audit_set.subset(plan.intervention_samples, plan.seed)
        return drawn, Changes(drawn, plan.control_regions, SENSITIVITY_SAMPLES, plan.swaps, self._alignments, plan.seed)

    @property
    def _can_intervene(self) -> bool:
        return bool(self.audit_set.subjects.regions_with("spurious") or self.plan.swaps)

    def _describe(self, ranks: Ranks = ALONE) -> tuple[SampleSheet, str, tuple[RegionCount, ...]]:
        if self._described is None:
            sheet, fingerprint, annotated = self.audit_set.sheet(ranks=ranks)
            self._described = (sheet if self.thumbnails else outlined(sheet)), fingerprint, annotated
        return self._described

    @property
    def sheet(self) -> SampleSheet:
        """The audited images' thumbnails, or their outlines only, and masks."""
        return self._describe()[0]

    def prepare(self, model: nn.Module, forward_context: ForwardContext = nullcontext, ranks: Ranks = ALONE) -> None:
        """Decode all images, shared by several ranks, and find the layer to explain, if the plan names none.

        `run` does so too, but stops at the first image that does not decode.

        Raises:
            ValueError: the model has no layer with a spatial output; or a sample that does not decode.
        """
        with ranks.together():
            self._describe(ranks)
            self._find_layer(model, forward_context)

    def _find_layer(self, model: nn.Module, forward_context: ForwardContext) -> None:
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
        _, fingerprint, annotated = self._describe()
        return Manifest(
            run_id=uuid.uuid4().hex[:12],
            created=now(),
            tool=f"bias-audit {version('bias-audit')}",
            model=class_name(unwrap(model)),
            layer=self.layer,
            methods=self.plan.method_names,
            target=self.plan.target_name,
            sign=self.plan.sign,
            subjects=self.audit_set.subjects,
            fingerprint=fingerprint,
            samples_available=self.samples_available,
            samples_audited=len(self.audit_set),
            seed=self.plan.seed,
            policy=self.policy,
            thumbnails=self.thumbnails,
            annotated=annotated,
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
        ranks: Ranks = ALONE,
    ) -> AuditResult:
        """Audit the model as it is now; it is given back as it was.

        Several ranks with the same weights share the batches that one process would make, so that each has the same
        result in the end; pictures of what was changed are the first's alone.

        Args:
            step, epoch, weights, trigger: when, which weights ("raw" or "ema") and why, for the record.
            reference: the scores of the same samples at an earlier audit, for `energy_share_gain`.
            previous: the audit before this one, whose interventions and test of the explanation methods are carried on
                until `intervention_every` and `fitness_every` audits rest on them; without one they are made now.
                Before training (`trigger` "reference") they are not: there is nothing yet that they could show.
            scored: the scores of every sample, in order, where a `RideAlong` has taken them from forward passes of the
                user's; by default the passes are made here.
            forward_context: what the model's forward runs in, such as its autocast.
            progress: called with (images done, images in all) after each batch.
            ranks: the processes that make this audit together.

        Raises:
            ValueError: a sample that does not decode, a label that the model has no output for, a layer without
                spatial output, a model output that is not `(B, classes)`; or one of these on another rank.
        """
        started = time.monotonic()
        # Evidence of the user's own may draw random numbers.
        with ranks.together(), preserved_rng():
            device = _device_of(model)
            self._find_layer(model, forward_context)
            plan, trained, count = self.plan, trigger != "reference", len(self.audit_set)
            earlier = () if previous is None else previous.estimates
            tested = carried(earlier, EXPLAINER_METRICS, plan.fitness_every)
            changed = carried(earlier, _OF_INTERVENTIONS, plan.intervention_every)
            intervenes = trained and not changed and plan.intervention_samples > 0 and self._can_intervene
            of = count + (min(count, plan.intervention_samples) if intervenes else 0)
            found: Effects | None = None
            pictures: ChangedPictures | None = None
            with borrowed(model) as lent:
                # Between two steps of a training each rank has BatchNorm statistics of its own.
                ranks.as_on_first([b for b in lent.buffers() if not b.is_inference()], device)
                batches = scored or self._scored(
                    lent, device, forward_context, lambda done, _: progress(done, of), ranks
                )
                if trained and not tested and plan.fitness_samples:
                    tested = self._fitness(lent, device, forward_context)
                if intervenes:
                    changed, found, pictures = self._intervene(
                        lent, device, step, forward_context, lambda done, _: progress(count + done, of), ranks
                    )
            scores = self._collect(batches, found)
            estimates = (*self._estimates(scores, reference), *changed, *tested)
            judgement = judge(estimates, self.audit_set.subjects, self.policy)
            seconds = time.monotonic() - started
            return AuditResult(
                step, epoch, weights, now(), seconds, estimates, judgement, trigger, scores=scores, changed=pictures
            )

    def _scored(
        self, lent: nn.Module, device: torch.device, forward_context: ForwardContext, progress: Progress, ranks: Ranks
    ) -> list[BatchScores]:
        """The scores of every sample, from forward passes over the audit set."""
        layer, size, count = self.layer, self.plan.batch_size, len(self.audit_set)
        assert layer is not None

        def scores_of(number: int) -> BatchScores:
            start = number * size
            batch = self.audit_set.batch(range(start, min(start + size, count)), device)
            with forward_context():
                taken = capture(
                    lent,
                    batch.images,
                    self.checked_target(batch.labels, batch.indices),
                    layer,
                    forward=self.plan.forward_fn,
                )
            return self.score(taken, batch.labels, batch.masks, batch.indices)

        return ranks.shared(-(-count // size), scores_of, lambda done, _: progress(min(done * size, count), count))

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

        Their regions are projected once and kept, as far as there is room, and as each sample comes in at most two
        batches: the audit's own and the validation's that it rides along with.
        """
        key = (places, taken.activations.shape[2:], masks.device)
        regions = self._regions.get(key)
        if regions is None:
            covered = with_remainder(masks)
            projected = project_regions(covered, key[1])
            regions = projected, label_pixels(covered, self.plan.pointing_tolerance)
            held = sum(tensor.nbytes for part in regions for tensor in vars(part).values())
            few = self._region_samples + len(places) <= 2 * len(self.audit_set)
            if few and self._region_bytes + held <= REGION_BYTES:
                self._regions[key] = regions
                self._region_samples += len(places)
                self._region_bytes += held
        return score_batch(taken, labels, *regions, self.plan)

    def in_order(self, batches: list[BatchScores], places: list[int]) -> list[BatchScores]:
        """The scores of samples that came in the order `places` in the order of the audit set, as one batch."""
        order = torch.tensor(places).argsort()
        parts = zip(zip(*batches, strict=True), SAMPLE_AXES, strict=True)
        return [BatchScores(*(torch.cat(p, dim=axis).index_select(axis, order.to(p[0].device)) for p, axis in parts))]

    def _collect(self, batches: list[BatchScores], found: Effects | None) -> SampleScores:
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
        signed = [name for name, own in zip(self.plan.method_names, maps, strict=True) if (own < 0).any()]
        if signed:
            raise ValueError(
                f"method {signed[0]}: gives maps below 0, and an audit measures shares of energy: take `.relu()` or "
                "`.abs()` of them"
            )
        return SampleScores(
            metrics=(*METRICS, *self.plan.metric_names),
            methods=self.plan.method_names,
            regions=(*(name for name, _ in self.audit_set.subjects.regions), REMAINDER),
            ids=self.audit_set.ids,
            labels=self.audit_set.labels,
            predictions=predictions,
            margin=margin,
            areas=areas,
            values=values,
            maps=maps,
            magnitude=magnitude,
            effect_metrics=() if found is None else _EFFECT_METRICS,
            effects=np.empty((0, 0, 0), dtype=np.float32) if found is None else self._effects_of_each(found),
        )

    def _effects_of_each(self, found: Effects) -> npt.NDArray[np.float32]:
        """The effects beyond those of the control regions, `(E, N, R)`, NaN where nothing was removed."""
        count, regions = len(self.audit_set), self.audit_set.subjects.regions
        place = {name: i for i, name in enumerate(self.audit_set.ids)}
        rows = [place[name] for name in self._intervened[0].ids]
        spurious = [r for r, (_, role) in enumerate(regions) if role == "spurious"]
        every = np.full((len(EFFECTS), count, len(regions)), np.nan, dtype=np.float32)
        every[np.ix_(range(len(EFFECTS)), rows, spurious)] = found.removal - found.control
        return every

    def _intervene(
        self,
        lent: nn.Module,
        device: torch.device,
        step: int,
        forward_context: ForwardContext,
        progress: Progress,
        ranks: Ranks,
    ) -> tuple[tuple[Estimate, ...], Effects, ChangedPictures | None]:
        """What the model decides when regions are removed and cues are swapped, and what it then saw."""
        drawn, changes = self._intervened

        def outputs(pictures: Tensor) -> Tensor:
            images = as_the_model_takes_them(lent, self.audit_set.finished(pictures.to(device)))
            with forward_context():
                logits: Tensor = logits_of(self.plan.forward_fn(lent, images))
            check_logits(logits)
            return logits

        logits = responses(changes, outputs, self.plan.batch_size, progress, ranks).to(device)
        labels = torch.from_numpy(drawn.labels).to(device)
        count = logits.shape[1]
        target = self.plan.target_of(labels.repeat_interleave(count))
        scores = target(logits.flatten(0, 1)).float().view(-1, count)
        found = Effects(*(values.cpu().numpy() for values in effects(logits, scores, labels, changes.list)))
        estimates = intervention_estimates(
            found,
            drawn.labels,
            drawn.attribute_table,
            changes.swapped_values,
            drawn.subjects,
            self._alignments,
            by_user=self.plan.swaps,
            shown=changes.shown,
            seed=self.plan.seed,
        )
        probed = self._probed(lent, drawn, device, forward_context, ranks)
        flat = decisions_of(logits.flatten(0, 1), labels.repeat_interleave(count))
        decisions, margins = (values.view(-1, count).cpu().numpy() for values in flat)
        pictures = None
        if ranks.rank == 0 and self.thumbnails:
            pictures = changed_pictures(changes, drawn.ids, drawn.subjects, decisions, margins, step)
        return (*estimates, *probed, *self._region_probes), found, pictures

    @cached_property
    def _region_probes(self) -> tuple[Estimate, ...]:
        """How well each attribute can be read from the pixels of each spurious region, which no training changes."""
        drawn, changes = self._intervened
        spurious = drawn.subjects.regions_with("spurious")
        if not spurious:
            return ()
        found = []
        for region, looks in zip(drawn.subjects.regions_with("spurious"), changes.contents, strict=True):
            for column, (attribute, _) in enumerate(drawn.subjects.attributes):
                values = drawn.attribute_table[:, column]
                found.append(region_probe(looks, values, attribute, region, seed=self.plan.seed))
        return tuple(found)

    def _probed(
        self,
        lent: nn.Module,
        drawn: AuditDataset,
        device: torch.device,
        forward_context: ForwardContext,
        ranks: Ranks,
    ) -> Iterator[Estimate]:
        """How well each attribute can be read from what the last layer reads."""
        attributes = drawn.subjects.attributes
        features = self._features(lent, drawn, device, forward_context, ranks) if attributes else None
        for column, (attribute, _) in enumerate(attributes):
            if features is None:
                reason = "the model has no linear layer that takes one row of features for each image"
                yield from (Estimate(m, None, None, None, 0, group=attribute, reason=reason) for m in PROBE_METRICS)
            else:
                yield from probe(features, drawn.attribute_table[:, column], attribute, seed=self.plan.seed)

    def _features(
        self,
        lent: nn.Module,
        drawn: AuditDataset,
        device: torch.device,
        forward_context: ForwardContext,
        ranks: Ranks,
    ) -> npt.NDArray[np.float32] | None:
        """What the last linear layer reads of each image `(N, F)`, if there is one."""
        size, count = self.plan.batch_size, len(drawn)

        def features_of(number: int) -> npt.NDArray[np.float32] | None:
            start = number * size
            images = drawn.batch(range(start, min(start + size, count)), device).images
            self.plan.forward_fn(lent, as_the_model_takes_them(lent, images))
            found = latest()
            return None if found is None or len(found) != len(images) else found.float().cpu().numpy()

        with penultimate(lent) as latest, forward_context():
            rows = ranks.shared(-(-count // size), features_of)
        known = [row for row in rows if row is not None]
        return np.concatenate(known) if len(known) == len(rows) else None

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
            return maps_of(taken, self.plan)

        def outputs(images: Tensor) -> Tensor:
            with forward_context():
                logits: Tensor = logits_of(self.plan.forward_fn(lent, as_the_model_takes_them(lent, images)))
            return logits.float()

        explained = Explained(
            self.plan.method_names, maps, outputs, lambda logits, classes: target_of(classes)(logits), self.plan.sign
        )
        values = []
        size = self.plan.batch_size
        for start in range(0, len(drawn), size):
            batch = drawn.batch(range(start, min(start + size, len(drawn))), device)
            classes = decisions_of(outputs(batch.images), batch.labels)[0].clamp(min=0) if predicts else batch.labels
            seeds = [self.plan.seed + i for i in batch.indices]
            values.append(fitness(lent, explained, batch.images, classes, seeds, size))
        return fitness_estimates(torch.cat(values, dim=2).cpu().numpy(), self.plan.method_names, self.plan.seed)

    def _estimates(self, scores: SampleScores, reference: SampleScores | None) -> tuple[Estimate, ...]:
        attributes, subjects = self.audit_set.attribute_table, self.audit_set.subjects
        on_object, valid = _object_enriched(scores, subjects.regions_with("object"))
        amplified: tuple[Estimate, ...] = ()
        if self.training is not None:
            amplified = bias_amplification(
                self.training, scores.labels, attributes, scores.predictions, subjects, seed=self.plan.seed
            )
        return (
            *attention(scores, attributes, subjects, seed=self.plan.seed, reference=reference),
            *performance(
                scores.correct,
                scores.labels,
                attributes,
                subjects,
                scores.predictions >= 0,
                predictions=scores.predictions,
                alignments=self._alignments,
                object_enriched=on_object,
                object_valid=valid,
                seed=self.plan.seed,
            ),
            *self._association,
            *amplified,
            *self._own(scores),
        )

    def _own(self, scores: SampleScores) -> Iterator[Estimate]:
        """What the user's own evidence says."""
        seen: set[object] = set()
        for gather in self.plan.evidence:
            found = gather(scores, self.audit_set.attribute_table, self.audit_set.subjects, self.plan.seed)
            if not isinstance(found, Iterable):
                raise ValueError(f"evidence: expected estimates, got {found!r}: yield them, or return a list")
            for e in found:
                wrong = _wrong_with(e, self.plan.metric_names)
                if not wrong and e.key in seen:
                    wrong = f"{e.subject}: stands twice: give one of them another metric, region, class or group"
                if wrong:
                    raise ValueError(f"evidence: {wrong}")
                seen.add(e.key)
                yield e


def _wrong_with(e: object, metrics: Sequence[str]) -> str:
    """Why something that the user's evidence gives is no estimate of it; "" if all is well."""
    if not isinstance(e, Estimate):
        return f"expected estimates, got {e!r}: make `bias_audit.terms.Estimate`s"
    if not re.fullmatch(OWN_NAME, e.metric):
        return f"expected a metric called {OWN}something, got {e.metric!r}: rename it, in letters, digits and _"
    if e.metric in metrics:
        return f"{e.metric} is one of the plan's `metrics`: rename it"
    numbers = (e.value, e.low, e.high)
    are_numbers = all(x is None or isinstance(x, int | float | np.number) for x in numbers)
    if not are_numbers or not isinstance(e.n, int | np.integer) or e.n < 0:
        return f"{e.subject}: expected numbers or None, and n a count of images, got {numbers} and {e.n!r}"
    return ""


_OF_INTERVENTIONS = (*INTERVENTION_METRICS, *PROBE_METRICS)
_EFFECT_METRICS = tuple(f"removal_{effect}" for effect in EFFECTS)


def _object_enriched(
    scores: SampleScores, objects: tuple[str, ...]
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Of each image whether its objects get their area's share by the first method, and whether that is known."""
    shares = np.array([scores.of("energy_share", scores.methods[0], region) for region in objects])
    areas = np.array([scores.areas[:, scores.regions.index(region)] for region in objects])
    known = np.isfinite(shares).any(axis=0) if objects else np.zeros(len(scores.ids), dtype=bool)
    share, area = (np.nansum(values, axis=0) if objects else np.zeros(len(known)) for values in (shares, areas))
    return share >= area, known


def audit_model(
    model: nn.Module,
    audit_set: AuditDataset,
    *,
    plan: AuditPlan | None = None,
    policy: Policy | str | Path | Mapping[str, Any] | None = None,
    training: Training = None,
    out: str | Path | None = None,
    thumbnails: bool = True,
    progress: Progress = _no_progress,
) -> AuditResult:
    """Audit a model once; with `out`, also write a run directory there, without `thumbnails` one without pictures.

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
    auditor = Auditor(audit_set, plan, policy, training, thumbnails)
    if out is not None:
        # Whatever does not decode is said at once, and before any work is done.
        auditor.prepare(model)
    result = auditor.run(model, progress=progress)
    if out is not None:
        directory = RunDirectory.create(out, auditor.manifest(model), auditor.sheet)
        directory.append(result)
        directory.end()
    return result


def _device_of(model: nn.Module) -> torch.device:
    tensors = (*model.parameters(), *model.buffers())
    return tensors[0].device if tensors else torch.device("cpu")

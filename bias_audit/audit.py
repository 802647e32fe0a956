"""One audit, from a model and an audit set to an `AuditResult`: the one place that runs the pipeline.

Enters: a model, an `AuditDataset`, an `AuditPlan` and a `Policy`. Leaves: an `AuditResult`; and, once, the `Manifest`
and the `SampleSheet` that a run directory begins with. Everything up to the scores stays on the model's device, and one
copy at the end brings them over.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from bias_audit.attribution.borrow import as_the_model_takes_them, borrowed, unwrap
from bias_audit.attribution.layers import find_layer
from bias_audit.attribution.sharded import class_name
from bias_audit.attribution.targets import Target, check_logits
from bias_audit.data.dataset import AuditDataset
from bias_audit.data.metadata import Annotated, Metadata
from bias_audit.data.sheet import Description, describe
from bias_audit.evidence.aging import carried
from bias_audit.evidence.association import Alignment, alignments, association, bias_amplification
from bias_audit.evidence.attention import attention
from bias_audit.evidence.performance import performance
from bias_audit.plan import AuditPlan
from bias_audit.policies.file import read_policy
from bias_audit.policies.policy import Policy
from bias_audit.progress import Progress, silent
from bias_audit.ranks import ALONE, Ranks
from bias_audit.records.manifest import Manifest, Thumbnails
from bias_audit.records.pictures import outlined
from bias_audit.records.results import AuditResult, AuditSummary, now
from bias_audit.records.samples import SampleScores, SampleSheet
from bias_audit.records.writing import RunDirectory
from bias_audit.rng import preserved_rng
from bias_audit.stages.interventions import EFFECT_METRICS, Intervened, Interventions
from bias_audit.stages.interventions import ESTIMATED as INTERVENED
from bias_audit.stages.method_fitness import method_fitness
from bias_audit.stages.own_evidence import own_estimates
from bias_audit.stages.passes import ForwardContext, ForwardPasses, device_of
from bias_audit.stages.scoring import BatchScores, KeptRegions, collected, score_batch
from bias_audit.terms import EXPLAINER_METRICS, Estimate
from bias_audit.verdicts.judgement import judge

Training = Metadata | Annotated | str | Path | None


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
        self.policy = read_policy(policy).policy
        self.policy.check_names(audit_set.subjects)
        grouped = next((r for r in self.policy.rules if r.metric in self.plan.metric_names and r.group), None)
        if grouped is not None:
            raise ValueError(
                f"policy rule {grouped.title!r}: a metric of your own on maps is broken down to classes, not to "
                "groups: remove `group`, or estimate it by evidence of your own"
            )
        known = [name for name, _ in audit_set.subjects.attributes]
        strange = next((name for name in self.plan.swaps if name not in known), None)
        if strange is not None:
            raise ValueError(f"swaps: unknown attribute {strange!r}: the audit set has {', '.join(known) or 'none'}")
        self.training = Metadata.load(training, audit_set.subjects)
        self.thumbnails = thumbnails
        self.samples_available = len(audit_set)
        self.audit_set = audit_set.subset(self.plan.max_samples, self.plan.seed)
        self.layer = self.plan.layer
        self._described: Description | None = None
        self.regions = KeptRegions(len(self.audit_set), self.plan.pointing_tolerance)

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
    def _interventions(self) -> Interventions:
        return Interventions(self.audit_set, self.plan, self._alignments, pictures=bool(self.thumbnails))

    @property
    def _can_intervene(self) -> bool:
        return bool(self.audit_set.subjects.regions_with("spurious") or self.plan.swaps)

    def _describe(self, ranks: Ranks = ALONE) -> Description:
        if self._described is None:
            found = describe(self.audit_set, ranks=ranks)
            self._described = found if self.thumbnails else replace(found, sheet=outlined(found.sheet))
        return self._described

    @property
    def sheet(self) -> SampleSheet:
        """The audited images' thumbnails, or their outlines only, and masks."""
        return self._describe().sheet

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
                images = self.audit_set.batch([0], device_of(model)).images
                self.layer = find_layer(lent, as_the_model_takes_them(lent, images), self.plan.forward_fn)

    def manifest(self, model: nn.Module) -> Manifest:
        """What this auditor audits and how; after `prepare` or the first `run`, which find the layer.

        Raises:
            ValueError: a sample that does not decode, or a region that no sample shows.
        """
        assert self.layer is not None
        described = self._describe()
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
            fingerprint=described.fingerprint,
            samples_available=self.samples_available,
            samples_audited=len(self.audit_set),
            seed=self.plan.seed,
            policy=self.policy,
            thumbnails=self.thumbnails,
            annotated=described.annotated,
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
        progress: Progress = silent,
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
        plan, count, trained = self.plan, len(self.audit_set), trigger != "reference"
        # Evidence of the user's own may draw random numbers.
        with ranks.together(), preserved_rng():
            earlier = () if previous is None else previous.estimates
            tested = carried(earlier, EXPLAINER_METRICS, plan.fitness_every)
            changed = carried(earlier, INTERVENED, plan.intervention_every)
            intervenes = trained and not changed and plan.intervention_samples > 0 and self._can_intervene
            of = count + (min(count, plan.intervention_samples) if intervenes else 0)
            found: Intervened | None = None
            self._find_layer(model, forward_context)
            assert self.layer is not None
            with borrowed(model) as lent:
                passes = ForwardPasses(
                    lent, device_of(model), self.layer, plan.forward_fn, plan.layout, forward_context
                )
                # Between two steps of a training each rank has BatchNorm statistics of its own.
                ranks.as_on_first([b for b in lent.buffers() if not b.is_inference()], passes.device)

                def score(number: int) -> BatchScores:
                    start = number * plan.batch_size
                    batch = self.audit_set.batch(range(start, min(start + plan.batch_size, count)), passes.device)
                    taken = passes.capture(batch.images, self.checked_target(batch.labels, batch.indices))
                    regions = self.regions.of(batch.indices, batch.masks, taken.activations)
                    return score_batch(taken, batch.labels, *regions, plan)

                if scored is None:
                    scored = ranks.shared(
                        -(-count // plan.batch_size),
                        score,
                        lambda done, _: progress(min(done * plan.batch_size, count), of),
                    )
                if trained and not tested and plan.fitness_samples:
                    tested = method_fitness(passes, self.audit_set, plan)
                if intervenes:
                    found = self._interventions.made(passes, step, lambda done, _: progress(count + done, of), ranks)
            scores = collected(scored, self.audit_set, plan)
            if found is not None:
                changed = found.estimates
                scores = replace(scores, effect_metrics=EFFECT_METRICS, effects=found.effects)
            estimates = (*self._estimates(scores, reference), *changed, *tested)
            judgement = judge(estimates, self.audit_set.subjects, self.policy)
        return AuditResult(
            step,
            epoch,
            weights,
            now(),
            time.monotonic() - started,
            estimates,
            judgement,
            trigger,
            scores=scores,
            changed=None if found is None else found.pictures,
        )

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
            *own_estimates(self.plan, scores, attributes, subjects),
        )


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
    progress: Progress = silent,
) -> AuditResult:
    """Audit a model once, as it is, and leave it as it was.

    Args:
        model: any classifier of images, on the device that is to do the work.
        audit_set: the annotated held-out images.
        plan, policy, training: as for `Auditor`.
        out: a run directory to write, which `bias-audit show`, `gate` and `report` read.
        thumbnails: whether that holds pictures of the images; else heatmaps lie over the outlines of the regions.
        progress: called with the numbers of images done and of all images, after each batch.

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

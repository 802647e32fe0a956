"""Who is compared: the bare forward pass, this package, and what else explains or audits a model.

Enters: a `Workload`. Leaves: `Group`s of contenders, each group with the unit of work that all of it does: one batch
explained; or all images audited. A further group is one more function from a workload and a folder, for whatever it
writes, to a `Group`, listed in `GROUPS`: timing, memory, table and plot follow.

The peers are used as their documentation shows, with the layer found and their objects made anew for each batch, since
their hooks would slow down whoever comes next.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.timing import Contender
from benchmarks.workloads import Workload
from bias_audit import Auditor, AuditPlan, AuditResult, explain
from bias_audit.data.samples import AuditBatch
from bias_audit.evidence.attention import attention
from bias_audit.evidence.performance import performance
from bias_audit.localization import with_remainder
from bias_audit.records import RunDirectory
from bias_audit.verdict import judge

BARE = "bare forward"
EXPLAIN, AUDIT, AFTERWARDS = "bias-audit: explanation", "bias-audit: complete audit", "of it statistics and records"
GRADCAM, CAPTUM, TORCHCAM, QUANTUS = "grad-cam", "captum", "torchcam", "grad-cam + Quantus"
EXPLANATION_GROUP, AUDIT_GROUP = "explanation of a batch", "complete audit"
# What takes several times as long as the bare forward is timed in each n-th round only.
SELDOM = 3


@dataclass(frozen=True)
class Skipped:
    """A contender that takes no part, and why."""

    model: str
    contender: str
    reason: str


@dataclass(frozen=True)
class Group:
    """Contenders that do the same work on `images` images; all are compared with the first.

    A group of `effort` n gets one n-th of the rounds.
    """

    name: str
    images: int
    contenders: tuple[Contender, ...]
    skipped: tuple[Skipped, ...] = ()
    effort: int = 1


@dataclass(frozen=True)
class Peer:
    """Another package that computes Grad-CAM: maps `(B, h, w)` or `(B, H, W)` of a batch's labels."""

    name: str
    module: str
    maps: Callable[[Workload, AuditBatch], Tensor]
    every: int = 1
    takes_tokens: bool = True

    def excuse(self, work: Workload) -> str:
        """Why it cannot take part, "" if it can."""
        if not _installed(self.module):
            return "not installed"
        if work.spec.reshape is not None and not self.takes_tokens:
            return "not supported: takes feature maps, no tokens"
        return ""


def ours(work: Workload, batch: AuditBatch) -> Tensor:
    """Grad-CAM by this package, at the layer's resolution."""
    return explain(work.model, batch.images, target=batch.labels, layer=work.spec.layer).maps


def by_gradcam(work: Workload, batch: AuditBatch) -> Tensor:
    """Grad-CAM by grad-cam: upsampled, scaled to [0, 1], on the CPU."""
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    targets = [ClassifierOutputTarget(label) for label in batch.labels.tolist()]
    with GradCAM(model=work.model, target_layers=[work.module], reshape_transform=work.spec.reshape) as cam:
        return torch.from_numpy(cam(input_tensor=batch.images, targets=targets))


def by_captum(work: Workload, batch: AuditBatch) -> Tensor:
    """Grad-CAM by captum, at the layer's resolution."""
    from captum.attr import LayerGradCam

    maps: Tensor = LayerGradCam(work.model, work.module).attribute(
        batch.images, target=batch.labels, relu_attributions=True
    )
    return maps[:, 0].detach()


def by_torchcam(work: Workload, batch: AuditBatch) -> Tensor:
    """Grad-CAM by torchcam, at the layer's resolution, scaled to [0, 1]."""
    from torchcam.methods import GradCAM

    with GradCAM(work.model, work.spec.layer, reshape_transform=work.spec.reshape) as extractor:
        outputs = work.model(batch.images)
        maps: Tensor = extractor(batch.labels.tolist(), outputs)[0]
    return maps


PEERS = (
    Peer(GRADCAM, "pytorch_grad_cam", by_gradcam, every=SELDOM),
    Peer(CAPTUM, "captum", by_captum, takes_tokens=False),
    Peer(TORCHCAM, "torchcam", by_torchcam),
)


def bare(model: nn.Module, batches: Sequence[AuditBatch]) -> None:
    """The forward pass alone."""
    with torch.inference_mode():
        for batch in batches:
            model(batch.images)


def explanation(work: Workload, _folder: Path) -> Group:
    """One batch: the forward pass alone, and Grad-CAM by this package and its peers."""
    batch = work.batches[0]
    ways = [(EXPLAIN, ours, 1)] + [(p.name, p.maps, p.every) for p in PEERS if not p.excuse(work)]
    contenders = [_untouched(BARE, partial(bare, work.model, [batch]))]
    contenders += [_untouched(name, partial(maps, work, batch), every) for name, maps, every in ways]
    skipped = [Skipped(work.spec.model, p.name, p.excuse(work)) for p in PEERS if p.excuse(work)]
    return Group(EXPLANATION_GROUP, len(batch.labels), tuple(contenders), tuple(skipped))


def _untouched(name: str, run: Callable[[], object], every: int = 1) -> Contender:
    return Contender(name, run, run, every)


class CompleteAudit:
    """Our audit as it runs again and again in a training: explanation, scores, statistics, verdict, records.

    `folder` takes the run directory. The first call prepares and gives the reference; it is the warm-up.
    """

    def __init__(self, work: Workload, folder: Path) -> None:
        self.work = work
        plan = AuditPlan(layer=work.spec.layer, batch_size=work.spec.batch, max_samples=work.spec.images)
        self.auditor = Auditor(work.audit_set, plan)
        self.folder = folder
        self.step = 0
        self.reference: AuditResult | None = None
        self.directory: RunDirectory | None = None

    def __call__(self) -> None:
        """One audit, on disk when this returns."""
        reference = None if self.reference is None else self.reference.scores
        result = self.auditor.run(self.work.model, step=self.step, reference=reference)
        if self.directory is None:
            manifest = self.auditor.manifest(self.work.model)
            self.directory = RunDirectory.create(self.folder, manifest, self.auditor.sheet)
            self.reference = result
        self.directory.append(result)
        self.step += 1

    def afterwards(self) -> None:
        """What of an audit comes after the last batch, alone: statistics, verdict, records."""
        assert self.reference is not None and self.directory is not None
        scores, attributes = self.reference.scores, self.auditor.audit_set.attribute_table
        subjects, decided = self.auditor.audit_set.subjects, self.reference.scores.predictions >= 0
        estimates = (
            *attention(scores, attributes, subjects, seed=self.auditor.plan.seed, reference=scores),
            *performance(scores.correct, scores.labels, attributes, subjects, decided),
        )
        judgement = judge(estimates, subjects, self.auditor.policy)
        self.directory.append(replace(self.reference, step=self.step, estimates=estimates, judgement=judgement))
        self.step += 1


def by_quantus(work: Workload, batches: Sequence[AuditBatch]) -> list[list[float]]:
    """The peers' complete audit: grad-cam's maps, and of them three of Quantus's metrics in each region.

    It does less than ours: one method instead of two, three metrics instead of five, no statistics, no records.
    """
    import quantus

    # An image without a region gives NaN in it, of which Quantus and NumPy warn each time.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _quantus_scores(quantus, work, batches)


def _quantus_scores(quantus: Any, work: Workload, batches: Sequence[AuditBatch]) -> list[list[float]]:
    metrics = [
        metric(abs=False, normalise=False, disable_warnings=True, display_progressbar=False)
        for metric in (quantus.RelevanceRankAccuracy, quantus.PointingGame, quantus.RelevanceMassAccuracy)
    ]
    scores: list[list[float]] = []
    for batch in batches:
        maps = by_gradcam(work, batch).numpy()[:, None]
        given: dict[str, Any] = {"x_batch": batch.images.numpy(), "y_batch": batch.labels.numpy(), "a_batch": maps}
        for region in with_remainder(batch.masks).unbind(dim=1):
            s_batch = region[:, None].numpy()
            scores += [metric(model=work.model, s_batch=s_batch, **given) for metric in metrics]
    return scores


def complete_audit(work: Workload, folder: Path) -> Group:
    """All images: the forward pass alone, our audit, and grad-cam with Quantus."""
    audit = CompleteAudit(work, folder)
    contenders = [
        _untouched(BARE, partial(bare, work.model, work.batches)),
        Contender(AUDIT, audit, audit),
        _untouched(AFTERWARDS, audit.afterwards),
    ]
    missing = [name for name in ("pytorch_grad_cam", "quantus") if not _installed(name)]
    if missing:
        skipped = (Skipped(work.spec.model, QUANTUS, "not installed"),)
        return Group(AUDIT_GROUP, work.spec.images, tuple(contenders), skipped, effort=2)
    run, warm_up = partial(by_quantus, work, work.batches), partial(by_quantus, work, work.batches[:1])
    contenders.append(Contender(QUANTUS, run, warm_up, every=SELDOM))
    return Group(AUDIT_GROUP, work.spec.images, tuple(contenders), effort=2)


# From a group's name to what makes it.
GROUPS: dict[str, Callable[[Workload, Path], Group]] = {
    EXPLANATION_GROUP: explanation,
    AUDIT_GROUP: complete_audit,
}


@dataclass(frozen=True)
class Agreement:
    """How far a peer's maps are ours: the least correlation over `images` images, both at the peer's resolution."""

    model: str
    contender: str
    images: int
    correlation: float


def agreements(work: Workload) -> tuple[Agreement, ...]:
    """Each peer's maps of the first batch beside ours.

    Raises:
        RuntimeError: a peer explains something else, so that comparing its time means nothing.
    """
    batch = work.batches[0]
    mine = explain(work.model, batch.images, target=batch.labels, layer=work.spec.layer)
    found: list[Agreement] = []
    for peer in (p for p in PEERS if not p.excuse(work)):
        theirs = peer.maps(work, batch)
        here = mine.upsample((theirs.shape[1], theirs.shape[2]))
        # A map that is zero everywhere has no correlation with anything.
        telling = here.flatten(1).std(dim=1) > 0
        pairs = zip(here[telling].flatten(1), theirs[telling].flatten(1), strict=True)
        correlations = [float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in pairs]
        if not correlations or not min(correlations) > 0.99:
            least = min(correlations, default=float("nan"))
            raise RuntimeError(
                f"{work.spec.model}: {peer.name}'s maps are not ours (least correlation {least:.3f} of "
                f"{len(correlations)} maps): it explains another layer or class"
            )
        found.append(Agreement(work.spec.model, peer.name, len(correlations), min(correlations)))
    return tuple(found)


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None

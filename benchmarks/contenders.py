"""Who is compared with whom: the bare forward pass, this package, and its peers.

Enters: a `Workload` and a folder for whatever is written. Leaves: `Group`s of contenders, each with the unit of work
that all of it does: one batch explained; all images audited; all images validated. A further group is one more function
listed in `GROUPS`: timing, table and plot follow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.peers import PEERS, QUANTUS, QUANTUS_PEER, by_quantus
from benchmarks.timing import Contender, nothing
from benchmarks.workloads import Workload
from bias_audit import Auditor, AuditPlan, AuditResult, explain
from bias_audit.attribution.borrow import borrowed
from bias_audit.attribution.capture import capture
from bias_audit.data.samples import AuditBatch
from bias_audit.records.writing import RunDirectory
from bias_audit.stages.riding import RideAlong
from bias_audit.stages.scoring import BatchScores, score_batch

BARE, VALIDATION = "bare forward", "validation alone"
EXPLAIN, AUDIT, RIDE = "bias-audit: explanation", "bias-audit: complete audit", "bias-audit: audit that rides along"
# Parts and variants of an audit, told in the table only.
AFTERWARDS, TESTED = "of it statistics and records", "the same, its methods tested on 1 image"
EXPLANATION_GROUP, AUDIT_GROUP, VALIDATION_GROUP = "explanation of a batch", "complete audit", "validation"
ONCE = 10**9


@dataclass(frozen=True)
class Skipped:
    """A contender that takes no part in a group, and why."""

    model: str
    group: str
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


def bare(model: nn.Module, batches: Sequence[AuditBatch]) -> None:
    """The forward pass alone."""
    with torch.inference_mode():
        for batch in batches:
            model(batch.images)


def ours(work: Workload, batch: AuditBatch) -> Tensor:
    """Grad-CAM by this package, at the layer's resolution."""
    return explain(work.model, batch.images, target=batch.labels, layer=work.spec.layer).maps


def explanation(work: Workload, _folder: Path) -> Group:
    """One batch: the forward pass alone, and Grad-CAM by this package and its peers."""
    batch = work.batches[0]
    contenders = [
        Contender(BARE, partial(bare, work.model, [batch])),
        Contender(EXPLAIN, partial(ours, work, batch)),
        *(Contender(p.name, partial(p.maps, work, batch), every=p.every) for p in PEERS if not p.excuse(work)),
    ]
    excused = [(p.name, p.excuse(work)) for p in PEERS if p.excuse(work)]
    skipped = tuple(Skipped(work.spec.model, EXPLANATION_GROUP, *excuse) for excuse in excused)
    return Group(EXPLANATION_GROUP, len(batch.labels), tuple(contenders), skipped)


class CompleteAudit:
    """Our audit as it runs again and again in a training: explanation, scores, statistics, verdict, records.

    `folder` takes the run directory. The first audit, made here, prepares and is the reference.
    """

    def __init__(self, work: Workload, folder: Path) -> None:
        self.work = work
        # The test of the explanation methods, which every n-th audit makes, is a contender of its own.
        plan = AuditPlan(
            layer=work.spec.layer,
            batch_size=work.spec.batch,
            max_samples=work.spec.images,
            fitness_samples=0,
            intervention_samples=0,
        )
        self.auditor = Auditor(work.audit_set, plan)
        self.reference = self.auditor.run(work.model, trigger="reference")
        self.directory = RunDirectory.create(folder, self.auditor.manifest(work.model), self.auditor.sheet)
        self.directory.append(self.reference)
        self.step = 0

    def __call__(self, scored: list[BatchScores] | None = None) -> AuditResult:
        """One audit, on disk when this returns; with `scored`, what comes after the last forward pass."""
        self.step += 1
        reference = self.reference.scores
        result = self.auditor.run(self.work.model, step=self.step, reference=reference, scored=scored)
        self.directory.append(result)
        return result

    def scores(self) -> list[BatchScores]:
        """What an audit measures on each batch."""
        layer, target_of = self.work.spec.layer, self.auditor.plan.target_of
        with borrowed(self.work.model) as lent:
            taken = [capture(lent, batch.images, target_of(batch.labels), layer) for batch in self.work.batches]
        batches = zip(taken, self.work.batches, strict=True)
        regions, plan = self.auditor.regions, self.auditor.plan
        return [score_batch(t, b.labels, *regions.of(b.indices, b.masks, t.activations), plan) for t, b in batches]


def complete_audit(work: Workload, folder: Path) -> Group:
    """All images: the forward pass alone, our audit, and grad-cam with Quantus."""
    audit = CompleteAudit(work, folder)
    tested = Auditor(
        work.audit_set,
        AuditPlan(
            layer=work.spec.layer,
            batch_size=work.spec.batch,
            max_samples=work.spec.images,
            fitness_samples=1,
            intervention_samples=0,
        ),
    )
    contenders = [
        Contender(BARE, partial(bare, work.model, work.batches)),
        Contender(AUDIT, audit),
        Contender(AFTERWARDS, partial(audit, audit.scores())),
        Contender(TESTED, partial(tested.run, work.model), every=ONCE, warm_up=nothing),
    ]
    excuse = QUANTUS_PEER.excuse(work)
    skipped = (Skipped(work.spec.model, AUDIT_GROUP, QUANTUS, excuse),) if excuse else ()
    if not excuse:
        run, warm_up = partial(by_quantus, work, work.batches), partial(by_quantus, work, work.batches[:1])
        contenders.append(Contender(QUANTUS, run, every=QUANTUS_PEER.every, warm_up=warm_up))
    return Group(AUDIT_GROUP, work.spec.images, tuple(contenders), skipped, effort=2)


class Validation:
    """A validation as a training makes it, without grad: outputs, loss and accuracy of each batch.

    With `audit`, one rides along with it, whose result is on disk when it is done.
    """

    def __init__(self, work: Workload, audit: CompleteAudit | None = None) -> None:
        self.work, self.audit = work, audit
        self.tried = False

    def __call__(self) -> str:
        """Validate once; returns why nobody could ride along, "" if that went well."""
        ride = None
        if self.audit is not None:
            every_place = {place: place for place in range(len(self.work.audit_set))}
            ride = RideAlong(self.audit.auditor, self.work.model, every_place, nullcontext, tried=self.tried)
        loss, hits = torch.zeros(()), torch.zeros(())
        with torch.no_grad():
            for batch in self.work.batches:
                if ride is not None:
                    ride.begin(batch)
                outputs = self.work.model(batch.images)
                loss += nn.functional.cross_entropy(outputs, batch.labels, reduction="sum")
                hits += (outputs.argmax(dim=1) == batch.labels).sum()
                if ride is not None:
                    ride.end()
        if ride is None or self.audit is None:
            return ""
        scored = ride.finish()
        if scored is None:
            return ride.reason
        self.audit(scored)
        self.tried = True
        return ""


def validation(work: Workload, folder: Path) -> Group:
    """All images: a validation alone, and with an audit that takes its activations from it."""
    riding = Validation(work, CompleteAudit(work, folder))
    contenders = [Contender(VALIDATION, Validation(work))]
    excuse = riding()
    if not excuse:
        contenders.append(Contender(RIDE, riding))
    skipped = (Skipped(work.spec.model, VALIDATION_GROUP, RIDE, excuse),) if excuse else ()
    return Group(VALIDATION_GROUP, work.spec.images, tuple(contenders), skipped, effort=2)


# From a group's name to what makes it.
GROUPS: dict[str, Callable[[Workload, Path], Group]] = {
    EXPLANATION_GROUP: explanation,
    AUDIT_GROUP: complete_audit,
    VALIDATION_GROUP: validation,
}

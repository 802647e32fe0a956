"""What the size of batches changes in an audit: nothing of the same activations, and little of the model's.

Enters: how many images, and in batches of which sizes. Leaves: what differs, and how far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
from torch import Tensor

from benchmarks.soak.rank_trainings import POLICY, Net, Training
from bias_audit.attribution.borrow import borrowed
from bias_audit.attribution.cam import FORMULAS
from bias_audit.attribution.capture import Capture, capture
from bias_audit.audit import Auditor
from bias_audit.plan import AuditPlan
from bias_audit.records.results import AuditResult
from bias_audit.stages.scoring import BatchScores, in_order, score_batch


def scored_in_parts(audited: int, sizes: Sequence[int]) -> dict[int, tuple[str, ...]]:
    """What differs in a single bit, for each batch size, if the activations and gradients are the same: by name.

    By every method, of a model that is made anew.
    """
    torch.manual_seed(0)
    training = Training(Path(), audited=audited)
    auditor = Auditor(training.audit_set(), AuditPlan(methods=tuple(FORMULAS), layer="act", pointing_tolerance=2))
    every = auditor.audit_set.batch(range(audited))
    with borrowed(Net()) as lent:
        taken = capture(lent, every.images, auditor.checked_target(every.labels, every.indices), "act")

    def score(taken: Capture, labels: Tensor, masks: Tensor, places: tuple[int, ...]) -> BatchScores:
        return score_batch(taken, labels, *auditor.regions.of(places, masks, taken.activations), auditor.plan)

    at_once = score(taken, every.labels, every.masks, every.indices)
    found: dict[int, tuple[str, ...]] = {}
    for size in sizes:
        batches = []
        for places in (range(start, min(start + size, audited)) for start in range(0, audited, size)):
            cut = slice(places.start, places.stop)
            part = Capture(taken.activations[cut], taken.gradients[cut], taken.outputs[cut], taken.scores[cut])
            batches.append(score(part, every.labels[cut], every.masks[cut], tuple(places)))
        joined = in_order(batches, range(audited))
        pairs = zip(at_once._fields, at_once, joined, strict=True)
        found[size] = tuple(name for name, one, other in pairs if not _same_bits(one, other))
    return found


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return one.contiguous().numpy().tobytes() == other.contiguous().numpy().tobytes()


@dataclass(frozen=True)
class Moved:
    """How far other batch sizes move what is measured.

    `decided` names what is counted or decided and yet differs; `logit` is the most that a margin moves, in logits;
    `most` the most that an estimate or an end of its interval moves, of which metric `metric`.
    """

    decided: tuple[str, ...]
    logit: float
    most: float
    metric: str


def moved_by_batch_size(audited: int, sizes: Sequence[int], seeds: Sequence[int]) -> list[Moved]:
    """For each seed, of the weights, the largest difference between audits in batches of these sizes."""
    found = []
    for seed in seeds:
        torch.manual_seed(seed)
        net = Net()
        trainings = [Training(Path(), audited=audited, batch_size=size) for size in sizes]
        found.append(_moved([Auditor(t.audit_set(), t.plan(), POLICY).run(net) for t in trainings]))
    return found


def _moved(results: Sequence[AuditResult]) -> Moved:
    first, *others = results
    decided: set[str] = set()
    logit, moves = 0.0, [(0.0, "")]
    for other in others:
        logit = max(logit, float(np.abs(first.scores.margin - other.scores.margin).max()))
        if not np.array_equal(first.scores.predictions, other.scores.predictions):
            decided.add("predictions")
        if _decisions(first) != _decisions(other):
            decided.add("verdicts")
        for one, two in zip(first.estimates, other.estimates, strict=True):
            ends = [(getattr(one, name), getattr(two, name)) for name in ("value", "low", "high")]
            known = [(a is None, b is None) for a, b in ends]
            if (one.n, one.reason) != (two.n, two.reason) or any(a is not b for a, b in known):
                decided.add(one.metric)
            moves += [(abs(a - b), one.metric) for a, b in ends if a is not None and b is not None]
    most, metric = max(moves)
    return Moved(tuple(sorted(decided)), logit, most, metric)


def _decisions(result: AuditResult) -> list[Any]:
    verdicts = [(finding.subject, finding.verdict, finding.possible) for finding in result.judgement.findings]
    return verdicts + [(check.subject, check.outcome) for check in result.judgement.checks]

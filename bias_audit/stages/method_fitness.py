"""The explanation methods of a plan, tested on the model as it is now.

Enters: forward passes of a borrowed model, the audit set and the plan. Leaves: one estimate for each measure of
`evidence.fitness` and each method.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bias_audit.data.dataset import AuditDataset
from bias_audit.evidence.fitness import Explained, fitness, fitness_estimates
from bias_audit.plan import AuditPlan
from bias_audit.stages.passes import ForwardPasses
from bias_audit.stages.scoring import decisions_of, maps_of
from bias_audit.terms import Estimate


def method_fitness(passes: ForwardPasses, audit_set: AuditDataset, plan: AuditPlan) -> tuple[Estimate, ...]:
    """The fitness of each method of the plan, on `fitness_samples` of the audited images."""
    drawn = audit_set.subset(plan.fitness_samples, plan.seed)
    # What was predicted on the whole image is explained of each of its variants.
    predicts = plan.target == "predicted"
    target_of = replace(plan, target="label").target_of if predicts else plan.target_of

    def maps(images: Tensor, classes: Tensor) -> Tensor:
        return maps_of(passes.capture(images, target_of(classes)), plan)

    def outputs(images: Tensor) -> Tensor:
        return passes.logits(images).float()

    explained = Explained(
        plan.method_names, maps, outputs, lambda logits, classes: target_of(classes)(logits), plan.sign
    )
    values = []
    for start in range(0, len(drawn), plan.batch_size):
        batch = drawn.batch(range(start, min(start + plan.batch_size, len(drawn))), passes.device)
        classes = decisions_of(outputs(batch.images), batch.labels)[0].clamp(min=0) if predicts else batch.labels
        seeds = [plan.seed + i for i in batch.indices]
        values.append(fitness(passes.model, explained, batch.images, classes, seeds, plan.batch_size))
    return fitness_estimates(torch.cat(values, dim=2).cpu().numpy(), plan.method_names, plan.seed)

"""What the model decides when regions are removed and cues are swapped, and what it then saw.

Enters: forward passes of a borrowed model, and the audit set. Leaves: `Intervened`: estimates, the effects on each
sample, and pictures. How images are changed is for `evidence.changes` to say; what follows from the answers, for
`evidence.intervention` and `evidence.probe`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bias_audit.attribution.targets import check_logits
from bias_audit.data.dataset import AuditDataset
from bias_audit.evidence.association import Alignment
from bias_audit.evidence.changes import Changes
from bias_audit.evidence.effects import EFFECTS, Effects, effects, responses
from bias_audit.evidence.intervention import intervention_estimates
from bias_audit.evidence.pictures import changed_pictures
from bias_audit.evidence.probe import probe, region_probe
from bias_audit.plan import AuditPlan
from bias_audit.progress import Progress
from bias_audit.ranks import Ranks
from bias_audit.records.samples import ChangedPictures
from bias_audit.stages.passes import ForwardPasses
from bias_audit.stages.scoring import decisions_of
from bias_audit.terms import INTERVENTION_METRICS, PROBE_METRICS, Estimate

# Of the images that regions are removed from, so many get noise, and the fills that only show what they insert.
SENSITIVITY_SAMPLES = 64
ESTIMATED = (*INTERVENTION_METRICS, *PROBE_METRICS)
EFFECT_METRICS = tuple(f"removal_{effect}" for effect in EFFECTS)


@dataclass(frozen=True)
class Intervened:
    """What interventions gave: estimates; effects beyond those of the control regions, float32 `(E, N, R)`, E as in
    `EFFECT_METRICS`, of each sample of the audit set, NaN where nothing was removed; and perhaps pictures."""

    estimates: tuple[Estimate, ...]
    effects: npt.NDArray[np.float32]
    pictures: ChangedPictures | None


class Interventions:
    """Changes some images of an audit set, the same ones in the same ways at each audit, and asks models about them.

    Args:
        audit_set: what is audited.
        plan: how many images are changed, and how.
        alignments: which attribute value goes with which class in the training set.
        pictures: whether to keep what models saw, for the records.
    """

    def __init__(
        self, audit_set: AuditDataset, plan: AuditPlan, alignments: tuple[Alignment, ...], pictures: bool
    ) -> None:
        self._audit_set, self._plan, self._alignments, self._pictures = audit_set, plan, alignments, pictures
        self._drawn = audit_set.subset(plan.intervention_samples, plan.seed)
        self._changes = Changes(
            self._drawn, plan.control_regions, SENSITIVITY_SAMPLES, plan.swaps, alignments, plan.seed
        )

    def made(self, passes: ForwardPasses, step: int, progress: Progress, ranks: Ranks) -> Intervened:
        """All of them on one model; its pictures are of the audit at `step`, and the first rank's alone."""
        drawn, changes, plan = self._drawn, self._changes, self._plan

        def answers(pictures: Tensor) -> Tensor:
            found = passes.logits(self._audit_set.finished(pictures.to(passes.device)))
            check_logits(found)
            return found

        logits = responses(changes, answers, plan.batch_size, progress, ranks).to(passes.device)
        labels = torch.from_numpy(drawn.labels).to(passes.device)
        count = logits.shape[1]
        of_each = labels.repeat_interleave(count)
        scores = plan.target_of(of_each)(logits.flatten(0, 1)).float().view(-1, count)
        found = Effects(*(values.cpu().numpy() for values in effects(logits, scores, labels, changes.list)))
        estimates = intervention_estimates(
            found,
            drawn.labels,
            drawn.attribute_table,
            changes.swapped_values,
            drawn.subjects,
            self._alignments,
            by_user=plan.swaps,
            shown=changes.shown,
            seed=plan.seed,
        )
        pictures = None
        if ranks.rank == 0 and self._pictures:
            flat = decisions_of(logits.flatten(0, 1), of_each)
            decisions, margins = (values.view(-1, count).cpu().numpy() for values in flat)
            pictures = changed_pictures(changes, drawn.ids, drawn.subjects, decisions, margins, step)
        probed = self._features_probed(passes, ranks)
        return Intervened((*estimates, *probed, *self._regions_probed), self._of_each(found), pictures)

    def _of_each(self, found: Effects) -> npt.NDArray[np.float32]:
        """The effects on each sample of the audit set, and each region."""
        ids, regions = self._audit_set.ids, self._audit_set.subjects.regions
        place = {name: i for i, name in enumerate(ids)}
        rows = [place[name] for name in self._drawn.ids]
        spurious = [r for r, (_, role) in enumerate(regions) if role == "spurious"]
        every = np.full((len(EFFECTS), len(ids), len(regions)), np.nan, dtype=np.float32)
        every[np.ix_(range(len(EFFECTS)), rows, spurious)] = found.removal - found.control
        return every

    @cached_property
    def _regions_probed(self) -> tuple[Estimate, ...]:
        """How well each attribute can be read from the pixels of each spurious region, which no training changes."""
        drawn, spurious = self._drawn, self._drawn.subjects.regions_with("spurious")
        if not spurious:
            return ()
        return tuple(
            region_probe(looks, drawn.attribute_table[:, column], attribute, region, seed=self._plan.seed)
            for region, looks in zip(spurious, self._changes.contents, strict=True)
            for column, (attribute, _) in enumerate(drawn.subjects.attributes)
        )

    def _features_probed(self, passes: ForwardPasses, ranks: Ranks) -> Iterator[Estimate]:
        """How well each attribute can be read from what the last layer reads."""
        attributes = self._drawn.subjects.attributes
        features = self._features(passes, ranks) if attributes else None
        for column, (attribute, _) in enumerate(attributes):
            if features is None:
                reason = "the model has no linear layer that takes one row of features for each image"
                yield from (Estimate(m, None, None, None, 0, group=attribute, reason=reason) for m in PROBE_METRICS)
            else:
                values = self._drawn.attribute_table[:, column]
                yield from probe(features, values, attribute, seed=self._plan.seed)

    def _features(self, passes: ForwardPasses, ranks: Ranks) -> npt.NDArray[np.float32] | None:
        """What the last linear layer reads of each image `(N, F)`, if there is one."""
        drawn, size, count = self._drawn, self._plan.batch_size, len(self._drawn)

        def features_of(number: int) -> npt.NDArray[np.float32] | None:
            start = number * size
            found = passes.features(drawn.batch(range(start, min(start + size, count)), passes.device).images)
            return None if found is None else found.cpu().numpy()

        rows = ranks.shared(-(-count // size), features_of)
        known = [row for row in rows if row is not None]
        return np.concatenate(known) if len(known) == len(rows) else None

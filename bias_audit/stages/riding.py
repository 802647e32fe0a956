"""An audit whose forward passes are those of the user's validation: it adds only the tail of each.

Enters: the validation's batches as they come, each with its regions. Leaves: their `BatchScores`, or the reason why the
audit has to make forward passes of its own after all. That is no failure: it costs time and gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bias_audit.attribution.borrow import borrowed
from bias_audit.attribution.capture import Capture, capture
from bias_audit.attribution.ride import Rider, why_not
from bias_audit.attribution.targets import Target
from bias_audit.data.samples import AuditBatch
from bias_audit.rng import preserved_rng
from bias_audit.stages.passes import ForwardContext
from bias_audit.stages.scoring import BatchScores, in_order, score_batch

if TYPE_CHECKING:
    from bias_audit.audit import Auditor


class RideAlong:
    """One audit of `auditor` on the batches that a validation shows `model`; `begin` and `end` around each of them.

    Args:
        auditor: what to audit and how; its layer is known.
        model: eager, in the state in which the validation calls it.
        places: of a sample's index in the validation's data set its place in the auditor's, where it is audited.
        forward_context: what the validation's forward runs in, such as its autocast.
        tried: whether an earlier audit of this model has gone well: then the first batch is compared with the audit
            set's, and no forward pass is tried on it.
    """

    def __init__(
        self,
        auditor: Auditor,
        model: nn.Module,
        places: Mapping[int, int],
        forward_context: ForwardContext,
        tried: bool = False,
    ) -> None:
        self.reason = ""
        self._auditor, self._model, self._places, self._context = auditor, model, places, forward_context
        self._tried, self._looked = tried, False
        self._expected: Tensor | None = None
        self._current: tuple[Rider, AuditBatch, list[int]] | None = None
        self._scores: list[BatchScores] = []
        self._order: list[int] = []

    def begin(self, batch: Any) -> None:
        """Before the validation step of a batch."""
        shown = batch_in(batch)
        if self.reason or shown is None:
            return
        if any(module.training for module in self._model.modules()):
            self.reason = "a part of the model is in training mode"
            return
        rows = [row for row, index in enumerate(shown.indices) if index in self._places]
        if not rows:
            return
        try:
            self.reason = self._why_not(shown, rows)
            if not self.reason:
                size, layout = tuple(shown.images.shape[2:]), self._auditor.plan.layout
                rider = Rider(self._model, self._layer, self._target(shown, rows), size, layout)
                self._current = rider.__enter__(), shown, rows
        except Exception as error:
            # Whatever is wrong, the user's validation is not the place to raise it: the audit's own passes will say it.
            self.reason = f"{type(error).__name__}: {error}"

    def _why_not(self, shown: AuditBatch, rows: list[int]) -> str:
        """Why not to ride along with the pass of this batch; only the first is looked at."""
        if self._looked:
            return ""
        self._looked = True
        audited = self._auditor.audit_set.batch([self._places[shown.indices[r]] for r in rows], shown.images.device)
        same = _close(shown.images[rows].float(), audited.images.float()) and torch.equal(
            shown.masks[rows], audited.masks
        )
        if not same:
            return "the validation's batches are not the audit set's images and masks as it gives them"
        if self._tried:
            return ""
        plan, target = self._auditor.plan, self._target(shown, rows)
        with borrowed(self._model) as lent, self._context():
            reason = why_not(lent, shown.images, self._layer, target, plan.forward_fn, plan.layout)
            if not reason:
                taken = capture(lent, shown.images, target, self._layer, forward=plan.forward_fn, layout=plan.layout)
                self._expected = taken.activations.float()
        return reason

    def _target(self, shown: AuditBatch, rows: list[int]) -> Target:
        return self._auditor.checked_target(shown.labels, [self._places[shown.indices[row]] for row in rows])

    @property
    def _layer(self) -> str:
        layer = self._auditor.layer
        assert layer is not None
        return layer

    def end(self) -> None:
        """After the validation step of a batch, also after one that raised."""
        if self._current is None:
            return
        rider, batch, rows = self._current
        self._current = None
        rider.__exit__(None, None, None)
        taken, expected, self._expected = rider.capture, self._expected, None
        if taken is None or rider.passes != 1:
            made = f"{rider.passes} forward passes through the layer, or with grad; one without is needed"
            self.reason = str(rider.problem) if rider.problem else f"the validation step makes {made}"
        elif expected is not None and not _close(taken.activations.float(), expected):
            self.reason = "the validation step does not give the model the batch's images as they are"
        else:
            try:
                self._score(taken, batch, rows)
            except Exception as error:
                self.reason = f"{type(error).__name__}: {error}"

    def _score(self, taken: Capture, batch: AuditBatch, rows: list[int]) -> None:
        kept = torch.tensor(rows, device=batch.images.device)
        places = tuple(self._places[batch.indices[row]] for row in rows)
        part = taken if len(rows) == len(batch.indices) else _rows(taken, kept)
        # A metric of the user's own may draw random numbers, and training goes on after this.
        with preserved_rng():
            regions = self._auditor.regions.of(places, batch.masks[kept], part.activations)
            self._scores.append(score_batch(part, batch.labels[kept], *regions, self._auditor.plan))
        self._order += places

    def finish(self) -> list[BatchScores] | None:
        """What was measured, in the auditor's order; None, with `reason` set, if not every sample was shown once."""
        self.end()
        wanted = len(self._auditor.audit_set)
        if not self.reason and sorted(self._order) != list(range(wanted)):
            self.reason = f"the validation showed {len(set(self._order))} of the {wanted} audited images, or some twice"
        return None if self.reason else [in_order(self._scores, self._order)]


def batch_in(batch: Any) -> AuditBatch | None:
    """The `AuditBatch` that a validation's batch is, or holds in a dict, a list or a tuple."""
    return next((leaf for leaf in tree_leaves(batch) if isinstance(leaf, AuditBatch)), None)


def _rows(taken: Capture, rows: Tensor) -> Capture:
    return replace(
        taken,
        activations=taken.activations[rows],
        gradients=taken.gradients[rows],
        outputs=taken.outputs[rows],
        scores=taken.scores[rows],
    )


def _close(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same but for what another precision or order of summation makes of them."""
    return one.shape == other.shape and bool((one - other).abs().max() <= 1e-2 * other.abs().max())

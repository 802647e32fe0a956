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

from bias_audit.attribution.capture import Capture, borrowed, logits_of
from bias_audit.attribution.ride import Rider, why_not
from bias_audit.data.samples import AuditBatch

if TYPE_CHECKING:
    from bias_audit.audit import Auditor, BatchScores, ForwardContext


class RideAlong:
    """One audit of `auditor` on the batches that a validation shows `model`; `begin` and `end` around each of them.

    Args:
        auditor: what to audit and how; its layer is known.
        model: eager, in the state in which the validation calls it.
        places: of a sample's index in the validation's data set its place in the auditor's, where it is audited.
        forward_context: what the validation's forward runs in, such as its autocast.
        tried: whether an earlier audit of this model has gone well: then the trial on the first batch is left out.
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
        self._tried = tried
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
        layer = self._auditor.layer
        assert layer is not None
        target = self._auditor.plan.target_of(shown.labels)
        if not self._tried:
            with borrowed(self._model) as lent, self._context():
                self.reason = why_not(lent, shown.images, layer, target)
                self._expected = None if self.reason else logits_of(lent(shown.images)).float()
            self._tried = True
        if not self.reason:
            rider = Rider(self._model, layer, target, tuple(shown.images.shape[2:]))
            self._current = rider.__enter__(), shown, rows

    def end(self) -> None:
        """After the validation step of a batch, also after one that raised."""
        if self._current is None:
            return
        rider, batch, rows = self._current
        self._current = None
        rider.__exit__(None, None, None)
        taken, expected, self._expected = rider.capture, self._expected, None
        if taken is None or rider.passes != 1:
            passes = f"{rider.passes} forward passes through the layer, one is needed"
            self.reason = str(rider.problem) if rider.problem else f"the validation step makes {passes}"
        elif expected is not None and not _close(taken.outputs, expected):
            self.reason = "the validation step does not give the model the batch's images as they are"
        else:
            kept = torch.tensor(rows, device=batch.images.device)
            places = tuple(self._places[batch.indices[row]] for row in rows)
            whole = len(rows) == len(batch.indices)
            part = taken if whole else _rows(taken, kept)
            self._scores.append(self._auditor.score(part, batch.labels[kept], batch.masks[kept], places))
            self._order += places

    def finish(self) -> list[BatchScores] | None:
        """What was measured, in the auditor's order; None, with `reason` set, if not every sample was shown once."""
        self.end()
        wanted = len(self._auditor.audit_set)
        if not self.reason and sorted(self._order) != list(range(wanted)):
            self.reason = f"the validation showed {len(set(self._order))} of the {wanted} audited images, or some twice"
        return None if self.reason else self._auditor.in_order(self._scores, self._order)


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
    """Whether two outputs are the same but for what another order of summation makes of them."""
    return one.shape == other.shape and bool((one - other).abs().max() <= 1e-2 * other.abs().max())

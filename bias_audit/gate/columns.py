"""What each image adds to the estimates of one audit.

Enters: a `Run` and which audit of it, or what a baseline's file kept of one. Leaves: `SampleColumns`.

Neither torch nor Lightning is imported here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bias_audit.records.runs import Run
from bias_audit.stats import Floats
from bias_audit.terms import Estimate


@dataclass(frozen=True)
class SampleColumns:
    """What each of N images adds to the estimates of one audit; axes as in `SampleScores`.

    `correct` is bool `(N,)`, `areas` `(N, R + 1)`, `values` `(K, M, N, R + 1)`, `effects` `(E, N, R)`; NaN where there
    is no score. The effects are those of the last interventions, which may have been made at an earlier audit.
    """

    ids: tuple[str, ...]
    metrics: tuple[str, ...]
    methods: tuple[str, ...]
    regions: tuple[str, ...]
    effect_metrics: tuple[str, ...]
    correct: npt.NDArray[np.bool_]
    areas: npt.NDArray[np.float32]
    values: npt.NDArray[np.float32]
    effects: npt.NDArray[np.float32]

    @classmethod
    def of_run(cls, run: Run, index: int) -> SampleColumns:
        """Those of a run's audit `index`, counted from 0.

        Raises:
            RecordError: the arrays of that audit, or of the one that made its interventions, cannot be read.
        """
        scores = run.scores(index)
        effects, metrics = scores.effects, scores.effect_metrics
        if not metrics:
            # Interventions are made together, so that one age is that of all.
            age = next((e.age for e in run.audits[index].estimates if e.metric.startswith("removal_")), 0)
            older = run.scores(index - age) if 0 < age <= index and run.has_scores(index - age) else None
            if older is not None and older.ids == scores.ids and older.regions == scores.regions:
                effects, metrics = older.effects, older.effect_metrics
        names = (scores.ids, scores.metrics, scores.methods, scores.regions, metrics)
        return cls(*names, scores.correct, scores.areas, scores.values, effects)

    def of(self, e: Estimate) -> Values | None:
        """Each image's own part of an estimate of this audit; None where it is not a sum over images."""
        if not e.measured:
            return None
        if e.metric == "accuracy":
            return Values(self.correct.astype(np.float64), np.ones(len(self.ids)))
        if e.region is None or e.region not in self.regions:
            return None
        region = self.regions.index(e.region)
        if e.metric in self.metrics and e.method in self.methods:
            values = self.values[self.metrics.index(e.metric), self.methods.index(e.method), :, region]
            return Values(values.astype(np.float64), self.areas[:, region].astype(np.float64))
        # The effect is over the margin of each model's own decision: no sum over images.
        of_sum = e.metric in self.effect_metrics and e.metric != "removal_effect"
        if of_sum and region < self.effects.shape[-1]:
            values = self.effects[self.effect_metrics.index(e.metric), :, region]
            return Values(values.astype(np.float64), np.ones(len(self.ids)))
        return None


@dataclass(frozen=True)
class Values:
    """Each image's score, NaN where it has none, and the area of the region it is of, `(N,)` each."""

    values: Floats
    weights: Floats

    def rows(self, rows: Sequence[int]) -> Values:
        return Values(self.values[rows], self.weights[rows])

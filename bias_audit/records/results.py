"""One audit, as it goes from the auditor to the records and from there to every report.

Enters: fields, from `audit.Auditor` or read back by `runs`. Leaves: an `AuditResult`, or its `AuditSummary`, frozen.

Neither torch nor Lightning is imported here, nor NumPy.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from bias_audit.headlines import headlines
from bias_audit.records.samples import ChangedPictures, SampleScores, SampleSheet
from bias_audit.terms import Estimate
from bias_audit.verdicts.judgement import Judgement

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# So many numbers are shown below an audit in a notebook.
MOST_ROWS = 20


@dataclass(frozen=True)
class AuditSummary:
    """One audit less its scores: when, on which weights, what was measured and what follows.

    `trigger` says why it was made; "reference" is the audit before training, from which no gate concludes.
    """

    step: int
    epoch: int
    weights: str
    created: str
    seconds: float
    estimates: tuple[Estimate, ...]
    judgement: Judgement
    trigger: str = "manual"

    @property
    def is_reference(self) -> bool:
        """Whether it is of the model before training, from which nothing follows."""
        return self.trigger == "reference"

    @property
    def said(self) -> str:
        """How it came out, for a heading."""
        return "before training" if self.is_reference else f"policy {self.judgement.outcome}"

    def estimate(
        self,
        metric: str,
        *,
        region: str | None = None,
        class_name: str | None = None,
        group: str | None = None,
        method: str | None = None,
    ) -> Estimate:
        """The one estimate with exactly these names.

        Raises:
            KeyError: there is none.
        """
        wanted = (metric, region, class_name, group, method)
        for e in self.estimates:
            if e.metric == metric and e.key == wanted:
                return e
        raise KeyError(f"no estimate {wanted}")

    def _repr_html_(self) -> str:
        from markupsafe import Markup

        from bias_audit.notebook import CELL, numbers_html, verdict_html

        head = f"Bias audit at step {self.step}, epoch {self.epoch}, {self.weights} weights: {self.said}"
        row = Markup(
            '<tr><td style="{0} min-width: 9em">{1} <b>{2}</b></td><td style="{0}">{3}</td>'
            '<td style="{0} min-width: 16em">{4}</td></tr>'
        )
        verdicts = [(f.kind, f.name, verdict_html(f.verdict), f.sentence) for f in self.judgement.findings]
        rows = Markup("").join(row.format(CELL, *verdict) for verdict in verdicts)
        whole = Markup('<div style="max-width: 110ch"><b>{}</b><table style="margin: 6px 0">{}</table>{}</div>')
        return str(whole.format(head, rows, numbers_html(headlines(self.estimates)[:MOST_ROWS])))


@dataclass(frozen=True)
class AuditResult(AuditSummary):
    """One audit, with every sample's scores; `changed` where it made interventions.

    Example:
        >>> from torch import nn
        >>> from bias_audit import AuditPlan, audit_model
        >>> from bias_audit.data.scenes import scene_dataset
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        >>> few = scene_dataset({("doctor", "female"): 4, ("nurse", "male"): 4}, seed=0)
        >>> result = audit_model(net, few, plan=AuditPlan(fitness_samples=0, intervention_samples=0))
        >>> [finding.name for finding in result.judgement.findings], result.scores.labels.shape
        (['face', 'hair', 'gender'], (8,))
    """

    scores: SampleScores = field(compare=False, kw_only=True)
    changed: ChangedPictures | None = field(default=None, compare=False, kw_only=True)

    def summary(self) -> AuditSummary:
        """The same without the scores."""
        return AuditSummary(**{f.name: getattr(self, f.name) for f in fields(AuditSummary)})

    def plot(self, sheet: SampleSheet | None = None, samples: int = 4) -> Figure:
        """Verdicts, the enrichment of each region and the worst heatmaps as one figure.

        The worst are those with most of the heatmap on a spurious region. They lie over their images where `sheet`
        holds these, and are shown alone without.

        Args:
            sheet: the images, such as `Auditor.sheet` or `Run.sheet()`.
            samples: how many heatmaps to draw, at most 12.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
            ValueError: `samples` is out of range, or the sheet is of other images.

        Example:
            >>> result.plot(auditor.sheet).savefig("audit.png")  # doctest: +SKIP
        """
        from bias_audit.records.figure import audit_figure

        title = f"Step {self.step}, {self.weights} weights: {self.said}"
        return audit_figure(title, self.judgement.findings, self.estimates, self.scores, sheet, samples)


def now() -> str:
    """The present moment as ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")

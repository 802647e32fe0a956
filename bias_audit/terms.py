"""The words that estimates, policies and verdicts share.

Standard library only: the gate imports this module and must start in a blink.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, get_args

REMAINDER = "remainder"
Role = Literal["object", "spurious", "context"]
ROLES: tuple[Role, ...] = get_args(Role)

RegionMetric = Literal[
    "energy_share",
    "enrichment",
    "energy_share_gain",
    "pointing_game",
    "iou",
    "relevance_rank_accuracy",
    "coverage",
]
GroupMetric = Literal[
    "accuracy",
    "worst_group_accuracy",
    "accuracy_gap",
    "aligned_accuracy",
    "conflicting_accuracy",
    "alignment_gap",
    "equalized_odds_difference",
    "demographic_parity_difference",
    "wrong_reason_rate",
    "outcome_divergence",
]
InterventionMetric = Literal[
    "removal_effect",
    "removal_score",
    "removal_margin",
    "removal_flips",
    "removal_contrast",
    "control_effect",
    "control_score",
    "control_margin",
    "control_flips",
    "fill_flips",
    "fill_control_flips",
    "swap_flips",
    "swap_aligned_accuracy",
    "swap_conflicting_accuracy",
    "swap_gap",
    "swap_follows",
    "core_accuracy",
    "spurious_accuracy",
    "relative_foreground_sensitivity",
    "region_probe_gain",
]
AssociationMetric = Literal[
    "cramers_v",
    "npmi",
    "audit_cramers_v",
    "audit_npmi",
    "bias_amplification",
    "probe_accuracy",
    "probe_gain",
]
ExplainerMetric = Literal[
    "occlusion_correlation",
    "insertion_auc",
    "insertion_gain",
    "deletion_auc",
    "deletion_gain",
    "randomisation_similarity",
]
REGION_METRICS: tuple[RegionMetric, ...] = get_args(RegionMetric)
# Where the energy lies is broken down to class x group; how well a map locates, to the class.
BY_GROUP_METRICS = ("energy_share", "enrichment")
GROUP_METRICS: tuple[GroupMetric, ...] = get_args(GroupMetric)
INTERVENTION_METRICS: tuple[InterventionMetric, ...] = get_args(InterventionMetric)
PROBE_METRICS = ("probe_accuracy", "probe_gain")
ASSOCIATION_METRICS: tuple[AssociationMetric, ...] = get_args(AssociationMetric)
# These compare an attribute's values: their group is the attribute itself.
COMPARING_METRICS = (
    "removal_contrast",
    "region_probe_gain",
    "swap_flips",
    "swap_aligned_accuracy",
    "swap_conflicting_accuracy",
    "swap_gap",
    "swap_follows",
    "worst_group_accuracy",
    "accuracy_gap",
    "aligned_accuracy",
    "conflicting_accuracy",
    "alignment_gap",
    "equalized_odds_difference",
    "demographic_parity_difference",
    "outcome_divergence",
    "cramers_v",
    "audit_cramers_v",
    "bias_amplification",
    "probe_accuracy",
    "probe_gain",
)
EXPLAINER_METRICS: tuple[ExplainerMetric, ...] = get_args(ExplainerMetric)
# The `method` of `fill_flips` where a region is filled as `removal_flips` does it, without a control to compare with.
INPAINTING = "inpainting"


# Metrics of the user's own begin with this.
OWN = "own."
OWN_NAME = r"^own\.[A-Za-z_]\w*$"


def is_of_maps(metric: str) -> bool:
    """Whether a metric may be of the maps of an explanation method, and so says nothing where that is unfit."""
    return metric in REGION_METRICS or metric.startswith(OWN)


# All others are shares, or differences or correlations of them: between -1 and 1.
UNBOUNDED_METRICS = (
    "enrichment",
    "removal_effect",
    "removal_score",
    "removal_margin",
    "removal_contrast",
    "control_effect",
    "control_score",
    "control_margin",
    "relative_foreground_sensitivity",
)


class Verdict(StrEnum):
    """What the evidence says of one region or attribute."""

    RELIANCE = "reliance"
    """Decisions are shown to hang on it, by two kinds of evidence."""
    SUSPECTED = "suspected"
    """One kind of evidence says so alone, or two disagree."""
    CLEARED = "cleared"
    """It is shown to make no difference above the tolerance."""
    INCONCLUSIVE = "inconclusive"
    """What is unknown could change the verdict."""


class Outcome(StrEnum):
    """What became of a rule, or of a whole policy."""

    HELD = "held"
    VIOLATED = "violated"
    INCONCLUSIVE = "inconclusive"


# Slots: a run of 2,000 audits has a million of them, each of a quarter of the size.
@dataclass(frozen=True, slots=True)
class Estimate:
    """A measured number: its value, its 95 % interval, and the images behind it.

    `region`, `class_name`, `group` and `method` say what it was measured on; None means "over all". `group` is
    `"attribute=value"`, or `"attribute"` for metrics that compare an attribute's values (`accuracy_gap`,
    `worst_group_accuracy`). `value`, `low` and `high` are None where nothing could be measured; `reason` says why.
    `age` is how many audits ago it was measured: interventions, and the fitness of an explanation method, are not
    measured at every audit.

    Example:
        >>> print(Estimate("enrichment", 2.1, 1.7, 2.6, 200, region="hair", method="gradcam"))
        enrichment on hair (gradcam): 2.100 [1.700, 2.600], n = 200
    """

    metric: str
    value: float | None
    low: float | None
    high: float | None
    n: int
    region: str | None = None
    class_name: str | None = None
    group: str | None = None
    method: str | None = None
    reason: str = ""
    age: int = 0

    @property
    def measured(self) -> bool:
        """Whether value and interval are finite numbers, the value within the interval."""
        if self.value is None or self.low is None or self.high is None:
            return False
        # A bound may miss the value by a rounding error, not by more.
        within = self.low - 1e-6 <= self.value <= self.high + 1e-6
        return within and all(math.isfinite(x) for x in (self.value, self.low, self.high))

    @property
    def key(self) -> tuple[str, str | None, str | None, str | None, str | None]:
        """What it measures, and on what: equal for the same estimate of two audits."""
        return self.metric, self.region, self.class_name, self.group, self.method

    @property
    def subject(self) -> str:
        """The estimate's name as a person reads it."""
        parts = [self.metric]
        if self.region:
            parts.append(f"on {self.region}")
        if self.class_name:
            parts.append(f"for class {self.class_name}")
        if self.group:
            parts.append(f"by {self.group}" if "=" not in self.group else f"where {self.group}")
        if self.method:
            parts.append(f"({self.method})")
        return " ".join(parts)

    def __str__(self) -> str:
        if not self.measured:
            return f"{self.subject}: not measured ({self.reason or 'no valid image'})"
        ago = f", {self.age} audit{'' if self.age == 1 else 's'} ago" if self.age else ""
        return f"{self.subject}: {self.value:.3f} [{self.low:.3f}, {self.high:.3f}], n = {self.n}{ago}"


@dataclass(frozen=True)
class Subjects:
    """The names that estimates and rules may use.

    `regions` are `(name, role)` pairs, `attributes` are `(name, values)` pairs, `classes` the class names in order of
    their index.
    """

    regions: tuple[tuple[str, Role], ...]
    attributes: tuple[tuple[str, tuple[str, ...]], ...]
    classes: tuple[str, ...]

    def regions_with(self, role: Role) -> tuple[str, ...]:
        """Names of the regions in `role`."""
        return tuple(name for name, its_role in self.regions if its_role == role)

    def class_name(self, index: int) -> str:
        """What a decision for class `index` is called; a model may have more outputs than the audit set has classes.

        Example:
            >>> [Subjects((), (), ("doctor", "nurse")).class_name(index) for index in (1, 7, -1)]
            ['nurse', 'class 7', 'not finite']
        """
        if index < 0:
            return "not finite"
        return self.classes[index] if index < len(self.classes) else f"class {index}"

    def values_of(self, attribute: str) -> tuple[str, ...]:
        """The values that `attribute` takes in the audit set."""
        return dict(self.attributes)[attribute]

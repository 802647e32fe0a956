"""How to audit, written down by the user.

Enters: the user's choices. Leaves: an `AuditPlan`, checked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from torch import Tensor

from bias_audit.attribution.cam import FORMULAS, Formula, Sign, check_sign
from bias_audit.attribution.layers import Forward, call
from bias_audit.attribution.layouts import Layout
from bias_audit.attribution.methods import METHODS, find_method
from bias_audit.attribution.targets import BinaryLogit, ClassLogit, ClassMargin, Target, predicted_logit
from bias_audit.evidence.changes import Swap
from bias_audit.localization import ProjectedRegions, Scored
from bias_audit.records.samples import SampleScores
from bias_audit.terms import OWN, Estimate, Subjects

# Both maps come from the same activation and gradient; where the head is more than pooling and one linear layer they
# differ, and each alone can miss a cue.
DEFAULT_METHODS = ("gradcam", "hirescam")

TargetName = Literal["label", "margin", "predicted"]
TargetOfLabels = Callable[[Tensor], Target]
# Maps `(M, B, h, w)` and regions, of which the remainder is the last, to `(M, B, R + 1)`.
MapMetric = Callable[[Tensor, ProjectedRegions], Scored]
# All scores, attribute values `(N, A)` as text, the names, and a seed.
Evidence = Callable[[SampleScores, npt.NDArray[np.str_], Subjects, int], Iterable[Estimate]]


@dataclass(frozen=True)
class AuditPlan:
    """How to audit: which layer, methods and score, on how many images, and how much of each test.

    Args:
        layer: name of the submodule to explain; by default the last whose output keeps the image's places.
        methods: the explanation methods, each a formula on one layer's activations and gradients: names, or functions
            `(activations, gradients, sign) -> maps` of at least 0, which go by their names.
        metrics: functions `(maps, regions) -> Scored` measured beside the metrics that there are, on each map and
            region, as `localization.energy_share`; a function `f` is the metric `own.f` in records and policies. One
            that is infinite on an image has no mean, and decides nothing.
        evidence: functions `(scores, attributes, subjects, seed) -> Estimate`s, of metrics called `own.something`.
        target: which score: "margin" (the label's logit minus the largest other), "label" (the label's logit),
            "predicted" (the predicted class's), or a function from labels `(B,)` to a target.
        sign: "positive", "negative" (what speaks against the score) or "absolute".
        batch_size: images per forward pass.
        max_samples: of a larger audit set so many are drawn, once, by label x attributes.
        seed: of that draw and of every resampling.
        iou_threshold: share of a map's maximum above which a pixel counts, for `iou`.
        pointing_tolerance: pixels by which the maximum may miss a region, for `pointing_game`.
        forward_fn: `forward_fn(model, images)` gives the outputs; by default `model(images)`.
        layout: makes the layer's output `(B, C, h, w)`, laid out as the images are; by default it is recognised. With
            `forward_fn` it audits what takes no images: of clips, say, the sheets of their frames (examples/video.py).
        fitness_samples: of the audited images so many, drawn once, on which the explanation methods themselves are
            tested (see `evidence.fitness`), at about a hundred forwards each; 0 for no test. Without one every method
            counts as fit.
        fitness_every: audits after which they are tested anew; those between carry the last test's numbers on.
        intervention_samples: of the audited images so many, drawn once, from which the spurious regions are removed
            (see `evidence.intervention`), at about a dozen forwards each for one region; 0 for none.
        intervention_every: audits after which that is done anew; those between carry the last numbers on. The callback
            does it once more at the end of training.
        control_regions: for each removed region so many others of its size, elsewhere in the image.
        swaps: per attribute `swap(sample, value)`, which gives the sample's image with the attribute's cue changed to
            `value`, of the same size, or None where it cannot be. By default spurious regions are exchanged between
            images where they cover each other.

    Raises:
        ValueError: a value out of its range; the message names it.

    Example:
        >>> AuditPlan(methods=("gradcam", "layercam"), layer="layer4", intervention_samples=128).method_names
        ('gradcam', 'layercam')
    """

    layer: str | None = None
    methods: tuple[str | Formula, ...] = DEFAULT_METHODS
    target: TargetName | TargetOfLabels = "margin"
    sign: Sign = "positive"
    batch_size: int = 32
    max_samples: int = 512
    seed: int = 0
    iou_threshold: float = 0.15
    pointing_tolerance: int = 0
    forward_fn: Forward = call
    layout: Layout | None = None
    fitness_samples: int = 16
    fitness_every: int = 50
    intervention_samples: int = 256
    intervention_every: int = 10
    control_regions: int = 3
    swaps: Mapping[str, Swap] = field(default_factory=dict)
    metrics: tuple[MapMetric, ...] = ()
    evidence: tuple[Evidence, ...] = ()

    def __post_init__(self) -> None:
        check_sign(self.sign)
        if self.sign == "signed":
            raise ValueError("an audit measures shares of energy, which signed maps do not have: use another sign")
        for kind in ("methods", "metrics", "evidence"):
            nameless = next((f for f in getattr(self, kind) if isinstance(f, partial)), None)
            if nameless is not None:
                raise ValueError(f"{kind}: {nameless} has no name to go by in the records: write it as a `def`")
        if not self.methods or len(set(self.method_names)) < len(self.methods):
            raise ValueError(f"expected methods, each name once, got {self.method_names}")
        for kind in ("metrics", "evidence"):
            names = Counter(map(_name, getattr(self, kind)))
            wrong = next((name for name, count in names.items() if count > 1 or not name.isidentifier()), None)
            if wrong is not None:
                raise ValueError(
                    f"{kind}: {wrong!r} stands twice or is no name: give functions, each with its own name"
                )
        for method in self.methods:
            name = find_method(method).name
            taken = name in METHODS and METHODS[name].formula is not method
            if callable(method) and (taken or not name.isidentifier()):
                raise ValueError(f"methods: {name!r} is no name, or another's: give the function one of its own")
            if find_method(method).formula is None:
                raise ValueError(
                    f"{method} makes forward passes of its own: an audit takes {', '.join(FORMULAS)}; use `explain`"
                )
            find_method(method).check_sign(self.sign)
        if not callable(self.target) and self.target not in get_args(TargetName):
            raise ValueError(f"unknown target {self.target!r}: expected one of {', '.join(get_args(TargetName))}")
        least = {
            "batch_size": 1,
            "max_samples": 1,
            "fitness_samples": 0,
            "fitness_every": 1,
            "intervention_samples": 0,
            "intervention_every": 1,
            "control_regions": 1,
        }
        for name, limit in least.items():
            if getattr(self, name) < limit:
                raise ValueError(f"{name} must be at least {limit}, got {getattr(self, name)}")
        if not 0 <= self.iou_threshold < 1:
            raise ValueError(f"iou_threshold must lie in [0, 1), got {self.iou_threshold}")
        if self.pointing_tolerance < 0:
            raise ValueError(f"pointing_tolerance must be at least 0, got {self.pointing_tolerance}")

    def target_of(self, labels: Tensor) -> Target:
        """The target for images with these labels."""
        if callable(self.target):
            return self.target(labels)
        if self.target == "predicted":
            return predicted_logit
        of_classes = ClassMargin(labels) if self.target == "margin" else ClassLogit(labels)
        binary = BinaryLogit(labels)
        return lambda outputs: binary(outputs) if outputs.shape[1] == 1 else of_classes(outputs)

    @property
    def method_names(self) -> tuple[str, ...]:
        """The explanation methods as the records name them."""
        return tuple(find_method(method).name for method in self.methods)

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The user's own metrics as the records name them."""
        return tuple(OWN + _name(metric) for metric in self.metrics)

    @property
    def target_name(self) -> str:
        """The target as the manifest names it."""
        return self.target if isinstance(self.target, str) else getattr(self.target, "__qualname__", repr(self.target))


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__)

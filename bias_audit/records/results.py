"""What an audit measures and what a run is, as it goes from the auditor to the records and from there to every report.

Enters: fields, from `audit.Auditor` or read back by `records`. Leaves: `AuditResult` and its parts, all frozen.

Neither torch nor Lightning is imported here, and numpy only where arrays are touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from bias_audit.headlines import headlines
from bias_audit.policies.policy import Policy
from bias_audit.terms import Estimate, Subjects
from bias_audit.verdicts.judgement import Judgement

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from matplotlib.figure import Figure

SCHEMA_VERSION: Literal[1] = 1
# So many numbers are shown below an audit in a notebook.
MOST_ROWS = 20
# Whether pictures of the audited images are kept: everywhere, in the run directory only, or nowhere.
Thumbnails = bool | Literal["local"]


@dataclass(frozen=True)
class RegionCount:
    """On how many audited images a region is drawn as an outline, as a box (wholly or in part), and not at all.

    Example:
        >>> print(RegionCount("hair", outlined=272, boxed=40, absent=88))
        hair is on 312 of 400 images, on 40 of them as a box
    """

    region: str
    outlined: int
    boxed: int
    absent: int

    @property
    def present(self) -> int:
        """On how many images it is."""
        return self.outlined + self.boxed

    def __str__(self) -> str:
        which = self.boxed if self.outlined else "all"
        boxes = f", on {which} of them as a box" if self.boxed else ""
        return f"{self.region} is on {self.present} of {self.present + self.absent} images{boxes}"

    @property
    def caveat(self) -> str:
        """A sentence where some images lack the region, or have it as a box; "" where all have its outline.

        Example:
            >>> RegionCount("hair", outlined=0, boxed=40, absent=8).caveat
            'hair is on 40 of 48 images, on all of them as a box, which holds some of what lies around.'
        """
        around = ", which holds some of what lies around" if self.boxed else ""
        return f"{self}{around}." if self.boxed or self.absent else ""


class Manifest(BaseModel):
    """What a run audited and how: fixed when the run directory is made.

    `annotated` has a count for each region, in their order; nothing in runs of versions that did not count.
    `thumbnails` is False where the records hold no picture, and "local" where none leaves the run directory and its
    page; then `pictures.shareable` is what may.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = SCHEMA_VERSION
    run_id: str
    created: str
    tool: str
    model: str
    layer: str
    methods: tuple[str, ...]
    target: str
    sign: str
    subjects: Subjects
    fingerprint: str
    samples_available: Annotated[int, Field(ge=0)]
    samples_audited: Annotated[int, Field(ge=0)]
    seed: int
    policy: Policy
    thumbnails: Thumbnails = True
    annotated: tuple[RegionCount, ...] = ()

    @property
    def caveats(self) -> dict[str, str]:
        """Of each region that some images lack, or whose areas are boxes, a sentence that says so."""
        return {one.region: one.caveat for one in self.annotated if one.caveat}


@dataclass(frozen=True)
class PackedMasks:
    """Masks of N images, eight pixels in a byte: one image's at a time are unpacked.

    `bits` is uint8 `(N, R, h, ceil(w / 8))`, as `np.packbits` makes it, and `width` is w.

    Example:
        >>> import numpy as np
        >>> masks = PackedMasks.of(np.eye(3, dtype=bool)[None, None])
        >>> masks.bits.shape, masks[0][0].tolist()
        ((1, 1, 3, 1), [[True, False, False], [False, True, False], [False, False, True]])
    """

    bits: npt.NDArray[np.uint8]
    width: int

    @classmethod
    def of(cls, masks: npt.NDArray[np.bool_]) -> PackedMasks:
        """Those of bool `(N, R, h, w)`."""
        import numpy as np

        return cls(np.packbits(masks, axis=-1), masks.shape[-1])

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """`(N, R, h, w)`: images, regions, and the thumbnail's rows and columns."""
        n, regions, height, _ = self.bits.shape
        return n, regions, height, self.width

    def __len__(self) -> int:
        return len(self.bits)

    def __getitem__(self, index: int) -> npt.NDArray[np.bool_]:
        """The masks of one image, bool `(R, h, w)`."""
        import numpy as np

        return np.unpackbits(self.bits[index], axis=-1, count=self.width).view(np.bool_)

    def __iter__(self) -> Iterator[npt.NDArray[np.bool_]]:
        return (self[index] for index in range(len(self)))


@dataclass(frozen=True)
class SampleSheet:
    """The audited images, as they do not change from audit to audit.

    `attributes` is `(N, A)` text in the order of `Subjects.attributes`, "" where a sample has none. `thumbnails` are
    JPEG bytes. `masks` `(N, R, h, w)` are in the order of `Subjects.regions`, each at its thumbnail's size and padded
    at the bottom and on the right to the largest, `(h, w)`.
    """

    ids: tuple[str, ...]
    labels: npt.NDArray[np.int64]
    attributes: npt.NDArray[np.str_]
    thumbnails: tuple[bytes, ...]
    masks: PackedMasks


@dataclass(frozen=True)
class SampleTable:
    """What is known of the audited images, less their pictures and masks: see `SampleSheet`."""

    ids: tuple[str, ...]
    labels: npt.NDArray[np.int64]
    attributes: npt.NDArray[np.str_]


@dataclass(frozen=True)
class SampleScores:
    """Every score of every sample at one audit; N samples, M methods, K metrics, R regions and the remainder.

    `values` is float32 `(K, M, N, R + 1)`, NaN where a score is not valid; `metrics`, `methods` and `regions` name its
    axes. `areas` is `(N, R + 1)`, each region's share of the image, NaN where a sample lacks the region. `maps` is
    float16 `(M, N, h, w)`, each map divided by its largest absolute value, which `magnitude` `(M, N)` keeps. `margin`
    `(N,)` is the label's logit minus the largest other. `effects` is float32 `(E, N, R)`, what the removal of each
    region does beyond that of control regions, NaN where none was tried; `effect_metrics` names its first axis. It is
    empty where this audit made no interventions.
    """

    metrics: tuple[str, ...]
    methods: tuple[str, ...]
    regions: tuple[str, ...]
    ids: tuple[str, ...]
    labels: npt.NDArray[np.int64]
    predictions: npt.NDArray[np.int64]
    margin: npt.NDArray[np.float32]
    areas: npt.NDArray[np.float32]
    values: npt.NDArray[np.float32]
    maps: npt.NDArray[np.float16]
    magnitude: npt.NDArray[np.float32]
    effect_metrics: tuple[str, ...] = ()
    effects: npt.NDArray[np.float32] = field(default_factory=lambda: _no_effects())

    def of(self, metric: str, method: str, region: str) -> npt.NDArray[np.float32]:
        """One score for each sample, `(N,)`, NaN where not valid."""
        k, m, r = self.metrics.index(metric), self.methods.index(method), self.regions.index(region)
        return self.values[k, m, :, r]

    @property
    def correct(self) -> npt.NDArray[np.bool_]:
        """Whether each sample is classified as its label, `(N,)`."""
        hits: npt.NDArray[np.bool_] = self.predictions == self.labels
        return hits


@dataclass(frozen=True)
class ChangedPictures:
    """What interventions made of P images at the audit of `step`: those on which each change told most.

    Of each picture the sample's id, the `kind` of change ("removal" or "swap"), the region it was made in ("" where the
    user's own swap changed the image), for a swap the attribute and the value that was put in ("" for a removal), and
    the JPEG of what the model saw. `decisions` int64 `(P,)` are the classes it decided for, -1 where its output was not
    finite, and `falls` float32 `(P,)` by how much the margin of the label fell.
    """

    step: int
    ids: tuple[str, ...]
    kinds: tuple[str, ...]
    regions: tuple[str, ...]
    attributes: tuple[str, ...]
    values: tuple[str, ...]
    decisions: npt.NDArray[np.int64]
    falls: npt.NDArray[np.float32]
    pictures: tuple[bytes, ...]


def _no_effects() -> npt.NDArray[np.float32]:
    import numpy as np

    return np.empty((0, 0, 0), dtype=np.float32)


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

        outcome = "before training" if self.is_reference else f"policy {self.judgement.outcome}"
        head = f"Bias audit at step {self.step}, epoch {self.epoch}, {self.weights} weights: {outcome}"
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
        """Verdicts, the enrichment of each region and the worst heatmaps as one figure: see `figure.audit_figure`.

        Args:
            sheet: the images, such as `Auditor.sheet` or `Run.sheet()`; without, the heatmaps are shown alone.
            samples: how many heatmaps to draw, at most 12.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
            ValueError: `samples` is out of range, or the sheet is of other images.

        Example:
            >>> result.plot(auditor.sheet).savefig("audit.png")  # doctest: +SKIP
        """
        from bias_audit.records.figure import audit_figure

        return audit_figure(self, sheet, samples)


def now() -> str:
    """The present moment as ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")

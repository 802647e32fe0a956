"""Whether regions are fit to be audited: each check by name, what it found, and on which images.

Enters: a `Survey` and what a policy asks. Leaves: a `RegionReport`, every check in it once, those too that had nothing
to look at.

torch is not imported here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import kruskal

from bias_audit.evidence.proportions import minus
from bias_audit.evidence.tables import codes_of
from bias_audit.multiplicity import holm
from bias_audit.regions.checked import Check, Flag, Found, Limits, RegionReport, Result, State, Table
from bias_audit.regions.survey import Agreement, Survey
from bias_audit.stats import Intervals, bootstrap_ratios, wilson

# From this intersection over union on two outlines are commonly taken for the same thing (PASCAL VOC, IJCV 88, 2010).
LEAST_IOU = 0.5
# With fewer images of a group its areas are not compared: the test's distribution is one of many.
FEWEST_COMPARED = 5
# So many regions that some images lack are told in the sentence; the table has all.
MOST_TOLD = 8
# What counts as a difference beyond chance, all of them together.
ALPHA = 0.05


def check_regions(survey: Survey, limits: Limits | None = None) -> RegionReport:
    """Every check of a survey.

    Example:
        >>> from bias_audit.regions.region_set import read_set
        >>> from bias_audit.regions.survey import survey
        >>> check_regions(survey(read_set("data.yaml"))).exit_code  # doctest: +SKIP
        0
    """
    limits = Limits() if limits is None else limits
    return RegionReport(survey, limits, tuple(Result(check, check.look(survey, limits)) for check in CHECKS))


def _sizes(survey: Survey, limits: Limits) -> Found:
    flags = tuple(Flag(index, "", why) for index, why in survey.misfits)
    if flags:
        said = f"{_images(len(flags))} whose regions are not of the image's size; nothing else is measured there."
        return Found(State.VIOLATED, said, flags=flags)
    return Found(State.HELD, "Every region has the size of its image.")


def _unannotated(survey: Survey, limits: Limits) -> Found:
    none = np.isnan(survey.areas).all(axis=1) & survey.measured
    unlisted = survey.of.unlisted
    rest = f" {_images(unlisted)} in the folder {'is' if unlisted == 1 else 'are'} not in the annotations at all."
    more = rest if unlisted else ""
    if not survey.of.regions and survey.of.classes:
        return Found(State.SKIPPED, "The audit set names no region.")
    if not none.any():
        return Found(State.HELD, f"Every image has a region.{more}")
    flags = tuple(Flag(int(i), "", "no region") for i in np.flatnonzero(none))
    said = f"{_of(len(flags), survey)} without any region."
    if survey.of.with_role("object") or not survey.of.regions:
        return Found(State.VIOLATED, f"{said} Draw them, or remove their rows.{more}", flags=flags)
    return Found(State.WARNING, f"{said} That is right only where nothing is to be seen.{more}", flags=flags)


def _coverage(survey: Survey, limits: Limits) -> Found:
    count, boxes = _with_region(survey), survey.boxed.sum(axis=0)
    n = int(survey.measured.sum())
    rows = tuple(
        (name, role or "–", str(count[k] - boxes[k]), str(boxes[k]), str(n - count[k]))
        for k, (name, role) in enumerate(survey.of.regions)
    )
    table = Table(("region", "role", "outlined", "as boxes", "absent"), rows, 3)
    if not rows:
        return Found(State.SKIPPED, "There is no region.")
    partly = [
        f"{name}: {count[k]} of {_images(n)}" + (f", {boxes[k]} as boxes" if boxes[k] else "")
        for k, name in enumerate(survey.of.region_names)
        if count[k] < n or boxes[k]
    ]
    partly[MOST_TOLD:] = [f"and {len(partly) - MOST_TOLD} more"] if len(partly) > MOST_TOLD else []
    said = f"{'; '.join(partly)}." if partly else f"Every region is on all {_images(n)}."
    named = [(name, int(count[k])) for k, (name, role) in enumerate(survey.of.regions) if role is not None]
    nowhere = [name for name, images in named if images == 0]
    if nowhere:
        return Found(State.VIOLATED, f"On no image at all: {', '.join(nowhere)}. {said}", table)
    thin = [f"{name} ({images})" for name, images in named if images < limits.min_samples]
    if thin:
        return Found(State.INCONCLUSIVE, f"On fewer than {limits.min_samples} images: {', '.join(thin)}. {said}", table)
    return Found(State.HELD, said, table)


def _extent(survey: Survey, limits: Limits) -> Found:
    if not survey.of.regions:
        return Found(State.SKIPPED, "There is no region.")
    empty, full = np.argwhere(survey.areas == 0), np.argwhere(survey.areas == 1)
    names = survey.of.region_names
    flags = [Flag(int(i), names[k], f"{names[k]} holds no pixel") for i, k in empty.tolist()]
    flags += [Flag(int(i), names[k], f"{names[k]} is the whole image") for i, k in full.tolist()]
    if not flags:
        return Found(State.HELD, "No region is empty, and none is the whole image.")
    total = np.count_nonzero(~np.isnan(survey.areas))
    wrong = ((len(empty), "holds", "hold", "no pixel"), (len(full), "is", "are", "the whole image"))
    parts = [f"{n} of {total} {one if n == 1 else many} {what}" for n, one, many, what in wrong if n]
    return Found(State.VIOLATED, f"Of the drawn regions {'; '.join(parts)}: draw anew, or remove.", flags=tuple(flags))


def _overlaps(survey: Survey, limits: Limits) -> Found:
    if not survey.pairs:
        return Found(State.SKIPPED, "There is no pair of an object and a spurious region" + _roleless(survey))
    rows, flags, beyond = [], [], 0
    for p, (one, other) in enumerate(survey.pairs):
        values = survey.overlaps[:, p]
        shared = values[~np.isnan(values)]
        over = int((shared > limits.most_overlap).sum())
        beyond += over
        numbers = (_percent(shared.mean()), _percent(shared.max())) if shared.size else ("–", "–")
        rows.append((f"{one} and {other}", str(shared.size), *numbers, str(over)))
        flags += [
            (values[i], Flag(int(i), other, f"{one} and {other}: {_percent(values[i])} of the smaller lies in both"))
            for i in np.flatnonzero(values > 0)
        ]
    ordered = tuple(flag for _, flag in sorted(flags, key=lambda pair: -pair[0]))
    limit = _percent(limits.most_overlap)
    columns = ("object and spurious region", "images with both", "mean overlap", "largest", f"above {limit}")
    table = Table(columns, tuple(rows), 4)
    count = len({flag.index for flag in (ordered[:beyond] or ordered)})
    if beyond:
        said = (
            f"{_images(count)} where more than {limit} of the smaller region lies in both: attention there counts for "
            "both. Cut one out of the other (minus), or draw them apart."
        )
        return Found(State.VIOLATED, said, table, ordered[:beyond])
    if ordered:
        return Found(
            State.WARNING,
            f"{_images(count)} where they overlap, by {limit} at most.",
            table,
            ordered,
        )
    return Found(State.HELD, "No object region overlaps a spurious one.", table)


def _areas_by_class(survey: Survey, limits: Limits) -> Found:
    if not survey.of.classes:
        return Found(State.SKIPPED, "Labels are not known: give the YAML of an audit set.")
    return _areas(survey, [("class", _labels(survey), survey.of.classes)])


def _areas_by_attribute(survey: Survey, limits: Limits) -> Found:
    if not survey.of.attributes:
        return Found(State.SKIPPED, _no_attributes(survey))
    return _areas(survey, [(name, _codes(survey, a), values) for a, (name, values) in enumerate(survey.of.attributes)])


def _areas(survey: Survey, factors: Sequence[tuple[str, npt.NDArray[np.int64], Sequence[str]]]) -> Found:
    """Mean areas by each factor's values, and by which factors they differ beyond chance."""
    if not survey.of.regions:
        return Found(State.SKIPPED, "There is no region.")
    rows: list[tuple[str, ...]] = []
    compared: list[tuple[float, bool, str]] = []
    for factor, codes, values in factors:
        of, counts = _means(survey.areas, codes, len(values))
        for k, region in enumerate(survey.of.region_names):
            groups = [survey.areas[(codes == v) & ~np.isnan(survey.areas[:, k]), k] for v in range(len(values))]
            for v, value in enumerate(values):
                if counts[v, k]:
                    mean = _interval(of.value[v, k], of.low[v, k], of.high[v, k], int(counts[v, k]))
                    rows.append((region, f"{factor} = {value}", mean, str(counts[v, k])))
            large = [v for v in range(len(values)) if counts[v, k] >= FEWEST_COMPARED]
            if len(large) > 1:
                low, high = min(large, key=lambda v: of.value[v, k]), max(large, key=lambda v: of.value[v, k])
                gap = minus(*((of.value[v, k], of.low[v, k], of.high[v, k]) for v in (high, low)))
                told = (
                    f"{region}: {_percent(of.value[high, k])} of the image where {factor} = {values[high]}, "
                    f"{_percent(of.value[low, k])} where {values[low]}, a difference of "
                    f"{_interval(*gap, 2)}"
                )
                compared.append((_p_of(groups[v] for v in large), gap[1] > 0, told))
    table = Table(("region", "images", "mean area [95 % interval]", "n"), tuple(rows), 2)
    if not compared:
        return Found(State.SKIPPED, f"No two groups have {FEWEST_COMPARED} images with the same region.", table)
    # The test says whether any groups differ, of which the two furthest apart are told only if their means do.
    corrected = holm([p for p, *_ in compared])
    differ = [told for p, (_, apart, told) in zip(corrected, compared, strict=True) if p < ALPHA and apart]
    if differ:
        said = "; ".join(differ)
        why = " An area difference alone can look like a share difference: compare enrichment, not shares."
        return Found(State.WARNING, f"{said}.{why}", table)
    said = f"No difference beyond chance in {len(compared)} comparison{'' if len(compared) == 1 else 's'}"
    return Found(State.HELD, f"{said} (Kruskal-Wallis, Holm).", table)


def _means(
    areas: npt.NDArray[np.float64], codes: npt.NDArray[np.int64], count: int
) -> tuple[Intervals, npt.NDArray[np.int64]]:
    """Of each value and region the mean area with its 95 % interval and the number of images, all `(count, R)`."""
    known = codes >= 0
    has = ~np.isnan(areas[known])
    members = codes[known, None] == np.arange(count)
    counts = members.T.astype(np.int64) @ has
    if not known.any():
        return Intervals(*(np.full(counts.shape, np.nan) for _ in range(3))), counts
    means = bootstrap_ratios(np.where(has, areas[known], 0), has, codes[known], seed=0, subsets=members)
    return Intervals(*(part.reshape(counts.shape) for part in means)), counts


def _p_of(groups: Iterable[npt.NDArray[np.float64]]) -> float:
    """Whether the groups' areas are from one distribution: Kruskal-Wallis, which skewed areas do not mislead."""
    areas = list(groups)
    # All areas equal: SciPy has no p-value for that.
    return 1.0 if np.ptp(np.concatenate(areas)) == 0 else float(kruskal(*areas).pvalue)


def _cells(survey: Survey, limits: Limits) -> Found:
    if not survey.of.classes:
        return Found(State.SKIPPED, "Labels are not known: give the YAML of an audit set.")
    cells = sorted(_cells_of(survey, limits.min_samples), key=lambda cell: (cell.images, cell.least))
    least, widest = limits.min_samples, "widest 95 % interval"
    rows = tuple(
        (
            cell.class_name,
            cell.group or "–",
            str(cell.images),
            _half_width(cell.images),
            f"{cell.least} ({cell.region})" if cell.region else "–",
            str(max(0, least - cell.images)),
        )
        for cell in cells
    )
    table = Table(("class", "attribute", "images", widest, "fewest with a region", "images to add"), rows, 3)
    thin = [cell for cell in cells if cell.images < least]
    if thin:
        n, have = thin[0].images, "has" if len(thin) == 1 else "have"
        said = (
            f"{len(thin)} of {len(cells)} cells {have} fewer than {least} images; the thinnest, {thin[0].name}, has {n}"
            + (f": a share of one half in it is known to {_half_width(n)}." if n else ".")
        )
        return Found(State.INCONCLUSIVE, said, table)
    n = cells[0].images
    said = f"Every cell has {least} images or more; in the thinnest, of {n}, a share is known to {_half_width(n)} or"
    said = f"{said} better."
    bare = sorted((cell for cell in cells if cell.region and cell.least < least), key=lambda cell: cell.least)
    if bare:
        said += (
            f" But in {len(bare)} of {len(cells)} fewer than {least} show some region; {bare[0].region} is on "
            f"{_images(bare[0].least)} of {bare[0].name}: what is measured in a region rests on these alone."
        )
    return Found(State.WARNING if bare else State.HELD, said, table)


@dataclass(frozen=True)
class _Cell:
    """One class, with one attribute value or all: its images, and the region that `least` of them show."""

    class_name: str
    group: str
    images: int
    region: str
    least: int

    @property
    def name(self) -> str:
        return f"{self.class_name} with {self.group}" if self.group else self.class_name


def _cells_of(survey: Survey, least: int) -> Iterator[_Cell]:
    labels = _labels(survey)
    # What is on an image whose regions do not fit it is not known, and told by another check; so are rare regions.
    may_show = ~np.isnan(survey.areas) | ~survey.measured[:, None]
    shown = {
        name: may_show[:, k]
        for k, ((name, role), images) in enumerate(zip(survey.of.regions, _with_region(survey), strict=True))
        if role is not None and images >= least
    }
    groups = [("", np.ones(len(labels), dtype=np.bool_))]
    for a, (attribute, values) in enumerate(survey.of.attributes):
        codes = _codes(survey, a)
        groups += [(f"{attribute} = {value}", codes == v) for v, value in enumerate(values)]
    for group, of_group in groups:
        for c, class_name in enumerate(survey.of.classes):
            members = of_group & (labels == c)
            with_region = {name: int((members & has).sum()) for name, has in shown.items()}
            region = min(with_region, key=lambda name: with_region[name], default="")
            yield _Cell(class_name, group, int(members.sum()), region, with_region.get(region, 0))


def _half_width(n: int) -> str:
    """How far a share's 95 % interval (Wilson) of `n` images reaches to each side where it is widest, at one half."""
    if n == 0:
        return "nothing known"
    _, low, high = wilson(n / 2, n)
    return f"±{(high - low) / 2:.2f}"


def _agreement(survey: Survey, limits: Limits) -> Found:
    annotators = survey.of.annotators
    if not annotators:
        return Found(State.SKIPPED, "No image has a second annotator: name another's annotations with --other.")
    by_region: defaultdict[str, list[Agreement]] = defaultdict(list)
    for one in survey.agreements:
        by_region[one.region].append(one)
    rows, low, open_, flags = [], [], [], []
    for region, those in by_region.items():
        measured = [one for one in those if one.iou is not None]
        value, lower, upper, n = _mean_by_image(measured)
        alone = sum(bool(one.only) for one in those)
        outliers = [(one.iou or 0.0, one) for one in measured if (one.iou or 0.0) < LEAST_IOU and not one.only]
        told = _interval(value, lower, upper, n)
        rows.append((region, told, str(n), str(len(outliers)), str(alone)))
        if n and upper < LEAST_IOU:
            low.append(f"{region} {told}")
        elif n < limits.min_samples or lower < LEAST_IOU:
            open_.append(f"{region} {told} of {_images(n)}")
        flags += [(iou, Flag(one.index, region, f"{region}: IoU {iou:.2f}")) for iou, one in outliers]
        flags += [(-1.0, Flag(one.index, region, f"{region}: only {one.only} drew it")) for one in those if one.only]
    of = ("region", "mean IoU [95 % interval]", "n", f"IoU below {LEAST_IOU}", "drawn by one only")
    table, ordered = Table(of, tuple(rows), 4), tuple(flag for _, flag in sorted(flags, key=lambda pair: pair[0]))
    single = [
        Flag(index, "", f"annotated by {by[0]} only")
        for index, item in enumerate(survey.of.items)
        if len(by := [one.name for one in annotators if item.file in one.files]) == 1
    ]
    elsewhere = frozenset[str]().union(*(one.files for one in annotators)) - {item.file for item in survey.of.items}
    once = len(single) + len(elsewhere)
    rest = f" {_images(once)} only one of them annotated." if once else ""
    listed = (*ordered, *single)
    who = f"{len(annotators)} annotators"
    if low:
        told = "; ".join(low)
        return Found(State.VIOLATED, f"{who} do not mean the same, mean IoU: {told}.{rest}", table, listed)
    if open_ or not rows:
        told = "; ".join(open_) if rows else "nothing that two of them drew"
        few = f"{who}: too few images, or too far apart, to say that they mean the same, mean IoU: {told}.{rest}"
        return Found(State.INCONCLUSIVE, few, table, listed)
    told = "; ".join(f"{row[0]} {row[1]}" for row in rows)
    state = State.WARNING if ordered else State.HELD
    doubtful = f"; {len(ordered)} {'outline is' if len(ordered) == 1 else 'outlines are'} in doubt" if ordered else ""
    return Found(state, f"{who} agree, mean IoU: {told}{doubtful}.{rest}", table, listed)


def _mean_by_image(measured: Sequence[Agreement]) -> tuple[float, float, float, int]:
    """The mean over images of each image's mean IoU, its 95 % interval, and how many images it is of."""
    by_image: defaultdict[int, list[float]] = defaultdict(list)
    for one in measured:
        if one.iou is not None:
            by_image[one.index].append(one.iou)
    n = len(by_image)
    if n == 0:
        return np.nan, np.nan, np.nan, 0
    values = np.array([[np.mean(ious)] for ious in by_image.values()])
    value, low, high = bootstrap_ratios(values, np.ones_like(values), np.zeros(n), seed=0)
    # All alike, or one: nothing that is drawn from them varies, and that is not certainty.
    if n == 1:
        return float(value[0]), 0.0, 1.0, n
    return float(value[0]), max(0.0, float(low[0])), min(1.0, float(high[0])), n


def _with_region(survey: Survey) -> npt.NDArray[np.int64]:
    """How many images have each region, `(R,)`."""
    count: npt.NDArray[np.int64] = (~np.isnan(survey.areas)).sum(axis=0)
    return count


def _labels(survey: Survey) -> npt.NDArray[np.int64]:
    return np.array([-1 if item.label is None else item.label for item in survey.of.items], dtype=np.int64)


def _codes(survey: Survey, attribute: int) -> npt.NDArray[np.int64]:
    """The place of each image's value among those of the attribute, -1 where it has none."""
    values = np.array([item.attributes[attribute] for item in survey.of.items], dtype=np.str_)
    return codes_of(values, survey.of.attributes[attribute][1])


def _roleless(survey: Survey) -> str:
    return "." if survey.of.classes else ": roles are not known. Give the YAML of an audit set."


def _no_attributes(survey: Survey) -> str:
    if survey.of.classes:
        return "The audit set has no attributes."
    return "Attributes are not known: give the YAML of an audit set."


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"


def _of(count: int, survey: Survey) -> str:
    return f"{count} of {_images(len(survey.of.items))}"


def _percent(value: float) -> str:
    """A share in percent; small ones with a digit more."""
    return f"{100 * value:.{1 if abs(value) < 0.0995 else 0}f} %"


def _interval(value: float, low: float, high: float, n: int) -> str:
    if n == 0:
        return "–"
    return f"{value:.3f}" if n == 1 else f"{value:.3f} [{low:.3f}, {high:.3f}]".replace("-", "−")


CHECKS: tuple[Check, ...] = (
    Check("sizes", "Regions have the size of their image", _sizes),
    Check("unannotated", "Every image has a region", _unannotated),
    Check("coverage", "How many images have each region", _coverage),
    Check("extent", "No region is empty or the whole image", _extent),
    Check("overlap", "Object and spurious regions lie apart", _overlaps),
    Check("area-class", "Areas do not differ by class", _areas_by_class),
    Check("area-attribute", "Areas do not differ by attribute", _areas_by_attribute),
    Check("cells", "Every cell of label x attribute has enough images", _cells),
    Check("agreement", "Annotators agree", _agreement),
)

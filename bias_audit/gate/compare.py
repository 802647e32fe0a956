"""Two runs side by side: which verdicts and which numbers changed, and how sure that is.

Enters: two `Run`s, A and B. Leaves: a `Comparison` of their last audits: `VerdictChange`s and `Difference`s, B less A.

Where both audited the same images, differences are of the same images: what is hard about an image is hard for both
models and cancels. Neither torch nor Lightning is imported here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from bias_audit.evidence.cells import cells
from bias_audit.gate.columns import SampleColumns
from bias_audit.gate.pairing import Key, paired_changes, unpaired_change
from bias_audit.multiplicity import exceedance_p, holm
from bias_audit.records.history import Change
from bias_audit.records.results import AuditSummary
from bias_audit.records.runs import Run
from bias_audit.records.samples import SampleSheet
from bias_audit.terms import (
    ASSOCIATION_METRICS,
    EXPLAINER_METRICS,
    GROUP_METRICS,
    INTERVENTION_METRICS,
    OWN,
    REGION_METRICS,
    Estimate,
)
from bias_audit.verdicts.findings import Finding
from bias_audit.wording import readable

# Coverage, controls and other fills say whether numbers are sound; that one of them changed answers no question.
_NOT_ASKED = {"coverage", "control_effect", "control_score", "control_margin", "control_flips"} | {
    "fill_flips",
    "fill_control_flips",
}
QUESTIONS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Where does the model look?", REGION_METRICS),
    ("Does the decision depend on it?", INTERVENTION_METRICS),
    ("For whom is it wrong?", GROUP_METRICS),
    ("Do attribute and label go together?", ASSOCIATION_METRICS),
    ("Are the explanations fit?", EXPLAINER_METRICS),
)
_ORDER = {metric: i for i, metric in enumerate(m for _, metrics in QUESTIONS for m in metrics if m not in _NOT_ASKED)}
_OF_MAPS = {*REGION_METRICS, *EXPLAINER_METRICS, "wrong_reason_rate"}


@dataclass(frozen=True)
class Side:
    """One of the two runs, and its last audit of a trained model: `index` counts the run's audits."""

    run: Run
    audit: AuditSummary
    index: int


@dataclass(frozen=True)
class VerdictChange:
    """What is said of one region or attribute in A and in B; None where a run does not judge it."""

    kind: Literal["region", "attribute"]
    name: str
    before: Finding | None
    after: Finding | None

    @property
    def changed(self) -> bool:
        """Whether both judge it, and differently."""
        return self.before is not None and self.after is not None and self.before.verdict != self.after.verdict


@dataclass(frozen=True)
class Difference:
    """One estimate in A and in B, and B less A with its 95 % interval.

    `pairs` is the number of images that both measured and `change` is of, None where it is made from the two intervals.
    `state` is "changed" where it stands after Holm's correction for all differences, "uncertain" where the interval
    excludes 0 and no more, "open" where it does not or where there are too few images, "unknown" where one of the two
    was not measured.
    """

    before: Estimate
    after: Estimate
    change: Change
    pairs: int | None
    state: Literal["changed", "uncertain", "open", "unknown"]

    @property
    def subject(self) -> str:
        """What differs, as a person reads it."""
        return readable(self.before.subject)


@dataclass(frozen=True)
class Comparison:
    """Run B less run A: verdicts, differences in the order of `QUESTIONS`, and what the two do not share.

    `shared` are the ids of the images that are the same in both. `same_maps` says whether their heatmaps explain the
    same thing. `tested` differences were corrected together.
    """

    a: Side
    b: Side
    verdicts: tuple[VerdictChange, ...]
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]
    shared: tuple[str, ...]
    same_maps: bool
    tested: int

    def of(self, state: Literal["changed", "uncertain", "open", "unknown"]) -> tuple[Difference, ...]:
        """The differences in this state."""
        return tuple(d for d in self.differences if d.state == state)

    def __str__(self) -> str:
        changed, uncertain = len(self.of("changed")), len(self.of("uncertain"))
        if not self.tested:
            return "No difference rests on as many images as the policies ask for, so nothing is shown to have changed."
        false = ": the chance that any of them is false is below 5 %" if changed else ""
        return (
            f"Of {self.tested} differences {changed or 'none'} stand{'' if changed > 1 else 's'} after Holm's "
            f"correction{false}. {uncertain or 'No'} more {'has' if uncertain < 2 else 'have'} a 95 % interval without "
            f"0; by chance alone about {self.tested / 20:.0f} of all would."
        )


def compare_runs(a: Run, b: Run) -> Comparison:
    """What changed from run A to run B, each at its last audit of a trained model.

    An image counts as the same where the data's fingerprints are equal, or where its id, label, attributes and
    thumbnail are. Shares, enrichment, hits, accuracy and what a removal does are then compared image by image,
    drawn with replacement within class x attribute value as the audit does. This is done for an estimate that at
    least half of its images are shared for. All other differences are made from the two intervals, as if the images
    were others, which makes them rather too wide where they are the same.

    Differences of fewer images than either policy's `min_samples` are given, and never count as changed.

    Raises:
        ValueError: a run has no audit of a trained model.
        RecordError: samples or arrays cannot be read.

    Example:
        >>> from bias_audit.records.runs import read_run
        >>> print(compare_runs(read_run("runs/biased"), read_run("runs/balanced")))  # doctest: +SKIP
        Of 84 differences 31 stand after Holm's correction: ...
    """
    before, after = _side(a), _side(b)
    sheet_a, sheet_b = a.sheet(), b.sheet()
    same_data = (a.manifest.fingerprint, sheet_a.ids) == (b.manifest.fingerprint, sheet_b.ids)
    shared = _shared(before, after, sheet_a, sheet_b, same_data)
    unlike = [name for name in ("layer", "target", "sign") if getattr(a.manifest, name) != getattr(b.manifest, name)]
    left_out = {m for m in _ORDER if same_data and m.startswith("audit_")} | (_OF_MAPS if unlike else set())
    of_a, of_b = ({e.key: e for e in side.audit.estimates if _asked(e, left_out)} for side in (before, after))
    both = sorted((key for key in of_a if key in of_b), key=_rank)
    paired = _paired(before, after, sheet_a, shared, [(of_a[key], of_b[key]) for key in both])
    found = [_difference(of_a[key], of_b[key], paired.get(key)) for key in both]
    least = max(a.manifest.policy.min_samples, b.manifest.policy.min_samples)
    differences, tested = _corrected(found, least)
    return Comparison(
        before,
        after,
        _verdicts(before.audit, after.audit),
        differences,
        tuple(_notes(before, after, shared, same_data, unlike, of_a, of_b)),
        shared,
        not unlike,
        tested,
    )


def _side(run: Run) -> Side:
    if not run.trained:
        raise ValueError(f"{run.path}: no audit of a trained model was recorded, so there is nothing to compare")
    return Side(run, run.audits[run.trained[-1]], run.trained[-1])


def _shared(a: Side, b: Side, sheet_a: SampleSheet, sheet_b: SampleSheet, same_data: bool) -> tuple[str, ...]:
    """Ids of the images that are known to be the same in both, in the order of A."""
    if same_data:
        return sheet_a.ids
    if not (a.run.manifest.thumbnails and b.run.manifest.thumbnails):
        # Outlines do not say whether the images within them are the same.
        return ()
    names_a, names_b = (side.run.manifest.subjects.classes for side in (a, b))
    columns_a, columns_b = ([name for name, _ in side.run.manifest.subjects.attributes] for side in (a, b))
    both = [(columns_a.index(name), columns_b.index(name)) for name in columns_a if name in columns_b]
    place = {name: i for i, name in enumerate(sheet_b.ids)}
    return tuple(
        name
        for i, name in enumerate(sheet_a.ids)
        if name in place
        and names_a[sheet_a.labels[i]] == names_b[sheet_b.labels[place[name]]]
        and sheet_a.thumbnails[i] == sheet_b.thumbnails[place[name]]
        # The estimates of a group would else be of other images.
        and all(sheet_a.attributes[i, k] == sheet_b.attributes[place[name], m] for k, m in both)
    )


def _asked(e: Estimate, left_out: set[str]) -> bool:
    own = e.metric.startswith(OWN) and not (left_out & _OF_MAPS and e.method is not None)
    return own or (e.metric in _ORDER and e.metric not in left_out)


def _rank(key: Key) -> tuple[int, int]:
    """By question and metric; of one metric first what is over all images, then by class or group, then by both."""
    metric, _, class_name, group, _ = key
    return _ORDER.get(metric, len(_ORDER)), (class_name is not None) + (group is not None)


def _paired(
    a: Side, b: Side, sheet: SampleSheet, shared: tuple[str, ...], estimates: Sequence[tuple[Estimate, Estimate]]
) -> dict[Key, tuple[Change, int]]:
    if not shared or not all(side.run.has_scores(side.index) for side in (a, b)):
        return {}
    before, after = (SampleColumns.of_run(side.run, side.index) for side in (a, b))
    place = {name: i for i, name in enumerate(sheet.ids)}
    rows = [place[name] for name in shared]
    of_shared = cells(sheet.labels[rows], sheet.attributes[rows], a.run.manifest.subjects)
    return paired_changes(before, after, shared, of_shared, estimates, seed=a.run.manifest.seed)


def _difference(before: Estimate, after: Estimate, paired: tuple[Change, int] | None) -> Difference:
    unmeasured = next((f"{side}: {e}" for side, e in (("A", before), ("B", after)) if not e.measured), None)
    if unmeasured is not None:
        return Difference(before, after, Change(None, None, None, unmeasured), None, "unknown")
    if paired is None:
        return Difference(before, after, unpaired_change(before, after), None, "open")
    return Difference(before, after, *paired, "open")


def _corrected(found: Sequence[Difference], least: int) -> tuple[tuple[Difference, ...], int]:
    """The differences with their state, and how many were corrected together."""
    tested = [i for i, d in enumerate(found) if d.state != "unknown" and _count(d) >= least]
    beyond = {i for i in tested if found[i].change.direction in ("up", "down")}
    stands = {i for i, p in zip(tested, holm([_p(found[i].change) for i in tested]), strict=True) if p < 0.05}
    states = tuple(
        replace(d, state="changed" if i in stands else "uncertain" if i in beyond else d.state)
        for i, d in enumerate(found)
    )
    return states, len(tested)


def _count(d: Difference) -> int:
    return min(d.before.n, d.after.n) if d.pairs is None else d.pairs


def _p(change: Change) -> float:
    """Two-sided p-value of no difference."""
    assert change.value is not None and change.low is not None and change.high is not None
    if change.value < 0:
        return min(1.0, 2 * exceedance_p(-change.value, -change.high, 0.0))
    return min(1.0, 2 * exceedance_p(change.value, change.low, 0.0))


def _verdicts(a: AuditSummary, b: AuditSummary) -> tuple[VerdictChange, ...]:
    of_a, of_b = ({(f.kind, f.name): f for f in audit.judgement.findings} for audit in (a, b))
    return tuple(
        VerdictChange(kind, name, of_a.get((kind, name)), of_b.get((kind, name)))
        for kind, name in dict.fromkeys((*of_a, *of_b))
    )


def _notes(
    a: Side,
    b: Side,
    shared: tuple[str, ...],
    same_data: bool,
    unlike: Sequence[str],
    of_a: dict[Key, Estimate],
    of_b: dict[Key, Estimate],
) -> Iterator[str]:
    """What a reader must know of the two runs, in sentences."""
    first, second = a.run.manifest, b.run.manifest
    if same_data:
        yield f"Both runs audited the same {first.samples_audited} images."
    elif shared:
        yield (
            f"The audited data differ. {len(shared)} images are the same in both, of {first.samples_audited} in A and "
            f"{second.samples_audited} in B."
        )
    elif first.thumbnails and second.thumbnails:
        yield "The audited data differ, and no image is the same in both: all differences are of different images."
    else:
        yield (
            "The audited data differ, and not both runs hold pictures, so that which images are the same is not known: "
            "all differences are taken as of different images."
        )
    for name in unlike:
        its_a, its_b = getattr(first, name), getattr(second, name)
        yield f"The {name} differs: {its_a} in A, {its_b} in B. Heatmaps are not compared."
    for what, one, other in (
        ("model", first.model, second.model),
        ("audited weights", a.audit.weights, b.audit.weights),
    ):
        if one != other:
            yield f"The {what} differ{'s' if what == 'model' else ''}: {one} in A, {other} in B."
    if first.policy != second.policy:
        yield "The policies differ, and each verdict is by its own run's policy."
    yield from _only(a, b)
    for caveat in dict.fromkeys((*first.caveats.values(), *second.caveats.values())):
        whose = [letter for letter, manifest in (("A", first), ("B", second)) if caveat in manifest.caveats.values()]
        yield f"In {' and '.join(whose)} {caveat}"
    for letter, side in (("A", a), ("B", b)):
        run = side.run
        yield from (f"{letter}: {reason}." for reason in run.unfinished)
        if not run.has_scores(side.index):
            yield f"{letter}: the scores of this audit were dropped, so nothing is compared image by image."
    for letter, its, others in (("A", of_a, of_b), ("B", of_b, of_a)):
        names = list(dict.fromkeys(readable(key[0]) for key in its if key not in others))
        count = sum(key not in others for key in its)
        if names:
            more = f" and {len(names) - 6} more" if len(names) > 6 else ""
            yield f"{count} estimates are in {letter} only, and not compared: {', '.join(names[:6])}{more}."


def _only(a: Side, b: Side) -> Iterator[str]:
    """Regions, attributes, classes and methods that only one run has."""

    def names(side: Side) -> tuple[tuple[str, tuple[str, ...]], ...]:
        manifest = side.run.manifest
        return (
            ("region", tuple(f"{name} ({role})" for name, role in manifest.subjects.regions)),
            ("attribute", tuple(name for name, _ in manifest.subjects.attributes)),
            ("class", manifest.subjects.classes),
            ("method", manifest.methods),
        )

    for (kind, of_a), (_, of_b) in zip(names(a), names(b), strict=True):
        for letter, one, other in (("A", of_a, of_b), ("B", of_b, of_a)):
            if alone := [name for name in one if name not in other]:
                yield f"Only {letter} has the {kind} {', '.join(alone)}."

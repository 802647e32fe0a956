"""What a model must not be worse than: the last audit of another run, kept in one file.

Enters: a `Run` that training ended well, or the path of a baseline. Leaves: a `Baseline`; of another run beside it a
`Regression` for each estimate that a rule's `max_regression` is about.

The file is text, for a reader of a pull request: a line with the checksum of all that follows, a line on what was
audited, a line for each estimate, and a last line with what image-by-image comparison needs. It holds neither heatmaps
nor pictures, no time of writing and no path; of the same run it has the same bytes.

NumPy is imported only where images are compared: the gate imports this module and must start in a blink.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from bias_audit.findings import explainers
from bias_audit.policies.policy import Policy, Rule
from bias_audit.records.arrays import load_npz, npz_bytes
from bias_audit.records.history import Change
from bias_audit.records.results import AuditSummary, RecordError
from bias_audit.records.runs import Run, read_run, write_whole
from bias_audit.terms import Estimate, Outcome, Subjects, is_of_maps
from bias_audit.verdict import Check, matched

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from bias_audit.gate.pairing import Key, SampleColumns

FILE = "bias-audit-baseline.jsonl"
MAGIC = "bias_audit_baseline"
VERSION = 1


class About(BaseModel):
    """Of which run, model, data and audit a baseline is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run_id: str
    tool: str
    model: str
    layer: str
    methods: tuple[str, ...]
    target: str
    sign: str
    subjects: Subjects
    fingerprint: str
    samples_audited: int
    seed: int
    step: int
    weights: str
    audited: str


@dataclass(frozen=True)
class BaselineSamples:
    """The baseline's images: class indices `(N,)`, attribute values as text `(N, A)`, and what each adds to what."""

    labels: npt.NDArray[np.int64]
    attributes: npt.NDArray[np.str_]
    columns: SampleColumns


@dataclass(frozen=True)
class Baseline:
    """An audit that later ones are compared with; `source` is the path it was read from."""

    source: Path
    about: About
    estimates: tuple[Estimate, ...]
    _samples: Callable[[], BaselineSamples]

    @cached_property
    def samples(self) -> BaselineSamples:
        """Its images.

        Raises:
            RecordError: they cannot be read.
        """
        return self._samples()

    @classmethod
    def of_run(cls, run: Run) -> Baseline:
        """The last audit of a trained model in a run that ended well. Whether it holds any policy is not asked.

        Raises:
            RecordError: training broke off or goes on, the last record was cut off, an audit failed, or there is none
                of a trained model.
        """
        wrong = run.failed
        if not wrong and run.torn:
            wrong = "the last record was cut off while it was written"
        if not wrong and not run.ended:
            wrong = "training has not finished, or was killed"
        trained = [i for i, audit in enumerate(run.audits) if audit.trigger != "reference"]
        count = run.samples(trained[-1]) if trained else None
        if not wrong and count is not None and count < run.manifest.samples_audited:
            wrong = f"its last audit is partial: it holds {count} of {run.manifest.samples_audited} samples"
        if not wrong and not any(e.measured for i in trained[-1:] for e in run.audits[i].estimates):
            wrong = "no audit of a trained model measured anything"
        if wrong:
            raise RecordError(f"{run.path}: cannot be a baseline: {wrong}")
        audit = run.audits[trained[-1]]
        kept = {name: getattr(run.manifest, name) for name in About.model_fields if hasattr(run.manifest, name)}
        about = About(**kept, step=audit.step, weights=audit.weights, audited=audit.created)
        return cls(run.path, about, audit.estimates, partial(_samples_of_run, run, trained[-1]))

    def beside(self, run: Run, policy: Policy) -> Beside:
        """The baseline and a run that is judged by `policy`.

        Raises:
            ValueError: the run audited another data set, layer or method; the message names each difference.

        Example:
            >>> from bias_audit.records.runs import read_run
            >>> policy = Policy.load("audit.yaml")  # doctest: +SKIP
            >>> beside = read_baseline("main.jsonl").beside(read_run("runs/today"), policy)  # doctest: +SKIP
            >>> [str(found) for found in beside.regressions(policy.rules[0], -1)]  # doctest: +SKIP
            ['enrichment on hair (gradcam): ...']
        """
        unlike = list(_differences(self.about, run))
        if unlike:
            raise ValueError(
                f"baseline {self.source}: is of another audit than {run.path}: {'; '.join(unlike)}: compare with a "
                "baseline of the same, or make a new one by `bias-audit baseline update`"
            )
        return Beside(self, run, policy)


@dataclass(frozen=True)
class Regression:
    """One estimate of a rule with `max_regression`, and by how much it is worse than in the baseline.

    `now` and `before` are None where one of the two audits has no such estimate. `worse` is positive for the worse, in
    the unit of the metric. `pairs` is the number of images that it is of, None where it is made from the two intervals.
    """

    rule: Rule
    now: Estimate | None
    before: Estimate | None
    worse: Change
    pairs: int | None

    @property
    def n(self) -> int:
        """How many images it rests on."""
        if self.now is None or self.before is None:
            return 0
        return min(self.now.n, self.before.n) if self.pairs is None else self.pairs

    @property
    def subject(self) -> str:
        """What is compared, as a person reads it."""
        e = self.now or self.before
        return f"{e.subject if e is not None else self.rule.title}, change from the baseline"

    def check(self, least: int) -> Check:
        """Violated only if the whole interval lies beyond `max_regression`, held only if it lies within.

        Args:
            least: images below which nothing is concluded.
        """
        limit, worse = self.rule.max_regression, self.worse
        assert limit is not None
        if worse.value is None or worse.low is None or worse.high is None:
            outcome, why = Outcome.INCONCLUSIVE, worse.reason
        elif self.n < least:
            outcome, why = Outcome.INCONCLUSIVE, f"fewer images than min_samples = {least}"
        else:
            low, high = (worse.value, worse.value) if self.rule.on == "point" else (worse.low, worse.high)
            if low > limit:
                outcome, why = Outcome.VIOLATED, f"beyond max_regression {limit:g}"
            elif high > limit:
                outcome, why = Outcome.INCONCLUSIVE, f"the interval reaches beyond max_regression {limit:g}"
            else:
                outcome, why = Outcome.HELD, f"within max_regression {limit:g}"
        return Check(self.rule.title, self.subject, outcome, self.rule.severity, f"{self}; {why}", self.now, limit)

    def __str__(self) -> str:
        now = self.now if self.now is not None else f"{self.before and self.before.subject}: not recorded in this audit"
        before = "nothing" if self.before is None else _numbers(self.before)
        if self.worse.value is None:
            return f"{now}; in the baseline {before}"
        how = f"n = {self.pairs}, image by image" if self.pairs is not None else "from the two intervals"
        # Better is said as it is read: by so much, from so much to so much.
        sign, word = (-1, "better") if self.worse.value < 0 else (1, "worse")
        low, high = sorted((sign * (self.worse.low or 0.0), sign * (self.worse.high or 0.0)))
        return (
            f"{now}; in the baseline {before}; {word} by {sign * self.worse.value:.3f} [{low:.3f}, {high:.3f}] ({how})"
        )


def _numbers(e: Estimate) -> str:
    if not e.measured:
        return f"not measured ({e.reason or 'no valid image'})"
    return f"{e.value:.3f} [{e.low:.3f}, {e.high:.3f}], n = {e.n}"


class Beside:
    """A baseline and a run of the same data set, layer and methods: see `Baseline.beside`."""

    def __init__(self, baseline: Baseline, run: Run, policy: Policy) -> None:
        self.baseline, self.run, self.policy = baseline, run, policy
        self._paired: dict[int, dict[Key, tuple[Change, int]]] = {}

    def regressions(self, rule: Rule, index: int) -> tuple[Regression, ...]:
        """How each estimate that `rule` is about changed for the worse, at the run's audit `index`; -1 is the last.

        Image by image where both audits measured at least half of the images that the estimate is of; else from the two
        intervals, as if the images were others. An estimate of an explanation method that is not fit, here or in the
        baseline, says nothing; where another method speaks of the same it is left out, unless the rule asks for it.

        Raises:
            RecordError: the run's arrays or the baseline's samples cannot be read.
        """
        if rule.max_regression is None:
            return ()
        index %= len(self.run.audits)
        audit = self.run.audits[index]
        doubts = self._doubts(audit) if is_of_maps(rule.metric) else {}
        unfit = {method for method, (fit, _) in doubts.items() if fit is False}
        both = self._both(rule, audit)
        heard = {_place(e) for now, before in both if (e := now or before) is not None and e.method not in unfit}
        found = []
        for now, before in both:
            e = now or before
            if e is not None and e.method in unfit and rule.method is None and _place(e) in heard:
                continue
            doubt = doubts[e.method][1] if e is not None and e.method in doubts else ""
            found.append(self._regression(rule, index, now, before, doubt))
        return tuple(found)

    def _both(self, rule: Rule, audit: AuditSummary) -> list[_Pair]:
        """The estimates that a rule is about, beside the baseline's; one pair of nothing where there are none."""
        subjects = self.run.manifest.subjects
        before = {e.key: e for e in matched(rule, self.baseline.estimates, subjects)}
        now = {e.key: e for e in matched(rule, audit.estimates, subjects)}
        return [(now.get(key), before.get(key)) for key in dict.fromkeys((*now, *before))] or [(None, None)]

    def _doubts(self, audit: AuditSummary) -> dict[str | None, tuple[bool | None, str]]:
        """The explanation methods that are not shown to be fit, here or in the baseline, and why."""
        found: dict[str | None, tuple[bool | None, str]] = {}
        for where, estimates in (("in the baseline ", self.baseline.estimates), ("", audit.estimates)):
            for x in explainers(estimates, self.policy):
                # What is unfit in one of the two is unfit.
                if not x.fit and found.get(x.method, (None,))[0] is not False:
                    found[x.method] = (x.fit, f"{where}{x.doubt}")
        return found

    def _regression(
        self, rule: Rule, index: int, now: Estimate | None, before: Estimate | None, doubt: str
    ) -> Regression:
        if now is None or before is None:
            lacks = [where for where, e in (("this audit", now), ("the baseline", before)) if e is None]
            reason = f"{' and '.join(lacks)} {'has' if len(lacks) == 1 else 'have'} no such estimate"
        elif not now.measured or not before.measured:
            reason = "nothing to compare"
        else:
            reason = doubt
        if reason or now is None or before is None:
            return Regression(rule, now, before, Change(None, None, None, reason), None)
        from bias_audit.gate.pairing import unpaired_change

        paired = self._changes(index).get(now.key)
        change, pairs = (unpaired_change(before, now), None) if paired is None else paired
        return Regression(rule, now, before, _for_the_worse(change, rule), pairs)

    def _changes(self, index: int) -> dict[Key, tuple[Change, int]]:
        """Of all rules with `max_regression`, what can be compared image by image: drawn once, and together."""
        if index not in self._paired:
            from bias_audit.evidence.cells import cells
            from bias_audit.gate.pairing import SampleColumns, group_changes, paired_changes

            rules = [rule for rule in self.policy.rules if rule.max_regression is not None]
            both = dict.fromkeys(pair for rule in rules for pair in self._both(rule, self.run.audits[index]))
            estimates = [(before, now) for now, before in both if now is not None and before is not None]
            samples, columns = self.baseline.samples, SampleColumns.of_run(self.run, index)
            there = set(columns.ids)
            rows = [i for i, name in enumerate(samples.columns.ids) if name in there]
            shared = [samples.columns.ids[i] for i in rows]
            of_shared = list(cells(samples.labels[rows], samples.attributes[rows], self.baseline.about.subjects))
            asked = samples.columns, columns, shared, of_shared, estimates
            self._paired[index] = paired_changes(*asked, seed=self.baseline.about.seed) | group_changes(*asked)
        return self._paired[index]


_Pair = tuple[Estimate | None, Estimate | None]


def _place(e: Estimate) -> tuple[str | None, str | None, str | None]:
    return e.region, e.class_name, e.group


def _for_the_worse(change: Change, rule: Rule) -> Change:
    if rule.op in ("<", "<=") or change.value is None or change.low is None or change.high is None:
        return change
    # Not -0.0, which would be printed.
    return Change(0.0 - change.value, 0.0 - change.high, 0.0 - change.low)


def _differences(about: About, run: Run) -> Iterator[str]:
    """What the run audited otherwise than the baseline, in words."""
    manifest = run.manifest
    subjects = about.subjects, manifest.subjects
    known = [
        ("regions", *(", ".join(f"{name} ({role})" for name, role in its.regions) for its in subjects)),
        ("classes", *(", ".join(its.classes) for its in subjects)),
        ("attributes", *(", ".join(f"{a} ({', '.join(values)})" for a, values in its.attributes) for its in subjects)),
        ("fingerprint of the data", about.fingerprint, manifest.fingerprint),
        ("layer", about.layer, manifest.layer),
        ("methods", *(", ".join(sorted(methods)) for methods in (about.methods, manifest.methods))),
        ("target", about.target, manifest.target),
        ("sign", about.sign, manifest.sign),
    ]
    for name, old, new in known:
        if old != new:
            counts = ""
            if name.startswith("fingerprint"):
                counts = f" (it is of {about.samples_audited} images, this run of {manifest.samples_audited})"
            yield f"its {name}: {old or 'none'}, this run's: {new or 'none'}{counts}"


def read_baseline(source: str | Path) -> Baseline:
    """The baseline in a file, or the last audit of a run directory.

    Raises:
        RecordError: there is no such file or directory, or it cannot be a baseline; a file that `bias-audit baseline
            update` did not write is none, nor one that was changed since.
    """
    path = Path(source)
    if path.is_dir():
        return Baseline.of_run(read_run(path))
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RecordError(
            f"baseline {path}: cannot be read ({error.strerror}): name a run directory, or a file that "
            "`bias-audit baseline update RUN_DIR` wrote"
        ) from error
    # Git may write other line ends on some systems; none stands inside a line.
    head, _, rest = content.replace(b"\r\n", b"\n").partition(b"\n")
    _check_head(path, head, rest)
    try:
        about, *middle, last = rest.splitlines()
        estimates = tuple(_ESTIMATE.validate_json(line) for line in middle)
        samples = base64.b64decode(json.loads(last)["samples"], validate=True)
        return Baseline(path, About.model_validate_json(about), estimates, partial(_unpacked, path, samples))
    except (ValidationError, ValueError, KeyError, TypeError, RecursionError, binascii.Error) as error:
        raise RecordError(f"baseline {path}: is not whole ({type(error).__name__}): {_ANEW}") from error


_ANEW = "make it anew by `bias-audit baseline update`"
_ESTIMATE: TypeAdapter[Estimate] = TypeAdapter(Estimate)


def _check_head(path: Path, head: bytes, rest: bytes) -> None:
    try:
        found = json.loads(head)
        version, digest = found[MAGIC], found["sha256"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RecordError(
            f"baseline {path}: is no baseline: name a run directory, or a file that `bias-audit baseline update "
            "RUN_DIR` wrote"
        ) from error
    if version != VERSION:
        raise RecordError(f"baseline {path}: has version {version!r}, this tool reads {VERSION}: {_ANEW}")
    if hashlib.sha256(rest).hexdigest() != digest:
        raise RecordError(
            f"baseline {path}, line 1: sha256: the checksum does not match what follows: it was edited or damaged: "
            f"restore it, or {_ANEW}"
        )


def write_baseline(baseline: Baseline, path: Path) -> int:
    """Write a baseline's file, whole or not at all; how many bytes it has.

    Raises:
        RecordError: there is a file that is no baseline; or the samples cannot be read.
        OSError: the file cannot be written.
    """
    if path.exists() and not _is_baseline(path):
        raise RecordError(f"{path}: is another file, no baseline: it is not written over: name another one")
    lines = [_line(baseline.about.model_dump(mode="json"))]
    lines += [_line(_without_defaults(e)) for e in baseline.estimates]
    lines.append(_line({"samples": base64.b64encode(_packed(baseline.samples)).decode()}))
    rest = b"".join(lines)
    content = _line({MAGIC: VERSION, "sha256": hashlib.sha256(rest).hexdigest()}) + rest
    write_whole(path, content)
    return len(content)


def _is_baseline(path: Path) -> bool:
    try:
        found = json.loads(path.read_bytes().partition(b"\n")[0])
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and MAGIC in found


def _line(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def _without_defaults(e: Estimate) -> dict[str, Any]:
    return {f.name: value for f in fields(e) if (value := getattr(e, f.name)) != f.default}


# As `BaselineSamples` and `SampleColumns` call them: names and arrays.
_NAMES = ("ids", "metrics", "methods", "regions", "effect_metrics")
_ARRAYS = ("correct", "areas", "values", "effects")


def _samples_of_run(run: Run, index: int) -> BaselineSamples:
    import numpy as np

    from bias_audit.gate.pairing import SampleColumns

    table, columns = run.sample_table(), SampleColumns.of_run(run, index)
    place = {name: i for i, name in enumerate(table.ids)}
    if not all(name in place for name in columns.ids):
        raise RecordError(f"{run.path}: its audit is of images that samples.npz does not have: record the run again")
    rows = np.array([place[name] for name in columns.ids], dtype=np.int64)
    return BaselineSamples(table.labels[rows], table.attributes[rows], columns)


def _packed(samples: BaselineSamples) -> bytes:
    columns = samples.columns
    kept = {name: getattr(columns, name) for name in (*_NAMES, *_ARRAYS)}
    return npz_bytes({"labels": samples.labels, "attributes": samples.attributes, **kept})


def _unpacked(path: Path, content: bytes) -> BaselineSamples:
    import numpy as np

    from bias_audit.gate.pairing import SampleColumns

    try:
        arrays = load_npz(path, content, ("labels", "attributes", *_NAMES, *_ARRAYS))
        names: dict[str, Any] = {name: tuple(str(x) for x in arrays[name]) for name in _NAMES}
        kept = names | {name: arrays[name] for name in _ARRAYS}
        columns = SampleColumns(**kept)
        n, r = len(columns.ids), len(columns.regions)
        shapes = [
            (arrays["labels"], (n,)),
            (arrays["attributes"], (n, arrays["attributes"].shape[-1])),
            (columns.correct, (n,)),
            (columns.areas, (n, r)),
            (columns.values, (len(columns.metrics), len(columns.methods), n, r)),
        ]
        if columns.effect_metrics:
            shapes.append((columns.effects, (len(columns.effect_metrics), n, columns.effects.shape[-1])))
        if any(array.shape != shape for array, shape in shapes):
            raise ValueError("arrays of the wrong shape")
        return BaselineSamples(arrays["labels"].astype(np.int64), arrays["attributes"].astype(np.str_), columns)
    except (ValueError, TypeError, IndexError) as error:
        raise RecordError(f"baseline {path}: its samples are not whole: {_ANEW}") from error

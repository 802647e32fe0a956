"""One model of the power study: audited, and judged by the audit and by two simpler rules.

Enters: a `Problem` and the folder of trained networks. Leaves: a `Record`, all that was measured, which is kept in the
folder, and a `Judged`, what each rule makes of it. Judging needs the record alone.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from benchmarks.families import CUE, Kind, Problem
from benchmarks.trained import Trained, Truth, file_name, fingerprint, trained
from bias_audit import AuditPlan, Policy, audit_model
from bias_audit.data.metadata import Metadata
from bias_audit.terms import Estimate, Subjects, Verdict
from bias_audit.verdicts.judgement import judge

# The naive rule: a cue is used if the heatmaps give its place more than this share of their energy.
NAIVE_SHARE = 0.5
AUDITED = 400


@dataclass(frozen=True)
class Record:
    """What was measured of one model: the truth, and the audit's estimates.

    `made_of` is the fingerprint of the network and its pictures; `seconds` the audit took.
    """

    family: str
    kind: Kind
    seed: int
    agreement: float
    strength: float
    made_of: str
    truth: Truth
    seconds: float
    subjects: Subjects
    estimates: tuple[Estimate, ...]


@dataclass(frozen=True)
class Judged:
    """What the rules say of one model, beside the truth.

    `region` and `attribute` are the audit's verdicts on the cue's place and on its value, `sentence` what it says of
    the place, `without_swaps` its verdict on the place had it no swapped pictures. `naive` and `gap` are the other
    rules', of which `share` and `difference` are the numbers.
    """

    family: str
    kind: Kind
    seed: int
    agreement: float
    strength: float
    truth: Truth
    seconds: float
    region: Verdict
    attribute: Verdict
    without_swaps: Verdict
    naive: Verdict
    gap: Verdict
    sentence: str
    share: Estimate
    difference: Estimate


@dataclass(frozen=True)
class Rule:
    """A rule that says of a model whether it uses the cue."""

    title: str
    says: Callable[[Judged], Verdict]


RULES = (
    Rule("the audit", lambda model: model.region),
    Rule("attention share > 0.5", lambda model: model.naive),
    Rule("accuracy gap alone", lambda model: model.gap),
)


def audited(problem: Problem, folder: Path, *, anew: bool = False) -> Record:
    """The record of a problem's network, from the folder where it is there and not wanted `anew`.

    The network is trained where it is not there.
    """
    path, kept = record_path(problem, folder), trained(problem, folder)
    if path.exists() and not anew:
        record = read(path)
        if record.made_of == fingerprint(problem):
            return record
    record = _audit(problem, kept)
    half = path.with_suffix(".half")
    half.write_bytes(gzip.compress(_RECORD.dump_json(record), mtime=0))
    half.replace(path)
    return record


def record_path(problem: Problem, folder: Path) -> Path:
    """Where the record of a problem is kept."""
    return folder / f"{file_name(problem)}.audit.json.gz"


def read(path: Path) -> Record:
    """A record that `audited` wrote.

    Raises:
        OSError: it cannot be read.
        pydantic.ValidationError: it is of another version.
    """
    return _RECORD.validate_json(gzip.decompress(path.read_bytes()))


def _audit(problem: Problem, kept: Trained) -> Record:
    """Audit a network as a user would who can draw the cue anew and has the training set's columns."""
    audit_set = problem.audit_set(AUDITED)
    labels, values = problem.columns()
    names = problem.family.values
    plan = AuditPlan(
        batch_size=100,
        max_samples=AUDITED,
        intervention_samples=AUDITED,
        swaps={CUE: problem.swap},
        seed=problem.seed,
    )
    training = Metadata.of(labels, {CUE: [names[value] for value in values]})
    result = audit_model(kept.network, audit_set, plan=plan, training=training)
    return Record(
        problem.family.name,
        problem.kind,
        problem.seed,
        problem.agreement,
        problem.strength,
        fingerprint(problem),
        kept.truth,
        result.seconds,
        audit_set.subjects,
        result.estimates,
    )


def judged(record: Record) -> Judged:
    """What the rules make of a record, under the default policy's tolerances."""
    policy = Policy()
    findings = {f.kind: f for f in judge(record.estimates, record.subjects, policy).findings}
    rest = [e for e in record.estimates if not e.metric.startswith("swap_")]
    others = {f.kind: f for f in judge(rest, record.subjects, policy).findings}
    share, difference = _share(record.estimates), _difference(record.estimates)
    return Judged(
        record.family,
        record.kind,
        record.seed,
        record.agreement,
        record.strength,
        record.truth,
        record.seconds,
        findings["region"].verdict,
        findings["attribute"].verdict,
        others["region"].verdict,
        by_share(share),
        by_gap(difference, policy.tolerance.accuracy_gap),
        findings["region"].sentence,
        share,
        difference,
    )


def by_share(share: Estimate) -> Verdict:
    """The naive rule: `reliance` where the mean share of the heatmap's energy in the cue's place is above one half.

    Example:
        >>> by_share(Estimate("energy_share", 0.6, 0.4, 0.7, 9)).value
        'reliance'
    """
    if share.value is None:
        return Verdict.INCONCLUSIVE
    return Verdict.RELIANCE if share.value > NAIVE_SHARE else Verdict.CLEARED


def by_gap(difference: Estimate, limit: float) -> Verdict:
    """The rule of the gap alone: `reliance` where the whole interval is above the limit, `cleared` where it is not.

    Example:
        >>> by_gap(Estimate("accuracy_gap", 0.2, 0.05, 0.3, 9), 0.1).value
        'inconclusive'
    """
    if difference.low is None or difference.high is None:
        return Verdict.INCONCLUSIVE
    if difference.low > limit:
        return Verdict.RELIANCE
    return Verdict.CLEARED if difference.high <= limit else Verdict.INCONCLUSIVE


def _share(estimates: Sequence[Estimate]) -> Estimate:
    return next(e for e in estimates if (e.metric, e.region, e.class_name, e.group, e.method) == _SHARE)


_SHARE = ("energy_share", CUE, None, None, "gradcam")


def _difference(estimates: Sequence[Estimate]) -> Estimate:
    """Accuracy where the cue goes with the class minus where it does not, or, where no value goes with a class, that
    of the best minus the worst value; over all classes."""
    gaps = {e.metric: e for e in estimates if e.metric.endswith("_gap") and e.group == CUE and e.class_name is None}
    aligned = gaps.get("alignment_gap")
    return aligned if aligned is not None and aligned.measured else gaps["accuracy_gap"]


_RECORD: TypeAdapter[Record] = TypeAdapter(Record)

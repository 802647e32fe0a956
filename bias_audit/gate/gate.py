"""Whether a merge may go ahead.

Enters: a `Run`, a `Policy`, and perhaps a baseline. Leaves: a `GateResult`: held only on evidence, and on any doubt
inconclusive.

NumPy is imported only where a rule is violated, to look up the images that weigh most, or compared with a baseline;
torch never is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from bias_audit.findings import Finding
from bias_audit.policies.file import PolicyFile, read_policy
from bias_audit.policies.policy import Policy, Rule
from bias_audit.records.history import Change, Onset, onsets
from bias_audit.records.results import AuditSummary, MissingEvidenceError
from bias_audit.records.runs import SAMPLES, Run, read_run
from bias_audit.terms import EXPLAINER_METRICS, Estimate, Outcome
from bias_audit.verdict import Check, Judgement, judge, least_samples, unrecorded

if TYPE_CHECKING:
    from bias_audit.gate.baseline import Baseline, Beside
    from bias_audit.gate.pairing import SampleColumns
    from bias_audit.gate.worst import WorstImages

FailOn = Literal["error", "warn"]
OnInconclusive = Literal["fail", "warn", "pass"]
# None: those that the run was recorded with.
Rules: TypeAlias = PolicyFile | Policy | str | Path | Mapping[str, Any] | None
EXIT_CODES = {Outcome.HELD: 0, Outcome.VIOLATED: 1, Outcome.INCONCLUSIVE: 3}
WORST = 5


@dataclass(frozen=True)
class GateCheck:
    """One rule on one subject, and what a person needs to act on it.

    `since` is the step of the audit from which on it has been violated without a break, None where it is not violated.
    `worst` are the ids of the images that weigh most in it, at most five, those first that weigh most. `line` is that
    of its rule in the policy's file. `finding` is what a rule on `verdict` is about. For a rule with `max_regression`,
    `baseline` is the estimate of the baseline, and `change` by how much it is worse now.
    """

    check: Check
    since: int | None = None
    worst: tuple[str, ...] = ()
    line: int | None = None
    finding: Finding | None = None
    baseline: Estimate | None = None
    change: Change | None = None


@dataclass(frozen=True)
class GateResult:
    """The outcome, what it rests on, and every reason for doubt.

    `audit` and `judgement` are the last of the trained model, None without one; `checks` may be of others, where a rule
    says so by `at`. `onsets` say since when the run's own policy saw each bias. `source` is what was judged, in the
    words of whoever asked.
    """

    outcome: Outcome
    source: str
    run_id: str | None
    policy: PolicyFile
    audit: AuditSummary | None
    judgement: Judgement | None
    checks: tuple[GateCheck, ...]
    doubts: tuple[str, ...]
    onsets: tuple[Onset, ...] = ()
    fail_on: FailOn = "error"
    on_inconclusive: OnInconclusive = "fail"
    exit_zero: bool = False

    @property
    def exit_code(self) -> int:
        """0 held, 1 violated, 3 inconclusive; 0 for these too where `exit_zero` or `on_inconclusive` say so."""
        if self.exit_zero or (self.outcome is Outcome.INCONCLUSIVE and self.on_inconclusive != "fail"):
            return 0
        return EXIT_CODES[self.outcome]

    def counts(self, check: Check) -> bool:
        """Whether the outcome hangs on this check: it is of severity `error`, or warnings fail too."""
        return check.severity == "error" or self.fail_on == "warn"


def run_gate(
    run: Run,
    policy: Rules = None,
    *,
    baseline: Baseline | None = None,
    checkpoint_step: int | None = None,
    fail_on: FailOn = "error",
    on_inconclusive: OnInconclusive = "fail",
    exit_zero: bool = False,
    source: str | None = None,
    doubts: Sequence[str] = (),
) -> GateResult:
    """Judge a run by `policy`, or by the policy it was recorded with.

    Each rule is judged at the audit that its `at` names. The audit before training is no evidence. A last record that
    was cut off, an audit that failed or holds a part of the samples, a training that did not end, and a checkpoint of
    another step than what is judged are doubts: they turn "held" into "inconclusive". What was measured at an earlier
    audit and carried on holds no rule.

    Args:
        baseline: what rules with `max_regression` are compared with; without one they are inconclusive.
        checkpoint_step: the step of the checkpoint that is to be merged, where there is one.
        fail_on: whether rules of severity `warn` decide as well.
        on_inconclusive, exit_zero: what `GateResult.exit_code` says.
        source: what is judged, for the reader; by default the run's path.
        doubts: what else there is to doubt.

    Raises:
        ValueError: the policy cannot be read, or names what the audit does not have; or the baseline is of another
            data set, layer or method.

    Example:
        >>> from bias_audit.records.runs import read_run
        >>> run_gate(read_run("runs/today"), {"rules": [...]}).exit_code  # doctest: +SKIP
        1
    """
    recorded = run.manifest.policy if policy is None else policy
    file = recorded if isinstance(recorded, PolicyFile) else read_policy(recorded)
    file.check_names(run.manifest.subjects, run.manifest.methods)
    judged = _Judged(run, file.policy)
    asked = _Asked(judged, None if baseline is None else baseline.beside(run, file.policy), checkpoint_step)
    # Without an audit there is one doubt, not one for each rule.
    made = tuple(asked.checks()) if judged.trained else ()
    found = (*doubts, *_doubts(judged, {index for _, index in made if index is not None}, checkpoint_step))
    checks = [_explained(judged, file, c, index, asked.beside) for c, index in made]
    last = judged.trained[-1] if judged.trained else None
    result = GateResult(
        Outcome.INCONCLUSIVE,
        str(run.path) if source is None else source,
        run.manifest.run_id,
        file,
        None if last is None else run.audits[last],
        None if last is None else judged.at(last),
        tuple(sorted(checks, key=_order)),
        found,
        onsets(run.audits),
        fail_on,
        on_inconclusive,
        exit_zero,
    )
    return replace(result, outcome=_outcome(result))


def judge_source(
    source: str,
    policy: Rules = None,
    *,
    opened: AbstractContextManager[Path] | None = None,
    baseline: str | Path | None = None,
    checkpoint: str | Path | None = None,
    trust_checkpoint: bool = False,
    fail_on: FailOn = "error",
    on_inconclusive: OnInconclusive = "fail",
    exit_zero: bool = False,
) -> GateResult:
    """Judge what is recorded at `source`: a run directory, or what else `sources.open_run` takes.

    Evidence that is not there at all is a doubt like any other.

    Args:
        opened: the run directory that was made of the source, where it is none by itself.
        baseline: a baseline's file, or a run directory.
        checkpoint: what is to be merged; `trust_checkpoint` unpickles objects of any kind in it.

    Raises:
        ValueError: as `run_gate`; or nothing has the name of the source, the records or the baseline are damaged, or
            the checkpoint cannot be read.
        OSError: something cannot be read.

    Example:
        >>> judge_source("runs/today", "audit.yaml", baseline="bias-audit-baseline.jsonl")  # doctest: +SKIP
    """
    from bias_audit.gate.baseline import read_baseline
    from bias_audit.gate.sources import checkpoint_step, open_run

    file = policy if isinstance(policy, PolicyFile) or policy is None else read_policy(policy)
    against = None if baseline is None else read_baseline(baseline)
    step, doubts = None, []
    if checkpoint is not None:
        try:
            step = checkpoint_step(checkpoint, trust_checkpoint)
        except MissingEvidenceError as error:
            doubts.append(str(error))
    try:
        with open_run(source) if opened is None else opened as path:
            run = read_run(path)
            if opened is not None and checkpoint is None and run.audits:
                # What was audited here and now is what is to be merged.
                step = run.audits[-1].step
            return run_gate(
                run,
                file,
                baseline=against,
                checkpoint_step=step,
                fail_on=fail_on,
                on_inconclusive=on_inconclusive,
                exit_zero=exit_zero,
                source=source,
                doubts=doubts,
            )
    except MissingEvidenceError as error:
        return no_evidence(
            source, str(error), file, fail_on=fail_on, on_inconclusive=on_inconclusive, exit_zero=exit_zero
        )


def no_evidence(
    source: str,
    reason: str,
    policy: Rules = None,
    *,
    fail_on: FailOn = "error",
    on_inconclusive: OnInconclusive = "fail",
    exit_zero: bool = False,
) -> GateResult:
    """What the gate says where there is nothing to judge.

    Raises:
        ValueError: the policy cannot be read.
    """
    file = policy if isinstance(policy, PolicyFile) else read_policy(policy)
    return GateResult(
        Outcome.INCONCLUSIVE,
        source,
        None,
        file,
        None,
        None,
        (),
        (reason,),
        fail_on=fail_on,
        on_inconclusive=on_inconclusive,
        exit_zero=exit_zero,
    )


def _outcome(result: GateResult) -> Outcome:
    outcomes = {c.check.outcome for c in result.checks if result.counts(c.check)}
    if Outcome.VIOLATED in outcomes:
        return Outcome.VIOLATED
    # A policy whose rules matched nothing has shown nothing.
    return Outcome.HELD if outcomes == {Outcome.HELD} and not result.doubts else Outcome.INCONCLUSIVE


_GRAVITY = {Outcome.VIOLATED: 0, Outcome.INCONCLUSIVE: 1, Outcome.HELD: 2}


def _order(c: GateCheck) -> tuple[bool, int]:
    return c.check.severity != "error", _GRAVITY[c.check.outcome]


def _doubts(judged: _Judged, asked: set[int], checkpoint_step: int | None) -> Iterator[str]:
    """Why a run is no evidence, or not of what is to be merged; `asked` are the audits that the checks rest on.

    Raises:
        RecordError: what such an audit measured is damaged.
    """
    run = judged.run
    if run.failed:
        yield run.failed
    if run.torn:
        yield "the last record was cut off while it was written"
    if not run.ended:
        yield "training has not finished, or was killed: the model it ends with was not audited"
    if not judged.trained:
        yield "no audit was recorded" if not run.audits else "only the audit before training was recorded"
        return
    last = judged.trained[-1]
    ats = {rule.at for rule in judged.policy.rules}
    step = run.audits[last].step
    if checkpoint_step is not None and step < checkpoint_step:
        yield f"the evidence is stale: the last audit is of step {step}, the checkpoint of step {checkpoint_step}"
    elif checkpoint_step is not None and step > checkpoint_step and "last" in ats:
        yield (
            f"the last audit is of step {step}, the checkpoint of step {checkpoint_step}: not what is to be merged is "
            "judged; rules with `at: checkpoint` are judged at the checkpoint's step"
        )
    if "every" in ats and not run.failed:
        yield from (f"the audit at step {failed} failed" for failed in run.failed_steps)
    if not (run.path / SAMPLES).is_file():
        yield f"{run.path / SAMPLES} is missing: the run directory is incomplete"
    for index in sorted(asked):
        run.verify(index)
        count = run.samples(index)
        if count is not None and count < run.manifest.samples_audited:
            yield (
                f"the audit at step {run.audits[index].step} is partial: it holds {count} of "
                f"{run.manifest.samples_audited} samples"
            )


class _Judged:
    """A run's audits judged by one policy, each when it is first asked for."""

    def __init__(self, run: Run, policy: Policy) -> None:
        self.run, self.policy = run, policy
        self.trained = [i for i, audit in enumerate(run.audits) if audit.trigger != "reference"]
        self._known: dict[int, Judgement] = {}

    @cached_property
    def worst(self) -> WorstImages:
        from bias_audit.gate.worst import WorstImages

        return WorstImages(self.run)

    def at(self, index: int) -> Judgement:
        if index not in self._known:
            manifest = self.run.manifest
            estimates = self.run.audits[index].estimates
            self._known[index] = judge(estimates, manifest.subjects, self.policy, manifest.methods)
        return self._known[index]

    def since(self, index: int, check: Check) -> int:
        """The step from which on the same check was violated without a break."""
        step = self.run.audits[index].step
        for before in reversed([i for i in self.trained if i < index]):
            alike = (c for c in self.at(before).checks if (c.rule, c.subject) == (check.rule, check.subject))
            if not any(c.outcome is Outcome.VIOLATED for c in alike):
                break
            step = self.run.audits[before].step
        return step


class _Asked:
    """The checks of each rule, at the audits that it names."""

    def __init__(self, judged: _Judged, beside: Beside | None, checkpoint_step: int | None) -> None:
        self.judged, self.beside, self.checkpoint_step = judged, beside, checkpoint_step

    def checks(self) -> Iterator[tuple[GateCheck, int | None]]:
        """Each check with the audit it was made at."""
        for rule in self.judged.policy.rules:
            indices, doubt = self._audits(rule)
            if doubt:
                yield GateCheck(_unknown(rule, rule.title, doubt)), None
            found = [(c, index) for index in indices for c in self._of_audit(rule, index)]
            kept = [(now, index) for c, index in found if (now := self._of_now(rule, c, index)) is not None]
            yield from kept
            if found and not kept:
                yield GateCheck(_unknown(rule, rule.title, "at none of the audits was it measured anew")), None

    def _of_audit(self, rule: Rule, index: int) -> list[GateCheck]:
        judgement, step = self.judged.at(index), self.judged.run.audits[index].step
        found = [GateCheck(check) for check in judgement.checks if check.rule == rule.title]
        found += self._regressions(rule, index) if rule.max_regression is not None else []
        return [replace(c, check=replace(c.check, step=step), finding=judgement.finding(c.check)) for c in found]

    def _of_now(self, rule: Rule, found: GateCheck, index: int) -> GateCheck | None:
        """The check, which does not hold by what an earlier model showed; None where that is judged by itself."""
        check, finding = found.check, found.finding
        evidence = (check.estimate,) if finding is None else finding.evidence
        # How fit a method is changes little while a model trains, and is tested anew in the end.
        age = max((e.age for e in evidence if e is not None and e.metric not in EXPLAINER_METRICS), default=0)
        if rule.at == "every" and finding is None and age:
            return None
        if not age or check.outcome is not Outcome.HELD:
            return found
        since = self.judged.run.audits[max(0, index - age)].step
        why = f"but this rests on what was measured at step {since}, {age} audits before what is judged"
        unknown = replace(check, outcome=Outcome.INCONCLUSIVE, message=f"{check.message}; {why}")
        return replace(found, check=unknown)

    def _regressions(self, rule: Rule, index: int) -> list[GateCheck]:
        if self.beside is None:
            return [GateCheck(_unknown(rule, rule.title, "the gate was given no baseline: name one with --baseline"))]
        least = least_samples(rule, self.judged.policy)
        manifest, estimates = self.judged.run.manifest, self.judged.run.audits[index].estimates
        # A threshold has found them already.
        missing = unrecorded(rule, estimates, manifest.subjects, manifest.methods) if rule.threshold is None else []
        return [
            *(GateCheck(check) for check in missing),
            *(
                GateCheck(found.check(least), baseline=found.before, change=found.worse)
                for found in self.beside.regressions(rule, index)
            ),
        ]

    def _audits(self, rule: Rule) -> tuple[Sequence[int], str]:
        """Which audits a rule is judged at; or none, and why."""
        judged, run = self.judged, self.judged.run
        if rule.at == "last":
            return judged.trained[-1:], ""
        if rule.at == "every":
            return judged.trained, ""
        step = run.best_step if rule.at == "best" else self.checkpoint_step
        if step is None:
            if rule.at == "best":
                return (), "the run recorded no best checkpoint: it had no ModelCheckpoint with a monitor"
            return (), "the gate was given no checkpoint: name it with --checkpoint"
        indices = [i for i in judged.trained if run.audits[i].step == step][-1:]
        return indices, "" if indices else f"no audit was made at step {step}, where the checkpoint was saved"


def _unknown(rule: Rule, subject: str, reason: str) -> Check:
    return Check(rule.title, subject, Outcome.INCONCLUSIVE, rule.severity, f"{rule.title}: {reason}")


def _explained(
    judged: _Judged, file: PolicyFile, found: GateCheck, index: int | None, beside: Beside | None
) -> GateCheck:
    """A check with what a person needs to act on it."""
    found = replace(found, line=file.line_of(found.check.rule))
    if found.check.outcome is not Outcome.VIOLATED or index is None:
        return found
    # A regression is from the baseline, whatever earlier audits say.
    since = None if found.change is not None else judged.since(index, found.check)
    before = beside.baseline.samples.columns if beside is not None and found.change is not None else None
    return replace(found, since=since, worst=_worst(judged, index, found, before))


def _worst(judged: _Judged, index: int, found: GateCheck, before: SampleColumns | None) -> tuple[str, ...]:
    """The images to look at first; of a verdict on a region those of what was measured there."""
    e = found.check.estimate
    if found.finding is not None:
        e = next((e for e in found.finding.evidence if e.region is not None), e)
    too_low = next(rule.op in (">", ">=") for rule in judged.policy.rules if rule.title == found.check.rule)
    return () if e is None else judged.worst.of(index, e, WORST, too_low, before)

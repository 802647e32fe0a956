"""Whether a merge may go ahead.

Enters: a `Run`, a `Policy`, and perhaps a baseline. Leaves: a `GateResult`: held only on evidence, and on any doubt
inconclusive.

torch is never imported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from bias_audit.gate.checks import Checks, JudgedRun, explained
from bias_audit.gate.result import FailOn, GateCheck, GateResult, OnInconclusive
from bias_audit.policies.file import PolicyFile, read_policy
from bias_audit.policies.policy import Policy
from bias_audit.records.files import SAMPLES
from bias_audit.records.history import onsets
from bias_audit.records.runs import Run
from bias_audit.terms import Outcome

if TYPE_CHECKING:
    from bias_audit.gate.baseline import Baseline

# None: those that the run was recorded with.
Rules: TypeAlias = PolicyFile | Policy | str | Path | Mapping[str, Any] | None


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
        >>> import tempfile
        >>> from torch import nn
        >>> from bias_audit import AuditPlan, audit_model, read_run
        >>> from bias_audit.data.scenes import scene_dataset
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        >>> few = scene_dataset({("doctor", "female"): 4, ("nurse", "male"): 4}, seed=0)
        >>> plan = AuditPlan(fitness_samples=0, intervention_samples=0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     result = audit_model(net, few, plan=plan, out=folder)
        ...     run_gate(read_run(folder), {"rules": [{"metric": "accuracy", "min": 0.9}]}).exit_code  # too few images
        3
    """
    recorded = run.manifest.policy if policy is None else policy
    file = recorded if isinstance(recorded, PolicyFile) else read_policy(recorded)
    file.check_names(run.manifest.subjects, run.manifest.methods)
    judged = JudgedRun(run, file.policy)
    against = None
    if baseline is not None:
        from bias_audit.gate.regressions import beside

        against = beside(baseline, run, file.policy)
    asked = Checks(judged, against, checkpoint_step)
    # Without an audit there is one doubt, not one for each rule.
    made = tuple(asked.checks()) if judged.trained else ()
    found = (*doubts, *_doubts(judged, {index for _, index in made if index is not None}, checkpoint_step))
    checks = [explained(judged, file, c, index, asked.beside) for c, index in made]
    last = judged.trained[-1] if judged.trained else None
    result = GateResult(
        outcome=Outcome.INCONCLUSIVE,
        source=str(run.path) if source is None else source,
        run_id=run.manifest.run_id,
        policy=file,
        audit=None if last is None else run.audits[last],
        judgement=None if last is None else judged.at(last),
        checks=tuple(sorted(checks, key=_order)),
        doubts=found,
        onsets=onsets(run.audits),
        caveats=tuple(run.manifest.caveats.values()),
        fail_on=fail_on,
        on_inconclusive=on_inconclusive,
        exit_zero=exit_zero,
    )
    return replace(result, outcome=_outcome(result))


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


def _doubts(judged: JudgedRun, asked: set[int], checkpoint_step: int | None) -> Iterator[str]:
    """Why a run is no evidence, or not of what is to be merged; `asked` are the audits that the checks rest on.

    Raises:
        RecordError: what such an audit measured is damaged.
    """
    run = judged.run
    yield from run.unfinished
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
        if run.partial(index):
            yield run.partial(index)

"""Whether a merge may go ahead.

Enters: a `Run` and a `Policy`. Leaves: a `GateResult`: held only on evidence, and on any doubt inconclusive.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bias_audit.policy import Policy
from bias_audit.records import AuditSummary, Run
from bias_audit.terms import Outcome
from bias_audit.verdict import Judgement, judge

EXIT_CODES = {Outcome.HELD: 0, Outcome.VIOLATED: 1, Outcome.INCONCLUSIVE: 3}


@dataclass(frozen=True)
class GateResult:
    """The outcome, the audit it rests on with what follows from it (None without one), and every reason for doubt."""

    outcome: Outcome
    audit: AuditSummary | None
    judgement: Judgement | None
    doubts: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        """0 held, 1 violated, 3 inconclusive."""
        return EXIT_CODES[self.outcome]


def run_gate(run: Run, policy: Policy | str | Path | Mapping[str, Any] | None = None) -> GateResult:
    """Judge a run's last audit by `policy`, or by the policy it was recorded with.

    The audit before training is no evidence. A last record that was cut off, a last audit that failed and a training
    that did not end are doubts: they turn "held" into "inconclusive".

    Raises:
        ValueError: the policy cannot be read, or names what the audit set does not have.

    Example:
        >>> from bias_audit.records import read_run
        >>> run_gate(read_run("runs/today"), {"rules": [...]}).exit_code  # doctest: +SKIP
        1
    """
    policy = run.manifest.policy if policy is None else Policy.load(policy)
    doubts = [run.failed] if run.failed else []
    if run.torn:
        doubts.append("the last record was cut off while it was written")
    if not run.ended:
        doubts.append("training has not finished, or was killed: the model it ends with was not audited")
    trained = [audit for audit in run.audits if audit.trigger != "reference"]
    if not trained:
        policy.check_names(run.manifest.subjects)
        doubts.append("no audit was recorded" if not run.audits else "only the audit before training was recorded")
        return GateResult(Outcome.INCONCLUSIVE, None, None, tuple(doubts))
    judgement = judge(trained[-1].estimates, run.manifest.subjects, policy)
    outcome = judgement.outcome
    if doubts and outcome is Outcome.HELD:
        outcome = Outcome.INCONCLUSIVE
    return GateResult(outcome, trained[-1], judgement, tuple(doubts))

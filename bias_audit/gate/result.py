"""What the gate found.

Enters: checks, reasons for doubt, and what the caller makes of them. Leaves: a `GateResult`, with its exit code.

Standard library and pydantic only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bias_audit.policies.file import PolicyFile
from bias_audit.records.history import Change, Onset
from bias_audit.records.results import AuditSummary
from bias_audit.terms import Estimate, Outcome
from bias_audit.verdicts.findings import Finding
from bias_audit.verdicts.judgement import Check, Judgement

FailOn = Literal["error", "warn"]
OnInconclusive = Literal["fail", "warn", "pass"]
EXIT_CODES = {Outcome.HELD: 0, Outcome.VIOLATED: 1, Outcome.INCONCLUSIVE: 3}


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
    words of whoever asked. `caveats` say which regions some images lack, or have as boxes.

    Example:
        >>> from bias_audit.policies.file import read_policy
        >>> policy = read_policy(None)
        >>> GateResult(Outcome.INCONCLUSIVE, "runs/today", None, policy, None, None, (), ("no audit",)).exit_code
        3
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
    caveats: tuple[str, ...] = ()
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

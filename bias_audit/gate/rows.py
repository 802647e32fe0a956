"""What a person needs to know of each check, in the order in which it matters.

Enters: a `GateResult`. Leaves: a `Row` for each of its checks, its outcome in a sentence, and what to do about it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bias_audit.gate.result import EXIT_CODES, GateCheck, GateResult
from bias_audit.policies.policy import Rule
from bias_audit.records.history import Change
from bias_audit.terms import Estimate, Outcome, Verdict
from bias_audit.verdicts.findings import Finding
from bias_audit.verdicts.judgement import Check
from bias_audit.wording import interval

State = Literal["violated", "warning", "inconclusive", "held"]
STATES: tuple[State, ...] = ("violated", "warning", "inconclusive", "held")
PASSED = {Outcome.HELD: "passed", Outcome.VIOLATED: "violated", Outcome.INCONCLUSIVE: "inconclusive"}


@dataclass(frozen=True)
class Row:
    """One check in words. `state` is "warning" where it is violated and the outcome does not hang on it.

    `metric` is the rule's; `measured` the number with its interval or the verdict, "–" where there is none; `limit`
    what must hold; `n` the images behind the number, "–" for a verdict, which weighs several numbers; `reason` why it
    came out so.
    """

    check: Check
    state: State
    counts: bool
    metric: str
    limit: str
    measured: str
    n: str
    finding: Finding | None
    since: int | None
    worst: tuple[str, ...]
    line: int | None
    reason: str
    baseline: Estimate | None
    change: Change | None

    @property
    def verdict(self) -> Verdict | None:
        """What a check on a verdict found; None of other checks."""
        return None if self.finding is None else self.finding.verdict

    @property
    def label(self) -> str:
        """The state, and that the outcome does not hang on it where it does not."""
        minor = self.state in ("inconclusive", "held") and not self.counts
        return f"{self.state} (warn)" if minor else self.state


def rows(result: GateResult) -> tuple[Row, ...]:
    """The checks: first what is violated, last what held, and of these first those that the outcome hangs on."""
    rules = {rule.title: rule for rule in result.policy.policy.rules}
    found = [_row(result, one, rules.get(one.check.rule)) for one in result.checks]
    return tuple(sorted(found, key=lambda row: (STATES.index(row.state), not row.counts)))


def tally(result: GateResult) -> str:
    """How many checks came out how.

    Example:
        >>> tally(run_gate(read_run("runs/today")))  # doctest: +SKIP
        '2 violated, 1 inconclusive, 11 held'
    """
    states = [row.state for row in rows(result)]
    counted = [f"{states.count(state)} {_IN_TALLY.get(state, state)}" for state in STATES if state in states]
    return ", ".join(counted) or "nothing was checked"


def outcome_words(result: GateResult) -> str:
    """The outcome, and the exit code where it was asked not to follow from it."""
    asked = "" if result.exit_code == EXIT_CODES[result.outcome] else f" (exit code {result.exit_code}, as asked)"
    return f"{PASSED[result.outcome]}{asked}"


def advice(result: GateResult) -> str:
    """What to do now, in a sentence or two; "" where all is well."""
    if result.outcome is Outcome.HELD:
        return ""
    if result.outcome is Outcome.VIOLATED:
        first = next((row for row in rows(result) if row.state == "violated"), None)
        where = ""
        if first is not None and result.policy.path is not None:
            where = f" ({result.policy.path}{f', line {first.line}' if first.line else ''})"
        images = "the images that are named and " if any(row.worst for row in rows(result)) else ""
        return (
            f"Look at {images}the run's report.html, correct the data or the training, and train again. A limit that "
            f"is wrong is changed in the policy{where}, where others see it."
        )
    if result.doubts:
        return "The evidence is not whole: remove the cause that is named, audit again, then run the gate again."
    if not any(result.counts(c.check) for c in result.checks):
        return "No rule of severity error was judged: the policy needs one, or the gate `--fail-on warn`."
    settle = [f.samples_to_settle for f in result.judgement.findings if f.samples_to_settle] if result.judgement else []
    about = f" About {max(settle)} images of that kind would settle the verdicts." if settle else ""
    return f"Nothing is shown either way: audit more images, or measure what is missing.{about}"


def blocking(result: GateResult) -> tuple[Row, ...]:
    """The rows that made the outcome what it is; () where all held."""
    if result.outcome is Outcome.HELD:
        return ()
    return tuple(row for row in rows(result) if row.counts and row.check.outcome is result.outcome)


_IN_TALLY: dict[State, str] = {"warning": "violated as a warning"}


def _row(result: GateResult, one: GateCheck, rule: Rule | None) -> Row:
    check, e = one.check, one.check.estimate
    counts = result.counts(check)
    state: State = check.outcome.value
    if check.outcome is Outcome.VIOLATED and not counts:
        state = "warning"
    verdict = one.finding.verdict if one.finding is not None else None
    return Row(
        check,
        state,
        counts,
        rule.metric if rule is not None else "rule",
        _limit(one, rule),
        _measured(one, verdict),
        str(e.n) if e is not None and verdict is None else "–",
        one.finding,
        one.since,
        one.worst,
        one.line,
        _reason(result, check, verdict),
        one.baseline,
        one.change,
    )


def _limit(one: GateCheck, rule: Rule | None) -> str:
    if one.change is not None and one.check.limit is not None:
        return f"worse by <= {one.check.limit:g}"
    if rule is None:
        return ""
    both = rule.threshold is not None and rule.max_regression is not None
    return rule.limit.rpartition(" and ")[0] if both and one.check.limit is not None else rule.limit


def _measured(one: GateCheck, verdict: Verdict | None) -> str:
    if verdict is not None:
        return verdict.value
    if one.change is not None:
        worse = one.change
        return "–" if worse.value is None else f"worse by {worse.value:z.3f} [{worse.low:z.3f}, {worse.high:z.3f}]"
    return "–" if one.check.estimate is None else interval(one.check.estimate)


def _reason(result: GateResult, check: Check, verdict: Verdict | None) -> str:
    e, last = check.estimate, result.audit.step if result.audit is not None else None
    # What the other columns say is not said twice.
    said = check.message.removeprefix(f"{e}; ").removeprefix(f"{check.subject}: ")
    if verdict is not None:
        said = said.removeprefix(f"{verdict}. ")
    elif e is not None and e.age:
        said += f"; measured {e.age} audit{'' if e.age == 1 else 's'} ago"
    return f"{said}; at step {check.step}" if check.step not in (None, last) else said

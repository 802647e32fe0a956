"""The checks of a policy's rules on a run, each at the audits that its rule names.

Enters: a `Run`, a `Policy`, and perhaps a baseline beside the run. Leaves: `GateCheck`s, each with the audit that it
was made at, and what a person needs to act on it.

NumPy is imported only where a rule is violated, to look up the images that weigh most, or compared with a baseline.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

from bias_audit.gate.result import GateCheck
from bias_audit.policies.file import PolicyFile
from bias_audit.policies.policy import Policy, Rule
from bias_audit.records.runs import Run
from bias_audit.terms import EXPLAINER_METRICS, Outcome
from bias_audit.verdicts.judgement import Check, Judgement, judge, least_samples, unrecorded

if TYPE_CHECKING:
    from bias_audit.gate.columns import SampleColumns
    from bias_audit.gate.regressions import Beside
    from bias_audit.gate.worst import WorstImages

WORST = 5


class JudgedRun:
    """A run's audits judged by one policy, each when it is first asked for."""

    def __init__(self, run: Run, policy: Policy) -> None:
        self.run, self.policy = run, policy
        self.trained = run.trained
        self._known: dict[int, Judgement] = {}

    @cached_property
    def worst(self) -> WorstImages:
        """The images that weigh most in an estimate."""
        from bias_audit.gate.worst import WorstImages

        return WorstImages(self.run)

    def at(self, index: int) -> Judgement:
        """What follows from audit `index`, counted from 0."""
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


class Checks:
    """The checks of each rule, at the audits that it names."""

    def __init__(self, judged: JudgedRun, beside: Beside | None, checkpoint_step: int | None) -> None:
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


def explained(
    judged: JudgedRun, file: PolicyFile, found: GateCheck, index: int | None, beside: Beside | None
) -> GateCheck:
    """A check with what a person needs to act on it."""
    found = replace(found, line=file.line_of(found.check.rule))
    if found.check.outcome is not Outcome.VIOLATED or index is None:
        return found
    # A regression is from the baseline, whatever earlier audits say.
    since = None if found.change is not None else judged.since(index, found.check)
    before = beside.baseline.samples.columns if beside is not None and found.change is not None else None
    return replace(found, since=since, worst=_worst(judged, index, found, before))


def _worst(judged: JudgedRun, index: int, found: GateCheck, before: SampleColumns | None) -> tuple[str, ...]:
    """The images to look at first; of a verdict on a region those of what was measured there."""
    e = found.check.estimate
    if found.finding is not None:
        e = next((e for e in found.finding.evidence if e.region is not None), e)
    too_low = next(rule.op in (">", ">=") for rule in judged.policy.rules if rule.title == found.check.rule)
    return () if e is None else judged.worst.of(index, e, WORST, too_low, before)

"""By how much a run is worse than a baseline.

Enters: a `Baseline`, a `Run` and a `Policy`. Leaves: a `Regression` for each estimate that a rule's `max_regression` is
about, and its `Check`.

NumPy is imported only where images are compared: the gate imports this module and must start in a blink.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bias_audit.gate.baseline import About, Baseline
from bias_audit.policies.policy import Policy, Rule
from bias_audit.records.history import Change
from bias_audit.records.results import AuditSummary
from bias_audit.records.runs import Run
from bias_audit.terms import Estimate, Outcome, is_of_maps
from bias_audit.verdicts.explainers import Explainer, explainers, not_listened_to
from bias_audit.verdicts.judgement import Check, matched
from bias_audit.wording import interval

if TYPE_CHECKING:
    from bias_audit.gate.pairing import Key


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


def beside(baseline: Baseline, run: Run, policy: Policy) -> Beside:
    """The baseline and a run that is judged by `policy`.

    Raises:
        ValueError: the run audited another data set, layer or method; the message names each difference.

    Example:
        >>> from bias_audit.gate.baseline_file import read_baseline
        >>> from bias_audit.records.runs import read_run
        >>> pair = beside(read_baseline("main.jsonl"), read_run("runs/today"), policy)  # doctest: +SKIP
        >>> [str(found) for found in pair.regressions(policy.rules[0], -1)]  # doctest: +SKIP
        ['enrichment on hair (gradcam): ...']
    """
    unlike = list(_differences(baseline.about, run))
    if unlike:
        raise ValueError(
            f"baseline {baseline.source}: is of another audit than {run.path}: {'; '.join(unlike)}: compare with a "
            "baseline of the same, or make a new one by `bias-audit baseline update`"
        )
    return Beside(baseline, run, policy)


class Beside:
    """A baseline and a run of the same data set, layer and methods: see `beside`."""

    def __init__(self, baseline: Baseline, run: Run, policy: Policy) -> None:
        self.baseline, self.run, self.policy = baseline, run, policy
        self._paired: dict[int, dict[Key, tuple[Change, int]]] = {}

    def regressions(self, rule: Rule, index: int) -> tuple[Regression, ...]:
        """How each estimate that `rule` is about changed for the worse, at the run's audit `index`; -1 is the last.

        Image by image where both audits measured at least half of the images that the estimate is of; else from the two
        intervals, as if the images were others. An estimate of an explanation method that is not fit, here or in the
        baseline, says nothing; where another method speaks of the same it is left out, unless the rule asks for it.
        Averaged weights (EMA) are not compared with raw ones: the difference would be that of the averaging.

        Raises:
            RecordError: the run's arrays or the baseline's samples cannot be read.
        """
        if rule.max_regression is None:
            return ()
        index %= len(self.run.audits)
        audit = self.run.audits[index]
        doubts = self._doubts(audit) if is_of_maps(rule.metric) else {}
        unfit = [x.method for x, _ in doubts.values() if x.fit is False and rule.method is None]
        both = self._both(rule, audit)
        silent = not_listened_to([e for pair in both if (e := pair[0] or pair[1]) is not None], unfit)
        found = []
        for now, before in both:
            e = now or before
            if e is not None and e in silent:
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

    def _doubts(self, audit: AuditSummary) -> dict[str | None, tuple[Explainer, str]]:
        """The explanation methods that are not shown to be fit, here or in the baseline, and why."""
        found: dict[str | None, tuple[Explainer, str]] = {}
        for where, estimates in (("in the baseline ", self.baseline.estimates), ("", audit.estimates)):
            for x in explainers(estimates, self.policy):
                # What is unfit in one of the two is unfit.
                if not x.fit and (x.method not in found or found[x.method][0].fit is None):
                    found[x.method] = (x, f"{where}{x.doubt}")
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
            reason = self._other_weights(index) or doubt
        if reason or now is None or before is None:
            return Regression(rule, now, before, Change(None, None, None, reason), None)
        from bias_audit.gate.pairing import unpaired_change

        paired = self._changes(index).get(now.key)
        change, pairs = (unpaired_change(before, now), None) if paired is None else paired
        return Regression(rule, now, before, _for_the_worse(change, rule), pairs)

    def _other_weights(self, index: int) -> str:
        """That the two audits are of weights of different kinds; "" where they are not."""
        now, before = self.run.audits[index].weights, self.baseline.about.weights
        if now == before:
            return ""
        return f"the baseline is of {before} weights and this audit of {now} weights: give a baseline of {now} weights"

    def _changes(self, index: int) -> dict[Key, tuple[Change, int]]:
        """Of all rules with `max_regression`, what can be compared image by image: drawn once, and together."""
        if index not in self._paired:
            from bias_audit.evidence.cells import cells
            from bias_audit.gate.columns import SampleColumns
            from bias_audit.gate.pairing import group_changes, paired_changes

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


def _numbers(e: Estimate) -> str:
    if not e.measured:
        return f"not measured ({e.reason or 'no valid image'})"
    return f"{interval(e)}, n = {e.n}"


_Pair = tuple[Estimate | None, Estimate | None]


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

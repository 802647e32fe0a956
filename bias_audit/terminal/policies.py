"""What a policy asks and how a run would come out, and what became the baseline."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.padding import Padding

from bias_audit.terminal.text import MOST_ROWS, OUTCOME_STYLES, text
from bias_audit.terms import Outcome

if TYPE_CHECKING:
    from pathlib import Path

    from bias_audit.gate.baseline import Baseline
    from bias_audit.gate.policy_check import PolicyReport


def print_baseline(
    console: Console, made: Baseline, path: Path, size: int, before: Baseline | None, outcome: Outcome
) -> None:
    """What became the baseline, what it replaces, and whether the run's own policy allows what it shows."""
    about = made.about
    what = f"step {about.step} of run {about.run_id}, {len(made.estimates)} estimates, {about.samples_audited} images"
    console.print(text(f"{path}: {what}, {size / 1000:.0f} kB"))
    if before is not None:
        console.print(text(f"It replaces step {before.about.step} of run {before.about.run_id}."))
    if outcome is not Outcome.HELD:
        console.print(text(f"By its own policy this run is {outcome}, and so is now the baseline.", "yellow"))


def print_policy(console: Console, report: PolicyReport, missing: str = "") -> None:
    """Each rule in a sentence, what it is about and how it would come out; `missing` is why there is no run."""
    result, count = report.result, len(report.rules)
    where = "" if result is None or result.audit is None else f" on run {result.run_id}, step {result.audit.step}"
    console.print(text(f"{report.policy.path}: {count} rule{'' if count == 1 else 's'}{where}", "bold"))
    console.print(
        text("Violated: the whole 95 % interval lies beyond the limit. Held: it lies within. Else inconclusive.")
    )
    for i, one in enumerate(report.rules, 1):
        line = "" if one.line is None else f"line {one.line}, "
        console.print(text(f"{i}. {one.rule.title} ({line}{one.rule.severity})", "bold"))
        said = [text(f"Asks: {one.sentence}.")]
        for c in one.checks[:MOST_ROWS]:
            step = f" at step {c.step}" if one.rule.at == "every" else ""
            said.append(text(f"{c.outcome}{step}: {c.message}", OUTCOME_STYLES[c.outcome]))
        said += [text(f"and {len(one.checks) - MOST_ROWS} more")] if len(one.checks) > MOST_ROWS else []
        said += [text(f"Matches nothing: {one.nothing}.", "yellow")] if one.nothing else []
        for words in said:
            console.print(Padding(words, (0, 0, 0, 3), expand=False))
    for doubt in (missing,) if missing else () if result is None else result.doubts:
        console.print(text(f"Inconclusive: {doubt}.", "yellow"))
    if result is not None:
        outcomes = [one.outcome for one in report.rules]
        told = [f"{outcomes.count(outcome)} {outcome}" for outcome in Outcome if outcome in outcomes]
        told += [f"{outcomes.count(None)} without anything to ask of"] if None in outcomes else []
        console.print(text(f"bias-audit policy check: of {count} rules {', '.join(told)}"))
